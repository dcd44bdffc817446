"""What people hand over as data, as an array of numbers; or an error that says what it is and what makes numbers of it.

Nothing is imported for it: frames, tensors and sparse matrices are told by what they have.
"""

from __future__ import annotations

import math
import numbers
from typing import Any, NoReturn

import numpy as np

from fastdl import checks

NUMBERS = "biuf"  # kinds of dtypes
#: Kinds that hold no numbers: what they are, and what makes numbers of them.
_OTHERS = {
    "c": ("complex numbers", "take their real and imaginary parts as columns"),
    "M": ("dates", "subtract one of them and divide by np.timedelta64(1, 'D')"),
    "m": ("spans of time", "divide by np.timedelta64(1, 's')"),
    "V": ("records", "np.lib.recfunctions.structured_to_unstructured makes columns of their fields"),
    "U": ("text", ""),
    "S": ("text", ""),
    "T": ("text", ""),
}


def as_numbers(value: Any, name: str, advice: str = "encode it as numbers first") -> np.ndarray:
    """The data as an array of booleans, integers or floats; no copy where it is one.

    Parameters
    ----------
    value : array-like
        NumPy's arrays, lists, frames and series (pandas, polars), tensors in host memory.
    name : str
        What errors call it.
    advice : str
        What to do with text and objects.

    Raises
    ------
    TypeError
        For whatever holds no numbers, hides some (masked arrays), or leaves some out (ragged lists, missing values).
    """
    array = value if type(value) is np.ndarray else _array(value, name, advice)
    if array.dtype.kind in NUMBERS:
        return array
    _refuse(array, value, name, advice)


def _refuse(array: np.ndarray, value: Any, name: str, advice: str) -> NoReturn:
    kind, dtype = array.dtype.kind, array.dtype
    if kind == "O" and array.ndim == 0:
        raise TypeError(f"{name}: expected an array of numbers, found {_what(value)}; {advice}")
    if kind == "O":
        what = "objects"
        if (place := _first_object(array)) is not None:
            what = f"{_what(array[place])} at {list(place)}"
        elif array.size:
            what, advice = _of_python(array, value, name)
    else:
        what, own = _OTHERS.get(kind, ("something else", ""))
        advice = own or advice
    raise TypeError(f"{name}: expected an array of numbers, found dtype {dtype}, {what}; {advice}")


def _is_number(item: Any) -> bool:
    return isinstance(item, (numbers.Real, np.bool_))


def _first_object(array: np.ndarray) -> tuple[int, ...] | None:
    """The place of the first object that is no number."""
    k = next((k for k, item in enumerate(array.flat) if not _is_number(item)), None)
    return None if k is None else tuple(int(i) for i in np.unravel_index(k, array.shape))


def _of_python(array: np.ndarray, value: Any, name: str) -> tuple[str, str]:
    """What numbers of Python's own types are, and what makes numbers of NumPy's of them."""
    for k, item in enumerate(array.flat):
        try:
            float(item)
        except OverflowError:
            place = [int(i) for i in np.unravel_index(k, array.shape)]
            return f"a number beyond float64 at {place}", "scale the numbers"
    made = f"{name}.astype(float)" if hasattr(value, "astype") else f"np.array({name}, float)"
    return f"objects of type {type(array.flat[0]).__name__}", f"{made} makes numbers of numbers"


def _what(item: Any) -> str:
    return "None" if item is None else f"{type(item).__name__} {item!r:.40}"


def is_frame(value: Any) -> bool:
    return hasattr(value, "columns") and hasattr(value, "dtypes")


def label(source: Any, column: int) -> str:
    """What a column of the caller's data is called."""
    return f"column {list(source.columns)[column]!r}" if is_frame(source) else f"column {column}"


def _array(value: Any, name: str, advice: str) -> np.ndarray:
    for part in value if isinstance(value, (list, tuple)) else (value,):
        if isinstance(part, np.ndarray):
            checks.not_masked(part, name)
    if hasattr(value, "toarray") and hasattr(value, "nnz"):
        raise TypeError(
            f"{name}: expected an array of numbers, found a sparse {type(value).__name__} of shape {value.shape}; "
            f"{name}.toarray() makes a dense one"
        )
    if hasattr(value, "to_numpy") and hasattr(value, "dtype"):
        return _column(value, name, advice)
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, OverflowError, AttributeError, RuntimeError) as error:
        raise TypeError(f"{name}: expected an array of numbers, found {_unreadable(value, name, error)}") from error
    if array.dtype.kind not in NUMBERS and array.ndim == 2 and is_frame(value):
        return _from_frame(value, name, advice)
    return array


def _unreadable(value: Any, name: str, error: Exception) -> str:
    if isinstance(value, (list, tuple)):
        shapes = [_shape(item) for item in value]
        for row, shape in enumerate(shapes):
            if shape is None and isinstance(value[row], (list, tuple)):
                return f"in row {row} {_unreadable(value[row], name, error)}"
            if shape != shapes[0]:
                return f"rows of different lengths: {shapes[0]} in row 0, {shape} in row {row}; make them equal"
    if hasattr(value, "detach"):
        return f"a tensor that NumPy cannot read ({error}); {name}.detach().float().cpu().numpy() makes an array"
    return f"{type(value).__name__}, which NumPy cannot read ({error}); convert it with np.asarray"


def _shape(item: Any) -> tuple[int, ...] | None:
    """The shape of a row; None for one that has rows of different lengths itself."""
    try:
        return np.shape(item)
    except Exception:
        return None


def _from_frame(frame: Any, name: str, advice: str) -> np.ndarray:
    """Column by column, where NumPy finds no common type: booleans beside floats, nullable and Arrow types."""
    pairs = frame.items() if hasattr(frame, "items") else zip(frame.columns, frame.get_columns(), strict=True)
    columns = [_column(series, f"{name}: column {title!r}", advice) for title, series in pairs]
    return np.column_stack(columns) if columns else np.empty(frame.shape)


def _column(series: Any, what: str, advice: str) -> np.ndarray:
    values = np.asarray(series)
    if values.dtype.kind in NUMBERS:
        return values
    if values.dtype.kind != "O":
        holds, own = _OTHERS.get(values.dtype.kind, ("something else", ""))
        raise TypeError(f"{what}: expected numbers, found dtype {values.dtype}, {holds}; {own or advice}")
    for row, item in enumerate(values):
        if _is_number(item):
            continue
        if item is None or type(item).__name__ in ("NAType", "NaTType"):
            raise TypeError(f"{what}: expected numbers, found a missing value in row {row}; fill it or drop the row")
        raise TypeError(f"{what}: expected numbers, found {_what(item)} in row {row}; {advice}")
    return values.astype(np.float64)


# ---------------------------------------------------------------------------------------------- values
def _adds_up(array: np.ndarray) -> bool:
    """Whether the sum is finite, so that all values are: `numpy.einsum` takes 0.4 of the time of `numpy.sum`, raises no
    floating-point errors, and needs no room."""
    return math.isfinite(np.einsum("i->", array.reshape(-1)))


def cast(array: np.ndarray, dtype: Any, name: str, source: Any = None) -> np.ndarray:
    """The array in rows without gaps, of a dtype; no copy when it is so already.

    Raises
    ------
    ValueError
        For numbers beyond the dtype's largest, naming the first. Infinities and NaN stay what they are.
    """
    with np.errstate(all="ignore"):
        result = np.ascontiguousarray(array, dtype)
        if array.dtype.kind != "f" or array.dtype.itemsize <= result.dtype.itemsize or _adds_up(result):
            return result
        beyond = np.isinf(result) & np.isfinite(array)
    if beyond.any():
        limit, scale = np.finfo(dtype).max, "scale them"
        if result.dtype == np.float32:
            scale += ", or compile(dtype='float64')"
        what = f"numbers of at most {limit:.3g}, as {result.dtype} holds"
        raise ValueError(f"{name}: expected {what}, found {_first(array, beyond, source)}; {scale}")
    return result


def finite(array: np.ndarray, name: str, source: Any = None) -> None:
    """Refuse NaN and infinities, naming the first."""
    if _adds_up(array):
        return
    bad = ~np.isfinite(array)
    if bad.any():
        first = _first(array, bad, source)
        raise ValueError(f"{name}: expected finite numbers, found {first}; fill such values or drop the rows")


def _first(array: np.ndarray, chosen: np.ndarray, source: Any) -> str:
    place = np.unravel_index(int(chosen.argmax()), chosen.shape)
    where = f"row {place[0]}" + (f", {label(source, int(place[1]))}" if len(place) > 1 else "")
    return f"{array[place]} in {where}"
