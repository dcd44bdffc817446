"""Dense products on NumPy: y = act(x w + b) and its three backward products.

    forward           z = x w + b, y = act(z)         x (N, I), w (I, O), b (O,), y and z (N, O)
    backward_input    dx = dz w^T                     dz (N, O)
    backward_weights  dw = x^T dz, db = sum of dz's rows

(Rumelhart, Hinton, Williams 1986; BP1 to BP4 in Nielsen 2015, chapter 2.) The upstream gradient of the backward ops is
that of the pre-activation, called dy after the output of a layer without activation; the activation's own backward op
comes before them. Saved for backward: x and w, and z where the activation's backward needs its input.

Numerics: a sum of K products rounds by at most K eps times the sum of absolute products, whatever its order, and by
about sqrt(K) eps in practice. Nothing is skipped: 0 * inf is NaN. Without rows the weights' gradients are 0; without
inputs y = act(b).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np

from fastdl.kernels.activations.reference import ACTIVATIONS
from fastdl.kernels.registry import Array, OpSpec, Param, Tolerance, register_op


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
    """y = act(x w + b); z, if given, receives x w + b."""
    before = y if z is None else z
    np.matmul(x, w, out=before)
    if b is not None:
        before += b
    activate(before, y, activation, alpha)


def activate(z: np.ndarray, y: np.ndarray, activation: str | None, alpha: float) -> None:
    """y = act(z), in place where y is z."""
    if activation in (None, "identity"):
        if y is not z:
            y[...] = z
        return
    ACTIVATIONS[activation].forward(z, y, alpha)


def dense_backward_input(dy: np.ndarray, w: np.ndarray, dx: np.ndarray, threads: int = 1) -> None:
    """dx = dy w^T."""
    np.matmul(dy, w.T, out=dx)


def dense_backward_weights(
    x: np.ndarray, dy: np.ndarray, dw: np.ndarray, db: np.ndarray | None, threads: int = 1
) -> None:
    """dw = x^T dy, db = column sums of dy."""
    np.matmul(x.T, dy, out=dw)
    if db is not None:
        np.sum(dy, axis=0, out=db)


def _tolerance(length: str, fewest: str, sizes: Mapping[str, int]) -> Tolerance:
    """``fewest`` is the length of the shortest result: the largest of very few sums may have cancelled itself."""
    terms, few = max(1, sizes[length]), sizes[fewest] < 4
    norm = (2.0 * np.sqrt(terms) + 2.0) * (4.0 if few else 1.0)
    return Tolerance(ulp=4.0, norm=norm, why=f"sums of {length} products: sqrt({length}) roundings")


def _weights(rng: np.random.Generator, shape: tuple[int, int], dtype: np.dtype, made: Mapping) -> np.ndarray:
    """Of the size that initialisers draw: a pre-activation near 1, whose rounding an activation does not enlarge."""
    return rng.standard_normal(shape) / np.sqrt(max(1, shape[0]))


def _flops(sizes: Mapping[str, int]) -> float:
    return 2.0 * sizes["N"] * sizes["I"] * sizes["O"]


register_op(
    OpSpec(
        name="dense_forward",
        family="dense",
        summary="y = act(x w + b)",
        arrays=(
            Array("x", "N,I"),
            Array("w", "I,O", fill=_weights),
            Array("b", "O", optional=True, single=True),
            Array("y", "N,O", role="out"),
            Array("z", "N,O", role="out", optional=True),
        ),
        params=(Param("activation", "activation", "identity"), Param("alpha", "float", 0.0)),
        reference=dense_forward,
        tolerance=partial(_tolerance, "I", "O"),
        variants=({}, {"activation": "relu"}, {"activation": "tanh"}, {"activation": "leaky_relu", "alpha": 0.01}),
        gradients=("dense_backward_input", "dense_backward_weights"),
        flops=_flops,
    )
)
register_op(
    OpSpec(
        name="dense_backward_input",
        family="dense",
        summary="dx = dy w^T",
        arrays=(Array("dy", "N,O"), Array("w", "I,O"), Array("dx", "N,I", role="out")),
        reference=dense_backward_input,
        tolerance=partial(_tolerance, "O", "I"),
        flops=_flops,
    )
)
register_op(
    OpSpec(
        name="dense_backward_weights",
        family="dense",
        summary="dw = x^T dy, db = column sums of dy",
        arrays=(
            Array("x", "N,I"),
            Array("dy", "N,O"),
            Array("dw", "I,O", role="out", single=True),
            Array("db", "O", role="out", optional=True, single=True),
        ),
        reference=dense_backward_weights,
        tolerance=partial(_tolerance, "N", "O"),
        flops=_flops,
    )
)
