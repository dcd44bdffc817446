"""The training loop: epochs of compiled steps, with Python entered between them."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

from fastdl.callbacks import Callback
from fastdl.run.executor import Run
from fastdl.run.lock import NetLock
from fastdl.run.placement import DataSet
from fastdl.run.state import TrainState

#: Seconds that one engine call may take: Ctrl-C, the progress bar and other Python threads wait for so long.
SLICE = 0.1


class Progress:
    """A tqdm bar over epochs, silent when nobody looks at a terminal or with ``verbose=0``."""

    def __init__(self, epochs: int, verbose: int | bool) -> None:
        self.bar = None
        if verbose and sys.stderr is not None:  # a service has none
            from tqdm.auto import tqdm

            # disable=None: tqdm's own rule, silent when the stream is no terminal.
            self.bar = tqdm(total=epochs, unit="epoch", disable=None, leave=True)

    def epoch(self, logs: dict[str, float]) -> None:
        if self.bar is not None:
            self.bar.set_postfix({k: f"{v:.4f}" for k, v in logs.items()}, refresh=False)
            self.bar.update(1)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class Trainer:
    """Runs the steps of a data set; the net hands over its state and its lock.

    Parameters
    ----------
    data : DataSet
    state : TrainState
    lock : NetLock
        Held during a slice of steps, free between two slices and while callbacks run.
    count, batch : int
        Rows of the data set and of a step.
    metric : str, optional
        Name of what the loss counts as correct.
    """

    def __init__(
        self, data: DataSet, state: TrainState, lock: NetLock, count: int, batch: int, metric: str | None
    ) -> None:
        self.data, self.executor, self.state, self.lock = data, data.executor, state, lock
        self.count, self.batch, self.metric = count, batch, metric

    def run(
        self,
        epochs: int,
        evaluate: Callable[[], dict[str, float]] | None,
        callbacks: Sequence[Callback],
        verbose: int | bool,
    ) -> dict[str, list[float]]:
        """Run epochs until they are done or ``state.stop`` is set; returns one list per quantity, a value an epoch.

        An epoch's loss is the sum of the weighted losses over the sum of the weights, as `evaluate` has it. Callbacks
        whose ``on_train_begin`` has run end, whatever happens.
        """
        history: dict[str, list[float]] = {}
        state, begun = self.state, []
        state.stop = False
        progress = Progress(epochs, verbose)
        try:
            for callback in callbacks:
                callback.on_train_begin()
                begun.append(callback)
            for _ in range(epochs):
                epoch = state.epoch
                for callback in callbacks:
                    callback.on_epoch_begin(epoch)
                logs = self._epoch()
                if evaluate is not None:
                    logs |= {f"val_{name}": value for name, value in evaluate().items()}
                for name, value in logs.items():
                    history.setdefault(name, []).append(value)
                progress.epoch(logs)
                state.epoch += 1
                for callback in callbacks:
                    callback.on_epoch_end(epoch, logs)
                if state.stop:
                    break
        finally:
            progress.close()
            with ExitStack() as ending:  # in their order, all of them, whatever one raises
                for callback in reversed(begun):
                    ending.callback(callback.on_train_end)
        return history

    def _epoch(self) -> dict[str, float]:
        state, executor = self.state, self.executor
        with self.lock:
            run = Run(rows=0, step=state.step, update=state.update, epoch=state.epoch, lr=state.lr)
            state.rows = 0
            self.data.bind()
            with executor.epoch(run, self.count, self.batch):
                for _ in self._slices(run):
                    self.lock.give_way()
            state.totals[:] = executor.totals
            state.offset = 0
            loss, mass, correct, rows = state.totals
        logs = {"loss": float(loss / mass) if mass else math.nan}
        if self.metric is not None:
            logs[self.metric] = float(correct / rows)
        return logs

    def _slices(self, run: Run) -> Iterator[None]:
        """Run one epoch in slices of about `SLICE` seconds."""
        state, executor = self.state, self.executor
        left = -(-self.count // self.batch)
        chunk = 1
        while left:
            steps = min(chunk, left)
            start = time.perf_counter()
            try:
                executor.steps(self.count, self.batch, run, steps)
            finally:  # an interrupt arrives between two slices: the steps taken stay taken
                state.step, state.update, state.offset = run.step, run.update, run.offset
            seconds = time.perf_counter() - start
            left -= steps
            yield
            chunk = max(1, int(steps * min(executor.growth, SLICE / max(seconds, 1e-6))))
