"""fastdl: compiled kernels for training dense neural networks, under a thin layer API.

>>> import fastdl as fd
>>> from fastdl import layers
>>> net = fd.Sequential([layers.Dense(64), layers.ReLU(), layers.Dense(10)], seed=0)
>>> net.compile(loss="softmax_cross_entropy", optimizer="adam")
>>> history = net.fit(X, y, epochs=5)  # doctest: +SKIP
"""

from __future__ import annotations

from fastdl import _locate  # noqa: F401  # isort: skip  (makes fastdl.kernels importable)
from fastdl.kernels import dispatch as _dispatch  # isort: skip

_dispatch.load("numpy")  # declares every op; compiled back ends load when first used

from fastdl import callbacks, data, errors, initializers, kernels, layers, losses, ops, optimizers, random  # noqa: E402
from fastdl._version import __version__  # noqa: E402
from fastdl.config import backend, resolve_backend  # noqa: E402
from fastdl.model import Sequential, load  # noqa: E402
from fastdl.run import checkpoint  # noqa: E402


def backends() -> dict[str, str]:
    """Every back end with "available", or the reason why not."""
    return _dispatch.backends()


def explain(op: str, *arrays: object) -> str:
    """Which back end runs an op on these arrays, and why the others do not."""
    return _dispatch.explain(op, arrays, resolve_backend())


__all__ = [
    "Sequential",
    "__version__",
    "backend",
    "backends",
    "callbacks",
    "checkpoint",
    "data",
    "errors",
    "explain",
    "initializers",
    "kernels",
    "layers",
    "load",
    "losses",
    "ops",
    "optimizers",
    "random",
]
