"""Nets and data of the tests that train on CUDA."""

from __future__ import annotations

import numpy as np

from fastdl import layers


def plain(count: int, width: int = 32, outputs: int = 5) -> list[layers.Layer]:
    """``count`` dense layers with ReLU between them."""
    hidden = [layer for _ in range(count - 1) for layer in (layers.Dense(width), layers.ReLU())]
    return [*hidden, layers.Dense(outputs)]


def normalised(count: int, width: int = 32, outputs: int = 5) -> list[layers.Layer]:
    """The same with batch normalisation and dropout."""
    hidden = []
    for _ in range(count - 1):
        hidden += [layers.Dense(width, use_bias=False), layers.BatchNorm(), layers.ReLU(), layers.Dropout(0.25)]
    return [*hidden, layers.Dense(outputs)]


def data(rows: int, width: int, classes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((rows, width)).astype(np.float32), rng.integers(0, classes, rows)
