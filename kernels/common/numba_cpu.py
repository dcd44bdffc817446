"""One policy for every Numba CPU kernel: flags, disk cache, threads.

Fast-math leaves out ``nnan`` and ``ninf``: NaN must stay NaN and infinities follow IEEE. The disk cache is keyed by a
hash of all kernel sources, because Numba invalidates a cached kernel only when its *own* file changes, and an edited
``points.py`` would otherwise keep the old kernel running.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import numba
from numba.core import config

FASTMATH = {"contract", "nsz", "arcp"}
_ROOT = pathlib.Path(__file__).resolve().parent.parent


def source_hash() -> str:
    """Hash of every Python source under kernels/, the part of the cache path that makes stale kernels impossible."""
    digest = hashlib.sha256()
    for path in sorted(_ROOT.rglob("*.py")):
        digest.update(path.relative_to(_ROOT).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def cache_dir() -> str:
    """``NUMBA_CACHE_DIR`` or the user's cache folder, with the source hash below it; a temporary one if read-only."""
    base = os.environ.get("NUMBA_CACHE_DIR") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache"), "fastdl"
    )
    path = os.path.join(base, f"kernels-{source_hash()}")
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError:
        return os.path.join(tempfile.gettempdir(), f"fastdl-{os.getuid() if hasattr(os, 'getuid') else 0}", path[-16:])


_CACHE = cache_dir()


def _jit(function: Callable[..., Any], **options: Any) -> Any:
    before = config.CACHE_DIR
    config.CACHE_DIR = _CACHE  # read while decorating: the caller's own kernels keep their place
    try:
        return numba.njit(cache=True, error_model="numpy", fastmath=FASTMATH, nogil=True, **options)(function)
    finally:
        config.CACHE_DIR = before


def point(function: Callable[..., Any]) -> Any:
    """A scalar point function, inlined by LLVM into the loops that call it."""
    return numba.njit(error_model="numpy", fastmath=FASTMATH, inline="never")(function)


def parallel_kernel(function: Callable[..., Any]) -> Any:
    """A fused loop over ``prange``."""
    return _jit(function, parallel=True)


def serial_kernel(function: Callable[..., Any]) -> Any:
    """A loop for one thread."""
    return _jit(function)


def set_threads(threads: int) -> None:
    """Threads of the next parallel kernel, within what Numba was started with."""
    _start()
    numba.set_num_threads(max(1, min(threads, config.NUMBA_NUM_THREADS)))


@functools.cache
def _start() -> None:
    """Start Numba's threads, once, asleep between kernels.

    libgomp lets idle threads spin for milliseconds by default, on the cores that the next dense product needs
    (blas.py): a step of wide took 112 ms on two threads instead of 70. It reads the setting when it is loaded, which is
    now unless something else has loaded it; a user's own choice stands.
    """
    if {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ):
        return
    os.environ["GOMP_SPINCOUNT"] = "0"
    try:
        numba.set_num_threads(numba.get_num_threads())
    finally:
        del os.environ["GOMP_SPINCOUNT"]
