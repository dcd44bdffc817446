"""The run-time block: ``step`` is a place in the random streams, ``update`` the age of the moments, ``scale`` a factor
of the gradient. None of them is baked into a call."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastdl as fd
from fastdl import layers
from fastdl.builder import Feed
from fastdl.run.executor import Run
from fastdl.run.placement import Bound

ROWS, WIDTH, CLASSES = 24, 6, 3
X = np.random.default_rng(0).standard_normal((ROWS, WIDTH)).astype(np.float32)
Y = np.arange(ROWS) % CLASSES


def net(backend: str, optimizer: Any, rate: float = 0.0) -> fd.Sequential:
    stack = [layers.Dense(8, activation="tanh"), *([layers.Dropout(rate)] if rate else []), layers.Dense(CLASSES)]
    made = fd.Sequential(stack, seed=1).compile("softmax_cross_entropy", optimizer, backend=backend, threads=1)
    return made.build(WIDTH)


def batch(model: fd.Sequential) -> Bound:
    """A training step of one batch, fed."""
    bound = model._runtime.working().train(ROWS, Feed(labels=True))
    bound.feed(X, Y, None)
    return bound


def moved(model: fd.Sequential, before: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([(model.weights[name] - before[name]).ravel() for name in before])


def one_step(backend: str, optimizer: Any, rate: float = 0.0, **block: Any) -> np.ndarray:
    """How far the weights of a new net move in one step."""
    model = net(backend, optimizer, rate)
    before = model.get_state()
    batch(model).executor.run(Run(ROWS, lr=0.1, **block))
    return moved(model, before)


def test_update_ages_the_moments(anywhere: str) -> None:
    """Adam's corrections at age t: moments of zero grow by (1 - b1) g and (1 - b2) g^2, so the step has this length."""
    adam = fd.optimizers.Adam(0.1)
    young, old = (one_step(anywhere, adam, update=u) for u in (0, 9))
    t = np.array([1.0, 10.0])
    length = (1 - 0.9) / (1 - 0.9**t) / np.sqrt((1 - 0.999) / (1 - 0.999**t))
    np.testing.assert_allclose(old, young * (length[1] / length[0]), rtol=1e-3, atol=1e-5)
    assert abs(length[1] / length[0] - 1) > 0.5  # the two ages differ


def test_step_moves_the_streams_and_no_moment(anywhere: str) -> None:
    adam = fd.optimizers.Adam(0.1)
    np.testing.assert_array_equal(one_step(anywhere, adam, step=0), one_step(anywhere, adam, step=99))
    assert np.abs(one_step(anywhere, adam, 0.5, step=0) - one_step(anywhere, adam, 0.5, step=99)).max() > 1e-3


def test_scale_multiplies_the_gradient(anywhere: str) -> None:
    sgd = fd.optimizers.SGD(0.1, momentum=0.9)
    np.testing.assert_allclose(one_step(anywhere, sgd, scale=0.25), one_step(anywhere, sgd) / 4, rtol=0, atol=1e-7)
    np.testing.assert_array_equal(one_step(anywhere, sgd, scale=1.0), one_step(anywhere, sgd))


@pytest.mark.parametrize("scale", [1.0, 1e-6, 64.0])
def test_clipping_sees_the_scaled_gradient(anywhere: str, scale: float) -> None:
    step = one_step(anywhere, fd.optimizers.SGD(0.1, clip_norm=1e-3), scale=scale)
    plain = one_step(anywhere, fd.optimizers.SGD(0.1), scale=scale)
    norm = np.linalg.norm(plain) / 0.1
    np.testing.assert_allclose(step, plain * min(1.0, 1e-3 / norm), rtol=0, atol=2e-7)


def test_an_epoch_counts_both(anywhere: str) -> None:
    """Steps in one call move on as steps one by one do."""
    states = []
    for together in (True, False):
        model = net(anywhere, fd.optimizers.Adam(0.1), 0.5)
        data = model._runtime.working().data_set(X, Y, None, 8, False)
        data.bind()
        executor = data.executor
        run = Run(8, step=5, update=40, lr=0.1)
        with executor.epoch(run, ROWS, 8):
            for steps in (3,) if together else (1, 1, 1):
                executor.steps(ROWS, 8, run, steps)
        assert (run.step, run.update, run.offset) == (8, 43, ROWS)
        states.append(np.concatenate([w.ravel() for w in model.weights.values()]))
        batches = net(anywhere, fd.optimizers.Adam(0.1), 0.5)
        bound = batches._runtime.working().train(8, Feed(labels=True))
        for k in range(3):
            rows = slice(8 * k, 8 * k + 8)
            bound.feed(X[rows], Y[rows], None)
            bound.executor.run(Run(8, step=5 + k, update=40 + k, lr=0.1))
        states.append(np.concatenate([w.ravel() for w in batches.weights.values()]))
    for state in states[1:]:
        np.testing.assert_array_equal(state, states[0])


@pytest.mark.skipif(fd.backends()["cython"] != "available", reason=f"cython: {fd.backends()['cython']}")
def test_the_quick_step_has_both() -> None:
    results = []
    for block in ({"step": 3, "update": 7}, {"step": 3, "update": 70}, {"step": 4, "update": 7}):
        quick, slow = (net("cython", fd.optimizers.Adam(0.1), 0.5) for _ in range(2))
        bound = batch(quick)
        step = bound.executor.single(bound.x, bound.targets)
        assert step.run(X, Y, block["step"], 0, block["update"], 0.1) > 0
        batch(slow).executor.run(Run(ROWS, **block, lr=0.1))
        results.append([np.concatenate([w.ravel() for w in model.weights.values()]) for model in (quick, slow)])
        np.testing.assert_array_equal(*results[-1])
    assert not np.array_equal(results[0][0], results[1][0])
    assert not np.array_equal(results[0][0], results[2][0])
