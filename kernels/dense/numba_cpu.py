"""Dense products with Numba: ``np.matmul``, then bias, z and activation in one parallel sweep over y.

The product is NumPy's on purpose: the best Numba tile tried (4 rows x 64 columns over a packed panel of w) ran at 0.8
of ``np.matmul`` on one thread, because LLVM keeps its accumulators in memory. What pays is the sweep, one pass over y
instead of up to three.

Numerics: as the reference. The products are those of the BLAS that NumPy was built with, threads included.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from fastdl.kernels.common.blas import matmul
from fastdl.kernels.common.numba_cpu import parallel_kernel
from fastdl.kernels.registry import Impl, find, register, spec

#: Elements below which waking the threads (5 us) costs more than the sweep.
PARALLEL_FROM = 1 << 15


@parallel_kernel
def finish(y, b, relu):
    rows, cols = y.shape
    for r in prange(rows):
        for c in range(cols):
            v = y[r, c] + b[c]
            y[r, c] = y.dtype.type(0) if relu and v < 0 else v


@parallel_kernel
def finish_both(z, y, b, relu):
    rows, cols = z.shape
    for r in prange(rows):
        for c in range(cols):
            v = z[r, c] + b[c]
            z[r, c] = v
            y[r, c] = y.dtype.type(0) if relu and v < 0 else v


def dense_forward(
    x: np.ndarray,  # (N, I)
    w: np.ndarray,  # (I, O)
    b: np.ndarray | None,  # (O,)
    y: np.ndarray,  # (N, O)
    z: np.ndarray | None,  # (N, O)
    activation: str = "identity",
    alpha: float = 0.0,
    threads: int = 1,
) -> None:
    """y = act(x w + b): identity and ReLU in the sweep, other activations by their own kernel after it."""
    before = y if z is None else z
    matmul(x, w, before, threads)
    swept = activation in (None, "identity", "relu")
    relu = activation == "relu"
    if b is None and z is None and not relu and swept:
        return
    bias = np.zeros(w.shape[1], w.dtype) if b is None else b
    shared_by = threads if y.size >= PARALLEL_FROM else 1
    if z is None or not swept:
        finish(before, bias, relu, threads=shared_by)
    else:
        finish_both(z, y, bias, relu, threads=shared_by)
    if not swept:
        params = {"alpha": alpha} if any(p.name == "alpha" for p in spec(f"{activation}_forward").params) else {}
        find(f"{activation}_forward", "numba").fn(before, y, **params, threads=threads)


def dense_backward_input(dy: np.ndarray, w: np.ndarray, dx: np.ndarray, threads: int = 1) -> None:
    """dx (N, I) = dy (N, O) w^T (O, I)."""
    matmul(dy, w.T, dx, threads)


def dense_backward_weights(
    x: np.ndarray, dy: np.ndarray, dw: np.ndarray, db: np.ndarray | None, threads: int = 1
) -> None:
    """dw (I, O) = x^T (I, N) dy (N, O), db (O,) = column sums of dy."""
    matmul(x.T, dy, dw, threads)
    if db is not None:
        np.sum(dy, axis=0, out=db)


register(Impl("dense_forward", "numba", dense_forward))
register(Impl("dense_backward_input", "numba", dense_backward_input))
register(Impl("dense_backward_weights", "numba", dense_backward_weights))
