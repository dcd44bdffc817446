"""The random streams: backward draws with its forward's step and rows, micro-batches count on, nothing repeats."""

from __future__ import annotations

import numpy as np
import pytest

import fastdl as fd
from api.nets import EXACT, X, Y, net
from fastdl import layers

DY = np.random.default_rng(5).standard_normal((90, 3)).astype(np.float32)


def dropping(backend: str) -> fd.Sequential:
    stack = [layers.Dense(30), layers.ReLU(), layers.Dropout(0.5), layers.Dense(3), layers.Dropout(0.4)]
    return fd.Sequential(stack, seed=2).compile("softmax_cross_entropy", "sgd", backend=backend)


def test_backward_draws_the_masks_of_its_forward(backend: str) -> None:
    """A step in between moves the stream on; with learning rate 0 it changes nothing else."""
    made = dropping(backend)
    made.forward(X, training=True)
    want, gradients = made.backward(DY), dict(made.gradients)
    again = dropping(backend)
    again.forward(X, training=True)
    again.lr = 0.0
    again.train_on_batch(X, Y)
    assert again.step == 1
    np.testing.assert_array_equal(again.backward(DY), want)
    for name, value in gradients.items():
        np.testing.assert_array_equal(again.gradients[name], value, err_msg=name)


@pytest.mark.parametrize("cuts", [(45,), (1, 2), (30, 60), (7, 40, 89)])
def test_accumulated_micro_batches_draw_the_masks_of_the_whole(backend: str, cuts: tuple[int, ...]) -> None:
    whole, parts = dropping(backend), dropping(backend)
    y = whole.forward(X, training=True)
    dx = whole.backward(DY)
    ys, dxs = [], []
    for k, rows in enumerate(np.split(np.arange(90), cuts)):
        ys.append(parts.forward(X[rows], training=True))
        dxs.append(parts.backward(DY[rows], accumulate=k > 0))
    np.testing.assert_array_equal(np.concatenate(ys) == 0, y == 0)
    np.testing.assert_allclose(np.concatenate(ys), y, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.concatenate(dxs), dx, rtol=1e-4, atol=1e-5)
    for name, value in whole.gradients.items():
        np.testing.assert_allclose(parts.gradients[name], value, rtol=1e-3, atol=1e-4, err_msg=name)
    for n in (whole, parts):
        n.update()
    np.testing.assert_array_equal(whole.forward(X, training=True) == 0, parts.forward(X, training=True) == 0)


def test_a_pass_that_is_repeated_draws_new_masks(backend: str) -> None:
    made = dropping(backend)
    first, second = made.forward(X, training=True), made.forward(X, training=True)
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(made.forward(X, training=True, first_row=0), first)
    np.testing.assert_array_equal(made.forward(X, training=True), second)  # rows count on from there
    made.backward(DY)
    made.update()
    assert not np.array_equal(made.forward(X, training=True) == 0, first == 0)


def test_rows_are_those_of_the_contract() -> None:
    made = fd.Sequential([layers.Dropout(0.5)], seed=9).compile("mse", backend="numpy")
    ones = np.ones((8, 20), np.float32)
    for first in (0, 8):
        kept = made.forward(ones, training=True) != 0
        np.testing.assert_array_equal(kept, fd.random.dropout_mask((8, 20), 0.5, 9, layer=0, step=0, first_row=first))
    made.step = 4
    kept = made.forward(ones, training=True) != 0
    np.testing.assert_array_equal(kept, fd.random.dropout_mask((8, 20), 0.5, 9, layer=0, step=4))


@pytest.mark.parametrize("exact", EXACT)
def test_a_second_compile_goes_on(exact: str) -> None:
    """Masks and the order of rows do not start again; the optimiser does."""
    made = net(exact, "adam")
    made.fit(X, Y, 30, epochs=2, verbose=0)
    made.compile("softmax_cross_entropy", "adam", backend=exact)
    assert (made.step, made.epoch, made._state.update) == (6, 2, 0)
    before = made.get_state()
    made.train_on_batch(X, Y)
    assert max(np.abs(made.weights[n] - before[n]).max() for n in made.gradients) <= 1.001e-3  # Adam's first step


@pytest.mark.parametrize("exact", EXACT)
def test_a_second_fit_goes_on(exact: str) -> None:
    """Two calls of two epochs are one call of four: epochs, schedules and masks count over all calls."""
    seen: list[int] = []
    schedule = fd.callbacks.LearningRateSchedule(lambda epoch: seen.append(epoch) or 0.01 / (1 + epoch))
    twice, once = net(exact), net(exact)
    for _ in range(2):
        twice.fit(X, Y, 30, epochs=2, callbacks=[schedule], verbose=0)
    assert seen == [0, 1, 2, 3]
    once.fit(X, Y, 30, epochs=4, callbacks=[schedule], verbose=0)
    for name, value in once.weights.items():
        np.testing.assert_array_equal(twice.weights[name], value, err_msg=name)


@pytest.mark.parametrize("quantity", ["step", "epoch"])
@pytest.mark.parametrize("value", [-1, 2**32, 1.5, "1", None, True])
def test_positions_are_checked(quantity: str, value: object) -> None:
    made = net()
    with pytest.raises(ValueError, match=quantity):
        setattr(made, quantity, value)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), "fast", None, True])
def test_the_rate_is_checked(value: object) -> None:
    made = net().build(6)
    before = made.lr
    with pytest.raises(ValueError, match="lr"):
        made.lr = value
    assert made.lr == before
