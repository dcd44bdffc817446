"""What follows a product on CUDA, in one sweep: for products of a library, whose epilogues know neither dropout nor
most activations. Our own products do the same in their registers (numba_cuda.py).

    forward     y = dropout(act(x + b))                      x (N, O) the product, b (O,) or none, y (N, O)
    backward    dx = act'(s) undropped(dy)                   dy (N, I) the product, s (N, I) as reference.py's ``saves``

A thread stays with eight columns, whose bias is in its registers, and draws one Philox counter a row. 1 read and 1
write, backward 2 and 1, in accesses of 16 bytes. y may be x, and dx may be dy.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from fastdl.kernels.common import numba_cuda as gpu
from fastdl.kernels.common.gpu import Kernel, Launch, Planner, View, float_type, kernel, strips
from fastdl.kernels.dense.numba_cuda import ACTIVATIONS, DOUBLES, DROPOUT
from fastdl.kernels.dropout.numba_cuda import draw8, drop8, stream

ZERO = gpu.f4(0)
SWEEP = 32  # threads side by side: a warp's worth of a row


@functools.cache
def forward_kernel(activation: str, dropout: bool) -> Kernel:
    activate = gpu.each(ACTIVATIONS[activation][0], 2)

    @kernel(
        f"T* x, i8 x_row, f4* b, i4 with_b, T* y, i8 y_row, u4* run, i8 cols, f4 alpha, {DROPOUT}, i4 wide",
        f"bias_{activation}{'_dropout' if dropout else ''}",
        DOUBLES.get(activation, ""),
    )
    def forward(x, x_row, b, with_b, y, y_row, run, cols, alpha, last, scale, layer, k0, k1, wide):
        c = gpu.i8(8) * gpu.column()
        if c >= cols:
            return
        n, whole = cols - c, wide != 0 and c + 8 <= cols
        bias = gpu.load_some(b, c, n if with_b != 0 else gpu.i8(0), ZERO)
        r, rows = gpu.i8(gpu.row()), gpu.rows_of(run)
        while r < rows:
            t = activate(gpu.add8(gpu.take8(x, r * x_row + c, n, whole, ZERO), bias), alpha)
            if dropout:
                t = drop8(t, draw8(gpu.column(), r, run, layer, k0, k1), last, scale)
            gpu.give8(y, r * y_row + c, t, n, whole)
            r += gpu.row_step()

    return forward


@functools.cache
def backward_kernel(activation: str) -> Kernel:
    undo = gpu.each(ACTIVATIONS[activation][1], 3)

    @kernel(
        f"T* dy, i8 dy_row, T* s, i8 s_row, T* dx, i8 dx_row, u4* run, i8 cols, f4 alpha, {DROPOUT}, i4 wide",
        f"{activation}_dropout_backward",
        DOUBLES.get(activation, ""),
    )
    def backward(dy, dy_row, s, s_row, dx, dx_row, run, cols, alpha, last, scale, layer, k0, k1, wide):
        c = gpu.i8(8) * gpu.column()
        if c >= cols:
            return
        n, whole = cols - c, wide != 0 and c + 8 <= cols
        r, rows = gpu.i8(gpu.row()), gpu.rows_of(run)
        while r < rows:
            saved = gpu.take8(s, r * s_row + c, n, whole, ZERO)
            t = gpu.take8(dy, r * dy_row + c, n, whole, ZERO)
            t = undo(drop8(t, draw8(gpu.column(), r, run, layer, k0, k1), last, scale), saved, alpha)
            gpu.give8(dx, r * dx_row + c, t, n, whole)
            r += gpu.row_step()

    return backward


def _launch(
    launched: Kernel, views: list[View], between: tuple[Any, ...], alpha: float, dropout: Mapping[str, Any], run: View
) -> Launch:
    x, y = views[0], views[-1]
    kept, words = stream(dropout)
    matrices = [part for view in views[:-1] for part in (view, view.row_stride)]
    wide = int(all(view.by_eights for view in views))
    arguments = (*matrices, *between, y, y.row_stride, run, y.cols, float(alpha), *kept, *words, wide)
    return Launch(launched, *strips(*y.shape, SWEEP), arguments, float_type(x))


def forward_launch(
    x: View, b: View | None, y: View, activation: str, alpha: float, dropout: Mapping[str, Any] | None, planner: Planner
) -> Launch:
    """y = dropout(act(x + b)); ``dropout`` are the params of dropout_forward, or None."""
    launched = forward_kernel(activation, dropout is not None)
    return _launch(launched, [x, y], (b, int(b is not None)), alpha, dropout or {}, planner.run)


def backward_launch(
    dy: View, saved: View, dx: View, activation: str, alpha: float, dropout: Mapping[str, Any], planner: Planner
) -> Launch:
    """dx = act'(saved) undropped(dy)."""
    return _launch(backward_kernel(activation), [dy, saved, dx], (), alpha, dropout, planner.run)
