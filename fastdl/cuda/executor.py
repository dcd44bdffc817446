"""A Program bound to a GPU: buffers in device memory, every phase captured as a graph and replayed.

Arenas of parameters, gradients and optimiser states have a copy in device memory (`fastdl.cuda.mirror`). The GPU's copy
is the newer one after a step; it comes back when the host asks (`Memory.pull`), and what the host has written goes down
before the next run. Within an epoch nothing is copied and nobody waits: the run-time block moves on by itself.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastdl.cuda.mirror import Pool, on_host
from fastdl.cuda.plan import Step, steps_of
from fastdl.errors import BackendUnavailable
from fastdl.kernels import dispatch, registry
from fastdl.kernels.common.gpu import Launch, Planner, View, run_block
from fastdl.program import PHASES, Buffer, Call, Program
from fastdl.run.executor import Executor, Run
from fastdl.run.storage import Memory

#: Plans kept, each with its graphs: arrays of the caller's at new addresses ask for new ones.
KEPT = 16


@dataclass
class Plan:
    """Launches for the arrays that are bound, and their graphs."""

    steps: list[Step]
    planner: Planner
    pool: Pool | None = None
    graphs: dict[Any, Any] = field(default_factory=dict)

    def launches(self, *phases: str) -> list[Launch]:
        return [launch for step in self.steps if step.phase in phases for launch in step.launches]


class CudaExecutor(Executor):
    """Binds every call to its launches."""

    def __init__(
        self, program: Program, memory: Memory, backend: str, threads: int, keep: Iterable[Buffer] = ()
    ) -> None:
        self.device = memory.mirror.device
        self._pool = Pool(self, self.device)
        self._single = {
            buffer
            for call in program.calls
            for array, buffer in zip(call.spec.arrays, call.arrays(), strict=True)
            if array.single
        }
        super().__init__(program, memory, backend, threads, keep)
        self._addresses: dict[Buffer, int] = {}
        self._given: dict[Buffer, View] = {}  # slots that are arrays of the caller's in device memory
        self._outputs: dict[Buffer, np.ndarray] = {}
        allocate = self._pool.allocate
        self.run_words = View(allocate(64), (1,), 1, np.dtype(np.uint32), "run")
        self.sums = View(allocate(32), (4,), 1, np.dtype(np.float64), "totals")
        self._plans: dict[tuple[Any, ...], Plan] = {}
        self._slices: deque[Any] = deque()  # marks behind the steps of earlier calls
        self._planned = program.rows  # rows of the batch buffers that views show
        self._slots_used = [b for b in program.buffers if b.kind == "slot"]
        self._folds, self._changes = program.folds, program.changes_parameters
        self._folded = -1
        self._written = {b for call in program.calls for b in call.writes if b.kind == "slot"}

    def _choose(self, call: Call) -> registry.Impl:
        """Launches can be planned without a GPU."""
        dispatch.load_cuda()
        found = registry.find(call.op, "cuda")
        if found is None:
            raise BackendUnavailable(f"back end 'cuda' cannot run {call.op}: it has no kernel for it")
        return found

    def _storage(self, size: int) -> int:
        return self._pool.allocate(size)

    # ------------------------------------------------------------------ buffers
    def _dtype(self, buffer: Buffer, array: registry.Array | None = None) -> np.dtype | str:
        """Matrices that calls hand on are bfloat16 in a mixed Program, and so are parameters as products read them."""
        kind = np.dtype(registry.DTYPES[buffer.dtype] or np.float32)
        if not self.memory.layout.mixed or buffer.dtype != "T":
            return kind
        if buffer.kind == "batch":
            return kind if buffer in self._single else "bfloat16"
        if buffer.kind in ("parameter", "folded"):
            return kind if array is None or array.single else "bfloat16"
        return kind

    def size_of(self, buffer: Buffer) -> int:
        return View(0, (buffer.size(self.program.rows),), 1, self._dtype(buffer)).nbytes

    def view(self, buffer: Buffer, array: registry.Array | None = None) -> View:
        """A buffer in device memory, for as many rows as the plan is for."""
        if buffer in self._given:
            return self._given[buffer]
        mirror, dtype = self.memory.mirror, self._dtype(buffer, array)
        shape = buffer.shape
        if buffer.kind == "batch":
            shape, address = (self._planned, *shape), self.arena + self.ranges[buffer][0]
        elif buffer.kind in ("cell", "slot", "folded"):
            shape, whole = (self._slot_shape(buffer, r) for r in (self._planned, self.program.rows))
            if buffer not in self._addresses:
                size = View(0, whole, 1, np.dtype(registry.DTYPES[buffer.dtype] or np.float32)).nbytes
                self._addresses[buffer] = self._pool.allocate(size)
            address = self._addresses[buffer]
        elif dtype == "bfloat16":
            address = mirror.rounded_address(super().stored(buffer))
        else:
            address = mirror.address(super().stored(buffer))
        return View(address, shape, int(np.prod(shape[1:])), dtype, buffer.name)

    def rounded(self, buffer: Buffer) -> View | None:
        """The copy that products of bfloat16 read: parameters have one, what is folded has none."""
        if not self.memory.layout.mixed or buffer.kind == "folded":
            return None
        address = self.memory.mirror.rounded_address(super().stored(buffer))
        return View(address, buffer.shape, 1, "bfloat16", buffer.name)

    def _slot_shape(self, buffer: Buffer, rows: int) -> tuple[int, ...]:
        """A slot holds one batch, or a data set, which names its rows; the others name theirs."""
        if buffer.kind != "slot":
            return buffer.shape
        dimensions = max(
            len(a.letters) for c in self.program.calls for a in c.spec.arrays if c.buffers.get(a.name) is buffer
        )
        return buffer.shape if len(buffer.shape) == dimensions else (rows, *buffer.shape)

    def stored(self, buffer: Buffer) -> Any:
        """A copy on the host."""
        return on_host(self.device, self.view(buffer))

    def read(self, buffer: Buffer, rows: int) -> np.ndarray:
        found = self.stored(buffer)
        return found[:rows].copy() if buffer.kind in ("batch", "slot") else found

    def place(self, buffer: Buffer, view: View) -> None:
        """Let a slot be memory on the device that the caller keeps."""
        self._given[buffer] = view

    def slot(self, buffer: Buffer, array: Any) -> None:
        super().slot(buffer, array)
        self._given.pop(buffer, None)
        self._outputs.pop(buffer, None)
        if array is None:
            return
        if not isinstance(array, np.ndarray):
            self.place(buffer, array.view(buffer.name))
        elif buffer in self._written:
            self._outputs[buffer] = array
        else:
            self.device.write(self.view(buffer).address, np.ascontiguousarray(array))

    # ------------------------------------------------------------------ plans
    def plan(self, rows: int = 0) -> Plan:
        """Launches for the arrays that are bound now.

        Our kernels take the rows of a batch from the run-time block and have one plan for all of them. A library's
        products are made for so many ``rows``.
        """
        library = getattr(self.device, "library", None)
        self._planned = rows if rows and library is not None else self.program.rows
        places = [self.view(buffer) for buffer in self._slots_used]
        key = (self._planned, *((v.address, v.shape, v.row_stride) for v in places))
        found = self._plans.get(key)
        if found is None:
            if len(self._plans) >= KEPT:
                self._plans.pop(next(iter(self._plans)))
            pool = Pool(None, self.device)
            planner = Planner(self.run_words, pool.allocate, library)
            found = self._plans[key] = Plan(steps_of(self.program, self, planner), planner, pool)
        return found

    def _replay(self, rows: int, *phases: str) -> None:
        plan = self.plan(rows)
        if phases not in plan.graphs:
            launches = plan.launches(*phases)
            plan.graphs[phases] = self.device.graph(launches) if launches else None
        if plan.graphs[phases] is not None:
            plan.graphs[phases].replay()

    def graph_of_step(self) -> Any:
        """All phases as one graph, for measurements: replayed, it repeats the last step."""
        return self.device.graph(self.plan(self.program.rows).launches(*PHASES))

    # ------------------------------------------------------------------ runs
    def _begin(self, run: Run, **more: int) -> None:
        values = {**vars(run), "total_rows": run.total_rows or run.rows}
        self.device.write(self.run_words.address, run_block(**values, **more))
        self.memory.mirror.push()
        if self._folds and self._folded != self.memory.version[0]:
            self._replay(0, "fold")
            self._folded = int(self.memory.version[0])

    def _clear(self, run: Run, loss: bool, gradients: bool) -> None:
        self._begin(run)
        if loss:
            self.device.write(self.view(self.stats).address, np.zeros(3))
        if gradients:
            here = self.memory.gradients
            self.device.write(self.memory.mirror.address(here), np.zeros_like(here))
            self.memory.mirror.wrote()

    def _run(self, run: Run, *phases: str) -> None:
        self._begin(run)
        self._replay(run.rows, *phases)
        if self._changes:
            self.memory.mirror.wrote()
        for buffer, array in self._outputs.items():
            array[...] = self.stored(buffer)[: array.shape[0]]
        self._runs += 1

    # ------------------------------------------------------------------ epochs
    #: Seconds are known of the slice before only: a call comes back with its own steps in the queue.
    growth = 4

    @contextlib.contextmanager
    def epoch(self, run: Run, count: int, batch: int) -> Iterator[None]:
        """Around the replays of an epoch: nothing is read before its end."""
        run.rows = min(batch, count - run.offset)
        self._begin(run, batch=batch, count=count)
        self.device.write(self.sums.address, np.zeros(4))
        try:
            yield
        finally:
            self.totals[:] = self.device.read(self.sums.address, np.float64, 4)
            while self._slices:
                self.device.wait(self._slices.popleft())

    def replay_step(self, rows: int, times: int = 1) -> None:
        """Whole steps of so many rows, each of which leaves the run-time block to the next."""
        from fastdl.kernels.gather.numba_cuda import next_step_launch

        plan = self.plan(rows)
        if "epoch" not in plan.graphs:
            following = next_step_launch(plan.planner, self.view(self.stats), self.sums)
            plan.graphs["epoch"] = self.device.graph([*plan.launches(*PHASES), following])
        self.memory.mirror.push()  # weights that somebody has assigned between two slices
        plan.graphs["epoch"].replay(times)
        self.memory.mirror.wrote()

    def steps(self, count: int, batch: int, run: Run, steps: int) -> None:
        """Queue replays; waits for those of the call before, so that the GPU has work and Ctrl-C not long to wait."""
        whole = min(steps, (count - run.offset) // batch)
        if whole:
            self.replay_step(batch, whole)
        if steps > whole:
            self.replay_step(count % batch)
        run.step += steps
        run.update += steps
        run.offset = min(count, run.offset + steps * batch)
        self._slices.append(self.device.mark())
        if len(self._slices) > 1:
            self.device.wait(self._slices.popleft())
