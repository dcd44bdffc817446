"""A Program bound to a GPU: buffers in device memory, every phase captured as a graph and replayed.

Arenas of parameters, gradients and optimiser states have a copy in device memory (`Mirror`). The GPU's copy is the
newer one after a step; it comes back when the host asks (`Memory.pull`), and what the host has written goes down before
the next run. Within an epoch nothing is copied and nobody waits: the run-time block moves on by itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import numpy as np

from fastdl.cuda.plan import Step, steps_of
from fastdl.errors import BackendUnavailable
from fastdl.executor import Executor, Memory, Run
from fastdl.kernels import dispatch, registry
from fastdl.kernels.common.gpu import Launch, Planner, View, run_block
from fastdl.program import PHASES, Buffer, Call, Program


class Pool:
    """Device memory that is given back when its owner goes."""

    def __init__(self, owner: Any, device: Any) -> None:
        self._device, self._taken = device, []
        weakref.finalize(owner, _give_back, device, self._taken)

    def allocate(self, size: int) -> int:
        """Address of zeros."""
        self._taken.append(self._device.allocate(size))
        return self._taken[-1]


def _give_back(device: Any, addresses: list[int]) -> None:
    for address in addresses:
        device.free(address)


class Mirror:
    """The arenas of a model in device memory, copied to and fro as a whole."""

    def __init__(self, device: Any, version: np.ndarray) -> None:
        self.device, self.version, self._pool = device, version, Pool(self, device)
        self._arenas: dict[int, tuple[np.ndarray, int]] = {}  # address of the host's bytes -> (bytes, device address)
        self._seen = -1  # version of the host's values that the device has
        self.newer = False  # the device has written since the last pull

    def address(self, array: np.ndarray) -> int:
        """Where an array inside an arena lies in device memory."""
        root = array
        while isinstance(root.base, np.ndarray):
            root = root.base
        host = root.ctypes.data
        if host not in self._arenas:
            shift = host % 256  # addresses keep their alignment
            self._arenas[host] = root, self._pool.allocate(root.nbytes + 256) + shift
            self.device.write(self._arenas[host][1], root)
        return self._arenas[host][1] + array.ctypes.data - host

    def push(self) -> None:
        """Copy the host's values down if they have changed."""
        if self._seen != self.version[0]:
            for root, address in self._arenas.values():
                self.device.write(address, root)
            self._seen = int(self.version[0])

    def wrote(self) -> None:
        """The device has changed parameters or states."""
        self.version += 1
        self._seen, self.newer = int(self.version[0]), True

    def pull(self) -> None:
        """Copy the device's values up if they are newer."""
        if self.newer:
            for root, address in self._arenas.values():
                root[...] = self.device.read(address, root.dtype, root.size)
            self.newer = False


class CudaExecutor(Executor):
    """Binds every call to its launches."""

    def __init__(
        self, program: Program, memory: Memory, backend: str, threads: int, keep: Iterable[Buffer] = ()
    ) -> None:
        self.device = memory.mirror.device
        self._pool = Pool(self, self.device)
        super().__init__(program, memory, backend, threads, keep)
        self._addresses: dict[Buffer, int] = {}
        self._outputs: dict[Buffer, np.ndarray] = {}
        allocate = self._pool.allocate
        self.planner = Planner(View(allocate(64), (1,), 1, np.dtype(np.uint32), "run"), allocate)
        self.sums = View(allocate(24), (3,), 1, np.dtype(np.float64), "totals")
        self.plan: list[Step] = steps_of(program, self.view, self.planner)
        self._graphs: dict[tuple[str, ...], Any] = {}
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
    def view(self, buffer: Buffer) -> View:
        """A buffer in device memory, for the maximum number of rows."""
        memory = self.memory
        dtype = self.dtype(buffer)
        if buffer.kind == "batch":
            shape, address = (self.program.rows, *buffer.shape), self.arena + self.ranges[buffer][0]
        elif buffer.kind in ("cell", "slot"):
            shape = self._slot_shape(buffer) if buffer.kind == "slot" else buffer.shape
            if buffer not in self._addresses:
                self._addresses[buffer] = self._pool.allocate(int(np.prod(shape)) * dtype.itemsize)
            address = self._addresses[buffer]
        else:
            shape, address = buffer.shape, memory.mirror.address(super().stored(buffer))
        return View(address, shape, int(np.prod(shape[1:])), dtype, buffer.name)

    def _slot_shape(self, buffer: Buffer) -> tuple[int, ...]:
        """A slot holds one batch, or a data set, which names its rows."""
        dimensions = max(
            len(a.letters) for c in self.program.calls for a in c.spec.arrays if c.buffers.get(a.name) is buffer
        )
        return buffer.shape if len(buffer.shape) == dimensions else (self.program.rows, *buffer.shape)

    def stored(self, buffer: Buffer) -> Any:
        """A copy on the host."""
        view = self.view(buffer)
        return self.device.read(view.address, view.dtype, int(np.prod(view.shape))).reshape(view.shape)

    def read(self, buffer: Buffer, rows: int) -> np.ndarray:
        found = self.stored(buffer)
        return found[:rows].copy() if buffer.kind in ("batch", "slot") else found

    def slot(self, buffer: Buffer, array: np.ndarray | None) -> None:
        super().slot(buffer, array)
        if array is None:
            self._outputs.pop(buffer, None)
        elif buffer in self._written:
            self._outputs[buffer] = array
        else:
            self.device.write(self.view(buffer).address, np.ascontiguousarray(array))

    # ------------------------------------------------------------------ runs
    def launches(self, *phases: str) -> list[Launch]:
        return [launch for step in self.plan if step.phase in phases for launch in step.launches]

    def _replay(self, *phases: str) -> None:
        if phases not in self._graphs:
            launches = self.launches(*phases)
            self._graphs[phases] = self.device.graph(launches) if launches else None
        if self._graphs[phases] is not None:
            self._graphs[phases].replay()

    def graph_of_step(self) -> Any:
        """All phases as one graph, for measurements: replayed, it repeats the last step."""
        return self.device.graph(self.launches(*PHASES))

    def _begin(self, run: Run, **more: int) -> None:
        values = {name: getattr(run, name) for name in ("rows", "step", "epoch", "first_row", "offset", "lr")}
        total = run.total_rows or run.rows
        self.device.write(self.planner.run.address, run_block(**values, total_rows=total, **more))
        self.memory.mirror.push()
        if self._folds and self._folded != self.memory.version[0]:
            self._replay("fold")
            self._folded = int(self.memory.version[0])

    def run(self, run: Run, *phases: str) -> None:
        self._begin(run)
        self._replay(*(phases or PHASES))
        if self._changes:
            self.memory.mirror.wrote()
        for buffer, array in self._outputs.items():
            array[...] = self.stored(buffer)[: array.shape[0]]

    def steps(self, count: int, batch: int, run: Run, steps: int) -> None:
        from fastdl.kernels.gather.numba_cuda import next_step_launch

        run.rows = min(batch, count - run.offset)
        self._begin(run, batch=batch, count=count)
        if "epoch" not in self._graphs:
            following = next_step_launch(self.planner, self.view(self.stats), self.sums)
            self._graphs["epoch"] = self.device.graph([*self.launches(*PHASES), following])
        self.device.write(self.sums.address, np.zeros(3))
        self._graphs["epoch"].replay(steps)
        self.memory.mirror.wrote()
        self.totals += self.device.read(self.sums.address, np.float64, 3)
        run.step += steps
        run.offset = min(count, run.offset + steps * batch)
