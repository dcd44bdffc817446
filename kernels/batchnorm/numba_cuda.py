"""Batch normalisation on CUDA: two launches forward, two backward; the rows' sums, then a sweep that uses them.

    u = (x - mean) gain + shift,  gain = gamma inv_std,  shift = beta - rest gain,  y = dropout(act(u))

x, y (N, C), the rest (C,); derivations and ``rest``, what the stored mean has lost by rounding: README.md. Saved are x,
mean and inv_std. Traffic: 2 reads and 1 write.

Sums: a thread adds up eight columns of some rows, a block owns a strip of columns (128 bytes, a line of each row), the
last block of a strip to finish adds up the blocks in their order. All in float32, by trees, in an order that hangs on
the shapes alone; how the statistics stay exact, and why ``rest`` needs no float64: moments_cuda.py. The sweep goes
upwards from the last rows, which the sums have left in L2.

Vectors are float32 beside bfloat16 matrices: statistics that move by a tenth of a difference need more than 8 bits. An
activation's kernels are made when a plan first asks for them. Backward: backward_cuda.py.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastdl.kernels.batchnorm.backward_cuda import batchnorm_backward
from fastdl.kernels.batchnorm.moments_cuda import (
    NONE,
    STATISTICS_ROOM,
    SUMS,
    SWEEP,
    ZERO,
    activation_of,
    activation_points,
    aligned,
    declare,
    dropout_of,
    inverse,
    inverse8,
    is_loose,
    lost,
    merge_blocks,
    merge_down,
    moments,
    multiply8,
    normalise8,
    sum_strips,
)
from fastdl.kernels.common import numba_cuda as gpu
from fastdl.kernels.common.gpu import Kernel, Launch, Planner, View, float_type, strips
from fastdl.kernels.common.sums_cuda import arrives_last
from fastdl.kernels.dropout.numba_cuda import draw8, drop8
from fastdl.kernels.registry import Impl, register

if not gpu.MISSING:
    from numba import cuda


@declare(
    "statistics",
    "T* x, i8 x_row, f4* gamma, f4* beta, f4* running_mean, f4* running_var, f4* mean, f4* inv_std, f4* partial, "
    "u4* counters, f4* affine, i8 columns, u4* run, i8 cols, f4 decay, f4 fresh, f4 eps, i4 wide",
    registers=SUMS,
)
def statistics(
    x, x_row, gamma, beta, running_mean, running_var, mean, inv_std, partial, counters, affine, columns, run, cols,
    decay, fresh, eps, wide,
):  # fmt: skip
    rows = gpu.rows_of(run)
    c = gpu.i8(8) * gpu.column()
    n, a, m, q = moments(x, x_row, rows, c, cols, wide != 0 and c + 8 <= cols)
    room = cuda.shared.array(STATISTICS_ROOM, gpu.f4)
    n, a, m, q = merge_down(room, n, a, m, q)
    k = gpu.i8(8) * cuda.blockDim.x * cuda.blockIdx.x + gpu.place()  # from here on a thread's column
    here = gpu.place() < 8 * cuda.blockDim.x
    if cuda.gridDim.y > 1:
        if here:
            i, apart = cuda.blockIdx.y * columns + k, cuda.gridDim.y * columns
            partial[i], partial[i + apart], partial[i + 2 * apart], partial[i + 3 * apart] = n, a, m, q
        if not arrives_last(counters, cuda.blockIdx.x, cuda.gridDim.y):
            return
        n, a, m, q = merge_blocks(room, partial, c, columns)
    if here and k < cols and rows > 0:
        var = q / n
        var = ZERO if var < ZERO else var
        mu, inv = a + m, inverse(var, eps)
        rest = lost(a, m, mu) if is_loose(mu, inv) else ZERO
        gain = gpu.load(gamma, k) * inv
        affine[k], affine[columns + k], affine[2 * columns + k] = mu, gain, gpu.load(beta, k) - rest * gain
        gpu.store(mean, k, mu)
        gpu.store(inv_std, k, inv)
        if rows > 1:  # one row says nothing about the spread
            unbiased = var * (n / (n - gpu.f4(1)))
            gpu.store(running_mean, k, decay * gpu.load(running_mean, k) + fresh * mu)
            gpu.store(running_var, k, decay * gpu.load(running_var, k) + fresh * unbiased)


@functools.cache
def apply_kernel(activation: str) -> Kernel:
    """y from x and the three rows of ``affine``: mean, gain, shift."""
    value, _, slope_part = activation_points(activation)
    value8, sloped = gpu.each(value, 3), slope_part is not None

    @declare(
        f"apply_{activation}",
        "T* x, i8 x_row, f4* affine, i8 columns, f4* slope, T* y, i8 y_row, u4* run, i8 cols, f4 a, i4 drop, "
        "u4 last, f4 scale, u4 layer, u4 k0, u4 k1, i4 wide",
        activation=activation,
    )
    def apply(
        x, x_row, affine, columns, slope, y, y_row, run, cols, a, drop, last, scale, layer, k0, k1, wide
    ):  # fmt: skip
        c = gpu.i8(8) * gpu.column()
        if c >= cols:
            return
        n, whole, w = cols - c, wide != 0 and c + 8 <= cols, NONE
        mean, gain, shift = (
            gpu.load8(affine, c), gpu.load8(affine, columns + c), gpu.load8(affine, 2 * columns + c),
        )  # fmt: skip
        if sloped:
            w = gpu.take8(slope, c, n, whole, ZERO)
        r = gpu.i8(gpu.rows_of(run)) - 1 - gpu.row()
        while r >= 0:
            t = normalise8(gpu.take8(x, r * x_row + c, n, whole, ZERO), mean, gain, shift)
            t = value8(t, w, a)
            if drop != 0:
                t = drop8(t, draw8(gpu.column(), r, run, layer, k0, k1), last, scale)
            gpu.give8(y, r * y_row + c, t, n, whole)
            r -= gpu.row_step()

    return apply


@functools.cache
def inference_kernel(activation: str) -> Kernel:
    value, _, slope_part = activation_points(activation)
    value8, sloped = gpu.each(value, 3), slope_part is not None

    @declare(
        f"inference_{activation}",
        "T* x, i8 x_row, f4* gamma, f4* beta, f4* mean, f4* var, f4* slope, T* y, i8 y_row, u4* run, i8 cols, f4 eps, "
        "f4 a, i4 wide",
        registers=80,
        activation=activation,
    )
    def inference(x, x_row, gamma, beta, mean, var, slope, y, y_row, run, cols, eps, a, wide):
        c = gpu.i8(8) * gpu.column()
        if c >= cols:
            return
        n, whole, w = cols - c, wide != 0 and c + 8 <= cols, NONE
        centre, shift = gpu.take8(mean, c, n, whole, ZERO), gpu.take8(beta, c, n, whole, ZERO)
        inv_std = inverse8(gpu.take8(var, c, n, whole, ZERO), eps)
        gain = multiply8(gpu.take8(gamma, c, n, whole, ZERO), inv_std)
        if sloped:
            w = gpu.take8(slope, c, n, whole, ZERO)
        r, rows = gpu.i8(gpu.row()), gpu.rows_of(run)
        while r < rows:
            t = normalise8(gpu.take8(x, r * x_row + c, n, whole, ZERO), centre, gain, shift)
            gpu.give8(y, r * y_row + c, value8(t, w, a), n, whole)
            r += gpu.row_step()

    return inference


@declare(
    "fold",
    "f4* w, i8 w_row, f4* b, f4* gamma, f4* beta, f4* mean, f4* var, T* folded, i8 folded_row, f4* b_folded, "
    "i8 rows, i8 cols, f4 eps, i4 biased, i4 wide",
)
def fold(w, w_row, b, gamma, beta, mean, var, folded, folded_row, b_folded, rows, cols, eps, biased, wide):
    """Its rows are those of the weights, an argument; who has the first one writes the bias."""
    c = gpu.i8(8) * gpu.column()
    if c >= cols:
        return
    n, whole, bias = cols - c, wide != 0 and c + 8 <= cols, NONE
    inv_std = inverse8(gpu.take8(var, c, n, whole, ZERO), eps)
    gain = multiply8(gpu.take8(gamma, c, n, whole, ZERO), inv_std)
    r = gpu.i8(gpu.row())
    if r == 0:
        if biased != 0:
            bias = gpu.take8(b, c, n, whole, ZERO)
        centre, shift = gpu.take8(mean, c, n, whole, ZERO), gpu.take8(beta, c, n, whole, ZERO)
        gpu.give8(b_folded, c, normalise8(bias, centre, gain, shift), n, whole)
    while r < rows:
        t = gpu.take8(w, r * w_row + c, n, whole, ZERO)
        gpu.give8(folded, r * folded_row + c, multiply8(t, gain), n, whole)
        r += gpu.row_step()


# ---------------------------------------------------------------------------------------------- launches
def batchnorm_forward(arrays: Sequence[View | None], params: Mapping[str, Any], planner: Planner) -> list[Launch]:
    x, gamma, beta, running_mean, running_var, slope, y, mean, inv_std = arrays
    wide = aligned((x, y), (slope,))
    grid, block, columns = sum_strips(x)
    affine = planner.scratch(3, columns)
    partial, counters = planner.scratch(4 * grid[1], columns), planner.scratch(grid[0], dtype=np.uint32)
    decay = params["decay"]
    sums = (
        x, x.row_stride, gamma, beta, running_mean, running_var, mean, inv_std, partial, counters, affine, columns,
        planner.run, x.cols, decay, 1 - decay, params["eps"], aligned((x,), ()),
    )  # fmt: skip
    sweep = (
        x, x.row_stride, affine, columns, slope, y, y.row_stride, planner.run, x.cols, params["alpha"],
        *dropout_of(params), wide,
    )  # fmt: skip
    return [
        Launch(statistics, grid, block, sums, float_type(x)),
        Launch(apply_kernel(activation_of(params)), *strips(*x.shape, SWEEP), sweep, float_type(x)),
    ]


def batchnorm_inference(arrays: Sequence[View | None], params: Mapping[str, Any], planner: Planner) -> list[Launch]:
    x, *vectors, y = arrays
    launched = inference_kernel(activation_of(params))
    arguments = (
        x, x.row_stride, *vectors, y, y.row_stride, planner.run, x.cols, params["eps"], params["alpha"],
        aligned((x, y), vectors),
    )  # fmt: skip
    return [Launch(launched, *strips(*x.shape, SWEEP), arguments, float_type(x))]


def batchnorm_fold(arrays: Sequence[View | None], params: Mapping[str, Any], planner: Planner) -> list[Launch]:
    w, *vectors, folded, b_folded = arrays
    arguments = (
        w, w.row_stride, *vectors, folded, folded.row_stride, b_folded, w.rows, w.cols, params["eps"],
        int(vectors[0] is not None), aligned((w, folded), (*vectors, b_folded)),
    )  # fmt: skip
    return [Launch(fold, *strips(*w.shape, SWEEP), arguments, float_type(folded))]


for _launches in (batchnorm_forward, batchnorm_inference, batchnorm_fold, batchnorm_backward):
    register(Impl(_launches.__name__, "cuda", launches=_launches))
