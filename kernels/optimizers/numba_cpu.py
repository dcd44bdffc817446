"""Optimisers on Numba: one fused loop over a flat array. Formulas and papers: reference.py.

Updates are element-wise, shared out in blocks of 16384 values; the squared norm adds such blocks in float64, in order.
Factors come in the arrays' dtype: a float64 one would promote the whole update. Blocks are slices and loops start at 0:
an index that might be negative costs Numba's wrap-around test and the vector lanes.
"""

from __future__ import annotations

import math

import numba
import numpy as np

from ..common.numba_cpu import FASTMATH, parallel_kernel, point, serial_kernel
from ..registry import Impl, register

BLOCK = 16384


@point
def _gradient(g, w, scale, l2):
    g = g * scale
    if l2 != 0:  # not 0 * w: an infinite weight would make NaN
        g = g + l2 * w
    return g


@serial_kernel
def _sgd(w, g, v, scale, l2, keep, momentum, rate, nesterov):
    for i in range(g.size):
        d = _gradient(g[i], w[i], scale, l2)
        v[i] = momentum * v[i] + d
        d = d + momentum * v[i] if nesterov else v[i]
        w[i] = w[i] * keep - rate * d


@serial_kernel
def _plain_sgd(w, g, scale, l2, keep, rate):
    for i in range(g.size):
        w[i] = w[i] * keep - rate * _gradient(g[i], w[i], scale, l2)


@serial_kernel
def _adam(w, g, m, v, scale, l2, keep, beta1, gain1, beta2, gain2, root, rate, eps):
    for i in range(g.size):
        d = _gradient(g[i], w[i], scale, l2)
        m[i] = beta1 * m[i] + gain1 * d
        v[i] = beta2 * v[i] + gain2 * (d * d)
        w[i] = w[i] * keep - rate * m[i] / (math.sqrt(v[i]) * root + eps)


@numba.njit(fastmath=FASTMATH | {"reassoc"})
def _add(a, b):
    """An addition that may be reordered: that lets a sum run in vector lanes. Compiled once, its order is fixed."""
    return a + b


@serial_kernel
def _squares(g):
    total = 0.0
    for i in range(g.size):
        x = np.float64(g[i])
        total = _add(total, x * x)
    return total


@parallel_kernel
def _sgd_parallel(w, g, v, scale, l2, keep, momentum, rate, nesterov):
    for k in numba.prange((w.size + BLOCK - 1) // BLOCK):
        a, b = k * BLOCK, (k + 1) * BLOCK
        _sgd(w[a:b], g[a:b], v[a:b], scale, l2, keep, momentum, rate, nesterov)


@parallel_kernel
def _plain_sgd_parallel(w, g, scale, l2, keep, rate):
    for k in numba.prange((w.size + BLOCK - 1) // BLOCK):
        a, b = k * BLOCK, (k + 1) * BLOCK
        _plain_sgd(w[a:b], g[a:b], scale, l2, keep, rate)


@parallel_kernel
def _adam_parallel(w, g, m, v, scale, l2, keep, beta1, gain1, beta2, gain2, root, rate, eps):
    for k in numba.prange((w.size + BLOCK - 1) // BLOCK):
        a, b = k * BLOCK, (k + 1) * BLOCK
        _adam(w[a:b], g[a:b], m[a:b], v[a:b], scale, l2, keep, beta1, gain1, beta2, gain2, root, rate, eps)


@parallel_kernel
def _squares_parallel(g, partial):
    for k in numba.prange(partial.size):
        partial[k] = _squares(g[k * BLOCK : (k + 1) * BLOCK])


def _factor(clip: np.ndarray | None, scale: float) -> float:
    return scale if clip is None else scale * float(clip[0])


def _shared(size: int, threads: int) -> bool:
    """Whether threads share the blocks; below two there is nothing to share."""
    return threads > 1 and size > BLOCK


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
    T, rate = w.dtype.type, lr * lr_factor
    before = T(_factor(clip, scale)), T(l2), T(1.0 - rate * weight_decay)
    if v is None:
        if _shared(w.size, threads):
            _plain_sgd_parallel(w, g, *before, T(rate), threads=threads)
        else:
            _plain_sgd(w, g, *before, T(rate))
    elif _shared(w.size, threads):
        _sgd_parallel(w, g, v, *before, T(momentum), T(rate), bool(nesterov), threads=threads)
    else:
        _sgd(w, g, v, *before, T(momentum), T(rate), bool(nesterov))


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
    T, rate, t = w.dtype.type, lr * lr_factor, update + 1
    factors = (_factor(clip, scale), l2, 1.0 - rate * weight_decay, beta1, 1.0 - beta1, beta2, 1.0 - beta2)
    factors = (*factors, 1.0 / math.sqrt(1.0 - beta2**t), rate / (1.0 - beta1**t), eps)
    typed = tuple(T(factor) for factor in factors)
    if _shared(w.size, threads):
        _adam_parallel(w, g, m, v, *typed, threads=threads)
    else:
        _adam(w, g, m, v, *typed)


def squared_norm(g: np.ndarray, total: np.ndarray, scale: float = 1.0, threads: int = 1) -> None:
    """Add the sum of squares of scale g to total[0], in float64."""
    partial = np.empty((g.size + BLOCK - 1) // BLOCK)
    _squares_parallel(g, partial, threads=threads if _shared(g.size, threads) else 1)
    total[0] += partial.sum() * (scale * scale)


def clip_scale(total: np.ndarray, scale: np.ndarray, max_norm: float = 1.0, threads: int = 1) -> None:
    """The factor that brings a gradient of squared norm total[0] to a norm of at most max_norm; total is used up."""
    norm = math.sqrt(total[0])  # one number: nothing to compile
    ratio = max_norm / norm if norm else math.inf
    scale[0] = 1.0 if ratio >= 1.0 else ratio  # a NaN ratio stays
    total[0] = 0.0


register(Impl("sgd_step", "numba", sgd_step))
register(Impl("adam_step", "numba", adam_step))
register(Impl("squared_norm", "numba", squared_norm))
register(Impl("clip_scale", "numba", clip_scale))
