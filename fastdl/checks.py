"""Arguments of eager calls and settings, checked before a pointer is taken: what was expected, what came, what to do.

The first array of a call says where it runs: in host memory (NumPy) or in a GPU's (`fastdl.cuda.arrays`). The others
are checked to be ``like`` it, of its dtype and in its memory. Checks return the array to work with. Numbers are taken
in any real type, NumPy's included, and come back as Python's, so that files can hold them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import operator
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastdl.kernels import registry

FLOATS = (np.dtype(np.float32), np.dtype(np.float64))


def on_host(x: Any) -> bool:
    return isinstance(x, np.ndarray)


def may_be_elsewhere(x: Any) -> bool:
    """Whether an array may lie in a GPU's memory, asked without importing what knows of GPUs.

    Another library's array may raise whatever it likes: then it cannot be shared, and NumPy is asked what it holds.
    """
    try:
        if hasattr(x, "__cuda_array_interface__"):
            return True
        return hasattr(x, "__dlpack_device__") and x.__dlpack_device__()[0] != 1  # DLPack's kDLCPU
    except Exception:
        return False


def is_array(x: Any, name: str, like: Any = None, dtypes: Sequence[Any] = FLOATS[:1]) -> Any:
    """An array in the memory of ``like``, where there is one; in GPU memory of one of ``dtypes``."""
    if isinstance(x, np.ndarray) and (like is None or isinstance(like, np.ndarray)):
        return not_masked(x, name)
    if like is not None and not isinstance(like, np.ndarray):
        from fastdl.cuda.arrays import adopt

        return adopt(x, name, dtypes)
    if may_be_elsewhere(x):
        from fastdl.cuda.arrays import adopt, on_device  # Numba comes with it

        if on_device(x) and like is None:
            return adopt(x, name, dtypes)
        if on_device(x):
            raise TypeError(
                f"{name}: expected a NumPy array as the first one is, found {type(x).__name__} in GPU memory; "
                "copy it with .cpu() or .get()"
            )
    raise TypeError(f"{name}: expected a NumPy array, found {type(x).__name__}; convert it with np.asarray")


def not_masked(x: Any, name: str) -> Any:
    """An array whose values may all be read: fastdl would compute with those that a mask hides."""
    if type(x) is not np.ndarray and isinstance(x, np.ma.MaskedArray):
        raise TypeError(
            f"{name}: expected an array without a mask, found a masked array of {np.ma.count_masked(x)} hidden values; "
            f"put values there, {name}.filled(value), or take {name}.data where nothing is hidden"
        )
    return x


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


def _shares(a: Any, b: Any) -> bool:
    """Whether two arrays of one memory share an element."""
    return overlap(a, b) and (not isinstance(a, np.ndarray) or np.shares_memory(a, b))


def _is(a: Any, b: Any) -> bool:
    """Whether two arrays of one shape have each element at the same place."""
    if isinstance(a, np.ndarray):
        return a.ctypes.data == b.ctypes.data and a.strides == b.strides
    return (a.address, a.row_stride) == (b.address, b.row_stride)


@functools.cache
def written(op: str) -> tuple[str, ...]:
    """Names of the caller's arrays that an op changes; where the caller gives room for the result it is ``out``."""
    return (*(a.name for a in registry.spec(op).arrays if a.role == "inout"), "out")


def apart(op: str, arrays: Mapping[str, Any], alias: str = "") -> None:
    """Refuse an array that an op writes and that shares elements with another one.

    Parameters
    ----------
    op : str
        Its roles say which arrays it writes.
    arrays : mapping
        The caller's arrays by name, all of them; None where one is absent.
    alias : str
        What ``out`` may be, the very same array.
    """
    for name in written(op):
        out = arrays.get(name)
        if out is None:
            continue
        owner = type(out) is np.ndarray and out.flags.owndata
        for other, x in arrays.items():
            if x is None or (owner and x is not out and x.flags.owndata) or other == name:
                continue  # two arrays that own their memory cannot overlap, and to ask takes ten times as long
            if owner and isinstance(x.base, np.ndarray) and x.base is not out and x.base.flags.owndata:
                continue  # nor can a view of one of them, as contexts keep
            if _shares(out, x) and not (name == "out" and other == alias and _is(out, x)):
                raise _overlaps(name, other, tuple(arrays), alias)


def _overlaps(name: str, other: str, order: tuple[str, ...], alias: str) -> ValueError:
    earlier, later = sorted((name, other), key=order.index)
    allowed = f"{name} may be {alias} itself, or share nothing" if name == "out" and alias else "no overlap is allowed"
    return ValueError(f"{later}: overlaps {earlier}; {allowed}: hand over another array")


def _folds(x: np.ndarray) -> bool:
    """Whether rows of a matrix overlap each other, as those of a sliding window do. `rows` refuses columns apart."""
    return x.ndim == 2 and x.strides[1] == x.itemsize and abs(x.strides[0]) < x.shape[1] * x.itemsize


def output(out: Any, shape: tuple[int, ...], like: Any) -> Any:
    """Check ``out=``, or allocate it. `apart` tells whether it overlaps another array."""
    if out is None:
        return np.empty(shape, like.dtype) if type(like) is np.ndarray else empty(shape, like)
    out = floats(out, "out", like)
    same_shape(out, shape, "out", "the result")
    writable(out, "out")
    if isinstance(out, np.ndarray) and not out.flags.c_contiguous and _folds(out):
        raise ValueError(f"out: its own rows overlap, found strides {out.strides}; hand over another array")
    return out


def weights(weight: np.ndarray, name: str) -> None:
    """Refuse weights whose mean cannot be told: losses divide by their sum, in the weights' own type.

    A batch may hold any of the rows, so each weight that is not 0 has to have an inverse with room for the loss, and so
    has the sum of all: 2^26 away from the smallest normal number and from its inverse.
    """
    least = float(np.finfo(weight.dtype).tiny) * 2.0**26
    with np.errstate(all="ignore"):
        low, total = weight.min(), float(weight.sum(dtype=np.float64))
    if not low >= 0 or not math.isfinite(total):
        raise ValueError(f"{name}: expected finite values of at least 0 with a positive sum, found {_worst(weight)}")
    if total == 0:
        raise ValueError(f"{name}: expected finite values of at least 0 with a positive sum, found nothing but 0")
    if total > 1 / least or (low < least and ((weight > 0) & (weight < least)).any()):
        raise ValueError(
            f"{name}: expected 0 or at least {least:.3g}, and a sum of at most {1 / least:.3g} in {weight.dtype}, "
            f"found {weight[weight > 0].min():.3g} and a sum of {total:.3g}; divide the weights by their mean, "
            "which changes nothing else"
        )


def _worst(weight: np.ndarray) -> str:
    row = int((~(np.isfinite(weight) & (weight >= 0))).argmax())
    return f"{weight[row]} in row {row}"


# ---------------------------------------------------------------------------------------------- numbers
def index(value: Any) -> int | None:
    """A whole number of any integer type as Python's int; None for all else, True and False included."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def whole(value: Any, name: str, bits: int = 32) -> int:
    if type(value) is int and 0 <= value < 1 << bits:
        return value
    number = index(value)
    if number is None or not 0 <= number < 1 << bits:
        raise ValueError(f"{name}: expected an integer in [0, 2**{bits}), found {value!r}")
    return number


def flag(value: Any, name: str) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name}: expected True or False, found {value!r}")
    return bool(value)


@dataclass(frozen=True, slots=True)
class Range:
    """The numbers a setting may be: ``low <= value < below``, in words ``text``.

    >>> Range("a share, in [0, 1)", 0.0, 1.0).check(np.float32(0.5), "share")
    0.5
    """

    text: str
    low: float = -sys.float_info.max
    below: float = math.inf

    def check(self, value: Any, name: str) -> float:
        """The setting as Python's float, whatever real type it comes in."""
        if type(value) is float and self.low <= value < self.below:
            return value
        number = value[()] if isinstance(value, np.ndarray) and value.ndim == 0 else value
        try:
            number = math.nan if isinstance(number, bool) or not isinstance(number, numbers.Real) else float(number)
        except OverflowError:  # an integer beyond float64
            number = math.inf
        if not self.low <= number < self.below:
            raise ValueError(f"{name}: expected {self.text}, found {value!r}")
        return number


_ABOVE_ZERO = math.ulp(0.0)
FINITE = Range("a finite number")
RATE = Range("the probability to drop, in [0, 1)", 0.0, 1.0)
OLD = Range("the weight of the old statistic, in [0, 1]", 0.0, math.nextafter(1.0, 2.0))
POSITIVE = Range("a positive finite number", _ABOVE_ZERO)
NOT_NEGATIVE = Range("a finite number >= 0", 0.0)
LEARNING_RATE = Range("a finite learning rate >= 0", 0.0)
#: What the settings of optimisers may be, by their names: those of the classes and of the ops.
OPTIMIZER = {
    "lr": LEARNING_RATE,
    "momentum": Range("a momentum in [0, 1)", 0.0, 1.0),
    "beta1": Range("a decay in [0, 1)", 0.0, 1.0),
    "beta2": Range("a decay in [0, 1)", 0.0, 1.0),
    "eps": POSITIVE,
    "l2": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "clip_norm": Range("a finite norm > 0, or None for no clipping", _ABOVE_ZERO),
}


#: The smallest normal number of a dtype and the largest; `numpy.finfo` takes 0.4 us to ask.
_NORMAL = {dtype: (float(np.finfo(dtype).tiny), float(np.finfo(dtype).max)) for dtype in FLOATS}


def fits(value: float, name: str, dtype: Any) -> None:
    """Refuse a setting that the dtype cannot hold: one beyond its largest number, or an ``eps`` that rounds to 0."""
    least, most = _NORMAL[dtype]
    if name.endswith("eps") and value < least:  # below, compiled Programs flush it to 0: 0 / (0 + eps) is NaN
        raise ValueError(f"{name}: expected at least {least:.3g} in {dtype}, found {value!r}")
    if abs(value) > most:
        raise ValueError(f"{name}: expected at most {most:.3g} in {dtype}, found {value!r}")


def settings_fit(settings: Any, dtype: np.dtype) -> None:
    """`fits` for every number of a layer's or an optimiser's description, those of its initialisers included."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, float):
            fits(value, f"{type(settings).__name__} {field.name}", dtype)
        elif dataclasses.is_dataclass(value):
            settings_fit(value, dtype)
