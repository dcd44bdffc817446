"""fastdl, and its NumPy back end as a peer of its own."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import fastdl as fd
from bench.cases import NETS, Net, OpCase
from bench.measure import peak
from bench.peers.data import RATE, batch, labels, normal
from bench.peers.worker import Work
from bench.prepare import prepare
from fastdl import layers, ops
from fastdl.kernels import dispatch, registry
from fastdl.kernels.engine import panels


def stack(net: Net, plain: bool = False) -> list[layers.Layer]:
    """The net's layers; without batch norm and dropout if plain."""
    if not plain:
        return net.layers()
    hidden = [layer for width in net.widths[1:-1] for layer in (layers.Dense(width), layers.ReLU())]
    return [*hidden, layers.Dense(net.widths[-1])]


def _compiled(net: Net, backend: str, threads: int, plain: bool = False, mixed: bool = False) -> fd.Sequential:
    """Threads are the library's own choice, at most one for each core of the process."""
    model = fd.Sequential(stack(net, plain), seed=1)
    chosen: int | str = 1 if threads == 1 else "auto"
    model.compile(
        loss="softmax_cross_entropy",
        optimizer="adam",
        backend=backend,
        threads=chosen,
        fuse=backend != "numpy",
        dtype="mixed_bfloat16" if mixed else "float32",
    )
    return model.build(net.widths[0])


def step(net: str, entry: str, threads: int, variant: str, plain: bool = False, mixed: bool = False) -> Work:
    found = NETS[net]
    model = _compiled(found, variant, threads, plain, mixed)
    if entry == "fit":
        X, y = batch(found, found.fit_steps)
        return Work(lambda: model.fit(X, y, batch_size=found.batch, epochs=1, verbose=0), found.fit_steps)
    X, y = batch(found)
    return Work(lambda: model.train_on_batch(X, y))


def op(op: str, rows: int, cols: int, threads: int, variant: str) -> Work:
    x, out = normal(rows, cols), np.empty((rows, cols), np.float32)
    where: dict[str, Any] = {"backend": variant, "threads": threads}
    if op == "dropout_forward":
        return Work(lambda: ops.dropout_forward(x, RATE, 7, out=out, **where))
    if op.startswith("batchnorm"):
        gamma, beta = np.ones(cols, np.float32), np.zeros(cols, np.float32)
        mean, var = np.zeros(cols, np.float32), np.ones(cols, np.float32)

        def forward() -> Any:
            return ops.batchnorm_forward(x, gamma, beta, mean, var, training=True, out=out, **where)

        if op == "batchnorm_forward":
            return Work(forward)
        dy, ctx, dx = normal(rows, cols, seed=3), forward()[1], np.empty((rows, cols), np.float32)
        return Work(lambda: ops.batchnorm_backward(dy, ctx, out=dx))
    if op == "softmax_cross_entropy":
        targets = labels(rows, cols)
        return Work(lambda: ops.softmax_cross_entropy(x, targets, out=out, **where))
    if op == "adam_step":
        w, g, m, v = x.reshape(-1), normal(rows * cols, seed=3), np.zeros(rows * cols, np.float32), out.reshape(-1) * 0
        return Work(lambda: ops.adam_step(w, g, m, v, 0, lr=1e-3, **where))
    function = getattr(ops, op)
    return Work(lambda: function(x, out=out, **where))


def linear(shape: Sequence[int], threads: int, variant: str, mixed: bool = False) -> Work:
    n, i, o = shape
    x, w, b, out = normal(n, i), normal(i, o), normal(o), np.empty((n, o), np.float32)
    if mixed:
        dispatch.load(variant)
        impl = registry.find("dense_forward", variant)
        product = dispatch.caller(dataclasses.replace(impl, native={"float32": impl.native[dispatch.MIXED]}))
        arguments = {"activation": "identity", "alpha": 0.0}
        return Work(lambda: product((x, w, b, out, None), arguments, threads))
    return Work(lambda: ops.dense_forward(x, w, b, activation="relu", out=out, backend=variant, threads=threads))


def predict(net: str, rows: int, threads: int, variant: str) -> Work:
    found = NETS[net]
    model, x = _compiled(found, variant, threads), normal(rows, found.widths[0])
    return Work(lambda: model.predict(x))


def _timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def copy(op: str, threads: int, variant: str) -> Work:
    """An op in (4096, 2048) against a copy of as many bytes, measured in turn."""
    case = prepare(OpCase(op, 0, "memory", variant), threads)
    source = np.ones(32 << 20, np.uint8)
    target = source.copy()
    moved = 2 * source.nbytes
    return Work(case.ours, ceiling=lambda: _timed(lambda: np.copyto(target, source)) * case.bytes / moved)


def product(product: str, size: int, threads: int, variant: str) -> Work:
    """A product of operands in panels against the FMA peak, measured in turn."""
    a, b, c = (panels.pack(normal(size, size, seed=k)) for k in (1, 2, 3))
    bias = normal(size)
    name = "dense_forward" if product == "forward" else f"dense_{product}"
    arrays = {"forward": (a, b, bias, c, None), "backward_input": (a, b, c), "backward_weights": (a, b, c, bias)}
    arguments = {"activation": "relu", "alpha": 0.0} if product == "forward" else {}
    call = dispatch.caller(dispatch.choose(name, variant))
    flops = 2.0 * size**3
    return Work(lambda: call(arrays[product], arguments, threads), ceiling=lambda: flops / (peak() * threads))
