"""A net has one home. Reading never moves it, a training keeps it where it is, a context ends with its block."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import fastdl as fd
from api.nets import EXACT, X, Y, assert_equal, net, other_than
from fastdl.errors import BackendUnavailable, TrainingInProgress
from fastdl.run import placement, storage

#: Every refusal names what was expected, or what is known.
REASON = r"expected|known|built|rows"

pytestmark = pytest.mark.skipif(len(EXACT) < 2, reason="the compiled back end is not built")


def trained(backend: str = "cython") -> fd.Sequential:
    made = net(backend)
    made.fit(X, Y, batch_size=32, verbose=0)
    return made


# ---------------------------------------------------------------------------------------------- reading
READS = {
    "weights": lambda n, path: dict(n.weights),
    "names": lambda n, path: list(n.weights),
    "gradients": lambda n, path: dict(n.gradients),
    "assignment": lambda n, path: n.weights.update({"dense_0/bias": np.ones(20)}),
    "get_state": lambda n, path: n.get_state(),
    "set_state": lambda n, path: n.set_state(n.get_state()),
    "save": lambda n, path: n.save(path),
    "summary": lambda n, path: n.summary(),
    "explain": lambda n, path: n.explain(),
    "program": lambda n, path: str(n.program),
    "threads": lambda n, path: n.threads,
    "backend": lambda n, path: n.backend,
    "plan": lambda n, path: n.plan("cuda", 8),
    "copy": lambda n, path: n.__copy__(),
    "clone": lambda n, path: n.clone(),
    "predict": lambda n, path: n.predict(X),
    "evaluate": lambda n, path: n.evaluate(X, Y),
    "forward": lambda n, path: n.forward(X),
}


@pytest.mark.parametrize("read", READS)
def test_reading_never_moves_a_net(read: str, tmp_path) -> None:
    made = trained()
    home = made._runtime.placement
    with fd.backend("numpy"), contextlib.redirect_stdout(io.StringIO()):
        READS[read](made, tmp_path / "net")
    assert made._runtime.placement is home


def test_a_copy_answers_elsewhere_and_follows_the_values() -> None:
    made = trained()
    for change in (
        lambda: made.train_on_batch(X, Y),
        lambda: made.fit(X, Y, verbose=0),
        lambda: made.set_state({"dense_1/bias": np.ones(3)}),
        lambda: made.weights.update({"dense_1/bias": np.zeros(3)}),
        lambda: made.compile("softmax_cross_entropy", "sgd", backend="cython"),
    ):
        change()
        with fd.backend("numpy"):
            answers, figures = made.predict(X), made.evaluate(X, Y)
        np.testing.assert_allclose(answers, made.predict(X), rtol=1e-4, atol=1e-5)
        assert figures["loss"] == pytest.approx(made.evaluate(X, Y)["loss"], rel=1e-5)


def test_the_copy_is_kept(monkeypatch) -> None:
    made, allocated = trained(), []
    allocate = storage.Memory.allocate.__func__
    monkeypatch.setattr(
        storage.Memory, "allocate", classmethod(lambda cls, *a: allocated.append(a) or allocate(cls, *a))
    )
    for _ in range(3):
        made.train_on_batch(X, Y)
        with fd.backend("numpy"):
            made.predict(X)
    assert len(allocated) == 1


def test_context_ends_with_its_block() -> None:
    made = net("auto").build(6)
    home = made.backend
    other = other_than(home)
    with fd.backend(other):
        assert made.backend == other
        made.fit(X, Y, verbose=0)
        assert made._runtime.placement.backend == other
        assert made.backend == other
    assert made.backend == home
    made.predict(X)
    assert made._runtime.placement.backend == home


@pytest.mark.parametrize("exact", EXACT)
def test_training_in_a_context_is_training_there(exact: str) -> None:
    """Weights and moments go there and come back: one fit at home, one in the context, one at home."""
    other = other_than(exact)
    momentum = fd.optimizers.SGD(0.01, momentum=0.9)
    made, whole = net(exact, momentum), net(exact, momentum)
    for where in (exact, other, exact):
        with fd.backend(where):
            made.fit(X, Y, epochs=2, verbose=0)
    whole.fit(X, Y, epochs=6, verbose=0)
    for name, value in whole.weights.items():
        np.testing.assert_allclose(made.weights[name], value, rtol=1e-3, atol=1e-5, err_msg=name)
    assert made.step == whole.step


# ---------------------------------------------------------------------------------------------- at work
class AfterEpoch(fd.callbacks.Callback):
    def __init__(self, do) -> None:
        self.do, self.results = do, []

    def on_epoch_end(self, epoch, logs) -> None:
        with fd.backend(other_than(self.model.backend)):
            self.results.append(self.do(self.model))


@pytest.mark.parametrize("exact", EXACT)
@pytest.mark.parametrize("read", [k for k in READS if k not in ("assignment",)])
def test_nothing_that_reads_disturbs_a_training(read: str, exact: str, tmp_path) -> None:
    made, undisturbed = net(exact), net(exact)
    want = undisturbed.fit(X, Y, epochs=3, validation_data=(X, Y), verbose=0)
    with contextlib.redirect_stdout(io.StringIO()):
        spy = AfterEpoch(lambda n: READS[read](n, tmp_path / "net"))
        assert made.fit(X, Y, epochs=3, validation_data=(X, Y), callbacks=[spy], verbose=0) == want
    assert len(spy.results) == 3
    assert_equal(made, undisturbed)


@pytest.mark.parametrize("exact", EXACT)
def test_the_copy_sees_every_epoch(exact: str) -> None:
    made = net(exact)
    spy = AfterEpoch(lambda n: n.evaluate(X, Y)["loss"])
    history = made.fit(X, Y, epochs=3, validation_data=(X, Y), callbacks=[spy], verbose=0)
    assert spy.results == pytest.approx(history["val_loss"], rel=1e-4)
    assert len(set(spy.results)) == 3


MOVES = {
    "compile": lambda n: n.compile("softmax_cross_entropy", "sgd"),
    "fit": lambda n: n.fit(X, Y, verbose=0),
    "train_on_batch": lambda n: n.train_on_batch(X, Y),
    "forward": lambda n: n.forward(X, training=True),
}


@pytest.mark.parametrize("exact", EXACT)
@pytest.mark.parametrize("move", MOVES)
def test_what_would_move_a_net_at_work_is_refused(move: str, exact: str) -> None:
    def attempt(made: fd.Sequential) -> None:
        with pytest.raises(TrainingInProgress, match="this net is training"):
            MOVES[move](made)

    made, undisturbed = net(exact), net(exact)
    made.fit(X, Y, epochs=3, callbacks=[AfterEpoch(attempt)], verbose=0)
    undisturbed.fit(X, Y, epochs=3, verbose=0)
    assert_equal(made, undisturbed)
    MOVES[move](made)  # and afterwards nothing is


@pytest.mark.parametrize("exact", EXACT)
def test_a_training_inside_a_callback_counts(exact: str) -> None:
    made = net(exact)
    inner = fd.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: (made.train_on_batch(X, Y), made.fit(X, Y, 30, verbose=0))
    )
    made.fit(X, Y, 30, epochs=2, callbacks=[inner], verbose=0)
    assert made.step == 2 * (3 + 1 + 3)
    assert made.epoch == 4


@pytest.mark.parametrize("exact", EXACT)
def test_a_training_inside_a_callback_has_data_of_its_own(exact: str) -> None:
    """The inner one uses the same Program, the outer one goes on with its own rows: as the same fits in turn do."""
    other, labels = X[::-1].copy(), (Y + 1) % 3
    nested, flat = net(exact), net(exact)
    inner = fd.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: nested.fit(other, labels, 30, verbose=0))
    nested.fit(X, Y, 30, epochs=2, callbacks=[inner], verbose=0)
    for _ in range(2):
        flat.fit(X, Y, 30, verbose=0)
        flat.fit(other, labels, 30, verbose=0)
    assert_equal(nested, flat)


def test_another_thread_that_reads_names_does_not_stop_a_training() -> None:
    made, undisturbed = net("cython"), net("cython")
    done = threading.Event()

    def look() -> None:
        with fd.backend("numpy"):
            while not done.is_set():
                list(made.weights), made.backend
                made.predict(X[:3])

    made.build(6)
    reader = threading.Thread(target=look)
    reader.start()
    try:
        for _ in range(3):
            made.fit(X, Y, 8, epochs=20, verbose=0)
    finally:
        done.set()
        reader.join()
    for _ in range(3):
        undisturbed.fit(X, Y, 8, epochs=20, verbose=0)
    assert_equal(made, undisturbed)


@pytest.mark.parametrize("exact", EXACT)
def test_predict_is_answered_while_another_thread_trains(exact: str) -> None:
    made, stop = net(exact).build(6), threading.Event()

    class Until(fd.callbacks.Callback):
        def on_epoch_end(self, epoch, logs) -> None:
            self.model.stop_training = stop.is_set()

    trainer = threading.Thread(target=lambda: made.fit(X, Y, 8, epochs=10**6, callbacks=[Until()], verbose=0))
    trainer.start()
    try:
        deadline = time.monotonic() + 60
        while made.step < 50 and time.monotonic() < deadline:
            time.sleep(0.01)
        answers = [made.predict(X) for _ in range(20)]
        assert made.evaluate(X, Y)["loss"] > 0
        assert set(made.get_state()) == set(made.weights)
        assert trainer.is_alive()
    finally:
        stop.set()
        trainer.join()
    assert all(np.isfinite(a).all() for a in answers)


def test_training_calls_of_several_threads_are_all_counted() -> None:
    made = net("cython")
    team = [
        threading.Thread(target=lambda: [(made.train_on_batch(X, Y), made.fit(X, Y, 30, verbose=0)) for _ in range(10)])
        for _ in range(4)
    ]
    for thread in team:
        thread.start()
    for thread in team:
        thread.join()
    assert made.step == 4 * 10 * 4
    assert made._state.update == made.step


# ---------------------------------------------------------------------------------------------- all or nothing
def test_a_mapping_follows_the_net() -> None:
    made = trained()
    weights, gradients = made.weights, made.gradients
    made.compile("softmax_cross_entropy", "sgd", backend="cython")
    weights["dense_0/bias"] = np.full(20, 7.0)
    assert (made.weights["dense_0/bias"] == 7).all()
    with fd.backend("numpy"):
        made.fit(X, Y, verbose=0)
        for name in weights:
            np.testing.assert_array_equal(weights[name], made.weights[name])
        for name in gradients:
            np.testing.assert_array_equal(gradients[name], made.gradients[name])
    with pytest.raises(TypeError, match="read-only"):
        gradients["dense_0/bias"] = np.zeros(20)


@pytest.mark.parametrize("exact", EXACT)
def test_compile_that_raises_changes_nothing(exact: str, monkeypatch) -> None:
    made, undisturbed = net(exact), net(exact)
    for n in (made, undisturbed):
        n.fit(X, Y, verbose=0)
    unavailable = next((name for name, state in fd.backends().items() if state != "available"), None)
    for arguments in ({"optimizer": "lion"}, {"loss": "hinge"}, {"dtype": "float64"}, {"backend": "tpu"}):
        with pytest.raises(ValueError, match=REASON):
            made.compile(**{"loss": "softmax_cross_entropy", "optimizer": "sgd", **arguments})
    if unavailable is not None:
        with pytest.raises(BackendUnavailable):
            made.compile("softmax_cross_entropy", "sgd", backend=unavailable)
        with fd.backend(unavailable), pytest.raises(BackendUnavailable):
            made.fit(X, Y, verbose=0)

    def no_memory(*_: object) -> None:
        raise MemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(placement.Memory, "allocate", no_memory)
        with pytest.raises(MemoryError):
            made.compile("softmax_cross_entropy", "sgd", backend=exact)
    assert made.optimizer == undisturbed.optimizer
    for n in (made, undisturbed):
        n.fit(X, Y, epochs=2, verbose=0)
    assert_equal(made, undisturbed)


BAD_FITS = {
    "labels": {"y": Y + 7},
    "rows": {"y": Y[:5]},
    "weights": {"sample_weight": -np.ones(90)},
    "validation": {"validation_data": (X, Y + 7)},
    "validation width": {"validation_data": (X[:, :4], Y)},
    "split": {"validation_split": 0.001},
    "batch": {"batch_size": 0},
}


@pytest.mark.parametrize("bad", BAD_FITS)
def test_a_first_fit_that_raises_builds_nothing(bad: str) -> None:
    made = net()
    with pytest.raises(ValueError, match=REASON):
        made.fit(**{"X": X, "y": Y, "verbose": 0, **BAD_FITS[bad]})
    made.fit(X[:, :4], Y, verbose=0)  # of another width
    assert made.weights["dense_0/kernel"].shape == (4, 20)


@pytest.mark.parametrize("call", ["train_on_batch", "evaluate"])
def test_a_first_call_that_raises_builds_nothing(call: str) -> None:
    made = net()
    with pytest.raises(ValueError, match=REASON):
        getattr(made, call)(X, Y + 7)
    assert made.predict(X[:, :4]).shape == (90, 3)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("dense_1/kernel", np.zeros((9, 9)), ValueError),
        ("dense_9/kernel", np.zeros((3, 2)), KeyError),
        ("dense_1/kernel", "x", TypeError),
        ("dense_1/kernel", None, TypeError),
        ("dense_1/bias", np.array([0, 1e300, 0]), ValueError),
        ("dense_1/bias", np.ma.masked_array([1.0, 2, 3], [0, 1, 0]), TypeError),
    ],
)
def test_set_state_is_all_or_nothing(name: str, value: object, error: type[Exception]) -> None:
    made = trained()
    before = made.get_state()
    with pytest.raises(error, match="dense"):
        made.set_state({"dense_0/kernel": np.zeros((6, 20)), name: value})
    for key, old in before.items():
        np.testing.assert_array_equal(made.weights[key], old)


FORK = """
import os, signal, sys, threading, time
import numpy as np
import fastdl as fd
from fastdl import layers
X, y = np.random.default_rng(0).standard_normal((400, 20)).astype("f4"), np.arange(400) % 3
net = fd.Sequential([layers.Dense(64), layers.ReLU(), layers.Dropout(0.1), layers.Dense(3)])
net.compile("softmax_cross_entropy", backend=sys.argv[1], threads=2).build(20)
done = []

class Until(fd.callbacks.Callback):
    def on_epoch_end(self, epoch, logs):
        self.model.stop_training = bool(done)

trainer = threading.Thread(target=lambda: net.fit(X, y, 16, epochs=10**6, callbacks=[Until()], verbose=0))
trainer.start()
while net.step < 20:
    time.sleep(0.01)
children = []
for _ in range(8):
    time.sleep(0.013)
    pid = os.fork()
    if not pid:
        signal.alarm(60)  # a child that hangs is killed
        net.predict(X[:10]), net.evaluate(X, y), net.get_state(), net.explain()
        net.compile("softmax_cross_entropy", backend=sys.argv[1])
        net.fit(X, y, 16, verbose=0)
        os._exit(0)
    children.append(pid)
codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
done.append(True)
trainer.join()
print(codes)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
@pytest.mark.parametrize("exact", EXACT)
def test_a_child_forked_while_another_thread_trains_uses_the_net(exact: str) -> None:
    """Its locks are fresh: the thread that held them is not there. Nothing trains in it."""
    run = subprocess.run([sys.executable, "-c", FORK, exact], capture_output=True, text=True, timeout=200)
    assert run.stdout.strip() == str([0] * 8), run.stderr
