"""What stands for ``cuda.bindings.driver``: every call is held against the real function's arguments, and done here.

Memory is an interpreter's, a module is the kernel that it was made from, a launch runs its PTX, a graph replays what
was captured. Calls that a capture forbids fail in one.
"""

from __future__ import annotations

import ctypes
import inspect
from typing import Any

import numpy as np
from cuda.bindings import driver as real

from gpu.device import module
from gpu.interpreter import Grid, Memory

OK = real.CUresult.CUDA_SUCCESS
#: What a capturing thread may call.
IN_A_CAPTURE = {"cuLaunchKernel", "cuStreamEndCapture", "cuCtxSetCurrent"}


class StandIn:
    """The module, as `fastdl.kernels.common.driver` uses it."""

    def __init__(self) -> None:
        self.memory, self.kernels = Memory(), {}
        self.called: list[str] = []
        self.capturing: list[Any] | None = None
        self.living: set[tuple[str, int]] = set()
        self._count = 100

    def __getattr__(self, name: str) -> Any:
        found = getattr(real, name)  # a name that the package does not have is an error here too
        if not name.startswith("cu"):
            return found
        parameters = inspect.signature(found)
        act = getattr(self, f"_{name}", None)

        def call(*given: Any) -> tuple[Any, ...]:
            parameters.bind(*given)
            assert self.capturing is None or name in IN_A_CAPTURE, f"{name} within a capture"
            self.called.append(name)
            assert act is not None, f"{name} has no stand-in"
            found = act(*given)
            return (OK,) if found is None else (OK, *found) if isinstance(found, tuple) else (OK, found)

        return call

    def _new(self, kind: str) -> int:
        self._count += 1
        self.living.add((kind, self._count))
        return self._count

    def _gone(self, kind: str, which: Any) -> None:
        self.living.remove((kind, int(which)))  # twice is an error

    # ------------------------------------------------------------------ device and context
    def _cuInit(self, flags: int) -> None: ...
    def _cuCtxSetCurrent(self, context: int) -> None: ...
    def _cuStreamSynchronize(self, stream: int) -> None: ...

    def _cuDeviceGetCount(self) -> int:
        return 1

    def _cuDeviceGet(self, ordinal: int) -> int:
        return ordinal

    def _cuDevicePrimaryCtxRetain(self, device: int) -> int:
        return 1

    def _cuDeviceGetAttribute(self, attribute: Any, device: int) -> int:
        major = real.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
        return 9 if attribute == major else 0

    def _cuGetErrorString(self, status: Any) -> bytes:
        return b"an error"

    def _cuStreamCreate(self, flags: Any) -> int:
        return self._new("stream")

    # ------------------------------------------------------------------ memory
    def _cuMemAlloc(self, size: int) -> int:
        address = self.memory.allocate(size)
        self.living.add(("memory", address))
        return address

    def _cuMemFree(self, address: int) -> None:
        self._gone("memory", address)

    def _cuMemGetInfo(self) -> tuple[int, int]:
        return 1 << 30, 1 << 40

    def _cuMemsetD8Async(self, address: int, value: int, count: int, stream: int) -> None:
        self.memory.write(address, np.full(count, value, np.uint8))

    def _cuMemHostAlloc(self, size: int, flags: int) -> int:
        kept = ctypes.create_string_buffer(size)
        self.kernels[ctypes.addressof(kept)] = kept
        self.living.add(("host", ctypes.addressof(kept)))
        return ctypes.addressof(kept)

    def _cuMemFreeHost(self, address: int) -> None:
        self._gone("host", address)

    def _cuMemcpyHtoDAsync(self, address: int, source: int, count: int, stream: int) -> None:
        self.memory.write(address, np.frombuffer(ctypes.string_at(source, count), np.uint8))

    def _cuMemcpyDtoHAsync(self, target: int, address: int, count: int, stream: int) -> None:
        ctypes.memmove(target, self.memory.read(address, np.uint8, count).tobytes(), count)

    def _cuMemcpyDtoDAsync(self, target: int, address: int, count: int, stream: int) -> None:
        self.memory.write(target, self.memory.read(address, np.uint8, count))

    # ------------------------------------------------------------------ code
    def _cuModuleLoadData(self, image: bytes) -> bytes:
        return image

    def _cuModuleGetFunction(self, image: bytes, name: bytes) -> tuple[Any, ...]:
        kernel, dtype = self.kernels[image]
        assert kernel.name.encode() == name
        return ((kernel, dtype),)

    def _cuLaunchKernel(self, function: Any, *given: Any) -> None:
        gx, gy, gz, bx, by, bz, shared, _, parameters, extra = given
        assert (gz, bz, shared, extra) == (1, 1, 0, 0)
        values, kinds = parameters
        kernel, dtype = function
        for (kind, name), value, c in zip(kernel.arguments, values, kinds, strict=True):
            expected = 8 if kind.endswith("*") or kind[1] == "8" else 4
            assert ctypes.sizeof(c) == expected, f"{kernel.name}: {name}"
            c(value)  # what ctypes would not take, cuda-bindings would not either
        work = module(kernel, dtype), (gx, gy), (bx, by), list(values)
        if self.capturing is not None:
            self.capturing.append(work)
        else:
            Grid(*work, self.memory).run()

    # ------------------------------------------------------------------ graphs
    def _cuStreamBeginCapture(self, stream: int, mode: Any) -> None:
        self.capturing = []

    def _cuStreamEndCapture(self, stream: int) -> tuple[Any, ...]:
        found, self.capturing = self.capturing, None
        return (found,)

    def _cuGraphInstantiate(self, graph: Any, flags: int) -> tuple[Any, ...]:
        return (list(graph),)

    def _cuGraphDestroy(self, graph: Any) -> None: ...
    def _cuGraphExecDestroy(self, graph: Any) -> None: ...

    def _cuGraphLaunch(self, graph: Any, stream: int) -> None:
        for work in graph:
            Grid(*work, self.memory).run()

    # ------------------------------------------------------------------ events
    def _cuEventCreate(self, flags: Any) -> int:
        return self._new("event")

    def _cuEventRecord(self, event: int, stream: int) -> None:
        assert ("event", event) in self.living

    def _cuEventSynchronize(self, event: int) -> None:
        assert ("event", event) in self.living

    def _cuStreamWaitEvent(self, stream: int, event: int, flags: int) -> None:
        assert ("event", event) in self.living

    def _cuEventDestroy(self, event: int) -> None:
        self._gone("event", event)

    def _cuEventElapsedTime(self, start: int, end: int) -> float:
        return 2.5
