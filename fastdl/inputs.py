"""The boundary: arrays of the caller's become arrays of the model's dtype, once, or an error says why not.

Arrays in GPU memory (PyTorch, CuPy, Numba, JAX) are taken as they are by a model on a GPU, and refused by others.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastdl.losses import Loss


def whole_number(value: Any, what: str, least: int = 1) -> int:
    """An int of at least ``least``, or an error that names the setting."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{what}: expected an integer of at least {least}, found {value!r}")
    return int(value)


def _from_gpu(value: Any, dtypes: tuple[Any, ...], name: str, gpu: bool, ndim: int | None = None) -> Any:
    """An array in GPU memory as it is (`fastdl.cuda.arrays.DeviceArray`), or None for all others."""
    if isinstance(value, (np.ndarray, list)):
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


def as_matrix(value: Any, dtype: Any, name: str, gpu: bool = False) -> Any:
    """(N, features) in rows, of the model's dtype; no copy when it is so already.

    ``gpu`` says that the model runs on one and takes arrays in its memory.
    """
    if (
        type(value) is np.ndarray
        and value.dtype == dtype
        and value.ndim == 2
        and value.flags.c_contiguous
        and value.size
    ):
        return value
    if (found := _from_gpu(value, (dtype,), name, gpu, 2)) is not None:
        return found
    array = np.asarray(value)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name}: expected an array of numbers, found dtype {array.dtype}; encode it as numbers first")
    if array.ndim != 2:
        raise ValueError(f"{name}: expected shape (N, features), found {array.shape}; reshape it to two dimensions")
    if array.shape[0] == 0 or array.shape[1] == 0:
        raise ValueError(f"{name}: expected at least one row and one feature, found shape {array.shape}")
    return np.ascontiguousarray(array, dtype)


def as_targets(value: Any, loss: Loss, width: int, dtype: Any, name: str, gpu: bool = False) -> Any:
    """Targets as `Loss.check_targets` has them. In GPU memory their values are not looked at."""
    labels = loss.target_kind == "labels"
    one = getattr(value, "ndim", 0) == 1
    found = _from_gpu(value, (np.int64,) if labels and one else (dtype,), name, gpu)
    if found is None:
        return loss.check_targets(value, width, dtype)
    if one and not labels and width == 1:
        return found.reshaped(found.shape[0], 1)
    if not (one and labels) and (found.ndim != 2 or found.shape[1] != width):
        kinds = f"labels of shape (N,) or distributions of shape (N, {width})" if labels else f"shape (N, {width})"
        raise ValueError(f"{name}: expected {kinds}, found shape {found.shape}")
    return found


def as_weights(value: Any, rows: int, dtype: Any, gpu: bool = False) -> Any:
    """Sample weights (N,): finite, not negative, not all zero. In GPU memory their values are not looked at."""
    if value is None:
        return None
    found = _from_gpu(value, (dtype,), "sample_weight", gpu, 1)
    if found is not None:
        if found.shape != (rows,):
            raise ValueError(f"sample_weight: expected shape ({rows},), one per row, found {found.shape}")
        return found
    array = np.asarray(value)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"sample_weight: expected numbers, found dtype {array.dtype}")
    if array.shape != (rows,):
        raise ValueError(f"sample_weight: expected shape ({rows},), one per row, found {array.shape}")
    if not np.isfinite(array).all() or (array < 0).any() or not (array > 0).any():
        raise ValueError("sample_weight: expected finite values of at least 0 with a positive sum")
    return np.ascontiguousarray(array, dtype)


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
    validation: tuple[Any, ...] = (X[cut:], targets[cut:])
    if weight is not None:
        validation = (*validation, weight[cut:])
    return X[:cut], targets[:cut], None if weight is None else weight[:cut], validation
