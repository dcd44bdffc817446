"""Batch normalisation on Numba: one task is some columns of all rows, so that no thread shares a sum.

See reference.py for the formulas and README.md for the derivation. A task walks its columns row by row: statistics,
then normalise, activate and drop a row while it is in L1; backward forms dz in dx, adds it up, and finishes dx in a
second sweep. Sums add 4 rows at a time in the input's dtype, 256 rows of them, then go to a float64 total.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from fastdl.kernels.activations.points import POINTS
from fastdl.kernels.activations.reference import ACTIVATIONS
from fastdl.kernels.batchnorm.reference import batchnorm_fold
from fastdl.kernels.common import philox
from fastdl.kernels.common.numba_cpu import FASTMATH, parallel_kernel, point, serial_kernel
from fastdl.kernels.random.points import MASK, philox4x32
from fastdl.kernels.registry import Impl, register

#: Columns of a task at most. 2 KB of a row: of 8 KB rows, 512 bytes cost backward 1.4 (plain) to 1.9 times (dropout) as
#: much, since no hardware prefetcher follows pieces of rows on a page each.
WIDTH = 512
#: Rows that add up in the input's dtype before they go to a float64 total.
SPAN = 256
#: As in reference.py: |mean| * inv_std from which the rounding of the stored mean is put back.
LOOSE = 16.0
#: Squared distance, in variances, from which the shift of the statistics is chosen again.
FAR = 4.0

OPTIONS = {"error_model": "numpy", "fastmath": FASTMATH, "forceinline": True}
helper = numba.njit(**OPTIONS)

IDENTITY = -1
KINDS: dict[str | None, int] = {None: IDENTITY, "identity": IDENTITY} | {name: k for k, name in enumerate(POINTS)}
_VALUE = [point(pair[0]) for pair in POINTS.values()]
_GRADIENT = [point(pair[1]) for pair in POINTS.values()]
_SLOPE = [point(pair[2]) if len(pair) == 3 else None for pair in POINTS.values()]


# ------------------------------------------------------------------------------------------------ statistics
@helper
def _add_four(a, b, d, e, shift, p1, p2):
    for c in range(len(p1)):
        k = shift[c]
        s, t, u, v = a[c] - k, b[c] - k, d[c] - k, e[c] - k
        p1[c] += (s + t) + (u + v)
        p2[c] += (s * s + t * t) + (u * u + v * v)


@helper
def _add_one(a, shift, p1, p2):
    for c in range(len(p1)):
        s = a[c] - shift[c]
        p1[c] += s
        p2[c] += s * s


@helper
def _moments(x, here, shift, p1, p2, s1, s2):
    """s1, s2 = sums over the rows of x - shift and of its square."""
    rows = x.shape[0]
    s1[:], s2[:] = 0.0, 0.0
    for r0 in range(0, rows, SPAN):
        r1 = min(rows, r0 + SPAN)
        p1[:], p2[:] = 0, 0
        whole = r0 + (r1 - r0) // 4 * 4
        for r in range(r0, whole, 4):
            _add_four(x[r, here], x[r + 1, here], x[r + 2, here], x[r + 3, here], shift, p1, p2)
        for r in range(whole, r1):
            _add_one(x[r, here], shift, p1, p2)
        for c in range(len(s1)):
            s1[c] += p1[c]
            s2[c] += p2[c]


@helper
def _statistics(x, here, mean, var):
    """Mean and biased variance of a task's columns in float64: one pass shifted by the mean of the first rows, and a
    second one, shifted by the mean, where the first shift was more than two deviations off."""
    rows, w = x.shape[0], len(mean)
    some = min(rows, 8)
    shift, p1, p2 = np.empty(w, x.dtype), np.empty(w, x.dtype), np.empty(w, x.dtype)
    s1 = np.empty(w)
    for c in range(w):
        total = x.dtype.type(0)
        for r in range(some):
            total += x[r, here.start + c] / x.dtype.type(some)
        shift[c] = total if np.isfinite(total) else x.dtype.type(0)
    for _ in range(2):
        _moments(x, here, shift, p1, p2, s1, var)
        again = False
        for c in range(w):
            d = s1[c] / rows
            v = var[c] / rows - d * d
            mean[c] = shift[c] + d
            var[c] = 0.0 if v < 0.0 else v
            if d * d > FAR * var[c]:
                shift[c] = mean[c]
                again = True
        if not again:
            break


@helper
def _is_loose(mean, inv_std):
    return abs(mean * inv_std) > LOOSE


@helper
def _affine(gamma, beta, mean, inv_std, exact, gain, shift, rest):
    """u = (x - mean) gain + shift, the same forward and backward; rest = what the stored mean has lost by rounding."""
    for c in range(len(gain)):
        gain[c] = gamma[c] * inv_std[c]
        rest[c] = exact[c] - mean[c] if _is_loose(mean[c], inv_std[c]) else 0.0
        shift[c] = np.float64(beta[c]) - np.float64(rest[c]) * np.float64(gain[c])


# ------------------------------------------------------------------------------------------------ rows of a task
@helper
def _draw(words, first_block, row, layer, step, k0, k1):
    """The row's random words of a task's columns, four a block of eight columns."""
    for b in range(len(words) // 4):
        w0, w1, w2, w3 = philox4x32(first_block + np.uint64(b), row, layer, step, k0, k1)
        words[4 * b] = np.uint32(w0)
        words[4 * b + 1] = np.uint32(w1)
        words[4 * b + 2] = np.uint32(w2)
        words[4 * b + 3] = np.uint32(w3)


@helper
def _drop(x, lanes, last, scale, y):
    for c in range(len(y)):
        kept = x[c] * scale
        y[c] = kept if lanes[c] <= last else y.dtype.type(0)


@helper
def _copy(x, y):
    for c in range(len(y)):
        y[c] = x[c]


@helper
def _normalise(x, mean, gain, shift, u):
    for c in range(len(u)):
        u[c] = (x[c] - mean[c]) * gain[c] + shift[c]


# The activation is a number that is compared once a row, so that one kernel serves all of them: compiling a kernel for
# each took 8 s an activation, dtype and direction, and a task's row does not feel a dozen comparisons.
def _forward_chain(k):
    """A helper that runs activation k of POINTS, or asks the next one."""
    value, sloped = _VALUE[k], _SLOPE[k] is not None
    other = _forward_chain(k + 1) if k + 1 < len(_VALUE) else None

    @helper
    def run(kind, u, alpha, slope):
        if kind == k:
            for c in range(len(u)):
                u[c] = value(u[c], slope[c] if sloped else alpha)
        elif other is not None:
            other(kind, u, alpha, slope)

    return run


def _backward_chain(k):
    value, gradient, slope_part = _VALUE[k], _GRADIENT[k], _SLOPE[k]
    from_output = ACTIVATIONS[list(POINTS)[k]].saves == "y"
    other = _backward_chain(k + 1) if k + 1 < len(_VALUE) else None

    @helper
    def run(kind, dz, u, alpha, slope, dslope):
        if kind == k:
            if slope_part is not None:
                for c in range(len(u)):
                    dslope[c] += slope_part(dz[c], u[c])
                    dz[c] = gradient(dz[c], u[c], slope[c])
            else:
                for c in range(len(u)):
                    s = value(u[c], alpha) if from_output else u[c]
                    dz[c] = gradient(dz[c], s, alpha)
        elif other is not None:
            other(kind, dz, u, alpha, slope, dslope)

    return run


_FORWARD, _BACKWARD = _forward_chain(0), _backward_chain(0)


@serial_kernel
def _activate(kind, u, alpha, slope):
    """u = act(u)."""
    _FORWARD(kind, u, alpha, slope)


@serial_kernel
def _activate_backward(kind, dz, u, alpha, slope, dslope):
    """dz = dz act'(u), dslope added to."""
    _BACKWARD(kind, dz, u, alpha, slope, dslope)


@helper
def _sum_four(dz, x, r, here, mean, p1, p2):
    _sum_rows(
        dz[r, here], dz[r + 1, here], dz[r + 2, here], dz[r + 3, here],
        x[r, here], x[r + 1, here], x[r + 2, here], x[r + 3, here], mean, p1, p2,
    )  # fmt: skip


@helper
def _sum_rows(a, b, d, e, s, t, u, v, mean, p1, p2):
    for c in range(len(p1)):
        k = mean[c]
        p1[c] += (a[c] + b[c]) + (d[c] + e[c])
        p2[c] += (a[c] * (s[c] - k) + b[c] * (t[c] - k)) + (d[c] * (u[c] - k) + e[c] * (v[c] - k))


@helper
def _sum_one(dz, x, mean, p1, p2):
    for c in range(len(p1)):
        p1[c] += dz[c]
        p2[c] += dz[c] * (x[c] - mean[c])


@helper
def _finish(dz, x, mean, gain, along, across, dx):
    for c in range(len(dx)):
        dx[c] = (dz[c] - (x[c] - mean[c]) * along[c] - across[c]) * gain[c]


# ------------------------------------------------------------------------------------------------ kernels
@parallel_kernel
def forward(
    x, gamma, beta, running_mean, running_var, slope, y, mean, inv_std, training, decay, eps, fused, drop, stream, width
):
    """Training: statistics of x into mean and inv_std; else mean is given and inv_std comes from running_var."""
    rows, cols = x.shape
    kind, alpha = fused
    dropping, last, scale = drop
    layer, step, k0, k1, first_row = stream
    for task in numba.prange((cols + width - 1) // width):
        first = task * width
        w = min(width, cols - first)
        here = slice(first, first + w)
        exact, var = np.empty(w), np.empty(w)
        if training:
            _statistics(x, here, exact, var)
            for c in range(w):
                mean[first + c] = exact[c]
            if rows > 1:  # one row says nothing about the spread
                unbiased = rows / (rows - 1)
                for c in range(w):
                    running_mean[first + c] = decay * running_mean[first + c] + (1 - decay) * exact[c]
                    running_var[first + c] = decay * running_var[first + c] + (1 - decay) * unbiased * var[c]
        else:
            for c in range(w):
                exact[c] = mean[first + c]
                var[c] = running_var[first + c]
        for c in range(w):
            inv_std[first + c] = 1.0 / np.sqrt(var[c] + eps)
        gain, shift, rest = np.empty(w, x.dtype), np.empty(w, x.dtype), np.empty(w, x.dtype)
        _affine(gamma[here], beta[here], mean[here], inv_std[here], exact, gain, shift, rest)
        words = np.empty((w + 7) // 8 * 4, np.uint32)
        lanes = words.view(np.uint16)  # low half first: Numba's platforms are little-endian
        for r in range(rows):
            out = y[r, here]
            _normalise(x[r, here], mean[here], gain, shift, out)
            if kind != IDENTITY:
                _activate(kind, out, alpha, slope[here])
            if dropping:
                _draw(words, np.uint64(first // 8), (first_row + np.uint64(r)) & MASK, layer, step, k0, k1)
                _drop(out, lanes, last, scale, out)


@parallel_kernel
def backward(
    dy, x, gamma, beta, mean, inv_std, slope, dz, dx, dgamma, dbeta, dslope, training, fresh, fused, drop, stream, width
):
    """dz is formed in dx (fresh: then it is dx), or is dy."""
    rows, cols = x.shape
    kind, alpha = fused
    dropping, last, scale = drop
    layer, step, k0, k1, first_row = stream
    for task in numba.prange((cols + width - 1) // width):
        first = task * width
        w = min(width, cols - first)
        here = slice(first, first + w)
        exact, s1, s2 = np.empty(w), np.zeros(w), np.zeros(w)
        loose = False
        for c in range(w):
            exact[c] = mean[first + c]
            loose |= _is_loose(mean[first + c], inv_std[first + c])
        if training and loose:
            _statistics(x, here, exact, s1)  # the float64 mean again
        gain, shift, rest = np.empty(w, x.dtype), np.empty(w, x.dtype), np.empty(w, x.dtype)
        _affine(gamma[here], beta[here], mean[here], inv_std[here], exact, gain, shift, rest)
        words = np.empty((w + 7) // 8 * 4, np.uint32)
        lanes = words.view(np.uint16)
        u, p1, p2 = np.empty(w, x.dtype), np.zeros(w, x.dtype), np.zeros(w, x.dtype)
        dslope[here] = 0
        s1[:] = 0.0
        for r0 in range(0, rows, SPAN):
            r1 = min(rows, r0 + SPAN)
            whole = r0 + (r1 - r0) // 4 * 4
            p1[:], p2[:] = 0, 0
            for r in range(r0, r1):
                if fresh:
                    row = dx[r, here]
                    if dropping:
                        _draw(words, np.uint64(first // 8), (first_row + np.uint64(r)) & MASK, layer, step, k0, k1)
                        _drop(dy[r, here], lanes, last, scale, row)
                    else:
                        _copy(dy[r, here], row)
                    if kind != IDENTITY:
                        _normalise(x[r, here], mean[here], gain, shift, u)
                        _activate_backward(kind, row, u, alpha, slope[here], dslope[here])
                if r < whole and r % 4 == 3:
                    _sum_four(dz, x, r - 3, here, mean[here], p1, p2)
                elif r >= whole:
                    _sum_one(dz[r, here], x[r, here], mean[here], p1, p2)
            for c in range(w):
                s1[c] += p1[c]
                s2[c] += p2[c]
        along, across = np.zeros(w, x.dtype), np.zeros(w, x.dtype)
        for c in range(w):
            total = (s2[c] - rest[c] * s1[c]) * inv_std[first + c]  # xhat = (x - mean - rest) inv_std
            dgamma[first + c] = total
            dbeta[first + c] = s1[c]
            if training:
                along[c] = total * inv_std[first + c] / rows
                across[c] = (s1[c] - total * inv_std[first + c] * rest[c]) / rows
        for r in range(rows):
            _finish(dz[r, here], x[r, here], mean[here], gain, along, across, dx[r, here])


# ------------------------------------------------------------------------------------------------ launchers
def _fused(activation: str | None, alpha: float, slope: np.ndarray | None, gamma: np.ndarray) -> tuple[Any, np.ndarray]:
    """(kind, alpha) for a kernel, and the slopes; an unused array of their type where there are none."""
    return (KINDS[activation], gamma.dtype.type(alpha)), gamma if slope is None else slope


def _dropout(rate: float, seed: int, layer: int, step: int, first_row: int, dtype: Any) -> tuple[Any, Any]:
    """(is there dropout, the highest lane that is kept, the scale) and the stream's words."""
    T = philox.threshold(rate) if rate else 65536
    k0, k1 = philox.split(seed)
    words = tuple(map(np.uint64, (layer & philox.MASK, step, k0, k1, first_row & philox.MASK)))
    return (rate > 0, np.uint16(T - 1), philox.scale(T, dtype)), words


def _width(x: np.ndarray, threads: int) -> int:
    """Columns of a task: a share for each thread, a multiple of 32. No result depends on it."""
    share = -(-x.shape[1] // max(1, threads))
    return min(WIDTH, -(-share // 32) * 32)


def batchnorm_forward(
    x, gamma, beta, running_mean, running_var, slope, y, mean, inv_std, *, decay=0.9, eps=1e-5, activation="identity",
    alpha=0.0, rate=0.0, seed=0, layer=0, step=0, first_row=0, threads=1,
):  # fmt: skip
    """Normalise x (N, C) by its own statistics into y (N, C)."""
    fused, slope = _fused(activation, alpha, slope, gamma)
    drop, stream = _dropout(rate, seed, layer, step, first_row, x.dtype)
    width = _width(x, threads)
    statistics = running_mean, running_var
    settings = True, decay, eps, fused, drop, stream, width
    forward(x, gamma, beta, *statistics, slope, y, mean, inv_std, *settings, threads=threads)


def batchnorm_inference(
    x, gamma, beta, running_mean, running_var, slope, y, *, eps=1e-5, activation="identity", alpha=0.0, threads=1
):
    """Normalise x (N, C) by the running statistics into y (N, C); y may be x."""
    fused, slope = _fused(activation, alpha, slope, gamma)
    drop, stream = _dropout(0.0, 0, 0, 0, 0, x.dtype)
    statistics = running_mean.copy(), running_var.copy()  # the kernel writes these arguments when it trains
    mean, inv_std = running_mean.copy(), np.empty_like(running_var)
    width = _width(x, threads)
    settings = False, 0.0, eps, fused, drop, stream, width
    forward(x, gamma, beta, *statistics, slope, y, mean, inv_std, *settings, threads=threads)


def batchnorm_backward(
    dy, x, gamma, beta, mean, inv_std, slope, y, dx, dgamma, dbeta, dslope, *, activation="identity", alpha=0.0,
    rate=0.0, seed=0, layer=0, training=1, step=0, first_row=0, threads=1,
):  # fmt: skip
    """Gradients of x (N, C), gamma, beta and PReLU's slopes (C,); dx may be dy. Masks are drawn again: y is unused."""
    fused, slope = _fused(activation, alpha, slope, gamma)
    drop, stream = _dropout(rate, seed, layer, step, first_row, x.dtype)
    if dslope is None:
        dslope = np.empty_like(gamma)
    fresh = fused[0] != IDENTITY or rate > 0
    dz = dx if fresh else dy
    width, gradients = _width(x, threads), (dx, dgamma, dbeta, dslope)
    constants = bool(training), fresh, fused, drop, stream, width
    backward(dy, x, gamma, beta, mean, inv_std, slope, dz, *gradients, *constants, threads=threads)


register(Impl("batchnorm_forward", "numba", batchnorm_forward))
register(Impl("batchnorm_inference", "numba", batchnorm_inference))
register(Impl("batchnorm_backward", "numba", batchnorm_backward))
register(Impl("batchnorm_fold", "numba", batchnorm_fold))  # one product of NumPy's, as fast as memory
