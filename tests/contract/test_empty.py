"""Arrays without rows or without columns: an empty result or a sentence, the same on every back end."""

from __future__ import annotations

import numpy as np
import pytest

from fastdl import ops
from fastdl.kernels.activations.reference import ACTIVATIONS

SHAPES = [(6, 0), (0, 4), (0, 0)]
F4 = np.float32


def ones(*shape):
    return np.ones(shape, F4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name, shape, backend):
    slopes = (ones(shape[1]),) if ACTIVATIONS[name].per_channel else ()
    y, ctx = getattr(ops, f"{name}_forward")(ones(*shape), *slopes, backend=backend)
    gradients = getattr(ops, f"{name}_backward")(y.copy(), ctx)
    dx, *dslope = gradients if slopes else (gradients,)
    assert y.shape == dx.shape == shape
    assert [d.tolist() for d in dslope] == [[0.0] * shape[1]] * len(slopes)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("rate", [0.0, 0.5])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["identity", "relu", "gelu", "prelu"])
def test_batchnorm_of_no_columns(activation, training, rate, threads, backend):
    slope = ones(0) if activation == "prelu" else None
    vectors = [ones(0) for _ in range(4)]
    options = {"slope": slope, "rate": rate, "backend": backend, "threads": threads}
    y, ctx = ops.batchnorm_forward(ones(6, 0), *vectors, training=training, activation=activation, **options)
    dx, *sums = ops.batchnorm_backward(ones(6, 0), ctx)
    assert y.shape == dx.shape == (6, 0)
    assert all(s.shape == (0,) for s in sums)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("columns", [0, 4])
def test_batchnorm_of_no_rows(columns, training, backend):
    with pytest.raises(ValueError, match="x: expected at least one row"):
        ops.batchnorm_forward(ones(0, columns), *(ones(columns) for _ in range(4)), training=training, backend=backend)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dense_dropout_and_optimizers(shape, backend):
    rows, columns = shape
    y, ctx = ops.dense_forward(ones(*shape), ones(columns, 3), ones(3), activation="gelu", backend=backend)
    dx, dw, db = ops.dense_backward(ones(rows, 3), ctx)
    assert (y.shape, dx.shape, dw.shape, db.shape) == ((rows, 3), shape, (columns, 3), (3,))
    y, ctx = ops.dense_forward(ones(rows, 3), ones(3, columns), ones(columns), backend=backend)
    dx, dw, db = ops.dense_backward(ones(*shape), ctx)
    assert (y.shape, dx.shape, dw.shape) == (shape, (rows, 3), (3, columns))
    assert not dx.any() or columns
    assert not dw.any()
    y, ctx = ops.dropout_forward(ones(*shape), 0.5, 1, backend=backend)
    assert y.shape == ops.dropout_backward(ones(*shape), ctx).shape == shape
    ops.sgd_step(ones(*shape), ones(*shape), ones(*shape), backend=backend)
    ops.adam_step(ones(*shape), ones(*shape), ones(*shape), ones(*shape), 0, backend=backend)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_losses(shape, backend):
    for loss in (ops.mse, ops.binary_cross_entropy, ops.softmax_cross_entropy):
        with pytest.raises(ValueError, match="at least one row and one column"):
            loss(ones(*shape), ones(*shape), backend=backend)
