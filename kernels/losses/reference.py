"""Losses in NumPy: value and gradient with respect to the logits (or predictions) in one pass.

``z`` (N, C) are logits for the two cross-entropies and predictions for ``mse``; ``weight`` (N) are sample weights.

* softmax cross-entropy (Bridle 1990): l = log(sum_c exp z_c) - z_y, dz = softmax(z) - onehot(y). With a distribution t
  over the classes l = sum_c t_c (lse - z_c), dz = sum(t) softmax(z) - t; t need not sum to one.
* binary cross-entropy on logits: l = mean_c [max(z, 0) - z t + log(1 + exp(-|z|))], dz = (sigmoid(z) - t) / C.
* mean squared error: l = mean_c (z - t)^2, dz = 2 (z - t) / C.

Reduction: the mean over the rows, or with weights sum(w l) / sum(w); weights that sum to zero give loss and gradient 0.
Where the rows are a share of a step of ``total_rows`` (0 means this call's rows), sum(w l) / total_rows, so that shares
add up. ``stats`` (3) = [loss, rows or sum of weights,
rows that are predicted right]; a row is right when its first largest logit is the label's (of the largest target's),
for ``binary_cross_entropy`` when every column has (z > 0) == (t > 0.5), never when its loss is NaN.

Numerics: the row maximum is taken off before exp, so logits of 1e4 neither overflow nor cancel; row losses are summed
in float64. Nothing is saved for backward: the gradient is an output (``None`` for an evaluation).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..registry import Array, OpSpec, Tolerance, register_op


def _scales(weight: np.ndarray | None, rows: int, total_rows: int) -> tuple[float, float, np.ndarray | float]:
    """(stats[1], factor of the summed loss, factor of each row's gradient)."""
    total = float(rows if weight is None else weight.sum(dtype=np.float64))
    over = total if total_rows in (0, rows) else total_rows
    scale = 1.0 / over if over else 0.0
    return total, scale, scale if weight is None else weight[:, None] * weight.dtype.type(scale)


def _write_stats(
    stats: np.ndarray, loss: np.ndarray, weight: np.ndarray | None, total: float, scale: float, right: np.ndarray | None
) -> None:
    value = loss.sum(dtype=np.float64) if weight is None else np.dot(loss.astype(np.float64), weight)
    stats[0] = value * scale
    stats[1] = total
    stats[2] = 0 if right is None else np.count_nonzero(right & ~np.isnan(loss))


def softmax_cross_entropy(
    z: np.ndarray,
    targets: np.ndarray,
    weight: np.ndarray | None,
    stats: np.ndarray,
    dz: np.ndarray | None,
    total_rows: int = 0,
    threads: int = 1,
) -> None:
    """Softmax cross-entropy of logits and class labels."""
    total, scale, row_scale = _scales(weight, len(z), total_rows)
    at = np.arange(len(z)), targets
    shifted = z - z.max(axis=1, keepdims=True)  # (N, C)
    picked = shifted[at]
    right = z.argmax(axis=1) == targets
    exp = np.exp(shifted, out=shifted)
    total_exp = exp.sum(axis=1, keepdims=True)  # (N, 1)
    _write_stats(stats, np.log(total_exp[:, 0]) - picked, weight, total, scale, right)
    if dz is not None:
        np.divide(exp, total_exp, out=dz)
        dz[at] -= 1
        dz *= row_scale


def softmax_cross_entropy_onehot(
    z: np.ndarray,
    targets: np.ndarray,
    weight: np.ndarray | None,
    stats: np.ndarray,
    dz: np.ndarray | None,
    total_rows: int = 0,
    threads: int = 1,
) -> None:
    """Softmax cross-entropy of logits and one distribution over the classes per row."""
    total, scale, row_scale = _scales(weight, len(z), total_rows)
    shifted = z - z.max(axis=1, keepdims=True)
    mass = targets.sum(axis=1, keepdims=True)  # (N, 1)
    picked = np.einsum("nc,nc->n", targets, shifted)
    right = z.argmax(axis=1) == targets.argmax(axis=1)
    exp = np.exp(shifted, out=shifted)
    total_exp = exp.sum(axis=1, keepdims=True)
    _write_stats(stats, mass[:, 0] * np.log(total_exp[:, 0]) - picked, weight, total, scale, right)
    if dz is not None:
        np.multiply(exp, mass / total_exp, out=dz)
        dz -= targets
        dz *= row_scale


def binary_cross_entropy(
    z: np.ndarray,
    targets: np.ndarray,
    weight: np.ndarray | None,
    stats: np.ndarray,
    dz: np.ndarray | None,
    total_rows: int = 0,
    threads: int = 1,
) -> None:
    """Mean binary cross-entropy of logits and targets in [0, 1]."""
    total, scale, row_scale = _scales(weight, len(z), total_rows)
    exp = np.abs(z)
    np.exp(np.negative(exp, out=exp), out=exp)
    loss = np.log1p(exp)
    loss += np.maximum(z, 0)
    loss -= z * targets
    right = ((z > 0) == (targets > 0.5)).all(axis=1)
    _write_stats(stats, loss.mean(axis=1, dtype=np.float64), weight, total, scale, right)
    if dz is not None:
        np.divide(np.where(z >= 0, 1, exp), 1 + exp, out=dz)  # sigmoid(z), neither branch overflows
        dz -= targets
        dz *= row_scale / z.shape[1]


def mse(
    z: np.ndarray,
    targets: np.ndarray,
    weight: np.ndarray | None,
    stats: np.ndarray,
    dz: np.ndarray | None,
    total_rows: int = 0,
    threads: int = 1,
) -> None:
    """Mean squared error over rows and columns."""
    total, scale, row_scale = _scales(weight, len(z), total_rows)
    difference = np.subtract(z, targets, out=dz)
    loss = np.square(difference).mean(axis=1, dtype=np.float64)
    _write_stats(stats, loss, weight, total, scale, None)
    if dz is not None:
        dz *= row_scale * (2.0 / z.shape[1])


def _labels(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype, made: Mapping) -> np.ndarray:
    return rng.integers(0, made["z"].shape[1], shape)


def _distribution(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype, made: Mapping) -> np.ndarray:
    drawn = rng.random(shape) + 1e-3
    return drawn / drawn.sum(axis=1, keepdims=True)


def _unit(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype, made: Mapping) -> np.ndarray:
    return rng.random(shape)


def _weights(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype, made: Mapping) -> np.ndarray:
    return 0.5 + rng.random(shape)


def _spec(op: str, summary: str, targets: Array, reference: object, ulp: float, why: str, flops: float) -> OpSpec:
    return OpSpec(
        name=op,
        family="losses",
        summary=summary,
        arrays=(
            Array("z", "N,C"),
            targets,
            Array("weight", "N", optional=True, single=True, fill=_weights),
            Array("stats", "3", role="out", dtype="f8"),
            Array("dz", "N,C", role="out", optional=True),
        ),
        reference=reference,
        runtime=("total_rows",),
        tolerance=lambda sizes: Tolerance(ulp=ulp, norm=4.0, why=why),
        no_gradient=("targets", "weight"),
        aliases=(("z", "dz"),),
        flops=lambda sizes: flops * sizes["N"] * sizes["C"],
    )


_SOFTMAX_WHY = "exp 4 ulp, its argument z - max rounded once (|z - max| eps), a sum of positive terms; p - t cancels"

SOFTMAX_CROSS_ENTROPY = register_op(
    _spec(
        "softmax_cross_entropy",
        "log(sum exp z) - z[label] and its gradient softmax(z) - onehot",
        Array("targets", "N", dtype="i8", fill=_labels),
        softmax_cross_entropy,
        32.0,
        _SOFTMAX_WHY,
        20.0,
    )
)
SOFTMAX_CROSS_ENTROPY_ONEHOT = register_op(
    _spec(
        "softmax_cross_entropy_onehot",
        "cross-entropy of softmax(z) against a distribution per row, with its gradient",
        Array("targets", "N,C", single=True, fill=_distribution),
        softmax_cross_entropy_onehot,
        32.0,
        _SOFTMAX_WHY,
        24.0,
    )
)
BINARY_CROSS_ENTROPY = register_op(
    _spec(
        "binary_cross_entropy",
        "max(z, 0) - z t + log1p(exp(-|z|)) and its gradient sigmoid(z) - t",
        Array("targets", "N,C", single=True, fill=_unit),
        binary_cross_entropy,
        16.0,
        "exp and log1p 4 ulp each, one division; sigmoid - t cancels",
        36.0,
    )
)
MSE = register_op(
    _spec(
        "mse",
        "mean of (z - t)^2 over rows and columns and its gradient",
        Array("targets", "N,C", single=True),
        mse,
        4.0,
        "one rounding per operation; columns are summed in blocks, then in float64",
        5.0,
    )
)
