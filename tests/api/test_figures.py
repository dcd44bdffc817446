"""The figures that ``fit`` reports are those of ``evaluate``: at a learning rate of 0 they are equal."""

from __future__ import annotations

import numpy as np
import pytest

import fastdl as fd
from fastdl import layers

ROWS, WIDTH, OUT = 23, 5, 4


@pytest.mark.parametrize("weighted", ["no weights", "weights", "a batch of zeros"])
@pytest.mark.parametrize("loss", ["softmax_cross_entropy", "one-hot", "binary_cross_entropy", "mse"])
def test_fit_reports_what_evaluate_finds(anywhere: str, loss: str, weighted: str) -> None:
    if anywhere in ("numba", "cuda") and loss != "softmax_cross_entropy":
        pytest.skip("one loss shows the totals: the others take a minute to compile")
    rng = np.random.default_rng(3)
    X, labels = rng.standard_normal((ROWS, WIDTH)).astype(np.float32), np.arange(ROWS) % OUT
    y = {"softmax_cross_entropy": labels, "mse": rng.standard_normal((ROWS, OUT))}.get(loss, np.eye(OUT)[labels])
    weight = None
    if weighted != "no weights":
        weight = rng.random(ROWS) + 0.1
        weight[8:16] = 0 if weighted == "a batch of zeros" else weight[8:16]
    name = "softmax_cross_entropy" if loss == "one-hot" else loss
    net = fd.Sequential([layers.Dense(OUT)], seed=1).compile(name, fd.optimizers.SGD(0.0), backend=anywhere)
    history = net.fit(X, y, batch_size=8, sample_weight=weight, shuffle=False, verbose=0)
    for key, value in net.evaluate(X, y, weight).items():
        assert history[key][0] == pytest.approx(value, rel=1e-5), key


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_batch_of_zero_weights_hides_no_loss(anywhere: str) -> None:
    """Not even where its own loss is NaN."""
    rng = np.random.default_rng(3)
    X, y = rng.standard_normal((16, WIDTH)).astype(np.float32), np.arange(16) % OUT
    weight = np.r_[np.ones(8), np.zeros(8)]
    net = fd.Sequential([layers.Dense(OUT)], seed=1)
    net.compile("softmax_cross_entropy", fd.optimizers.SGD(0.0), backend=anywhere)
    want = net.evaluate(X[:8], y[:8])["loss"]
    X[12] = 3e38  # the logits overflow, the loss is NaN
    with np.errstate(over="ignore", invalid="ignore"):
        history = net.fit(X, y, batch_size=8, sample_weight=weight, shuffle=False, verbose=0)
    assert history["loss"][0] == pytest.approx(want, rel=1e-5)
