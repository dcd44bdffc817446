"""A Program bound to a back end: memory for its buffers, and two ways to run its calls.

`PythonExecutor` loops over the calls in Python (NumPy and Numba back ends); `NativeExecutor` hands the list to the
engine, which runs any number of steps in one call without the GIL.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastdl.errors import BackendUnavailable
from fastdl.kernels import dispatch, registry
from fastdl.kernels.common.blas import limit_blas
from fastdl.kernels.engine import panels
from fastdl.kernels.engine.panels import Panels
from fastdl.parameters import Arena, aligned
from fastdl.program import PHASES, Buffer, Call, Program

#: Equal offsets of two buffers must not fall on the same cache sets: buffers start this many bytes apart, modulo 4 KB.
STAGGER = 832
#: A buffer's memory is reused only this many calls after its last use, so that independent calls stay independent.
REUSE_DISTANCE = 3


@dataclass
class Run:
    """The run-time block: what changes from step to step."""

    rows: int
    step: int = 0
    epoch: int = 0
    first_row: int = 0
    total_rows: int = 0
    offset: int = 0
    lr: float = 0.0


@dataclass(frozen=True)
class Memory:
    """The arenas that the Programs of one model share."""

    parameters: Arena
    gradients: np.ndarray
    states: Arena
    dtype: np.dtype
    panel_layout: bool
    flats: dict[Buffer, np.ndarray]  # stretches of the arenas that the optimiser sweeps over
    folded: dict[str, np.ndarray | Panels] = field(default_factory=dict)  # tensors made from parameters and states
    #: Products round their operands to bfloat16.
    mixed: bool = False
    #: The arenas in device memory, on a back end that has one (`fastdl.cuda.mirror.Mirror`).
    mirror: Any = None
    #: One integer, raised with every change of parameters or states: what is folded is made anew then.
    version: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))

    def pull(self) -> None:
        """Bring the arenas of the host up to date."""
        if self.mirror is not None:
            self.mirror.pull()


def _dtype(buffer: Buffer, memory: Memory) -> np.dtype:
    return np.dtype(registry.DTYPES[buffer.dtype] or memory.dtype)


def plan_arena(
    program: Program, size_of: Callable[[Buffer], int], keep: Iterable[Buffer]
) -> tuple[dict[Buffer, tuple[int, int]], int]:
    """Byte range of each batch buffer in one arena: first fit over lifetimes.

    Returns the ranges and the arena's size.
    """
    keep = set(keep)
    spans = program.lifetimes()
    chain_end = list(range(len(program)))  # a tail runs inside its head: their buffers live until the chain ends
    for k in range(len(program) - 2, -1, -1):
        if program.calls[k + 1].tail:
            chain_end[k] = chain_end[k + 1]
    placed: list[tuple[int, int, int, int, Buffer]] = []  # start, end, first, last
    top = 0
    for buffer, (first, last) in sorted(spans.items(), key=lambda item: item[1][0]):
        head = first
        while head and program.calls[head].tail:
            head -= 1
        first, last = head, len(program) if buffer in keep else chain_end[last] + REUSE_DISTANCE
        size = (size_of(buffer) + 63) // 64 * 64 + STAGGER
        at = 0
        for start, end, a, b, _ in sorted(placed, key=lambda p: p[0]):
            if a <= last and first <= b:  # alive at the same time
                if at + size <= start:
                    break
                at = max(at, end)
        placed.append((at, at + size, first, last, buffer))
        top = max(top, at + size)
    return {p[4]: (p[0], p[1]) for p in placed}, top


def _panel_rows(rows: int) -> int:
    """Rows of a panel buffer: two at least, or its strides could not be told from those of a plain row."""
    return max(2, rows)


def stored_size(buffer: Buffer, rows: int, memory: Memory) -> int:
    if memory.panel_layout and buffer.is_matrix and buffer.dtype == "T":
        return panels.count(buffer.shape[0]) * panels.WIDTH * _panel_rows(rows)
    if memory.panel_layout and not buffer.shape:
        return rows
    return buffer.size(rows)


def _is_long(call: Call, program: Program) -> bool:
    """Whether a call of a Python back end pays for waking sleeping threads, some 60 us; at 100 Gflop/s and 30 GB/s."""
    rows = program.rows
    return call.spec.flops(call.sizes(rows)) / 1e11 + call.moved(rows, program.itemsize) / 3e10 > 60e-6


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
        self.totals = np.zeros(3)
        self.impls = [self._choose(call) for call in program.calls]

    def _storage(self, size: int) -> Any:
        """Memory for the batch buffers."""
        return aligned(size, np.uint8)

    def size_of(self, buffer: Buffer) -> int:
        """Bytes of a batch buffer."""
        return stored_size(buffer, self.program.rows, self.memory) * _dtype(buffer, self.memory).itemsize

    def _choose(self, call: Call) -> registry.Impl:
        found = dispatch.candidate(call.op, self.backend, (), call.params)
        if isinstance(found, str):
            raise BackendUnavailable(f"back end {self.backend!r} cannot run {call.op}: {found}")
        return found

    def stored(self, buffer: Buffer) -> np.ndarray | Panels | None:
        """The memory of a buffer as the kernels see it, for the maximum number of rows."""
        memory = self.memory
        if buffer.kind == "parameter":
            return memory.parameters.view(buffer.name)
        if buffer.kind == "gradient":
            return memory.parameters.view(buffer.name.removeprefix("d "), memory.gradients)
        if buffer.kind == "state":
            return memory.states.view(buffer.name)
        if buffer.kind == "flat":
            return memory.flats[buffer]
        if buffer.kind == "slot":
            return self._slots.get(buffer)
        if buffer.kind == "folded":
            if buffer.name not in memory.folded:
                memory.folded[buffer.name] = memory.parameters.blank(buffer.shape)
            return memory.folded[buffer.name]
        dtype = _dtype(buffer, memory)
        if buffer.kind == "cell":
            if buffer not in self._cells:
                size = int(np.prod(buffer.shape))
                padded = panels.count(size) * panels.WIDTH if memory.panel_layout else size
                self._cells[buffer] = aligned(padded, dtype)[:size].reshape(buffer.shape)
            return self._cells[buffer]
        rows, (start, _) = self.program.rows, self.ranges[buffer]
        size = stored_size(buffer, rows, memory)
        flat = self.arena[start : start + size * dtype.itemsize].view(dtype)
        if memory.panel_layout and buffer.is_matrix and buffer.dtype == "T":
            return Panels(flat.reshape(-1, _panel_rows(rows), panels.WIDTH), buffer.shape[0])
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

    def single(self, x: Buffer, targets: Buffer) -> Any:
        """A quick way in for batches that need no conversion (engine's `SingleStep`), or None."""
        return None

    def direct(self, x: Buffer, y: Buffer) -> Callable[[Any], np.ndarray | None] | None:
        """A shorter way from an array for slot ``x`` to a new one for slot ``y``, where there is one.

        Both slots have been bound to contiguous arrays before. Called with anything but a contiguous matrix of the
        model's dtype and width, of no more rows than the Program has, it returns None and has done nothing.
        """
        return None

    @abstractmethod
    def run(self, run: Run, *phases: str) -> None:
        """Run the calls of some phases once, all of them if none is named."""

    #: How many times the steps of a slice the next one may have, where a call can come back before its work is done.
    growth = math.inf

    @contextlib.contextmanager
    def epoch(self, run: Run, count: int, batch: int) -> Iterator[None]:
        """Around the `steps` of one epoch; ``totals`` is whole when it is left."""
        self.totals[:] = 0
        yield

    @abstractmethod
    def steps(self, count: int, batch: int, run: Run, steps: int) -> None:
        """Run ``steps`` batches from row ``run.offset`` of the epoch on; ``totals`` adds up loss, rows, correct."""


class PythonExecutor(Executor):
    """Calls one implementation after the other from Python."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._views: dict[int, list[list[Any]]] = {}
        self._runtime = [c.spec.runtime for c in self.program.calls]
        #: Numba's kernels have threads of their own (kernels/common/blas.py)
        self.blas_threads = 1 if self.backend == "numba" else self.threads
        self._threads = [self.threads if _is_long(call, self.program) else 1 for call in self.program.calls]
        self._folds, self._changes = self.program.folds, self.program.changes_parameters
        self._folded = -1  # version of the parameters that the folded tensors were made from

    def _arrays(self, rows: int) -> list[list[Any]]:
        found = self._views.get(rows)
        if found is None:
            if len(self._views) > 8:  # growing batches: keep the cache small
                self._views.clear()
            found = self._views[rows] = [
                [None if b is None else self._cut(b, rows) for b in call.arrays()] for call in self.program.calls
            ]
        return found

    def _cut(self, buffer: Buffer, rows: int) -> Any:
        stored = self.stored(buffer)
        return stored[:rows] if buffer.kind == "batch" else stored

    def slot(self, buffer: Buffer, array: np.ndarray | None) -> None:
        super().slot(buffer, array)
        for views in self._views.values():
            for call, arrays in zip(self.program.calls, views, strict=True):
                for k, b in enumerate(call.arrays()):
                    if b is buffer:
                        arrays[k] = array

    def _go(self, first: int, last: int, run: Run) -> None:
        version = self.memory.version
        if self._changes:
            version += 1
        if 0 < self._folds <= first and self._folded != version[0]:
            self._go(0, self._folds, run)
            self._folded = int(version[0])
        values = vars(run)
        arrays = self._arrays(run.rows)
        for k in range(first, last):
            call = self.program.calls[k]
            runtime = {name: values[name] for name in self._runtime[k]}
            self.impls[k].fn(*arrays[k], **call.params, **runtime, threads=self._threads[k])

    def run(self, run: Run, *phases: str) -> None:
        if not run.total_rows:
            run.total_rows = run.rows
        with limit_blas(self.blas_threads):
            self._go(*self.span(*(phases or PHASES)), run)

    def steps(self, count: int, batch: int, run: Run, steps: int) -> None:
        first, last = self.span(*PHASES)
        with limit_blas(self.blas_threads):
            for _ in range(steps):
                run.rows = run.total_rows = min(batch, count - run.offset)
                self._go(first, last, run)
                stats = self.stored(self.stats)
                self.totals += (stats[0] * run.rows, run.rows, stats[2])
                run.offset += run.rows
                run.step += 1


class NativeExecutor(Executor):
    """Binds every call to its compiled kernel; the engine runs them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._native: Any = None

    def _bind(self) -> Any:
        from fastdl.kernels.engine._cython import NativeProgram

        barriers = self._barriers()
        calls = []
        self._places: dict[Buffer, list[tuple[int, int]]] = {}
        for k, (call, impl) in enumerate(zip(self.program.calls, self.impls, strict=True)):
            how = dispatch.marshaller(call.op)
            buffers = call.arrays()
            arrays = tuple(None if b is None else self.stored(b) for b in buffers)
            for position, b in enumerate(buffers):
                if b is not None and b.kind == "slot":
                    self._places.setdefault(b, []).append((k, position))
            ints, floats = how.scalars(call.params)
            capsule = how.capsule(impl, arrays, self.memory.dtype, self.memory.mixed)
            calls.append((capsule, arrays, ints, floats, call.tail, barriers[k]))
        stats = None if self.stats is None else self.stored(self.stats)
        changes = self.program.changes_parameters
        native = NativeProgram(
            calls, self.program.rows, self.threads, stats, self.totals, self.memory.version, self.program.folds, changes
        )
        self._spans = {}
        return native

    def _extent(self, buffer: Buffer) -> tuple[int, int]:
        """Byte range of a buffer in memory."""
        if buffer.kind == "batch":
            base = self.arena.ctypes.data
            return base + self.ranges[buffer][0], base + self.ranges[buffer][1]
        stored = self.stored(buffer)
        data = stored.data if isinstance(stored, Panels) else stored
        start = data.ctypes.data
        return start, start + max(1, data.nbytes)

    def _barriers(self) -> list[bool]:
        """After which heads the team must meet: where a later chain touches what an earlier one may still work on."""
        calls = self.program.calls
        barriers = [False] * len(calls)
        read: list[tuple[int, int]] = []
        written: list[tuple[int, int]] = []
        heads = [k for k, call in enumerate(calls) if not call.tail]
        for before, k, end in zip([-1, *heads], heads, [*heads[1:], len(calls)], strict=False):
            r, w = self._touched(range(k, end))
            if _overlap(r, written) or _overlap(w, written) or _overlap(w, read) or _new_phase(calls, k):
                barriers[before] = True
                read, written = [], []
            read += r
            written += w
        barriers[heads[-1]] = True
        return barriers

    def _touched(self, chain: range) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Byte ranges that a head and its tails read and write; scratch that the team shares counts as written."""
        from fastdl.kernels.engine._cython import uses_shared

        read, written = [], []
        for k in chain:
            call = self.program.calls[k]
            read += [self._extent(b) for b in call.reads]
            written += [self._extent(b) for b in call.writes]
            if uses_shared(dispatch.marshaller(call.op).capsule(self.impls[k], (), self.memory.dtype)):
                written.append((-1, 0))
        return read, written

    @property
    def native(self) -> Any:
        if self._native is None:
            self._native = self._bind()
        return self._native

    def slot(self, buffer: Buffer, array: np.ndarray | None) -> None:
        super().slot(buffer, array)
        if self._native is not None and array is not None:
            self._native.rebind(self._places.get(buffer, []), array)

    def single(self, x: Buffer, targets: Buffer) -> Any:
        if targets.dtype != "i8":
            return None
        from fastdl.kernels.engine._cython import SingleStep

        loss = next(call for call in self.program.calls if "stats" in call.buffers)
        native, double = self.native, self.memory.dtype == np.float64
        places = self._places[x], self._places[targets]
        return SingleStep(native, *places, x.shape[-1], self.program.rows, double, loss.buffers["z"].shape[0])

    def direct(self, x: Buffer, y: Buffer) -> Callable[[Any], np.ndarray | None] | None:
        from fastdl.kernels.engine._cython import Prediction

        places = self._places[x], self._places[y]
        sizes = self.program.rows, x.shape[0], y.shape[0]
        return Prediction(self.native, *places, *self._heads(PHASES), *sizes, self.memory.dtype)

    def _heads(self, phases: tuple[str, ...]) -> tuple[int, int]:
        found = self._spans.get(phases)
        if found is None:
            first, last = self.span(*phases)
            heads = self.native.head_of
            found = self._spans[phases] = (heads[first], heads[last - 1] + 1) if last > first else (0, 0)
        return found

    def run(self, run: Run, *phases: str) -> None:
        native = self.native
        first, last = self._heads(phases or PHASES)
        native.run(first, last, run.rows, run.step, run.epoch, run.first_row, run.total_rows, run.lr, run.offset)

    def steps(self, count: int, batch: int, run: Run, steps: int) -> None:
        native = self.native
        first, last = self._heads(PHASES)
        try:  # a signal is raised as soon as the engine returns: the steps are done all the same
            native.steps(first, last, count, batch, run.offset, steps, run.step, run.epoch, run.lr)
        finally:
            run.step += steps
            run.offset = min(count, run.offset + steps * batch)


def _overlap(a: list[tuple[int, int]], b: list[tuple[int, int]]) -> bool:
    return any(x[0] < y[1] and y[0] < x[1] for x in a for y in b)


def _new_phase(calls: tuple[Call, ...], k: int) -> bool:
    return k > 0 and calls[k].phase != calls[k - 1].phase


def bind(program: Program, memory: Memory, backend: str, threads: int, keep: Iterable[Buffer] = ()) -> Executor:
    """Bind a Program to a back end."""
    if backend == "cuda":
        from fastdl.cuda.executor import CudaExecutor as kind
    else:
        kind = NativeExecutor if backend == "cython" else PythonExecutor
    return kind(program, memory, backend, threads, keep)
