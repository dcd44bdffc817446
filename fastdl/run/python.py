"""Runs a Program's calls one after the other from Python (NumPy and Numba back ends)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from fastdl.kernels.common.blas import limit_blas
from fastdl.program import PHASES, Buffer, Call, Program
from fastdl.run.executor import Executor, Run


def _is_long(call: Call, program: Program) -> bool:
    """Whether a call of a Python back end pays for waking sleeping threads, some 60 us; at 100 Gflop/s and 30 GB/s."""
    rows = program.rows
    return call.spec.flops(call.sizes(rows)) / 1e11 + call.moved(rows, program.itemsize) / 3e10 > 60e-6


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
        self._runs += 1

    @contextlib.contextmanager
    def _own_state(self) -> Iterator[None]:
        """Around the calls: BLAS held to the Program's threads, underflow is 0 whatever the caller has set for his own.

        Moments and sigmoids underflow in every training; the compiled back end flushes what does.
        """
        with limit_blas(self.blas_threads), np.errstate(under="ignore"):
            yield

    def _run(self, run: Run, *phases: str) -> None:
        if not run.total_rows:
            run.total_rows = run.rows
        with self._own_state():
            self._go(*self.span(*phases), run)

    def steps(self, count: int, batch: int, run: Run, steps: int) -> None:
        first, last = self.span(*PHASES)
        with self._own_state():
            for _ in range(steps):
                run.rows = run.total_rows = min(batch, count - run.offset)
                self._go(first, last, run)
                self.add_up(run)
                run.offset += run.rows
                run.step += 1
                run.update += 1
