"""The GPU that launches run on: memory, copies, launches and graphs of the CUDA driver, by cuda-bindings.

Anything with the methods of `Driver` can stand in its place (`use`): the tests put an interpreter of the same PTX
there. Addresses are numbers.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastdl.errors import BackendUnavailable
from fastdl.kernels.common.gpu import Kernel, Launch, Product, View

_TYPES = {
    "i4": ctypes.c_int32,
    "u4": ctypes.c_uint32,
    "f4": ctypes.c_float,
    "i8": ctypes.c_int64,
    "f8": ctypes.c_double,
}
#: Bytes of scratch memory for products of cuBLASLt: what its algorithms for Hopper ask for.
WORKSPACE = 32 << 20
_current: Any = None


def use(device: Any) -> Any:
    """Run on this device from now on; returns the one before."""
    global _current
    before, _current = _current, device
    return before


def current() -> Any:
    """The device in use: the first GPU, unless `use` named another."""
    global _current
    if _current is None:
        if why := missing():
            raise BackendUnavailable(f"back end 'cuda' is not available: {why}")
        _current = Driver()
    return _current


def missing() -> str | None:
    """What is missing for a GPU, or None."""
    if _current is not None:
        return None
    from fastdl.kernels.common import cubins, numba_cuda

    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        return "the package cuda-bindings is not installed; run `pip install 'fastdl-kernels[cuda]'`"
    if numba_cuda.MISSING and not cubins.PACKED.exists():
        return f"{numba_cuda.MISSING}; run `pip install 'fastdl-kernels[cuda]'`"
    return _no_gpu()


@functools.cache
def _no_gpu() -> str | None:
    from cuda.bindings import driver

    try:
        status, *_ = driver.cuInit(0)
        if status != driver.CUresult.CUDA_SUCCESS:
            return f"the NVIDIA driver does not start ({status.name})"
        status, count = driver.cuDeviceGetCount()
    except RuntimeError:  # cuda-bindings cannot load libcuda
        return "no NVIDIA driver (libcuda) was found on this machine"
    return None if count else "the NVIDIA driver sees no GPU"


def _checked(found: tuple[Any, ...]) -> Any:
    from cuda.bindings import driver

    status, *values = found
    if status != driver.CUresult.CUDA_SUCCESS:
        _, text = driver.cuGetErrorString(status)
        raise RuntimeError(f"CUDA: {status.name}, {text.decode() if text else 'unknown'}")
    return (values[0] if len(values) == 1 else values) if values else None


class Graph:
    """Launches captured once; `replay` runs them without Python in between."""

    def __init__(self, device: Driver, launches: Sequence[Launch | Product]) -> None:
        from cuda.bindings import driver

        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        for launch in launches:  # loading and choosing are no part of a graph
            device.prepare(launch)
        _checked(driver.cuStreamBeginCapture(device.stream, mode))
        for launch in launches:
            device.enqueue(launch)
        graph = _checked(driver.cuStreamEndCapture(device.stream))
        self._device, self._driver, self._launches = device, driver, launches
        self._executable = _checked(driver.cuGraphInstantiate(graph, 0))
        _checked(driver.cuGraphDestroy(graph))
        weakref.finalize(self, driver.cuGraphExecDestroy, self._executable)

    def replay(self, times: int = 1) -> None:
        for _ in range(times):
            _checked(self._driver.cuGraphLaunch(self._executable, self._device.stream))


class Driver:
    """The first GPU, on a stream of its own."""

    ordinal = 0

    def __init__(self) -> None:
        from cuda.bindings import driver

        self._driver = driver
        _checked(driver.cuInit(0))
        self._device = _checked(driver.cuDeviceGet(0))
        self._context = _checked(driver.cuDevicePrimaryCtxRetain(self._device))
        self._enter()
        self.stream = _checked(driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING))
        attribute = driver.CUdevice_attribute
        self.cc = tuple(
            _checked(driver.cuDeviceGetAttribute(part, self._device))
            for part in (
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        self._functions: dict[tuple[str, str], Any] = {}

    def _enter(self) -> None:
        """Contexts belong to threads: whoever calls makes this one his."""
        _checked(self._driver.cuCtxSetCurrent(self._context))

    # ------------------------------------------------------------------ memory
    def allocate(self, size: int) -> int:
        """Address of zeros, a multiple of 256."""
        self._enter()
        address = int(_checked(self._driver.cuMemAlloc(max(1, size))))
        _checked(self._driver.cuMemsetD8Async(address, 0, max(1, size), self.stream))
        return address

    def free(self, address: int) -> None:
        self._enter()
        _checked(self._driver.cuMemFree(address))

    def write(self, address: int, array: np.ndarray) -> None:
        """Copy a contiguous array in, behind everything on the stream."""
        self._enter()
        _checked(self._driver.cuMemcpyHtoDAsync(address, array.ctypes.data, array.nbytes, self.stream))
        _checked(self._driver.cuStreamSynchronize(self.stream))

    def read(self, address: int, dtype: Any, count: int) -> np.ndarray:
        self._enter()
        found = np.empty(count, dtype)
        _checked(self._driver.cuMemcpyDtoHAsync(found.ctypes.data, address, found.nbytes, self.stream))
        _checked(self._driver.cuStreamSynchronize(self.stream))
        return found

    def free_bytes(self) -> int:
        """Device memory that nobody has taken."""
        self._enter()
        free, _ = _checked(self._driver.cuMemGetInfo())
        return int(free)

    # ------------------------------------------------------------------ copies beside the work
    def pinned(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Host memory that the copy engine reads by itself."""
        self._enter()
        size = max(1, int(np.prod(shape)) * np.dtype(dtype).itemsize)
        address = int(_checked(self._driver.cuMemHostAlloc(size, 0)))
        raw = (ctypes.c_uint8 * size).from_address(address)
        weakref.finalize(raw, self._driver.cuMemFreeHost, address)
        return np.frombuffer(raw, np.dtype(dtype), int(np.prod(shape))).reshape(shape)

    @functools.cached_property
    def _copies(self) -> Any:
        self._enter()
        return _checked(self._driver.cuStreamCreate(self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING))

    def copy_down(self, address: int, array: np.ndarray) -> None:
        """Copy pinned memory in, on a stream of its own; nobody waits."""
        self._enter()
        _checked(self._driver.cuMemcpyHtoDAsync(address, array.ctypes.data, array.nbytes, self._copies))

    def copied(self) -> None:
        """What is launched from now on waits for the copies so far."""
        self.order(before=int(self._copies), after=int(self.stream))

    def mark(self) -> Any:
        """A place on the stream that `wait` can wait for."""
        self._enter()
        event = _checked(self._driver.cuEventCreate(self._driver.CUevent_flags.CU_EVENT_DISABLE_TIMING))
        _checked(self._driver.cuEventRecord(event, self.stream))
        return event

    def wait(self, event: Any) -> None:
        """Until the GPU has come to a mark, which is used up."""
        self._enter()
        _checked(self._driver.cuEventSynchronize(event))
        _checked(self._driver.cuEventDestroy(event))

    # ------------------------------------------------------------------ launches
    def function(self, kernel: Kernel, dtype: str) -> Any:
        """The loaded kernel for this GPU."""
        from fastdl.kernels.common import cubins

        key = kernel.name, dtype
        if key not in self._functions:
            self._enter()
            module = _checked(self._driver.cuModuleLoadData(cubins.code(kernel, dtype, self.cc)))
            self._functions[key] = _checked(self._driver.cuModuleGetFunction(module, kernel.name.encode()))
        return self._functions[key]

    @functools.cached_property
    def library(self) -> Any:
        """cuBLASLt, where it is present: ``has(product)`` says what it can do."""
        from fastdl.kernels.dense import cublaslt

        tf32 = cublaslt.switch("FASTDL_TF32", False)
        if cublaslt.missing():
            return None
        self._enter()
        return cublaslt.Library(self.allocate(WORKSPACE), WORKSPACE, tf32=tf32)

    def prepare(self, launch: Launch | Product) -> None:
        """What costs time once: code is loaded, a library's algorithm chosen."""
        if isinstance(launch, Product):
            self.library.has(launch)
        else:
            self.function(launch.kernel, launch.dtype)

    def enqueue(self, launch: Launch | Product) -> None:
        if isinstance(launch, Product):
            self.library.enqueue(launch, int(self.stream))
            return
        function = self.function(launch.kernel, launch.dtype)
        values, kinds = [], []
        for (kind, _), argument in zip(launch.kernel.arguments, launch.arguments, strict=True):
            pointer = kind.endswith("*")
            values.append((argument.address if isinstance(argument, View) else 0) if pointer else argument)
            kinds.append(ctypes.c_void_p if pointer else _TYPES[kind])
        parameters = tuple(values), tuple(kinds)
        _checked(
            self._driver.cuLaunchKernel(function, *launch.grid, 1, *launch.block, 1, 0, self.stream, parameters, 0)
        )

    def run(self, launches: Sequence[Launch | Product]) -> None:
        self._enter()
        for launch in launches:
            self.enqueue(launch)

    def graph(self, launches: Sequence[Launch | Product]) -> Graph:
        self._enter()
        return Graph(self, launches)

    def seconds(self, replayed: Graph, times: int) -> float:
        """Seconds on the GPU for so many replays."""
        return self._timed(lambda: replayed.replay(times))

    def seconds_of_copy(self, target: int, source: int, size: int) -> float:
        """Seconds on the GPU for the driver's own copy of so many bytes within device memory."""
        return self._timed(lambda: _checked(self._driver.cuMemcpyDtoDAsync(target, source, size, self.stream)))

    def _timed(self, work: Callable[[], None]) -> float:
        """Seconds between two events around some work."""
        self._enter()
        events = [_checked(self._driver.cuEventCreate(0)) for _ in range(2)]
        _checked(self._driver.cuEventRecord(events[0], self.stream))
        work()
        _checked(self._driver.cuEventRecord(events[1], self.stream))
        _checked(self._driver.cuEventSynchronize(events[1]))
        milliseconds = _checked(self._driver.cuEventElapsedTime(*events))
        for event in events:
            _checked(self._driver.cuEventDestroy(event))
        return milliseconds / 1e3

    def order(self, before: int, after: int) -> None:
        """Let one stream wait for what lies on another by now; nobody waits here."""
        self._enter()
        event = _checked(self._driver.cuEventCreate(self._driver.CUevent_flags.CU_EVENT_DISABLE_TIMING))
        _checked(self._driver.cuEventRecord(event, before))
        _checked(self._driver.cuStreamWaitEvent(after, event, 0))
        _checked(self._driver.cuEventDestroy(event))

    def synchronize(self) -> None:
        self._enter()
        _checked(self._driver.cuStreamSynchronize(self.stream))
