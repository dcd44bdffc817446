"""A step whose rows are shared out: the shares' gradients and losses add up to those of the whole."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

import fastdl as fd
from fastdl import layers
from fastdl.builder import Feed
from fastdl.run.executor import Run
from fastdl.run.placement import Bound

ROWS, WIDTH, CLASSES = 10, 6, 3
X = np.random.default_rng(0).standard_normal((ROWS, WIDTH)).astype(np.float32)
Y = np.arange(ROWS) % CLASSES
WEIGHT = (np.arange(ROWS) % 4).astype(np.float32)  # zeros among them
BATCH = ("feed", "forward", "loss", "backward")


def net(backend: str, optimizer: Any, batchnorm: bool = False) -> fd.Sequential:
    stack = [layers.Dense(8), *([layers.BatchNorm()] if batchnorm else []), layers.Dropout(0.25), layers.Dense(CLASSES)]
    made = fd.Sequential(stack, seed=1).compile("softmax_cross_entropy", optimizer, backend=backend, threads=1)
    return made.build(WIDTH)


def step_of(model: fd.Sequential, weight: np.ndarray | None) -> Bound:
    return model._runtime.working().train(ROWS, Feed(weighted=weight is not None, labels=True))


@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["plain", "weighted"])
@pytest.mark.parametrize("cuts", [(0, 4, 10), (0, 1, 1, 9, 10)])
def test_shares_and_scale_equal_the_whole(anywhere: str, weight: np.ndarray | None, cuts: tuple[int, ...]) -> None:
    sgd = fd.optimizers.SGD(0.1, momentum=0.9, clip_norm=0.5)
    whole, shared = net(anywhere, sgd), net(anywhere, sgd)
    bound = step_of(whole, weight)
    bound.feed(X, Y, weight)
    run = Run(ROWS, step=3, lr=0.1)
    bound.executor.run(run)
    bound.executor.add_up(run)

    bound = step_of(shared, weight)
    executor, memory = bound.executor, shared._runtime.memory
    total = np.zeros_like(memory.gradients)
    for a, b in itertools.pairwise(cuts):
        if a < b:
            bound.feed(X[a:b], Y[a:b], None if weight is None else weight[a:b])
        run = Run(b - a, step=3, first_row=a, total_rows=ROWS)
        executor.run(run, *BATCH)
        executor.add_up(run)
        memory.pull()
        total += memory.gradients
    memory.gradients[:] = total
    memory.changed()
    mass = executor.totals[1]
    assert mass == pytest.approx(ROWS if weight is None else weight.sum())
    executor.run(Run(cuts[-1] - cuts[-2], step=3, lr=0.1, scale=ROWS / mass), "update")
    for name, value in whole.weights.items():
        np.testing.assert_allclose(shared.weights[name], value, rtol=0, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(executor.totals, step_of(whole, weight).executor.totals, rtol=1e-6)


@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["plain", "weighted"])
def test_a_share_of_no_rows_has_zero_gradients(anywhere: str, weight: np.ndarray | None) -> None:
    """Neither those of the run before nor the NaN of a mean over nothing; what counts rows is left alone."""
    model = net(anywhere, fd.optimizers.SGD(0.1), batchnorm=anywhere != "numba")  # which takes 40 s to compile
    bound = step_of(model, weight)
    bound.feed(X, Y, weight)
    bound.executor.run(Run(ROWS), *BATCH)
    assert max(np.abs(g).max() for g in model.gradients.values()) > 0
    before = model.get_state()
    bound.executor.run(Run(0, first_row=ROWS, total_rows=ROWS), *BATCH)
    for name, gradient in model.gradients.items():
        np.testing.assert_array_equal(gradient, 0, err_msg=name)
    np.testing.assert_array_equal(bound.executor.stored(bound.executor.stats), 0)
    for name, value in model.weights.items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)


def test_a_share_of_no_rows_is_updated_as_the_others_are(anywhere: str) -> None:
    """Its parameters follow the added gradient, so every share goes on from the same ones."""
    model = net(anywhere, fd.optimizers.SGD(0.1))
    bound, memory = step_of(model, None), model._runtime.memory
    bound.executor.run(Run(0, total_rows=ROWS), *BATCH)
    memory.pull()
    memory.gradients[:] = 1
    memory.changed()
    before = model.get_state()
    bound.executor.run(Run(0, total_rows=ROWS, lr=0.5, scale=0.5), "update")
    for name, value in model.weights.items():
        np.testing.assert_allclose(value, before[name] - 0.25, rtol=0, atol=1e-6, err_msg=name)


def test_no_rows_of_another_program_touch_no_gradient(anywhere: str) -> None:
    model = net(anywhere, fd.optimizers.SGD(0.1))
    bound = step_of(model, None)
    bound.feed(X, Y, None)
    bound.executor.run(Run(ROWS), *BATCH)
    before = dict(model.gradients)
    evaluation = model._runtime.working().evaluation(ROWS, Feed(labels=True))
    evaluation.feed(X, Y, None)
    evaluation.executor.run(Run(ROWS))
    assert evaluation.executor.stored(evaluation.executor.stats)[1] == ROWS
    evaluation.executor.run(Run(0, total_rows=ROWS))
    np.testing.assert_array_equal(evaluation.executor.stored(evaluation.executor.stats), 0)
    for name, gradient in model.gradients.items():
        np.testing.assert_array_equal(gradient, before[name], err_msg=name)


@pytest.mark.skipif(fd.backends()["cython"] != "available", reason=f"cython: {fd.backends()['cython']}")
def test_a_run_without_its_arrays_is_refused() -> None:
    """A slot that never had an array, or was let go of, is no address to read from."""
    model = net("cython", fd.optimizers.SGD(0.1))
    executor = (bound := step_of(model, None)).executor
    with pytest.raises(ValueError, match=r"no array is bound for x; bind one with slot\(\)"):
        executor.run(Run(ROWS))
    bound.feed(X, Y, None)
    executor.run(Run(ROWS))
    executor.slot(bound.targets, None)
    with pytest.raises(ValueError, match="softmax_cross_entropy: no array is bound for targets"):
        executor.run(Run(ROWS))
    executor.run(Run(ROWS), "backward", "update")  # reads none
    with pytest.raises(ValueError, match="no array is bound"):
        executor.steps(ROWS, ROWS, Run(ROWS), 1)
