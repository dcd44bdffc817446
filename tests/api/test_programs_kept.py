"""Programs that are used are bound once, those used last are kept, and whoever only asks allocates nothing."""

from __future__ import annotations

import numpy as np
import pytest

import fastdl as fd
from api.nets import BACKENDS, EXACT, X, Y, net
from fastdl import layers
from fastdl.run import placement, storage

pytestmark = pytest.mark.skipif(len(EXACT) < 2, reason="the compiled back end is not built")


def test_programs_used_last_are_kept(monkeypatch) -> None:
    """Nine uses in turn: the Programs of predictions and the eight others are bound once."""
    made, bound = net("cython"), []
    bind = placement.bind
    monkeypatch.setattr(placement, "bind", lambda *a: bound.append(a) or bind(*a))

    def round_of_uses() -> None:
        for rows in (1, 10, 40, 90):
            made.predict(X[:rows])
        made.fit(X, Y, 30, verbose=0)
        made.evaluate(X, Y)
        made.evaluate(X, Y, np.ones(90))
        made.train_on_batch(X, Y)
        made.train_on_batch(X, Y, np.ones(90))
        made.forward(X, training=True)

    round_of_uses()
    first = len(bound)
    for _ in range(5):
        round_of_uses()
    assert len(bound) == first
    kept = made._runtime.placement._bound
    for rows in range(10, 10 + 2 * placement.KEPT):  # data sets of many lengths do not pile up
        made.fit(X[:rows], Y[:rows], verbose=0)
        made.train_on_batch(X, Y)  # in use all the time, so it stays
    assert len(kept) == placement.KEPT
    bound.clear()
    made.train_on_batch(X, Y)
    assert not bound


def test_a_program_that_cannot_be_made_costs_no_other(monkeypatch) -> None:
    made = net("cython")
    made.fit(X, Y, verbose=0)
    kept = made._runtime.placement._bound
    for rows in range(20, 20 + placement.KEPT):
        made.fit(X[:rows], Y[:rows], verbose=0)
    before = list(kept)

    def fails(*_: object) -> None:
        raise MemoryError("no memory")

    monkeypatch.setattr(placement, "bind", fails)
    with pytest.raises(MemoryError):
        made.fit(X[:7], Y[:7], verbose=0)
    assert list(kept) == before


def test_asking_who_can_run_allocates_nothing(monkeypatch) -> None:
    made, allocated = net("auto"), []
    allocate = storage.Memory.allocate.__func__
    monkeypatch.setattr(
        storage.Memory, "allocate", classmethod(lambda cls, *a: allocated.append(a) or allocate(cls, *a))
    )
    made.build(6)
    assert len(allocated) == 1  # its home
    for _ in range(50):
        str(made.program), made.explain(), made.backend, made.threads
        for name in BACKENDS:
            with fd.backend(name):
                str(made.program), made.explain()
    assert len(allocated) == 1


def test_a_parameter_has_one_use() -> None:
    class Twice(layers.Dense):
        def trace(self, t, x, name):
            y = super().trace(t, x, name)
            return super().trace(t, y, name)

    try:
        with pytest.raises(ValueError, match="dense_0/kernel: expected a parameter to be used once"):
            fd.Sequential([Twice(6)]).build(6)
    finally:
        layers.base.CLASSES.pop("Twice")


def test_a_layer_stands_once_in_a_net() -> None:
    layer = layers.Dense(4)
    with pytest.raises(ValueError, match="once"):
        fd.Sequential([layer, layers.ReLU(), layer])


def test_layers_and_their_names() -> None:
    made = net()
    assert made.names == ["dense_0", "batchnorm_0", "prelu_0", "dropout_0", "dense_1"]
    assert [type(layer).__name__ for layer in made.layers] == ["Dense", "BatchNorm", "PReLU", "Dropout", "Dense"]
    assert made.layer("dense_1") is made.layers[-1]
    with pytest.raises(KeyError, match="dense_0"):
        made.layer("dense_2")
