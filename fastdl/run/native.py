"""Hands a Program's calls to the engine, which runs any number of steps in one call without the GIL."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fastdl.kernels import dispatch
from fastdl.kernels.engine.panels import Panels
from fastdl.program import PHASES, Buffer
from fastdl.run.executor import Executor, Run
from fastdl.run.hazards import Range, after_which_to_meet


class NativeExecutor(Executor):
    """Binds every call to its compiled kernel; the engine runs them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._native: Any = None
        self._slots_used = {b for b in self.program.buffers if b.kind == "slot"}
        self._empty = set(self._slots_used)  # those without an array
        self._needed: dict[tuple[str, ...], dict[Buffer, tuple[str, str]]] = {}

    def _bind(self) -> Any:
        from fastdl.kernels.engine._cython import NativeProgram

        barriers = after_which_to_meet(self.program.calls, self._touched)
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
            capsule = how.capsule(impl, arrays, self.memory.layout.dtype, self.memory.layout.mixed)
            calls.append((capsule, arrays, ints, floats, call.tail, barriers[k]))
        stats = None if self.stats is None else self.stored(self.stats)
        changes = self.program.changes_parameters
        native = NativeProgram(
            calls, self.program.rows, self.threads, stats, self.totals, self.memory.version, self.program.folds, changes
        )
        self._spans = {}
        return native

    def _extent(self, buffer: Buffer) -> Range:
        """Byte range of a buffer in memory."""
        if buffer.kind == "batch":
            base = self.arena.ctypes.data
            return base + self.ranges[buffer][0], base + self.ranges[buffer][1]
        stored = self.stored(buffer)
        if stored is None:  # an array of the caller's, yet to come: below all addresses, above shared scratch
            at = -2 - self.program.buffers.index(buffer)
            return at, at + 1
        data = stored.data if isinstance(stored, Panels) else stored
        start = data.ctypes.data
        return start, start + max(1, data.nbytes)

    def _touched(self, chain: range) -> tuple[list[Range], list[Range]]:
        """Byte ranges that a head and its tails read and write; scratch that the team shares counts as written."""
        from fastdl.kernels.engine._cython import uses_shared

        read, written = [], []
        for k in chain:
            call = self.program.calls[k]
            read += [self._extent(b) for b in call.reads]
            written += [self._extent(b) for b in call.writes]
            if uses_shared(dispatch.marshaller(call.op).capsule(self.impls[k], (), self.memory.layout.dtype)):
                written.append((-1, 0))
        return read, written

    @property
    def native(self) -> Any:
        if self._native is None:
            self._native = self._bind()
        return self._native

    def slot(self, buffer: Buffer, array: np.ndarray | None) -> None:
        super().slot(buffer, array)
        if array is None:
            self._empty.add(buffer)
            return
        self._empty.discard(buffer)
        if self._native is not None:
            self._native.rebind(self._places.get(buffer, []), array)

    def single(self, x: Buffer, targets: Buffer) -> Any:
        if targets.dtype != "i8":
            return None
        from fastdl.kernels.engine._cython import SingleStep

        loss = next(call for call in self.program.calls if "stats" in call.buffers)
        native, double = self.native, self.memory.layout.dtype == np.float64
        places = self._places[x], self._places[targets]
        return SingleStep(native, *places, x.shape[-1], self.program.rows, double, loss.buffers["z"].shape[0])

    def direct(self, x: Buffer, y: Buffer) -> Callable[[Any], np.ndarray | None] | None:
        from fastdl.kernels.engine._cython import Prediction

        places = self._places[x], self._places[y]
        sizes = self.program.rows, x.shape[0], y.shape[0]
        return Prediction(self.native, *places, *self._heads(PHASES), *sizes, self.memory.layout.dtype)

    def _heads(self, phases: tuple[str, ...]) -> tuple[int, int]:
        found = self._spans.get(phases)
        if found is None:
            first, last = self.span(*phases)
            heads = self.native.head_of
            found = self._spans[phases] = (heads[first], heads[last - 1] + 1) if last > first else (0, 0)
        return found

    def _check_slots(self, phases: tuple[str, ...]) -> None:
        """The calls of some phases find the caller's arrays: without one they would read where none is."""
        needed = self._needed.get(phases)
        if needed is None:
            calls = [call for call in self.program.calls if call.phase in phases]
            needed = {b: (call.op, name) for call in calls for name, b in call.buffers.items() if b in self._slots_used}
            self._needed[phases] = needed
        for buffer, (op, name) in needed.items():
            if buffer in self._empty:
                raise ValueError(f"{op}: no array is bound for {name}; bind one with slot() before the run")

    def _run(self, run: Run, *phases: str) -> None:
        if self._empty:
            self._check_slots(phases)
        native = self.native
        first, last = self._heads(phases)
        native.run(first, last, **vars(run))

    @property
    def runs(self) -> int:
        return 0 if self._native is None else self._native.runs

    def steps(self, count: int, batch: int, run: Run, steps: int) -> None:
        if self._empty:
            self._check_slots(PHASES)
        native = self.native
        first, last = self._heads(PHASES)
        try:  # a signal is raised as soon as the engine returns: the steps are done all the same
            where = run.step, run.epoch, run.offset, run.update
            native.steps(first, last, count, batch, steps, *where, run.lr, run.scale)
        finally:
            run.step += steps
            run.update += steps
            run.offset += steps * batch
            if run.offset > count:
                run.offset = count
