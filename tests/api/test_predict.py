"""Prediction: batch normalisation folded into weights, the caller's arrays in place, one row on one thread."""

from __future__ import annotations

import pathlib
import weakref
from collections.abc import Callable

import numpy as np
import pytest

import fastdl as fd
from fastdl import layers

BACKENDS = [name for name, state in fd.backends().items() if state == "available"]
needs_cython = pytest.mark.skipif("cython" not in BACKENDS, reason="the compiled back end is not built")
RNG = np.random.default_rng(5)
X = RNG.standard_normal((40, 37)).astype("f4")
Y = RNG.integers(0, 10, 40)


def blocks(backend: str, fuse: bool = True, threads: int | str = "auto", dtype: str = "float32") -> fd.Sequential:
    """Folded products with an epilogue, without one, with a call behind; a normalisation that follows no product."""
    net = fd.Sequential(
        [
            layers.Dense(300, use_bias=False), layers.BatchNorm(), layers.ReLU(), layers.Dropout(0.2),
            layers.Dense(65), layers.BatchNorm(eps=1e-2), layers.PReLU(), layers.BatchNorm(),
            layers.Dense(33), layers.BatchNorm(), layers.Dense(10),
        ],
        seed=4,
    )  # fmt: skip
    return net.compile("softmax_cross_entropy", backend=backend, fuse=fuse, threads=threads, dtype=dtype).build(37)


def trained(backend: str, fuse: bool = True, **settings: object) -> fd.Sequential:
    net = blocks(backend, fuse, **settings)
    net.set_state(STATE)
    return net


def _state() -> dict[str, np.ndarray]:
    net = blocks("numpy")
    net.fit(X, Y, epochs=5, verbose=0)
    return net.get_state()


STATE = _state()


def program(net: fd.Sequential) -> fd.program.Program:
    return next(iter(net._runtime.placement._predictions.values())).executor.program


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_folded_is_unfolded(backend: str, dtype: str) -> None:
    folded, plain = trained(backend, dtype=dtype), trained("numpy", fuse=False, dtype=dtype)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == "float32" else {"rtol": 1e-11, "atol": 1e-12}
    for rows in (1, 2, 40):
        np.testing.assert_allclose(folded.predict(X[:rows]), plain.predict(X[:rows]), **tolerance)
    ops = [c.op for c in program(folded).calls]
    assert ops.count("batchnorm_fold") == 3
    assert ops.count("batchnorm_inference") == 1  # behind the PReLU
    assert "batchnorm_fold" not in [c.op for c in program(plain).calls]
    found, want = folded.evaluate(X, Y), plain.evaluate(X, Y)
    assert found == pytest.approx(want, rel=1e-4)


def _loop(net: fd.Sequential) -> None:
    net.forward(X, training=True)
    net.backward(np.ones((40, 10)))
    net.update()


CHANGES: dict[str, Callable[[fd.Sequential], object]] = {
    "train_on_batch": lambda net: net.train_on_batch(X, Y),
    "fit": lambda net: net.fit(X, Y, epochs=1, verbose=0),
    "update": _loop,
    "forward": lambda net: net.forward(X, training=True),  # moves the running statistics
    "kernel": lambda net: net.weights.update({"dense_0/kernel": net.weights["dense_0/kernel"] * 2}),
    "running_var": lambda net: net.weights.update(
        {"batchnorm_3/running_var": net.weights["batchnorm_3/running_var"] * 3}
    ),
    "set_state": lambda net: net.set_state({name: value * 0.9 for name, value in net.get_state().items()}),
    "compile": lambda net: net.compile("softmax_cross_entropy", "sgd", backend=net.backend),
}


@pytest.mark.parametrize("change", CHANGES)
def test_predict_sees_every_change(backend: str, change: str) -> None:
    net = trained(backend)
    for _ in range(3):  # later changes take the shorter ways, if there are any
        before = net.predict(X), net.predict(X[:1])
        CHANGES[change](net)
        fresh = blocks("numpy", fuse=False)
        fresh.set_state(net.get_state())
        for rows, old in ((40, before[0]), (1, before[1])):
            np.testing.assert_allclose(net.predict(X[:rows]), fresh.predict(X[:rows]), rtol=1e-4, atol=1e-5)
            assert np.array_equal(net.predict(X[:rows]), old) == (change == "compile")


def test_a_loaded_net_predicts_with_what_was_saved(backend: str, tmp_path: pathlib.Path) -> None:
    net = trained(backend)
    net.predict(X)
    net.save(tmp_path / "net.safetensors")
    np.testing.assert_array_equal(fd.load(tmp_path / "net.safetensors", backend=backend).predict(X), net.predict(X))


def test_a_context_moves_the_folded_weights(backend: str) -> None:
    net = trained("numpy")
    before = net.predict(X)
    with fd.backend(backend):
        np.testing.assert_allclose(net.predict(X), before, rtol=1e-4, atol=1e-5)
        net.train_on_batch(X, Y)
        after = net.predict(X)
    np.testing.assert_allclose(net.predict(X), after, rtol=1e-4, atol=1e-5)


KINDS = [layers.Identity(), layers.ReLU(), layers.PReLU(), layers.GELU(), layers.Softmax(), layers.BatchNorm()]


@pytest.mark.parametrize("kind", KINDS, ids=lambda layer: type(layer).__name__)
@pytest.mark.parametrize("place", ["alone", "first", "last"])
@pytest.mark.parametrize("rows", [1, 5])
def test_any_layer_reads_the_caller_s_rows_and_writes_the_result(
    kind: layers.Layer, place: str, rows: int, backend: str
) -> None:
    stack = {"alone": [kind], "first": [kind, layers.Dense(40)], "last": [layers.Dense(40), kind]}[place]
    for width in (32, 37):
        x = X[:rows, :width]  # not contiguous at 32
        want = fd.Sequential(stack, seed=2).compile(backend="numpy", fuse=False).predict(x)
        net = fd.Sequential(stack, seed=2).compile(backend=backend)
        for _ in range(2):
            before = x.copy()
            np.testing.assert_allclose(net.predict(x), want, rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(x, before)


def test_a_net_that_does_nothing_returns_a_copy(backend: str) -> None:
    net = fd.Sequential([layers.Dropout(0.5)]).compile(backend=backend)
    for _ in range(2):
        out = net.predict(X)
        np.testing.assert_array_equal(out, X)
        assert not np.shares_memory(out, X)


def test_every_result_is_an_array_of_its_own(backend: str) -> None:
    net = trained(backend)
    first = net.predict(X[:1])
    kept = first.copy()
    for row in range(1, 4):
        assert not np.shares_memory(net.predict(X[row : row + 1]), first)
    np.testing.assert_array_equal(first, kept)


def test_no_array_is_held(backend: str) -> None:
    net = trained(backend)
    for _ in range(2):
        for rows in (1, 300):
            x = np.ones((rows, 37), "f4")
            held = [weakref.ref(x), weakref.ref(net.predict(x))]
            del x
            assert [ref() for ref in held] == [None, None]


def test_what_is_converted_gives_the_same(backend: str) -> None:
    net = trained(backend)
    want = net.predict(X)
    read_only = X.copy()
    read_only.flags.writeable = False
    wide = np.zeros((80, 74), "f4")
    wide[::2, ::2] = X
    given = [X.astype("f8"), X.tolist(), np.asfortranarray(X), read_only, wide[::2, ::2], X.astype(">f4"), X.view(Sub)]
    for _ in range(2):
        for x in given:
            np.testing.assert_array_equal(net.predict(x), want)


class Sub(np.ndarray):
    """An array that may mean something else by its elements."""


def test_errors_are_the_same_on_a_warm_net(backend: str) -> None:
    net = trained(backend)
    for _ in range(2):
        net.predict(X)
        net.predict(X[:1])
        with pytest.raises(ValueError, match="expected 37 features, as this model was built, found 36"):
            net.predict(np.zeros((1, 36), "f4"))
        with pytest.raises(ValueError, match="at least one row"):
            net.predict(np.zeros((0, 37), "f4"))
        with pytest.raises(ValueError, match=r"expected shape \(N, features\)"):
            net.predict(X[0])


@needs_cython
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_threads_and_splits_do_not_change_bits(dtype: str) -> None:
    want = trained("cython", threads=1, dtype=dtype).predict(X)
    for threads in (1, 2, 3, 4):
        net = trained("cython", threads=threads, dtype=dtype)
        for rows in (1, 2, 3, 17, 40):
            np.testing.assert_array_equal(net.predict(X[:rows]), want[:rows])


@needs_cython
def test_one_row_has_one_thread() -> None:
    net = trained("cython", threads=2)
    net.predict(X)
    net.predict(X[:1])
    used = {rows: b.executor.threads for (rows, _), b in net._runtime.placement._predictions.items()}
    assert used == {64: 2, 1: 1}
