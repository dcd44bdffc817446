"""What cuBLASLt documents, done by NumPy: products in the library's own column-major terms.

Its D (m, n) is op(A) op(B) with m running fastest: our c turned, A our b, B our a. Sums are float64, with one rounding.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastdl.kernels.common.gpu import Product, View


def carry_out(product: Product, memory: Any) -> None:
    """Run a product on the memory of an interpreted device."""
    n, m, _ = product.sizes
    a, b = _columns(product.b, memory), _columns(product.a, memory)
    a = a.T if product.b_turned else a
    b = b.T if product.a_turned else b
    d = a @ b
    assert d.shape == (m, n)
    kind = product.epilogue
    if kind.endswith("BIAS"):
        d += _vector(product.vector, memory)[:, None]
    if kind == "RELU_AUX_BIAS":
        _write(product.aux, _packed(d > 0, product.aux).T, memory)
    if kind.startswith("RELU"):
        d = np.maximum(d, 0)
    if kind == "GELU_AUX_BIAS":
        _write(product.aux, d.T, memory)
        d = 0.5 * d * (1 + np.tanh(_inner(d)))
    if kind == "DRELU":
        d *= _bits(product.aux, m, memory)
    if kind == "DGELU":
        d *= _gelu_slope(_columns(product.aux, memory))
    if kind == "BGRADA":
        _write(product.vector, a.sum(1), memory)
    _write(product.c, d.T, memory)


def _inner(x: np.ndarray) -> np.ndarray:
    return np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)


def _gelu_slope(x: np.ndarray) -> np.ndarray:
    t = np.tanh(_inner(x))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x * x)


# ---------------------------------------------------------------------------------------------- memory
def _columns(view: View, memory: Any) -> np.ndarray:
    """A stored matrix as the library sees it: what we call a row is a column."""
    kind = np.dtype(np.uint16 if view.dtype == "bfloat16" else view.dtype)
    rows = [memory.read(view.address + r * view.row_stride * kind.itemsize, kind, view.cols) for r in range(view.rows)]
    found = np.array(rows, kind)
    return (_widened(found) if view.dtype == "bfloat16" else found.astype(np.float64)).T


def _vector(view: View, memory: Any) -> np.ndarray:
    kind = np.dtype(np.uint16 if view.dtype == "bfloat16" else view.dtype)
    found = memory.read(view.address, kind, view.shape[0])
    return _widened(found) if view.dtype == "bfloat16" else found.astype(np.float64)


def _widened(words: np.ndarray) -> np.ndarray:
    return (words.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def _write(view: View, values: np.ndarray, memory: Any) -> None:
    """Rows of a view, rounded to its type; what lies between them stays."""
    from gpu.device import to_bfloat16

    stored = to_bfloat16(values) if view.dtype == "bfloat16" else np.ascontiguousarray(values, view.dtype)
    if stored.ndim == 1:
        memory.write(view.address, stored)
        return
    for r, row in enumerate(stored):
        memory.write(view.address + r * view.row_stride * view.itemsize, row)


def _packed(positive: np.ndarray, aux: View) -> np.ndarray:
    """Bits (words, n) of (m, n), the first in the lowest place."""
    padded = np.zeros((aux.cols * 32, positive.shape[1]), bool)
    padded[: positive.shape[0]] = positive
    return np.packbits(np.ascontiguousarray(padded.T), axis=1, bitorder="little").view(np.uint32).T


def _bits(aux: View, m: int, memory: Any) -> np.ndarray:
    rows = [memory.read(aux.address + 4 * r * aux.row_stride, np.uint32, aux.cols) for r in range(aux.rows)]
    return np.unpackbits(np.array(rows).view(np.uint8), axis=1, bitorder="little")[:, :m].T.astype(np.float64)
