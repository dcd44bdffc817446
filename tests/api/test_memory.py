"""What a model keeps of the caller's data once a call has returned: neither arrays nor what they are views of."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fastdl as fd
from fastdl import layers

ROWS, WIDTH, CLASSES = 40, 7, 3
Arrays = dict[str, np.ndarray]


def arrays() -> Arrays:
    """As the model takes them, without a copy: float32 rows that belong to a larger array, labels, weights."""
    rng = np.random.default_rng(0)
    return {
        "X": rng.standard_normal((2 * ROWS, WIDTH)).astype(np.float32),
        "y": rng.integers(0, CLASSES, 2 * ROWS),
        "weight": rng.uniform(0.5, 1, 2 * ROWS).astype(np.float32),
        "dy": np.ones((2 * ROWS, CLASSES), np.float32),
        "values": rng.uniform(0, 1, (2 * ROWS, CLASSES)).astype(np.float32),
    }


def cross_validation(net: fd.Sequential, X: np.ndarray, y: np.ndarray, **_: Any) -> None:
    for fold in range(3):
        held_out = np.arange(len(y)) % 3 == fold
        validation = (X[held_out], y[held_out])
        net.fit(X[~held_out], y[~held_out], validation_data=validation, batch_size=8, verbose=0)


USES: dict[str, Callable[..., object]] = {
    "fit": lambda net, X, y, **_: net.fit(X, y, batch_size=8, verbose=0),
    "weighted fit": lambda net, X, y, weight, **_: net.fit(X, y, batch_size=8, sample_weight=weight, verbose=0),
    "validation split": lambda net, X, y, **_: net.fit(X, y, batch_size=8, validation_split=0.5, verbose=0),
    "validation data": lambda net, X, y, weight, **_: net.fit(X, y, validation_data=(X, y, weight), verbose=0),
    "cross-validation": cross_validation,
    "one batch": lambda net, X, y, **_: net.fit(X, y, batch_size=2 * ROWS, verbose=0),
    "train_on_batch": lambda net, X, y, **_: net.train_on_batch(X, y),
    "weighted batch": lambda net, X, y, weight, **_: net.train_on_batch(X, y, weight),
    "evaluate": lambda net, X, y, **_: net.evaluate(X, y),
    "weighted evaluate": lambda net, X, y, weight, **_: net.evaluate(X, y, weight),
    "predict": lambda net, X, **_: net.predict(X),
    "predict a row": lambda net, X, **_: net.predict(X[:1]),
    "other loss": lambda net, X, values, **_: net.compile("mse", backend=net.backend).fit(X, values, verbose=0),
}


def kept(net: fd.Sequential, use: Callable[..., object], given: Callable[[Arrays], Arrays]) -> list[str]:
    """Names of the arrays that live on when the caller has forgotten them."""
    whole = arrays()
    ends = {name: weakref.ref(value) for name, value in whole.items()}
    handed = given(whole)
    use(net, **handed)
    del whole, handed
    gc.collect()
    return [name for name, end in ends.items() if end() is not None]


GIVEN: dict[str, Callable[[Arrays], Arrays]] = {
    "whole": lambda whole: whole,
    "views": lambda whole: {name: value[:ROWS] for name, value in whole.items()},
}


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_nothing_of_the_caller_is_held(backend: str, use: Callable[..., object], given: Callable[..., Arrays]) -> None:
    net = fd.Sequential([layers.Dense(5), layers.ReLU(), layers.Dense(CLASSES)], seed=1)
    net.compile("softmax_cross_entropy", "adam", backend=backend).build(WIDTH)
    for _ in range(2):  # the second call finds everything bound
        assert kept(net, use, given) == []


@pytest.mark.parametrize("rows", [ROWS, ROWS // 2, 2 * ROWS])
def test_a_loop_holds_its_last_pass_alone(rows: int, backend: str) -> None:
    """`backward` needs the rows of `forward`: they stay until the next pass, of any size, and no longer."""

    def passes(net: fd.Sequential, X: np.ndarray, dy: np.ndarray, **_: Any) -> None:
        for size in (ROWS, rows):
            net.forward(X[:size], training=True)
            net.backward(dy[:size])
            net.update()
        net.forward(np.zeros((rows, WIDTH), np.float32), training=True)

    net = fd.Sequential([layers.Dense(CLASSES)], seed=1).compile("softmax_cross_entropy", backend=backend)
    assert kept(net, passes, GIVEN["whole"]) == []


@pytest.mark.parametrize("name", ["fit", "evaluate", "train_on_batch"])
def test_nothing_is_held_after_an_error(name: str, backend: str) -> None:
    def fails(net: fd.Sequential, X: np.ndarray, y: np.ndarray, **_: Any) -> None:
        y = y.copy()
        y[-1] = CLASSES
        with pytest.raises(ValueError, match="label"):
            USES[name](net, X=X, y=y)

    net = fd.Sequential([layers.Dense(CLASSES)], seed=1).compile("softmax_cross_entropy", backend=backend).build(WIDTH)
    assert kept(net, fails, GIVEN["whole"]) == []


def test_nothing_is_held_after_a_callback_that_raises(backend: str) -> None:
    def stop(epoch: int, logs: object) -> None:
        raise RuntimeError("no more")

    def fails(net: fd.Sequential, X: np.ndarray, y: np.ndarray, **_: Any) -> None:
        with pytest.raises(RuntimeError, match="no more"):
            net.fit(X, y, callbacks=[fd.callbacks.LambdaCallback(on_epoch_end=stop)], verbose=0)

    net = fd.Sequential([layers.Dense(CLASSES)], seed=1).compile("softmax_cross_entropy", backend=backend)
    assert kept(net, fails, GIVEN["whole"]) == []


def test_a_forgotten_model_is_gone(backend: str) -> None:
    net = fd.Sequential([layers.Dense(CLASSES)], seed=1).compile("softmax_cross_entropy", backend=backend)
    given = arrays()
    for use in USES.values():
        use(net, **given)
    net.forward(given["X"], training=True)
    end = weakref.ref(net)
    del net
    gc.collect()
    assert end() is None


def test_results_are_not_held(backend: str) -> None:
    net = fd.Sequential([layers.Dense(CLASSES)], seed=1).compile("softmax_cross_entropy", backend=backend)
    given = arrays()
    results = [
        net.predict(given["X"]), net.predict(given["X"][:1]), net.forward(given["X"], training=True),
        net.backward(given["dy"]), *net.get_state().values(), *dict(net.gradients).values(),
    ]  # fmt: skip
    ends = [weakref.ref(result) for result in results]
    del results
    gc.collect()
    assert [end() for end in ends] == [None] * len(ends)
