"""Loops over the point functions of points.py, and softmax over rows, with Numba.

Which activation a loop computes is told by the *type* of its last argument, a tuple of as many zeros as the activation's
position in ``POINTS`` (``kind``): each activation is compiled into a loop of its own, vectorised by LLVM, and still found in
the disk cache (loops made by a factory over functions never are). Nothing here knows an activation by name, save that those
with a slope per column have loops of their own.

Element-wise loops walk arrays as rows of a flat span, so that a row stride costs nothing; in-place calls have their own
loops, because LLVM vectorises a loop over two arrays only after a check that they do not overlap. Every element and every
column sum is computed in one order at any number of threads.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba.extending import overload

from fastdl.kernels.activations.points import POINTS
from fastdl.kernels.activations.reference import ACTIVATIONS
from fastdl.kernels.common.numba_cpu import FASTMATH, parallel_kernel, point, serial_kernel, set_threads
from fastdl.kernels.common.numba_math import cast, exp
from fastdl.kernels.registry import Impl, register

KINDS = {name: (0,) * (k + 1) for k, name in enumerate(POINTS)}
_FORWARD = [point(pair[0]) for pair in POINTS.values()]
_BACKWARD = [point(pair[1]) for pair in POINTS.values()]
_SLOPE = [point(pair[2]) if len(pair) == 3 else None for pair in POINTS.values()]
_OPTIONS = {"fastmath": FASTMATH, "error_model": "numpy", "forceinline": True}
LANES = 32  # partial results of a row's reduction: enough for two AVX-512 registers


def _value(kind, x, a):
    """y = f(x) of the activation that the type of ``kind`` tells; compiled code only."""


def _gradient(kind, dy, s, a):
    """dx = dy f'; compiled code only."""


def _slope_part(kind, dy, x):
    """One element's part of dslope; compiled code only."""


@overload(_value, jit_options=_OPTIONS)
def _choose_value(kind, x, a):
    chosen = _FORWARD[kind.count - 1]
    return lambda kind, x, a: chosen(x, a)


@overload(_gradient, jit_options=_OPTIONS)
def _choose_gradient(kind, dy, s, a):
    chosen = _BACKWARD[kind.count - 1]
    return lambda kind, dy, s, a: chosen(dy, s, a)


@overload(_slope_part, jit_options=_OPTIONS)
def _choose_slope_part(kind, dy, x):
    chosen = _SLOPE[kind.count - 1]
    return lambda kind, dy, x: chosen(dy, x)


# ------------------------------------------------------------------------------------------------ element-wise loops
@serial_kernel
def _forward(x, y, rows, cols, x_stride, y_stride, a, kind):
    for r in range(rows):
        u, v = x[r * x_stride : r * x_stride + cols], y[r * y_stride : r * y_stride + cols]
        for c in range(cols):  # an index that may be negative would keep the loop scalar: hence the slices
            v[c] = _value(kind, u[c], a)


@serial_kernel
def _forward_in_place(y, rows, cols, stride, a, kind):
    for r in range(rows):
        v = y[r * stride : r * stride + cols]
        for c in range(cols):
            v[c] = _value(kind, v[c], a)


@parallel_kernel
def _forward_threads(x, y, n, a, kind, same, chunks):
    for t in numba.prange(chunks):
        first, last = n * t // chunks, n * (t + 1) // chunks
        if same:
            _forward_in_place(y[first:last], 1, last - first, n, a, kind)
        else:
            _forward(x[first:last], y[first:last], 1, last - first, n, n, a, kind)


@serial_kernel
def _backward(dy, s, dx, rows, cols, dy_stride, s_stride, dx_stride, a, kind):
    for r in range(rows):
        u, v = dy[r * dy_stride : r * dy_stride + cols], s[r * s_stride : r * s_stride + cols]
        w = dx[r * dx_stride : r * dx_stride + cols]
        for c in range(cols):
            w[c] = _gradient(kind, u[c], v[c], a)


@serial_kernel
def _backward_in_place(dx, s, rows, cols, dx_stride, s_stride, a, kind):
    for r in range(rows):
        v, w = s[r * s_stride : r * s_stride + cols], dx[r * dx_stride : r * dx_stride + cols]
        for c in range(cols):
            w[c] = _gradient(kind, w[c], v[c], a)


@parallel_kernel
def _backward_threads(dy, s, dx, n, a, kind, same, chunks):
    for t in numba.prange(chunks):
        first, last = n * t // chunks, n * (t + 1) // chunks
        if same:
            _backward_in_place(dx[first:last], s[first:last], 1, last - first, n, n, a, kind)
        else:
            _backward(dy[first:last], s[first:last], dx[first:last], 1, last - first, n, n, n, a, kind)


# ------------------------------------------------------------------------------------------------ slope per column
@serial_kernel
def _forward_slope(x, slope, y, kind):
    for r in range(x.shape[0]):
        for c in range(x.shape[1]):
            y[r, c] = _value(kind, x[r, c], slope[c])


@serial_kernel
def _backward_slope(dy, x, slope, dx, dslope, kind):
    for c in range(dslope.shape[0]):
        dslope[c] = 0
    for r in range(x.shape[0]):
        for c in range(x.shape[1]):
            dslope[c] += _slope_part(kind, dy[r, c], x[r, c])
            dx[r, c] = _gradient(kind, dy[r, c], x[r, c], slope[c])


# ------------------------------------------------------------------------------------------------ softmax
@serial_kernel
def _softmax_forward(x, y):
    cols = x.shape[1]
    whole = cols - cols % LANES
    part = np.empty(LANES, x.dtype)
    for r in range(x.shape[0]):
        top = x[r, 0]
        part[:] = top
        for c in range(0, whole, LANES):
            for k in range(LANES):
                part[k] = x[r, c + k] if x[r, c + k] > part[k] else part[k]
        for k in range(LANES):
            top = part[k] if part[k] > top else top
        for c in range(whole, cols):
            top = x[r, c] if x[r, c] > top else top
        for c in range(cols):
            y[r, c] = exp(x[r, c] - top)
        part[:] = 0
        for c in range(0, whole, LANES):
            for k in range(LANES):
                part[k] += y[r, c + k]
        total = cast(0, top)
        for k in range(LANES):
            total += part[k]
        for c in range(whole, cols):
            total += y[r, c]
        scale = cast(1, top) / total
        for c in range(cols):
            y[r, c] *= scale


@serial_kernel
def _softmax_backward(dy, y, dx):
    cols = y.shape[1]
    whole = cols - cols % LANES
    part = np.empty(LANES, y.dtype)
    for r in range(y.shape[0]):
        part[:] = 0
        for c in range(0, whole, LANES):
            for k in range(LANES):
                part[k] += dy[r, c + k] * y[r, c + k]
        dot = cast(0, y[r, 0])
        for k in range(LANES):
            dot += part[k]
        for c in range(whole, cols):
            dot += dy[r, c] * y[r, c]
        for c in range(cols):
            dx[r, c] = y[r, c] * (dy[r, c] - dot)


@parallel_kernel
def _softmax_forward_threads(x, y, chunks):
    rows = x.shape[0]
    for t in numba.prange(chunks):
        a, b = rows * t // chunks, rows * (t + 1) // chunks
        _softmax_forward(x[a:b], y[a:b])


@parallel_kernel
def _softmax_backward_threads(dy, y, dx, chunks):
    rows = y.shape[0]
    for t in numba.prange(chunks):
        a, b = rows * t // chunks, rows * (t + 1) // chunks
        _softmax_backward(dy[a:b], y[a:b], dx[a:b])


# ------------------------------------------------------------------------------------------------ launchers
def _span(a: np.ndarray) -> tuple[np.ndarray, int]:
    """All elements of a matrix from its first to its last in one dimension, and the row stride."""
    if a.flags.c_contiguous:
        return a.reshape(-1), a.shape[1]
    stride = a.strides[0] // a.itemsize
    return np.lib.stride_tricks.as_strided(a[0], ((a.shape[0] - 1) * stride + a.shape[1],), (a.itemsize,)), stride


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a is b or np.may_share_memory(a, b)


def _make_forward(name: str) -> Any:
    kind, default = KINDS[name], ACTIVATIONS[name].alpha or 0.0

    def forward(x: np.ndarray, y: np.ndarray, alpha: float = default, threads: int = 1) -> None:
        if not x.size:
            return
        a, same = x.dtype.type(alpha), _same(x, y)
        (u, p), (v, q) = _span(x), _span(y)
        rows, cols = x.shape
        if p == q == cols:
            rows, cols = 1, x.size
            if threads > 1:
                set_threads(threads)
                _forward_threads(u, v, cols, a, kind, same, threads)
                return
        if same:
            _forward_in_place(v, rows, cols, q, a, kind)
        else:
            _forward(u, v, rows, cols, p, q, a, kind)

    return forward


def _make_backward(name: str) -> Any:
    kind, default = KINDS[name], ACTIVATIONS[name].alpha or 0.0

    def backward(dy: np.ndarray, s: np.ndarray, dx: np.ndarray, alpha: float = default, threads: int = 1) -> None:
        if not dy.size:
            return
        a, same = dy.dtype.type(alpha), _same(dy, dx)
        (u, p), (v, q), (w, o) = _span(dy), _span(s), _span(dx)
        rows, cols = dy.shape
        if p == q == o == cols:
            rows, cols = 1, dy.size
            if threads > 1:
                set_threads(threads)
                _backward_threads(u, v, w, cols, a, kind, same, threads)
                return
        if same:
            _backward_in_place(w, v, rows, cols, o, q, a, kind)
        else:
            _backward(u, v, w, rows, cols, p, q, o, a, kind)

    return backward


def _make_slope_forward(name: str) -> Any:
    kind = KINDS[name]

    def forward(x: np.ndarray, slope: np.ndarray, y: np.ndarray, threads: int = 1) -> None:
        _forward_slope(x, slope, y, kind)

    return forward


def _make_slope_backward(name: str) -> Any:
    kind = KINDS[name]

    def backward(
        dy: np.ndarray, x: np.ndarray, slope: np.ndarray, dx: np.ndarray, dslope: np.ndarray, threads: int = 1
    ) -> None:
        _backward_slope(dy, x, slope, dx, dslope, kind)

    return backward


def softmax_forward(x: np.ndarray, y: np.ndarray, threads: int = 1) -> None:
    """y = softmax over each row of x."""
    if not x.size:
        return
    if threads > 1:
        set_threads(threads)
        _softmax_forward_threads(x, y, threads)
    else:
        _softmax_forward(x, y)


def softmax_backward(dy: np.ndarray, y: np.ndarray, dx: np.ndarray, threads: int = 1) -> None:
    """dx = y (dy - sum over the row of dy y)."""
    if not y.size:
        return
    if threads > 1:
        set_threads(threads)
        _softmax_backward_threads(dy, y, dx, threads)
    else:
        _softmax_backward(dy, y, dx)


def identity_forward(x: np.ndarray, y: np.ndarray, threads: int = 1) -> None:
    """A copy is memcpy's work."""
    np.copyto(y, x)


def identity_backward(dy: np.ndarray, y: np.ndarray, dx: np.ndarray, threads: int = 1) -> None:
    """A copy is memcpy's work."""
    np.copyto(dx, dy)


for _name in POINTS:
    _sloped = ACTIVATIONS[_name].per_channel
    register(Impl(f"{_name}_forward", "numba", fn=(_make_slope_forward if _sloped else _make_forward)(_name)))
    register(Impl(f"{_name}_backward", "numba", fn=(_make_slope_backward if _sloped else _make_backward)(_name)))
register(Impl("softmax_forward", "numba", fn=softmax_forward))
register(Impl("softmax_backward", "numba", fn=softmax_backward))
register(Impl("identity_forward", "numba", fn=identity_forward))
register(Impl("identity_backward", "numba", fn=identity_backward))
