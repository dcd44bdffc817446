"""Losses on CUDA: value, gradient and the number of right rows in one launch; formulas and reductions: reference.py.

    z, targets, dz (N, C) or labels (N,), weight (N,), stats (3,) = [loss, rows or sum of weights, right rows]

Threads share rows as softmax's do (common/rows_cuda.py): z is read once and dz written once for rows of up to 4096
columns. Rows are shared out to at most BLOCKS blocks. Elements are float32; the sums over rows are float64, one
addition a row: a thread's, a block's, and the last block adds up the blocks, all in a fixed order. With weights every
block first adds up all of them itself, because the gradient needs the sum: N reads from L2 instead of another launch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fastdl.kernels.common import numba_cuda as gpu
from fastdl.kernels.common import rows_cuda as team
from fastdl.kernels.common.gpu import THREADS, TOTAL_ROWS, Kernel, Launch, Planner, View, float_type, kernel, spans
from fastdl.kernels.common.numba_math import exp, log, log1p_unit
from fastdl.kernels.common.sums_cuda import arrives_last, sum_of_block
from fastdl.kernels.registry import Impl, register

if not gpu.MISSING:
    from numba import cuda

f8 = np.float64
BLOCKS = 3 * 132  # for which 77 registers a thread leave room on an H200 at a time: all blocks end together
MEETING, WARPS = team.ROOM, team.WARPS  # of shared memory: Numba wants names of this file


# ---------------------------------------------------------------------------------------------- points
def _minus(a, s, t, factor):
    return a * s - t * factor


def _minus_label(a, s, place, label, factor):
    v = a * s
    return v - factor if place == label else v


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


_minus8, _minus_label8 = gpu.each(_minus, 4), gpu.each(_minus_label, 5)
_logistic_loss8, _logistic_gradient8 = gpu.each(_logistic_loss, 2), gpu.each(_logistic_gradient, 3)
_logistic_wrong8, _squared8 = gpu.each(_logistic_wrong, 2), gpu.each(_squared, 2)
_difference8 = gpu.each(_difference, 3)
_shifted8 = gpu.each(lambda z, top, t, k, left: (z - top) * t if k < left else gpu.f4(0), 5)
_first8 = gpu.each(lambda v, k, left, other: v if k < left else other, 4)
_PLACES = tuple(range(8))
_FAR = gpu.i4(0x7FFFFFFF)


@gpu.point
def _rise(top, at, t, c):
    """The maximum of a thread's columns and its first place, with eight more of them; a NaN loses."""
    highest = team.max8(top, t)
    if highest > top:
        at = gpu.i4(c + 7)
        for q in range(6, -1, -1):
            at = gpu.i4(c + q) if t[q] == highest else at
    return highest, at


@gpu.point
def _highest(z, i, c, end, wide):
    """A thread's first two eights, and where the maximum of them is."""
    t, u = team.start(z, i, c, end, wide, team.NOTHING)
    top, at = _rise(team.LEAST, gpu.i4(0) if c == 0 else _FAR, t, c)
    top, at = _rise(top, at, u, c + gpu.i4(8 * cuda.blockDim.x))
    return t, u, top, at


# ---------------------------------------------------------------------------------------------- one row
# (loss, whether it is right) for every thread of a row; dz = gradient * factor if it is wanted. Behind the last row
# ``end`` is 0 and nothing is read. dz may be z: an element is read by the thread that writes it, and the label's before
# the threads meet.
@gpu.point
def _labels_row(room, places, z, i, targets, r, j, dz, o, end, factor, wanted, wide):
    step, c = gpu.i4(8 * cuda.blockDim.x), gpu.i4(8 * cuda.threadIdx.x)
    label = targets[r] if end > 0 else gpu.i8(-1)
    inside = 0 <= label < end  # labels from the GPU are not looked at by the host: a wrong one makes the loss NaN
    picked = gpu.load(z, i + label) if inside else gpu.f4(np.nan)
    t, u, top, at = _highest(z, i, c, end, wide)
    e, f, own = team.exp8(t, top), team.exp8(u, top), top
    total = team.sum8(e) + team.sum8(f)
    k = gpu.i4(c + 2 * step)
    while k < end:
        t = gpu.take8(z, i + k, end - k, wide != 0 and k + 8 <= end, team.NOTHING)
        higher, at = _rise(top, at, t, k)
        total = total * exp(top - higher) + team.sum8(team.exp8(t, higher))
        top = higher
        k = gpu.i4(k + step)
    highest, at, total = team.meet_with_place(room, places, top, at, total)
    if wanted != 0:
        inverse, place = factor / total, gpu.i4(label)
        kept = exp(own - highest) * inverse
        e = _minus_label8(e, kept, _PLACES, gpu.i4(place - c), factor)
        f = _minus_label8(f, kept, _PLACES, gpu.i4(place - c - step), factor)
        team.finish(dz, o, c, end, wide, e, f)
        k = gpu.i4(c + 2 * step)
        while k < end:
            whole = wide != 0 and k + 8 <= end
            t = team.exp8(gpu.take8(z, i + k, end - k, whole, team.NOTHING), highest)
            gpu.give8(dz, o + k, _minus_label8(t, inverse, _PLACES, gpu.i4(place - k), factor), end - k, whole)
            k = gpu.i4(k + step)
    return log(total) - (picked - highest), at == label


@gpu.point
def _onehot_row(room, places, z, i, targets, r, j, dz, o, end, factor, wanted, wide):
    step, c = gpu.i4(8 * cuda.blockDim.x), gpu.i4(8 * cuda.threadIdx.x)
    t, u, top, at = _highest(z, i, c, end, wide)
    p, q = team.start(targets, j, c, end, wide, gpu.f4(0))
    most, wished = _rise(team.LEAST, gpu.i4(0) if c == 0 else _FAR, _first8(p, _PLACES, end - c, team.NOTHING), c)
    most, wished = _rise(most, wished, _first8(q, _PLACES, end - c - step, team.NOTHING), c + step)
    mass, own = team.sum8(p) + team.sum8(q), top
    picked = team.sum8(_shifted8(t, top, p, _PLACES, end - c))
    picked += team.sum8(_shifted8(u, top, q, _PLACES, end - c - step))
    e, f = team.exp8(t, top), team.exp8(u, top)
    total = team.sum8(e) + team.sum8(f)
    k = gpu.i4(c + 2 * step)
    while k < end:
        whole = wide != 0 and k + 8 <= end
        t, v = gpu.take8(z, i + k, end - k, whole, team.NOTHING), gpu.take8(targets, j + k, end - k, whole, gpu.f4(0))
        most, wished = _rise(most, wished, _first8(v, _PLACES, end - k, team.NOTHING), k)
        higher, at = _rise(top, at, t, k)
        total = total * exp(top - higher) + team.sum8(team.exp8(t, higher))
        picked = _moved(picked, mass, top - higher) + team.sum8(_shifted8(t, higher, v, _PLACES, end - k))
        mass += team.sum8(v)
        top = higher
        k = gpu.i4(k + step)
    highest, at, total = team.meet_with_place(room, places, top, at, total)
    _, wished, _ = team.meet_with_place(room, places, most, wished, gpu.f4(0))
    picked = team.row_sum(room, _moved(picked, mass, top - highest))
    mass = team.row_sum(room, mass)
    if wanted != 0:
        inverse = factor * (mass / total)
        kept = exp(own - highest) * inverse
        team.finish(dz, o, c, end, wide, _minus8(e, kept, p, factor), _minus8(f, kept, q, factor))
        k = gpu.i4(c + 2 * step)
        while k < end:
            whole = wide != 0 and k + 8 <= end
            t = team.exp8(gpu.take8(z, i + k, end - k, whole, team.NOTHING), highest)
            v = gpu.take8(targets, j + k, end - k, whole, gpu.f4(0))
            gpu.give8(dz, o + k, _minus8(t, inverse, v, factor), end - k, whole)
            k = gpu.i4(k + step)
    return mass * log(total) - picked, at == wished


@gpu.point
def _moved(picked, mass, by):
    """Sum of t (z - top) for a top that is lower ``by``; none of no mass, however far."""
    return picked + mass * by if mass != 0 else picked


@gpu.point
def _binary_row(room, places, z, i, targets, r, j, dz, o, end, factor, wanted, wide):
    k, loss, wrong, count = gpu.i4(8 * cuda.threadIdx.x), gpu.f4(0), gpu.f4(0), gpu.f4(end)
    while k < end:
        left = end - k
        whole = wide != 0 and left >= 8
        v, t = gpu.take8(z, i + k, left, whole, gpu.f4(0)), gpu.take8(targets, j + k, left, whole, gpu.f4(0))
        loss += team.sum8(_first8(_logistic_loss8(v, t), _PLACES, left, gpu.f4(0)))
        wrong += team.sum8(_logistic_wrong8(v, t))
        if wanted != 0:
            gpu.give8(dz, o + k, _logistic_gradient8(v, t, factor / count), left, whole)
        k = gpu.i4(k + 8 * cuda.blockDim.x)
    return team.row_sum(room, loss) / count, team.row_sum(room, wrong) == 0


@gpu.point
def _squared_row(room, places, z, i, targets, r, j, dz, o, end, factor, wanted, wide):
    k, loss, count = gpu.i4(8 * cuda.threadIdx.x), gpu.f4(0), gpu.f4(end)
    while k < end:
        left = end - k
        whole = wide != 0 and left >= 8
        v, t = gpu.take8(z, i + k, left, whole, gpu.f4(0)), gpu.take8(targets, j + k, left, whole, gpu.f4(0))
        loss += team.sum8(_squared8(v, t))
        if wanted != 0:
            gpu.give8(dz, o + k, _difference8(v, t, factor * (gpu.f4(2) / count)), left, whole)
        k = gpu.i4(k + 8 * cuda.blockDim.x)
    return team.row_sum(room, loss) / count, False


# ---------------------------------------------------------------------------------------------- kernels
@gpu.point
def _sum_of_weights(room, weight, rows):
    i, total = gpu.place(), f8(0)
    while i < rows:
        total += f8(gpu.load(weight, i))
        i += THREADS
    return sum_of_block(room, total)


@gpu.point
def _sum_of_partials(room, partial, which, blocks):
    i, total = gpu.place(), f8(0)
    while i < blocks:
        total += partial[2 * i + which]
        i += THREADS
    return sum_of_block(room, total)


def loss_kernel(name: str, row: Callable[..., Any], targets: str, registers: int = 80) -> Kernel:
    @kernel(
        f"T* z, i8 z_row, {targets} targets, i8 t_row, f4* weight, f8* stats, T* dz, i8 dz_row, u4* run, i8 cols, "
        "i4 weighted, i4 wanted, i4 wide, f8* partial, u4* counter",
        name,
        doubles="sums over rows, one addition a row",
        registers=registers,
    )
    def loss(z, z_row, targets, t_row, weight, stats, dz, dz_row, run, cols, weighted, wanted, wide, partial, counter):
        room, shared = cuda.shared.array(THREADS, np.float64), cuda.shared.array(MEETING, gpu.f4)
        places, rows = cuda.shared.array(WARPS, gpu.i4), gpu.rows_of(run)
        mass, total_rows = f8(rows), gpu.i4(run[TOTAL_ROWS])
        if weighted != 0:
            mass = _sum_of_weights(room, weight, rows)
        over = mass if total_rows == 0 or total_rows == rows else f8(total_rows)
        scale = f8(1) / over if over != 0 else f8(0)
        total, right = f8(0), f8(0)
        base = gpu.i4(cuda.blockIdx.y * cuda.blockDim.y)
        while base < rows:  # all threads of a block alike: behind the last row they have no columns
            r = gpu.i8(base) + cuda.threadIdx.y
            there = r < rows
            w = gpu.load(weight, r) if weighted != 0 and there else gpu.f4(1)
            at, to, end = r * z_row, r * dz_row, gpu.i4(cols) if there else gpu.i4(0)
            value, hit = row(
                shared, places, z, at, targets, r, r * t_row, dz, to, end, w * gpu.f4(scale), wanted, wide
            )  # fmt: skip
            if there and cuda.threadIdx.x == 0:  # every thread of a row has its sums
                total += f8(value) * f8(w)
                right += f8(1) if hit and value == value else f8(0)
            base = gpu.i4(base + gpu.row_step())
        total, right = sum_of_block(room, total), sum_of_block(room, right)
        if gpu.place() == 0:
            partial[2 * cuda.blockIdx.y] = total
            partial[2 * cuda.blockIdx.y + 1] = right
        if arrives_last(counter, 0, cuda.gridDim.y):
            total = _sum_of_partials(room, partial, 0, cuda.gridDim.y)
            right = _sum_of_partials(room, partial, 1, cuda.gridDim.y)
            if gpu.place() == 0:
                stats[0] = total * scale
                stats[1] = mass
                stats[2] = right

    return loss


#: Registers: 77 and 117 from sm_90 on; the assembler keeps twice as much in flight for sm_80.
KERNELS = {
    "softmax_cross_entropy": loss_kernel("softmax_cross_entropy", _labels_row, "i8*", 160),
    "softmax_cross_entropy_onehot": loss_kernel("softmax_cross_entropy_onehot", _onehot_row, "f4*", 208),
    "binary_cross_entropy": loss_kernel("binary_cross_entropy", _binary_row, "f4*"),
    "mse": loss_kernel("mse", _squared_row, "f4*"),
}


def _launches(op: str) -> Callable[..., list[Launch]]:
    def launches(arrays: Sequence[View | None], params: Mapping[str, Any], planner: Planner) -> list[Launch]:
        z, targets, weight, stats, dz = arrays
        (_, blocks), block = spans(*z.shape)  # one block across: its threads go on along the row
        blocks = min(BLOCKS, blocks)
        partial, counter = planner.scratch(2 * blocks, dtype="f8"), planner.scratch(1, dtype="u4")
        matrices = [v for v in (z, targets if len(targets.shape) == 2 else None, dz) if v is not None]
        flags = int(weight is not None), int(dz is not None), int(all(v.by_eights for v in matrices))
        out = (dz, 0 if dz is None else dz.row_stride, planner.run, z.cols)
        given = (z, z.row_stride, targets, targets.row_stride, weight, stats)
        return [Launch(KERNELS[op], (1, blocks), block, (*given, *out, *flags, partial, counter), float_type(z))]

    return launches


for _op in KERNELS:
    register(Impl(_op, "cuda", launches=_launches(_op)))
