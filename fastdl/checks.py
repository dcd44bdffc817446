"""Arguments of eager calls, checked before a pointer is taken: what was expected, what came, what to do.

The first array of a call says where it runs: in host memory (NumPy) or in a GPU's (`fastdl.cuda.arrays`). The others
are checked to be ``like`` it, of its dtype and in its memory. Checks return the array to work with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

FLOATS = (np.dtype(np.float32), np.dtype(np.float64))


def on_host(x: Any) -> bool:
    return isinstance(x, np.ndarray)


def is_array(x: Any, name: str, like: Any = None, dtypes: Sequence[Any] = FLOATS[:1]) -> Any:
    """An array in the memory of ``like``, where there is one; in GPU memory of one of ``dtypes``."""
    if isinstance(x, np.ndarray) and (like is None or isinstance(like, np.ndarray)):
        return x
    if like is not None and not isinstance(like, np.ndarray):
        from fastdl.cuda.arrays import adopt

        return adopt(x, name, dtypes)
    if hasattr(x, "__dlpack_device__") or hasattr(x, "__cuda_array_interface__"):
        from fastdl.cuda.arrays import adopt, on_device  # Numba comes with it

        if on_device(x) and like is None:
            return adopt(x, name, dtypes)
        if on_device(x):
            raise TypeError(
                f"{name}: expected a NumPy array as the first one is, found {type(x).__name__} in GPU memory; "
                "copy it with .cpu() or .get()"
            )
    raise TypeError(f"{name}: expected a NumPy array, found {type(x).__name__}; convert it with np.asarray")


def floats(x: Any, name: str, like: Any = None) -> Any:
    """An aligned float32 or float64 array (float32 on a GPU), of the dtype of ``like``. Ops never cast."""
    if (
        type(x) is np.ndarray
        and (x.dtype in FLOATS if like is None else x.dtype is like.dtype and type(like) is np.ndarray)
        and x.flags.aligned
    ):
        return x  # the usual case in a third of the time: a call checks up to eight arrays
    x = is_array(x, name, like)
    if not isinstance(x, np.ndarray):
        return x
    if like is None:
        if x.dtype not in FLOATS:
            raise TypeError(f"{name}: expected dtype float32 or float64, found {x.dtype}; convert it with astype")
    elif x.dtype != like.dtype:
        raise TypeError(
            f"{name}: expected dtype {like.dtype} as the other arrays, found {x.dtype}; convert it with astype"
        )
    if not x.dtype.isnative:
        raise TypeError(f"{name}: expected native byte order, found {x.dtype}; convert it with astype")
    if not x.flags.aligned:
        raise ValueError(f"{name}: expected items at aligned addresses, found them in between; copy it with np.array")
    return x


def rows(x: Any, name: str) -> Any:
    """A two-dimensional view (N, features) with unit column stride; never a copy."""
    if type(x) is not np.ndarray and not on_host(x):  # rows are contiguous there, or it would not have been taken
        return x if x.ndim == 2 else x.reshaped(*((x.shape[0], math.prod(x.shape[1:])) if x.ndim > 1 else (1, x.size)))
    if x.ndim == 2:
        if x.shape[1] > 1 and x.size and x.strides[1] != x.itemsize:  # empty arrays have strides of 0
            raise ValueError(
                f"{name}: expected adjacent columns, found strides {x.strides}; copy it with np.ascontiguousarray"
            )
        return x
    if x.ndim == 0:
        raise ValueError(f"{name}: expected at least one dimension, found a scalar")
    if not x.flags.c_contiguous:
        raise ValueError(
            f"{name}: an array of {x.ndim} dimensions must be C-contiguous, found strides {x.strides}; "
            "copy it with np.ascontiguousarray"
        )
    return x.reshape(x.shape[0], math.prod(x.shape[1:])) if x.ndim > 1 else x.reshape(1, -1)


def matrix(x: Any, name: str, like: Any = None, transposed: bool = False) -> Any:
    """Exactly two dimensions, unit column stride (or, for products, unit row stride)."""
    x = floats(x, name, like)
    if x.ndim != 2:
        raise ValueError(f"{name}: expected two dimensions, found shape {x.shape}")
    if transposed and isinstance(x, np.ndarray) and x.strides[0] == x.itemsize:
        return x
    return rows(x, name)


def vector(x: Any, name: str, length: int, like: Any = None) -> Any:
    x = floats(x, name, like)
    if x.shape != (length,):
        raise ValueError(f"{name}: expected shape ({length},), found {x.shape}")
    if length > 1 and isinstance(x, np.ndarray) and x.strides[0] != x.itemsize:
        raise ValueError(f"{name}: expected adjacent elements, found strides {x.strides}; use np.ascontiguousarray")
    return x


def flat(x: Any, name: str) -> Any:
    """All elements as a vector; never a copy."""
    if not isinstance(x, np.ndarray):
        return x.reshaped(x.size)
    if not x.flags.c_contiguous:
        raise ValueError(f"{name}: expected a C-contiguous array, found strides {x.strides}; use np.ascontiguousarray")
    return x.reshape(-1)


def same_shape(x: Any, shape: tuple[int, ...], name: str, of: str) -> None:
    if x.shape != shape:
        raise ValueError(f"{name}: expected shape {shape} as {of}, found {x.shape}")


def writable(x: Any, name: str) -> Any:
    if isinstance(x, np.ndarray) and not x.flags.writeable:
        raise ValueError(f"{name}: expected a writable array, found a read-only one; hand over a copy")
    return x


def empty(shape: tuple[int, ...], like: Any) -> Any:
    """A new array of the dtype and in the memory of another one."""
    return np.empty(shape, like.dtype) if isinstance(like, np.ndarray) else like.like(shape)


def _extent(x: Any) -> tuple[int, int]:
    """First byte and the one after the last of an array in GPU memory."""
    span = (x.shape[0] - 1) * x.row_stride + math.prod(x.shape[1:])
    return x.address, x.address + span * x.itemsize


def overlap(a: Any, b: Any) -> bool:
    """Whether two arrays of one memory may share elements."""
    if isinstance(a, np.ndarray):
        return np.may_share_memory(a, b)
    (start, end), (other_start, other_end) = _extent(a), _extent(b)
    return start < other_end and other_start < end


def output(
    out: Any,
    shape: tuple[int, ...],
    like: Any,
    inputs: dict[str, Any],
    alias: str = "",
    name: str = "out",
) -> Any:
    """Check ``out=`` or allocate it.

    It may be the very array called ``alias``; any other overlap with an input is refused.
    """
    if out is None:
        return np.empty(shape, like.dtype) if type(like) is np.ndarray else empty(shape, like)
    out = floats(out, name, like)
    same_shape(out, shape, name, "the result")
    writable(out, name)
    if not isinstance(out, np.ndarray):
        for other, x in inputs.items():
            same = x is not None and other == alias and (out.address, out.row_stride) == (x.address, x.row_stride)
            if x is not None and overlap(out, x) and not same:
                raise _overlaps(name, other, alias)
        return out
    owner = out.flags.owndata
    for other, x in inputs.items():
        if x is None or (owner and x is not out and x.flags.owndata) or not np.may_share_memory(out, x):
            continue  # two arrays that own their memory cannot overlap, and asking for it takes a third of the time
        if other == alias and out.ctypes.data == x.ctypes.data and out.strides == x.strides:
            continue
        if np.shares_memory(out, x):
            raise _overlaps(name, other, alias)
    return out


def _overlaps(name: str, other: str, alias: str) -> ValueError:
    allowed = f"only {name} is {alias} is allowed" if alias else "no overlap is allowed"
    return ValueError(f"{name}: overlaps {other}; {allowed}: hand over another array")


def whole(value: Any, name: str, bits: int = 32) -> int:
    if type(value) is int and 0 <= value < 1 << bits:
        return value
    if isinstance(value, bool) or not isinstance(value, np.integer) or not 0 <= value < 1 << bits:
        raise ValueError(f"{name}: expected an integer in [0, 2**{bits}), found {value!r}")
    return int(value)


def share(rate: Any, name: str = "rate") -> float:
    if isinstance(rate, bool) or not isinstance(rate, (int, float, np.floating)) or not 0 <= rate < 1:
        raise ValueError(f"{name}: expected the probability to drop, in [0, 1), found {rate!r}")
    return float(rate)
