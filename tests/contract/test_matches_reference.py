"""Every op on every back end against the float64 reference: variants, sizes around the tile, layouts, SIMD levels."""

from __future__ import annotations

import numpy as np
import pytest

from fastdl.kernels import dispatch, registry

from . import cases, checks

SPECS = registry.specs()


def typed(spec: registry.OpSpec) -> tuple[np.dtype, ...]:
    """The float types of an op; one of them if no array has it."""
    return cases.DTYPES if any(a.dtype == "T" for a in spec.arrays) else cases.DTYPES[:1]


BY_DTYPE = [pytest.param(spec, dtype, id=f"{spec.name}-{dtype}") for spec in SPECS for dtype in typed(spec)]


def matrix(spec: registry.OpSpec, dtype: np.dtype, runner, layout: str, full: bool) -> None:
    number = 0
    for call in cases.calls(spec, dtype, full):
        number += 1
        checks.matches_reference(call, runner.backend, threads=1 + number % 2, layout=layout)
    assert number, f"{spec.name}: no call was in its domain"


@pytest.mark.parametrize(("spec", "dtype"), BY_DTYPE)
def test_plain_rows(spec, dtype, runner, full_matrix):
    if runner.backend == "numba" and dtype == cases.DTYPES[1] and SPECS.index(spec) % 6 and not full_matrix:
        pytest.skip("numba compiles it for a minute in all: float64 gradients are checked, this with --full")
    matrix(spec, dtype, runner, "plain", full=False)


@pytest.mark.full
@pytest.mark.parametrize(("spec", "dtype"), BY_DTYPE)
def test_plain_rows_in_full(spec, dtype, runner):
    matrix(spec, dtype, runner, "plain", full=True)


@pytest.mark.parametrize(("spec", "dtype"), BY_DTYPE)
def test_panels(spec, dtype, level):
    for number, call in enumerate(cases.calls(spec, dtype)):
        checks.matches_reference(call, "cython", threads=1 + number % 2, layout="panels")


@pytest.mark.full
@pytest.mark.parametrize(("spec", "dtype"), BY_DTYPE)
def test_panels_in_full(spec, dtype, level):
    for number, call in enumerate(cases.calls(spec, dtype, full=True)):
        checks.matches_reference(call, "cython", threads=1 + number % 3, layout="panels")


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_every_back_end_has_every_op(spec, backend):
    if backend == "cuda" and spec.on_host:
        pytest.skip("initial values are drawn on the host")
    found = dispatch.candidate(spec.name, backend)
    assert not isinstance(found, str), found


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_specs_are_complete(spec):
    """What contract tests, benches and the marshaller rely on."""
    assert spec.summary
    assert spec.family
    assert spec.outputs
    for size in (s for s in cases.sizes(spec) if 0 not in s.values()):
        assert all(tolerance.why for tolerance in spec.tolerances(size).values())
        assert spec.flops(size) >= 0
        assert spec.moved(size, 4) >= 0
    for name in spec.gradients:
        registry.spec(name)
    known = {p.name for p in spec.params}
    for variant in spec.variants:
        assert set(variant) <= known, f"variant {variant} has unknown parameters"
    for source, target in spec.aliases:
        assert spec.array(source).shape == spec.array(target).shape
