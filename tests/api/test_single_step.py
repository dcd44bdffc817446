"""`train_on_batch`: the quick way in for plain arrays, and everything that must not go through it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import fastdl as fd
from fastdl import layers

CYTHON = fd.backends()["cython"]
pytestmark = pytest.mark.skipif(CYTHON != "available", reason=f"compiled back end: {CYTHON}")
RNG = np.random.default_rng(5)
X = RNG.standard_normal((40, 7)).astype(np.float32)
Y = RNG.integers(0, 3, 40)


def net(dtype: str = "float32", **settings: object) -> fd.Sequential:
    model = fd.Sequential([layers.Dense(9), layers.BatchNorm(), layers.ReLU(), layers.Dropout(0.3), layers.Dense(3)], 3)
    return model.compile("softmax_cross_entropy", "adam", backend="cython", dtype=dtype, **settings)


def engine_only(model: fd.Sequential, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on a batch that needs Python's checks is an error."""
    monkeypatch.setattr(model, "_inputs", lambda *_: pytest.fail("the slow way was taken"))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_quick_steps_equal_slow_ones(dtype: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    quick, slow = net(dtype, threads=threads), net(dtype, threads=threads)
    x = X.astype(dtype)
    losses = [quick.train_on_batch(x, Y)]
    engine_only(quick, monkeypatch)
    losses += [quick.train_on_batch(x[:rows].copy(), Y[:rows].copy()) for rows in (40, 1, 17, 40)]
    want = [slow.train_on_batch(x[:rows].tolist(), Y[:rows].tolist()) for rows in (40, 40, 1, 17, 40)]
    assert losses == want
    assert quick.step == slow.step == 5
    for name, value in slow.weights.items():
        np.testing.assert_array_equal(quick.weights[name], value)


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (X[:, ::-1], Y),  # not in rows
        (X.astype(np.float64), Y),
        (X, Y.astype(np.int32)),
        (np.asfortranarray(X), Y),
        (np.repeat(X, 2, axis=0), np.repeat(Y, 2)),  # more rows than the Program holds
        (X, np.repeat(Y, 2)[::2]),
    ],
    ids=["reversed", "float64", "int32", "fortran", "rows", "strided"],
)
def test_other_batches_are_converted(x: np.ndarray, y: np.ndarray) -> None:
    quick, slow = net(), net()
    quick.train_on_batch(X, Y)
    slow.train_on_batch(X.tolist(), Y.tolist())
    assert quick.train_on_batch(x, y) == slow.train_on_batch(x.tolist(), y.tolist())


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (X, Y + 3, "labels in"),
        (X, Y - 1, "labels in"),
        (X[:, :6].copy(), Y, "features"),
        (X[:39].copy(), Y, "rows"),
        (X[:0], Y[:0], "at least one row"),
        (X[0], Y[:1], "shape"),
    ],
    ids=["large", "negative", "narrow", "counts", "empty", "vector"],
)
def test_bad_batches_raise_as_ever(x: np.ndarray, y: np.ndarray, message: str) -> None:
    model = net()
    model.train_on_batch(X, Y)
    before = model.get_state()
    with pytest.raises(ValueError, match=message):
        model.train_on_batch(x, y)
    assert model.step == 1
    for name, value in model.weights.items():
        np.testing.assert_array_equal(before[name], value)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.compile("softmax_cross_entropy", "sgd", backend="cython"),
        lambda model: model.weights.__setitem__("dense_1/bias", np.ones(3, np.float32)),
        lambda model: setattr(model, "lr", 0.1),
        lambda model: model.fit(X, Y, batch_size=16, epochs=1, verbose=0),
        lambda model: model.train_on_batch(X, Y, sample_weight=np.arange(40)),
    ],
    ids=["compile", "weights", "lr", "fit", "weighted"],
)
def test_changes_between_steps_are_seen(change: Callable[[fd.Sequential], object]) -> None:
    models = net(), net()
    for model, (x, y) in zip(models, ((X, Y), (X.tolist(), Y.tolist())), strict=True):
        model.train_on_batch(x, y)
        change(model)
    losses = models[0].train_on_batch(X, Y), models[1].train_on_batch(X.tolist(), Y.tolist())
    assert losses[0] == losses[1]
    for name, value in models[1].weights.items():
        np.testing.assert_array_equal(models[0].weights[name], value)


def test_the_context_still_names_the_back_end() -> None:
    model = fd.Sequential([layers.Dense(3)], seed=1).compile("softmax_cross_entropy", "sgd")
    model.train_on_batch(X, Y)
    with fd.backend("numpy"):
        model.train_on_batch(X, Y)
        assert model.backend == "numpy"
