"""Twenty steps of one net on every back end: the same masks, losses within a stated distance.

Tolerance: the losses of two float32 runs part by rounding that Adam amplifies: a relative difference of 1e-7 an
operation, some hundred operations deep, times 20 steps gives about 2e-4; float64 the same at 1e-16 an operation.
"""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

import fastdl as fd
from fastdl import layers

BACKENDS = [name for name, state in fd.backends().items() if state == "available"]


def losses(backend: str, dtype: str, fuse: bool = True) -> tuple[np.ndarray, str]:
    X, y = fd.data.load_digits()
    net = fd.Sequential(
        [
            layers.Dense(64, use_bias=False), layers.BatchNorm(), layers.ReLU(), layers.Dropout(0.2),
            layers.Dense(48, use_bias=False), layers.BatchNorm(), layers.ELU(), layers.Dropout(0.1), layers.Dense(10),
        ],
        seed=3,
    )  # fmt: skip
    net.compile("softmax_cross_entropy", fd.optimizers.Adam(3e-3), backend=backend, dtype=dtype, fuse=fuse)
    found = []
    for step in range(20):
        rows = slice(step * 64, step * 64 + 64)
        found.append(net.train_on_batch(X[rows], y[rows]))
    digest = hashlib.sha256(b"".join(v.tobytes() for v in net.weights.values())).hexdigest()
    return np.array(found), digest


@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 2e-4), ("float64", 1e-10)])
def test_losses_stay_together(backend: str, dtype: str, rtol: float) -> None:
    want, _ = losses("numpy", "float64", fuse=False)
    got, _ = losses(backend, dtype)
    np.testing.assert_allclose(got, want, rtol=rtol)
    assert got[-1] < got[0] / 2


def test_the_same_run_gives_the_same_bits(backend: str) -> None:
    assert losses(backend, "float32")[1] == losses(backend, "float32")[1]


def test_masks_and_permutations_are_equal_on_every_back_end() -> None:
    for rate, width in ((0.1, 33), (0.5, 7)):
        masks = [fd.random.dropout_mask((20, width), rate, seed=3, layer=1, step=4, backend=b) for b in BACKENDS]
        orders = [fd.random.permutation(1437, seed=3, epoch=2, backend=b) for b in BACKENDS]
        for mask, order in zip(masks[1:], orders[1:], strict=True):
            np.testing.assert_array_equal(mask, masks[0])
            np.testing.assert_array_equal(order, orders[0])
