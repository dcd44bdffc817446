"""Dropout on Numba: a chunk of rows per task; a row's lanes are drawn into a small buffer, then applied.

See reference.py for the formula and README.md for the stream. LLVM vectorises the loop over counters and the loop over
columns; what stands between them is only there for that.
"""

from __future__ import annotations

import numba
import numpy as np

from fastdl.kernels.common import philox
from fastdl.kernels.common.numba_cpu import parallel_kernel, point
from fastdl.kernels.random.points import MASK, philox4x32
from fastdl.kernels.registry import Impl, register

#: Rows of one task: 16 rows are at least a microsecond of work from some 100 columns on.
ROWS = 16


@point
def draw(planes, words, row, layer, step, k0, k1):
    """The row's random words (blocks, 4): four for eight columns, in the order of the columns.

    By way of ``planes`` (4, blocks): LLVM vectorises the generator when it stores four contiguous streams (0.12 ns an
    element), not when they interleave (0.8 ns); interleaving them afterwards costs 0.07 ns.
    """
    for b in range(planes.shape[1]):
        w0, w1, w2, w3 = philox4x32(np.uint64(b), row, layer, step, k0, k1)
        planes[0, b] = np.uint32(w0)
        planes[1, b] = np.uint32(w1)
        planes[2, b] = np.uint32(w2)
        planes[3, b] = np.uint32(w3)
    for b in range(planes.shape[1]):
        words[b, 0] = planes[0, b]
        words[b, 1] = planes[1, b]
        words[b, 2] = planes[2, b]
        words[b, 3] = planes[3, b]


@parallel_kernel
def apply(x, y, scale, last, layer, step, k0, k1, first_row):
    rows, cols = x.shape
    blocks = (cols + 7) // 8
    for task in numba.prange((rows + ROWS - 1) // ROWS):
        planes, words = np.empty((4, blocks), np.uint32), np.empty((blocks, 4), np.uint32)
        lanes = words.reshape(-1).view(np.uint16)  # low half first: Numba's platforms are little-endian
        for r in range(task * ROWS, min(rows, task * ROWS + ROWS)):
            draw(planes, words, (first_row + np.uint64(r)) & MASK, layer, step, k0, k1)
            for c in range(cols):
                kept = x[r, c] * scale
                y[r, c] = kept if lanes[c] <= last else x.dtype.type(0)


@parallel_kernel
def fill_mask(mask, last, layer, step, k0, k1, first_row):
    rows, cols = mask.shape
    blocks = (cols + 7) // 8
    for task in numba.prange((rows + ROWS - 1) // ROWS):
        planes, words = np.empty((4, blocks), np.uint32), np.empty((blocks, 4), np.uint32)
        lanes = words.reshape(-1).view(np.uint16)
        for r in range(task * ROWS, min(rows, task * ROWS + ROWS)):
            draw(planes, words, (first_row + np.uint64(r)) & MASK, layer, step, k0, k1)
            for c in range(cols):
                mask[r, c] = lanes[c] <= last


def _words(rate, seed, layer, step, first_row):
    """The kernels' common arguments as the machine words that they compute with."""
    k0, k1 = philox.split(seed)
    T = philox.threshold(rate)
    # first_row counts in 64 bits, the counter takes the low 32.
    return T, (np.uint16(T - 1), *map(np.uint64, (layer & philox.MASK, step, k0, k1, first_row & philox.MASK)))


def dropout_forward(x, y, *, rate=0.5, seed=0, layer=0, step=0, first_row=0, threads=1):
    """Drop elements of x (N, C) into y (N, C); y may be x."""
    T, words = _words(rate, seed, layer, step, first_row)
    apply(x, y, philox.scale(T, x.dtype), *words, threads=threads)


def dropout_mask(mask, *, rate=0.5, seed=0, layer=0, step=0, first_row=0, threads=1):
    """Write which elements are kept to mask (N, C), bool."""
    _, words = _words(rate, seed, layer, step, first_row)
    fill_mask(mask, *words, threads=threads)


register(Impl("dropout_forward", "numba", dropout_forward))
register(Impl("dropout_backward", "numba", dropout_forward))
register(Impl("dropout_mask", "numba", dropout_mask))
