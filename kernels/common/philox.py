"""Philox4x32-10 in NumPy, and the numbers that dropout derives from a rate.

The generator of every random stream of fastdl (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2,
3", SC 2011): a counter of four 32-bit words and a key of two give four random words, without state. The key is the
64-bit seed, low word first.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

M0, M1 = 0xD2511F53, 0xCD9E8D57  # multipliers
W0, W1 = 0x9E3779B9, 0xBB67AE85  # Weyl increments of the key
ROUNDS = 10
MASK = 0xFFFFFFFF

#: Third counter word of the streams that are no dropout layer (layers count from 0).
INITIAL_LAYER = 1 << 30
PERMUTATION_LAYER = 1 << 31


def split(seed: int) -> tuple[int, int]:
    """A 64-bit seed as the key's (low, high) words."""
    return seed & MASK, seed >> 32 & MASK


def block(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> tuple[np.ndarray, ...]:
    """Random words of counters given word by word; words and key broadcast against each other.

    Returns
    -------
    tuple of four uint64 ndarrays
        Values below 2^32: a product of two words needs the room, and a sum of them does not wrap by accident.
    """
    c0, c1, c2, c3, k0, k1 = (np.asarray(w, np.uint64) for w in (c0, c1, c2, c3, k0, k1))
    m0, m1, mask, half = np.uint64(M0), np.uint64(M1), np.uint64(MASK), np.uint64(32)
    for r in range(ROUNDS):
        p0, p1 = m0 * c0, m1 * c2
        c0 = (p1 >> half) ^ c1 ^ (k0 + np.uint64(r * W0) & mask)
        c2 = (p0 >> half) ^ c3 ^ (k1 + np.uint64(r * W1) & mask)
        c1, c3 = p1 & mask, p0 & mask
    return c0, c1, c2, c3


def threshold(rate: float) -> int:
    """Dropout's threshold of a rate, T = floor((1 - rate) 2^16 + 1/2): kept iff the 16-bit lane is below it.

    Raises
    ------
    ValueError
        If the rate is outside [0, 1), or so near 1 that nothing would be kept.
    """
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"rate is the probability to drop: expected 0 <= rate < 1, found {rate!r}")
    kept = math.floor((1.0 - rate) * 65536.0 + 0.5)
    if kept == 0:
        raise ValueError(
            f"rate {rate!r} drops every element: keep probabilities come in steps of 2^-16, use rate <= 0.99999"
        )
    return kept


def scale(threshold: int, dtype: Any) -> np.floating:
    """What a kept element is multiplied by: 65536 / T, the inverse of the true keep probability, rounded once."""
    return np.dtype(dtype).type(65536.0 / threshold)
