"""Dropout: a mask that is a pure function of seed, layer, step, row and column."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastdl import checks
from fastdl.kernels.common import philox
from fastdl.ops.call import Context, context, run


def stream(rate: float, seed: int, layer: int) -> dict[str, Any]:
    rate = checks.RATE.check(rate, "rate")
    philox.threshold(rate)
    return {"rate": rate, "seed": checks.whole(seed, "seed", 64), "layer": checks.whole(layer, "layer")}


def position(step: int, first_row: int) -> dict[str, int]:
    return {"step": checks.whole(step, "step"), "first_row": checks.whole(first_row, "first_row", 63)}


def dropout_forward(
    x: np.ndarray,
    rate: float,
    seed: int,
    layer: int = 0,
    step: int = 0,
    first_row: int = 0,
    out: np.ndarray | None = None,
    *,
    backend: str | None = None,
    threads: int | None = None,
) -> tuple[np.ndarray, Context]:
    """Zero each element with probability ``rate`` and scale the others (Srivastava et al. 2014).

    Parameters
    ----------
    x : (N, ...)
        Features are flattened; ``first_row`` is the global row of x[0] in the step's full batch.
    rate : float
        Probability to drop, in [0, 1); 0 copies.
    seed, layer, step : int
        The mask is a pure function of these and of row and column, on every back end.

    Returns
    -------
    y : shape of x
    ctx : Context
    """
    x = checks.floats(x, "x")
    params, runtime = stream(rate, seed, layer), position(step, first_row)
    y = checks.output(out, x.shape, x)
    if out is not None:
        checks.apart("dropout_forward", {"x": x, "out": y}, alias="x")
    arrays = _feature_rows(x, "x"), _feature_rows(y, "out")
    run("dropout_forward", arrays, {**params, **runtime}, backend, threads, 2 * x.nbytes)
    return y, Context("dropout", {"x": x}, params, runtime, x.shape, backend, threads)


def _feature_rows(x: Any, name: str) -> Any:
    """(N, features); a vector is N rows of one feature."""
    if not checks.on_host(x) and x.ndim == 1:
        return x.reshaped(x.size, 1)
    return checks.rows(x, name) if x.ndim != 1 else checks.rows(x[:, None] if x.size else x.reshape(0, 1), name)


def dropout_backward(dy: np.ndarray, ctx: Context, out: np.ndarray | None = None) -> np.ndarray:
    """Gradient of `dropout_forward`: the same mask and scale, regenerated."""
    ctx = context(ctx, "dropout")
    dy = checks.floats(dy, "dy", ctx.arrays["x"])
    checks.same_shape(dy, ctx.shape, "dy", "the output")
    dx = checks.output(out, dy.shape, dy)
    if out is not None:
        checks.apart("dropout_backward", {"dy": dy, "out": dx}, alias="dy")
    arrays = _feature_rows(dy, "dy"), _feature_rows(dx, "out")
    run("dropout_backward", arrays, {**ctx.params, **ctx.runtime}, ctx.backend, ctx.threads, 2 * dy.nbytes)
    return dx
