"""Small nets and data that several files of tests share."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pytest

import fastdl as fd
from fastdl import layers

BACKENDS = [name for name, state in fd.backends().items() if state == "available"]
#: Back ends that promise equal bits whenever the same calls run.
EXACT = [name for name in ("numpy", "cython") if name in BACKENDS]

_rng = np.random.default_rng(7)
X = _rng.standard_normal((90, 6)).astype(np.float32)
Y = np.arange(90) % 3


def net(backend: str = "auto", optimizer: object = "adam", dtype: str = "float32", seed: int = 3) -> fd.Sequential:
    """Dense, batch norm, ReLU, dropout: a parameter of every kind, running statistics and a random stream."""
    stack = [layers.Dense(20), layers.BatchNorm(), layers.PReLU(), layers.Dropout(0.3), layers.Dense(3)]
    return fd.Sequential(stack, seed=seed).compile("softmax_cross_entropy", optimizer, backend=backend, dtype=dtype)


def other_than(backend: str) -> str:
    """Another back end that runs here."""
    return next(name for name in EXACT if name != backend)


def assert_equal(a: fd.Sequential, b: fd.Sequential) -> None:
    """Two nets have the same bits and have come as far."""
    assert list(a.weights) == list(b.weights)
    for name, value in a.weights.items():
        np.testing.assert_array_equal(value, b.weights[name], err_msg=name)
    for quantity in ("step", "epoch", "lr"):
        assert getattr(a, quantity) == getattr(b, quantity), quantity
    assert a._state.update == b._state.update


def small(loss: str = "softmax_cross_entropy", **settings: object) -> fd.Sequential:
    """One layer."""
    return fd.Sequential([layers.Dense(3 if loss.startswith("softmax") else 1)], seed=1).compile(loss, **settings)


def refused(call: Callable[[], object], kind: type[Exception] | tuple[type[Exception], ...], *words: str) -> None:
    """The call raises, without a warning before, and says the words."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(kind) as caught:
            call()
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in {caught.value}"
