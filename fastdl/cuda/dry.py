"""A model's Programs on a GPU that hands out addresses and no more: plans and kernels are told without one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from fastdl.builder import Builder, Feed
from fastdl.cuda.executor import CudaExecutor
from fastdl.cuda.plan import Paper, described
from fastdl.kernels.common.gpu import Launch, Product
from fastdl.run.settings import Settings
from fastdl.run.storage import Memory


def executors(
    builder: Builder, settings: Settings, rows: int, mixed: bool, library: Any = None
) -> Iterator[CudaExecutor]:
    """Bound Programs of a model; the training step comes first.

    Parameters
    ----------
    builder : Builder
    settings : Settings
    rows : int
    mixed : bool
        Matrices of bfloat16.
    library : object, optional
        ``has(product)`` says which products it has; none if not given.
    """
    s, layout = settings, builder.layout("cuda", mixed)
    memory = Memory.allocate(layout, s.optimizer.states if s.optimizer else (), Paper(library))
    made = [builder.loop(rows, s.optimizer, layout, s.fuse), builder.predict(rows, layout, s.fuse)]
    if s.loss is not None:
        feed = Feed(rows, labels=s.loss.target_kind == "labels")
        others = replace(feed, rows=0), replace(feed, shuffle=False, weighted=True), replace(feed, labels=False)
        for given in (*others, feed):
            made.insert(0, builder.evaluate(rows, given, s.loss, layout, s.fuse))
            made.insert(0, builder.train(rows, given, s.loss, s.optimizer, layout, s.fuse))
    for program, ports in made:
        keep = [b for b in (ports["y"], ports.get("dx")) if b is not None]
        yield CudaExecutor(program, memory, "cuda", 1, keep)


def launches(
    builder: Builder, settings: Settings, rows: int, mixed: bool, library: Any = None
) -> list[Launch | Product]:
    """Every launch of a model on a GPU: training, validation, prediction and loops of the user's own."""
    bound = executors(builder, settings, rows, mixed, library)
    return [launch for executor in bound for step in executor.plan().steps for launch in step.launches]


def plan(builder: Builder, settings: Settings, rows: int) -> str:
    """The launches of a training step on a GPU, or of the user's own loop without a loss."""
    executor = next(executors(builder, settings, rows, builder.mixed))
    made = executor.plan()
    scratch = sum(view.nbytes for view in made.planner.scratches)
    return described(executor.program, made.steps, scratch)
