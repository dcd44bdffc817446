"""A device without a GPU: launches are carried out by the interpreter of the PTX that the GPU would get."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastdl.kernels.common import numba_cuda
from fastdl.kernels.common.gpu import Kernel, Launch, Planner, Product, View, run_block
from gpu.interpreter import Grid, Memory
from gpu.products import carry_out
from gpu.ptx import Module


@functools.cache
def module(kernel: Kernel, dtype: str) -> Module:
    return Module(numba_cuda.ptx(kernel, dtype))


def to_bfloat16(a: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(a, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bfloat16(a: np.ndarray) -> np.ndarray:
    return (a.astype(np.uint32) << 16).view(np.float32)


@dataclass
class Replayed:
    """What stands for a captured graph."""

    device: Interpreted
    launches: tuple[Launch, ...]

    def replay(self, times: int = 1) -> None:
        for _ in range(times):
            self.device.run(self.launches)


class Interpreted:
    """Memory and launches.

    ``library`` stands for cuBLASLt where one is given.
    """

    def __init__(self, library: Any = None) -> None:
        self.memory, self.library = Memory(), library
        self.launched: list[Launch | Product] = []
        self.freed: list[int] = []
        self.allocated = 0

    def allocate(self, size: int) -> int:
        self.allocated += 1
        address = self.memory.allocate(max(1, size))
        self.write(address, np.zeros(size, np.uint8))
        return address

    def free(self, address: int) -> None:
        self.freed.append(address)

    def write(self, address: int, array: np.ndarray) -> None:
        self.memory.write(address, array)

    def read(self, address: int, dtype: Any, count: int) -> np.ndarray:
        return self.memory.read(address, dtype, count)

    def free_bytes(self) -> int:
        return 1 << 40

    def synchronize(self) -> None:
        """Everything is done when a call comes back."""

    def mark(self) -> int:
        return 0

    def wait(self, event: int) -> None:
        """Nobody has to."""

    def launch(self, launch: Launch | Product) -> None:
        if isinstance(launch, Product):
            carry_out(launch, self.memory)
            self.launched.append(launch)
            return
        arguments = [a.address if isinstance(a, View) else 0 if a is None else a for a in launch.arguments]
        Grid(module(launch.kernel, launch.dtype), launch.grid, launch.block, arguments, self.memory).run()
        self.launched.append(launch)

    def run(self, launches: Sequence[Launch]) -> None:
        for launch in launches:
            self.launch(launch)

    def graph(self, launches: Sequence[Launch]) -> Replayed:
        return Replayed(self, tuple(launches))

    # ------------------------------------------------------------------ for tests of one op
    def planner(self, **run: float) -> Planner:
        """A plan that reads a run-time block of these values."""
        return Planner(self.put(run_block(**run)), self.allocate)

    def put(self, array: np.ndarray | None, dtype: str = "", gap: int = 0, offset: int = 0) -> View | None:
        """A copy in device memory; ``gap`` elements between rows, ``offset`` bytes off the alignment."""
        if array is None:
            return None
        kept = to_bfloat16(array) if dtype == "bfloat16" and array.dtype == np.float32 else np.ascontiguousarray(array)
        rows, cols = (kept.shape[0], kept.shape[1]) if kept.ndim == 2 else (1, kept.size)
        stride = cols + (gap if kept.ndim == 2 else 0)
        size = max(0, (rows - 1) * stride + cols) * kept.itemsize
        address = self.memory.allocate(max(size, 1), offset and max(offset, kept.itemsize))  # items stay aligned
        for r in range(rows):
            self.write(address + r * stride * kept.itemsize, kept.reshape(rows, cols)[r])
        kind = "bfloat16" if kept.dtype == np.uint16 else kept.dtype
        return View(address, array.shape, stride, kind)

    def get(self, view: View) -> np.ndarray:
        """The array back as NumPy has it, bfloat16 as float32."""
        dtype = np.uint16 if view.dtype == "bfloat16" else view.dtype
        if len(view.shape) < 2:
            found = self.read(view.address, dtype, int(np.prod(view.shape)))
        else:
            size = np.dtype(dtype).itemsize
            rows = [self.read(view.address + r * view.row_stride * size, dtype, view.cols) for r in range(view.rows)]
            found = np.array(rows, dtype).reshape(view.shape)
        return from_bfloat16(found) if view.dtype == "bfloat16" else found.reshape(view.shape)
