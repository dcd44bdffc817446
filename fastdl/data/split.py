"""Splits into training and held-out rows that depend on nothing but their arguments.

Random orders come from the raw output of PCG64, which NumPy keeps stable; the streams of ``Generator`` methods may
change from one version of NumPy to the next, and a held-out set must not.
"""

from __future__ import annotations

import math

import numpy as np

from fastdl import checks
from fastdl.inputs import whole_number


def _order(count: int, seed: int) -> np.ndarray:
    """A random permutation: the positions of `count` random numbers in increasing order."""
    return np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")


#: Neither part may be empty.
SHARE = checks.Range("a share of the rows, between 0 and 1", math.ulp(0.0), 1.0)


def _checked(rows: int, fraction: float, seed: int) -> tuple[int, float, int]:
    return whole_number(rows, "rows", 2), SHARE.check(fraction, "fraction"), checks.whole(seed, "seed", 64)


def random_split(rows: int, fraction: float = 0.2, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Sorted row numbers (training, held out); ``round(rows * fraction)`` rows are held out, at least 1.

    Parameters
    ----------
    rows : int
    fraction : float
        Share of the rows to hold out.
    seed : int
        Seed of the split, to be kept apart from the seed of the training.
    """
    rows, fraction, seed = _checked(rows, fraction, seed)
    held = min(max(round(rows * fraction), 1), rows - 1)
    order = _order(rows, seed)
    return np.sort(order[held:]), np.sort(order[:held])


def stratified_split(labels: np.ndarray, fraction: float = 0.2, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Like `random_split`, with each class in both parts in its own proportion.

    A class's share is rounded so that the total is that of `random_split` where the classes allow it; every class keeps
    at least one row for training, so a class of one row is never held out.

    Parameters
    ----------
    labels : (N,) array
        Class of each row, of any dtype that ``np.unique`` sorts.
    """
    try:
        labels = np.asarray(labels)
        _, codes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"labels: expected classes of one type, one per row, which NumPy cannot sort: {error}"
        ) from error
    if labels.ndim != 1:
        raise ValueError(f"labels: expected one class per row, (N,), found shape {labels.shape}")
    _, fraction, seed = _checked(len(labels), fraction, seed)
    exact = counts * fraction
    held = np.floor(exact).astype(np.int64)
    # the classes with the largest remainders take the rows that rounding down left over
    left = max(round(len(labels) * fraction), 1) - int(held.sum())
    held[np.argsort(held - exact, kind="stable")[: max(left, 0)]] += 1
    held = np.minimum(held, counts - 1)

    order = _order(len(labels), seed)
    by_class = order[np.argsort(codes[order], kind="stable")]
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    is_held = rank < np.repeat(held, counts)
    return np.sort(by_class[~is_held]), np.sort(by_class[is_held])
