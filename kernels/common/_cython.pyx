"""What this CPU can run, and how fast at best."""

from libc.stdint cimport int64_t

import time

cdef extern from "cpu.h":
    int fd_best_level()

cdef extern from "peak.h" nogil:
    ctypedef struct fd_peak_table:
        double (**run)(int64_t rounds) noexcept nogil
    const fd_peak_table* fd_peak_at(int level)


def best_level() -> int:
    """Highest SIMD level of level.h that the CPU supports."""
    return fd_best_level()


def fma_peak(int level, int itemsize=4, int64_t rounds=30000) -> float:
    """Multiply-add peak of the running core in flop/s, best of three looks of some 100 us each.

    Parameters
    ----------
    level : int
        SIMD level of level.h; must not exceed `best_level`.
    itemsize : {4, 8}
        float32 or float64.
    """
    if not 0 <= level <= fd_best_level() or itemsize not in (4, 8):
        raise ValueError(f"expected a level of at most {fd_best_level()} and itemsize 4 or 8, found {level}, {itemsize}")
    cdef double best = 0.0, start, done
    for _ in range(3):
        start = time.perf_counter()
        with nogil:
            done = fd_peak_at(level).run[itemsize == 8](rounds)
        best = max(best, done / (time.perf_counter() - start))
    return best
