"""A Program bound to a back end: what every executor has, whoever runs the calls."""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastdl.errors import BackendUnavailable
from fastdl.kernels import dispatch, registry
from fastdl.kernels.engine import panels
from fastdl.kernels.engine.panels import Panels
from fastdl.program import PHASES, Buffer, Call, Program
from fastdl.run.arena import aligned
from fastdl.run.storage import Memory, dtype_of, panel_rows, plan_arena, stored_size


@dataclass
class Run:
    """The run-time block: what changes from step to step.

    Parameters
    ----------
    rows : int
        Of this run's batch. None of them: see `Executor.run`.
    step, epoch : int
        Positions in the random streams.
    first_row : int
        Place of row 0 in the step's full batch.
    total_rows : int
        Rows of the step's full batch; 0 means that this run has all of them.
    offset : int
        Place of row 0 in the epoch's order.
    update : int
        Updates that the optimiser's moments have seen.
    lr : float
    scale : float
        Factor of the gradient in the update: sum(w l) becomes a mean by ``total_rows / sum(w)`` where a step's rows
        were shared out.
    """

    rows: int
    step: int = 0
    update: int = 0
    epoch: int = 0
    first_row: int = 0
    total_rows: int = 0
    offset: int = 0
    update: int = 0
    lr: float = 0.0
    scale: float = 1.0


class Executor(ABC):
    """Storage of a bound Program.

    Parameters
    ----------
    program : Program
    memory : Memory
        Arenas shared with the model's other Programs.
    backend : str
    threads : int
    keep : iterable of Buffer
        Batch buffers that are read from outside after a run.
    """

    def __init__(
        self, program: Program, memory: Memory, backend: str, threads: int, keep: Iterable[Buffer] = ()
    ) -> None:
        self.program, self.memory, self.backend, self.threads = program, memory, backend, threads
        self.ranges, size = plan_arena(program, self.size_of, keep)
        self.arena = self._storage(size)
        self._cells: dict[Buffer, np.ndarray] = {}
        self._slots: dict[Buffer, np.ndarray | None] = {}
        self.stats = next((c.buffers["stats"] for c in program.calls if c.buffers.get("stats")), None)
        self.totals = np.zeros(4)  # of an epoch: loss * mass, mass (rows or weights), correct, rows
        self._runs = 0
        self.impls = [self._choose(call) for call in program.calls]

    def _storage(self, size: int) -> Any:
        """Memory for the batch buffers."""
        return aligned(size, np.uint8)

    def size_of(self, buffer: Buffer) -> int:
        """Bytes of a batch buffer."""
        layout = self.memory.layout
        return stored_size(buffer, self.program.rows, layout) * dtype_of(buffer, layout).itemsize

    def _choose(self, call: Call) -> registry.Impl:
        found = dispatch.candidate(call.op, self.backend, (), call.params)
        if isinstance(found, str):
            raise BackendUnavailable(f"back end {self.backend!r} cannot run {call.op}: {found}")
        return found

    def stored(self, buffer: Buffer) -> np.ndarray | Panels | None:
        """The memory of a buffer as the kernels see it, for the maximum number of rows."""
        memory, layout = self.memory, self.memory.layout
        if buffer.kind == "parameter":
            return memory.parameters.view(buffer.name)
        if buffer.kind == "gradient":
            return memory.parameters.view(buffer.name.removeprefix("d "), memory.gradients)
        if buffer.kind == "state":
            return memory.states.view(buffer.name)
        if buffer.kind == "flat":
            return memory.flat(buffer.span)
        if buffer.kind == "slot":
            return self._slots.get(buffer)
        if buffer.kind == "folded":
            if buffer.name not in memory.folded:
                memory.folded[buffer.name] = memory.parameters.blank(buffer.shape)
            return memory.folded[buffer.name]
        dtype = dtype_of(buffer, layout)
        if buffer.kind == "cell":
            if buffer not in self._cells:
                size = int(np.prod(buffer.shape))
                padded = panels.count(size) * panels.WIDTH if layout.panel_layout else size
                self._cells[buffer] = aligned(padded, dtype)[:size].reshape(buffer.shape)
            return self._cells[buffer]
        rows, (start, _) = self.program.rows, self.ranges[buffer]
        size = stored_size(buffer, rows, layout)
        flat = self.arena[start : start + size * dtype.itemsize].view(dtype)
        if layout.panel_layout and buffer.is_matrix and buffer.dtype == "T":
            return Panels(flat.reshape(-1, panel_rows(rows), panels.WIDTH), buffer.shape[0])
        return flat.reshape(rows, *buffer.shape)

    def read(self, buffer: Buffer, rows: int) -> np.ndarray:
        """A copy of a buffer in plain layout."""
        stored = self.stored(buffer)
        if isinstance(stored, Panels):
            return Panels(stored.data, stored.cols, rows).unpack()
        return stored[:rows].copy() if buffer.kind == "batch" else stored.copy()

    def span(self, *phases: str) -> tuple[int, int]:
        """Positions [first, last) of the calls of some phases (they stand together)."""
        chosen = [k for k, c in enumerate(self.program.calls) if c.phase in phases]
        return (chosen[0], chosen[-1] + 1) if chosen else (0, 0)

    def slot(self, buffer: Buffer, array: np.ndarray | None) -> None:
        """Bind one of the caller's arrays; None lets go of it until the next run has another."""
        self._slots[buffer] = array

    def holds(self, buffer: Buffer, array: np.ndarray) -> bool:
        """Whether a slot is bound to this very array."""
        return self._slots.get(buffer) is array

    def single(self, x: Buffer, targets: Buffer) -> Any:
        """A quick way in for batches that need no conversion (engine's `SingleStep`), or None."""
        return None

    def direct(self, x: Buffer, y: Buffer) -> Callable[[Any], np.ndarray | None] | None:
        """A shorter way from an array for slot ``x`` to a new one for slot ``y``, where there is one.

        Both slots have been bound to contiguous arrays before. Called with anything but a contiguous matrix of the
        model's dtype and width, of no more rows than the Program has, it returns None and has done nothing.
        """
        return None

    def run(self, run: Run, *phases: str) -> None:
        """Run the calls of some phases once, all of them if none is named.

        A run of no rows is a share that a small batch has left nothing for. It leaves what sums over no rows are, a
        loss and gradients of zero, and touches nothing else; the phase ``update`` is done as after any run.
        """
        phases = phases or PHASES
        if run.rows:
            self._run(run, *phases)
            return
        of_rows = {call.phase for call in self.program.calls} & {*phases} - {"update"}
        self._clear(run, loss="loss" in of_rows, gradients="backward" in of_rows)
        if "update" in phases:
            self._run(run, "update")

    @property
    def runs(self) -> int:
        """Runs that are done: they count where an interrupt is raised right behind one."""
        return self._runs

    def _clear(self, run: Run, loss: bool, gradients: bool) -> None:
        if loss:
            self.stored(self.stats)[:] = 0
        if gradients:
            self.memory.gradients[:] = 0

    @abstractmethod
    def _run(self, run: Run, *phases: str) -> None:
        """`run` for at least one row, or the update alone."""

    #: How many times the steps of a slice the next one may have, where a call can come back before its work is done.
    growth = math.inf

    @contextlib.contextmanager
    def epoch(self, run: Run, count: int, batch: int) -> Iterator[None]:
        """Around the `steps` of one epoch; ``totals`` is whole when it is left."""
        self.totals[:] = 0
        yield

    @abstractmethod
    def steps(self, count: int, batch: int, run: Run, steps: int) -> None:
        """Run ``steps`` batches from row ``run.offset`` of the epoch on, and add them to ``totals``."""

    def add_up(self, run: Run) -> None:
        """Add the loss of a run, just done, to ``totals``."""
        loss, mass, correct = self.stored(self.stats)
        if mass:  # a batch of zero weights has no mean
            over = mass if run.total_rows in (0, run.rows) else run.total_rows  # kernels/losses/README.md: Reduction
            self.totals[:2] += loss * over, mass
        self.totals[2:] += correct, run.rows
