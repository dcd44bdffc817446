"""Gathers copy every bit: rows to plain rows and to panels, labels, values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastdl.kernels import dispatch
from fastdl.kernels.engine.panels import Panels, count, pack

COLS = (1, 3, 16, 31, 32, 33, 64, 100)
DTYPES = (np.float32, np.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", COLS)
def test_rows(runner: Any, cols: int, dtype: type, rng: np.random.Generator) -> None:
    source = rng.standard_normal((50, cols)).astype(dtype)
    source[3] = np.nan
    for rows in (0, 1, 4, 5, 67):
        index = rng.integers(0, 50, rows)
        for threads in (1, 2, 3, 4):
            out = np.full((rows, cols), 7, dtype)
            dispatch.run("gather_rows", source, index, out, backend=runner.backend, threads=threads)
            np.testing.assert_array_equal(out, source[index])


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows(runner: Any, dtype: type, rng: np.random.Generator) -> None:
    source = rng.standard_normal((40, 50)).astype(dtype)[::2, 3:40]
    index = rng.integers(0, 20, 33)
    out = np.full((66, 40), 7, dtype)
    dispatch.run("gather_rows", source, index, out[::2, 2:39], backend=runner.backend)
    np.testing.assert_array_equal(out[::2, 2:39], source[index])
    assert (out[1::2] == 7).all()
    assert (out[:, :2] == 7).all()
    assert (out[:, 39:] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", COLS)
def test_rows_to_panels(level: str, cols: int, dtype: type, rng: np.random.Generator) -> None:
    source = rng.standard_normal((50, cols)).astype(dtype)
    for rows in (1, 4, 7, 40):
        index = rng.integers(0, 50, rows)
        for threads in (1, 2, 3, 4):
            for given in (source, pack(source)):
                out = Panels(np.full((count(cols), 40, 32), np.nan, dtype), cols, rows=rows)
                dispatch.run("gather_rows", given, index, out, backend="cython", threads=threads)
                np.testing.assert_array_equal(out.unpack(), source[index])
                padding = out.data[-1, :rows, cols - 32 * (count(cols) - 1) :]
                assert (padding == 0).all(), f"padding must be zero ({level})"
                assert np.isnan(out.data[:, rows:]).all(), "rows past the batch are not touched"
        plain = np.full((rows, cols), np.nan, dtype)
        dispatch.run("gather_rows", pack(source), index, plain, backend="cython")
        np.testing.assert_array_equal(plain, source[index])


@pytest.mark.parametrize("rows", [0, 1, 5, 1000])
def test_labels_and_values(runner: Any, rows: int, rng: np.random.Generator) -> None:
    index = rng.integers(0, 300, rows)
    labels = rng.integers(-(2**62), 2**62, 300)
    for threads in (1, 2, 3, 4):
        out = np.full(rows, -1, np.int64)
        dispatch.run("gather_labels", labels, index, out, backend=runner.backend, threads=threads)
        np.testing.assert_array_equal(out, labels[index])
        for dtype in DTYPES:
            weights = rng.standard_normal(300).astype(dtype)
            taken = np.full(rows, np.nan, dtype)
            dispatch.run("gather_values", weights, index, taken, backend=runner.backend, threads=threads)
            np.testing.assert_array_equal(taken, weights[index])
