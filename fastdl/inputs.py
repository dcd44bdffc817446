"""The boundary: arrays of the caller's become arrays of the model's dtype, once, or an error says why not."""

from __future__ import annotations

from typing import Any

import numpy as np


def whole_number(value: Any, what: str, least: int = 1) -> int:
    """An int of at least ``least``, or an error that names the setting."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{what}: expected an integer of at least {least}, found {value!r}")
    return int(value)


def as_matrix(value: Any, dtype: Any, name: str) -> np.ndarray:
    """(N, features) in rows, of the model's dtype; no copy when it is so already."""
    if (
        type(value) is np.ndarray
        and value.dtype == dtype
        and value.ndim == 2
        and value.flags.c_contiguous
        and value.size
    ):
        return value
    array = np.asarray(value)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name}: expected an array of numbers, found dtype {array.dtype}; encode it as numbers first")
    if array.ndim != 2:
        raise ValueError(f"{name}: expected shape (N, features), found {array.shape}; reshape it to two dimensions")
    if array.shape[0] == 0 or array.shape[1] == 0:
        raise ValueError(f"{name}: expected at least one row and one feature, found shape {array.shape}")
    return np.ascontiguousarray(array, dtype)


def as_weights(value: Any, rows: int, dtype: Any) -> np.ndarray | None:
    """Sample weights (N,): finite, not negative, not all zero."""
    if value is None:
        return None
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
