"""Sums over the rows of a matrix on CUDA: of a block's rows of threads, of a block, of blocks that finish in any order.

Trees are fixed and blocks are added up in their order, by the one that ends last: sums have the same bits in every run.
"""

from __future__ import annotations

from fastdl.kernels.common import numba_cuda as gpu
from fastdl.kernels.common.gpu import THREADS

if not gpu.MISSING:
    from numba import cuda

_PLACES = tuple(range(8))


def _lay_one(k, v, room, at):
    room[k * THREADS + at] = v
    return k


def _pick_one(k, room, at):
    return room[k * THREADS + at]


_lay_each, _pick_each = gpu.each(_lay_one, 4), gpu.each(_pick_one, 3)


@gpu.point
def lay8(room, at, t):
    """A thread's eight floats into shared memory, THREADS apart so that no two lanes share a bank."""
    _lay_each(_PLACES, t, room, at)


@gpu.point
def pick8(room, at):
    """What thread ``at`` has laid down."""
    return _pick_each(_PLACES, room, at)


@gpu.point
def column_place():
    """Where the block's first row of threads lays down the float of the column that has this thread's number."""
    return (gpu.place() & gpu.i4(7)) * THREADS + (gpu.place() >> gpu.i4(3))


@gpu.point
def sum_down(room, t):
    """Sums over a block's rows of threads, THREADS in all and a power of 2 down, in a fixed tree.

    Each thread brings eight columns; thread k gets the sum of the block's column k, those beyond the last get
    anything. No thread may be missing. ``room`` is cuda.shared.array(ROOM, gpu.f4), the kernel's since a call that
    made one would make another one wherever it stands.
    """
    at, half = gpu.place(), cuda.blockDim.y >> 1
    while half > 0:  # each level has places of its own: one barrier is enough
        if half <= cuda.threadIdx.y < 2 * half:
            lay8(room, at, t)
        gpu.sync()
        if cuda.threadIdx.y < half:
            t = gpu.add8(t, pick8(room, at + half * cuda.blockDim.x))
        half >>= 1
    if cuda.threadIdx.y == 0:
        lay8(room, at, t)
    gpu.sync()
    total = room[column_place()]
    gpu.sync()
    return total


@gpu.point
def sum_blocks(room, partial, first, c, columns):
    """Sums over the grid's y of partial results (blocks, columns) from row ``first`` on: as `sum_down`."""
    t = (gpu.f4(0), gpu.f4(0), gpu.f4(0), gpu.f4(0), gpu.f4(0), gpu.f4(0), gpu.f4(0), gpu.f4(0))
    block = cuda.threadIdx.y
    while block < cuda.gridDim.y:
        t = gpu.add8(t, gpu.load8(partial, (first + block) * columns + c))
        block += cuda.blockDim.y
    return sum_down(room, t)


@gpu.point
def sum_of_block(room, v):
    """The sum of one number a thread over a block of THREADS, in a fixed tree, for every thread.

    ``room`` are as many numbers of shared memory, free again afterwards.
    """
    at, half = gpu.place(), THREADS >> 1
    room[at] = v
    while half > 0:
        gpu.sync()
        if at < half:
            room[at] += room[at + half]
        half >>= 1
    gpu.sync()
    total = room[0]
    gpu.sync()
    return total


@gpu.point
def arrives_last(counters, i, blocks):
    """Whether this block is the last of so many to get here, and so may read what all of them have written.

    All threads of a block get the same answer. Once in a kernel; the counter is zero again afterwards.
    """
    told = cuda.shared.array(1, gpu.i4)
    cuda.threadfence()
    gpu.sync()
    if gpu.place() == 0:
        told[0] = gpu.i4(0)
        if gpu.count_up(counters, i) == gpu.u4(blocks - 1):
            told[0] = gpu.i4(1)
            counters[i] = gpu.u4(0)
    gpu.sync()
    cuda.threadfence()
    return told[0] != 0
