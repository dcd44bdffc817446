"""Philox4x32-10 as a Numba point function; words are uint64 below 2^32, so that their products are exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from fastdl.kernels.common import philox
from fastdl.kernels.common.numba_cpu import FASTMATH

M0, M1 = np.uint64(philox.M0), np.uint64(philox.M1)
W0, W1 = np.uint64(philox.W0), np.uint64(philox.W1)
MASK = np.uint64(philox.MASK)
HALF = np.uint64(32)
ROUNDS = philox.ROUNDS


def exact_point(function: Callable[..., Any]) -> Any:
    """A point function whose float operations are each rounded on their own.

    Fast-math is switched off by name: left out, Numba takes it from the kernel that calls.
    """
    return numba.njit(error_model="numpy", fastmath=False)(function)


# Ten rounds are past LLVM's inlining threshold, and a loop with a call in it is not vectorised: 1.1 ns an element of a
# dropout mask by calls, 0.15 inlined. Integers alone, so that fast-math flags change nothing.
@numba.njit(error_model="numpy", fastmath=FASTMATH, forceinline=True)
def philox4x32(c0, c1, c2, c3, k0, k1):
    """The four random words of a counter; all six arguments and the results are uint64 below 2^32."""
    for _ in range(ROUNDS):
        p0, p1 = M0 * c0, M1 * c2
        c0, c2 = (p1 >> HALF) ^ c1 ^ k0, (p0 >> HALF) ^ c3 ^ k1
        c1, c3 = p1 & MASK, p0 & MASK
        k0, k1 = (k0 + W0) & MASK, (k1 + W1) & MASK
    return c0, c1, c2, c3
