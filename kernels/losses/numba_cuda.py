"""Losses on CUDA: value, gradient and the number of right rows in one launch; formulas and reductions: reference.py.

    z, targets, dz (N, C) or labels (N,), weight (N,), stats (3,) = [loss, rows or sum of weights, right rows]

A warp owns a row and walks it eight columns a lane: the maximum, the sum of exponentials, the gradient. The row comes
from memory once; up to some 16 KB it is still in L1 for the second and the third walk. Rows are shared out to the warps
of at most BLOCKS blocks. Elements are float32; the sums over rows are float64, one addition a row: a warp's, a block's,
and the last block adds up the blocks, all in a fixed order. With weights every block first adds up all of them itself,
because the gradient needs the sum: N reads from L2 instead of another launch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fastdl.kernels.common import numba_cuda as gpu
from fastdl.kernels.common.gpu import BLOCKS, THREADS, TOTAL_ROWS, Kernel, Launch, Planner, View, float_type, kernel
from fastdl.kernels.common.numba_math import exp, log, log1p_unit
from fastdl.kernels.registry import Impl, register

if not gpu.MISSING:
    from numba import cuda

WARPS = THREADS // 32
STEP = 8 * 32  # columns of one step of a warp
LOWEST = gpu.f4(-np.inf)
f8 = np.float64


# ---------------------------------------------------------------------------------------------- points
def _exp_of(z, top):
    return exp(z - top)


def _softmax(z, top, factor):
    return exp(z - top) * factor


def _minus(a, t, factor):
    return a - t * factor


def _logistic_loss(z, t):
    return (log1p_unit(exp(-abs(z))) + (z if z > 0 else gpu.f4(0))) - z * t


def _logistic_gradient(z, t, factor):
    e = exp(-abs(z))
    return ((gpu.f4(1) if z >= 0 else e) / (e + gpu.f4(1)) - t) * factor


def _logistic_wrong(z, t):
    return gpu.f4(0) if (z > 0) == (t > gpu.f4(0.5)) else gpu.f4(1)


def _squared(z, t):
    return (z - t) * (z - t)


def _difference(z, t, factor):
    return (z - t) * factor


_product8 = gpu.each(lambda a, b: a * b, 2)
_exp8, _softmax8, _minus8 = gpu.each(_exp_of, 2), gpu.each(_softmax, 3), gpu.each(_minus, 3)
_logistic_loss8, _logistic_gradient8 = gpu.each(_logistic_loss, 2), gpu.each(_logistic_gradient, 3)
_logistic_wrong8, _squared8, _difference8 = (
    gpu.each(_logistic_wrong, 2),
    gpu.each(_squared, 2),
    gpu.each(_difference, 3),
)


@gpu.point
def _sum(t):
    return ((t[0] + t[1]) + (t[2] + t[3])) + ((t[4] + t[5]) + (t[6] + t[7]))


_keep_first8 = gpu.each(lambda v, k, left: v if k < left else gpu.f4(0), 3)
_PLACES = tuple(range(8))


@gpu.point
def _sum_first(t, left):
    """The sum of the first ``left`` of eight."""
    return _sum(_keep_first8(t, _PLACES, left))


@gpu.point
def _lane():
    return gpu.i8(8) * (cuda.threadIdx.x & 31)


@gpu.point
def _largest(z, i, cols, wide):
    """The maximum of a row and its first place, for every lane; a NaN loses."""
    c = _lane()
    top, at = LOWEST, gpu.i4(0) if c == 0 else gpu.i4(0x7FFFFFFF)
    while c < cols:
        left = cols - c
        t = gpu.take8(z, i + c, left, wide != 0 and left >= 8, LOWEST)
        a, b, d, e, f, g, h, k = t
        largest = max(max(max(a, b), max(d, e)), max(max(f, g), max(h, k)))
        if largest > top:
            top = largest
            place = gpu.i4(7)
            for q in range(6, -1, -1):
                place = gpu.i4(q) if t[q] == largest else place
            at = gpu.i4(c) + place
        c += STEP
    for half in (16, 8, 4, 2, 1):
        other, there = cuda.shfl_xor_sync(0xFFFFFFFF, top, half), cuda.shfl_xor_sync(0xFFFFFFFF, at, half)
        if other > top or (other == top and there < at):
            top, at = other, there
    return top, at


@gpu.point
def _sum_of_exp(z, i, cols, top, wide):
    c, total = _lane(), gpu.f4(0)
    while c < cols:
        left = cols - c
        t = _exp8(gpu.take8(z, i + c, left, wide != 0 and left >= 8, LOWEST), top)
        total += _sum(t) if left >= 8 else _sum_first(t, left)
        c += STEP
    return gpu.warp_sum(total)


# ---------------------------------------------------------------------------------------------- one row
# (loss, whether it is right) for every lane; dz = gradient * factor if it is wanted. dz may be z: an element is read by
# the lane that writes it, and the label's before the lanes last met.
@gpu.point
def _labels_row(z, i, targets, r, j, dz, k, cols, factor, wanted, wide):
    label = targets[r]
    top, at = _largest(z, i, cols, wide)
    inside = 0 <= label < cols  # labels from the GPU are not looked at by the host: a wrong one makes the loss NaN
    picked = gpu.load(z, i + label) - top if inside else gpu.f4(np.nan)
    total = _sum_of_exp(z, i, cols, top, wide)
    if wanted != 0:
        c, inverse = _lane(), factor / total
        while c < cols:
            left = cols - c
            whole = wide != 0 and left >= 8
            t = _softmax8(gpu.take8(z, i + c, left, whole, LOWEST), top, inverse)
            gpu.give8(dz, k + c, _less_label8(t, _PLACES, label - c, factor), left, whole)
            c += STEP
    return log(total) - picked, at == label


_less_label8 = gpu.each(lambda v, place, label, factor: v - factor if place == label else v, 4)


@gpu.point
def _onehot_row(z, i, targets, r, j, dz, k, cols, factor, wanted, wide):
    top, at = _largest(z, i, cols, wide)
    _, wished = _largest(targets, j, cols, wide)
    total = _sum_of_exp(z, i, cols, top, wide)
    c, mass, picked = _lane(), gpu.f4(0), gpu.f4(0)
    while c < cols:
        left = cols - c
        whole = wide != 0 and left >= 8
        t = gpu.take8(targets, j + c, left, whole, gpu.f4(0))
        shifted = _difference8(gpu.take8(z, i + c, left, whole, top), _same8(t, top), gpu.f4(1))
        mass += _sum(t)
        picked += _sum(_product8(t, shifted))
        c += STEP
    mass, picked = gpu.warp_sum(mass), gpu.warp_sum(picked)
    if wanted != 0:
        c, inverse = _lane(), factor * (mass / total)
        while c < cols:
            left = cols - c
            whole = wide != 0 and left >= 8
            v = _softmax8(gpu.take8(z, i + c, left, whole, LOWEST), top, inverse)
            t = gpu.take8(targets, j + c, left, whole, gpu.f4(0))
            gpu.give8(dz, k + c, _minus8(v, t, factor), left, whole)
            c += STEP
    return mass * log(total) - picked, at == wished


_same8 = gpu.each(lambda t, v: v, 2)


@gpu.point
def _binary_row(z, i, targets, r, j, dz, k, cols, factor, wanted, wide):
    c, loss, wrong, count = _lane(), gpu.f4(0), gpu.f4(0), gpu.f4(cols)
    while c < cols:
        left = cols - c
        whole = wide != 0 and left >= 8
        v, t = gpu.take8(z, i + c, left, whole, gpu.f4(0)), gpu.take8(targets, j + c, left, whole, gpu.f4(0))
        loss += _sum_first(_logistic_loss8(v, t), left)
        wrong += _sum(_logistic_wrong8(v, t))
        if wanted != 0:
            gpu.give8(dz, k + c, _logistic_gradient8(v, t, factor / count), left, whole)
        c += STEP
    return gpu.warp_sum(loss) / count, gpu.warp_sum(wrong) == 0


@gpu.point
def _squared_row(z, i, targets, r, j, dz, k, cols, factor, wanted, wide):
    c, loss, count = _lane(), gpu.f4(0), gpu.f4(cols)
    while c < cols:
        left = cols - c
        whole = wide != 0 and left >= 8
        v, t = gpu.take8(z, i + c, left, whole, gpu.f4(0)), gpu.take8(targets, j + c, left, whole, gpu.f4(0))
        loss += _sum(_squared8(v, t))
        if wanted != 0:
            gpu.give8(dz, k + c, _difference8(v, t, factor * (gpu.f4(2) / count)), left, whole)
        c += STEP
    return gpu.warp_sum(loss) / count, False


# ---------------------------------------------------------------------------------------------- kernels
@gpu.point
def _sum_of_weights(room, weight, rows):
    i, total = gpu.place(), f8(0)
    while i < rows:
        total += f8(gpu.load(weight, i))
        i += THREADS
    return gpu.sum_of_block(room, total)


@gpu.point
def _sum_of_partials(room, partial, which, blocks):
    i, total = gpu.place(), f8(0)
    while i < blocks:
        total += partial[2 * i + which]
        i += THREADS
    return gpu.sum_of_block(room, total)


def loss_kernel(name: str, row: Callable[..., Any], targets: str) -> Kernel:
    @kernel(
        f"T* z, i8 z_row, {targets} targets, i8 t_row, f4* weight, f8* stats, T* dz, i8 dz_row, u4* run, i8 cols, "
        "i4 weighted, i4 wanted, i4 wide, f8* partial, u4* counter",
        name,
        doubles="sums over rows, one addition a row",
        registers=96,
    )
    def loss(z, z_row, targets, t_row, weight, stats, dz, dz_row, run, cols, weighted, wanted, wide, partial, counter):
        room = cuda.shared.array(THREADS, np.float64)
        rows, warp = gpu.rows_of(run), cuda.threadIdx.x >> 5
        mass, over = f8(rows), gpu.i4(run[TOTAL_ROWS])
        if weighted != 0:
            mass = _sum_of_weights(room, weight, rows)
            scale = f8(1) / mass if mass != 0 else f8(0)
        else:
            over = over if over > 0 else rows
            scale = f8(1) / f8(over) if over > 0 else f8(0)
        total, right = f8(0), f8(0)
        r = gpu.i8(cuda.blockIdx.x * WARPS + warp)
        while r < rows:
            w = gpu.load(weight, r) if weighted != 0 else gpu.f4(1)
            value, hit = row(z, r * z_row, targets, r, r * t_row, dz, r * dz_row, cols, w * gpu.f4(scale), wanted, wide)
            total += f8(value) * f8(w)
            right += f8(1) if hit and value == value else f8(0)
            r += cuda.gridDim.x * WARPS
        first = cuda.threadIdx.x & 31 == 0  # every lane has its warp's sums
        total = gpu.sum_of_block(room, total if first else f8(0))
        right = gpu.sum_of_block(room, right if first else f8(0))
        if gpu.place() == 0:
            partial[2 * cuda.blockIdx.x] = total
            partial[2 * cuda.blockIdx.x + 1] = right
        if gpu.arrives_last(counter, 0, cuda.gridDim.x):
            total = _sum_of_partials(room, partial, 0, cuda.gridDim.x)
            right = _sum_of_partials(room, partial, 1, cuda.gridDim.x)
            if gpu.place() == 0:
                stats[0] = total * scale
                stats[1] = mass
                stats[2] = right

    return loss


KERNELS = {
    "softmax_cross_entropy": loss_kernel("softmax_cross_entropy", _labels_row, "i8*"),
    "softmax_cross_entropy_onehot": loss_kernel("softmax_cross_entropy_onehot", _onehot_row, "f4*"),
    "binary_cross_entropy": loss_kernel("binary_cross_entropy", _binary_row, "f4*"),
    "mse": loss_kernel("mse", _squared_row, "f4*"),
}


def _launches(op: str) -> Callable[..., list[Launch]]:
    def launches(arrays: Sequence[View | None], params: Mapping[str, Any], planner: Planner) -> list[Launch]:
        z, targets, weight, stats, dz = arrays
        blocks = max(1, min(BLOCKS, -(-z.rows // WARPS)))
        partial, counter = planner.scratch(2 * blocks, dtype="f8"), planner.scratch(1, dtype="u4")
        matrices = [v for v in (z, targets if len(targets.shape) == 2 else None, dz) if v is not None]
        flags = int(weight is not None), int(dz is not None), int(all(v.by_eights for v in matrices))
        out = (dz, 0 if dz is None else dz.row_stride, planner.run, z.cols)
        given = (z, z.row_stride, targets, targets.row_stride, weight, stats)
        return [Launch(KERNELS[op], (blocks, 1), (THREADS, 1), (*given, *out, *flags, partial, counter), float_type(z))]

    return launches


for _op in KERNELS:
    register(Impl(_op, "cuda", launches=_launches(_op)))
