"""Dense products with bias and activation."""

from __future__ import annotations

import numpy as np

from fastdl import checks
from fastdl.kernels.activations.reference import ACTIVATIONS
from fastdl.ops.activations import checked_alpha, epilogue
from fastdl.ops.call import Context, context, run


def dense_forward(
    x: np.ndarray,
    w: np.ndarray,
    b: np.ndarray | None = None,
    activation: str = "identity",
    alpha: float | None = None,
    out: np.ndarray | None = None,
    *,
    backend: str | None = None,
    threads: int | None = None,
) -> tuple[np.ndarray, Context]:
    """y = activation(x w + b).

    Parameters
    ----------
    x : (N, I), w : (I, O), b : (O,) or None
        Transposed views are taken.
    activation : str
        An element-wise activation without slopes.
    alpha : float, optional
        Its parameter, the default one if left out.
    out : (N, O), optional

    Returns
    -------
    y : (N, O)
    ctx : Context
    """
    x = checks.matrix(x, "x", transposed=True)
    w = checks.matrix(w, "w", x, transposed=True)
    if w.shape[0] != x.shape[1]:
        raise ValueError(f"w: expected {x.shape[1]} rows, as many as x has columns, found shape {w.shape}")
    if b is not None:
        b = checks.vector(b, "b", w.shape[1], x)
    info = epilogue(activation)
    params = {"activation": activation, "alpha": checked_alpha(info, alpha, x.dtype)}
    y = checks.output(out, (x.shape[0], w.shape[1]), x)
    if out is not None:
        checks.apart("dense_forward", {"x": x, "w": w, "b": b, "out": checks.rows(y, "out")})
    z = checks.empty(y.shape, y) if info.saves == "x" and activation != "identity" else None
    size = x.nbytes + w.nbytes + y.nbytes
    run("dense_forward", (x, w, b, y, z), params, backend, threads, size * max(1, min(x.shape[1], 64)))
    ctx = Context("dense", {"x": x, "w": w, "s": y if z is None else None}, params, {}, y.shape, backend, threads)
    if z is not None:
        ctx.arrays["s"] = z  # nobody else has it
    params["bias"] = b is not None
    return y, ctx


def dense_backward(dy: np.ndarray, ctx: Context) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Gradients dx (N, I), dw (I, O), db (O,) of `dense_forward`; db is None where there was no bias."""
    ctx = context(ctx, "dense")
    x, w, saved = (ctx.arrays[k] for k in ("x", "w", "s"))
    dy = checks.matrix(dy, "dy", x)
    checks.same_shape(dy, ctx.shape, "dy", "the output")
    name, dz = ctx.params["activation"], dy
    if name != "identity":
        params = {"alpha": ctx.params["alpha"]} if ACTIVATIONS[name].alpha is not None else {}
        dz = checks.empty(dy.shape, dy)
        run(f"{name}_backward", (dy, saved, dz), params, ctx.backend, ctx.threads, 3 * dy.nbytes)
    dx, dw = checks.empty(x.shape, x), checks.empty(w.shape, w)
    db = checks.empty(w.shape[1:], w) if ctx.params["bias"] else None
    size = (x.nbytes + w.nbytes + dy.nbytes) * max(1, min(x.shape[1], 64))
    run("dense_backward_input", (dz, w, dx), {}, ctx.backend, ctx.threads, size)
    run("dense_backward_weights", (x, dz, dw, db), {}, ctx.backend, ctx.threads, size)
    return dx, dw, db
