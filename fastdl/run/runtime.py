"""What a model runs on: its parameters laid out for a back end, and the Programs bound to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdl import config
from fastdl.builder import Bound, Builder, Feed
from fastdl.errors import BackendUnavailable
from fastdl.kernels import dispatch
from fastdl.kernels.common import driver, philox
from fastdl.kernels.registry import BACKENDS
from fastdl.layers.base import Layer
from fastdl.losses import Loss
from fastdl.optimizers import Optimizer
from fastdl.program import Program
from fastdl.run.arena import Weights
from fastdl.run.executor import Run
from fastdl.run.storage import Memory

if TYPE_CHECKING:
    from fastdl.cuda.executor import CudaExecutor
    from fastdl.kernels.common.gpu import Launch, Product

#: Bound Programs kept: growing batches would otherwise pile up arenas.
KEPT = 8
#: Maximum rows of prediction Programs: one row has a Program of its own, on one thread, and few rows get no more
#: threads than they keep busy. Larger batches gain nothing and cost cache.
PREDICT_ROWS = (1, 16, 64, 256)
#: And on a GPU, which few rows do not fill.
GPU_ROWS = 1 << 14
#: Which of them takes so many rows.
CAPACITY = [next(most for most in PREDICT_ROWS if most >= rows) for rows in range(PREDICT_ROWS[-1] + 1)]


@dataclass(frozen=True)
class Settings:
    """What `Sequential.compile` decides."""

    backend: str = "auto"
    threads: int | str = "auto"
    dtype: str = "float32"
    fuse: bool = True
    loss: Loss | None = None
    optimizer: Optimizer | None = None

    @property
    def float(self) -> str:
        """Type of the arrays outside and of parameters: mixed Programs keep float32."""
        return "float32" if self.dtype == dispatch.MIXED else self.dtype


class Runtime:
    """Memory and bound Programs of one model.

    Parameters
    ----------
    layers : list of (name, Layer)
    width : int
        Features of the input.
    seed : int
    settings : Settings
    """

    def __init__(self, layers: list[tuple[str, Layer]], width: int, seed: int, settings: Settings) -> None:
        self.seed, self.settings = seed, settings
        self.builder = Builder(layers, width, seed, settings.dtype)
        self.memory: Memory | None = None
        self.moments: dict[str, np.ndarray] = {}
        self.backend = ""
        self._bound: dict[tuple[Any, ...], Bound] = {}
        self._quick: tuple[Any, int | None, Any] | None = None  # SingleStep, threads asked for, executor
        self.place(self._resolve())
        self._draw()

    # ------------------------------------------------------------------ back end and memory
    def _resolve(self) -> str:
        """The back end that runs this model's Programs."""
        name = config.resolve_backend(None, self.settings.backend)
        if name != "auto":
            if (state := dispatch.load(name)) != "available":
                raise BackendUnavailable(f"back end {name!r} is not available: {state}")
            if why := dispatch.refuses(name, self.settings.dtype):
                raise BackendUnavailable(f"back end {name!r} cannot run {self.settings.dtype}: {why}")
            return name
        for name in BACKENDS:
            if not self.refusals(name):
                return name
        raise BackendUnavailable("no back end can run this model")

    def refusals(self, name: str) -> list[str]:
        """Why a back end cannot run the model; empty when it can."""
        if why := dispatch.refuses(name, self.settings.dtype):
            return [why]
        builder, s = self.builder, self.settings
        memory, moments = builder.memory(False, s.optimizer)
        calls = list(builder.predict(1, memory)[0].calls)
        if s.loss is None:
            calls += builder.loop(1, s.optimizer, memory, moments, False)[0].calls
        else:
            feed = Feed(rows=1, labels=s.loss.target_kind == "labels")
            calls += builder.train(1, feed, s.loss, s.optimizer, memory, moments, False)[0].calls
        return [found for c in calls if isinstance(found := dispatch.candidate(c.op, name, (), c.params), str)]

    def follow(self) -> None:
        """Move to another back end when the context or the environment now names one."""
        name = config.resolve_backend(None, self.settings.backend)
        if name not in ("auto", self.backend):
            self.place(self._resolve())

    def reset(self, settings: Settings) -> None:
        """Take new settings; parameters stay, optimiser states start anew."""
        self.settings, self.moments = settings, {}
        self.place(self._resolve())

    def place(self, backend: str) -> None:
        """Lay everything out for a back end; values and optimiser states move along."""
        old, old_moments = self.memory, self.moments
        if old is not None:
            old.pull()
        device = driver.current() if backend == "cuda" else None
        self.memory, self.moments = self.builder.memory(backend == "cython", self.settings.optimizer, device)
        self.backend = backend
        self._bound.clear()
        self._quick = None
        if old is None:
            return
        for new, before in ((self.memory.parameters, old.parameters), (self.memory.states, old.states)):
            for name in before.offsets:
                new.write(name, before.read(name))
        for key in set(old_moments) & set(self.moments):
            for name in old.parameters.offsets:
                value = old.parameters.read(name, old_moments[key])
                self.memory.parameters.write(name, value, self.moments[key])

    def _draw(self) -> None:
        """Initial values: parameter p from its own stream, equal bits on every back end."""
        order = [*self.builder.segments, *self.builder.states]
        for arena in (self.memory.parameters, self.memory.states):
            for segment in arena.segments:
                op, params, value = segment.initializer.call(segment.buffer.shape)
                out = np.full(segment.buffer.shape, value if op is None else 0.0, arena.dtype)
                if op is not None:
                    layer = philox.INITIAL_LAYER + order.index(segment.name)
                    drawn_by = "numpy" if self.backend == "cuda" else self.backend  # equal bits everywhere
                    dispatch.run(op, out.reshape(-1), backend=drawn_by, seed=self.seed, layer=layer, **params)
                arena.write(segment.name, out)

    @property
    def weights(self) -> Weights:
        """Parameters and running statistics, layer by layer."""
        arenas = [(a, a.values) for a in (self.memory.parameters, self.memory.states)]
        layers = [name for name, _ in self.builder.layers]
        names = [*self.builder.segments, *self.builder.states]
        names.sort(key=lambda name: layers.index(name.split("/")[0]))
        return Weights(arenas, names, self.memory.version, self.memory.pull)

    @property
    def gradients(self) -> Weights:
        memory = self.memory
        arenas = [(memory.parameters, memory.gradients)]
        return Weights(arenas, list(self.builder.segments), memory.version, memory.pull)

    # ------------------------------------------------------------------ programs
    def threads(self, program: Program) -> tuple[int, str]:
        """Threads for a Program and the reason."""
        if program.name == "predict" and program.rows == 1:
            return 1, "to start a team takes as long as a row"
        return config.threads_for(program.flops(), None, self.settings.threads, self.backend)

    def train(self, rows: int, feed: Feed) -> Bound:
        """A whole training step. A step of single batches runs on any bound Program that holds as many rows."""
        s = self.settings
        if not feed.rows:
            rows = self._capacity("train", feed, rows)
        return self._get(
            ("train", feed, rows),
            lambda: self.builder.train(rows, feed, s.loss, s.optimizer, self.memory, self.moments, s.fuse),
        )

    def epochs(self, X: Any, targets: Any, weight: Any, batch: int, shuffle: bool) -> Any:
        """An executor of training steps over a data set; through pinned buffers where a GPU has no room for it."""
        count, labels, weighted = X.shape[0], targets.ndim == 1, weight is not None
        if self.backend == "cuda":
            from fastdl.cuda.staging import Staged, fits

            if not fits(self.memory.mirror.device, X, targets, weight):
                bound = self.train(batch, Feed(weighted=weighted, labels=labels))
                return Staged(bound, X, targets, weight, batch, shuffle, self.seed)
        bound = self.train(batch, Feed(count, shuffle, weighted, labels))
        bound.feed(X, targets, weight)
        return bound.executor

    def keep_quick(self, bound: Bound) -> None:
        """Remember the quick way into a training step, where it has one."""
        step = bound.executor.single(bound.x, bound.targets)
        self._quick = None
        if step is not None:  # the executor owns the memory that the step points into
            self._quick = step, config.resolve_threads(None, self.settings.threads), bound.executor

    def quick(self) -> Any:
        """The engine's `SingleStep` of the last batch, as long as back end and threads are those asked for."""
        if self._quick is None:
            return None
        step, threads, _ = self._quick
        wanted = config.resolve_backend(None, self.settings.backend)
        same = wanted in ("auto", self.backend) and config.resolve_threads(None, self.settings.threads) == threads
        return step if same else None

    def loop(self, rows: int) -> Bound:
        """Forward, backward and update, one after the other when the user says so."""
        s = self.settings
        rows = self._capacity("loop", None, rows)
        return self._get(
            ("loop", None, rows), lambda: self.builder.loop(rows, s.optimizer, self.memory, self.moments, s.fuse)
        )

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
            rows = CAPACITY[count] if count <= PREDICT_ROWS[-1] else 1 << (count - 1).bit_length()
            bound = self._get(
                ("predict", None, rows), lambda rows=rows: self.builder.predict(rows, self.memory, self.settings.fuse)
            )
            bound.executor.slot(bound.x, x)
            bound.executor.slot(bound.y, y)
            bound.executor.run(Run(rows=count, total_rows=count))
            bound.direct = bound.direct or bound.executor.direct(bound.x, bound.y)
            bound.executor.slot(bound.x, None)
            bound.executor.slot(bound.y, None)
        if not on_host:
            self.memory.mirror.device.synchronize()  # the caller may write to X again at once, on any stream
        return out

    def predict_direct(self, X: Any) -> np.ndarray | None:
        """`predict` in one call of the engine, for what a Program in use can take as it stands; None otherwise."""
        if type(X) is not np.ndarray or X.ndim != 2 or X.shape[0] > PREDICT_ROWS[-1]:
            return None
        self.follow()
        key = "predict", None, CAPACITY[X.shape[0]], config.resolve_threads(None, self.settings.threads)
        bound = self._bound.get(key)
        return None if bound is None or bound.direct is None else bound.direct(X)

    def evaluate(self, rows: int, feed: Feed) -> Bound:
        """Forward and loss."""
        s = self.settings
        rows = self._capacity("evaluate", feed, rows)
        return self._get(
            ("evaluate", feed, rows), lambda: self.builder.evaluate(rows, feed, s.loss, self.memory, s.fuse)
        )

    def training_program(self) -> Program:
        """The training Program in use, or the one of a batch of 32 rows."""
        for key, bound in reversed(self._bound.items()):
            if key[0] == "train":
                return bound.executor.program
        s = self.settings
        if s.loss is None:
            return self.builder.loop(32, s.optimizer, self.memory, self.moments, s.fuse)[0]
        feed = Feed(labels=s.loss.target_kind == "labels")
        return self.builder.train(32, feed, s.loss, s.optimizer, self.memory, self.moments, s.fuse)[0]

    def on_paper(self, rows: int, mixed: bool, library: Any = None) -> Iterator[CudaExecutor]:
        """The model's Programs bound to a GPU that hands out addresses and no more; the training step comes first.

        Parameters
        ----------
        rows : int
        mixed : bool
            Matrices of bfloat16.
        library : object, optional
            ``has(product)`` says which products it has; none if not given.
        """
        from fastdl.cuda.plan import Paper

        builder, s = self.builder, self.settings
        memory, moments = builder.memory(False, s.optimizer, Paper(library))
        memory = replace(memory, mixed=mixed)
        made = [builder.loop(rows, s.optimizer, memory, moments, s.fuse), builder.predict(rows, memory, s.fuse)]
        if s.loss is not None:
            feed = Feed(rows, labels=s.loss.target_kind == "labels")
            others = replace(feed, rows=0), replace(feed, shuffle=False, weighted=True), replace(feed, labels=False)
            for given in (*others, feed):
                made.insert(0, builder.evaluate(rows, given, s.loss, memory, s.fuse))
                made.insert(0, builder.train(rows, given, s.loss, s.optimizer, memory, moments, s.fuse))
        return (builder.bound(program, memory, "cuda", 1).executor for program in made)

    def launches(self, rows: int, mixed: bool, library: Any = None) -> list[Launch | Product]:
        """Every launch of the model on a GPU: training, validation, prediction and loops of the user's own."""
        executors = self.on_paper(rows, mixed, library)
        return [launch for e in executors for step in e.plan().steps for launch in step.launches]

    def plan(self, rows: int) -> str:
        """The launches of a training step on a GPU, or of the user's own loop without a loss."""
        from fastdl.cuda.plan import described

        executor = next(self.on_paper(rows, self.builder.mixed))
        plan = executor.plan()
        scratch = sum(v.nbytes for v in plan.planner.scratches)
        return described(executor.program, plan.steps, scratch)

    def _capacity(self, kind: str, setting: Any, rows: int) -> int:
        """Rows of a bound Program that is large enough, or of a new one."""
        known = [key[2] for key in self._bound if key[0] == kind and key[1] == setting and key[2] >= rows]
        return min(known, default=rows)

    def _get(self, key: tuple[Any, ...], make: Callable[[], tuple[Program, dict[str, Any]]]) -> Bound:
        """A bound Program by its settings; made when first asked for, the newest are kept."""
        key = (*key, config.resolve_threads(None, self.settings.threads))
        found = self._bound.get(key)
        if found is None:
            if len(self._bound) >= KEPT:
                self._bound.pop(next(iter(self._bound)))
            made = make()
            found = self.builder.bound(made, self.memory, self.backend, self.threads(made[0])[0])
            self._bound[key] = found
        return found
