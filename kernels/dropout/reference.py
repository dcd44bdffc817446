"""Dropout: y = x * scale where an element is kept, +0 where it is dropped (Srivastava et al., JMLR 15, 2014; inverted).

Shape letters: N rows of the batch, C columns (the row's flattened features).

The mask is a pure function of (column, global row, layer, step, seed), see README.md: nothing is saved for backward,
which draws the same mask again and applies it to dy. ``rate`` is the probability to **drop**. It is quantised to a
threshold T of 16 bits, and ``scale = 65536 / T`` is the inverse of the true keep probability, rounded once to the
dtype, so E[y] = x but for that rounding. A dropped element is +0, even for NaN; a kept NaN stays NaN.
"""

from __future__ import annotations

import numpy as np

from fastdl.kernels.common import philox
from fastdl.kernels.registry import Array, OpSpec, Param, Tolerance, register_op

#: Counters of one round trip through NumPy: the generator's dozen temporaries of 8 bytes a counter stay in L2.
CHUNK = 1 << 12


def keep(rows: int, cols: int, T: int, seed: int, layer: int, step: int, first_row: int) -> np.ndarray:
    """Which elements of a (rows, cols) matrix are kept, as bool."""
    columns = np.arange(-(-cols // 8))  # one counter draws 8 columns
    row = (np.arange(rows) + first_row & philox.MASK)[:, None]
    words = philox.block(columns, row, layer, step, *philox.split(seed))
    lanes = np.empty((rows, len(columns), 4), "<u4")  # 16-bit lanes, low half first
    for k in range(4):
        lanes[:, :, k] = words[k]
    return (lanes.view("<u2").reshape(rows, -1) <= np.uint16(T - 1))[:, :cols]


def dropout_forward(
    x: np.ndarray,
    y: np.ndarray,
    *,
    rate: float = 0.5,
    seed: int = 0,
    layer: int = 0,
    step: int = 0,
    first_row: int = 0,
    threads: int = 1,
) -> None:
    """Drop elements of x (N, C) into y (N, C); y may be x."""
    rows, cols = x.shape
    T = philox.threshold(rate)
    scale = philox.scale(T, x.dtype)
    some = max(1, CHUNK * 8 // max(cols, 1))
    for a in range(0, rows, some):
        piece = y[a : a + some]
        np.multiply(x[a : a + some], scale, out=piece)
        piece[~keep(len(piece), cols, T, seed, layer, step, first_row + a)] = 0


def dropout_mask(
    mask: np.ndarray,
    *,
    rate: float = 0.5,
    seed: int = 0,
    layer: int = 0,
    step: int = 0,
    first_row: int = 0,
    threads: int = 1,
) -> None:
    """Write which elements are kept to mask (N, C), bool."""
    rows, cols = mask.shape
    T = philox.threshold(rate)
    some = max(1, CHUNK * 8 // max(cols, 1))
    for a in range(0, rows, some):
        mask[a : a + some] = keep(min(some, rows - a), cols, T, seed, layer, step, first_row + a)


#: The derivative is the mask times the scale: backward is forward on dy.
dropout_backward = dropout_forward

PARAMS = (Param("rate", "float", 0.5), Param("seed", "seed", 0), Param("layer", "int", 0))
RUNTIME = ("step", "first_row")
VARIANTS = (
    {"rate": 0.5, "seed": 42, "layer": 0},
    {"rate": 0.1, "seed": (1 << 64) - 1, "layer": 3},
    {"rate": 0.999, "seed": 7, "layer": 1},
)
WHY = "the scale is rounded once, the product once; the mask is the same bits everywhere"


def _spec(name: str, into: str, out: str, gradients: tuple[str, ...]) -> OpSpec:
    return OpSpec(
        name=name,
        family="dropout",
        summary=f"{out} = {into} * 65536 / T where kept, +0 where dropped",
        arrays=(Array(into, "N,C"), Array(out, "N,C", "out")),
        reference=dropout_forward,
        params=PARAMS,
        runtime=RUNTIME,
        tolerance=lambda sizes: Tolerance(ulp=1.5, why=WHY),
        variants=VARIANTS,
        gradients=gradients,
        aliases=((into, out),),
        column_local=True,
        flops=lambda sizes: float(sizes["N"] * sizes["C"]),
    )


register_op(_spec("dropout_forward", "x", "y", ("dropout_backward",)))
register_op(_spec("dropout_backward", "dy", "dx", ()))
register_op(
    OpSpec(
        name="dropout_mask",
        family="dropout",
        summary="which elements dropout keeps",
        arrays=(Array("mask", "N,C", "out", dtype="u1"),),
        reference=dropout_mask,
        params=PARAMS,
        runtime=RUNTIME,
        tolerance=lambda sizes: Tolerance(ulp=0.0, why="integers"),
        variants=VARIANTS,
        column_local=True,
    )
)
