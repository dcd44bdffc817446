"""One policy for every Numba CPU kernel: flags, disk cache, threads.

Fast-math leaves out ``nnan`` and ``ninf``: NaN must stay NaN and infinities follow IEEE. The disk cache is keyed by a
hash of all kernel sources, because Numba invalidates a cached kernel only when its *own* file changes, and an edited
``points.py`` would otherwise keep the old kernel running.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import pathlib
import threading
from collections.abc import Callable
from typing import Any

import numba
from numba.core import config
from numba.core.compiler_lock import global_compiler_lock

from fastdl.kernels.common import cache, fork

FASTMATH = {"contract", "nsz", "arcp"}
_ROOT = pathlib.Path(__file__).resolve().parent.parent

fork.hold(global_compiler_lock)  # LLVM in the middle of its work would be of no use to the child


def source_hash() -> str:
    """Hash of every Python source under kernels/, the part of the cache path that makes stale kernels impossible."""
    digest = hashlib.sha256()
    for path in sorted(_ROOT.rglob("*.py")):
        digest.update(path.relative_to(_ROOT).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


#: Where compiled code is kept, or None; and why folders were passed over.
FOLDER, REFUSALS = cache.folder(source_hash())
_CACHE = os.path.join(FOLDER or "", "numba")


def _jit(function: Callable[..., Any], **options: Any) -> Any:
    before = config.CACHE_DIR
    # Read while decorating: the caller's own kernels keep their place. Numba's key of a kernel does not tell parallel
    # from serial code, hence a folder of its own for each.
    config.CACHE_DIR = os.path.join(_CACHE, "parallel" if options else "serial")
    try:
        options.update(error_model="numpy", fastmath=FASTMATH, nogil=True, cache=FOLDER is not None)
        return numba.njit(**options)(function)
    finally:
        config.CACHE_DIR = before


def point(function: Callable[..., Any]) -> Any:
    """A scalar point function, inlined by LLVM into the loops that call it."""
    return numba.njit(error_model="numpy", fastmath=FASTMATH, inline="never")(function)


def serial_kernel(function: Callable[..., Any]) -> Any:
    """A loop for one thread."""
    return _jit(function)


def parallel_kernel(function: Callable[..., Any]) -> Callable[..., None]:
    """A fused loop over ``prange``: called with the keyword ``threads``, on one thread as a plain loop.

    One thread never enters Numba's pool, and neither does a forked child, which libgomp would kill for it.
    """
    serial, parallel = _jit(function), _jit(function, parallel=True)

    @functools.wraps(function)
    def kernel(*args: Any, threads: int) -> None:
        threads = min(threads, config.NUMBA_NUM_THREADS)
        if threads == 1 or fork.is_child:
            serial(*args)
            return
        with _region():
            before = numba.get_num_threads()
            try:
                numba.set_num_threads(threads)
                parallel(*args)
            finally:
                numba.set_num_threads(before)

    return kernel


_start = threading.Lock()


@functools.cache
def _layer() -> str:
    """Start Numba's threads, asleep between kernels; the name of the library that runs them.

    libgomp lets idle threads spin for milliseconds by default, on the cores that the next dense product needs
    (blas.py): a step of wide took 112 ms on two threads instead of 70. It reads the setting when it is loaded, which is
    now unless something else has loaded it; a user's own choice stands.
    """
    chosen = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ)
    if not chosen:
        os.putenv("GOMP_SPINCOUNT", "0")  # for C alone: os.environ is the user's
    try:
        numba.get_num_threads()
    finally:
        if not chosen:
            os.unsetenv("GOMP_SPINCOUNT")
    return numba.threading_layer()


#: The workqueue layer ends the process when two Python threads are in a parallel region: one at a time.
_queue = threading.Lock()


def _region() -> contextlib.AbstractContextManager[Any]:
    """What to hold around a parallel region."""
    with _start:
        alone = _layer() == "workqueue"
    return _queue if alone else contextlib.nullcontext()
