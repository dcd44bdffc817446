"""Where a net lives: its home, what a context asks for, and copies that answer elsewhere.

A net has one home, the back end that `compile`, the environment or "auto" names. What trains follows the context
(`fastdl.backend`) and takes the values along; they come home with the next call outside of the block. What only reads
never moves them: under another back end `predict` and `evaluate` answer from a copy, which is kept and brought up to
date when the values have changed. While a training is under way the values stay where they are.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastdl import config
from fastdl.builder import Builder, Feed
from fastdl.errors import BackendUnavailable, TrainingInProgress
from fastdl.kernels import dispatch
from fastdl.kernels.registry import BACKENDS
from fastdl.program import Program
from fastdl.run.lock import NetLocks
from fastdl.run.placement import Placement, threads_of
from fastdl.run.settings import Settings
from fastdl.run.storage import Memory


class Runtime:
    """Where a model's values are, and who runs it.

    Parameters
    ----------
    builder : Builder
    settings : Settings
    locks : NetLocks
        Tell whether a training is under way.
    """

    def __init__(self, builder: Builder, settings: Settings, locks: NetLocks) -> None:
        self.builder, self.settings, self.locks = builder, settings, locks
        self.pending = False  #: a pass for `backward`, or gradients of one, wait for the update
        self._auto: str | None = None
        self._copy: tuple[Placement, int] | None = None  # and the version of the values that it has
        self.placement = Placement(builder, settings, _able(self.wanted(), settings))
        self.placement.draw()

    @property
    def memory(self) -> Memory:
        return self.placement.memory

    # ------------------------------------------------------------------ who runs it
    def wanted(self) -> str:
        """The back end of the next call: context, compile, environment, the first that can run the model."""
        name = config.resolve_backend(None, self.settings.backend)
        return self._auto or self.auto() if name == "auto" else name

    def auto(self) -> str:
        """The first back end that can run the model."""
        if self._auto is None:
            self._auto = self._first_able(self.settings)
        return self._auto

    def _first_able(self, settings: Settings) -> str:
        for name in BACKENDS:
            if not self.refusals(name, settings):
                return name
        raise BackendUnavailable("no back end can run this model")

    def refusals(self, name: str, settings: Settings | None = None) -> list[str]:
        """Why a back end cannot run the model; empty when it can. Nothing is allocated for the answer."""
        s = settings or self.settings
        if why := dispatch.refuses(name, s.dtype):
            return [why]
        calls = list(self.builder.predict(1, self.builder.layout(name), False)[0].calls)
        calls += self._on_paper(1, name, s, False).calls
        candidates = (dispatch.candidate(c.op, name, (), c.params) for c in calls)
        return [reason for reason in candidates if isinstance(reason, str)]

    def working(self) -> Placement:
        """The values on the back end that a call which trains shall use; they move if need be.

        Raises
        ------
        BackendUnavailable
        TrainingInProgress
            They would have to move while a training is under way.
        """
        wanted = self.wanted()
        if wanted != self.placement.backend:
            self._move(_able(wanted, self.settings), self.settings)
        return self.placement

    def reading(self) -> Placement:
        """The values, or a copy of them, on the back end that a call which only reads shall use."""
        wanted = self.wanted()
        if wanted == self.placement.backend:
            return self.placement
        if not (self.locks.depth or self.pending) and config.context_backend() is None:
            return self.working()  # back home
        return self._copied(_able(wanted, self.settings))

    def _move(self, backend: str, settings: Settings, moments: bool = True) -> None:
        if self.locks.at_work:
            self.locks.refuse()
        if self.locks.depth:
            raise TrainingInProgress(
                f"this net is training on {self.placement.backend!r}: expected nobody to move it to {backend!r} or to "
                "compile it before fit has returned; predict and evaluate answer from a copy"
            )
        placement = Placement(self.builder, settings, backend)
        placement.memory.take(self.memory, moments)
        self.settings, self.placement, self._copy = settings, placement, None

    def _copied(self, backend: str) -> Placement:
        version = int(self.memory.version[0])
        copy, seen = self._copy or (None, -1)
        if copy is None or copy.backend != backend:
            copy, seen = Placement(self.builder, self.settings, backend), -1
        if seen != version:
            copy.memory.take(self.memory, moments=False)
        self._copy = copy, version
        return copy

    def compile(self, settings: Settings) -> None:
        """Take new settings; parameters stay, the optimiser's moments start at zero."""
        name = config.home_backend(settings.backend)
        auto = self._first_able(settings) if name == "auto" else None
        self._move(auto or _able(name, settings), settings, moments=False)
        self._auto = auto

    # ------------------------------------------------------------------ the quick ways
    def quick(self) -> Any:
        """The engine's way into the last batch's step, as long as back end and threads are those asked for."""
        placement, settings = self.placement, self.settings
        if placement.quick_step is None:
            return None
        name = config.resolve_backend(None, settings.backend)
        same = (self._auto if name == "auto" else name) == placement.backend
        run, threads = placement.quick_step
        return run if same and config.resolve_threads(None, settings.threads) == threads else None

    def predict_direct(self, X: Any) -> np.ndarray | None:
        """`predict` in one call of the engine, for what a Program in use can take as it stands; None otherwise."""
        placement = self.placement
        if type(X) is not np.ndarray or self.wanted() != placement.backend:
            return None
        return placement.predict_direct(X)

    # ------------------------------------------------------------------ on paper
    def training_program(self) -> Program:
        """The training Program in use, or the one of a batch of 32 rows."""
        return self.placement.training_program() or self._on_paper(32, self.wanted(), self.settings, self.settings.fuse)

    def threads(self, program: Program) -> tuple[int, str]:
        """Threads for a Program and the reason."""
        return threads_of(program, self.settings.threads, self.wanted())

    def _on_paper(self, rows: int, backend: str, settings: Settings, fused: bool) -> Program:
        """A training step on a back end, or the user's own loop without a loss."""
        layout, loss = self.builder.layout(backend), settings.loss
        if loss is None:
            return self.builder.loop(rows, settings.optimizer, layout, fused)[0]
        feed = Feed(labels=loss.target_kind == "labels")
        return self.builder.train(rows, feed, loss, settings.optimizer, layout, fused)[0]


def _able(name: str, settings: Settings) -> str:
    """The name of a back end that runs here and computes in the model's dtype."""
    if (state := dispatch.load(name)) != "available":
        raise BackendUnavailable(f"back end {name!r} is not available: {state}")
    if why := dispatch.refuses(name, settings.dtype):
        raise BackendUnavailable(f"back end {name!r} cannot run {settings.dtype}: {why}")
    return name
