"""Losses: value and gradient in one pass."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastdl import checks, losses
from fastdl.ops.call import run


def _loss(
    name: str, z: Any, targets: Any, sample_weight: Any, out: Any, backend: str | None, threads: int | None
) -> tuple[float, np.ndarray]:
    z = checks.matrix(z, "z")
    if z.shape[0] == 0 or z.shape[1] == 0:
        raise ValueError(f"z: expected at least one row and one column, found shape {z.shape}")
    loss = losses.KNOWN[name]
    dtypes = (np.int64, np.float32) if loss.target_kind == "labels" else (np.float32,)
    targets = checks.is_array(targets, "targets", z, dtypes)
    if loss.target_kind == "labels" and targets.ndim != 2:
        op, targets = loss.op, _labels(targets, z.shape)
    else:
        op, targets = loss.onehot_op or loss.op, checks.matrix(targets, "targets", z)
        checks.same_shape(targets, z.shape, "targets", "z")
        if checks.on_host(targets):
            loss.check_values(targets, targets)
    if sample_weight is not None:
        sample_weight = checks.vector(sample_weight, "sample_weight", z.shape[0], z)
        if checks.on_host(sample_weight):
            checks.weights(sample_weight, "sample_weight")
    dz = checks.output(out, z.shape, z)
    if out is not None:
        given = {"targets": targets, "sample_weight": sample_weight, "z": z, "out": checks.rows(dz, "out")}
        checks.apart(op, given)
    stats = np.zeros(3)
    arguments = {"total_rows": z.shape[0]}
    run(op, (z, targets, sample_weight, stats, dz), arguments, backend, threads, 2 * z.nbytes)
    return float(stats[0]), dz


def _labels(targets: Any, shape: tuple[int, ...]) -> Any:
    """Labels as kernels take them. In GPU memory their values are not looked at: a wrong one makes the loss NaN."""
    if targets.dtype.kind not in "iu":
        raise TypeError(f"targets: expected integer labels (N,) or one-hot rows (N, C), found dtype {targets.dtype}")
    if targets.shape != shape[:1]:
        raise ValueError(f"targets: expected shape {shape[:1]}, one label per row, found {targets.shape}")
    if not checks.on_host(targets):
        return targets
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= shape[1]:
        raise ValueError(f"targets: expected labels in [0, {shape[1]}), found values from {low} to {high}")
    return np.ascontiguousarray(targets, np.int64)


def softmax_cross_entropy(
    z: np.ndarray,
    targets: np.ndarray,
    sample_weight: np.ndarray | None = None,
    out: np.ndarray | None = None,
    *,
    backend: str | None = None,
    threads: int | None = None,
) -> tuple[float, np.ndarray]:
    """Mean of logsumexp(z) - z[target], and its gradient dz (N, C), in one pass.

    Parameters
    ----------
    z : (N, C)
        Logits.
    targets : (N,) integers in [0, C), or (N, C) one-hot (or soft) rows of z's dtype
    sample_weight : (N,), optional
        The loss is then sum(w l) / sum(w).
    """
    return _loss("softmax_cross_entropy", z, targets, sample_weight, out, backend, threads)


def binary_cross_entropy(
    z: np.ndarray,
    targets: np.ndarray,
    sample_weight: np.ndarray | None = None,
    out: np.ndarray | None = None,
    *,
    backend: str | None = None,
    threads: int | None = None,
) -> tuple[float, np.ndarray]:
    """Mean over rows and columns of softplus(z) - z t for logits z (N, C) and targets t in [0, 1], and its gradient.

    Of an infinite logit the loss is NaN, or inf for z = -inf and t > 0.
    """
    return _loss("binary_cross_entropy", z, targets, sample_weight, out, backend, threads)


def mse(
    z: np.ndarray,
    targets: np.ndarray,
    sample_weight: np.ndarray | None = None,
    out: np.ndarray | None = None,
    *,
    backend: str | None = None,
    threads: int | None = None,
) -> tuple[float, np.ndarray]:
    """Mean over rows and columns of (z - t)^2, and its gradient."""
    return _loss("mse", z, targets, sample_weight, out, backend, threads)
