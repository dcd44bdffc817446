"""DLPack's capsules in both directions, on the CPU with NumPy's and PyTorch's."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
import threading
import tracemalloc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from gpu.device import to_bfloat16
from gpu.producers import Giving, Owner, struct_of

from fastdl.cuda import dlpack


def at(tensor: dlpack.Tensor) -> np.ndarray:
    """The values at a tensor's address, by ctypes alone."""
    kind = np.dtype(tensor.dtype)
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.strides, strict=True))
    flat = np.frombuffer(ctypes.string_at(tensor.address, (last + 1) * kind.itemsize), kind)
    return np.lib.stride_tricks.as_strided(flat, tensor.shape, [step * kind.itemsize for step in tensor.strides])


# ---------------------------------------------------------------------------------------------- capsules taken
BASE = np.arange(24.0).reshape(4, 6)
LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "whole": lambda a: a,
    "transposed": lambda a: a.T,
    "columns": lambda a: a[:, 1:4],
    "every other": lambda a: a[1::2, ::3],
    "vector": lambda a: a[2],
    "one element": lambda a: a[3:, 5:],
    "scalar": lambda a: a[1, 1, ...],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "dtype", ["float32", "float64", "float16", "int8", "int32", "int64", "uint8", "bool", "complex64"]
)
def test_capsules_of_numpy(dtype: str, layout: str) -> None:
    source = LAYOUTS[layout](BASE.astype(dtype))
    tensor = dlpack.taken(source.__dlpack__())
    assert (tensor.shape, tensor.dtype, tensor.device) == (source.shape, dtype, (dlpack.CPU, 0))
    assert tensor.address == source.ctypes.data
    np.testing.assert_array_equal(at(tensor), source)


def test_a_taken_array_is_kept_and_then_released() -> None:
    source = BASE.copy()
    before = sys.getrefcount(source)
    capsule = source.__dlpack__()
    tensor = dlpack.taken(capsule)
    assert "used_dltensor" in repr(capsule)
    del capsule
    assert sys.getrefcount(source) == before + 1
    del tensor
    assert sys.getrefcount(source) == before


def test_a_capsule_is_taken_once() -> None:
    capsule = BASE.__dlpack__()
    tensor = dlpack.taken(capsule)
    with pytest.raises(ValueError, match=r"expected an unused capsule 'dltensor', found .*used_dltensor"):
        dlpack.taken(capsule)
    np.testing.assert_array_equal(at(tensor), BASE)
    with pytest.raises(ValueError, match="expected an unused capsule 'dltensor', found None"):
        dlpack.taken(None)


@pytest.mark.parametrize(("field", "value"), [("lanes", 4), ("code", 9), ("bits", 24)])
def test_types_that_nobody_has_are_refused_and_released(field: str, value: int) -> None:
    source = BASE.copy()
    before = sys.getrefcount(source)
    capsule = source.__dlpack__()
    setattr(struct_of(capsule), field, value)
    with pytest.raises(TypeError, match=rf"expected one of DLPack's types .*bfloat16.*, found .*{value}"):
        dlpack.taken(capsule)
    assert '"dltensor"' in repr(capsule)
    del capsule
    assert sys.getrefcount(source) == before


def test_no_strides_no_deleter_and_an_offset() -> None:
    source = np.arange(24, dtype=np.int64).reshape(2, 3, 4)
    capsule = source.__dlpack__()
    struct = struct_of(capsule)
    struct.strides, struct.byte_offset = None, 8
    deleter, struct.deleter = struct.deleter, None
    pointer = ctypes.addressof(struct)
    tensor = dlpack.taken(capsule)
    assert tensor.address == source.ctypes.data + 8
    assert tensor.strides == (12, 4, 1)
    del tensor
    ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(deleter)(pointer)


def test_capsules_of_torch() -> None:
    torch = pytest.importorskip("torch")
    for dtype in ("float32", "float64", "bfloat16", "float16", "int64", "int32", "uint8", "bool"):
        source = torch.arange(24).reshape(4, 6).to(getattr(torch, dtype))[:, 1:4]
        tensor = dlpack.taken(source.__dlpack__())
        assert (tensor.shape, tensor.strides, tensor.dtype) == ((4, 3), (6, 1), dtype)
        assert tensor.address == source.data_ptr()
        if dtype != "bfloat16":
            np.testing.assert_array_equal(at(tensor), source.numpy())
    memory = BASE.copy()
    before = sys.getrefcount(memory)
    tensor = dlpack.taken(torch.from_numpy(memory).__dlpack__())
    np.testing.assert_array_equal(at(tensor), memory)
    assert sys.getrefcount(memory) > before
    del tensor
    assert sys.getrefcount(memory) == before


# ---------------------------------------------------------------------------------------------- capsules given
def lent(source: np.ndarray, owner: Any, strides: bool = True) -> Any:
    steps = tuple(step // source.itemsize for step in source.strides) if strides else None
    return dlpack.given(source.ctypes.data, source.shape, steps, source.dtype, owner=owner, device=(dlpack.CPU, 0))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int64", "bool", "complex64", "complex128"])
def test_numpy_takes_what_is_given(dtype: str, layout: str) -> None:
    source = LAYOUTS[layout](BASE.astype(dtype))
    found = np.from_dlpack(Giving(lent(source, source)))
    assert found.ctypes.data == source.ctypes.data
    assert (found.dtype, found.shape) == (source.dtype, source.shape)
    np.testing.assert_array_equal(found, source)


def test_strides_may_be_left_out() -> None:
    source = np.arange(24).reshape(2, 3, 4)
    np.testing.assert_array_equal(np.from_dlpack(Giving(lent(source, source, strides=False))), source)


def test_torch_takes_what_is_given() -> None:
    torch = pytest.importorskip("torch")
    source, owner = BASE.astype(np.float32), Owner()
    ended = weakref.ref(owner)
    found = torch.from_dlpack(Giving(lent(source[:, 1:4], owner)))
    del owner
    np.testing.assert_array_equal(found.numpy(), source[:, 1:4])
    assert found.data_ptr() == source[:, 1:].ctypes.data
    part = found[1:]
    del found
    assert ended() is not None
    del part
    assert ended() is None
    bits = to_bfloat16(source)
    found = torch.from_dlpack(dlpack.given(bits.ctypes.data, bits.shape, None, "bfloat16", owner=bits, device=(1, 0)))
    assert found.dtype == torch.bfloat16
    np.testing.assert_array_equal(found.float().numpy(), source)


def test_a_capsule_says_what_was_said() -> None:
    tensor = dlpack.taken(dlpack.given(0x7000, (3, 5), (8, 1), "bfloat16", owner=None, device=(dlpack.CUDA, 1)))
    assert (tensor.address, tensor.shape, tensor.strides) == (0x7000, (3, 5), (8, 1))
    assert (tensor.dtype, tensor.device) == ("bfloat16", (dlpack.CUDA, 1))
    empty = dlpack.taken(dlpack.given(0, (0, 5), None, "float32", owner=None))
    assert (empty.address, empty.shape, empty.device) == (0, (0, 5), (dlpack.CUDA, 0))
    for dtype in dlpack.TYPES:
        assert dlpack.taken(dlpack.given(0x7000, (3,), None, dtype, owner=None)).dtype == dtype


def test_an_unused_capsule_releases_its_owner() -> None:
    owner = Owner()
    ended = weakref.ref(owner)
    capsule = dlpack.given(0x7000, (3,), None, "float32", owner=owner)
    del owner
    assert ended() is not None
    del capsule
    assert ended() is None


def test_a_used_capsule_leaves_the_owner_to_the_consumer() -> None:
    source, owner = BASE.copy(), Owner()
    ended = weakref.ref(owner)
    found = np.from_dlpack(Giving(lent(source, owner)))
    del owner
    part = found[1:]
    del found
    assert ended() is not None
    del part
    assert ended() is None


def test_an_exception_passes_a_capsule_unharmed() -> None:
    def consumer() -> None:
        int(dlpack.given(0x7000, (3,), None, "float32", owner=Owner()))  # destroyed while the TypeError passes

    with pytest.raises(TypeError, match="PyCapsule"):
        consumer()


def test_the_deleter_may_be_called_without_the_gil() -> None:
    ended = []
    for _ in range(50):
        owner = Owner()
        ended.append(weakref.ref(owner))
        capsule = dlpack.given(0x7000, (3,), None, "float32", owner=owner)
        pointer = dlpack._pointer(capsule, b"dltensor")
        delete = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(struct_of(capsule).deleter)
        dlpack._set_name(capsule, dlpack._USED)
        del owner, capsule
        thread = threading.Thread(target=delete, args=(pointer,))
        thread.start()
        thread.join()
    assert [one() for one in ended] == [None] * 50


def test_arrays_still_lent_when_python_ends() -> None:
    code = (
        "import numpy as np; from fastdl.cuda import dlpack\n"
        "a = np.ones(3); kept = dlpack.taken(a.__dlpack__())\n"
        "capsule = a.__dlpack__(); used = dlpack.taken(capsule)\n"
        "unused = dlpack.given(0x7000, (3,), None, 'float32', owner=a)\n"
        "class Giving:\n"
        "    def __dlpack_device__(self): return (1, 0)\n"
        "    def __dlpack__(self, **_):\n"
        "        return dlpack.given(a.ctypes.data, (3,), None, 'float64', owner=a, device=(1, 0))\n"
        "b = np.from_dlpack(Giving())\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_a_thousand_round_trips_leave_nothing() -> None:
    source = BASE.copy()

    def trips(count: int) -> None:
        for _ in range(count):
            dlpack.taken(source.__dlpack__())
            dlpack.taken(lent(source, source))
            np.from_dlpack(Giving(lent(source, source)))
            lent(source, source)

    references = sys.getrefcount(source)
    tracemalloc.start()
    try:
        memory = []
        for _ in range(2):  # the first time fills caches
            trips(1000)
            gc.collect()
            memory.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert sys.getrefcount(source) == references
    assert memory[1] - memory[0] < 40_000  # bytes; an object a trip is more, what tables vary by less
