"""Signals, finalizers and second interrupts at any moment: what they raise comes out, and the net is whole."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

import fastdl as fd
from api.nets import EXACT, X, Y, assert_equal, net
from fastdl import layers
from fastdl.errors import NetAtWork

pytestmark = [
    pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this platform has no timers that signal"),
    pytest.mark.timeout(300, method="thread"),  # the timer is the tests' own
]


class Alarm(Exception):
    pass


@pytest.fixture
def alarm():
    """``alarm(seconds, do, every)``: the handler runs ``do``, which raises `Alarm` if not given; ends with the test."""

    def ring(*_: object) -> None:
        raise Alarm

    def start(seconds: float, do=None, every: float = 0.0) -> None:
        signal.signal(signal.SIGALRM, (lambda *_: do()) if do is not None else ring)
        signal.setitimer(signal.ITIMER_REAL, seconds, every)

    before = signal.getsignal(signal.SIGALRM)
    with np.errstate():  # NumPy's own is left as it is where a signal arrives inside of its end
        yield start
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def free(made: fd.Sequential) -> bool:
    """Whether another thread gets at the net."""
    reader = threading.Thread(target=lambda: (made.get_state(), made.predict(X)), daemon=True)
    reader.start()
    reader.join(20)
    return not reader.is_alive()


def for_ever(do) -> None:
    while True:
        do()


CALLS = {
    "weights": lambda n: n.weights["dense_0/kernel"],
    "set_state": lambda n: n.set_state(n.get_state()),
    "predict": lambda n: n.predict(np.tile(X, (5, 1))),
    "evaluate": lambda n: n.evaluate(X, Y),
    "train_on_batch": lambda n: n.train_on_batch(X, Y),
    "weighted batch": lambda n: n.train_on_batch(X, Y, np.ones(90)),
    "loop": lambda n: (n.forward(X, training=True), n.backward(np.ones((90, 3))), n.update()),
    "fit": lambda n: n.fit(X, Y, 8, epochs=3, validation_data=(X, Y), verbose=0),
    "copy": lambda n: n.__copy__(),
}


@pytest.mark.parametrize("exact", EXACT)
@pytest.mark.parametrize("call", CALLS)
def test_an_interrupt_at_any_moment_leaves_no_lock_held(call: str, exact: str, alarm) -> None:
    made = net(exact).build(6)
    CALLS[call](made)
    for k in range(60):
        alarm(2e-4 + 3.7e-5 * k, every=0.1)  # again, as what is raised inside a finalizer is lost
        with pytest.raises(Alarm):
            for_ever(lambda: CALLS[call](made))
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert (made._locks.depth, made._locks.at_work) == (0, False)
    assert free(made)
    made.compile("softmax_cross_entropy", "sgd", backend=exact)
    made.fit(X, Y, verbose=0)


@pytest.mark.skipif("cython" not in EXACT, reason="the compiled back end is not built")
@pytest.mark.parametrize("weighted", [False, True])
def test_a_step_that_is_done_is_counted(weighted: bool, alarm) -> None:
    """An interrupt is raised as soon as the engine returns."""
    rng = np.random.default_rng(0)
    data, labels = rng.standard_normal((1000, 256)).astype(np.float32), np.arange(1000) % 3
    made = fd.Sequential([layers.Dense(512), layers.Dense(3)]).compile(
        "softmax_cross_entropy", "sgd", backend="cython", threads=1
    )
    weight = np.ones(1000) if weighted else None
    made.train_on_batch(data, labels, weight)
    interrupted = 0
    for _ in range(20):
        before, step = made.weights["dense_1/bias"], made.step
        alarm(5e-4)
        try:
            made.train_on_batch(data, labels, weight)
        except Alarm:
            interrupted += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
        moved = not np.array_equal(before, made.weights["dense_1/bias"])
        assert made.step - step == int(moved)
        assert made._state.update == made.step
    assert interrupted > 0


@pytest.mark.parametrize("exact", EXACT)
@pytest.mark.parametrize("inner", ["predict", "evaluate", "train_on_batch", "fit", "copy"])
def test_a_handler_in_the_middle_of_a_call_is_refused_or_answered(inner: str, exact: str, alarm) -> None:
    """Never with arrays of the call that it interrupts: what comes out is right, inside and outside."""
    made = net(exact).build(6)
    many = np.tile(X, (7, 1))
    want, few = made.predict(many), made.predict(X[:50])
    figures = made.evaluate(X, Y)
    answers: list[object] = []

    def call() -> None:
        try:
            if inner == "predict":
                answers.append(np.array_equal(made.predict(X[:50]), few))
            elif inner == "evaluate":
                answers.append(made.evaluate(X, Y) == figures)
            elif inner == "copy":
                answers.append(np.array_equal(made.__copy__().predict(X[:50]), few))
            else:
                made.lr = 0.0
                CALLS[inner](made)
                answers.append(True)
        except NetAtWork:
            answers.append(None)
        signal.setitimer(signal.ITIMER_REAL, 1.3e-3)

    alarm(2e-4, call)
    for _ in range(150):
        got = made.predict(many)
        if inner in ("predict", "evaluate", "copy"):
            np.testing.assert_array_equal(got, want)
            assert made.evaluate(X, Y) == figures
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert answers
    assert False not in answers


@pytest.mark.parametrize("exact", EXACT)
def test_trainings_of_a_handler_are_refused_in_the_middle_of_a_slice(exact: str, alarm) -> None:
    """Those that run are counted."""
    made, ran = net(exact), []

    def call() -> None:
        try:
            made.train_on_batch(X, Y)
            ran.append(1)
        except NetAtWork:
            ran.append(0)
        signal.setitimer(signal.ITIMER_REAL, 5e-3)

    made.build(6)
    alarm(2e-3, call)
    made.fit(np.tile(X, (20, 1)), np.tile(Y, 20), 4, epochs=6, verbose=0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert ran
    assert made.step == 6 * 450 + sum(ran)


TWICE = """
import os, threading, time
import numpy as np
import fastdl as fd
from fastdl import layers
X, y = np.random.default_rng(0).standard_normal((90, 6)).astype("f4"), np.arange(90) % 3
wide = np.zeros((400_000, 6), "f4")
for wait in (0.004, 0.02, 0.05):
    net = fd.Sequential([layers.Dense(20), layers.Dense(3)]).compile("softmax_cross_entropy", backend="cython").build(6)
    stop = []
    other = threading.Thread(target=lambda: [net.predict(wide) for _ in iter(lambda: len(stop), 1)])
    other.start()
    def keys():
        time.sleep(0.3)
        os.kill(os.getpid(), 2)
        time.sleep(wait)
        os.kill(os.getpid(), 2)
    pressed = threading.Thread(target=keys)
    pressed.start()
    try:
        try:
            net.fit(X, y, 1, epochs=10**6, verbose=0)
        except KeyboardInterrupt:
            pressed.join()
            time.sleep(0.2)
    except KeyboardInterrupt:
        pressed.join()
    stop.append(1)
    other.join()
    net.compile("softmax_cross_entropy")
    net.fit(X, y, verbose=0)
    print("trains on")
"""


@pytest.mark.skipif("cython" not in EXACT, reason="the compiled back end is not built")
def test_two_interrupts_and_a_thread_that_predicts() -> None:
    """The first comes out as what it is; after the second nothing is left under way."""
    run = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, timeout=200)
    assert run.stdout.split("\n")[:3] == ["trains on"] * 3, run.stderr


@pytest.mark.parametrize("exact", EXACT)
def test_a_training_inside_a_callback_has_a_stop_of_its_own(exact: str) -> None:
    made = net(exact)
    inner = fd.callbacks.LambdaCallback(on_epoch_end=lambda e, logs: setattr(made, "stop_training", True))
    outer = fd.callbacks.LambdaCallback(on_epoch_end=lambda e, logs: made.fit(X, Y, 5, callbacks=[inner], verbose=0))
    assert len(made.fit(X, Y, epochs=4, callbacks=[outer], verbose=0)["loss"]) == 4
    asked = fd.callbacks.LambdaCallback(on_epoch_end=lambda e, logs: setattr(made, "stop_training", True))
    plain = fd.callbacks.LambdaCallback(on_epoch_end=lambda e, logs: made.fit(X, Y, verbose=0))
    assert len(made.fit(X, Y, epochs=4, callbacks=[asked, plain], verbose=0)["loss"]) == 1


@pytest.mark.parametrize("exact", EXACT)
def test_a_counter_is_not_assigned_while_another_thread_trains(exact: str) -> None:
    made, stop = net(exact).build(6), threading.Event()
    until = fd.callbacks.LambdaCallback(on_epoch_end=lambda e, logs: setattr(made, "stop_training", stop.is_set()))
    trainer = threading.Thread(target=lambda: made.fit(X, Y, epochs=10**6, callbacks=[until], verbose=0))
    trainer.start()
    try:
        while not made.step:
            pass
        for quantity in ("step", "epoch"):
            with pytest.raises(fd.errors.TrainingInProgress, match=quantity):
                setattr(made, quantity, 5)
    finally:
        stop.set()
        trainer.join()
    made.step = 5
    assert made.step == 5


@pytest.mark.parametrize("exact", EXACT)
def test_counters_go_round(exact: str, tmp_path) -> None:
    """The last step is followed by the first; a net at the end can be saved and loaded."""
    made, other = net(exact), net(exact)
    made.build(6)
    made.step = made.epoch = 2**32 - 1
    made.fit(X, Y, 30, epochs=1, verbose=0)
    made.train_on_batch(X, Y)
    assert (made.step, made.epoch) == (3, 0)
    made.save(tmp_path / "net")
    assert_equal(fd.load(tmp_path / "net", backend=exact), made)
    made._state.update = other.build(6)._state.update = 2**32 - 2
    made.fit(X, Y, 10, verbose=0)
    assert made._state.update == 2**32 - 1
