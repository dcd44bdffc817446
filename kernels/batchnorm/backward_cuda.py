"""The gradients of batch normalisation on CUDA: the sums over rows, then dx.

    dz = act'(u) dropout(dy),     dx = (dz - across - (x - mean) along) gain
    along = inv_std dgamma / N,   across = (dbeta - rest inv_std dgamma) / N

dy, x, dx (N, C), the rest (C,). Traffic: 4 reads and 1 write. u comes from the same arithmetic as forward, dropout's
mask is drawn again. y is never read: its sign would tell ReLU's and dropout's mask, but two more reads are 40 % more
traffic, while Philox and u cost instructions that memory leaves time for. Grids and trees: as forward, numba_cuda.py.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastdl.kernels.batchnorm.moments_cuda import (
    NONE,
    PLACES,
    SUMS,
    SWEEP,
    ZERO,
    activation_of,
    activation_points,
    aligned,
    declare,
    dropout_of,
    finish8,
    is_loose,
    loose8,
    multiply8,
    normalise8,
    products8,
    rest8,
    shift8,
    subtract8,
    sum_strips,
)
from fastdl.kernels.common import numba_cuda as gpu
from fastdl.kernels.common.gpu import ROOM, Kernel, Launch, Planner, View, float_type, strips
from fastdl.kernels.common.sums_cuda import arrives_last, sum_blocks, sum_down
from fastdl.kernels.dropout.numba_cuda import draw8, drop8

if not gpu.MISSING:
    from numba import cuda


@gpu.point
def any_loose(loose):
    """Whether any column of the block's strip is: for all threads alike."""
    told = cuda.shared.array(SWEEP, gpu.i4)
    if cuda.threadIdx.y == 0:
        told[cuda.threadIdx.x] = loose[0] | loose[1] | loose[2] | loose[3] | loose[4] | loose[5] | loose[6] | loose[7]
    gpu.sync()
    found = gpu.i4(0)
    for k in range(cuda.blockDim.x):
        found |= told[k]
    return found != 0


@gpu.point
def rests(room, x, x_row, rows, c, cols, whole, mean, loose):
    """What the stored mean has lost: of the thread's eight columns, and of the column that is its own."""
    r, s = gpu.i8(cuda.threadIdx.y), NONE
    while r < rows:
        s = gpu.add8(s, subtract8(gpu.take8(x, r * x_row + c, cols - c, whole, ZERO), mean))
        r += cuda.blockDim.y
    rest = sum_down(room, s) / gpu.f4(rows)
    room[gpu.place()] = rest
    gpu.sync()
    eight = rest8(PLACES, room, 8 * cuda.threadIdx.x, loose)
    gpu.sync()
    return eight, rest


@functools.cache
def sums_kernel(activation: str) -> Kernel:
    """dgamma, dbeta, dslope, and the five rows of ``constants``: mean, gain, shift, along, across.

    u needs the rest of a loose column before the first element can be added. A strip with such a column is left to one
    block, which goes through its rows once more.
    """
    _, gradient, slope_part = activation_points(activation)
    gradient8, sloped = gpu.each(gradient, 4), slope_part is not None
    part = gpu.point(slope_part or (lambda dy, u: dy))
    parts8 = gpu.each(lambda s, dy, u: s + part(dy, u), 3)

    @gpu.point
    def add(dy, x, s0, s1, s2, mean, gain, shift, slope, a):
        """The sums of dz, of dz (x - mean) and for dslope with one more row."""
        u = normalise8(x, mean, gain, shift)
        if sloped:
            s2 = parts8(s2, dy, u)
        dz = gradient8(dy, u, slope, a)
        return gpu.add8(s0, dz), products8(s1, dz, x, mean), s2

    @declare(
        f"sums_{activation}",
        "T* dy, i8 dy_row, T* x, i8 x_row, f4* gamma, f4* beta, f4* mean, f4* inv_std, f4* slope, f4* dgamma, "
        "f4* dbeta, f4* dslope, f4* partial, u4* counters, f4* constants, i8 columns, u4* run, i8 cols, f4 a, "
        "i4 training, i4 drop, u4 last, f4 scale, u4 layer, u4 k0, u4 k1, i4 wanted, i4 wide",
        registers=SUMS,
        activation=activation,
    )
    def sums(
        dy, dy_row, x, x_row, gamma, beta, mean, inv_std, slope, dgamma, dbeta, dslope, partial, counters, constants,
        columns, run, cols, a, training, drop, last, scale, layer, k0, k1, wanted, wide,
    ):  # fmt: skip
        rows, room = gpu.rows_of(run), cuda.shared.array(ROOM, gpu.f4)
        c = gpu.i8(8) * gpu.column()
        n, whole, w, rest, lost = cols - c, wide != 0 and c + 8 <= cols, NONE, NONE, ZERO
        centre, inv = gpu.take8(mean, c, n, whole, ZERO), gpu.take8(inv_std, c, n, whole, ZERO)
        r, step, blocks = gpu.i8(gpu.row()), gpu.i8(gpu.row_step()), gpu.i8(cuda.gridDim.y)
        loose = loose8(centre, inv)
        if training != 0 and any_loose(loose):
            if cuda.blockIdx.y > 0:
                return
            step, blocks = gpu.i8(cuda.blockDim.y), gpu.i8(1)
            rest, lost = rests(room, x, x_row, rows, c, cols, whole, centre, loose)
        gain = multiply8(gpu.take8(gamma, c, n, whole, ZERO), inv)
        shift = shift8(gpu.take8(beta, c, n, whole, ZERO), rest, gain)
        if sloped:
            w = gpu.take8(slope, c, n, whole, ZERO)
        s0, s1, s2 = NONE, NONE, NONE
        while whole and r + step < rows:  # two rows in flight
            i, j = r * dy_row + c, r * x_row + c
            g, v = gpu.load8(dy, i), gpu.load8(x, j)
            g2, v2 = gpu.load8(dy, i + step * dy_row), gpu.load8(x, j + step * x_row)
            if drop != 0:
                g = drop8(g, draw8(gpu.column(), r, run, layer, k0, k1), last, scale)
                g2 = drop8(g2, draw8(gpu.column(), r + step, run, layer, k0, k1), last, scale)
            s0, s1, s2 = add(g, v, s0, s1, s2, centre, gain, shift, w, a)
            s0, s1, s2 = add(g2, v2, s0, s1, s2, centre, gain, shift, w, a)
            r += 2 * step
        while r < rows:
            g = gpu.take8(dy, r * dy_row + c, n, whole, ZERO)
            v = gpu.take8(x, r * x_row + c, n, whole, ZERO)
            if drop != 0:
                g = drop8(g, draw8(gpu.column(), r, run, layer, k0, k1), last, scale)
            s0, s1, s2 = add(g, v, s0, s1, s2, centre, gain, shift, w, a)
            r += step
        t0, t1, t2 = sum_down(room, s0), sum_down(room, s1), ZERO
        if sloped:
            t2 = sum_down(room, s2)
        k = gpu.i8(8) * cuda.blockDim.x * cuda.blockIdx.x + gpu.place()  # from here on a thread's column
        here = gpu.place() < 8 * cuda.blockDim.x
        if blocks > 1:
            if here:
                i, apart = cuda.blockIdx.y * columns + k, blocks * columns
                partial[i], partial[i + apart], partial[i + 2 * apart] = t0, t1, t2
            if not arrives_last(counters, cuda.blockIdx.x, cuda.gridDim.y):
                return
            t0, t1 = sum_blocks(room, partial, 0, c, columns), sum_blocks(room, partial, blocks, c, columns)
            if sloped:
                t2 = sum_blocks(room, partial, 2 * blocks, c, columns)
        if here and k < cols and rows > 0:
            mu, inv_k, m = gpu.load(mean, k), gpu.load(inv_std, k), gpu.f4(rows)
            lost = lost if is_loose(mu, inv_k) else ZERO
            total = (t1 - lost * t0 if lost != ZERO else t1) * inv_k  # an infinite dbeta leaves dgamma alone
            gain_k = gpu.load(gamma, k) * inv_k
            constants[k], constants[columns + k] = mu, gain_k
            constants[2 * columns + k] = gpu.load(beta, k) - lost * gain_k
            constants[3 * columns + k] = total * inv_k / m
            constants[4 * columns + k] = (t0 - total * inv_k * lost if lost != ZERO else t0) / m
            gpu.store(dbeta, k, t0)
            gpu.store(dgamma, k, total)
            if wanted != 0:
                gpu.store(dslope, k, t2)

    return sums


@functools.cache
def dx_kernel(activation: str) -> Kernel:
    _, gradient, slope_part = activation_points(activation)
    gradient8, sloped = gpu.each(gradient, 4), slope_part is not None

    @declare(
        f"dx_{activation}",
        "T* dy, i8 dy_row, T* x, i8 x_row, f4* constants, i8 columns, f4* slope, T* dx, i8 dx_row, u4* run, i8 cols, "
        "f4 a, i4 training, i4 drop, u4 last, f4 scale, u4 layer, u4 k0, u4 k1, i4 wide",
        registers=96,
        activation=activation,
    )
    def sweep(
        dy, dy_row, x, x_row, constants, columns, slope, dx, dx_row, run, cols, a, training, drop, last, scale, layer,
        k0, k1, wide,
    ):  # fmt: skip
        c = gpu.i8(8) * gpu.column()
        if c >= cols:
            return
        n, whole, w = cols - c, wide != 0 and c + 8 <= cols, NONE
        mean, gain, shift = (
            gpu.load8(constants, c), gpu.load8(constants, columns + c), gpu.load8(constants, 2 * columns + c),
        )  # fmt: skip
        along, across = gpu.load8(constants, 3 * columns + c), gpu.load8(constants, 4 * columns + c)
        if sloped:
            w = gpu.take8(slope, c, n, whole, ZERO)
        r = gpu.i8(gpu.rows_of(run)) - 1 - gpu.row()
        while r >= 0:
            if whole:
                g, v = gpu.load8(dy, r * dy_row + c), gpu.load8(x, r * x_row + c)
            else:
                g, v = gpu.load_some(dy, r * dy_row + c, n, ZERO), gpu.load_some(x, r * x_row + c, n, ZERO)
            if drop != 0:
                g = drop8(g, draw8(gpu.column(), r, run, layer, k0, k1), last, scale)
            g = gradient8(g, normalise8(v, mean, gain, shift), w, a)
            d = subtract8(v, mean)
            g = finish8(g, d, along, across, gain) if training != 0 else multiply8(g, gain)
            gpu.give8(dx, r * dx_row + c, g, n, whole)
            r -= gpu.row_step()

    return sweep


def batchnorm_backward(arrays: Sequence[View | None], params: Mapping[str, Any], planner: Planner) -> list[Launch]:
    dy, x, gamma, beta, mean, inv_std, slope, _, dx, dgamma, dbeta, dslope = arrays
    activation = activation_of(params)
    grid, block, columns = sum_strips(x)
    constants = planner.scratch(5, columns)
    partial, counters = planner.scratch(3 * grid[1], columns), planner.scratch(grid[0], dtype=np.uint32)
    matrices = (dy, dy.row_stride, x, x.row_stride)
    common = (planner.run, x.cols, params["alpha"], params["training"], *dropout_of(params))
    sums = (
        *matrices, gamma, beta, mean, inv_std, slope, dgamma, dbeta, dslope, partial, counters, constants, columns,
        *common, int(dslope is not None), aligned((dy, x), (gamma, beta, mean, inv_std, slope)),
    )  # fmt: skip
    sweep = (*matrices, constants, columns, slope, dx, dx.row_stride, *common, aligned((dy, x, dx), (slope,)))
    return [
        Launch(sums_kernel(activation), grid, block, sums, float_type(x)),
        Launch(dx_kernel(activation), *strips(*x.shape, SWEEP), sweep, float_type(x)),
    ]
