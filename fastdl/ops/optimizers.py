"""Optimiser steps, in place."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastdl import checks
from fastdl.kernels import registry
from fastdl.ops.call import run


def _sweep(
    op: str, arrays: dict[str, Any], arguments: dict[str, Any], backend: str | None, threads: int | None
) -> None:
    w = checks.floats(arrays["w"], "w")
    given: dict[str, Any] = {}
    flat: dict[str, Any] = {}
    for name, x in arrays.items():
        if x is None:
            continue
        given[name] = x = checks.floats(x, name, w)
        checks.same_shape(x, w.shape, name, "w")
        if name != "g":
            checks.writable(x, name)
        flat[name] = checks.flat(x, name)
    checks.apart(op, given)
    for name, value in arguments.items():
        if type(value) is float and (1e-30 < value < 1.0 or (value == 0.0 and name != "eps")):
            continue  # what every setting may be, in a third of the time
        if name in checks.OPTIMIZER:
            arguments[name] = checks.OPTIMIZER[name].check(value, name)
            checks.fits(arguments[name], name, w.dtype)
    ordered = tuple(flat.get(a.name) for a in registry.spec(op).arrays)
    run(op, ordered, arguments, backend, threads, sum(x.nbytes for x in flat.values()) * 2)


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
    checks.flag(nesterov, "nesterov")
    if v is None and checks.OPTIMIZER["momentum"].check(momentum, "momentum"):
        raise ValueError("v: momentum needs a velocity array of w's shape, found None")
    arguments = {"momentum": momentum, "nesterov": int(nesterov), "l2": l2, "weight_decay": weight_decay, "lr": lr}
    _sweep("sgd_step", {"w": w, "g": g, "v": v}, arguments, backend, threads)


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
    """One step of Adam (Kingma & Ba 2015, Alg. 1), or AdamW by ``weight_decay`` (Loshchilov & Hutter 2019), in place.

    ``step`` counts from 0: the bias corrections use t = step + 1.
    """
    arguments = {"beta1": beta1, "beta2": beta2, "eps": eps, "l2": l2, "weight_decay": weight_decay, "lr": lr}
    arguments["update"] = checks.whole(step, "step")
    _sweep("adam_step", {"w": w, "g": g, "m": m, "v": v}, arguments, backend, threads)
