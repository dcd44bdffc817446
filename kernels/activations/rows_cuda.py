"""The activations that look beyond one element on CUDA: slopes per column, softmax over rows; others: numba_cuda.py.

    y = f(x, slope)                   dx = dy f'(x, slope), dslope = sum over rows       x, y, dy, dx (N, C); slope (C,)
    y = e^(x - max) / sum             dx = y (dy - sum of dy y)                          over the columns of a row

**Slopes.** A thread stays with eight columns and keeps their slopes. Backward adds up dslope in the sweep that writes
dx (2 reads, 1 write): threads of a block in a tree, blocks that share a strip of columns by the last one to finish, in
their order, so that sums have the same bits in every run.

**Softmax.** A row belongs to as many threads as it has eights of columns, at most a block of them: up to a warp's worth
speak by shuffles, beyond by shared memory. Rows of up to 2048 columns stay in registers, 1 read (backward 2) and 1
write; longer ones are read twice, the second time from L2 as a rule. Forward needs one sweep before the last one: each
thread's sum is relative to its own maximum and corrected when that rises (Milakov and Gimelshein 2018). inf or NaN
makes its row NaN; -inf is 0 beside finite numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fastdl.kernels.activations.points import POINTS
from fastdl.kernels.common import numba_cuda as gpu
from fastdl.kernels.common.gpu import LEAST_ROWS, ROOM, Kernel, Launch, Planner, View, float_type, kernel, spans, strips
from fastdl.kernels.common.numba_math import exp
from fastdl.kernels.registry import Impl, register

if not gpu.MISSING:
    from numba import cuda

ZERO = gpu.f4(0)
NONE = (ZERO,) * 8
LINE = 128  # bytes: the width of a strip of sums
SWEEP = 32  # threads side by side where nothing is summed: a warp's worth of a row
LEAST = gpu.f4(np.finfo(np.float32).min)  # where maxima begin: -inf would give -inf - -inf
NOTHING = gpu.f4(-np.inf)  # beyond a row's end: no part of maximum or sum


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
        total = gpu.sum_down(room, s)
        k = gpu.i8(8) * cuda.blockDim.x * cuda.blockIdx.x + gpu.place()  # from here on a thread's column
        here = gpu.place() < 8 * cuda.blockDim.x
        if cuda.gridDim.y > 1:
            if here:
                partial[cuda.blockIdx.y * columns + k] = total
            if not gpu.arrives_last(counters, cuda.blockIdx.x, cuda.gridDim.y):
                return
            total = gpu.sum_blocks(room, partial, 0, c, columns)
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
exp8 = gpu.each(lambda x, top: exp(x - top), 2)
scale8 = gpu.each(lambda x, w: x * w, 2)
product8 = gpu.each(lambda x, y: x * y, 2)
gradient8 = gpu.each(lambda dy, y, dot: y * (dy - dot), 3)


@gpu.point
def larger(a, b):
    """A NaN in b loses: it makes the sum NaN."""
    return b if b > a else a


@gpu.point
def max8(top, t):
    low = larger(larger(larger(top, t[0]), t[1]), larger(larger(top, t[2]), t[3]))
    return larger(low, larger(larger(larger(top, t[4]), t[5]), larger(larger(top, t[6]), t[7])))


@gpu.point
def sum8(t):
    return ((t[0] + t[1]) + (t[2] + t[3])) + ((t[4] + t[5]) + (t[6] + t[7]))


@gpu.point
def row_max(room, v):
    """The maximum over a row's threads, in each of them; as `row_sum`."""
    half = min(32, cuda.blockDim.x) >> 1
    while half > 0:
        v = larger(v, cuda.shfl_xor_sync(0xFFFFFFFF, v, half))
        half >>= 1
    if cuda.blockDim.x > 32:
        room[gpu.place() >> 5] = v
        gpu.sync()
        first = (gpu.place() - cuda.threadIdx.x) >> 5
        for k in range(cuda.blockDim.x >> 5):
            v = larger(v, room[first + k])
        gpu.sync()
    return v


@gpu.point
def row_sum(room, v):
    """The sum over a row's threads, in each of them: a warp's by halves, then the row's warps in order.

    ``room`` has a float of shared memory for each warp, and no thread of the block may be missing.
    """
    half = min(32, cuda.blockDim.x) >> 1
    while half > 0:
        v += cuda.shfl_xor_sync(0xFFFFFFFF, v, half)
        half >>= 1
    if cuda.blockDim.x > 32:
        room[gpu.place() >> 5] = v  # its lanes have the same bits
        gpu.sync()
        first = (gpu.place() - cuda.threadIdx.x) >> 5
        v = room[first]
        for k in range(1, cuda.blockDim.x >> 5):
            v += room[first + k]
        gpu.sync()
    return v


@kernel("T* x, i8 x_row, T* y, i8 y_row, u4* run, i4 cols, i4 wide", registers=72)
def softmax_forward(x, x_row, y, y_row, run, cols, wide):
    room = cuda.shared.array(8, gpu.f4)
    rows, step, c = gpu.rows_of(run), gpu.i4(8 * cuda.blockDim.x), gpu.i4(8 * cuda.threadIdx.x)
    base = gpu.i4(cuda.blockIdx.y * cuda.blockDim.y)
    while base < rows:  # all threads of a block alike: behind the last row they have no columns
        r = gpu.i8(base) + cuda.threadIdx.y
        end = cols if r < rows else gpu.i4(0)
        i, j = r * x_row, r * y_row
        t = gpu.take8(x, i + c, end - c, wide != 0 and c + 8 <= end, NOTHING)
        top = max8(LEAST, t)
        e, own = exp8(t, top), top
        total = sum8(e)
        k = gpu.i4(c + step)
        while k < end:
            t = gpu.take8(x, i + k, end - k, wide != 0 and k + 8 <= end, NOTHING)
            higher = max8(top, t)
            total = total * exp(top - higher) + sum8(exp8(t, higher))
            top = higher
            k = gpu.i4(k + step)
        highest = row_max(room, top)
        scale = gpu.f4(1) / row_sum(room, total * exp(top - highest))
        gpu.give8(y, j + c, scale8(e, exp(own - highest) * scale), end - c, wide != 0 and c + 8 <= end)
        k = gpu.i4(c + step)
        while k < end:
            t = gpu.take8(x, i + k, end - k, wide != 0 and k + 8 <= end, NOTHING)
            gpu.give8(y, j + k, scale8(exp8(t, highest), scale), end - k, wide != 0 and k + 8 <= end)
            k = gpu.i4(k + step)
        base = gpu.i4(base + gpu.row_step())


@kernel("T* dy, i8 dy_row, T* y, i8 y_row, T* dx, i8 dx_row, u4* run, i4 cols, i4 wide", registers=80)
def softmax_backward(dy, dy_row, y, y_row, dx, dx_row, run, cols, wide):
    room = cuda.shared.array(8, gpu.f4)
    rows, step, c = gpu.rows_of(run), gpu.i4(8 * cuda.blockDim.x), gpu.i4(8 * cuda.threadIdx.x)
    base = gpu.i4(cuda.blockIdx.y * cuda.blockDim.y)
    while base < rows:
        r = gpu.i8(base) + cuda.threadIdx.y
        end = cols if r < rows else gpu.i4(0)
        i, j, o = r * dy_row, r * y_row, r * dx_row
        whole = wide != 0 and c + 8 <= end
        g, v = gpu.take8(dy, i + c, end - c, whole, ZERO), gpu.take8(y, j + c, end - c, whole, ZERO)
        dot = sum8(product8(g, v))
        k = gpu.i4(c + step)
        while k < end:
            whole = wide != 0 and k + 8 <= end
            g_k, v_k = gpu.take8(dy, i + k, end - k, whole, ZERO), gpu.take8(y, j + k, end - k, whole, ZERO)
            dot += sum8(product8(g_k, v_k))
            k = gpu.i4(k + step)
        dot = row_sum(room, dot)
        gpu.give8(dx, o + c, gradient8(g, v, dot), end - c, wide != 0 and c + 8 <= end)
        k = gpu.i4(c + step)
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
