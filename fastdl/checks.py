"""Arguments of eager calls, checked before a pointer is taken: what was expected, what came, what to do."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

FLOATS = (np.dtype(np.float32), np.dtype(np.float64))


def is_array(x: Any, name: str) -> np.ndarray:
    if not isinstance(x, np.ndarray):
        raise TypeError(f"{name}: expected a NumPy array, found {type(x).__name__}; convert it with np.asarray")
    return x


def floats(x: Any, name: str, dtype: np.dtype | None = None) -> np.ndarray:
    """An aligned float32 or float64 array, of a given dtype if one is named. Ops never cast."""
    if type(x) is np.ndarray and (x.dtype in FLOATS if dtype is None else x.dtype is dtype) and x.flags.aligned:
        return x  # the usual case in a third of the time: a call checks up to eight arrays
    is_array(x, name)
    if dtype is None:
        if x.dtype not in FLOATS:
            raise TypeError(f"{name}: expected dtype float32 or float64, found {x.dtype}; convert it with astype")
    elif x.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {dtype} as the other arrays, found {x.dtype}; convert it with astype")
    if not x.dtype.isnative:
        raise TypeError(f"{name}: expected native byte order, found {x.dtype}; convert it with astype")
    if not x.flags.aligned:
        raise ValueError(f"{name}: expected items at aligned addresses, found them in between; copy it with np.array")
    return x


def rows(x: np.ndarray, name: str) -> np.ndarray:
    """A two-dimensional view (N, features) with unit column stride; never a copy."""
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


def matrix(x: Any, name: str, dtype: np.dtype | None = None, transposed: bool = False) -> np.ndarray:
    """Exactly two dimensions, unit column stride (or, for products, unit row stride)."""
    floats(x, name, dtype)
    if x.ndim != 2:
        raise ValueError(f"{name}: expected two dimensions, found shape {x.shape}")
    if transposed and x.strides[0] == x.itemsize:
        return x
    return rows(x, name)


def vector(x: Any, name: str, length: int, dtype: np.dtype | None = None) -> np.ndarray:
    floats(x, name, dtype)
    if x.shape != (length,):
        raise ValueError(f"{name}: expected shape ({length},), found {x.shape}")
    if length > 1 and x.strides[0] != x.itemsize:
        raise ValueError(f"{name}: expected adjacent elements, found strides {x.strides}; use np.ascontiguousarray")
    return x


def same_shape(x: np.ndarray, shape: tuple[int, ...], name: str, of: str) -> None:
    if x.shape != shape:
        raise ValueError(f"{name}: expected shape {shape} as {of}, found {x.shape}")


def writable(x: np.ndarray, name: str) -> np.ndarray:
    if not x.flags.writeable:
        raise ValueError(f"{name}: expected a writable array, found a read-only one; hand over a copy")
    return x


def output(
    out: Any,
    shape: tuple[int, ...],
    dtype: np.dtype,
    inputs: dict[str, np.ndarray | None],
    alias: str = "",
    name: str = "out",
) -> np.ndarray:
    """Check ``out=`` or allocate it.

    It may be the very array called ``alias``; any other overlap with an input is refused.
    """
    if out is None:
        return np.empty(shape, dtype)
    floats(out, name, dtype)
    same_shape(out, shape, name, "the result")
    writable(out, name)
    owner = out.flags.owndata
    for other, x in inputs.items():
        if x is None or (owner and x is not out and x.flags.owndata) or not np.may_share_memory(out, x):
            continue  # two arrays that own their memory cannot overlap, and asking for it takes a third of the time
        if other == alias and out.ctypes.data == x.ctypes.data and out.strides == x.strides:
            continue
        if np.shares_memory(out, x):
            allowed = f"only {name} is {alias} is allowed" if alias else "no overlap is allowed"
            raise ValueError(f"{name}: overlaps {other}; {allowed}: hand over another array")
    return out


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
