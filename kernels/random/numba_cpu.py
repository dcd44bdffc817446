"""Random streams on Numba: the arithmetic of reference.py, value by value.

Initial values must be the same bits on every back end: all their float arithmetic stands in point functions without
fast-math flags (the flags belong to instructions, not to the loop that they are inlined into), so that LLVM fuses and
reorders nothing.
"""

from __future__ import annotations

import math

import numba
import numpy as np

from fastdl.kernels.common import philox
from fastdl.kernels.common.numba_cpu import parallel_kernel, point
from fastdl.kernels.random import reference
from fastdl.kernels.random.points import HALF, M0, M1, MASK, exact_point
from fastdl.kernels.random.points import philox4x32 as words_of
from fastdl.kernels.registry import Impl, register

#: Values of one task: some 10 us of work.
CHUNK = 1024
ROUNDS, LAYER = reference.ROUNDS, np.uint64(philox.PERMUTATION_LAYER)
TAIL = reference.TAIL
LN2_HIGH, LN2_LOW, ROOT_HALF = reference.LN2_HIGH, reference.LN2_LOW, reference.ROOT_HALF
CENTRE, TAIL_NEAR, TAIL_FAR, LOG = (
    np.array(c) for c in (reference.CENTRE, reference.TAIL_NEAR, reference.TAIL_FAR, reference.LOG)
)
UNIFORM, NORMAL, TRUNCATED = 0, 1, 2


# ------------------------------------------------------------------------------------------------ the generator
@parallel_kernel
def fill_words(counter, k0, k1, out):
    for i in numba.prange(counter.shape[0]):
        words = words_of(
            np.uint64(counter[i, 0]),
            np.uint64(counter[i, 1]),
            np.uint64(counter[i, 2]),
            np.uint64(counter[i, 3]),
            k0,
            k1,
        )
        for k in range(4):
            out[i, k] = np.uint32(words[k])


def philox4x32(counter, key, out, *, threads=1):
    """Write the random words of each counter (N, 4) under a key (2) to out (N, 4); all uint32."""
    fill_words(counter, np.uint64(key[0]), np.uint64(key[1]), out, threads=threads)


# ------------------------------------------------------------------------------------------------ the permutation
@point
def mixed(word, k0, k1):
    """Hash of a word under two key words; its low 32 bits count."""
    p = (word ^ k0) * M0
    p = ((p >> HALF) ^ (p & MASK) ^ k1) * M1
    return (p >> HALF) ^ p


@parallel_kernel
def fill_permutation(index, first, n, low, high, k0, k1, epoch):
    keys = np.empty((ROUNDS, 2), np.uint64)
    for r in range(0, ROUNDS, 2):
        words = words_of(np.uint64(r // 2), np.uint64(0), LAYER, epoch, k0, k1)
        keys[r, 0], keys[r, 1], keys[r + 1, 0], keys[r + 1, 1] = words
    low_mask, high_mask = (np.uint64(1) << low) - np.uint64(1), (np.uint64(1) << high) - np.uint64(1)
    for i in numba.prange(index.shape[0]):
        x = (first + np.uint64(i)) % n
        while True:  # walk the cycle until it comes back below n
            right, left = x & low_mask, x >> low
            for r in range(0, ROUNDS, 2):
                left ^= mixed(right, keys[r, 0], keys[r, 1]) & high_mask
                right ^= mixed(left, keys[r + 1, 0], keys[r + 1, 1]) & low_mask
            x = (left << low) | right
            if x < n:
                break
        index[i] = np.int64(x)


def epoch_indices(index, *, n, seed=0, epoch=0, offset=0, threads=1):
    """Write positions offset .. offset + N of the epoch's permutation of n to index (N); positions count modulo n."""
    low, high = reference.split_bits(n)
    k0, k1 = philox.split(seed)
    fill_permutation(index, *map(np.uint64, (offset % n, n, low, high, k0, k1, epoch)), threads=threads)


# ------------------------------------------------------------------------------------------------ initial values
@exact_point
def horner(coefficients, x):
    total = coefficients[0] * x + coefficients[1]
    for i in range(2, coefficients.shape[0]):
        total = total * x + coefficients[i]
    return total


@exact_point
def log(x):
    m, k = math.frexp(x)
    if m < ROOT_HALF:
        m, k = m + m, k - 1
    f = m - 1.0
    s = f / (f + 2.0)
    z = s * s
    half = 0.5 * f * f
    return k * LN2_HIGH - ((half - (s * (half + horner(LOG, z) * z) + k * LN2_LOW)) - f)


@exact_point
def quantile(p):
    q = p - 0.5
    if abs(q) <= 0.425:
        r = 0.180625 - q * q
        return q * horner(CENTRE[0], r) / horner(CENTRE[1], r)
    r = math.sqrt(-log(p if q < 0.0 else 1.0 - p))
    if r <= 5.0:
        value = horner(TAIL_NEAR[0], r - 1.6) / horner(TAIL_NEAR[1], r - 1.6)
    else:
        value = horner(TAIL_FAR[0], r - 5.0) / horner(TAIL_FAR[1], r - 5.0)
    return -value if q < 0.0 else value


@exact_point
def value_of(low_word, high_word, distribution, a, b):
    bits = (high_word << np.uint64(20)) | (low_word >> np.uint64(12))
    u = (np.float64(bits) + 0.5) * 2.0**-52
    if distribution == UNIFORM:
        return (b - a) * u + a
    if distribution == NORMAL:
        return b * quantile(u) + a
    z = quantile((1.0 - 2.0 * TAIL) * u + TAIL)
    return b * min(max(z, -2.0), 2.0) + a


@parallel_kernel
def fill_values(out, distribution, a, b, k0, k1, layer):
    pairs = (out.shape[0] + 1) // 2
    for task in numba.prange((pairs + CHUNK - 1) // CHUNK):
        for pair in range(task * CHUNK, min(pairs, (task + 1) * CHUNK)):
            p = np.uint64(pair)
            w0, w1, w2, w3 = words_of(p & MASK, p >> HALF, layer, np.uint64(0), k0, k1)
            out[2 * pair] = value_of(w0, w1, distribution, a, b)
            if 2 * pair + 1 < out.shape[0]:
                out[2 * pair + 1] = value_of(w2, w3, distribution, a, b)


def _fill(out, distribution, a, b, seed, layer, threads):
    k0, k1 = philox.split(seed)
    key = np.uint64(k0), np.uint64(k1), np.uint64(layer)
    fill_values(out, distribution, float(a), float(b), *key, threads=threads)


def uniform(out, *, low=0.0, high=1.0, seed=0, layer=philox.INITIAL_LAYER, threads=1):
    """Fill out (P) with low + (high - low) u."""
    _fill(out, UNIFORM, low, high, seed, layer, threads)


def normal(out, *, mean=0.0, std=1.0, seed=0, layer=philox.INITIAL_LAYER, threads=1):
    """Fill out (P) with mean + std z, z standard normal."""
    _fill(out, NORMAL, mean, std, seed, layer, threads)


def truncated_normal(out, *, mean=0.0, std=1.0, seed=0, layer=philox.INITIAL_LAYER, threads=1):
    """Fill out (P) with mean + std z, z standard normal given |z| <= 2."""
    _fill(out, TRUNCATED, mean, std, seed, layer, threads)


for _name, _function in (
    ("philox4x32", philox4x32),
    ("epoch_indices", epoch_indices),
    ("uniform", uniform),
    ("normal", normal),
    ("truncated_normal", truncated_normal),
):
    register(Impl(_name, "numba", _function))
