"""Element-wise activations and softmax, made from the registry."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastdl import checks
from fastdl.kernels.activations.reference import ACTIVATIONS
from fastdl.ops.call import Context, context, run


def epilogue(activation: str) -> Any:
    """The entry of an activation that can be fused: element-wise and without slopes."""
    info = ACTIVATIONS.get(activation) if isinstance(activation, str) else None
    if info is None or info.per_channel or info.row_op:
        usable = [n for n, i in ACTIVATIONS.items() if not i.per_channel and not i.row_op]
        raise ValueError(f"activation: unknown or not element-wise {activation!r}, known: {', '.join(usable)}")
    return info


def checked_alpha(info: Any, alpha: Any, dtype: Any) -> float:
    """An activation's parameter as a float that the dtype holds, the default one if left out."""
    if alpha is not None:
        alpha = checks.FINITE.check(alpha, "alpha")
        checks.fits(alpha, "alpha", dtype)
    return info.checked_alpha(alpha)


def _activation_forward(
    name: str, x: Any, slope: Any, alpha: Any, out: Any, backend: str | None, threads: int | None
) -> tuple[np.ndarray, Context]:
    info = ACTIVATIONS[name]
    x = checks.floats(x, "x")
    params = {} if info.alpha is None else {"alpha": checked_alpha(info, alpha, x.dtype)}
    if slope is not None:
        if x.ndim != 2:
            raise ValueError(f"x: expected two dimensions where slopes belong to columns, found shape {x.shape}")
        slope = checks.vector(slope, "slope", x.shape[1], x)
    y = checks.output(out, x.shape, x)
    if out is not None:
        checks.apart(f"{name}_forward", {"x": x, "slope": slope, "out": y}, alias="" if info.row_op else "x")
    x2, y2 = checks.rows(x, "x"), checks.rows(y, "out")
    arrays: tuple[Any, ...] = (x2, slope, y2) if info.per_channel else (x2, y2)
    run(f"{name}_forward", arrays, params, backend, threads, 2 * x.nbytes)
    saved = y if info.saves == "y" else x
    if info.saves == "x" and out is not None and checks.overlap(y, x) and name not in ("identity",):
        saved = None  # overwritten in place
    kept = {info.saves: saved} if slope is None else {info.saves: saved, "slope": slope}
    return y, Context(name, kept, params, {}, x.shape, backend, threads)


def _activation_backward(name: str, dy: Any, ctx: Any, out: Any) -> Any:
    ctx = context(ctx, name)
    info = ACTIVATIONS[name]
    saved, slope = ctx.arrays[info.saves], ctx.arrays.get("slope")
    if saved is None:
        raise ValueError(f"{name}_backward needs the input of the forward pass, which out=x has overwritten")
    dy = checks.floats(dy, "dy", saved)
    checks.same_shape(dy, ctx.shape, "dy", "the output")
    dx = checks.output(out, ctx.shape, saved)
    if out is not None:
        given = {"dy": dy, info.saves: saved, "slope": slope, "out": dx}
        checks.apart(f"{name}_backward", given, alias="" if info.row_op else "dy")
    views = checks.rows(dy, "dy"), checks.rows(saved, info.saves), checks.rows(dx, "out")
    if slope is None:
        run(f"{name}_backward", views, ctx.params, ctx.backend, ctx.threads, 3 * dy.nbytes)
        return dx
    dslope = checks.empty(slope.shape, slope)
    arrays = (views[0], views[1], slope, views[2], dslope)
    run(f"{name}_backward", arrays, ctx.params, ctx.backend, ctx.threads, 3 * dy.nbytes)
    return dx, dslope


def _make_activation(name: str) -> tuple[Any, Any]:
    info = ACTIVATIONS[name]

    if info.per_channel:

        def forward(
            x: np.ndarray,
            slope: np.ndarray,
            out: np.ndarray | None = None,
            *,
            backend: str | None = None,
            threads: int | None = None,
        ) -> tuple[np.ndarray, Context]:
            return _activation_forward(name, x, slope, None, out, backend, threads)

    elif info.alpha is not None:

        def forward(
            x: np.ndarray,
            alpha: float = info.alpha,
            out: np.ndarray | None = None,
            *,
            backend: str | None = None,
            threads: int | None = None,
        ) -> tuple[np.ndarray, Context]:
            return _activation_forward(name, x, None, alpha, out, backend, threads)

    else:

        def forward(
            x: np.ndarray, out: np.ndarray | None = None, *, backend: str | None = None, threads: int | None = None
        ) -> tuple[np.ndarray, Context]:
            return _activation_forward(name, x, None, None, out, backend, threads)

    def backward(dy: np.ndarray, ctx: Context, out: np.ndarray | None = None) -> Any:
        return _activation_backward(name, dy, ctx, out)

    forward.__name__ = forward.__qualname__ = f"{name}_forward"
    backward.__name__ = backward.__qualname__ = f"{name}_backward"
    forward.__doc__ = (
        f"{info.summary}\n\n{info.formula}\n\nReturns y (shape of x) and the context for `{name}_backward`.\n\n"
        f"Source: {info.source}\n"
    )
    backward.__doc__ = f"Gradient of `{name}_forward` with respect to x{' and slope' if info.per_channel else ''}."
    return forward, backward


#: Every function by its name: ``relu_forward``, ``relu_backward``, ...
FUNCTIONS: dict[str, Any] = {}
for _name in ACTIVATIONS:
    FUNCTIONS[f"{_name}_forward"], FUNCTIONS[f"{_name}_backward"] = _make_activation(_name)
