"""Infinities, NaN, signed zeros and kinks: the table of each op's spec, on every back end, in every lane."""

from __future__ import annotations

import numpy as np
import pytest

from fastdl.kernels import registry

from . import cases, checks

SPECS = [spec for spec in registry.specs() if spec.special]


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_table(spec, dtype, runner):
    with np.errstate(all="ignore"):
        for layout in ("plain", "strided", "panels") if runner.backend == "cython" else ("plain",):
            checks.special_values(spec, runner.backend, dtype, layout)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_table_has_what_every_table_must_have(spec):
    xs = [x for x, _ in spec.special]
    assert np.inf in xs
    assert -np.inf in xs
    assert any(np.isnan(x) for x in xs), "a table without NaN"
    for kink in spec.kinks:
        assert kink in xs, f"the kink at {kink} has no row"
