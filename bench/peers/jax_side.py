"""JAX: every case one jitted function; the buffers of a training state are donated."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from bench.cases import NETS, Net
from bench.peers.data import RATE, batch, labels, normal
from bench.peers.worker import Missing, Work


def _parameters(net: Net, plain: bool) -> tuple[list[dict[str, jax.Array]], list[tuple[jax.Array, jax.Array]]]:
    """Weights and running statistics of each layer."""
    params, running = [], []
    for n, o in zip(net.widths[:-1], net.widths[1:], strict=True):
        norm = not plain and len(params) < len(net.widths) - 2
        rest = {"gamma": jnp.ones(o), "beta": jnp.zeros(o)} if norm else {"b": jnp.zeros(o)}
        params.append({"w": jnp.asarray(normal(n, o)) / n**0.5, **rest})
        running.append((jnp.zeros(o), jnp.ones(o)))
    return params, running


def _loss(params: Any, running: Any, x: jax.Array, y: jax.Array, key: jax.Array, rate: float) -> Any:
    after = []
    for k, (layer, (mean, var)) in enumerate(zip(params, running, strict=True)):
        x = x @ layer["w"]
        if "b" in layer:
            x = x + layer["b"]
        else:
            now = x.mean(0), x.var(0)
            x = (x - now[0]) * jax.lax.rsqrt(now[1] + 1e-5) * layer["gamma"] + layer["beta"]
            mean, var = 0.9 * mean + 0.1 * now[0], 0.9 * var + 0.1 * now[1]
        after.append((mean, var))
        if k < len(params) - 1:
            x = jax.nn.relu(x)
            if "gamma" in layer:
                kept = jax.random.bernoulli(jax.random.fold_in(key, k), 1 - rate, x.shape)
                x = jnp.where(kept, x / (1 - rate), 0.0)
    return -jnp.take_along_axis(jax.nn.log_softmax(x), y[:, None], 1).mean(), after


def step(net: str, entry: str, threads: int, variant: str, plain: bool = False) -> Work:
    found = NETS[net]
    x, y = (jnp.asarray(a) for a in batch(found))

    def adam(state: Any, x: jax.Array, y: jax.Array) -> Any:
        params, running, m, v, t, key = state
        (loss, running), grads = jax.value_and_grad(_loss, has_aux=True)(params, running, x, y, key, found.rate)
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, grads)
        v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, v, grads)
        t = t + 1
        a, b = 1e-3 / (1 - 0.9**t), 1 / (1 - 0.999**t)
        params = jax.tree.map(lambda p, m, v: p - a * m / (jnp.sqrt(v * b) + 1e-8), params, m, v)
        return (params, running, m, v, t, jax.random.split(key)[0]), loss

    params, running = _parameters(found, plain)
    zeros = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
    box = [(params, running, *zeros, jnp.float32(0), jax.random.key(0))]
    run = jax.jit(adam, donate_argnums=0)

    def body() -> float:
        box[0], loss = run(box[0], x, y)
        return float(loss)

    return Work(body)


def _batchnorm(x: jax.Array, gamma: jax.Array, beta: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    mean, var = x.mean(0), x.var(0)
    return (x - mean) * jax.lax.rsqrt(var + 1e-5) * gamma + beta, 0.1 * mean, 0.9 + 0.1 * var


def _cross_entropy(z: jax.Array, y: jax.Array) -> jax.Array:
    return -jnp.take_along_axis(jax.nn.log_softmax(z), y[:, None], 1).mean()


def op(op: str, rows: int, cols: int, threads: int, variant: str) -> Work:
    x, key = jnp.asarray(normal(rows, cols)), jax.random.key(0)
    gamma, beta = jnp.ones(cols), jnp.zeros(cols)
    other = jnp.asarray(normal(rows, cols, seed=3))
    calls: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "dropout_forward": (lambda x: jnp.where(jax.random.bernoulli(key, 1 - RATE, x.shape), x / (1 - RATE), 0), (x,)),
        "batchnorm_forward": (_batchnorm, (x, gamma, beta)),
        "batchnorm_backward": (
            lambda x, g, b, dy: jax.vjp(lambda *a: _batchnorm(*a)[0], x, g, b)[1](dy),
            (x, gamma, beta, other),
        ),
        "softmax_cross_entropy": (jax.value_and_grad(_cross_entropy), (x, jnp.asarray(labels(rows, cols)))),
        "relu_forward": (jax.nn.relu, (x,)),
        "elu_forward": (jax.nn.elu, (x,)),
        "sigmoid_forward": (jax.nn.sigmoid, (x,)),
        "tanh_forward": (jnp.tanh, (x,)),
        "softplus_forward": (jax.nn.softplus, (x,)),
        "gelu_forward": (lambda x: jax.nn.gelu(x, approximate=False), (x,)),
    }
    if op not in calls:
        raise Missing(f"no {op}")
    function, args = calls[op]
    run = jax.jit(function)
    return Work(lambda: jax.block_until_ready(run(*args)))
