"""copy, deepcopy, pickle and clone: nets that are independent of the one they come from."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

import fastdl as fd
from api.nets import EXACT, X, Y, assert_equal, net
from fastdl import layers

WAYS = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda n: pickle.loads(pickle.dumps(n)),
    "pickle 2": lambda n: pickle.loads(pickle.dumps(n, protocol=2)),
}


@pytest.mark.parametrize("exact", EXACT)
@pytest.mark.parametrize("way", WAYS)
def test_a_copy_goes_on_like_the_original(way: str, exact: str) -> None:
    made = net(exact, fd.optimizers.Adam(1e-2))
    made.fit(X, Y, 32, epochs=2, verbose=0)
    made.lr, made.extra = 5e-3, {"note": [1, 2]}
    other = WAYS[way](made)
    assert other.extra == made.extra
    assert repr(other) == repr(made)
    assert other.explain() == made.explain()
    assert_equal(other, made)
    for n in (made, other):
        n.fit(X, Y, 32, epochs=2, verbose=0)
    assert_equal(other, made)


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_is_independent(way: str) -> None:
    made = net()
    made.fit(X, Y, verbose=0)
    made.extra = {"a": [1]}
    other = WAYS[way](made)
    before = made.get_state()
    other.fit(X, Y, epochs=3, verbose=0)
    other.extra["a"].append(2)
    other.weights["dense_0/bias"] = np.ones(20)
    for name, value in before.items():
        np.testing.assert_array_equal(made.weights[name], value)
    assert made.extra == {"a": [1]}
    assert made.epoch == 1


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("state", ["new", "compiled", "built"])
def test_an_untrained_net_is_copied(state: str, way: str) -> None:
    made = fd.Sequential([layers.Dense(20), layers.Dense(3)], seed=4)
    if state != "new":
        made.compile("softmax_cross_entropy", fd.optimizers.SGD(0.1, momentum=0.5), backend="numpy", dtype="float64")
    if state == "built":
        made.build(6)
    other = WAYS[way](made)
    assert (other.optimizer, other.lr, other.seed) == (made.optimizer, made.lr, 4)
    for n in (made, other):
        if state == "new":
            n.compile("softmax_cross_entropy")
        n.fit(X, Y, verbose=0)
    assert_equal(other, made)


def test_a_clone_has_learned_nothing() -> None:
    made = net("numpy", fd.optimizers.SGD(0.1))
    made.fit(X, Y, epochs=3, verbose=0)
    made.lr = 1.0
    other = made.clone()
    assert (other.step, other.epoch, other.lr, other.seed) == (0, 0, 0.1, made.seed)
    fresh = net("numpy", fd.optimizers.SGD(0.1))
    for n in (other, fresh):
        n.fit(X, Y, verbose=0)
    assert_equal(other, fresh)
    assert made.clone().fit(X[:, :2], Y, verbose=0)  # of any width


@pytest.mark.parametrize("way", WAYS)
def test_a_net_is_copied_while_it_trains(way: str) -> None:
    made, copies = net(), []
    spy = fd.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: copies.append(WAYS[way](made)))
    made.fit(X, Y, epochs=3, callbacks=[spy], verbose=0)
    assert_equal(copies[-1], made)
    assert [c.epoch for c in copies] == [1, 2, 3]


def test_a_copy_of_a_net_with_a_loss_of_ones_own() -> None:
    loss = fd.losses.Loss("mine", "mse", "values")
    made = fd.Sequential([layers.Dense(1)]).compile(loss).build(6)
    assert copy.deepcopy(made).loss == loss
    assert pickle.loads(pickle.dumps(made)).loss == loss


class Named(fd.Sequential):
    """A subclass with an ``__init__`` and attributes of its own."""

    def __init__(self, name: str) -> None:
        super().__init__([layers.Dense(3)], seed=2)
        self.name, self.notes = name, [1]


@pytest.mark.parametrize("way", WAYS)
def test_a_subclass_is_copied_with_its_attributes(way: str) -> None:
    made = Named("mine").compile("softmax_cross_entropy", backend="numpy")
    made.fit(X, Y, verbose=0)
    other = WAYS[way](made)
    assert type(other) is Named
    assert (other.name, other.notes) == ("mine", [1])
    assert (other.notes is made.notes) == (way == "copy")
    assert_equal(other, made)
