"""Gradients of every op by central differences of the float64 reference, under a random upstream gradient."""

from __future__ import annotations

import pytest

from fastdl.kernels import registry

from . import checks

SPECS = [spec for spec in registry.specs() if checks.has_gradient(spec)]


@pytest.mark.best_level
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_gradients(spec, runner):
    seen: dict[str, int] = {}
    for call in checks.gradient_calls(spec):
        checks.gradients(call, runner.backend, seen)
    missing = [a.name for a in checks.gradient_arrays(spec) if not seen.get(a.name)]
    assert not missing, f"{spec.name}: no gradient was checked for {missing}"


def test_ops_without_gradient_say_so():
    """A forward op either names its gradients, gives its own, or declares its float inputs to have none."""
    backward = {name for spec in registry.specs() for name in spec.gradients}
    for spec in registry.specs():
        if spec.name in backward or checks.has_gradient(spec) or not checks.gradient_arrays(spec):
            continue
        raise AssertionError(
            f"{spec.name}: no op gives the gradient of {[a.name for a in checks.gradient_arrays(spec)]}"
        )
