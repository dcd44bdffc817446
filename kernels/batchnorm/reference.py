"""Batch normalisation over the rows of a batch (Ioffe and Szegedy, ICML 2015), fused with an activation and dropout.

    u = gamma * (x - mean) * inv_std + beta,    y = dropout(act(u))

Shape letters: N rows of the batch, C columns. Training normalises by the batch's mean and **biased** variance and moves
the running statistics, ``running = decay * running + (1 - decay) * batch``, the variance with its unbiased estimate
N/(N-1). ``decay`` is the weight of the **old** value (Keras' ``momentum``, one minus PyTorch's). A batch of one row is
normalised with variance 0 and leaves the running statistics alone.

Saved for backward: x, mean and inv_std. u is computed from them again in the same arithmetic, so that a ReLU has the
same mask in both directions, and dropout draws its mask again. Gradients, and the reason for `_rest`: README.md.

Numerics: x is centred before it is scaled (the folded form x a + b cancels where |mean| is large), and statistics are
taken about the mean. float32 sums add row by row here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from fastdl.kernels.activations.reference import ACTIVATIONS
from fastdl.kernels.dropout.reference import dropout_backward, dropout_forward
from fastdl.kernels.registry import Array, OpSpec, Param, Tolerance, register_op

#: |mean| * inv_std from which the rounding of the stored mean (up to 2^-24 |mean| in float32) is put back: below, it
#: moves u by less than 1e-6.
LOOSE = 16.0


# ---------------------------------------------------------------------------------------------- fused activation
def _is_identity(activation: str | None) -> bool:
    return activation in (None, "identity")


def _activate_backward(
    name: str, dz: np.ndarray, u: np.ndarray, alpha: float, slope: np.ndarray | None, dslope: np.ndarray | None
) -> None:
    """dz = dz act'(u) in place; u is overwritten."""
    activation = ACTIVATIONS[name]
    if activation.per_channel:
        unused = np.empty_like(slope) if dslope is None else dslope
        activation.pair.backward(dz, u, slope, dz, unused)
        return
    if activation.saves == "y":
        activation.forward(u, u, alpha)
    activation.backward(dz, u, dz, alpha)


# ---------------------------------------------------------------------------------------------- statistics
def _is_loose(mean: np.ndarray, inv_std: np.ndarray) -> np.ndarray:
    return np.abs(mean) * inv_std > LOOSE


def _rest(d: np.ndarray, mean: np.ndarray, inv_std: np.ndarray) -> np.ndarray | None:
    """What the stored mean has lost by rounding, from d = x - mean (exact where it matters), or None."""
    loose = _is_loose(mean, inv_std)
    return np.where(loose, np.add.reduce(d, axis=0) / len(d), 0).astype(d.dtype) if loose.any() else None


def _inv_std(var: np.ndarray, eps: float, inv_std: np.ndarray) -> None:
    np.add(var, eps, out=inv_std)
    np.sqrt(inv_std, out=inv_std)
    np.reciprocal(inv_std, out=inv_std)


def _statistics(x: np.ndarray, d: np.ndarray, eps: float, mean: np.ndarray, inv_std: np.ndarray) -> np.ndarray:
    """Batch mean and inv_std, d = x - mean - rest; returns the biased variance."""
    m = len(x)
    np.add.reduce(x, axis=0, out=mean)
    mean /= m
    np.subtract(x, mean, out=d)
    var = np.einsum("nc,nc->c", d, d) / m
    _inv_std(var, eps, inv_std)
    loose = _is_loose(mean, inv_std)
    if loose.any():  # the sum of x has rounded at the size of the mean: take it again from the centred values
        mean += np.where(loose, np.add.reduce(d, axis=0) / m, 0).astype(d.dtype)
        np.subtract(x, mean, out=d)
        first = np.add.reduce(d, axis=0) / m
        var = np.where(loose, np.maximum(np.einsum("nc,nc->c", d, d) / m - first * first, 0), var)
        _inv_std(var, eps, inv_std)
        rest = _rest(d, mean, inv_std)
        if rest is not None:
            d -= rest
    return var


# ---------------------------------------------------------------------------------------------- the ops
@np.errstate(over="ignore", invalid="ignore")
def batchnorm_forward(
    x: np.ndarray,
    gamma: np.ndarray,
    beta: np.ndarray,
    running_mean: np.ndarray,
    running_var: np.ndarray,
    slope: np.ndarray | None,
    y: np.ndarray,
    mean: np.ndarray,
    inv_std: np.ndarray,
    *,
    decay: float = 0.9,
    eps: float = 1e-5,
    activation: str | None = "identity",
    alpha: float = 0.0,
    rate: float = 0.0,
    seed: int = 0,
    layer: int = 0,
    step: int = 0,
    first_row: int = 0,
    threads: int = 1,
) -> None:
    """Normalise x (N, C) by its own columns' statistics into y (N, C); mean, inv_std (C,) are kept for backward."""
    m = len(x)
    var = _statistics(x, y, eps, mean, inv_std)
    if m > 1:
        running_mean *= decay
        running_mean += (1 - decay) * mean
        running_var *= decay
        running_var += ((1 - decay) * m / (m - 1)) * var
    y *= gamma * inv_std
    y += beta
    if not _is_identity(activation):
        ACTIVATIONS[activation].forward(y, y, alpha, slope)
    if rate:
        dropout_forward(y, y, rate=rate, seed=seed, layer=layer, step=step, first_row=first_row)


@np.errstate(over="ignore", invalid="ignore")
def batchnorm_inference(
    x: np.ndarray,
    gamma: np.ndarray,
    beta: np.ndarray,
    running_mean: np.ndarray,
    running_var: np.ndarray,
    slope: np.ndarray | None,
    y: np.ndarray,
    *,
    eps: float = 1e-5,
    activation: str | None = "identity",
    alpha: float = 0.0,
    threads: int = 1,
) -> None:
    """Normalise x (N, C) by the running statistics into y (N, C); y may be x."""
    inv_std = np.empty_like(running_var)
    _inv_std(running_var, eps, inv_std)
    np.subtract(x, running_mean, out=y)
    y *= gamma * inv_std
    y += beta
    if not _is_identity(activation):
        ACTIVATIONS[activation].forward(y, y, alpha, slope)


@np.errstate(over="ignore", invalid="ignore")
def batchnorm_fold(
    w: np.ndarray,
    b: np.ndarray | None,
    gamma: np.ndarray,
    beta: np.ndarray,
    running_mean: np.ndarray,
    running_var: np.ndarray,
    w_folded: np.ndarray,
    b_folded: np.ndarray,
    *,
    eps: float = 1e-5,
    threads: int = 1,
) -> None:
    """Weights (I, O) and bias (O,) of a dense layer x w + b that does the work of the normalisation behind it."""
    gain = np.empty_like(running_var)
    _inv_std(running_var, eps, gain)
    gain *= gamma
    np.multiply(w, gain, out=w_folded)
    np.negative(running_mean, out=b_folded)
    if b is not None:
        b_folded += b
    b_folded *= gain
    b_folded += beta


@np.errstate(over="ignore", invalid="ignore")
def batchnorm_backward(
    dy: np.ndarray,
    x: np.ndarray,
    gamma: np.ndarray,
    beta: np.ndarray,
    mean: np.ndarray,
    inv_std: np.ndarray,
    slope: np.ndarray | None,
    y: np.ndarray | None,
    dx: np.ndarray,
    dgamma: np.ndarray,
    dbeta: np.ndarray,
    dslope: np.ndarray | None,
    *,
    activation: str | None = "identity",
    alpha: float = 0.0,
    rate: float = 0.0,
    seed: int = 0,
    layer: int = 0,
    training: int = 1,
    step: int = 0,
    first_row: int = 0,
    threads: int = 1,
) -> None:
    """Gradients of x (N, C), gamma, beta and PReLU's slopes (C,); dx may be dy.

    With ``training=0`` mean and inv_std are constants (running statistics), else functions of x. ``y`` (N, C), the
    output of the forward op, is a help that may be missing: behind a ReLU its sign says which elements pass both ReLU
    and dropout. The reference draws the mask again.
    """
    m = len(x)
    d = np.empty_like(dx) if np.may_share_memory(dx, dy) else dx
    np.subtract(x, mean, out=d)
    rest = _rest(d, mean, inv_std) if training else None
    if rest is not None:
        d -= rest
    gain = gamma * inv_std
    dz = dy
    if rate or not _is_identity(activation):
        dz = np.empty_like(dy)
        if rate:
            dropout_backward(dy, dz, rate=rate, seed=seed, layer=layer, step=step, first_row=first_row)
        else:
            dz[...] = dy
    if dslope is not None:
        dslope[...] = 0
    if not _is_identity(activation):
        u = d * gain
        u += beta
        _activate_backward(activation, dz, u, alpha, slope, dslope)

    np.add.reduce(dz, axis=0, out=dbeta)
    np.einsum("nc,nc->c", dz, d, out=dgamma)
    dgamma *= inv_std
    if not training:
        np.multiply(dz, gain, out=dx)
        return
    d *= dgamma * inv_std * (-1 / m)  # dx = gain (dz - dbeta / m - xhat dgamma / m)
    d += dz
    d -= dbeta / m
    np.multiply(d, gain, out=dx)


# ---------------------------------------------------------------------------------------------- specs
def _fill_x(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any, made: Mapping[str, Any]) -> np.ndarray:
    """Columns whose deviation is near 1 for every number of rows: two random values may lie as close as they like."""
    sign = np.where(np.arange(shape[0]) % 2, 1.0, -1.0)[:, None]
    return sign * rng.uniform(0.5, 1.5, shape) + rng.standard_normal(shape[1])


def _fill_gamma(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any, made: Mapping[str, Any]) -> np.ndarray:
    return rng.uniform(0.5, 1.5, shape)


def _fill_slope(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any, made: Mapping[str, Any]) -> np.ndarray:
    return rng.uniform(0.1, 0.4, shape)


def _fill_mean(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any, made: Mapping[str, Any]) -> np.ndarray:
    return made["x"].astype(np.float64).mean(axis=0)


def _fill_inv_std(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any, made: Mapping[str, Any]) -> np.ndarray:
    return 1 / np.sqrt(made["x"].astype(np.float64).var(axis=0) + 1e-5)


X = Array("x", "N,C", fill=_fill_x)
GAMMA = Array("gamma", "C", single=True, fill=_fill_gamma)
BETA = Array("beta", "C", single=True)
SLOPE = Array("slope", "C", single=True, optional=True, fill=_fill_slope)

EPS = Param("eps", "float", 1e-5)
ACTIVATION = (Param("activation", "activation", "identity"), Param("alpha", "float", 0.0))
DROPOUT = (Param("rate", "float", 0.0), Param("seed", "seed", 0), Param("layer", "int", 0))

FUSED: tuple[dict[str, Any], ...] = (
    {},
    {"activation": "relu"},
    {"activation": "relu", "rate": 0.3, "seed": 42, "layer": 1},
    {"rate": 0.5, "seed": 7},
    {"activation": "prelu"},
    {"activation": "leaky_relu", "alpha": 0.01, "rate": 0.3, "seed": 42},
    {"activation": "gelu"},
    {"activation": "tanh", "rate": 0.3, "seed": 42, "layer": 2},
)
#: Settings that show when they are taken for the defaults: the columns' variance is about 1. With two rows dx is what
#: dz has beside 1 and xhat, eps / var of it, and 1e-5 of it would be less than its own rounding.
SHOWN = {"eps": 0.1, "decay": 0.7}


def _sums(sizes: Mapping[str, int]) -> Tolerance:
    return Tolerance(
        ulp=8.0,
        norm=32.0 + 2.0 * float(np.sqrt(sizes["N"])),
        why="a dozen roundings an element; sums of N terms, row by row, err by about sqrt(N) roundings of their size",
    )


def _cancelled(sizes: Mapping[str, int], tolerance: Tolerance, columns: str = "C") -> Tolerance:
    norm = tolerance.norm * (1.0 + 64.0 / sizes[columns])
    return replace(tolerance, norm=norm, why=tolerance.why + "; among few columns the largest may have cancelled")


def _tolerance_forward(sizes: Mapping[str, int]) -> dict[str, Tolerance]:
    positive = _sums(sizes)
    signed = _cancelled(sizes, positive)
    return {"y": signed, "mean": signed, "running_mean": signed, "inv_std": positive, "running_var": positive}


def _tolerance_fold(sizes: Mapping[str, int]) -> dict[str, Tolerance]:
    few = Tolerance(ulp=8.0, norm=8.0, why="half a dozen roundings an element")
    return {"w_folded": replace(few, norm=0.0), "b_folded": _cancelled(sizes, few, "O")}


def _tolerance_backward(sizes: Mapping[str, int]) -> dict[str, Tolerance]:
    common = dx = _cancelled(sizes, _sums(sizes))
    if sizes["N"] <= 4:
        why = "dx is what dz has beside 1 and xhat: with two rows a tenth of it, with three or four an axis or two"
        dx = replace(common, norm=16.0 * common.norm, why=why)
    return {"dx": dx, "dgamma": common, "dbeta": common, "dslope": common}


register_op(
    OpSpec(
        name="batchnorm_forward",
        family="batchnorm",
        summary="y = dropout(act(gamma (x - mean) inv_std + beta)) by the batch's own statistics",
        arrays=(
            X,
            GAMMA,
            BETA,
            Array("running_mean", "C", "inout", single=True),
            Array("running_var", "C", "inout", single=True, fill=_fill_gamma),
            SLOPE,
            Array("y", "N,C", "out"),
            Array("mean", "C", "out", single=True),
            Array("inv_std", "C", "out", single=True),
        ),
        params=(Param("decay", "float", 0.9), EPS, *ACTIVATION, *DROPOUT),
        runtime=("step", "first_row"),
        reference=batchnorm_forward,
        tolerance=_tolerance_forward,
        variants=tuple({**variant, **SHOWN} for variant in FUSED),
        gradients=("batchnorm_backward",),
        no_gradient=("running_mean", "running_var"),
        column_local=True,
        passes={"x": 2},
        flops=lambda sizes: 7.0 * sizes["N"] * sizes["C"],
    )
)
register_op(
    OpSpec(
        name="batchnorm_inference",
        family="batchnorm",
        summary="y = act(gamma (x - running_mean) / sqrt(running_var + eps) + beta)",
        arrays=(
            X,
            GAMMA,
            BETA,
            Array("running_mean", "C", single=True),
            Array("running_var", "C", single=True, fill=_fill_gamma),
            SLOPE,
            Array("y", "N,C", "out"),
        ),
        params=(EPS, *ACTIVATION),
        reference=batchnorm_inference,
        tolerance=lambda sizes: _cancelled(sizes, _sums(sizes)),
        variants=tuple({"activation": name, "eps": SHOWN["eps"]} for name in ("identity", "relu", "prelu", "gelu")),
        no_gradient=("x", "gamma", "beta", "running_mean", "running_var", "slope"),
        aliases=(("x", "y"),),
        column_local=True,
        flops=lambda sizes: 3.0 * sizes["N"] * sizes["C"],
    )
)
register_op(
    OpSpec(
        name="batchnorm_fold",
        family="batchnorm",
        summary="w_folded = w gain, b_folded = (b - running_mean) gain + beta, gain = gamma / sqrt(running_var + eps)",
        arrays=(
            Array("w", "I,O", single=True),
            Array("b", "O", single=True, optional=True),
            Array("gamma", "O", single=True, fill=_fill_gamma),
            Array("beta", "O", single=True),
            Array("running_mean", "O", single=True),
            Array("running_var", "O", single=True, fill=_fill_gamma),
            Array("w_folded", "I,O", "out"),
            Array("b_folded", "O", "out", single=True),
        ),
        params=(EPS,),
        variants=({"eps": SHOWN["eps"]},),
        reference=batchnorm_fold,
        tolerance=_tolerance_fold,
        no_gradient=("w", "b", "gamma", "beta", "running_mean", "running_var"),
        flops=lambda sizes: 1.0 * sizes["I"] * sizes["O"],
    )
)
register_op(
    OpSpec(
        name="batchnorm_backward",
        family="batchnorm",
        summary="gradients of x, gamma, beta and slope; dx = gain (dz - dbeta / N - xhat dgamma / N)",
        arrays=(
            Array("dy", "N,C"),
            X,
            GAMMA,
            BETA,
            Array("mean", "C", single=True, fill=_fill_mean),
            Array("inv_std", "C", single=True, fill=_fill_inv_std),
            SLOPE,
            Array("y", "N,C", optional=True),
            Array("dx", "N,C", "out"),
            Array("dgamma", "C", "out", single=True),
            Array("dbeta", "C", "out", single=True),
            Array("dslope", "C", "out", single=True, optional=True),
        ),
        params=(*ACTIVATION, *DROPOUT, Param("training", "int", 1)),
        runtime=("step", "first_row"),
        reference=batchnorm_backward,
        tolerance=_tolerance_backward,
        variants=(*FUSED, {"training": 0}, {"activation": "relu", "training": 0}),
        aliases=(("dy", "dx"),),
        column_local=True,
        passes={"dy": 2, "x": 2},
        flops=lambda sizes: 10.0 * sizes["N"] * sizes["C"],
    )
)
