"""Outputs of 16 MB and more leave past the caches, by loops of their own: the same bits as those of small ones."""

from __future__ import annotations

import numpy as np
import pytest

import fastdl as fd
from fastdl.kernels import dispatch
from fastdl.kernels.engine.panels import Panels, pack

CYTHON = fd.backends()["cython"]
pytestmark = pytest.mark.skipif(CYTHON != "available", reason=f"compiled back end: {CYTHON}")
#: rows, columns, leading dimension: whole vectors in every row, rows that begin anywhere, columns that outgrow a block
SHAPES = [(4103, 1040, 1040), (4101, 1031, 1031), (2052, 2085, 2088)]
STREAM = {"rate": 0.3, "seed": 11, "layer": 2, "step": 5, "first_row": 3}


def matrix(shape: tuple[int, int, int], seed: int, offset: int = 1) -> np.ndarray:
    """Values in rows of a leading dimension, from an odd address on."""
    rows, cols, lead = shape
    flat = np.random.default_rng(seed).standard_normal(rows * lead + offset, np.float32)[offset:]
    return flat.reshape(rows, lead)[:, :cols]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("threads", [1, 2])
def test_dropout(shape: tuple[int, int, int], threads: int, level: str) -> None:
    x, y = matrix(shape, 1), matrix(shape, 2)
    dispatch.run("dropout_forward", x, y, backend="cython", threads=threads, **STREAM)
    for start in range(0, len(x), 600):
        piece = np.empty_like(x[start : start + 600])
        here = STREAM | {"first_row": STREAM["first_row"] + start}
        dispatch.run("dropout_forward", x[start : start + 600].copy(), piece, backend="cython", **here)
        np.testing.assert_array_equal(y[start : start + 600], piece)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", ["identity", "relu"])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_batchnorm(shape: tuple[int, int, int], activation: str, rate: float, level: str) -> None:
    x, dy = matrix(shape, 1), matrix(shape, 2)
    params = {"activation": activation, "alpha": 0.0, **STREAM, "rate": rate}
    found = []
    for panels in (False, True):
        cols = shape[1]
        arrays = [pack(a) if panels else a for a in (x, matrix(shape, 3), dy, matrix(shape, 4))]
        vectors = [np.full(cols, v, np.float32) for v in (1.25, 0.5, 0, 1)]
        mean, inv_std, dgamma, dbeta = (np.empty(cols, np.float32) for _ in range(4))
        forward = (arrays[0], *vectors, None, arrays[1], mean, inv_std)
        dispatch.run("batchnorm_forward", *forward, backend="cython", threads=2, decay=0.9, eps=1e-5, **params)
        backward = (arrays[2], arrays[0], *vectors[:2], mean, inv_std, None, None, arrays[3], dgamma, dbeta, None)
        dispatch.run("batchnorm_backward", *backward, backend="cython", threads=2, training=1, **params)
        plain = [a.unpack() if isinstance(a, Panels) else a for a in (arrays[1], arrays[3])]
        found.append([*plain, mean, inv_std, dgamma, dbeta, *vectors])
    for far, near in zip(*found, strict=True):
        np.testing.assert_array_equal(far, near)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", ["softmax_forward", "softmax_backward"])
def test_softmax(shape: tuple[int, int, int], op: str, level: str) -> None:
    arrays = [matrix(shape, k) for k in range(3 if op.endswith("backward") else 2)]
    dispatch.run(op, *arrays, backend="cython", threads=2)
    for start in range(0, shape[0], 700):
        pieces = [a[start : start + 700].copy() for a in arrays[:-1]]
        near = np.empty_like(pieces[0])
        dispatch.run(op, *pieces, near, backend="cython")
        np.testing.assert_array_equal(arrays[-1][start : start + 700], near)


@pytest.mark.parametrize("shape", SHAPES)
def test_prelu_backward(shape: tuple[int, int, int], level: str) -> None:
    dy, x, dx = (matrix(shape, k) for k in range(3))
    slope, dslope = np.linspace(0.1, 0.5, shape[1], dtype=np.float32), np.empty(shape[1], np.float32)
    dispatch.run("prelu_backward", dy, x, slope, dx, dslope, backend="cython", threads=2)
    np.testing.assert_array_equal(dx, np.where(x > 0, dy, slope * dy))
    want = np.where(x > 0, 0, dy.astype(np.float64) * x).sum(axis=0)
    np.testing.assert_allclose(dslope, want, rtol=0, atol=1e-3)


def test_nothing_is_written_beside_the_output() -> None:
    rows, cols, lead = 4100, 1030, 1088
    x, y = matrix((rows, lead, lead), 1), np.full((rows, lead), 7, np.float32)
    dispatch.run("dropout_forward", x[:, :cols], y[:, :cols], backend="cython", **STREAM)
    vectors = [np.ones(cols, np.float32) for _ in range(4)]
    dispatch.run("batchnorm_inference", x[:, :cols], *vectors, None, y[:, :cols], backend="cython", eps=1e-5)
    np.testing.assert_array_equal(y[:, cols:], 7)
