"""Philox4x32-10 on CUDA: in registers, by products of 32-bit words; see common/philox.py for the stream.

A counter costs 20 wide multiplications, which is less time than its eight elements take to arrive from memory.
"""

from __future__ import annotations

from fastdl.kernels.common import numba_cuda as gpu
from fastdl.kernels.common import philox

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
