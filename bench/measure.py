"""How it is measured: paired ratios, the machine's roofline beside them, pinned threads.

The tracked number is the median of paired ratios: ours and the NumPy reference, call by call in one process, in
alternating order. On a shared machine it moves by half a percent from run to run where a mean moves by half (15 runs of
60 pairs). A ratio above 1 means that ours is faster.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import threadpoolctl

import fastdl as fd
from bench.cases import Case, identity
from bench.prepare import DTYPE, Prepared, prepare
from fastdl.kernels import dispatch

#: A sample lasts at least so long, so that the clock's 0.5 us do not count: short calls are repeated within one.
SAMPLE = 50e-6
#: Copies of a working set last so long in all.
COPYING = 5e-3


# ---------------------------------------------------------------------------------------------- paired ratios
@dataclass(frozen=True)
class Paired:
    """Seconds of one call on either side, medians, and the median of baseline / ours."""

    ratio: float
    seconds: float
    baseline: float
    rounds: int


def summarise(ours: Sequence[float], baseline: Sequence[float]) -> Paired:
    """From paired samples."""
    ratio = statistics.median(b / a for a, b in zip(ours, baseline, strict=True))
    return Paired(ratio, statistics.median(ours), statistics.median(baseline), len(ours))


def _clock(threads: int) -> Callable[[], float]:
    """The process's CPU time for one thread, wall time for more.

    What other processes take of the core does not count then, what a side hands to threads of its own does. On a shared
    core, wall time would bend ratios: calls of milliseconds are interrupted, calls of microseconds are not.
    """
    return time.process_time if threads == 1 and sys.platform == "linux" else time.perf_counter


def _sample(call: Callable[[], Any], repeat: int, clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    for _ in range(repeat):
        call()
    return (clock() - start) / repeat


def paired(
    ours: Callable[[], Any], baseline: Callable[[], Any], seconds: float = 0.3, least: int = 5, threads: int = 1
) -> Paired:
    """Interleave two functions for some seconds, at least ``least`` rounds."""
    clock = _clock(threads)
    quickest = min(_sample(call, 1) for call in (ours, baseline, ours, baseline))
    repeat = max(1, int(SAMPLE / max(quickest, 1e-9)))
    samples: tuple[list[float], list[float]] = ([], [])
    collecting = gc.isenabled()
    gc.disable()
    try:
        stop = time.perf_counter() + seconds
        while len(samples[0]) < least or time.perf_counter() < stop:
            sides = [(ours, samples[0]), (baseline, samples[1])]
            for call, found in sides if len(samples[0]) % 2 else reversed(sides):
                found.append(_sample(call, repeat, clock))
    finally:
        if collecting:
            gc.enable()
    return summarise(*samples)


# ---------------------------------------------------------------------------------------------- roofline
def bandwidth(footprint: float) -> float:
    """Bytes per second, read and written, of copies on one thread whose arrays take some bytes in all.

    At least 256 KB: a smaller copy takes as long as its call.
    """
    return _bandwidth(max(18, round(np.log2(max(footprint, 1)))))


@functools.cache
def _bandwidth(exponent: int) -> float:
    source, target = np.ones(2 ** (exponent - 1), np.uint8), np.zeros(2 ** (exponent - 1), np.uint8)
    np.copyto(target, source)  # the pages come into being
    samples: list[float] = []
    stop = time.perf_counter() + COPYING
    while len(samples) < 3 or time.perf_counter() < stop:
        samples.append(_sample(lambda: np.copyto(target, source), 1))
    return 2.0 * source.nbytes / min(samples)


def peak(itemsize: int = DTYPE.itemsize) -> float | None:
    """Multiply-add peak of one core in flop/s at this moment and SIMD level; None without compiled kernels."""
    if dispatch.load("cython") != "available":
        return None
    from fastdl.kernels.common import _cython, simd

    return _cython.fma_peak(simd.NAMES.index(simd.level()), itemsize)


def roof(prepared: Prepared, threads: int) -> tuple[float, str]:
    """Least seconds of a step on this machine, and what sets them: its bytes at copy bandwidth or its flops at peak.

    The arrays' footprint decides whose bandwidth counts, a cache's or the memory's. Bandwidth is taken as that of one
    thread, the peak as that of ``threads`` cores. A copy reads as much as it writes: an op that writes less can come
    above this roof, since a cache takes more reads than writes in the same time.
    """
    moving = prepared.bytes / bandwidth(prepared.footprint)
    flops = peak()
    computing = 0.0 if flops is None else prepared.flops / (flops * threads)
    return (computing, "compute") if computing > moving else (moving, "memory")


# ---------------------------------------------------------------------------------------------- conditions
@contextlib.contextmanager
def pinned(threads: int = 1) -> Iterator[None]:
    """This process on so many cores, BLAS on so many threads; both are put back afterwards.

    The BLAS threads are limited at run time, so that nothing depends on who imported NumPy first.
    """
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    if cores is not None:
        os.sched_setaffinity(0, sorted(cores)[-threads:])  # the last ones: interrupts prefer the first
    try:
        with threadpoolctl.threadpool_limits(threads, user_api="blas"):
            yield
    finally:
        if cores is not None:
            os.sched_setaffinity(0, cores)


@functools.cache
def cpu() -> str:
    """The CPU's model name."""
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@functools.cache
def machine() -> dict[str, Any]:
    """CPU, SIMD level and versions: what a number means nothing without."""
    from importlib.metadata import PackageNotFoundError, version

    def found(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "none"

    level = "none"
    if dispatch.load("cython") == "available":
        from fastdl.kernels.common import simd

        level = simd.level()
    return {
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "level": level,
        "fastdl": fd.__version__,
        "numpy": np.__version__,
        "numba": found("numba"),
        "python": platform.python_version(),
    }


# ---------------------------------------------------------------------------------------------- a case
def measure(prepared: Prepared, seconds: float = 0.3, least: int = 5, threads: int = 1) -> dict[str, Any]:
    """Everything about a prepared case, per step."""
    pair = paired(prepared.ours, prepared.baseline, seconds, least, threads)
    bound, what = roof(prepared, threads)
    step = pair.seconds / prepared.steps
    return {
        "ratio": round(pair.ratio, 4),
        "roofline": round(bound / step, 4),
        "bound": what,
        "seconds": step,
        "numpy_seconds": pair.baseline / prepared.steps,
        "rounds": pair.rounds,
        "shape": prepared.shape,
        "dtype": DTYPE.name,
        "threads": threads,
    }


def run(case: Case, seconds: float = 0.3, least: int = 5, threads: int = 1) -> dict[str, Any]:
    """Check, prepare and measure a case."""
    return {"case": identity(case), **measure(prepare(case, threads), seconds, least, threads)}
