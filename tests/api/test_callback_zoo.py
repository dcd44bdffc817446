"""Callbacks that misbehave: what they raise comes out, every callback that has begun ends, the net trains on."""

from __future__ import annotations

import signal

import numpy as np
import pytest

import fastdl as fd
from api.nets import EXACT, X, Y, assert_equal, net
from fastdl.callbacks import Callback

METHODS = ("on_train_begin", "on_epoch_begin", "on_epoch_end", "on_train_end")


class Misbehaved(Exception):
    pass


class Recorder(Callback):
    """Notes what is called, and raises where it is told to."""

    def __init__(self, log: list[str], name: str, raises: str = "") -> None:
        self.log, self.name, self.raises = log, name, raises

    def _note(self, method: str) -> None:
        self.log.append(f"{self.name}.{method}")
        if method == self.raises:
            raise Misbehaved(method)

    def on_train_begin(self) -> None:
        self._note("on_train_begin")

    def on_epoch_begin(self, epoch: int) -> None:
        self._note("on_epoch_begin")

    def on_epoch_end(self, epoch: int, logs: object) -> None:
        self._note("on_epoch_end")

    def on_train_end(self) -> None:
        self._note("on_train_end")


@pytest.mark.parametrize("exact", EXACT)
@pytest.mark.parametrize("method", METHODS)
def test_what_a_callback_raises_comes_out_and_the_others_end(method: str, exact: str) -> None:
    log: list[str] = []
    made = net(exact)
    team = [Recorder(log, "a"), Recorder(log, "b", method), Recorder(log, "c")]
    with pytest.raises(Misbehaved, match=method):
        made.fit(X, Y, epochs=2, callbacks=team, verbose=0)
    begun = [entry.partition(".")[0] for entry in log if entry.endswith("on_train_begin")]
    if method == "on_train_begin":
        begun.remove("b")  # it never began
    assert [entry.partition(".")[0] for entry in log if entry.endswith("on_train_end")] == begun
    assert begun == (["a"] if method == "on_train_begin" else ["a", "b", "c"])
    step = made.step
    made.fit(X, Y, 32, verbose=0)
    assert made.step == step + 3
    made.compile("softmax_cross_entropy", "sgd", backend=exact)  # nothing is under way any more


@pytest.mark.parametrize("exact", EXACT)
def test_two_callbacks_that_raise_at_the_end_both_run(exact: str) -> None:
    log: list[str] = []
    team = [Recorder(log, name, "on_train_end") for name in "abc"]
    with pytest.raises(Misbehaved):
        net(exact).fit(X, Y, callbacks=team, verbose=0)
    assert [entry for entry in log if entry.endswith("on_train_end")] == [f"{n}.on_train_end" for n in "abc"]


def _zoo(made: fd.Sequential) -> dict[str, object]:
    other = "numpy" if made.backend != "numpy" else "cython"

    def elsewhere(call):
        with fd.backend(other):
            return call()

    return {
        "evaluate": lambda: made.evaluate(X, Y),
        "evaluate elsewhere": lambda: elsewhere(lambda: made.evaluate(X, Y)),
        "predict of many sizes": lambda: [made.predict(X[:rows]) for rows in range(1, 13)],
        "predict elsewhere of many sizes": lambda: elsewhere(lambda: [made.predict(X[:r]) for r in range(1, 13)]),
        "weights": lambda: dict(made.weights),
        "a copy that trains": lambda: made.__copy__().fit(X, Y, verbose=0),
        "another net that trains": lambda: net().fit(X, Y, verbose=0),
        "a net that trains elsewhere": lambda: elsewhere(lambda: net().fit(X, Y, verbose=0)),
        "forward": lambda: made.forward(X),
        "summary": lambda: repr(made) + made.explain() + str(made.program),
    }


@pytest.mark.parametrize("exact", EXACT)
def test_what_a_callback_looks_at_changes_nothing(exact: str) -> None:
    undisturbed = net(exact)
    want = undisturbed.fit(X, Y, epochs=2, validation_data=(X, Y), verbose=0)
    for name in _zoo(undisturbed):
        made = net(exact)
        look = fd.callbacks.LambdaCallback(on_epoch_end=lambda e, logs, made=made, name=name: _zoo(made)[name]())
        assert made.fit(X, Y, epochs=2, validation_data=(X, Y), callbacks=[look], verbose=0) == want, name
        assert_equal(made, undisturbed)


@pytest.mark.parametrize("exact", EXACT)
def test_weights_that_a_callback_assigns_are_trained_on(exact: str) -> None:
    made = net(exact)
    reset = fd.callbacks.LambdaCallback(
        on_epoch_begin=lambda e: made.set_state({k: np.zeros_like(v) for k, v in made.weights.items()})
    )
    made.fit(X, Y, epochs=2, callbacks=[reset], verbose=0)
    assert all(np.abs(made.weights["dense_1/bias"]) > 0)


@pytest.mark.parametrize("exact", EXACT)
def test_a_signal_in_the_middle_of_a_training_comes_out(exact: str) -> None:
    def ring(*_: object) -> None:
        raise Misbehaved("alarm")

    made = net(exact)
    before = signal.signal(signal.SIGALRM, ring)
    try:
        for delay in (0.02, 0.11, 0.25):
            signal.setitimer(signal.ITIMER_REAL, delay)
            with pytest.raises(Misbehaved, match="alarm"):
                made.fit(X, Y, 1, epochs=100_000, verbose=0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    step = made.step
    assert step > 0
    made.fit(X, Y, 30, verbose=0)
    assert made.step == step + 3
    made.compile("softmax_cross_entropy", "sgd", backend=exact)
