"""Who decides the back end and the threads: call, context, compile, environment, auto, in this order.

=======================  =========================================================================
variable                 meaning
=======================  =========================================================================
``FASTDL_BACKEND``       back end of everything that does not name one
``FASTDL_NUM_THREADS``   threads of everything that does not name a number
``OMP_NUM_THREADS``      most threads that "auto" takes, as of the process's CPUs and its control group's quota
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
import operator
import os
from collections.abc import Iterator
from dataclasses import dataclass

from fastdl.kernels.common import fork
from fastdl.kernels.registry import ALL_BACKENDS

NAMES = ("auto", *ALL_BACKENDS)


@dataclass(frozen=True)
class Choice:
    backend: str | None = None
    threads: int | None = None


_NOTHING = Choice()
_context: contextvars.ContextVar[Choice] = contextvars.ContextVar("fastdl.backend", default=_NOTHING)

#: More than any machine has. A larger number asks for no more: C counts threads in 32 bits, and the kernels up to 64.
MOST_THREADS = 1024

#: Workers are forked by the dozen: their number is how the CPUs are shared.
IN_CHILD = "a forked child takes one thread unless more are asked for"

#: As os.environ keeps them. `os.environ.get` of a variable that is not set raises twice inside and takes 0.57 us of a
#: tiny net's step of 5.4; a look into its dictionary takes 0.02.
_KEYS = {name: os.environ.encodekey(name) for name in ("FASTDL_BACKEND", "FASTDL_NUM_THREADS", "OMP_NUM_THREADS")}


def _variable(name: str) -> str | None:
    environ = os.environ
    try:
        return environ[name] if _KEYS[name] in environ._data else None
    except AttributeError:  # a test has put a plain dictionary in its place
        return environ.get(name)


def check_backend(name: object, where: str = "backend") -> str:
    if not isinstance(name, str) or name not in NAMES:
        raise ValueError(f"{where}: unknown back end {name!r}, known: {', '.join(NAMES)}")
    return str(name)


def is_auto(threads: object) -> bool:
    return isinstance(threads, str) and threads == "auto"


def check_threads(threads: object, where: str = "threads") -> int:
    """A number of threads, at most `MOST_THREADS`."""
    if type(threads) is int and 0 < threads <= MOST_THREADS:
        return threads  # every step of a net asks
    try:
        number = 0 if isinstance(threads, bool) else operator.index(threads)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"{where}: expected 'auto' or an integer of at least 1, found {threads!r}")
    return min(number, MOST_THREADS)


def _count(text: str) -> int:
    """A whole number in an environment variable, 0 for anything else."""
    digits = text.strip()
    if not (digits.isascii() and digits.isdecimal()):
        return 0
    digits = digits.lstrip("0") or "0"
    return int(digits) if len(digits) < 10 else MOST_THREADS  # Python refuses numbers of more than 4,300 digits


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
    chosen = _context.get().backend
    if chosen is not None:
        return chosen
    if compiled not in (None, "auto"):  # as `home_backend` has it: every step of a net asks
        return compiled
    return home_backend()


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
    for value in (call, _context.get().threads, compiled):
        if value is not None and not is_auto(value):
            return check_threads(value)
    text = _variable("FASTDL_NUM_THREADS")
    if text:
        number = _count(text)
        if not number:
            raise ValueError(f"FASTDL_NUM_THREADS: expected an integer of at least 1, found {text[:40]!r}")
        return min(number, MOST_THREADS)
    return 1 if fork.is_child else None


def available_threads() -> tuple[int, str]:
    """Threads that "auto" may take, and what limits them."""
    if fork.is_child:
        return 1, IN_CHILD
    cpus, why = os.cpu_count() or 1, "all CPUs"
    if hasattr(os, "sched_getaffinity"):
        allowed = len(os.sched_getaffinity(0))
        if allowed < cpus:
            cpus, why = allowed, "the process's CPU affinity"
    quota = _cgroup_quota()
    if quota is not None and quota < cpus:
        cpus, why = max(1, int(quota)), "the control group's CPU quota"
    # The first number of a list is that of the outermost region; what OpenMP does not understand it passes over.
    limit = _count((_variable("OMP_NUM_THREADS") or "").partition(",")[0])
    if 0 < limit < cpus:
        cpus, why = limit, "OMP_NUM_THREADS"
    return cpus, why


@functools.lru_cache(maxsize=1)
def _cgroup_quota() -> float | None:
    """CPUs that this process's control group and those around it leave, or None; read once, it costs some 100 us.

    A container may show the path of its group as the host sees it: what is not there is passed over, and the root of
    what is mounted is looked at in any case.
    """
    quotas = []
    for mount, group in _cgroups():
        parts = [part for part in group.split("/") if part not in ("", ".", "..")]
        for depth in range(len(parts), -1, -1):
            quota = _quota("/".join([mount, *parts[:depth]]))
            if quota is not None:
                quotas.append(quota)
    return min(quotas, default=None)


def _cgroups() -> list[tuple[str, str]]:
    """Mount points with the paths of this process's groups below them, version 2 and version 1."""
    root = "/sys/fs/cgroup"
    places = {root: "", f"{root}/cpu": ""}
    with contextlib.suppress(OSError, ValueError), open("/proc/self/cgroup") as file:
        for line in file.read().splitlines():
            _, controllers, group = line.split(":", 2)
            if not controllers:
                places |= {root: group, f"{root}/unified": group}
            elif "cpu" in controllers.split(","):
                places |= {f"{root}/cpu": group, f"{root}/{controllers}": group}
    return list(places.items())


def _quota(folder: str) -> float | None:
    """CPUs that one group may use, or None."""
    with contextlib.suppress(OSError, ValueError):
        with open(f"{folder}/cpu.max") as file:
            quota, period = file.read().split()
        return None if quota == "max" else int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):
        with open(f"{folder}/cpu.cfs_quota_us") as file:
            quota_us = int(file.read())
        with open(f"{folder}/cpu.cfs_period_us") as file:
            return None if quota_us <= 0 else quota_us / int(file.read())
    return None


#: Floating-point operations of a step below which a second thread does not pay: a region and its barriers cost about
#: 2 us, which is 0.2 Mflop at 100 Gflop/s; the factor leaves room for calls too small to split.
FLOPS_PER_THREAD = 4e6


def threads_for(
    flops: float, call: int | str | None = None, compiled: int | str | None = None, backend: str = ""
) -> tuple[int, str]:
    """Threads for a Program of so many operations per step, and the reason."""
    if backend == "numba" and fork.is_child:
        return 1, "Numba's threads do not survive a fork"
    asked = resolve_threads(call, compiled)
    if asked is not None:
        return asked, IN_CHILD if fork.is_child and asked == 1 else "asked for"
    cpus, why = available_threads()
    wanted = max(1, int(flops / FLOPS_PER_THREAD))
    if wanted < cpus:
        return wanted, f"a step of {flops / 1e6:.1f} Mflop is too small for more"
    return cpus, why
