"""None where an op needs an array: a TypeError that names it, on every back end, before a pointer is taken.

Calls are made from the signatures of `fastdl.ops` and the roles of the registry: an op that is added is tested too.
"""

from __future__ import annotations

import inspect

import numpy as np
import pytest

from fastdl import ops
from fastdl.kernels import dispatch, registry

from .checks import refuses

X, C = np.linspace(0.1, 0.9, 12, dtype=np.float32).reshape(3, 4), np.ones(4, np.float32)
#: Values of all arguments without a default, by their names.
VALUES = {
    **dict.fromkeys(("x", "z", "targets", "dy", "g", "m", "v"), X),
    "w": np.ones((4, 4), np.float32),
    **dict.fromkeys(("gamma", "beta", "running_mean", "running_var", "slope"), C),
    "rate": 0.5,
    "seed": 1,
    "step": 0,
}
FUNCTIONS = [name for name in ops.__all__ if name != "Context"]


def given(function, backend):
    """Arguments of a call that goes through: copies, because optimisers write."""
    parameters = inspect.signature(function).parameters
    values = {name: VALUES[name] for name, p in parameters.items() if p.default is p.empty and name != "ctx"}
    if function.__name__ in ("sgd_step", "adam_step"):
        values["w"] = X
    if "ctx" in parameters:
        forward = getattr(ops, function.__name__.replace("backward", "forward"))
        values["ctx"] = forward(**given(forward, backend))[1]
    copies = {name: x.copy() if isinstance(x, np.ndarray) else x for name, x in values.items()}
    return copies | ({"backend": backend} if "backend" in parameters else {})


@pytest.mark.parametrize("name", FUNCTIONS)
def test_none_for_an_array(name, backend):
    function = getattr(ops, name)
    values = given(function, backend)
    function(**values)
    required = [k for k, x in values.items() if isinstance(x, np.ndarray)]
    assert required
    for missing in required:
        values = given(function, backend)
        left = [x for k, x in values.items() if isinstance(x, np.ndarray) and k != missing]
        holed = {**values, missing: None}
        refuses(lambda v=holed: function(**v), TypeError, [f"{missing}: expected", "None"], left)


SPECS = [spec for spec in registry.specs() if not spec.on_host]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_none_and_too_few_for_a_kernel(spec, rng):
    arrays = spec.make(rng, dict.fromkeys(spec.letters, 4), np.float32)
    for backend in ("numpy", "cython", "auto"):
        if backend == "cython" and dispatch.load(backend) != "available":
            continue
        for k, array in enumerate(spec.arrays):
            short = arrays[:k] + arrays[k + 1 :]
            refuses(lambda a=short, b=backend: dispatch.run(spec.name, *a, backend=b), TypeError, [spec.name, "arrays"])
            if not array.optional:
                holed = [*arrays[:k], None, *arrays[k + 1 :]]
                words = [f"{array.name}: expected an array, found None", spec.name]
                refuses(lambda a=holed, b=backend: dispatch.run(spec.name, *a, backend=b), TypeError, words)
