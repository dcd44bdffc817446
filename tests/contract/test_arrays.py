"""Arrays as they come: rows with gaps, backwards, repeated, read-only, unaligned, in place, at the end of memory."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest

from fastdl.kernels import registry

from . import cases, checks

SPECS = registry.specs()
WITH_MATRIX = [spec for spec in SPECS if any(len(a.letters) == 2 for a in spec.arrays)]
PRODUCTS = [spec for spec in SPECS if cases.is_product(spec)]
ALIASED = [pytest.param(spec, pair, id=f"{spec.name}-{'-'.join(pair)}") for spec in SPECS for pair in spec.aliases]
FLOAT32, FLOAT64 = cases.DTYPES


def some_calls(spec, dtype):
    """Every fourth call of the slice."""
    return itertools.islice(cases.calls(spec, dtype), 0, None, 4)


def is_compiled_anew(spec, dtype, backend, layout):
    """Numba compiles a kernel for each layout, 1 to 15 s: every sixth op in float32 is the sample for CI."""
    return backend == "numba" and (dtype == FLOAT64 or (layout != "shifted" and SPECS.index(spec) % 6))


def by_name(spec):
    return spec.name


@pytest.mark.best_level
@pytest.mark.parametrize("layout", ["strided", "reversed", "shifted", "read-only"])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=by_name)
def test_layouts(spec, dtype, layout, runner, full_matrix):
    if layout in ("strided", "reversed") and spec not in WITH_MATRIX:
        pytest.skip("vectors are contiguous")
    if is_compiled_anew(spec, dtype, runner.backend, layout) and not full_matrix:
        pytest.skip("numba compiles it anew: with --full")
    for k, call in enumerate(some_calls(spec, dtype)):
        checks.matches_reference(call, runner.backend, threads=1 + k % 2, layout=layout)


@pytest.mark.best_level
@pytest.mark.parametrize("spec", WITH_MATRIX, ids=by_name)
def test_repeated_rows(spec, runner, full_matrix):
    """An input row that stands for all rows, by a stride of 0; rows that are all equal suit no op's tolerance, hence
    the comparison with plain rows."""
    if is_compiled_anew(spec, FLOAT32, runner.backend, "repeated") and not full_matrix:
        pytest.skip("numba compiles it anew: with --full")
    for call in some_calls(spec, FLOAT32):
        same = {
            a.name: np.repeat(x[:1], len(x), axis=0)
            for a, x in zip(spec.arrays, call.arrays, strict=True)
            if x is not None and a.role == "in" and x.ndim == 2 and len(x)
        }
        checks.is_as_plain(call.having(**same), runner.backend, "repeated")


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("spec", PRODUCTS, ids=by_name)
def test_transposed_inputs_of_products(spec, dtype, runner):
    for call in cases.calls(spec, dtype):
        checks.matches_reference(call, runner.backend, layout="transposed")


@pytest.mark.best_level
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize(("spec", "pair"), ALIASED)
def test_in_place(spec, pair, dtype, runner, full_matrix):
    if is_compiled_anew(spec, dtype, runner.backend, "shifted") and not full_matrix:
        pytest.skip("numba compiles it anew: with --full")
    layouts = ("plain", "strided", "panels") if runner.backend == "cython" else ("plain",)
    for layout in layouts:
        for call in some_calls(spec, dtype):
            checks.takes_alias(call, runner.backend, pair, layout)


@pytest.mark.skipif(sys.platform == "win32", reason="mprotect is POSIX")
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=by_name)
def test_fences(spec, dtype, runner):
    """Arrays that end right before a page that may not be touched, or begin right after one."""
    for layout in ("fence-end", "fence-start", "fence-end-gap"):
        if runner.backend == "numba" and (layout == "fence-end-gap" or dtype == FLOAT64):
            continue  # compiled anew
        for k, call in enumerate(some_calls(spec, dtype)):
            checks.matches_reference(call, runner.backend, threads=1 + k % 2, layout=layout)
