"""The activations that look beyond one element on CUDA: slopes per column, softmax over rows; others: numba_cuda.py.

    y = f(x, slope)                   dx = dy f'(x, slope), dslope = sum over rows       x, y, dy, dx (N, C); slope (C,)
    y = e^(x - max) / sum             dx = y (dy - sum of dy y)                          over the columns of a row

**Slopes.** A thread stays with eight columns and keeps their slopes. Backward adds up dslope in the sweep that writes
dx (2 reads, 1 write): threads of a block in a tree, blocks that share a strip of columns by the last one to finish, in
their order, so that sums have the same bits in every run.

**Softmax.** 1 read (backward 2) and 1 write for rows of up to 4096 columns; how a block's threads share a row:
common/rows_cuda.py. inf or NaN makes its row NaN; -inf is 0 beside finite numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fastdl.kernels.activations.points import POINTS
from fastdl.kernels.common import numba_cuda as gpu
from fastdl.kernels.common import rows_cuda as team
from fastdl.kernels.common.gpu import LEAST_ROWS, ROOM, Kernel, Launch, Planner, View, float_type, kernel, spans, strips
from fastdl.kernels.common.numba_math import exp
from fastdl.kernels.common.sums_cuda import arrives_last, sum_blocks, sum_down
from fastdl.kernels.registry import Impl, register

if not gpu.MISSING:
    from numba import cuda

ZERO = gpu.f4(0)
NONE = (ZERO,) * 8
LINE = 128  # bytes: the width of a strip of sums
MEETING = team.ROOM  # of shared memory: Numba wants a name of this file
SWEEP = 32  # threads side by side where nothing is summed: a warp's worth of a row


# ---------------------------------------------------------------------------------------------- slopes per column
def forward_kernel(name: str, f: Callable[..., Any]) -> Kernel:
    eight = gpu.each(f, 2)

    @kernel("T* x, i8 x_row, f4* slope, T* y, i8 y_row, u4* run, i8 cols, i4 wide", f"{name}_forward")
    def forward(x, x_row, slope, y, y_row, run, cols, wide):
        c = gpu.i8(8) * gpu.column()
        if c >= cols:
            return
        n, whole = cols - c, wide != 0 and c + 8 <= cols
        a = gpu.take8(slope, c, n, whole, ZERO)
        r, rows = gpu.i8(gpu.row()), gpu.rows_of(run)
        while r < rows:
            t = gpu.take8(x, r * x_row + c, n, whole, ZERO)
            gpu.give8(y, r * y_row + c, eight(t, a), n, whole)
            r += gpu.row_step()

    return forward


def backward_kernel(name: str, f: Callable[..., Any], slope_part: Callable[..., Any]) -> Kernel:
    eight, part = gpu.each(f, 3), gpu.point(slope_part)
    parts8 = gpu.each(lambda s, dy, x: s + part(dy, x), 3)

    @kernel(
        "T* dy, i8 dy_row, T* x, i8 x_row, f4* slope, T* dx, i8 dx_row, f4* dslope, f4* partial, u4* counters, "
        "i8 columns, u4* run, i8 cols, i4 wide",
        f"{name}_backward",
        registers=80,
    )
    def backward(
        dy, dy_row, x, x_row, slope, dx, dx_row, dslope, partial, counters, columns, run, cols, wide
    ):  # fmt: skip
        c = gpu.i8(8) * gpu.column()
        n, whole, s = cols - c, wide != 0 and c + 8 <= cols, NONE
        a = gpu.take8(slope, c, n, whole, ZERO)
        r, rows, room = gpu.i8(gpu.row()), gpu.rows_of(run), cuda.shared.array(ROOM, gpu.f4)
        while r < rows:
            if whole:
                g, v = gpu.load8(dy, r * dy_row + c), gpu.load8(x, r * x_row + c)
            else:
                g, v = gpu.load_some(dy, r * dy_row + c, n, ZERO), gpu.load_some(x, r * x_row + c, n, ZERO)
            s = parts8(s, g, v)
            gpu.give8(dx, r * dx_row + c, eight(g, v, a), n, whole)
            r += gpu.row_step()
        total = sum_down(room, s)
        k = gpu.i8(8) * cuda.blockDim.x * cuda.blockIdx.x + gpu.place()  # from here on a thread's column
        here = gpu.place() < 8 * cuda.blockDim.x
        if cuda.gridDim.y > 1:
            if here:
                partial[cuda.blockIdx.y * columns + k] = total
            if not arrives_last(counters, cuda.blockIdx.x, cuda.gridDim.y):
                return
            total = sum_blocks(room, partial, 0, c, columns)
        if here and k < cols:
            gpu.store(dslope, k, total)

    return backward


def _aligned(matrices: Sequence[View], slope: View) -> int:
    return int(all(m.by_eights for m in matrices) and slope.address % 16 == 0)


def _slope_forward(launched: Kernel) -> Callable[..., list[Launch]]:
    def launches(arrays: Sequence[View | None], params: Mapping[str, Any], planner: Planner) -> list[Launch]:
        x, slope, y = arrays
        arguments = (x, x.row_stride, slope, y, y.row_stride, planner.run, x.cols, _aligned((x, y), slope))
        return [Launch(launched, *strips(*x.shape, SWEEP), arguments, float_type(x))]

    return launches


def _slope_backward(launched: Kernel) -> Callable[..., list[Launch]]:
    def launches(arrays: Sequence[View | None], params: Mapping[str, Any], planner: Planner) -> list[Launch]:
        dy, x, slope, dx, dslope = arrays
        grid, block = strips(x.rows, x.cols, LINE // (8 * x.itemsize), LEAST_ROWS)
        columns = 8 * grid[0] * block[0]
        partial, counters = planner.scratch(grid[1], columns), planner.scratch(grid[0], dtype=np.uint32)
        arguments = (
            dy, dy.row_stride, x, x.row_stride, slope, dx, dx.row_stride, dslope, partial, counters, columns,
            planner.run, x.cols, _aligned((dy, x, dx), slope),
        )  # fmt: skip
        return [Launch(launched, grid, block, arguments, float_type(x))]

    return launches


# ---------------------------------------------------------------------------------------------- softmax
# Registers: 51 and 62 from sm_90 on; the assembler keeps twice as much in flight for sm_80.
gradient8 = gpu.each(lambda dy, y, dot: y * (dy - dot), 3)


@kernel("T* x, i8 x_row, T* y, i8 y_row, u4* run, i4 cols, i4 wide", registers=112)
def softmax_forward(x, x_row, y, y_row, run, cols, wide):
    room = cuda.shared.array(MEETING, gpu.f4)
    last, step, c = gpu.rows_of(run), gpu.i4(8 * cuda.blockDim.x), gpu.i4(8 * cuda.threadIdx.x)
    base = gpu.i4(cuda.blockIdx.y * cuda.blockDim.y)
    while base < last:  # all threads of a block alike: behind the last row they have no columns
        r = gpu.i8(base) + cuda.threadIdx.y
        end = cols if r < last else gpu.i4(0)
        i, j = r * x_row, r * y_row
        t, u = team.start(x, i, c, end, wide, team.NOTHING)
        top = team.max8(team.max8(team.LEAST, t), u)
        e, f, own = team.exp8(t, top), team.exp8(u, top), top
        total = team.sum8(e) + team.sum8(f)
        k = gpu.i4(c + 2 * step)
        while k < end:
            t = gpu.take8(x, i + k, end - k, wide != 0 and k + 8 <= end, team.NOTHING)
            higher = team.max8(top, t)
            total = total * exp(top - higher) + team.sum8(team.exp8(t, higher))
            top = higher
            k = gpu.i4(k + step)
        highest, _, total = team.meet(room, room, top, 0, total)
        scale = gpu.f4(1) / total
        kept = exp(own - highest) * scale
        team.finish(y, j, c, end, wide, team.scale8(e, kept), team.scale8(f, kept))
        k = gpu.i4(c + 2 * step)
        while k < end:
            t = gpu.take8(x, i + k, end - k, wide != 0 and k + 8 <= end, team.NOTHING)
            gpu.give8(y, j + k, team.scale8(team.exp8(t, highest), scale), end - k, wide != 0 and k + 8 <= end)
            k = gpu.i4(k + step)
        base = gpu.i4(base + gpu.row_step())


@kernel("T* dy, i8 dy_row, T* y, i8 y_row, T* dx, i8 dx_row, u4* run, i4 cols, i4 wide", registers=120)
def softmax_backward(dy, dy_row, y, y_row, dx, dx_row, run, cols, wide):
    room = cuda.shared.array(MEETING, gpu.f4)
    last, step, c = gpu.rows_of(run), gpu.i4(8 * cuda.blockDim.x), gpu.i4(8 * cuda.threadIdx.x)
    base = gpu.i4(cuda.blockIdx.y * cuda.blockDim.y)
    while base < last:
        r = gpu.i8(base) + cuda.threadIdx.y
        end = cols if r < last else gpu.i4(0)
        i, j, o = r * dy_row, r * y_row, r * dx_row
        g, h = team.start(dy, i, c, end, wide, ZERO)
        v, w = team.start(y, j, c, end, wide, ZERO)
        dot = team.sum8(team.product8(g, v)) + team.sum8(team.product8(h, w))
        k = gpu.i4(c + 2 * step)
        while k < end:
            whole = wide != 0 and k + 8 <= end
            g_k, v_k = gpu.take8(dy, i + k, end - k, whole, ZERO), gpu.take8(y, j + k, end - k, whole, ZERO)
            dot += team.sum8(team.product8(g_k, v_k))
            k = gpu.i4(k + step)
        dot = team.row_sum(room, dot)
        team.finish(dx, o, c, end, wide, gradient8(g, v, dot), gradient8(h, w, dot))
        k = gpu.i4(c + 2 * step)
        while k < end:
            whole = wide != 0 and k + 8 <= end
            g_k, v_k = gpu.take8(dy, i + k, end - k, whole, ZERO), gpu.take8(y, j + k, end - k, whole, ZERO)
            gpu.give8(dx, o + k, gradient8(g_k, v_k, dot), end - k, whole)
            k = gpu.i4(k + step)
        base = gpu.i4(base + gpu.row_step())


def _over_rows(launched: Kernel) -> Callable[..., list[Launch]]:
    def launches(arrays: Sequence[View | None], params: Mapping[str, Any], planner: Planner) -> list[Launch]:
        (_, down), block = spans(*arrays[0].shape)  # one block across: its threads go on along the row
        matrices = [part for view in arrays for part in (view, view.row_stride)]
        wide = int(all(view.by_eights for view in arrays))
        arguments = (*matrices, planner.run, arrays[0].cols, wide)
        return [Launch(launched, (1, down), block, arguments, float_type(arrays[0]))]

    return launches


for _name, (_forward, _backward, *_slope) in POINTS.items():
    if _slope:
        _launches = _slope_forward(forward_kernel(_name, _forward))
        register(Impl(f"{_name}_forward", "cuda", launches=_launches))
        _launches = _slope_backward(backward_kernel(_name, _backward, *_slope))
        register(Impl(f"{_name}_backward", "cuda", launches=_launches))
register(Impl("softmax_forward", "cuda", launches=_over_rows(softmax_forward)))
register(Impl("softmax_backward", "cuda", launches=_over_rows(softmax_backward)))
