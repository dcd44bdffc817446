"""The call ABI: modules that were built against another one are refused before a call of theirs is read."""

from __future__ import annotations

import ctypes
import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import fastdl as fd
from fastdl.kernels import dispatch, registry
from fastdl.kernels.common import simd
from fastdl.kernels.engine import panels

pytestmark = pytest.mark.skipif(fd.backends()["cython"] != "available", reason=f"cython: {fd.backends()['cython']}")

ANSWER = (
    r"^fastdl.kernels.planted._cython was built against another abi.h than fastdl.kernels.engine._cython; "
    r"rebuild everything: pip install -e \.$"
)


def planted(name: bytes) -> SimpleNamespace:
    """A family whose one kernel is in a capsule of a name."""
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    info, kept = ctypes.create_string_buffer(64), ctypes.create_string_buffer(name)
    capsule = new(ctypes.addressof(info), ctypes.cast(kept, ctypes.c_char_p), None)
    kernels = {"planted_op": {"float32": capsule}}
    levels: list[int] = []
    return SimpleNamespace(
        __name__="fastdl.kernels.planted._cython", kernels=lambda: kernels, select=levels.append, levels=levels,
        kept=(info, kept),
    )  # fmt: skip


def own_name() -> bytes:
    name = ctypes.pythonapi.PyCapsule_GetName
    name.restype, name.argtypes = ctypes.c_char_p, (ctypes.py_object,)
    return name(registry.find("relu_forward", "cython").native["float32"])


def test_another_layout_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simd, "_modules", [])
    head, numbers = own_name().split(b" ")
    for k, size in enumerate(numbers.split(b"/")):  # version, fd_call, fd_run, fd_kernel_info
        changed = numbers.split(b"/")
        changed[k] = b"%d" % (int(size) + 8)
        module = planted(head + b" " + b"/".join(changed))
        with pytest.raises(ImportError, match=ANSWER):
            simd.attach(module)
        assert (module.levels, simd._modules) == ([], [])
    for name in (b"fastdl.kernel", b"another"):
        with pytest.raises(ImportError, match=ANSWER):
            simd.attach(planted(name))
    module = planted(own_name())
    simd.attach(module)
    simd.attach(module)
    assert simd._modules == [module]


def test_a_module_that_fails_leaves_none_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the reason is told again: it does not turn into "has two implementations"."""
    from fastdl.kernels.activations import _cython as activations

    registered: list[str] = []
    monkeypatch.setattr(registry, "register", lambda impl: registered.append(impl.op))
    monkeypatch.setattr(dispatch, "_modules", lambda backend: [activations, planted(b"fastdl.kernel")])
    for _ in range(2):
        with pytest.raises(ImportError, match=ANSWER):
            dispatch._load("cython")
    assert registered == []


def test_another_table_of_activations_is_refused() -> None:
    from fastdl.kernels.activations import _cython as activations

    with pytest.raises(ImportError, match=r"another activations/table\.h than their user; rebuild everything"):
        activations.table(8)


# ---------------------------------------------------------------------------------------------- layouts
@pytest.mark.parametrize("op", ["batchnorm_forward", "batchnorm_inference", "batchnorm_backward"])
@pytest.mark.parametrize("activation", ["identity", "sigmoid", "gelu"])
def test_any_matrix_may_be_in_panels(op: str, activation: str) -> None:
    """Each by itself, whatever the others are in."""
    spec, sizes = registry.spec(op), {"N": 37, "C": 100}
    made = spec.make(np.random.default_rng(0), sizes, np.float32, without=("slope", "dslope"))
    names = [array.name for array in spec.arrays]
    if op == "batchnorm_backward" and activation != "sigmoid":
        made[names.index("y")] = None
    matrices = [k for k, a in enumerate(spec.arrays) if a.shape == "N,C" and made[k] is not None]
    results = []
    for chosen in itertools.chain.from_iterable(itertools.combinations(matrices, n) for n in range(len(matrices) + 1)):
        arrays: list[Any] = [None if a is None else a.copy() for a in made]
        for k in chosen:
            arrays[k] = panels.pack(arrays[k])
        dispatch.run(op, *arrays, backend="cython", activation=activation)
        plain = [a.unpack() if type(a) is panels.Panels else a for a in arrays]
        results.append([a for a in plain if a is not None])
        for name, got, want in zip(names, results[-1], results[0], strict=False):
            np.testing.assert_array_equal(got, want, err_msg=f"{name}, panels: {[names[k] for k in chosen]}")
    assert len(results) == 2 ** len(matrices)
