"""Dropout on CUDA: a thread draws one Philox counter for eight columns of a row and applies it to them.

    y = x scale where lane <= T - 1, else +0        x, y, dy, dx (N, C); mask (N, C) of bytes

Nothing is saved: backward is forward on dy and draws the same lanes again. 1 read and 1 write in accesses of 16 bytes,
beside which the 20 wide products of a counter, 2.5 an element, go unnoticed. The counter's row is the global one,
``first_row`` of the run-time block and the row of the batch, so a matrix is never one long row here.

Other kernels fuse dropout by ``draw8`` and ``drop8``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastdl.kernels.common import numba_cuda as gpu
from fastdl.kernels.common import philox
from fastdl.kernels.common.gpu import FIRST_ROW, STEP, Launch, Planner, View, float_type, kernel, spans
from fastdl.kernels.random.numba_cuda import lanes8, philox4x32
from fastdl.kernels.registry import Impl, register


@gpu.point
def draw8(block, row, run, layer, k0, k1):
    """The lanes, 16 bits each, of columns 8 block to 8 block + 7; ``row`` counts in the batch.

    In a loop over rows the key of each round and the first product would wait in registers, which made 126 of the 80
    that batch norm's sums needed; an addition or two a round cost less.
    """
    block, k0, k1 = gpu.opaque(gpu.u4(block)), gpu.opaque(k0), gpu.opaque(k1)
    return lanes8(philox4x32(block, gpu.u4(run[FIRST_ROW] + gpu.u4(row)), layer, run[STEP], k0, k1))


def drop(v, lane, last, scale):
    """A select, not a product with 0 or 1: a dropped NaN or infinity is +0 and nothing is -0."""
    return v * scale if lane <= last else gpu.f4(0)


drop8 = gpu.each(drop, 4)


@kernel("T* x, i8 x_row, T* y, i8 y_row, u4* run, i8 cols, u4 last, f4 scale, u4 layer, u4 k0, u4 k1, i4 wide")
def dropout(x, x_row, y, y_row, run, cols, last, scale, layer, k0, k1, wide):
    rows = gpu.rows_of(run)
    c = gpu.i8(8) * gpu.column()
    r = gpu.i8(gpu.row())
    while r < rows and c < cols:
        i, j = r * x_row + c, r * y_row + c
        lanes = draw8(gpu.column(), r, run, layer, k0, k1)
        if wide != 0 and c + 8 <= cols:
            gpu.store8(y, j, drop8(gpu.load8(x, i), lanes, last, scale))
        else:
            gpu.store_some(y, j, drop8(gpu.load_some(x, i, cols - c, gpu.f4(0)), lanes, last, scale), cols - c)
        r += gpu.row_step()


def _bit(lane, k, last):
    return gpu.u4(1 << k) if lane <= last else gpu.u4(0)


_bits = gpu.each(_bit, 3)
_PLACES = tuple(range(8))


@gpu.point
def keep8(lanes, last):
    """Which of eight elements are kept, the first in the lowest bit."""
    b = _bits(lanes, _PLACES, last)
    return gpu.u4(b[0] | b[1] | b[2] | b[3] | b[4] | b[5] | b[6] | b[7])


@kernel("u1* mask, i8 mask_row, u4* run, i8 cols, u4 last, u4 layer, u4 k0, u4 k1")
def dropout_mask(mask, mask_row, run, cols, last, layer, k0, k1):
    rows = gpu.rows_of(run)
    c = gpu.i8(8) * gpu.column()
    r = gpu.i8(gpu.row())
    while r < rows and c < cols:
        bits = keep8(draw8(gpu.column(), r, run, layer, k0, k1), last)
        for k in range(min(gpu.i8(8), cols - c)):
            mask[r * mask_row + c + k] = np.uint8((bits >> gpu.u4(k)) & gpu.u4(1))
        r += gpu.row_step()


def stream(params: Mapping[str, Any]) -> tuple[tuple[int, float], tuple[int, int, int]]:
    """What kernels take: (highest lane that is kept, scale) and the stream's words (layer, low and high key).

    Without a rate everything is kept as it is.
    """
    T = philox.threshold(params.get("rate", 0.0))
    k0, k1 = philox.split(params.get("seed", 0))
    return (T - 1, float(philox.scale(T, np.float32))), (params.get("layer", 0) & philox.MASK, k0, k1)


def launch_dropout(arrays: Sequence[View | None], params: Mapping[str, Any], planner: Planner) -> list[Launch]:
    x, y = arrays
    grid, block = spans(*x.shape)
    kept, words = stream(params)
    matrices = (x, x.row_stride, y, y.row_stride, planner.run, x.cols)
    return [Launch(dropout, grid, block, (*matrices, *kept, *words, int(x.by_eights and y.by_eights)), float_type(x))]


def launch_mask(arrays: Sequence[View | None], params: Mapping[str, Any], planner: Planner) -> list[Launch]:
    mask = arrays[0]
    grid, block = spans(*mask.shape)
    (last, _), words = stream(params)
    return [Launch(dropout_mask, grid, block, (mask, mask.row_stride, planner.run, mask.cols, last, *words))]


register(Impl("dropout_forward", "cuda", launches=launch_dropout))
register(Impl("dropout_backward", "cuda", launches=launch_dropout))
register(Impl("dropout_mask", "cuda", launches=launch_mask))
