"""Batch normalisation, with the activation and the dropout behind it in the same pass."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastdl import checks
from fastdl.kernels.activations.reference import ACTIVATIONS
from fastdl.ops.activations import checked_alpha, epilogue
from fastdl.ops.call import Context, context, run
from fastdl.ops.dropout import position, stream


def batchnorm_forward(
    x: np.ndarray,
    gamma: np.ndarray,
    beta: np.ndarray,
    running_mean: np.ndarray,
    running_var: np.ndarray,
    training: bool = True,
    decay: float = 0.9,
    eps: float = 1e-5,
    activation: str = "identity",
    alpha: float | None = None,
    slope: np.ndarray | None = None,
    rate: float = 0.0,
    seed: int = 0,
    layer: int = 0,
    step: int = 0,
    first_row: int = 0,
    out: np.ndarray | None = None,
    *,
    backend: str | None = None,
    threads: int | None = None,
) -> tuple[np.ndarray, Context]:
    """y = dropout(activation(gamma (x - mean) / sqrt(var + eps) + beta)); Ioffe & Szegedy 2015.

    Parameters
    ----------
    x : (N, C); gamma, beta, running_mean, running_var : (C,)
    training : bool
        True normalises with the biased batch variance and updates the running statistics in place (with the unbiased
        one); False uses the running statistics and applies no dropout.
    decay : float
        Weight of the **old** running statistic.
    activation, alpha, slope
        Fused element-wise activation; ``slope`` (C,) for "prelu".
    rate, seed, layer, step, first_row
        Fused dropout, see `dropout_forward`.

    Returns
    -------
    y : (N, C)
    ctx : Context
    """
    x = checks.matrix(x, "x")
    if x.shape[0] == 0:
        raise ValueError("x: expected at least one row to normalise over, found none")
    vectors = {"gamma": gamma, "beta": beta, "running_mean": running_mean, "running_var": running_var}
    for name, value in vectors.items():
        vectors[name] = checks.vector(value, name, x.shape[1], x)
    gamma, beta, running_mean, running_var = vectors.values()
    training = checks.flag(training, "training")
    decay, eps = checks.OLD.check(decay, "decay"), checks.POSITIVE.check(eps, "eps")
    checks.fits(eps, "eps", x.dtype)
    if isinstance(activation, str) and activation == "prelu":
        info = ACTIVATIONS["prelu"]
        slope = checks.vector(slope, "slope", x.shape[1], x)
    elif slope is not None:
        raise ValueError(f"slope: belongs to activation 'prelu', found it with {activation!r}")
    else:
        info = epilogue(activation)
    y = checks.output(out, x.shape, x)
    op = "batchnorm_forward" if training else "batchnorm_inference"
    given = {"x": x, **vectors, "slope": slope, "out": None if out is None else checks.rows(y, "out")}
    checks.apart(op, given)
    params: dict[str, Any] = {"activation": activation, "alpha": checked_alpha(info, alpha, x.dtype)}
    size = 3 * x.nbytes
    if not training:
        arrays = (x, gamma, beta, running_mean, running_var, slope, y)
        run(op, arrays, {**params, "eps": eps}, backend, threads, size)
        mean, inv_std = _inverse(running_mean, running_var, eps)
        runtime = {"step": 0, "first_row": 0}
        params |= {"rate": 0.0, "seed": 0, "layer": 0, "training": 0}
    else:
        checks.writable(running_mean, "running_mean")
        checks.writable(running_var, "running_var")
        params |= stream(rate, seed, layer)
        runtime = position(step, first_row)
        mean, inv_std = checks.empty(x.shape[1:], x), checks.empty(x.shape[1:], x)
        arrays = (x, gamma, beta, running_mean, running_var, slope, y, mean, inv_std)
        run(op, arrays, {**params, "decay": decay, "eps": eps, **runtime}, backend, threads, size)
        params["training"] = 1
    saved = {"x": x, "gamma": gamma, "beta": beta, "slope": slope}
    ctx = Context("batchnorm", saved, params, runtime, x.shape, backend, threads)
    ctx.arrays |= {"mean": mean, "inv_std": inv_std}  # nobody else has them
    return y, ctx


def _inverse(mean: Any, var: Any, eps: float) -> tuple[Any, Any]:
    """Copies of running statistics as the backward pass takes them; a GPU's come by way of the host."""
    values = [value if checks.on_host(value) else value.numpy() for value in (mean, var)]
    found = values[0].copy(), (1.0 / np.sqrt(values[1] + values[1].dtype.type(eps))).astype(values[1].dtype)
    return found if checks.on_host(mean) else tuple(mean.holding(value) for value in found)


def batchnorm_backward(dy: np.ndarray, ctx: Context, out: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
    """Gradients dx (N, C), dgamma (C,), dbeta (C,), and dslope (C,) after PReLU, of `batchnorm_forward`."""
    ctx = context(ctx, "batchnorm")
    x, slope = ctx.arrays["x"], ctx.arrays["slope"]
    dy = checks.matrix(dy, "dy", x)
    checks.same_shape(dy, ctx.shape, "dy", "the output")
    dx = checks.output(out, x.shape, x)
    if out is not None:
        checks.apart("batchnorm_backward", {"dy": dy, **ctx.arrays, "out": checks.rows(dx, "out")})
    dgamma, dbeta = checks.empty(x.shape[1:], x), checks.empty(x.shape[1:], x)
    dslope = None if slope is None else checks.empty(slope.shape, slope)
    arrays = (
        dy,
        *(ctx.arrays[k] for k in ("x", "gamma", "beta", "mean", "inv_std", "slope")),
        None,  # the output belongs to the caller, who may have written over it
        dx,
        dgamma,
        dbeta,
        dslope,
    )
    run("batchnorm_backward", arrays, {**ctx.params, **ctx.runtime}, ctx.backend, ctx.threads, 5 * x.nbytes)
    return (dx, dgamma, dbeta) if dslope is None else (dx, dgamma, dbeta, dslope)
