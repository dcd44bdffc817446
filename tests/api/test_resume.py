"""A file brings back what training needs: load-and-continue equals uninterrupted, bit for bit."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest

import fastdl as fd
from api.nets import BACKENDS, EXACT, X, Y, assert_equal, net
from fastdl import layers, optimizers
from fastdl.errors import BackendUnavailable, ModelFileError
from fastdl.kernels import dispatch
from fastdl.run import checkpoint

OPTIMIZERS = {
    "sgd": optimizers.SGD(0.05),
    "momentum": optimizers.SGD(0.05, momentum=0.9, nesterov=True, l2=1e-3),
    "adam": optimizers.Adam(1e-2, clip_norm=0.5),
    "adamw": optimizers.AdamW(1e-2),
}


def batches(made: fd.Sequential, first: int, last: int) -> None:
    for k in range(first, last):
        rows = slice(k % 3 * 30, k % 3 * 30 + 30)
        made.train_on_batch(X[rows], Y[rows])


@pytest.mark.parametrize("steps", [0, 1, 7])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("exact", EXACT)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_load_and_continue_after_steps(name: str, exact: str, dtype: str, steps: int, tmp_path) -> None:
    whole = net(exact, OPTIMIZERS[name], dtype).build(6)
    batches(whole, 0, steps)
    whole.save(tmp_path / "net")
    again = fd.load(tmp_path / "net", backend=exact)
    assert_equal(again, whole)
    for n in (whole, again):
        batches(n, steps, steps + 5)
    assert_equal(again, whole)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("exact", EXACT)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_load_and_continue_after_epochs(name: str, exact: str, dtype: str, tmp_path) -> None:
    """Masks, the order of rows and a schedule go on, too."""
    schedule = fd.callbacks.LearningRateSchedule(lambda epoch: 0.01 / (1 + epoch))
    whole, half = net(exact, OPTIMIZERS[name], dtype), net(exact, OPTIMIZERS[name], dtype)
    history = whole.fit(X, Y, 32, epochs=4, callbacks=[schedule], verbose=0)
    first = half.fit(X, Y, 32, epochs=2, callbacks=[schedule], verbose=0)
    half.save(tmp_path / "net")
    again = fd.load(tmp_path / "net", backend=exact)
    assert again.lr == half.lr
    second = again.fit(X, Y, 32, epochs=2, callbacks=[schedule], verbose=0)
    assert_equal(again, whole)
    assert {key: first[key] + second[key] for key in first} == history


@pytest.mark.skipif("numba" not in BACKENDS, reason="numba: not available")
def test_load_and_continue_on_numba(tmp_path) -> None:
    whole = net("numba")
    whole.fit(X, Y, 32, epochs=2, verbose=0)
    whole.save(tmp_path / "net")
    again = fd.load(tmp_path / "net", backend="numba")
    for n in (whole, again):
        n.fit(X, Y, 32, epochs=2, verbose=0)
    assert_equal(again, whole)


@pytest.mark.skipif(len(EXACT) < 2, reason="the compiled back end is not built")
@pytest.mark.parametrize("exact", EXACT)
def test_a_file_of_one_back_end_continues_on_another(exact: str, tmp_path) -> None:
    whole = net(exact, optimizers.SGD(0.01, momentum=0.9))
    whole.fit(X, Y, 32, epochs=2, verbose=0)
    whole.save(tmp_path / "net")
    for other in EXACT:
        again = fd.load(tmp_path / "net", backend=other)
        copy = fd.load(tmp_path / "net", backend=exact)
        again.fit(X, Y, 32, epochs=1, verbose=0)
        copy.fit(X, Y, 32, epochs=1, verbose=0)
        for name, value in copy.weights.items():
            np.testing.assert_allclose(again.weights[name], value, rtol=1e-3, atol=1e-5, err_msg=name)


def test_continue_in_a_loop_of_ones_own(backend: str, tmp_path) -> None:
    def step(made: fd.Sequential) -> None:
        _, dz = fd.ops.softmax_cross_entropy(made.forward(X, training=True), Y)
        made.backward(dz)
        made.update()

    whole = net(backend)
    step(whole)
    whole.save(tmp_path / "net")
    again = fd.load(tmp_path / "net", backend=backend)
    for n in (whole, again):
        step(n)
        step(n)
    assert_equal(again, whole)


def test_rate_in_use_is_kept(tmp_path) -> None:
    made = net(optimizer=optimizers.SGD(0.5)).build(6)
    made.lr = 1e-4
    made.save(tmp_path / "net")
    assert fd.load(tmp_path / "net").lr == 1e-4


def test_without_the_optimizer_training_starts_with_fresh_moments(tmp_path) -> None:
    made = net(optimizer=optimizers.Adam(1e-3))
    made.fit(X, Y, 8, epochs=20, verbose=0)
    made.save(tmp_path / "whole")
    made.save(tmp_path / "small", optimizer=False)
    sizes = [(tmp_path / name).stat().st_size for name in ("whole", "small")]
    assert sizes[1] < 0.7 * sizes[0]
    again = fd.load(tmp_path / "small")
    assert (again.step, again._state.update) == (made.step, 0)
    before = again.get_state()
    again.train_on_batch(X, Y)
    steps = [np.abs(again.weights[name] - before[name]).max() / 1e-3 for name in again.gradients]
    assert max(steps) <= 1.001  # Adam's first step is lr sign(g)


@pytest.mark.parametrize("exact", EXACT)
def test_a_net_that_diverged_is_saved(exact: str, tmp_path) -> None:
    made = net(exact, optimizers.SGD(1e30))
    with np.errstate(all="ignore"):
        stop = fd.callbacks.EarlyStopping(patience=2)
        made.fit(X, Y, epochs=4, validation_data=(X, Y), callbacks=[stop], verbose=0)
    made.save(tmp_path / "net")
    assert_equal(fd.load(tmp_path / "net", backend=exact), made)


def halves(made: fd.Sequential, first: int) -> None:
    """Go back through one half of the data, adding to the gradients of the other."""
    rows = slice(45 * first, 45 * first + 45)
    made.forward(X[rows], training=True)
    made.backward(np.ones((45, 3)) * (1 + np.arange(3)), accumulate=first > 0)


@pytest.mark.parametrize("exact", EXACT)
@pytest.mark.parametrize("way", ["file", "copy", "elsewhere"])
def test_gradients_that_wait_go_along(way: str, exact: str, tmp_path) -> None:
    whole, parts = net(exact, "sgd"), net(exact, "sgd")
    halves(whole, 0)
    if way == "elsewhere" and len(EXACT) > 1:
        with fd.backend(next(name for name in EXACT if name != exact)):
            halves(parts, 0)
        parts.predict(X)
        parts.evaluate(X, Y)
    else:
        halves(parts, 0)
        parts.save(tmp_path / "net")
        parts = fd.load(tmp_path / "net", backend=exact) if way == "file" else copy.copy(parts)
    for n in (whole, parts):
        halves(n, 1)
        n.update()
    for name, value in whole.weights.items():
        np.testing.assert_allclose(parts.weights[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    alone = net(exact, "sgd")
    halves(alone, 0)
    again = copy.copy(alone)
    for n in (alone, again):
        n.update()  # with the gradients at hand
    assert_equal(again, alone)


@pytest.mark.skipif(len(EXACT) < 2, reason="the compiled back end is not built")
def test_a_pass_in_a_context_waits_for_its_backward() -> None:
    made = net("cython").build(6)
    with fd.backend("numpy"):
        made.forward(X, training=True)
    made.predict(X)  # from a copy: the pass stays
    made.backward(np.ones((90, 3)))
    before = dict(made.gradients)
    made.predict(X)
    for name, value in before.items():
        np.testing.assert_array_equal(made.gradients[name], value)
    made.update()
    made.predict(X)
    assert made._runtime.placement.backend == "cython"


# ---------------------------------------------------------------------------------------------- older files
def old_file(made: fd.Sequential, path) -> None:
    """What version 1 wrote: weights and counters."""
    description = made._snapshot(False).describe()
    state = description.pop("state")
    description |= {"step": state["step"], "epoch": state["epoch"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "VERSION", 1)
        checkpoint.write(path, made.get_state(), description)


def test_a_file_of_version_1_is_read(tmp_path) -> None:
    made = net(optimizer=optimizers.Adam(1e-3))
    made.fit(X, Y, 8, epochs=20, verbose=0)
    old_file(made, tmp_path / "old")
    again = fd.load(tmp_path / "old")
    np.testing.assert_array_equal(again.predict(X), made.predict(X))
    assert (again.step, again.epoch, again.lr) == (made.step, made.epoch, 1e-3)
    before = again.get_state()
    for _ in range(5):  # the moments are not there: steps of about lr, as from the start
        again.train_on_batch(X, Y)
    assert max(np.abs(again.weights[n] - before[n]).max() for n in again.gradients) <= 5.01e-3


# ---------------------------------------------------------------------------------------------- dtypes
def mixed_runs() -> bool:
    return "cython" in BACKENDS and dispatch.refuses("cython", dispatch.MIXED) is None


def mixed_file(path) -> fd.Sequential:
    """A file of mixed_bfloat16, also where this CPU cannot train one."""
    made = net("numpy")
    made.fit(X, Y, verbose=0)
    snapshot = made._snapshot()
    checkpoint.write(path, snapshot.tensors, snapshot.describe() | {"dtype": dispatch.MIXED})
    return made


@pytest.mark.parametrize("exact", EXACT)
def test_a_mixed_file_loads_anywhere(exact: str, tmp_path) -> None:
    made = mixed_file(tmp_path / "net")
    again = fd.load(tmp_path / "net", backend=exact)
    assert again.predict(X).shape == (90, 3)
    if exact == "numpy":
        assert "float32 instead of the file's mixed_bfloat16" in again.explain()
        np.testing.assert_array_equal(again.predict(X), made.predict(X))
    with pytest.raises(BackendUnavailable):
        fd.load(tmp_path / "net", backend="numpy", dtype=dispatch.MIXED)


def test_a_file_in_another_dtype(tmp_path) -> None:
    made = net("numpy")
    made.fit(X, Y, verbose=0)
    made.save(tmp_path / "net")
    double = fd.load(tmp_path / "net", backend="numpy", dtype="float64")
    assert double.predict(X).dtype == np.float64
    np.testing.assert_allclose(double.predict(X), made.predict(X), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not mixed_runs(), reason="mixed_bfloat16: this CPU has no bfloat16 units")
def test_load_and_continue_in_mixed_bfloat16(tmp_path) -> None:
    whole = net("cython", dtype=dispatch.MIXED)
    whole.fit(X, Y, 32, epochs=2, verbose=0)
    whole.save(tmp_path / "net")
    again = fd.load(tmp_path / "net", backend="cython")
    for n in (whole, again):
        n.fit(X, Y, 32, epochs=2, verbose=0)
    assert_equal(again, whole)


# ---------------------------------------------------------------------------------------------- what cannot be kept
def test_settings_of_numpy_scalars_are_saved(tmp_path) -> None:
    made = fd.Sequential(
        [layers.Dense(np.int64(4)), layers.BatchNorm(eps=np.float32(1e-3), decay=np.float64(0.5)), layers.Dense(3)],
        seed=np.uint64(5),
    ).compile("softmax_cross_entropy", optimizers.SGD(np.float32(0.25), momentum=np.float64(0.5)))
    made.fit(X, Y, verbose=0)
    made.lr = np.float32(0.125)
    made.save(tmp_path / "net", extra={"a": np.float32(1.5), "b": np.int8(3), "c": np.True_, "d": np.longdouble(2)})
    again = fd.load(tmp_path / "net")
    assert again.lr == 0.125
    assert again.extra == {"a": 1.5, "b": 3, "c": True, "d": 2}
    np.testing.assert_array_equal(again.predict(X), made.predict(X))


def test_a_loss_of_ones_own_is_refused_before_anything_is_written(tmp_path) -> None:
    loss = fd.losses.Loss("mine", "mse", "values")
    made = fd.Sequential([layers.Dense(1)]).compile(loss).build(6)
    with pytest.raises(ValueError, match=r"loss: expected one of .*mse.* found 'mine'"):
        made.save(tmp_path / "net")
    assert not list(tmp_path.iterdir())


def test_an_extra_that_is_no_json_is_refused_before_anything_is_written(tmp_path) -> None:
    made = net().build(6)
    nested: list = []
    for _ in range(100_000):
        nested = [nested]
    bad = ({"f": print}, {"a": np.zeros(3)}, {"x": float("nan")}, 5, "abc", {"n": nested}, {"d": "x" * 200_000_000})
    for extra in bad:
        with pytest.raises((TypeError, ValueError)):
            made.save(tmp_path / "net", extra=extra)
    assert not list(tmp_path.iterdir())


def test_what_is_fixed_cannot_be_assigned(tmp_path) -> None:
    made = net().build(6)
    for name in ("layers", "names", "seed", "feature_names"):
        with pytest.raises(AttributeError):
            setattr(made, name, [])
    with pytest.raises(AttributeError):
        made.layers.append(layers.ReLU())
    made.extra = "abc"
    with pytest.raises(TypeError, match="extra: expected a mapping"):
        made.save(tmp_path / "net")


@pytest.mark.parametrize(
    "arguments", [{"backend": "tpu"}, {"threads": 0}, {"dtype": "float16"}, {"backend": "numpy", "threads": "two"}]
)
def test_arguments_of_load_are_not_blamed_on_the_file(arguments: dict, tmp_path) -> None:
    net().build(6).save(tmp_path / "net")
    with pytest.raises(ValueError, match=next(reversed(arguments))) as caught:
        fd.load(tmp_path / "net", **arguments)
    assert not isinstance(caught.value, ModelFileError)


# ---------------------------------------------------------------------------------------------- hostile files
def rewritten(path, change) -> None:
    """Change the description of a file; its checksum covers the tensors alone."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    head = json.loads(data[8 : 8 + size])
    inner = json.loads(head["__metadata__"]["fastdl"])
    text = change(inner["description"])
    head["__metadata__"]["fastdl"] = text if isinstance(text, str) else json.dumps(inner)
    raw = json.dumps(head).encode()
    raw += b" " * (-len(raw) % 8)
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data[8 + size :])


def put(*keys):
    *path, last, value = keys

    def change(description) -> None:
        place = description
        for key in path:
            place = place[key]
        place[last] = value

    return change


HOSTILE = {
    "width": put("width", 2**29),
    "width beyond 64 bits": put("width", 10**30),
    "width text": put("width", "6"),
    "units": put("layers", 0, "units", 2**31),
    "units beyond 64 bits": put("layers", 0, "units", 10**30),
    "many layers": put("layers", [{"class": "ReLU"}] * 200_000),
    "many wide layers": put("layers", [{"class": "Dense", "units": 10**9}] * 1000),
    "layers text": put("layers", "ReLU"),
    "layers null": put("layers", None),
    "layer number": put("layers", 0, 5),
    "nested": lambda d: '{"version": 2, "sha256": "", "description": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "no state": lambda d: d.pop("state") and None,
    "step negative": put("state", "step", -1),
    "step beyond 32 bits": put("state", "step", 2**40),
    "step text": put("state", "step", "x"),
    "step float": put("state", "step", 1e300),
    "update": put("state", "update", -3),
    "epoch": put("state", "epoch", True),
    "lr": put("state", "lr", -1.0),
    "lr text": put("state", "lr", "fast"),
    "totals": put("state", "totals", [0.0] * 10_000),
    "totals text": put("state", "totals", "x"),
    "extra": put("extra", 5),
    "feature names": put("feature_names", ["a"] * 100_000),
    "feature numbers": put("feature_names", [1, 2, 3, 4, 5, 6]),
    "seed": put("seed", -1),
    "seed float": put("seed", 1.5),
    "loss": put("loss", ["mse"]),
    "optimizer": put("optimizer", {"name": "adam", "lr": None}),
    "another optimizer": put("optimizer", {"name": "sgd"}),
    "dtype": put("dtype", ["float32"]),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_description_is_refused(case: str, tmp_path, monkeypatch) -> None:
    path = tmp_path / "net"
    made = net("numpy")
    made.fit(X, Y, verbose=0)
    made.save(path)
    rewritten(path, HOSTILE[case])

    def asks_for_memory(*_: object) -> None:
        raise AssertionError("memory was asked for before the description had been checked")

    monkeypatch.setattr("fastdl.run.storage.Memory.allocate", asks_for_memory)
    with pytest.raises(ModelFileError, match="net"):
        fd.load(path)
