"""A row that belongs to the threads of a block's x on CUDA: its maximum and its sums, for softmax and the losses.

A block has 256 threads, ``blockDim.x`` of them for a row: as many as it has eights of columns, a power of 2. Up to a
warp's worth speak by shuffles, beyond that the warps of a row by shared memory. Each thread holds the first two of its
eights in registers, so that rows of up to 4096 columns come from memory once; longer ones are walked again, from L2 as
a rule.

A thread's sum of exponentials is relative to the thread's own maximum and corrected when a higher one turns up (Milakov
and Gimelshein 2018): one walk instead of two, and one meeting of the row's threads instead of two. Trees are fixed:
sums have the same bits in every run.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastdl.kernels.common import numba_cuda as gpu
from fastdl.kernels.common.numba_math import exp

if not gpu.MISSING:
    from numba import cuda

#: Warps of a block.
WARPS = 8
#: Floats of shared memory that the meetings here take.
ROOM = 2 * WARPS
ZERO = gpu.f4(0)
LEAST = gpu.f4(np.finfo(np.float32).min)  # where maxima begin: -inf would give -inf - -inf
NOTHING = gpu.f4(-np.inf)  # beyond a row's end: no part of maximum or sum

exp8 = gpu.each(lambda x, top: exp(x - top), 2)
scale8 = gpu.each(lambda x, w: x * w, 2)
product8 = gpu.each(lambda x, y: x * y, 2)


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
def start(p, i, c, end, wide, other):
    """The first two eights of a thread's columns; both are on their way before one is looked at."""
    d = c + gpu.i4(8 * cuda.blockDim.x)
    t = gpu.take8(p, i + c, end - c, wide != 0 and c + 8 <= end, other)
    u = other, other, other, other, other, other, other, other
    if d < end:
        u = gpu.take8(p, i + d, end - d, wide != 0 and d + 8 <= end, other)
    return t, u


@gpu.point
def finish(p, i, c, end, wide, t, u):
    """Store what `start` has loaded."""
    d = c + gpu.i4(8 * cuda.blockDim.x)
    gpu.give8(p, i + c, t, end - c, wide != 0 and c + 8 <= end)
    if d < end:
        gpu.give8(p, i + d, u, end - d, wide != 0 and d + 8 <= end)


@gpu.point
def _first_warp():
    """The number of the first warp of this thread's row in the block, for rows of more than one."""
    return (gpu.place() - cuda.threadIdx.x) >> 5


@gpu.point
def _lane_of_warps():
    """Lanes take the warps of a row, over and over."""
    return _first_warp() + (cuda.threadIdx.x & ((cuda.blockDim.x >> 5) - 1))


@gpu.point
def row_sum(room, v):
    """The sum over a row's threads, in each of them; no thread of the block may be missing."""
    half = min(32, cuda.blockDim.x) >> 1
    while half > 0:
        v += cuda.shfl_xor_sync(0xFFFFFFFF, v, half)
        half >>= 1
    if cuda.blockDim.x > 32:
        room[gpu.place() >> 5] = v  # its lanes have the same bits
        gpu.sync()
        v = room[_lane_of_warps()]
        half = cuda.blockDim.x >> 6
        while half > 0:
            v += cuda.shfl_xor_sync(0xFFFFFFFF, v, half)
            half >>= 1
        gpu.sync()
    return v


def _meeting(placed: bool) -> Any:
    @gpu.point
    def _higher(top, at, half):
        """The maximum of lanes 0 to half - 1, over and over, and its first place."""
        while half > 0:
            other = cuda.shfl_xor_sync(0xFFFFFFFF, top, half)
            if placed:
                there = cuda.shfl_xor_sync(0xFFFFFFFF, at, half)
                at = there if other > top or (other == top and there < at) else at
            top = larger(top, other)
            half >>= 1
        return top, at

    @gpu.point
    def _summed(total, half):
        while half > 0:
            total += cuda.shfl_xor_sync(0xFFFFFFFF, total, half)
            half >>= 1
        return total

    def meeting(room, places, top, at, total):
        half = min(32, cuda.blockDim.x) >> 1
        own = top
        top, at = _higher(top, at, half)
        total = _summed(total * exp(own - top), half)
        if cuda.blockDim.x > 32:
            room[gpu.place() >> 5], room[WARPS + (gpu.place() >> 5)] = top, total
            if placed:
                places[gpu.place() >> 5] = at
            gpu.sync()
            warp, half = _lane_of_warps(), cuda.blockDim.x >> 6
            own = room[warp]
            top, at = _higher(own, places[warp] if placed else at, half)
            total = _summed(room[WARPS + warp] * exp(own - top), half)
            gpu.sync()
        return top, at, total

    return gpu.point(meeting)


#: ``(room, places, top, at, total)`` -> the row's maximum, its place, and the sum of exponentials relative to it, from
#: each thread's. ``places`` are shared integers, one for each warp.
meet_with_place, meet = _meeting(True), _meeting(False)
