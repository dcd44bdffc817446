"""Stateless ops on NumPy arrays: ``<op>_forward(...) -> (y, ctx)``, ``<op>_backward(dy, ctx) -> gradients``.

Every function takes ``out=`` where it has one main result, ``backend=`` ("auto", "cython", "numba", "numpy") and
``threads=``. Arrays are float32 or float64 of one dtype and are never cast or copied: any row stride is taken, columns
must be adjacent (dense products also take transposed views). ``out is x`` is allowed for element-wise ops, any other
overlap is refused. Wrong arguments raise before anything is written.

The functions of the element-wise activations (``relu_forward``, ``relu_backward``, ...) are made from the registry.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastdl import checks, config
from fastdl.kernels import dispatch, registry
from fastdl.kernels.activations.reference import ACTIVATIONS
from fastdl.kernels.common import philox

#: Bytes moved below which one thread is used: a parallel region costs about 1 us, which is 30 kB at memory speed.
BYTES_PER_THREAD = 1 << 20


class Context:
    """What a forward call keeps for its backward call."""

    __slots__ = ("arrays", "backend", "op", "params", "runtime", "shape", "threads")

    def __init__(
        self,
        op: str,
        arrays: dict[str, Any],
        params: dict[str, Any],
        runtime: dict[str, Any],
        shape: tuple[int, ...],
        backend: str | None,
        threads: int | None,
    ) -> None:
        self.op, self.arrays, self.params, self.runtime, self.shape = op, arrays, params, runtime, shape
        self.backend, self.threads = backend, threads

    def expect(self, op: str) -> Context:
        if self.op != op:
            raise ValueError(f"{op}_backward: expected the context of {op}_forward, found that of {self.op}_forward")
        return self

    def __repr__(self) -> str:
        saved = ", ".join(f"{k} {v.shape}" for k, v in self.arrays.items() if v is not None)
        return f"Context({self.op}: {saved})"


def _context(ctx: Any, op: str) -> Context:
    if not isinstance(ctx, Context):
        raise TypeError(f"{op}_backward: expected the context that {op}_forward returned, found {type(ctx).__name__}")
    return ctx.expect(op)


def _run(
    op: str, arrays: tuple[Any, ...], arguments: dict[str, Any], backend: str | None, threads: int | None, size: int
) -> None:
    """Dispatch a checked call; ``size`` is the bytes it moves."""
    call = dispatch.bound(op, config.resolve_backend(backend), arrays, arguments)
    number = config.resolve_threads(threads)
    if number is None:
        number = 1 if size < BYTES_PER_THREAD else config.available_threads()[0]
    call(arrays, arguments, number)


# ---------------------------------------------------------------------------------------------- activations
def _activation_forward(
    name: str, x: Any, slope: Any, out: Any, params: dict[str, float], backend: str | None, threads: int | None
) -> tuple[np.ndarray, Context]:
    info = ACTIVATIONS[name]
    checks.floats(x, "x")
    y = checks.output(out, x.shape, x.dtype, {"x": x, "slope": slope}, alias="" if info.row_op else "x")
    x2, y2 = checks.rows(x, "x"), checks.rows(y, "out")
    arrays: tuple[Any, ...] = (x2, y2)
    if slope is not None:
        if x.ndim != 2:
            raise ValueError(f"x: expected two dimensions where slopes belong to columns, found shape {x.shape}")
        arrays = (x2, checks.vector(slope, "slope", x.shape[1], x.dtype), y2)
    _run(f"{name}_forward", arrays, params, backend, threads, 2 * x.nbytes)
    saved = y if info.saves == "y" else x
    if info.saves == "x" and y is x and name not in ("identity",):
        saved = None  # overwritten in place
    return y, Context(name, {info.saves: saved, "slope": slope}, params, {}, x.shape, backend, threads)


def _activation_backward(name: str, dy: Any, ctx: Any, out: Any) -> Any:
    ctx = _context(ctx, name)
    info = ACTIVATIONS[name]
    saved, slope = ctx.arrays[info.saves], ctx.arrays["slope"]
    if saved is None:
        raise ValueError(f"{name}_backward needs the input of the forward pass, which out=x has overwritten")
    checks.floats(dy, "dy", saved.dtype)
    checks.same_shape(dy, ctx.shape, "dy", "the output")
    alias = "" if info.row_op else "dy"
    dx = checks.output(out, ctx.shape, saved.dtype, {"dy": dy, info.saves: saved, "slope": slope}, alias=alias)
    views = checks.rows(dy, "dy"), checks.rows(saved, info.saves), checks.rows(dx, "out")
    if slope is None:
        _run(f"{name}_backward", views, ctx.params, ctx.backend, ctx.threads, 3 * dy.nbytes)
        return dx
    dslope = np.empty_like(slope)
    arrays = (views[0], views[1], slope, views[2], dslope)
    _run(f"{name}_backward", arrays, ctx.params, ctx.backend, ctx.threads, 3 * dy.nbytes)
    return dx, dslope


def _make_activation(name: str) -> tuple[Any, Any]:
    info = ACTIVATIONS[name]

    if info.per_channel:

        def forward(
            x: np.ndarray, slope: np.ndarray, out: np.ndarray | None = None, *, backend: str | None = None,
            threads: int | None = None,
        ) -> tuple[np.ndarray, Context]:
            return _activation_forward(name, x, slope, out, {}, backend, threads)

    elif info.alpha is not None:

        def forward(
            x: np.ndarray, alpha: float = info.alpha, out: np.ndarray | None = None, *, backend: str | None = None,
            threads: int | None = None,
        ) -> tuple[np.ndarray, Context]:
            return _activation_forward(name, x, None, out, {"alpha": float(alpha)}, backend, threads)

    else:

        def forward(
            x: np.ndarray, out: np.ndarray | None = None, *, backend: str | None = None, threads: int | None = None
        ) -> tuple[np.ndarray, Context]:
            return _activation_forward(name, x, None, out, {}, backend, threads)

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


for _name in ACTIVATIONS:
    globals()[f"{_name}_forward"], globals()[f"{_name}_backward"] = _make_activation(_name)


# ---------------------------------------------------------------------------------------------- dense
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
    checks.matrix(x, "x", transposed=True)
    checks.matrix(w, "w", x.dtype, transposed=True)
    if w.shape[0] != x.shape[1]:
        raise ValueError(f"w: expected {x.shape[1]} rows, as many as x has columns, found shape {w.shape}")
    if b is not None:
        checks.vector(b, "b", w.shape[1], x.dtype)
    info = _epilogue(activation)
    params = {"activation": activation, "alpha": _alpha(info, alpha)}
    y = checks.output(out, (x.shape[0], w.shape[1]), x.dtype, {"x": x, "w": w, "b": b})
    checks.rows(y, "out")
    z = np.empty_like(y) if info.saves == "x" and activation != "identity" else None
    size = x.nbytes + w.nbytes + y.nbytes
    _run("dense_forward", (x, w, b, y, z), params, backend, threads, size * max(1, min(x.shape[1], 64)))
    saved = {"x": x, "w": w, "b": b, "s": y if z is None else z}
    return y, Context("dense", saved, params, {}, y.shape, backend, threads)


def _epilogue(activation: str) -> Any:
    usable = [n for n, i in ACTIVATIONS.items() if not i.per_channel and not i.row_op]
    if activation not in usable:
        raise ValueError(f"activation: unknown or not element-wise {activation!r}, known: {', '.join(usable)}")
    return ACTIVATIONS[activation]


def _alpha(info: Any, alpha: float | None) -> float:
    if alpha is None:
        return float(info.alpha or 0.0)
    if info.alpha is None:
        raise ValueError(f"alpha: {info.name} has no parameter, found {alpha!r}")
    return float(alpha)


def dense_backward(
    dy: np.ndarray, ctx: Context
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Gradients dx (N, I), dw (I, O), db (O,) of `dense_forward`; db is None where there was no bias."""
    ctx = _context(ctx, "dense")
    x, w, b, saved = (ctx.arrays[k] for k in ("x", "w", "b", "s"))
    checks.matrix(dy, "dy", x.dtype)
    checks.same_shape(dy, ctx.shape, "dy", "the output")
    name, dz = ctx.params["activation"], dy
    if name != "identity":
        params = {"alpha": ctx.params["alpha"]} if ACTIVATIONS[name].alpha is not None else {}
        dz = np.empty(dy.shape, dy.dtype)
        _run(f"{name}_backward", (dy, saved, dz), params, ctx.backend, ctx.threads, 3 * dy.nbytes)
    dx, dw = np.empty(x.shape, x.dtype), np.empty(w.shape, w.dtype)
    db = None if b is None else np.empty(b.shape, b.dtype)
    size = (x.nbytes + w.nbytes + dy.nbytes) * max(1, min(x.shape[1], 64))
    _run("dense_backward_input", (dz, w, dx), {}, ctx.backend, ctx.threads, size)
    _run("dense_backward_weights", (x, dz, dw, db), {}, ctx.backend, ctx.threads, size)
    return dx, dw, db


# ---------------------------------------------------------------------------------------------- batch norm
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
    checks.matrix(x, "x")
    if x.shape[0] == 0:
        raise ValueError("x: expected at least one row to normalise over, found none")
    vectors = {"gamma": gamma, "beta": beta, "running_mean": running_mean, "running_var": running_var}
    for name, value in vectors.items():
        checks.vector(value, name, x.shape[1], x.dtype)
    if not 0 <= decay <= 1:
        raise ValueError(f"decay: expected the weight of the old statistic, in [0, 1], found {decay!r}")
    if not eps > 0:
        raise ValueError(f"eps: expected a positive value, found {eps!r}")
    if activation == "prelu":
        info = ACTIVATIONS["prelu"]
        checks.vector(slope, "slope", x.shape[1], x.dtype)
    elif slope is not None:
        raise ValueError(f"slope: belongs to activation 'prelu', found it with {activation!r}")
    else:
        info = _epilogue(activation)
    y = checks.output(out, x.shape, x.dtype, {"x": x, **vectors, "slope": slope})
    checks.rows(y, "out")
    params: dict[str, Any] = {"activation": activation, "alpha": _alpha(info, alpha)}
    size = 3 * x.nbytes
    if not training:
        arrays = (x, gamma, beta, running_mean, running_var, slope, y)
        _run("batchnorm_inference", arrays, {**params, "eps": eps}, backend, threads, size)
        mean, inv_std = running_mean.copy(), (1.0 / np.sqrt(running_var + x.dtype.type(eps))).astype(x.dtype)
        runtime = {"step": 0, "first_row": 0}
        params |= {"rate": 0.0, "seed": 0, "layer": 0, "training": 0}
    else:
        checks.writable(running_mean, "running_mean")
        checks.writable(running_var, "running_var")
        params |= _stream(rate, seed, layer)
        runtime = _position(step, first_row)
        mean, inv_std = np.empty(x.shape[1], x.dtype), np.empty(x.shape[1], x.dtype)
        arrays = (x, gamma, beta, running_mean, running_var, slope, y, mean, inv_std)
        _run("batchnorm_forward", arrays, {**params, "decay": decay, "eps": eps, **runtime}, backend, threads, size)
        params["training"] = 1
    saved = {"x": x, "gamma": gamma, "beta": beta, "mean": mean, "inv_std": inv_std, "slope": slope}
    return y, Context("batchnorm", saved, params, runtime, x.shape, backend, threads)


def batchnorm_backward(dy: np.ndarray, ctx: Context, out: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
    """Gradients dx (N, C), dgamma (C,), dbeta (C,), and dslope (C,) after PReLU, of `batchnorm_forward`."""
    ctx = _context(ctx, "batchnorm")
    x, slope = ctx.arrays["x"], ctx.arrays["slope"]
    checks.matrix(dy, "dy", x.dtype)
    checks.same_shape(dy, ctx.shape, "dy", "the output")
    dx = checks.output(out, x.shape, x.dtype, {"dy": dy, **ctx.arrays}, name="out")
    checks.rows(dx, "out")
    dgamma, dbeta = np.empty(x.shape[1], x.dtype), np.empty(x.shape[1], x.dtype)
    dslope = None if slope is None else np.empty_like(slope)
    arrays = (dy, *(ctx.arrays[k] for k in ("x", "gamma", "beta", "mean", "inv_std", "slope")), dx, dgamma, dbeta, dslope)
    _run("batchnorm_backward", arrays, {**ctx.params, **ctx.runtime}, ctx.backend, ctx.threads, 5 * x.nbytes)
    return (dx, dgamma, dbeta) if dslope is None else (dx, dgamma, dbeta, dslope)


# ---------------------------------------------------------------------------------------------- dropout
def _stream(rate: float, seed: int, layer: int) -> dict[str, Any]:
    rate = checks.share(rate)
    philox.threshold(rate)
    return {"rate": rate, "seed": checks.whole(seed, "seed", 64), "layer": checks.whole(layer, "layer")}


def _position(step: int, first_row: int) -> dict[str, int]:
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
    checks.floats(x, "x")
    params, runtime = _stream(rate, seed, layer), _position(step, first_row)
    y = checks.output(out, x.shape, x.dtype, {"x": x}, alias="x")
    arrays = _feature_rows(x, "x"), _feature_rows(y, "out")
    _run("dropout_forward", arrays, {**params, **runtime}, backend, threads, 2 * x.nbytes)
    return y, Context("dropout", {"x": x}, params, runtime, x.shape, backend, threads)


def _feature_rows(x: np.ndarray, name: str) -> np.ndarray:
    """(N, features); a vector is N rows of one feature."""
    return checks.rows(x, name) if x.ndim != 1 else checks.rows(x[:, None] if x.size else x.reshape(0, 1), name)


def dropout_backward(dy: np.ndarray, ctx: Context, out: np.ndarray | None = None) -> np.ndarray:
    """Gradient of `dropout_forward`: the same mask and scale, regenerated."""
    ctx = _context(ctx, "dropout")
    checks.floats(dy, "dy", ctx.arrays["x"].dtype)
    checks.same_shape(dy, ctx.shape, "dy", "the output")
    dx = checks.output(out, dy.shape, dy.dtype, {"dy": dy}, alias="dy")
    arrays = _feature_rows(dy, "dy"), _feature_rows(dx, "out")
    _run("dropout_backward", arrays, {**ctx.params, **ctx.runtime}, ctx.backend, ctx.threads, 2 * dy.nbytes)
    return dx


# ---------------------------------------------------------------------------------------------- losses
def _loss(
    op: str, z: Any, targets: Any, sample_weight: Any, out: Any, backend: str | None, threads: int | None
) -> tuple[float, np.ndarray]:
    checks.matrix(z, "z")
    if z.shape[0] == 0 or z.shape[1] == 0:
        raise ValueError(f"z: expected at least one row and one column, found shape {z.shape}")
    checks.is_array(targets, "targets")
    if op == "softmax_cross_entropy" and targets.ndim == 2:
        op = "softmax_cross_entropy_onehot"
    if op == "softmax_cross_entropy":
        targets = _labels(targets, z.shape)
    else:
        checks.matrix(targets, "targets", z.dtype)
        checks.same_shape(targets, z.shape, "targets", "z")
        if np.isnan(targets).any():
            raise ValueError("targets: expected numbers, found NaN; drop or fill those rows")
    if sample_weight is not None:
        checks.vector(sample_weight, "sample_weight", z.shape[0], z.dtype)
        if not np.isfinite(sample_weight).all() or (sample_weight < 0).any() or not (sample_weight > 0).any():
            raise ValueError("sample_weight: expected finite values of at least 0 with a positive sum")
    dz = checks.output(out, z.shape, z.dtype, {"targets": targets, "sample_weight": sample_weight, "z": z})
    checks.rows(dz, "out")
    stats = np.zeros(3)
    arguments = {"total_rows": z.shape[0]}
    _run(op, (z, targets, sample_weight, stats, dz), arguments, backend, threads, 2 * z.nbytes)
    return float(stats[0]), dz


def _labels(targets: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if targets.dtype.kind not in "iu":
        raise TypeError(f"targets: expected integer labels (N,) or one-hot rows (N, C), found dtype {targets.dtype}")
    if targets.shape != shape[:1]:
        raise ValueError(f"targets: expected shape {shape[:1]}, one label per row, found {targets.shape}")
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= shape[1]:
        raise ValueError(f"targets: expected labels in [0, {shape[1]}), found values from {low} to {high}")
    return np.ascontiguousarray(targets, np.int64)


def softmax_cross_entropy(
    z: np.ndarray,
    targets: np.ndarray,
    sample_weight: np.ndarray | None = None,
    out: np.ndarray | None = None,
    *,
    backend: str | None = None,
    threads: int | None = None,
) -> tuple[float, np.ndarray]:
    """Mean of logsumexp(z) - z[target], and its gradient dz (N, C), in one pass.

    Parameters
    ----------
    z : (N, C)
        Logits.
    targets : (N,) integers in [0, C), or (N, C) one-hot (or soft) rows of z's dtype
    sample_weight : (N,), optional
        The loss is then sum(w l) / sum(w).
    """
    return _loss("softmax_cross_entropy", z, targets, sample_weight, out, backend, threads)


def binary_cross_entropy(
    z: np.ndarray,
    targets: np.ndarray,
    sample_weight: np.ndarray | None = None,
    out: np.ndarray | None = None,
    *,
    backend: str | None = None,
    threads: int | None = None,
) -> tuple[float, np.ndarray]:
    """Mean over rows and columns of softplus(z) - z t for logits z (N, C) and targets t in [0, 1], and its gradient."""
    return _loss("binary_cross_entropy", z, targets, sample_weight, out, backend, threads)


def mse(
    z: np.ndarray,
    targets: np.ndarray,
    sample_weight: np.ndarray | None = None,
    out: np.ndarray | None = None,
    *,
    backend: str | None = None,
    threads: int | None = None,
) -> tuple[float, np.ndarray]:
    """Mean over rows and columns of (z - t)^2, and its gradient."""
    return _loss("mse", z, targets, sample_weight, out, backend, threads)


# ---------------------------------------------------------------------------------------------- optimisers
def _sweep(op: str, arrays: dict[str, Any], arguments: dict[str, Any], backend: str | None, threads: int | None) -> None:
    w = checks.floats(arrays["w"], "w")
    flat: dict[str, Any] = {}
    for name, x in arrays.items():
        if x is None:
            flat[name] = None
            continue
        checks.floats(x, name, w.dtype)
        checks.same_shape(x, w.shape, name, "w")
        if not x.flags.c_contiguous:
            raise ValueError(f"{name}: expected a C-contiguous array, found strides {x.strides}; use np.ascontiguousarray")
        if name != "g":
            checks.writable(x, name)
        for other, seen in flat.items():
            if seen is not None and np.may_share_memory(seen, x):
                raise ValueError(f"{name}: overlaps {other}; hand over another array")
        flat[name] = x.reshape(-1)
    ordered = tuple(flat.get(a.name) for a in registry.spec(op).arrays)
    _run(op, ordered, arguments, backend, threads, sum(x.nbytes for x in flat.values() if x is not None) * 2)


def sgd_step(
    w: np.ndarray,
    g: np.ndarray,
    v: np.ndarray | None = None,
    lr: float = 0.01,
    momentum: float = 0.0,
    nesterov: bool = False,
    l2: float = 0.0,
    weight_decay: float = 0.0,
    *,
    backend: str | None = None,
    threads: int | None = None,
) -> None:
    """One step of stochastic gradient descent, in place; ``v`` is the velocity that momentum needs."""
    if v is None and momentum:
        raise ValueError("v: momentum needs a velocity array of w's shape, found None")
    arguments = {"momentum": momentum, "nesterov": int(nesterov), "l2": l2, "weight_decay": weight_decay, "lr": lr}
    _sweep("sgd_step", {"w": w, "g": g, "v": v}, {**arguments, "step": 0}, backend, threads)


def adam_step(
    w: np.ndarray,
    g: np.ndarray,
    m: np.ndarray,
    v: np.ndarray,
    step: int,
    lr: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    l2: float = 0.0,
    weight_decay: float = 0.0,
    *,
    backend: str | None = None,
    threads: int | None = None,
) -> None:
    """One step of Adam (Kingma & Ba 2015, Algorithm 1), or AdamW with ``weight_decay`` (Loshchilov & Hutter 2019), in place.

    ``step`` counts from 0: the bias corrections use t = step + 1.
    """
    arguments = {"beta1": beta1, "beta2": beta2, "eps": eps, "l2": l2, "weight_decay": weight_decay, "lr": lr}
    arguments["step"] = checks.whole(step, "step")
    _sweep("adam_step", {"w": w, "g": g, "m": m, "v": v}, arguments, backend, threads)
