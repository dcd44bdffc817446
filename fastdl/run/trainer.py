"""The training loop: epochs of compiled steps, with Python entered between them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdl.builder import Bound
from fastdl.callbacks import Callback
from fastdl.run.executor import Executor, Run

if TYPE_CHECKING:
    from fastdl.model import Sequential

#: Seconds that one engine call may take: Ctrl-C, the progress bar and other Python threads wait for so long.
SLICE = 0.1


def epoch_chunks(executor: Executor, run: Run, count: int, batch: int) -> Iterator[int]:
    """Run one epoch in slices of about `SLICE` seconds; yields the rows done so far."""
    left = -(-count // batch)
    chunk = 1
    while left:
        steps = min(chunk, left)
        start = time.perf_counter()
        executor.steps(count, batch, run, steps)
        seconds = time.perf_counter() - start
        left -= steps
        yield run.offset
        chunk = max(1, int(steps * min(executor.growth, SLICE / max(seconds, 1e-6))))


class Progress:
    """A tqdm bar over epochs, silent when nobody looks at a terminal or with ``verbose=0``."""

    def __init__(self, epochs: int, verbose: int | bool) -> None:
        from tqdm.auto import tqdm

        # disable=None: tqdm's own rule, silent when the stream is no terminal.
        self.bar = tqdm(total=epochs, unit="epoch", disable=None if verbose else True, leave=True)

    def epoch(self, logs: dict[str, float]) -> None:
        self.bar.set_postfix({k: f"{v:.4f}" for k, v in logs.items()}, refresh=False)
        self.bar.update(1)

    def close(self) -> None:
        self.bar.close()


def train(
    model: Sequential,
    executor: Executor,
    count: int,
    batch: int,
    epochs: int,
    validation: tuple[Any, ...] | None,
    callbacks: Sequence[Callback],
    verbose: int | bool,
    metric: str | None,
) -> dict[str, list[float]]:
    """Run epochs until they are done or a callback sets ``model.stop_training``.

    Returns the history: one list per quantity, one value per epoch. An epoch's loss is the mean over its rows, by their
    weights where there are any; its metric counts rows.
    """
    history: dict[str, list[float]] = {}
    for callback in callbacks:
        callback.model = model
    model.stop_training = False
    progress = Progress(epochs, verbose)
    try:
        for callback in callbacks:
            callback.on_train_begin()
        for epoch in range(epochs):
            for callback in callbacks:
                callback.on_epoch_begin(epoch)
            logs = _epoch(model, executor, count, batch, metric)
            if validation is not None:
                logs |= {f"val_{k}": v for k, v in model.evaluate(*validation).items()}
            for name, value in logs.items():
                history.setdefault(name, []).append(value)
            progress.epoch(logs)
            model.epoch += 1
            for callback in callbacks:
                callback.on_epoch_end(epoch, logs)
            if model.stop_training:
                break
    finally:
        progress.close()
        for callback in callbacks:
            callback.on_train_end()
    return history


def _epoch(model: Sequential, executor: Executor, count: int, batch: int, metric: str | None) -> dict[str, float]:
    run = Run(rows=0, step=model.step, epoch=model.epoch, update=model.step, lr=model.lr)
    try:
        with executor.epoch(run, count, batch):
            for _ in epoch_chunks(executor, run, count, batch):
                model.step = run.step
    finally:  # an interrupt arrives between two slices: the steps taken stay taken
        model.step = run.step
    loss, mass, correct, rows = executor.totals
    logs = {"loss": float(loss / mass) if mass else math.nan}
    if metric is not None:
        logs[metric] = float(correct / rows)
    return logs


def evaluate_batches(
    bound: Bound, X: np.ndarray, targets: np.ndarray, weight: np.ndarray | None, batch: int
) -> tuple[float, float, float]:
    """Sum of loss * weight, sum of weights, correct predictions, over a data set in order."""
    executor = bound.executor
    executor.totals[:] = 0
    for start in range(0, X.shape[0], batch):
        rows = slice(start, start + batch)
        bound.feed(X[rows], targets[rows], None if weight is None else weight[rows])
        count = X[rows].shape[0]
        run = Run(rows=count)
        executor.run(run)
        executor.add_up(run)
    loss, mass, correct, _ = executor.totals
    return float(loss), float(mass), float(correct)
