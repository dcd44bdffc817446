"""Philox4x32-10 and the permutation of an epoch on CUDA, by products of 32-bit words; see common/philox.py, README.md.

A counter costs 20 wide multiplications, which is less time than its eight elements take to arrive from memory. The
permutation is the cycle-walking Feistel network of reference.py; a thread draws its twelve round keys itself and finds
one position. Initial values are drawn on the host: they need float64, once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastdl.kernels.common import numba_cuda as gpu
from fastdl.kernels.common import philox
from fastdl.kernels.common.gpu import EPOCH, OFFSET, Launch, Planner, View, kernel, spans
from fastdl.kernels.random.reference import ROUNDS, split_bits
from fastdl.kernels.registry import Impl, register

M0, M1 = gpu.u4(philox.M0), gpu.u4(philox.M1)
W0, W1 = gpu.u4(philox.W0), gpu.u4(philox.W1)


@gpu.point
def philox4x32(c0, c1, c2, c3, k0, k1):
    """The four random words of a counter; uint32 in, uint32 out."""
    for _ in range(philox.ROUNDS):
        high0, low0 = gpu.wide_product(M0, c0)
        high1, low1 = gpu.wide_product(M1, c2)
        c0, c1, c2, c3 = gpu.u4(high1 ^ c1 ^ k0), low1, gpu.u4(high0 ^ c3 ^ k1), low0
        k0, k1 = gpu.u4(k0 + W0), gpu.u4(k1 + W1)
    return c0, c1, c2, c3


@gpu.point
def _halves(word):
    return gpu.u4(word & gpu.u4(0xFFFF)), gpu.u4(word >> gpu.u4(16))


@gpu.point
def lanes8(words):
    """The eight 16-bit lanes of four words, low half first, as uint32."""
    return _halves(words[0]) + _halves(words[1]) + _halves(words[2]) + _halves(words[3])


# ------------------------------------------------------------------------------------------------ permutation
LAYER = gpu.u4(philox.PERMUTATION_LAYER)


@gpu.point
def _mixed(word, k0, k1):
    """A round's function: the low 32 bits are all that a mask leaves of it."""
    high, low = gpu.wide_product(gpu.u4(word ^ k0), M0)
    high, low = gpu.wide_product(gpu.u4(high ^ low ^ k1), M1)
    return gpu.u4(high ^ low)


@gpu.point
def _two_rounds(halves, pair, epoch, k0, k1, low, high):
    """Two rounds of the network on (left, right) with the keys of counter ``pair``; low and high are masks."""
    a, b, c, d = philox4x32(pair, gpu.u4(0), LAYER, epoch, k0, k1)
    left = gpu.u4(halves[0] ^ gpu.u4(_mixed(halves[1], a, b) & high))
    return left, gpu.u4(halves[1] ^ gpu.u4(_mixed(left, c, d) & low))


@kernel("i8* index, u4* run, i8 n, i8 low, u4 low_mask, u4 high_mask, u4 k0, u4 k1")
def epoch_indices(index, run, n, low, low_mask, high_mask, k0, k1):
    i = gpu.column()
    if i >= gpu.rows_of(run):
        return
    epoch = run[EPOCH]
    x = (gpu.i8(run[OFFSET]) + i) % n
    walking = True
    while walking:  # along the cycle until it comes back below n
        halves = (gpu.u4(x >> low), gpu.u4(gpu.u4(x) & low_mask))
        for pair in range(ROUNDS // 2):
            halves = _two_rounds(halves, gpu.u4(pair), epoch, k0, k1, low_mask, high_mask)
        x = (gpu.i8(halves[0]) << low) | gpu.i8(halves[1])
        walking = x >= n
    index[i] = x


def launch_indices(arrays: Sequence[View | None], params: Mapping[str, Any], planner: Planner) -> list[Launch]:
    (index,) = arrays
    low, high = split_bits(params["n"])
    masks = (1 << low) - 1, (1 << high) - 1
    arguments = (index, planner.run, params["n"], low, *masks, *philox.split(params["seed"]))
    return [Launch(epoch_indices, *spans(1, 8 * index.rows), arguments)]


register(Impl("epoch_indices", "cuda", launches=launch_indices))
