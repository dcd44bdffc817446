"""Arrays as they come: rows with gaps, rows backwards, rows repeated, read-only, off alignment, in place, at the end of memory."""

from __future__ import annotations

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


def some_calls(spec, dtype, backend, full=False):
    """Calls of a slice; Numba compiles each layout anew, so it runs in one dtype alone unless ``full``."""
    if backend == "numba" and dtype == FLOAT64 and not full:
        pytest.skip("numba compiles every layout anew: float32 alone, float64 with --full")
    for k, call in enumerate(cases.calls(spec, dtype, full)):
        if full or k % 4 == 0:
            yield call


def by_name(spec):
    return spec.name


@pytest.mark.best_level
@pytest.mark.parametrize("layout", ["strided", "reversed", "shifted", "read-only"])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=by_name)
def test_layouts(spec, dtype, layout, runner, request):
    if layout in ("strided", "reversed") and spec not in WITH_MATRIX:
        pytest.skip("vectors are contiguous")
    for call in some_calls(spec, dtype, runner.backend, request.config.getoption("--full")):
        checks.matches_reference(call, runner.backend, threads=2, layout=layout)


@pytest.mark.best_level
@pytest.mark.parametrize("spec", WITH_MATRIX, ids=by_name)
def test_repeated_rows(spec, runner):
    """An input row that stands for all rows, by a stride of 0; rows that are all equal suit no op's tolerance, hence the
    comparison with plain rows."""
    for call in some_calls(spec, FLOAT32, runner.backend):
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
def test_in_place(spec, pair, dtype, runner):
    layouts = ("plain", "strided", "panels") if runner.backend == "cython" else ("plain",)
    for layout in layouts:
        for call in some_calls(spec, dtype, runner.backend):
            checks.takes_alias(call, runner.backend, pair, layout)


@pytest.mark.skipif(sys.platform == "win32", reason="mprotect is POSIX")
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=by_name)
def test_fences(spec, dtype, runner):
    """Arrays that end right before a page that may not be touched, or begin right after one: a stray access ends the run."""
    for layout in ("fence-end", "fence-start", "fence-end-gap"):
        if runner.backend == "numba" and (layout == "fence-end-gap" or dtype == FLOAT64):
            continue  # test_layouts compiles that one
        for call in some_calls(spec, dtype, runner.backend):
            checks.matches_reference(call, runner.backend, threads=2, layout=layout)
