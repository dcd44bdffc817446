"""`dtype="mixed_bfloat16"`: float32 parameters and sums, products of operands rounded to bfloat16."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import pytest

import fastdl as fd
from fastdl import layers
from fastdl.errors import BackendUnavailable
from fastdl.kernels import dispatch, registry
from fastdl.kernels.common import simd
from fastdl.kernels.engine.panels import pack

REASON = dispatch.refuses("cython", dispatch.MIXED)
needs_bfloat16 = pytest.mark.skipif(REASON is not None, reason=f"mixed_bfloat16: {REASON}")
#: Half a unit in the last of 8 bits.
EPS = 2.0**-9


def rounded(a: np.ndarray) -> np.ndarray:
    """To the nearest bfloat16, ties to even, in float64."""
    bits = np.ascontiguousarray(a, np.float32).view(np.uint32).astype(np.uint64)
    kept = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
    return kept.astype(np.uint32).view(np.float32).astype(np.float64)


def product(op: str, *arrays: object, threads: int = 1, **arguments: object) -> None:
    impl = registry.find(op, "cython")
    mixed = dataclasses.replace(impl, native={"float32": impl.native[dispatch.MIXED]})
    dispatch.call(mixed, arrays, arguments, threads)


def three_products(x: np.ndarray, w: np.ndarray, dy: np.ndarray, threads: int = 1) -> list[np.ndarray]:
    """x w, dy w^T, x^T dy and column sums of dy, as a Program runs them."""
    y, dx, dw = (pack(np.full(s, np.nan, np.float32)) for s in (dy.shape, x.shape, w.shape))
    db = np.full(dy.shape[1], np.nan, np.float32)
    px, pw, pdy = pack(x), pack(w), pack(dy)
    product("dense_forward", px, pw, None, y, None, threads=threads, activation="identity", alpha=0.0)
    product("dense_backward_input", pdy, pw, dx, threads=threads)
    product("dense_backward_weights", px, pdy, dw, db, threads=threads)
    return [y.unpack(), dx.unpack(), dw.unpack(), db]


SHAPES = [
    (1, 1, 1),
    (2, 3, 5),
    (31, 33, 32),
    (64, 64, 64),
    (65, 127, 10),
    (100, 40, 70),
    (130, 2100, 90),
    (1030, 70, 50),
]


@needs_bfloat16
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_of_small_integers_are_exact(shape: tuple[int, int, int]) -> None:
    n, i, o = shape
    rng = np.random.default_rng(sum(shape))
    x, w, dy = (rng.integers(-8, 9, s).astype(np.float32) for s in ((n, i), (i, o), (n, o)))
    for threads in (1, 2, 3):
        found = three_products(x, w, dy, threads)
        for got, want in zip(found, (x @ w, dy @ w.T, x.T @ dy, dy.sum(axis=0)), strict=True):
            np.testing.assert_array_equal(got, want)


@needs_bfloat16
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_operands_are_rounded_once_and_sums_are_float32(shape: tuple[int, int, int]) -> None:
    n, i, o = shape
    rng = np.random.default_rng(sum(shape))
    x, w, dy = (rng.standard_normal(s).astype(np.float32) for s in ((n, i), (i, o), (n, o)))
    found = three_products(x, w, dy)
    rx, rw, rdy = rounded(x), rounded(w), rounded(dy)
    wanted = ((rx @ rw, i), (rdy @ rw.T, o), (rx.T @ rdy, n))
    for got, (want, terms) in zip(found, wanted, strict=False):
        np.testing.assert_allclose(
            got, want, rtol=0, atol=2.0**-23 * (4 + 2 * terms**0.5) * max(1.0, np.abs(want).max())
        )
    np.testing.assert_allclose(found[3], dy.sum(axis=0, dtype=np.float64), rtol=0, atol=1e-6 * n)
    assert i < 32 or np.abs(found[0] - x.astype(np.float64) @ w).max() > 1e-4  # it is not float32's product


@needs_bfloat16
def test_values_that_are_not_finite() -> None:
    x, w, dy = (np.ones(s, np.float32) for s in ((5, 3), (3, 7), (5, 7)))
    x[1, 2], x[3, 0] = np.nan, np.inf
    y, _, dw, _ = three_products(x, w, dy)
    np.testing.assert_array_equal(np.isnan(y), np.arange(5)[:, None] == np.full(7, 1))
    np.testing.assert_array_equal(np.isinf(y), np.arange(5)[:, None] == np.full(7, 3))
    assert np.isnan(dw[2]).all()
    assert np.isinf(dw[0]).all()
    assert np.isfinite(dw[1]).all()


def digits_net(dtype: str, threads: int = 1, fuse: bool = True) -> fd.Sequential:
    stack = [layers.Dense(100, use_bias=False), layers.BatchNorm(), layers.ReLU(), layers.Dropout(0.2)]
    stack += [layers.Dense(40), layers.GELU(), layers.Dense(10)]
    net = fd.Sequential(stack, seed=4)
    return net.compile("softmax_cross_entropy", fd.optimizers.Adam(2e-3), dtype=dtype, threads=threads, fuse=fuse)


@needs_bfloat16
def test_digits_are_learnt_as_well() -> None:
    X, y = fd.data.load_digits()
    found = {}
    for dtype in ("float32", dispatch.MIXED):
        net = digits_net(dtype)
        net.fit(X[:1400], y[:1400], batch_size=64, epochs=25, verbose=0)
        found[dtype] = net.evaluate(X[1400:], y[1400:])
        assert net.weights["dense_0/kernel"].dtype == np.float32
        assert net.predict(X[:3]).dtype == np.float32
    assert abs(found["float32"]["accuracy"] - found[dispatch.MIXED]["accuracy"]) < 0.02
    assert found[dispatch.MIXED]["accuracy"] > 0.9


@needs_bfloat16
def test_twenty_steps_drift_by_the_error_of_bfloat16() -> None:
    X, y = fd.data.load_digits()
    nets = [digits_net(dtype) for dtype in ("float32", dispatch.MIXED)]
    losses = np.array(
        [[net.train_on_batch(X[64 * k : 64 * k + 64], y[64 * k : 64 * k + 64]) for k in range(20)] for net in nets]
    )
    drift = np.abs(losses[0] - losses[1]) / losses[0]
    assert 1e-7 < drift[0] < 4 * EPS
    assert drift.max() < 20 * EPS


@needs_bfloat16
def test_bits_do_not_depend_on_threads_runs_or_the_way_in() -> None:
    X, y = fd.data.load_digits()
    states = []
    for threads in (1, 1, 2, 3):
        net = digits_net(dispatch.MIXED, threads)
        net.fit(X[:500], y[:500], batch_size=60, epochs=2, verbose=0)
        net.train_on_batch(X[:60].tolist() if threads == 3 else X[:60], y[:60])
        states.append(net.get_state())
    for state in states[1:]:
        for name, value in states[0].items():
            np.testing.assert_array_equal(state[name], value)


@needs_bfloat16
def test_fused_equals_plain() -> None:
    X, y = fd.data.load_digits()
    losses = [
        [net.train_on_batch(X[:64], y[:64]) for _ in range(5)]
        for net in (digits_net(dispatch.MIXED, fuse=f) for f in (True, False))
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=4 * EPS)


@needs_bfloat16
def test_files_keep_the_type(tmp_path: pathlib.Path) -> None:
    X, y = fd.data.load_digits()
    net = digits_net(dispatch.MIXED)
    net.fit(X[:200], y[:200], epochs=1, verbose=0)
    net.save(tmp_path / "net.safetensors")
    again = fd.load(tmp_path / "net.safetensors")
    np.testing.assert_array_equal(net.predict(X[:50]), again.predict(X[:50]))
    assert dispatch.MIXED in again.summary()


@pytest.mark.parametrize("name", ["numpy", "numba"])
def test_other_back_ends_refuse(name: str) -> None:
    with pytest.raises(BackendUnavailable, match="mixed_bfloat16"):
        fd.Sequential([layers.Dense(3)]).compile("mse", dtype="mixed_bfloat16", backend=name)


@pytest.mark.skipif(dispatch.load("cython") != "available", reason="compiled back end: not built")
def test_lower_levels_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    before = simd.level()
    simd.select("portable")
    try:
        with pytest.raises(BackendUnavailable, match=r"AVX512-BF16|avx512 level"):
            fd.Sequential([layers.Dense(3)]).compile("mse", dtype="mixed_bfloat16")
    finally:
        simd.select(before)


@needs_bfloat16
def test_a_context_that_cannot_run_it_is_refused() -> None:
    net = digits_net(dispatch.MIXED)
    with fd.backend("numpy"), pytest.raises(BackendUnavailable, match="mixed_bfloat16: computes in float32"):
        net.predict(np.zeros((2, 64), np.float32))
