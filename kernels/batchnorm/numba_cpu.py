"""Batch normalisation on Numba: one task is some columns of all rows, so that no thread shares a sum.

See reference.py for the formulas and README.md for the derivation. A task walks its columns row by row: statistics,
then normalise, activate and drop a row while it is in L1; backward forms dz in dx, adds it up, and finishes dx in a second
sweep. Sums add 4 rows at a time in the input's dtype, 256 rows of them, then go to a float64 total.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from fastdl.kernels.common import philox
from fastdl.kernels.common.numba_cpu import FASTMATH, parallel_kernel, set_threads
from fastdl.kernels.random.points import MASK, philox4x32
from fastdl.kernels.registry import Impl, register

#: Columns of a task, a multiple of 8 (Philox draws 8 columns): 512 bytes of a row, eight counters at a time.
WIDTH = 128
#: Rows that add up in the input's dtype before they go to a float64 total.
SPAN = 256
#: As in reference.py: |mean| * inv_std from which the rounding of the stored mean is put back.
LOOSE = 16.0
#: Squared distance, in variances, from which the shift of the statistics is chosen again.
FAR = 4.0

helper = numba.njit(error_model="numpy", fastmath=FASTMATH, forceinline=True)


# ------------------------------------------------------------------------------------------------ statistics
@helper
def _moments(x, first, w, shift, p1, p2, s1, s2):
    """s1, s2 = sums over the rows of x - shift and of its square."""
    rows = x.shape[0]
    s1[:], s2[:] = 0.0, 0.0
    for r0 in range(0, rows, SPAN):
        r1 = min(rows, r0 + SPAN)
        p1[:], p2[:] = 0, 0
        whole = r0 + (r1 - r0) // 4 * 4
        for r in range(r0, whole, 4):
            for c in range(w):
                a, b = x[r, first + c] - shift[c], x[r + 1, first + c] - shift[c]
                d, e = x[r + 2, first + c] - shift[c], x[r + 3, first + c] - shift[c]
                p1[c] += (a + b) + (d + e)
                p2[c] += (a * a + b * b) + (d * d + e * e)
        for r in range(whole, r1):
            for c in range(w):
                a = x[r, first + c] - shift[c]
                p1[c] += a
                p2[c] += a * a
        for c in range(w):
            s1[c] += p1[c]
            s2[c] += p2[c]


@helper
def _statistics(x, first, w, mean, var):
    """Mean and biased variance of a task's columns in float64: one pass shifted by the mean of the first rows, and a
    second one, shifted by the mean, where the first shift was more than two deviations off."""
    rows = x.shape[0]
    some = min(rows, 8)
    shift, p1, p2 = np.empty(w, x.dtype), np.empty(w, x.dtype), np.empty(w, x.dtype)
    s1 = np.empty(w)
    for c in range(w):
        total = x.dtype.type(0)
        for r in range(some):
            total += x[r, first + c] / x.dtype.type(some)
        shift[c] = total if np.isfinite(total) else x.dtype.type(0)
    for _ in range(2):
        _moments(x, first, w, shift, p1, p2, s1, var)
        again = False
        for c in range(w):
            d = s1[c] / rows
            v = var[c] / rows - d * d
            mean[c] = shift[c] + d
            var[c] = 0.0 if v < 0.0 else v
            if d * d > FAR * var[c]:
                shift[c] = mean[c]
                again = True
        if not again:
            break


@helper
def _is_loose(mean, inv_std):
    return abs(mean * inv_std) > LOOSE


@helper
def _affine(gamma, beta, mean, inv_std, exact, first, w, middle, gain, shift, rest):
    """u = (x - middle) gain + shift, the same forward and backward; rest = what the stored mean has lost by rounding."""
    for c in range(w):
        middle[c] = mean[c]
        gain[c] = gamma[first + c] * inv_std[c]
        lost = exact[c] - mean[c]
        rest[c] = lost if _is_loose(mean[c], inv_std[c]) else 0.0
        shift[c] = np.float64(beta[first + c]) - np.float64(rest[c]) * np.float64(gain[c])


# ------------------------------------------------------------------------------------------------ rows of a task
@helper
def _draw(words, blocks, first_block, row, layer, step, k0, k1):
    """The row's random words of a task's columns, four a block of eight columns."""
    for b in range(blocks):
        w0, w1, w2, w3 = philox4x32(first_block + np.uint64(b), row, layer, step, k0, k1)
        words[4 * b] = np.uint32(w0)
        words[4 * b + 1] = np.uint32(w1)
        words[4 * b + 2] = np.uint32(w2)
        words[4 * b + 3] = np.uint32(w3)


@helper
def _normalise(x, r, first, w, middle, gain, shift, u):
    for c in range(w):
        u[c] = (x[r, first + c] - middle[c]) * gain[c] + shift[c]


@helper
def _forward_row(x, r, first, w, middle, gain, shift, kind, a, drop, last, scale, lanes, y):
    out = y[r, first : first + w]
    _normalise(x, r, first, w, middle, gain, shift, out)
    activate(kind, out, a)
    if drop:
        for c in range(w):
            out[c] = out[c] * scale if lanes[c] <= last else y.dtype.type(0)
