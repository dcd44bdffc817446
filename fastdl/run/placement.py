"""A model's values in the memory of one back end, and the Programs that are bound to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastdl import config
from fastdl.builder import Builder, Feed
from fastdl.kernels import dispatch
from fastdl.kernels.common import driver, philox
from fastdl.program import Buffer, Program
from fastdl.run.bind import bind
from fastdl.run.executor import Executor, Run
from fastdl.run.settings import Settings
from fastdl.run.storage import Memory

#: Bound Programs kept, those used last: growing batches would otherwise pile up arenas.
KEPT = 8
#: And of those that predict, one for each capacity and number of threads.
KEPT_PREDICTIONS = 16
#: Maximum rows of prediction Programs: one row has a Program of its own, on one thread, and few rows get no more
#: threads than they keep busy. Larger batches gain nothing and cost cache.
PREDICT_ROWS = (1, 16, 64, 256)
#: And on a GPU, which few rows do not fill.
GPU_ROWS = 1 << 14
#: Which of them takes so many rows.
CAPACITY = [next(most for most in PREDICT_ROWS if most >= rows) for rows in range(PREDICT_ROWS[-1] + 1)]


@dataclass
class Bound:
    """An executor with the buffers that its user needs to know."""

    executor: Executor
    x: Buffer  # slot
    y: Buffer  # output of the last layer; a slot for prediction
    direct: Callable[[Any], np.ndarray | None] | None = None  # predict's shorter way, see Executor.direct
    targets: Buffer | None = None  # slot
    weight: Buffer | None = None  # slot
    dy: Buffer | None = None  # slot
    dx: Buffer | None = None

    def feed(self, x: Any, targets: Any, weight: Any) -> None:
        """Bind the caller's arrays: a data set or one batch. What is bound stays: a GPU would copy it each epoch."""
        for buffer, array in ((self.x, x), (self.targets, targets), (self.weight, weight)):
            if array is not None and not self.executor.holds(buffer, array):
                self.executor.slot(buffer, array)

    def let_go(self) -> None:
        """Hold none of the caller's arrays any more."""
        for buffer in (self.x, self.targets, self.weight):
            if buffer is not None:
                self.executor.slot(buffer, None)


@dataclass(frozen=True)
class DataSet:
    """Training steps over a data set. A training inside a callback may use the same Program for other data: whoever
    starts an epoch binds his own again."""

    executor: Any
    bind: Callable[[], None]
    let_go: Callable[[], None]


def threads_of(program: Program, asked: int | str, backend: str) -> tuple[int, str]:
    """Threads for a Program and the reason."""
    if program.name == "predict" and program.rows == 1:
        return 1, "to start a team takes as long as a row"
    return config.threads_for(program.flops(), None, asked, backend)


class Placement:
    """A model's values in the memory of one back end, and the Programs that are bound to it.

    Parameters
    ----------
    builder : Builder
    settings : Settings
    backend : str
        One that can run the model.
    """

    def __init__(self, builder: Builder, settings: Settings, backend: str) -> None:
        self.builder, self.settings, self.backend = builder, settings, backend
        self.layout = builder.layout(backend)
        moments = settings.optimizer.states if settings.optimizer else ()
        device = driver.current() if backend == "cuda" else None
        self.memory = Memory.allocate(self.layout, moments, device)
        self._bound: dict[tuple[Any, ...], Bound] = {}
        self._predictions: dict[tuple[Any, ...], Bound] = {}
        #: the engine's `SingleStep.run` of the last batch, and the threads that were asked for
        self.quick_step: tuple[Callable[..., float | None], int | None] | None = None
        self._quick_memory: Bound | None = None  # that it points into

    def draw(self) -> None:
        """Initial values: parameter p from its own stream, equal bits on every back end."""
        builder, memory = self.builder, self.memory
        streams = {name: k for k, name in enumerate([*builder.segments, *builder.states])}
        for arena in (memory.parameters, memory.states):
            for segment in arena.layout.segments:
                op, params, value = segment.initializer.call(segment.buffer.shape)
                out = np.full(segment.buffer.shape, value if op is None else 0.0, arena.dtype)
                if op is not None:
                    layer = philox.INITIAL_LAYER + streams[segment.name]
                    drawn_by = "numpy" if self.backend == "cuda" else self.backend  # equal bits everywhere
                    dispatch.run(op, out.reshape(-1), backend=drawn_by, seed=builder.seed, layer=layer, **params)
                arena.write(segment.name, out)

    # ------------------------------------------------------------------ training
    def train(self, rows: int, feed: Feed) -> Bound:
        """A whole training step. A step of single batches runs on any bound Program that holds as many rows."""
        s = self.settings
        if not feed.rows:
            rows = self._capacity("train", feed, rows)
        make = self.builder.train
        return self._get(("train", feed, rows), lambda: make(rows, feed, s.loss, s.optimizer, self.layout, s.fuse))

    def data_set(self, X: Any, targets: Any, weight: Any, batch: int, shuffle: bool) -> DataSet:
        """Training steps over a data set; through pinned buffers where a GPU has no room for it."""
        count, labels, weighted = X.shape[0], targets.ndim == 1, weight is not None
        if self.backend == "cuda":
            from fastdl.cuda.staging import Staged, fits

            if not fits(self.memory.mirror.device, X, targets, weight):
                bound = self.train(batch, Feed(weighted=weighted, labels=labels))
                staged = Staged(bound, X, targets, weight, batch, shuffle, self.builder.seed)
                return DataSet(staged, lambda: None, bound.let_go)  # it binds each batch
        bound = self.train(batch, Feed(count, shuffle, weighted, labels))
        return DataSet(bound.executor, lambda: bound.feed(X, targets, weight), bound.let_go)

    def keep_quick(self, bound: Bound) -> None:
        """Remember the quick way into a training step, where it has one."""
        step = bound.executor.single(bound.x, bound.targets)
        self.quick_step = None
        if step is not None:
            self.quick_step, self._quick_memory = (step.run, config.resolve_threads(None, self.settings.threads)), bound

    def loop(self, rows: int) -> Bound:
        """Forward, backward and update, one after the other when the user says so."""
        s = self.settings
        rows = self._capacity("loop", None, rows)
        return self._get(("loop", None, rows), lambda: self.builder.loop(rows, s.optimizer, self.layout, s.fuse))

    # ------------------------------------------------------------------ inference
    @property
    def most_rows(self) -> int:
        """Rows that prediction takes at a time."""
        return GPU_ROWS if self.backend == "cuda" else PREDICT_ROWS[-1]

    def predict(self, X: Any) -> Any:
        """Output of the last layer for every row of a contiguous matrix of the model's dtype and width.

        For a matrix in GPU memory the result lies there too.
        """
        on_host = isinstance(X, np.ndarray)
        shape, most = (X.shape[0], self.builder.out_width), self.most_rows
        out = np.empty(shape, X.dtype) if on_host else X.like(shape)
        for start in range(0, X.shape[0], most):
            x, y = X[start : start + most], out[start : start + most]
            count = x.shape[0]
            bound = self._prediction(CAPACITY[count] if count <= PREDICT_ROWS[-1] else 1 << (count - 1).bit_length())
            executor = bound.executor
            executor.slot(bound.x, x)
            executor.slot(bound.y, y)
            try:
                executor.run(Run(rows=count, total_rows=count))
                bound.direct = bound.direct or executor.direct(bound.x, bound.y)
            finally:
                executor.slot(bound.x, None)
                executor.slot(bound.y, None)
        if not on_host:
            self.memory.mirror.device.synchronize()  # the caller may write to X again at once, on any stream
        return out

    def _prediction(self, rows: int) -> Bound:
        key = rows, config.resolve_threads(None, self.settings.threads)
        make = self.builder.predict
        return self._cached(
            self._predictions, key, KEPT_PREDICTIONS, lambda: make(rows, self.layout, self.settings.fuse)
        )

    def predict_direct(self, X: Any) -> np.ndarray | None:
        """`predict` in one call of the engine, for what a Program in use can take as it stands; None otherwise."""
        if X.ndim != 2 or X.shape[0] > PREDICT_ROWS[-1]:
            return None
        key = CAPACITY[X.shape[0]], config.resolve_threads(None, self.settings.threads)
        bound = self._predictions.get(key)
        return None if bound is None or bound.direct is None else bound.direct(X)

    def evaluation(self, rows: int, feed: Feed) -> Bound:
        """Forward and loss."""
        s, make = self.settings, self.builder.evaluate
        rows = self._capacity("evaluate", feed, rows)
        return self._get(("evaluate", feed, rows), lambda: make(rows, feed, s.loss, self.layout, s.fuse))

    def evaluate(self, X: Any, targets: Any, weight: Any) -> tuple[float, float, float]:
        """Sum of loss * mass, sum of mass, correct predictions, over a data set in order."""
        most = min(self.most_rows, X.shape[0])
        bound = self.evaluation(most, Feed(weighted=weight is not None, labels=targets.ndim == 1))
        executor = bound.executor
        executor.totals[:] = 0
        try:
            for start in range(0, X.shape[0], most):
                part = slice(start, start + most)
                x = X[part]
                bound.feed(x, targets[part], None if weight is None else weight[part])
                run = Run(rows=x.shape[0])
                executor.run(run)
                executor.add_up(run)
        finally:
            bound.let_go()
        loss, mass, correct, _ = executor.totals
        return float(loss), float(mass), float(correct)

    # ------------------------------------------------------------------ Programs
    def training_program(self) -> Program | None:
        """The training Program that was used last."""
        used = [bound.executor.program for key, bound in self._bound.items() if key[0] == "train"]
        return used[-1] if used else None

    def _capacity(self, kind: str, setting: Any, rows: int) -> int:
        """Rows of a bound Program that is large enough, or of a new one."""
        known = [key[2] for key in self._bound if key[0] == kind and key[1] == setting and key[2] >= rows]
        return min(known, default=rows)

    def _get(self, key: tuple[Any, ...], make: Callable[[], tuple[Program, dict[str, Any]]]) -> Bound:
        """A bound Program by its settings; made when first asked for, those used last are kept."""
        return self._cached(self._bound, (*key, config.resolve_threads(None, self.settings.threads)), KEPT, make)

    def _cached(
        self,
        cache: dict[tuple[Any, ...], Bound],
        key: tuple[Any, ...],
        most: int,
        make: Callable[[], tuple[Program, dict[str, Any]]],
    ) -> Bound:
        bound = cache.pop(key, None)
        if bound is None:
            program, ports = make()
            bound = self._bind(program, ports)
            if len(cache) >= most:
                del cache[next(iter(cache))]
        cache[key] = bound  # the last one is the one used last
        return bound

    def _bind(self, program: Program, ports: dict[str, Any]) -> Bound:
        keep = [b for b in (ports["y"], ports.get("dx")) if b is not None]
        threads = threads_of(program, self.settings.threads, self.backend)[0]
        executor = bind(program, self.memory, self.backend, threads, keep)
        return Bound(
            executor,
            ports["x"],
            ports["y"],
            targets=ports.get("target_slot"),
            weight=ports.get("weight_slot"),
            dy=ports.get("dy"),
            dx=ports.get("dx"),
        )
