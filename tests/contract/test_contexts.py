"""What the caller does to his arrays between a forward and its backward call: the context's stay where they are."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

from fastdl import ops

F4 = np.float32
WEIGHTS = np.linspace(-1, 1, 12, dtype=F4).reshape(4, 3)
#: name -> what a forward call of (6, 4) gives
FORWARDS = {name: getattr(ops, name) for name in ops.__all__ if name.endswith("_forward")} | {
    "prelu_forward": lambda x: ops.prelu_forward(x, np.full(4, 0.3, F4)),
    "dropout_forward": lambda x: ops.dropout_forward(x, 0.5, 1),
    "dense_forward": lambda x: ops.dense_forward(x, WEIGHTS.copy(), np.ones(3, F4), activation="gelu"),
    "batchnorm_forward": lambda x: ops.batchnorm_forward(x, *(np.ones(4, F4) for _ in range(4))),
}


def start():
    return np.linspace(-2, 2, 24, dtype=F4).reshape(6, 4).copy()  # its own memory


def results(name, ctx, dy=None):
    dy = np.linspace(1, 2, int(np.prod(ctx.shape)), dtype=F4).reshape(ctx.shape) if dy is None else dy
    gradients = getattr(ops, name.replace("forward", "backward"))(dy, ctx)
    return gradients if isinstance(gradients, tuple) else (gradients,)


def same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


#: What NumPy lets happen to an array in place while its values stay.
CHANGES = {
    "shape": lambda a: setattr(a, "shape", (1, a.size)),
    "dtype": lambda a: setattr(a, "dtype", np.int32),
    "dtype and shape": lambda a: setattr(a, "dtype", np.int8),
    "resized to as many bytes": lambda a: a.resize((a.size, 1), refcheck=False),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("name", FORWARDS)
def test_reshaped_in_place(name, change):
    want = results(name, FORWARDS[name](start())[1])
    x = start()
    y, ctx = FORWARDS[name](x)
    for array in (x, y):
        change(array)
    same(results(name, ctx), want)


@pytest.mark.parametrize("shape", [(2, 2), (60, 400)])
@pytest.mark.parametrize("name", FORWARDS)
def test_the_memory_stays_while_the_context_lives(name, shape):
    """NumPy would free it under a view, if it is told not to count references."""
    want = results(name, FORWARDS[name](start())[1])
    x = start()
    y, ctx = FORWARDS[name](x)
    kept = [a for a in (x, y) if any(np.shares_memory(a, b) for b in ctx.arrays.values() if b is not None)]
    assert kept
    for array in kept:
        with pytest.raises(ValueError, match="resize"):
            array.resize(shape, refcheck=False)
    same(results(name, ctx), want)
    del ctx
    for array in kept:
        array.resize(shape, refcheck=False)


def test_the_memory_of_a_view_stays():
    owner = np.ones((6, 8), F4)
    _, ctx = ops.gelu_forward(owner[:, 2:6])
    with pytest.raises(ValueError, match="resize"):
        owner.resize((1, 1), refcheck=False)
    assert results("gelu_forward", ctx)[0].shape == (6, 4)


@pytest.mark.parametrize("again", [copy.deepcopy, copy.copy, lambda ctx: pickle.loads(pickle.dumps(ctx))])
def test_copies_of_a_context(again):
    x = start()
    ctx = ops.gelu_forward(x)[1]
    twin = again(ctx)
    same(results("gelu_forward", twin), results("gelu_forward", ctx))
    held = twin.arrays["x"].base
    with pytest.raises(ValueError, match="resize"):
        held.resize((2, 2), refcheck=False)


@pytest.mark.parametrize("name", sorted(FORWARDS.keys() - {"dense_forward", "dropout_forward"}))
def test_out_of_the_backward_call_may_not_be_what_the_context_keeps(name):
    """Views of the context are told from other arrays by the memory they lie in."""
    x, dy, out = start(), np.ones((6, 4), F4), np.empty((6, 4), F4)
    y, ctx = FORWARDS[name](x)
    backward = getattr(ops, name.replace("forward", "backward"))
    kept = x if "x" in ctx.arrays else y
    with pytest.raises(ValueError, match="overlaps"):
        backward(dy, ctx, out=kept)
    with pytest.raises(ValueError, match="overlaps"):
        backward(dy, ctx, out=kept[::-1])
    backward(dy, ctx, out=out)
    np.testing.assert_array_equal(out, results(name, ctx, dy)[0])
