"""Dropout against a Philox of its own: this file implements the paper and the stream in plain Python integers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from fastdl.kernels import dispatch
from fastdl.kernels.common import philox
from fastdl.kernels.engine.panels import Panels, count

RATES = (0.1, 0.2, 0.5, 0.999)
WIDTHS = (1, 7, 31, 33, 100)
SEED = 0x0123456789ABCDEF


# ------------------------------------------------------------------------------------------------ the oracle
def philox_of_the_paper(counter: list[int], key: list[int]) -> list[int]:
    """Salmon et al. 2011, section 3.3: ten rounds of two multiplications, the key bumped between them."""
    c, k = list(counter), list(key)
    for number in range(10):
        if number:
            k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
    return c


def expected_mask(rows: int, cols: int, rate: float, seed: int, layer: int, step: int, first_row: int) -> np.ndarray:
    threshold = math.floor((1.0 - rate) * 65536 + 0.5)
    mask = np.zeros((rows, cols), bool)
    for r in range(rows):
        for b in range(-(-cols // 8)):
            words = philox_of_the_paper([b, (first_row + r) % 2**32, layer, step], [seed % 2**32, seed >> 32])
            lanes = [half for w in words for half in (w % 65536, w // 65536)]
            for c in range(8 * b, min(8 * b + 8, cols)):
                mask[r, c] = lanes[c % 8] < threshold
    return mask


def drop(x: np.ndarray, backend: str, threads: int = 1, **arguments: Any) -> np.ndarray:
    y = np.full_like(x, np.nan)
    dispatch.run("dropout_forward", x, y, backend=backend, threads=threads, **arguments)
    return y


def mask_of(shape: tuple[int, int], backend: str, threads: int = 1, **arguments: Any) -> np.ndarray:
    mask = np.ones(shape, bool)
    dispatch.run("dropout_mask", mask, backend=backend, threads=threads, **arguments)
    return mask


# ------------------------------------------------------------------------------------------------ masks
@pytest.mark.parametrize("cols", WIDTHS)
@pytest.mark.parametrize("rate", RATES)
def test_mask_is_the_papers(runner: Any, cols: int, rate: float) -> None:
    where = {"rate": rate, "seed": SEED, "layer": 3, "step": 17, "first_row": 5}
    want = expected_mask(9, cols, **where)
    np.testing.assert_array_equal(mask_of((9, cols), runner.backend, **where), want)
    for dtype in (np.float32, np.float64):
        x = np.linspace(-1, -2, 9 * cols, dtype=dtype).reshape(9, cols)
        T = math.floor((1.0 - rate) * 65536 + 0.5)
        y = drop(x, runner.backend, **where)
        np.testing.assert_array_equal(y, np.where(want, x * dtype(65536 / T), dtype(0)))
        assert not np.signbit(y[~want]).any(), "a dropped element is +0"


@pytest.mark.parametrize("first_row", [2**31 - 3, 2**31 + 5, 2**32 - 4, 2**40 + 7])
def test_rows_above_31_bits(runner: Any, first_row: int) -> None:
    where = {"rate": 0.5, "seed": SEED, "layer": 0, "step": 2**32 - 1, "first_row": first_row}
    want = expected_mask(8, 33, **where)
    np.testing.assert_array_equal(mask_of((8, 33), runner.backend, **where), want)
    np.testing.assert_array_equal(drop(np.ones((8, 33), np.float32), runner.backend, **where) != 0, want)


@pytest.mark.parametrize("cut", [1, 4, 13, 64])
def test_split_batch_draws_the_same_mask(runner: Any, cut: int) -> None:
    where = {"rate": 0.2, "seed": 9, "layer": 1, "step": 4}
    x = np.ones((70, 45), np.float32)
    whole = drop(x, runner.backend, first_row=100, **where)
    parts = [
        drop(x[:cut], runner.backend, first_row=100, **where),
        drop(x[cut:], runner.backend, first_row=100 + cut, **where),
    ]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_every_part_of_the_counter_matters(backend: str) -> None:
    base = {"rate": 0.5, "seed": 1, "layer": 0, "step": 0, "first_row": 0}
    masks = [mask_of((16, 64), backend, **base)]
    for change in ({"seed": 2}, {"seed": 1 + 2**32}, {"layer": 1}, {"step": 1}, {"first_row": 16}):
        masks.append(mask_of((16, 64), backend, **(base | change)))
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert 0.4 < np.mean(a == b) < 0.6


@pytest.mark.parametrize("rate", RATES)
def test_keep_frequency(runner: Any, rate: float) -> None:
    shape = (500, 400)
    kept = mask_of(shape, runner.backend, rate=rate, seed=3, layer=0).mean()
    p = math.floor((1.0 - rate) * 65536 + 0.5) / 65536
    assert abs(kept - p) < 5 * math.sqrt(p * (1 - p) / (shape[0] * shape[1]))


@pytest.mark.parametrize("rate", [0.0, 1e-7])
def test_tiny_rates_keep_everything(runner: Any, rate: float) -> None:
    x = np.linspace(-3, 3, 4 * 33, dtype=np.float32).reshape(4, 33)
    np.testing.assert_array_equal(drop(x, runner.backend, rate=rate, seed=1), x)


# ------------------------------------------------------------------------------------------------ values
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -0.0])
def test_special_values(runner: Any, value: float) -> None:
    x = np.full((5, 37), value, np.float32)
    where = {"rate": 0.5, "seed": SEED, "layer": 0, "step": 0}
    kept = mask_of(x.shape, runner.backend, **where)
    y = drop(x, runner.backend, **where)
    assert (y[~kept] == 0).all()
    assert not np.signbit(y[~kept]).any()
    np.testing.assert_array_equal(y[kept], x[kept])
    np.testing.assert_array_equal(np.signbit(y[kept & ~np.isnan(y)]), np.signbit(x[kept & ~np.isnan(x)]))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_backward_and_in_place(runner: Any, dtype: type, rng: np.random.Generator) -> None:
    where = {"rate": 0.3, "seed": 5, "layer": 2, "step": 8, "first_row": 3}
    x = rng.standard_normal((29, 50)).astype(dtype)
    y = drop(x, runner.backend, **where)
    for op in ("dropout_forward", "dropout_backward"):
        same = x.copy()
        dispatch.run(op, same, same, backend=runner.backend, **where)
        np.testing.assert_array_equal(same, y)


@pytest.mark.parametrize("shape", [(1, 1), (0, 5), (3, 0), (67, 33), (300, 130)])
def test_threads_and_strides_change_no_bit(runner: Any, shape: tuple[int, int], rng: np.random.Generator) -> None:
    where = {"rate": 0.4, "seed": 11, "layer": 0, "step": 1}
    x = rng.standard_normal(shape).astype(np.float32)
    want = drop(x, "numpy", **where)
    wide, wide_out = np.zeros((shape[0], shape[1] + 3), np.float32), np.full((2 * shape[0], shape[1]), 7, np.float32)
    wide[:, 1 : 1 + shape[1]] = x
    for threads in (1, 2, 3, 4):
        np.testing.assert_array_equal(drop(x, runner.backend, threads, **where), want)
        np.testing.assert_array_equal(
            mask_of(shape, runner.backend, threads, **where), mask_of(shape, "numpy", **where)
        )
    dispatch.run("dropout_forward", wide[:, 1 : 1 + shape[1]], wide_out[::2], backend=runner.backend, **where)
    np.testing.assert_array_equal(wide_out[::2], want)
    assert (wide_out[1::2] == 7).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("cols", [1, 31, 32, 33, 100])
def test_panels(level: str, cols: int, dtype: type, rng: np.random.Generator) -> None:
    where = {"rate": 0.5, "seed": SEED, "layer": 1, "step": 3, "first_row": 2}
    x = rng.standard_normal((70, cols)).astype(dtype)
    want = drop(x, "numpy", **where)
    packed = Panels(np.zeros((count(cols), 75, 32), dtype), cols, rows=70)
    packed.fill_from(x)
    for threads in (1, 3):
        for source in (packed, x):
            out = Panels(np.full_like(packed.data, np.nan), cols, rows=70)
            dispatch.run("dropout_forward", source, out, backend="cython", threads=threads, **where)
            np.testing.assert_array_equal(out.unpack(), want)
            padding = out.data[-1, :70, cols - 32 * (count(cols) - 1) :]
            assert (padding == 0).all(), f"padding must stay zero ({level})"
            assert np.isnan(out.data[:, 70:]).all(), "rows past the batch are not touched"
        plain = np.full_like(x, np.nan)
        dispatch.run("dropout_forward", packed, plain, backend="cython", threads=threads, **where)
        np.testing.assert_array_equal(plain, want)


# ------------------------------------------------------------------------------------------------ the threshold
def test_threshold_and_scale() -> None:
    assert [philox.threshold(r) for r in (0.0, 0.5, 0.25, 1e-9, 0.99999)] == [65536, 32768, 49152, 65536, 1]
    for rate in RATES:
        T = philox.threshold(rate)
        assert abs(T / 65536 - (1 - rate)) <= 2.0**-17
        assert philox.scale(T, np.float32) == np.float32(65536 / T)
        assert philox.scale(T, np.float32).dtype == np.float32


@pytest.mark.parametrize("rate", [1.0, -0.1, 1.5, math.nan])
def test_rates_outside_are_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="expected 0 <= rate < 1"):
        philox.threshold(rate)


def test_a_rate_that_drops_everything_is_refused() -> None:
    with pytest.raises(ValueError, match="drops every element"):
        philox.threshold(1 - 2.0**-18)
