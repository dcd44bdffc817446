"""The training loop: epochs of compiled steps, with Python entered between them."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from fastdl.callbacks import Callback
from fastdl.run.executor import Run
from fastdl.run.lock import NetLocks
from fastdl.run.placement import DataSet
from fastdl.run.state import MOST, TrainState

#: Seconds that one engine call may take: Ctrl-C, the progress bar and other Python threads wait for so long.
SLICE = 0.1
#: And that a training stands back after one, for others who wait for the net: Python's locks go to whoever asks first,
#: which is the training, as a thread that is woken needs 50 us.
STAND_BACK = 2e-4


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
    locks : NetLocks
        That of the memory is held during a slice of steps, and free between two slices and while callbacks run.
    count, batch : int
        Rows of the data set and of a step.
    metric : str, optional
        Name of what the loss counts as correct.
    """

    def __init__(
        self, data: DataSet, state: TrainState, locks: NetLocks, count: int, batch: int, metric: str | None
    ) -> None:
        self.data, self.executor, self.state, self.locks = data, data.executor, state, locks
        self.count, self.batch, self.metric = count, batch, metric
        self.stood_back = 0.0

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
                state.epoch = (state.epoch + 1) & MOST
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
        state, executor, locks = self.state, self.executor, self.locks
        run = Run(rows=0, step=state.step, update=state.update, epoch=state.epoch, lr=state.lr)
        state.rows = 0
        steps = executor.epoch(run, self.count, self.batch)
        with locks.memory:
            self.data.bind()
            steps.__enter__()
        try:
            self._slices(run)
        finally:
            with locks.memory:
                steps.__exit__(None, None, None)
                loss, mass, correct, rows = executor.totals
        state.offset = 0
        logs = {"loss": float(loss / mass) if mass else math.nan}
        if self.metric is not None:
            logs[self.metric] = float(correct / rows)
        return logs

    def _slices(self, run: Run) -> None:
        """Run one epoch in slices of about `SLICE` seconds."""
        state, executor, locks = self.state, self.executor, self.locks
        left = -(-self.count // self.batch)
        chunk = 1
        while left:
            steps = min(chunk, left)
            start = time.perf_counter()
            with locks.memory:
                if locks.at_work:
                    locks.refuse()
                try:
                    locks.at_work = True
                    run.step, run.update = state.step, state.update  # a handler may have trained in between
                    executor.steps(self.count, self.batch, run, steps)
                finally:  # an interrupt arrives between two slices: the steps taken stay taken
                    run.step, run.update = run.step & MOST, run.update if run.update < MOST else MOST
                    state.step, state.update, state.offset = run.step, run.update, run.offset
                    locks.at_work = False
            now = time.perf_counter()
            left -= steps
            chunk = max(1, int(steps * min(executor.growth, SLICE / max(now - start, 1e-6))))
            if now - self.stood_back > SLICE / 2:
                self.stood_back = now
                time.sleep(STAND_BACK)
