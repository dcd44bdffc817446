"""Optimiser sweeps in NumPy, over flat arrays of P values.

* ``sgd_step`` (momentum as in Sutskever et al. 2013, in PyTorch's form, where v carries no learning rate):
  g <- scale clip g + l2 w;  v <- mu v + g;  d = v, with Nesterov d = g + mu v;  w <- (1 - lr wd) w - lr d.
* ``adam_step`` (Kingma & Ba 2015, Algorithm 1; ``weight_decay`` makes it AdamW, Loshchilov & Hutter 2019):
  g <- scale clip g + l2 w;  m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;
  w <- (1 - lr wd) w - lr [m / (1 - b1^t)] / (sqrt(v / (1 - b2^t)) + eps) with t = update + 1.
* ``squared_norm``: total <- total + scale^2 sum g^2 in float64, and ``clip_scale``: min(1, max_norm / sqrt(total))
  (Pascanu et al. 2013), total <- 0 for the next step: together the global norm of several gradients, clipped without a
  second pass over them.

``scale`` and ``update`` come from the run-time block: a factor of every gradient (1 changes no bit), and how many
updates the moments have seen. ``clip`` (1 value, float64) multiplies g too when it is given; g itself is only read.
``lr`` is multiplied by the call's ``lr_factor``. Elsewhere: Keras' Adam adds eps to the root of the uncorrected v,
PyTorch clips by max_norm / (norm + 1e-6).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..registry import Array, OpSpec, Param, Tolerance, register_op


def _gradient(w: np.ndarray, g: np.ndarray, clip: np.ndarray | None, scale: float, l2: float) -> np.ndarray:
    if clip is not None:
        scale = scale * float(clip[0])
    if scale != 1.0:
        g = g * scale
    if l2:
        g = g + l2 * w
    return g


def sgd_step(
    w: np.ndarray,
    g: np.ndarray,
    v: np.ndarray | None,
    clip: np.ndarray | None,
    momentum: float = 0.0,
    nesterov: int = 0,
    l2: float = 0.0,
    weight_decay: float = 0.0,
    lr_factor: float = 1.0,
    lr: float = 0.01,
    scale: float = 1.0,
    threads: int = 1,
) -> None:
    """Stochastic gradient descent with momentum, one sweep, in place."""
    if momentum and v is None:
        raise ValueError(f"sgd_step: momentum {momentum} needs the velocity array v, found None; pass zeros at step 0")
    lr = lr * lr_factor
    direction = g = _gradient(w, g, clip, scale, l2)
    if v is not None:
        v *= momentum
        v += g
        direction = g + momentum * v if nesterov else v
    if weight_decay:
        w *= 1.0 - lr * weight_decay
    w -= lr * direction


def adam_step(
    w: np.ndarray,
    g: np.ndarray,
    m: np.ndarray,
    v: np.ndarray,
    clip: np.ndarray | None,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    l2: float = 0.0,
    weight_decay: float = 0.0,
    lr_factor: float = 1.0,
    update: int = 0,
    lr: float = 1e-3,
    scale: float = 1.0,
    threads: int = 1,
) -> None:
    """Adam (AdamW with ``weight_decay``), one sweep, in place."""
    lr = lr * lr_factor
    t = update + 1
    g = _gradient(w, g, clip, scale, l2)
    m *= beta1
    scratch = (1.0 - beta1) * g
    m += scratch
    v *= beta2
    np.multiply(g, g, out=scratch)
    scratch *= 1.0 - beta2
    v += scratch
    np.sqrt(v, out=scratch)
    scratch *= 1.0 / np.sqrt(1.0 - beta2**t)
    scratch += eps
    np.divide(m, scratch, out=scratch)
    scratch *= lr / (1.0 - beta1**t)
    if weight_decay:
        w *= 1.0 - lr * weight_decay
    w -= scratch


def squared_norm(g: np.ndarray, total: np.ndarray, scale: float = 1.0, threads: int = 1) -> None:
    """Add the sum of squares of scale g to total[0], in float64."""
    total[0] += np.square(g, dtype=np.float64).sum() * (scale * scale)


def clip_scale(total: np.ndarray, scale: np.ndarray, max_norm: float = 1.0, threads: int = 1) -> None:
    """The factor that brings a gradient of squared norm total[0] to a norm of at most max_norm; NaN stays NaN.

    The total is used up: it is 0 afterwards, ready for the next step's `squared_norm`.
    """
    with np.errstate(divide="ignore"):  # a zero gradient: min(1, inf)
        np.minimum(1.0, max_norm / np.sqrt(total), out=scale)
    total[0] = 0.0


def _square(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype, made: Mapping) -> np.ndarray:
    return np.square(rng.standard_normal(shape))


def _scale(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype, made: Mapping) -> np.ndarray:
    return 0.25 + 0.5 * rng.random(shape)


_STEP = "about one rounding per operation; w - lr d and b m + (1 - b) g cancel, hence the part of the largest value"

SGD_STEP = register_op(
    OpSpec(
        name="sgd_step",
        family="optimizers",
        summary="SGD with momentum, Nesterov, L2 and decoupled decay",
        arrays=(
            Array("w", "P", role="inout"),
            Array("g", "P"),
            Array("v", "P", role="inout", optional=True),
            Array("clip", "1", optional=True, dtype="f8", fill=_scale),
        ),
        reference=sgd_step,
        params=(
            Param("momentum", "float", 0.0),
            Param("nesterov", "int", 0),
            Param("l2", "float", 0.0),
            Param("weight_decay", "float", 0.0),
            Param("lr_factor", "float", 1.0),
        ),
        runtime=("lr", "scale"),
        tolerance=lambda sizes: Tolerance(ulp=4.0, norm=4.0, why=_STEP),
        variants=(
            {},
            {"momentum": 0.9},
            {"momentum": 0.9, "nesterov": 1, "l2": 1e-2},
            {"momentum": 0.5, "weight_decay": 0.1, "lr_factor": 0.5},
        ),
        no_gradient=("w", "g", "v"),
        flops=lambda sizes: 6.0 * sizes["P"],
    )
)
ADAM_STEP = register_op(
    OpSpec(
        name="adam_step",
        family="optimizers",
        summary="Adam, AdamW by weight_decay",
        arrays=(
            Array("w", "P", role="inout"),
            Array("g", "P"),
            Array("m", "P", role="inout"),
            Array("v", "P", role="inout", fill=_square),
            Array("clip", "1", optional=True, dtype="f8", fill=_scale),
        ),
        reference=adam_step,
        params=(
            Param("beta1", "float", 0.9),
            Param("beta2", "float", 0.999),
            Param("eps", "float", 1e-8),
            Param("l2", "float", 0.0),
            Param("weight_decay", "float", 0.0),
            Param("lr_factor", "float", 1.0),
        ),
        runtime=("update", "lr", "scale"),
        tolerance=lambda sizes: Tolerance(ulp=8.0, norm=4.0, why=_STEP),
        variants=({}, {"l2": 1e-2, "beta1": 0.8}, {"weight_decay": 0.1, "lr_factor": 0.5, "eps": 1e-3}),
        no_gradient=("w", "g", "m", "v"),
        flops=lambda sizes: 14.0 * sizes["P"],
    )
)
SQUARED_NORM = register_op(
    OpSpec(
        name="squared_norm",
        family="optimizers",
        summary="adds the sum of squares to a float64 total",
        arrays=(Array("g", "P"), Array("total", "1", role="inout", dtype="f8", fill=_square)),
        reference=squared_norm,
        runtime=("scale",),
        tolerance=lambda sizes: Tolerance(ulp=16.0, why="positive terms, added in blocks in float64"),
        no_gradient=("g", "total"),
        flops=lambda sizes: 2.0 * sizes["P"],
    )
)
CLIP_SCALE = register_op(
    OpSpec(
        name="clip_scale",
        family="optimizers",
        summary="min(1, max_norm / sqrt(total)), total back to 0",
        arrays=(
            Array("total", "1", role="inout", dtype="f8", fill=_square),
            Array("scale", "1", role="out", dtype="f8"),
        ),
        reference=clip_scale,
        params=(Param("max_norm", "float", 1.0),),
        variants=({}, {"max_norm": 0.01}),
        no_gradient=("total",),
        flops=lambda sizes: 3.0,
    )
)
