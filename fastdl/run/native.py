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
        if self._native is not None and array is not None:
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
