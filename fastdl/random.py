"""The random streams: Philox4x32-10 and what fastdl draws from it. Equal bits on every back end."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from fastdl import checks, config
from fastdl.inputs import whole_number
from fastdl.kernels import dispatch
from fastdl.kernels.common import philox


def philox4x32(counter: Any, key: Any, *, backend: str | None = None) -> np.ndarray:
    """Philox4x32-10 (Salmon et al. 2011).

    Parameters
    ----------
    counter : array-like (..., 4) of uint32
    key : array-like (2,) of uint32, or an int of 64 bits (low word first)

    Returns
    -------
    ndarray (..., 4) of uint32
    """
    counter = _words(counter, "counter")
    if isinstance(key, (int, np.integer)) and not isinstance(key, bool):
        key = [checks.whole(key, "key", 64) & 0xFFFFFFFF, int(key) >> 32]
    key = _words(key, "key")
    if counter.ndim == 0 or counter.shape[-1] != 4:
        raise ValueError(f"counter: expected shape (..., 4), found {counter.shape}")
    if key.shape != (2,):
        raise ValueError(f"key: expected shape (2,) or an int, found shape {key.shape}")
    flat = np.ascontiguousarray(counter.reshape(-1, 4))
    out = np.empty_like(flat)
    dispatch.run("philox4x32", flat, key, out, backend=config.resolve_backend(backend))
    return out.reshape(counter.shape)


def _words(value: Any, name: str) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.kind not in "iu" or (array.size and (int(array.min()) < 0 or int(array.max()) >= 1 << 32)):
        raise ValueError(f"{name}: expected integers in [0, 2**32), found dtype {array.dtype}")
    return np.ascontiguousarray(array, np.uint32) if array.ndim else array.astype(np.uint32)


def _shape(value: Any) -> tuple[int, ...]:
    """A shape of at least one dimension; an integer is that of a vector."""
    sizes = [checks.index(n) for n in (value if isinstance(value, Iterable) else (value,))]
    if not sizes:
        raise ValueError("shape: expected at least one dimension (rows), found none")
    if any(n is None or n < 0 for n in sizes):
        raise ValueError(f"shape: expected integers of at least 0, rows first, found {value!r}")
    return tuple(sizes)


def dropout_mask(
    shape: tuple[int, ...],
    rate: float,
    seed: int,
    layer: int = 0,
    step: int = 0,
    first_row: int = 0,
    *,
    backend: str | None = None,
) -> np.ndarray:
    """The mask that `fastdl.ops.dropout_forward` uses: True where an element is kept.

    Parameters
    ----------
    shape : tuple
        (N, ...): rows first, features flattened.
    """
    shape = _shape(shape)
    rate = checks.RATE.check(rate, "rate")
    philox.threshold(rate)
    arguments = {
        "rate": rate,
        "seed": checks.whole(seed, "seed", 64),
        "layer": checks.whole(layer, "layer"),
        "step": checks.whole(step, "step"),
        "first_row": checks.whole(first_row, "first_row", 63),
    }
    mask = np.empty((shape[0], math.prod(shape[1:])), np.bool_)
    if rate == 0:
        mask[...] = True
    else:
        dispatch.run("dropout_mask", mask, backend=config.resolve_backend(backend), **arguments)
    return mask.reshape(shape)


def permutation(n: int, seed: int, epoch: int = 0, *, backend: str | None = None) -> np.ndarray:
    """The order in which `fit` visits ``n`` rows in an epoch: int64 (n,)."""
    n = whole_number(n, "n")
    index = np.empty(n, np.int64)
    arguments = {
        "n": n,
        "seed": checks.whole(seed, "seed", 64),
        "epoch": checks.whole(epoch, "epoch"),
        "offset": 0,
    }
    dispatch.run("epoch_indices", index, backend=config.resolve_backend(backend), **arguments)
    return index
