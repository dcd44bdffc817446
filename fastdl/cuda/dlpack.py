"""DLPack's ABI: arrays in a PyCapsule that holds their address, handed over without a copy. Both directions.

What is exchanged is the unversioned ``DLManagedTensor`` (``dlpack.h``), which every library gives and takes when nobody
names a ``max_version``: a capsule named "dltensor", renamed "used_dltensor" by the consumer, who calls the tensor's
deleter when he is done. Nothing here touches the memory itself, so that it may be a GPU's.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

CPU, CUDA, CUDA_HOST, CUDA_MANAGED = 1, 2, 3, 13  # DLDeviceType


class _Struct(ctypes.Structure):
    """``DLManagedTensor``, with its ``DLTensor`` in place."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


#: dtype -> (DLDataTypeCode, bits)
TYPES = {
    **{f"int{bits}": (0, bits) for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": (1, bits) for bits in (8, 16, 32, 64)},
    **{f"float{bits}": (2, bits) for bits in (16, 32, 64)},
    "bfloat16": (4, 16),
    **{f"complex{bits}": (5, bits) for bits in (64, 128)},
    "bool": (6, 8),
}
_NAMES = {value: name for name, value in TYPES.items()}

# Prototypes of this module's own: those of ctypes.pythonapi's attributes are everybody's. The GIL is held.
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_IsValid", ctypes.pythonapi))
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_set_name = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_SetName", ctypes.pythonapi))
_immortalise = ctypes.PYFUNCTYPE(None, ctypes.py_object)(("Py_IncRef", ctypes.pythonapi))
#: Called with the GIL: deleters that need it take it again, and those of NumPy before 1.24 rely on it.
_Deleter = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)

_FRESH, _USED = b"dltensor", b"used_dltensor"
_immortalise(_USED)  # a capsule keeps the pointer, and may be destroyed after this module


@dataclass(frozen=True, eq=False)
class Tensor:
    """An array taken from a capsule. The producer may free the memory once this object is gone."""

    address: int  # of the first element
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements
    dtype: str
    device: tuple[int, int]  # DLDeviceType, id


def compact(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides in elements of an array without gaps, the last dimension the fastest."""
    return tuple(math.prod(shape[k + 1 :]) for k in range(len(shape)))


def taken(capsule: Any) -> Tensor:
    """What a capsule holds; the capsule is used up, and the tensor's deleter runs when the result goes.

    A capsule that is refused stays as it was: its destructor releases the array.
    """
    if not _is_valid(capsule, _FRESH):
        raise ValueError(f"expected an unused capsule 'dltensor', found {capsule!r}; a capsule is taken once")
    pointer = _pointer(capsule, _FRESH)
    struct = _Struct.from_address(pointer)
    dtype = _NAMES.get((struct.code, struct.bits))
    if dtype is None or struct.lanes != 1:
        raise TypeError(
            f"expected one of DLPack's types {', '.join(TYPES)}, "
            f"found code {struct.code}, {struct.bits} bits, {struct.lanes} lanes"
        )
    shape = tuple(struct.shape[: struct.ndim])
    tensor = Tensor(
        (struct.data or 0) + struct.byte_offset,
        shape,
        tuple(struct.strides[: struct.ndim]) if struct.strides else compact(shape),
        dtype,
        (struct.device_type, struct.device_id),
    )
    if struct.deleter:
        # not at exit: launches may still read the memory, and the process gives all of it back
        weakref.finalize(tensor, _Deleter(struct.deleter), pointer).atexit = False
    _set_name(capsule, _USED)
    return tensor


class _Lent:
    """What NumPy sees of an array that is given: an address that it does not read."""

    def __init__(self, interface: dict[str, Any], owner: Any) -> None:
        self.__array_interface__, self.owner = interface, owner


def given(
    address: int,
    shape: Sequence[int],
    strides: Sequence[int] | None,
    dtype: Any,
    *,
    owner: Any,
    device: tuple[int, int] = (CUDA, 0),
) -> Any:
    """A capsule of the array at this address, for one consumer.

    ``owner`` lives until the consumer calls the deleter, from whichever thread, or until the capsule is destroyed
    unused. Strides are in elements, None where the array has no gaps.

    NumPy makes the capsule, of an array that nobody reads, and address, type and device are set in the struct
    afterwards. Thus destructor and deleter are C, which take the GIL where needed and do nothing in an interpreter that
    has ended. Callbacks of ctypes cannot: a capsule is often destroyed while an exception passes, and Python code that
    is run then replaces the exception by a SystemError.
    """
    code, bits = TYPES[str(dtype)]
    steps = compact(shape) if strides is None else strides
    interface = {
        "version": 3,
        "shape": tuple(shape),
        "typestr": f"<c{bits // 8}" if bits == 128 else f"<u{bits // 8}",
        "strides": tuple(step * bits // 8 for step in steps),
        "data": (address or 1, False),  # to NumPy, no address means that it is to allocate
    }
    capsule = np.asarray(_Lent(interface, owner)).__dlpack__()
    struct = _Struct.from_address(_pointer(capsule, _FRESH))
    struct.data, struct.code, struct.bits = address, code, bits
    struct.device_type, struct.device_id = device
    return capsule
