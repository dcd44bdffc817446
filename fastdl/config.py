"""Who decides the back end and the threads: call, context, compile, environment, auto, in this order.

=======================  =========================================================================
variable                 meaning
=======================  =========================================================================
``FASTDL_BACKEND``       back end of everything that does not name one
``FASTDL_NUM_THREADS``   threads of everything that does not name a number
``FASTDL_SIMD``          SIMD level of the compiled kernels: portable, avx2 or avx512
``FASTDL_CUBLASLT``      0: CUDA's dense products by our own kernels alone
``FASTDL_TF32``          1: cuBLASLt may round operands of float32 products to 11 bits
``FASTDL_BFLOAT16``      what multiplies bfloat16 at the avx512 level: amx or avx512_bf16
=======================  =========================================================================
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass

from fastdl.kernels.registry import ALL_BACKENDS

NAMES = ("auto", *ALL_BACKENDS)


@dataclass(frozen=True)
class Choice:
    backend: str | None = None
    threads: int | None = None


_NOTHING = Choice()
_context: contextvars.ContextVar[Choice] = contextvars.ContextVar("fastdl.backend", default=_NOTHING)
_in_child_of_fork = False


def _after_fork() -> None:
    global _in_child_of_fork
    _in_child_of_fork = True


if hasattr(os, "register_at_fork"):
    # Numba's threads hang in a child that was forked after a parallel region: the child computes on one thread.
    os.register_at_fork(after_in_child=_after_fork)


#: As os.environ keeps them. `os.environ.get` of a variable that is not set raises twice inside and takes 0.57 us of a
#: tiny net's step of 5.4; a look into its dictionary takes 0.02.
_KEYS = {name: os.environ.encodekey(name) for name in ("FASTDL_BACKEND", "FASTDL_NUM_THREADS")}


def _variable(name: str) -> str | None:
    return os.environ[name] if _KEYS[name] in os.environ._data else None


def check_backend(name: object, where: str = "backend") -> str:
    if name not in NAMES:
        raise ValueError(f"{where}: unknown back end {name!r}, known: {', '.join(NAMES)}")
    return str(name)


def check_threads(threads: object, where: str = "threads") -> int:
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise ValueError(f"{where}: expected 'auto' or an integer of at least 1, found {threads!r}")
    return threads


@contextlib.contextmanager
def backend(name: str, threads: int | None = None) -> Iterator[None]:
    """Use a back end inside a ``with`` block (this thread or task alone).

    Parameters
    ----------
    name : {"auto", "numpy", "cython", "numba", "cuda"}
    threads : int, optional

    Raises
    ------
    ValueError
        For an unknown name; the known ones are listed.
    """
    outer = _context.get()
    chosen = Choice(check_backend(name), outer.threads if threads is None else check_threads(threads))
    token = _context.set(chosen)
    try:
        yield
    finally:
        _context.reset(token)


def resolve_backend(call: str | None = None, compiled: str | None = None) -> str:
    """The back end's name (or "auto") by order of precedence."""
    if call is not None:
        return check_backend(call)
    return _context.get().backend or home_backend(compiled)


def context_backend() -> str | None:
    """The back end that the innermost ``with fd.backend(...)`` names."""
    return _context.get().backend


def home_backend(compiled: str | None = None) -> str:
    """The back end's name (or "auto") outside of any context."""
    if compiled not in (None, "auto"):
        return compiled
    return check_backend(_variable("FASTDL_BACKEND") or "auto", "FASTDL_BACKEND")


def resolve_threads(call: int | str | None = None, compiled: int | str | None = None) -> int | None:
    """The number of threads that was asked for, or None for the library's own choice."""
    if _in_child_of_fork:
        return 1
    for value in (call, _context.get().threads, compiled):
        if value is not None and value != "auto":
            return check_threads(value)
    text = _variable("FASTDL_NUM_THREADS")
    if text:
        if not text.isdigit():
            raise ValueError(f"FASTDL_NUM_THREADS: expected an integer of at least 1, found {text!r}")
        return check_threads(int(text), "FASTDL_NUM_THREADS")
    return None


def available_threads() -> tuple[int, str]:
    """CPUs this process may use, and what limits them."""
    if _in_child_of_fork:
        return 1, "one thread in a forked child"
    cpus, why = os.cpu_count() or 1, "all CPUs"
    if hasattr(os, "sched_getaffinity"):
        allowed = len(os.sched_getaffinity(0))
        if allowed < cpus:
            cpus, why = allowed, "the process's CPU affinity"
    quota = _cgroup_quota()
    if quota is not None and quota < cpus:
        cpus, why = max(1, int(quota)), "the control group's CPU quota"
    return cpus, why


@functools.lru_cache(maxsize=1)
def _cgroup_quota() -> float | None:
    """CPUs that the control group may use (version 2, then 1), or None; read once, it costs 30 us."""
    with contextlib.suppress(OSError, ValueError):
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()
        return None if quota == "max" else int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):
        with open("/sys/fs/cgroup/cpu/cpu.cfs_quota_us") as file:
            quota_us = int(file.read())
        with open("/sys/fs/cgroup/cpu/cpu.cfs_period_us") as file:
            return None if quota_us <= 0 else quota_us / int(file.read())
    return None


#: Floating-point operations of a step below which a second thread does not pay: a region and its barriers cost about
#: 2 us, which is 0.2 Mflop at 100 Gflop/s; the factor leaves room for calls too small to split.
FLOPS_PER_THREAD = 4e6


def threads_for(flops: float, call: int | str | None = None, compiled: int | str | None = None) -> tuple[int, str]:
    """Threads for a Program of so many operations per step, and the reason."""
    asked = resolve_threads(call, compiled)
    if asked is not None:
        return asked, "asked for"
    cpus, why = available_threads()
    wanted = max(1, int(flops / FLOPS_PER_THREAD))
    if wanted < cpus:
        return wanted, f"a step of {flops / 1e6:.1f} Mflop is too small for more"
    return cpus, why
