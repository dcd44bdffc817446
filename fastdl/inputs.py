"""The boundary: arrays of the caller's become arrays of the model's dtype, once, or an error says why not.

Arrays in GPU memory (PyTorch, CuPy, Numba, JAX) are taken as they are by a model on a GPU, and refused by others.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastdl import checks, convert
from fastdl.losses import Loss

SHARE = checks.Range("a share of the rows, in [0, 1)", 0.0, 1.0)


def whole_number(value: Any, what: str, least: int = 1) -> int:
    """An int of at least ``least``, or an error that names the setting."""
    number = checks.index(value)
    if number is None or number < least:
        raise ValueError(f"{what}: expected an integer of at least {least}, found {value!r}")
    return number


def _from_gpu(value: Any, dtypes: tuple[Any, ...], name: str, gpu: bool, ndim: int | None = None) -> Any:
    """An array in GPU memory as it is (`fastdl.cuda.arrays.DeviceArray`), or None for all others."""
    if isinstance(value, np.ndarray) or not checks.may_be_elsewhere(value):
        return None
    from fastdl.cuda.arrays import adopt, on_device

    if not on_device(value):
        return None
    if not gpu:
        raise TypeError(
            f"{name}: expected an array in host memory, found {type(value).__name__} in GPU memory; "
            "compile(backend='cuda'), or copy it with .cpu() or .get()"
        )
    return adopt(value, name, dtypes, ndim)


def feature_names(value: Any) -> list[str] | None:
    """Names of a frame's columns, where all are text and differ; None for all else."""
    if not convert.is_frame(value):
        return None
    names = list(value.columns)
    return names if all(isinstance(n, str) for n in names) and len(set(names)) == len(names) else None


def by_name(value: Any, names: list[str] | None, what: str) -> Any:
    """The columns of a frame in the order of ``names``; anything else as it is.

    Raises
    ------
    ValueError
        A column is missing, or unknown.
    """
    if names is None or (given := feature_names(value)) in (None, names):
        return value
    for kind, there, other in (("missing", names, given), ("unknown", given, names)):
        if odd := [name for name in there if name not in set(other)]:
            raise ValueError(
                f"{what}: expected the columns that this net was built with, found {kind} {odd[:5]}; hand over "
                f"X[{names[:5]}{'...' if len(names) > 5 else ''}], or an array"
            )
    return value[names]


def as_matrix(value: Any, dtype: Any, name: str, gpu: bool = False, finite: bool = False) -> Any:
    """(N, features) in rows, of the model's dtype; no copy when it is so already.

    ``gpu`` says that the model runs on one and takes arrays in its memory. ``finite`` refuses NaN and infinities in
    host memory.
    """
    if (
        type(value) is np.ndarray
        and value.dtype == dtype
        and value.ndim == 2
        and value.flags.c_contiguous
        and value.size
    ):
        matrix = value
    elif (on_gpu := _from_gpu(value, (dtype,), name, gpu, 2)) is not None:
        return on_gpu
    else:
        array = convert.as_numbers(value, name)
        if array.ndim != 2:
            raise ValueError(f"{name}: expected shape (N, features), found {array.shape}; reshape it to two dimensions")
        if array.shape[0] == 0 or array.shape[1] == 0:
            raise ValueError(f"{name}: expected at least one row and one feature, found shape {array.shape}")
        matrix = convert.cast(array, dtype, name, value)
    if finite:
        convert.finite(matrix, name, value)
    return matrix


def as_targets(value: Any, loss: Loss, width: int, dtype: Any, name: str, gpu: bool = False) -> Any:
    """Targets as `Loss.check_targets` has them. In GPU memory their values are not looked at."""
    labels = loss.target_kind == "labels"
    one = getattr(value, "ndim", 0) == 1
    on_gpu = _from_gpu(value, (np.int64,) if labels and one else (dtype,), name, gpu)
    if on_gpu is None:
        return loss.check_targets(convert.as_numbers(value, name, loss.advice), width, dtype)
    if one and not labels and width == 1:
        return on_gpu.reshaped(on_gpu.shape[0], 1)
    if not (one and labels) and (on_gpu.ndim != 2 or on_gpu.shape[1] != width):
        kinds = f"labels of shape (N,) or distributions of shape (N, {width})" if labels else f"shape (N, {width})"
        raise ValueError(f"{name}: expected {kinds}, found shape {on_gpu.shape}")
    return on_gpu


def as_weights(value: Any, rows: int, dtype: Any, gpu: bool = False, name: str = "sample_weight") -> Any:
    """Sample weights (N,) as `check_weights` has them. In GPU memory their values are not looked at."""
    if value is None:
        return None
    weight = _from_gpu(value, (dtype,), name, gpu, 1)
    on_host = weight is None
    if on_host:
        weight = convert.as_numbers(value, name)
    if weight.shape != (rows,):
        raise ValueError(f"{name}: expected shape ({rows},), one per row, found {weight.shape}")
    if on_host:
        weight = convert.cast(weight, dtype, name)
        checks.weights(weight, name)
    return weight


def as_validation(share: Any, data: Any) -> tuple[float, Any]:
    """``validation_split`` as a number, 0 for None, and ``validation_data`` as a tuple of three, or None."""
    share = 0.0 if share is None else SHARE.check(share, "validation_split")
    if data is None:
        return share, None
    if not isinstance(data, (tuple, list)) or not 2 <= len(data) <= 3:
        what = f"{len(data)} of them" if isinstance(data, (tuple, list)) else type(data).__name__
        raise ValueError(f"validation_data: expected a tuple (X, y) or (X, y, sample_weight), found {what}")
    return share, (*data, None)[:3]


def split_validation(
    X: np.ndarray, targets: np.ndarray, weight: np.ndarray | None, share: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, tuple[Any, ...]]:
    """Hold out the last rows."""
    held = int(X.shape[0] * share)
    if held == 0 or held == X.shape[0]:
        raise ValueError(
            f"validation_split={share}: {X.shape[0]} rows leave one side empty; use more rows or another share"
        )
    cut = X.shape[0] - held
    if weight is None:
        return X[:cut], targets[:cut], None, (X[cut:], targets[cut:])
    if isinstance(weight, np.ndarray):
        checks.weights(weight[:cut], f"sample_weight of the first {cut} rows, which validation_split={share} leaves")
        checks.weights(weight[cut:], f"sample_weight of the last {held} rows, which validation_split={share} holds out")
    return X[:cut], targets[:cut], weight[:cut], (X[cut:], targets[cut:], weight[cut:])
