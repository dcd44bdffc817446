"""Splits into training and held-out rows that depend on nothing but their arguments.

Random orders come from the raw output of PCG64, which NumPy keeps stable; the streams of ``Generator`` methods may
change from one version of NumPy to the next, and a held-out set must not.
"""

from __future__ import annotations

import numpy as np


def _order(count: int, seed: int) -> np.ndarray:
    """A random permutation: the positions of `count` random numbers in increasing order."""
    return np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")


def _check(rows: int, fraction: float) -> None:
    if rows < 2:
        raise ValueError(f"a split needs at least 2 rows, found {rows}")
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie between 0 and 1, found {fraction}")


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
    _check(rows, fraction)
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
    labels = np.asarray(labels)
    if labels.ndim != 1:
        raise ValueError(f"labels must have 1 dimension, found shape {labels.shape}")
    _check(len(labels), fraction)
    _, codes, counts = np.unique(labels, return_inverse=True, return_counts=True)
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
