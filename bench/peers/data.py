"""Inputs that every side gets: the same bits for the same arguments."""

from __future__ import annotations

import numpy as np

from bench.cases import Net

#: Probability to drop in the operator cases.
RATE = 0.5


def normal(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def labels(count: int, classes: int) -> np.ndarray:
    return np.random.default_rng(2).integers(0, classes, count)


def batch(net: Net, steps: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Rows and labels of some steps."""
    count = net.batch * steps
    return normal(count, net.widths[0]), labels(count, net.widths[-1])
