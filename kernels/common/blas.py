"""NumPy's matrix product for back ends that call it: its threads, and a product shared among Python threads.

A BLAS pool of more than one thread spins, and so does Numba's; two spinning pools on the same cores take the cores from
each other (a tabular step took 48 ms instead of 0.3). One pool at a time: the NumPy back end holds BLAS to the
Program's threads, the Numba back end holds it to one and splits large products itself.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastdl.kernels.common import fork

#: Operations of a product from which it is split: handing a part to a sleeping thread costs 30 to 50 us, which is 8
#: Mflop at 200 Gflop/s.
SPLIT_FLOPS = 3e7

_pool: ThreadPoolExecutor | None = None


@dataclass(eq=False)
class _Limit:
    """A `limit_blas` block that is running.

    An interrupt may arrive inside the block's own end. The limit then ends with the object, which nobody else keeps.
    """

    threads: int
    holder: int  # the Python thread
    ended: bool = False

    def end(self) -> None:
        with _lock:
            if not self.ended:
                _limits.discard(self)
                _apply()
                _changed.notify_all()
                self.ended = True

    __del__ = end


#: Python's own lock in a ``with``: an interrupt cannot leave it held, as it could a Condition.
_lock = threading.RLock()
_changed = threading.Condition(_lock)
_limits: weakref.WeakSet[_Limit] = weakref.WeakSet()
_as_found: list[tuple[Any, int]] = []  # each BLAS with its own number of threads, while there are limits
_forks = 0  # that wait


class _Quiet:
    """Lets a fork wait until no other thread is in a block, and new blocks until the fork is over.

    OpenBLAS ends its threads before a fork: a product that is under way on two of them never returns, in the parent. A
    block is a slice of a training, 0.1 s at most.
    """

    def acquire(self) -> None:
        global _forks
        _changed.acquire()
        _forks += 1
        try:
            _changed.wait_for(lambda: not any(limit.holder != threading.get_ident() for limit in _limits))
        except BaseException:  # an interrupt
            self.release()
            raise

    def release(self) -> None:
        global _forks
        _forks = 0 if fork.is_child else _forks - 1
        _changed.notify_all()
        _changed.release()


fork.hold(_Quiet())


@functools.cache
def _libraries(per_thread: bool | None = None) -> list[Any]:
    """BLAS libraries; those that have a number of threads for the process or, with OpenMP, for each Python thread."""
    from threadpoolctl import ThreadpoolController

    controllers = ThreadpoolController().lib_controllers  # kept: looking for them costs 230 us
    known = [library for library in controllers if library.user_api == "blas" and library.get_num_threads()]
    return [x for x in known if per_thread in (None, getattr(x, "threading_layer", None) == "openmp")]


def _set(library: Any, threads: int) -> None:
    """Newer versions of threadpoolctl obey the first Python thread that asks, and no other; here all are counted."""
    if library.get_num_threads() != threads:
        getattr(library, "_real_set_num_threads", library.set_num_threads)(threads)


def _apply() -> None:
    """The smallest limit holds: BLAS has one number for the whole process."""
    least = min((limit.threads for limit in _limits), default=None)
    for library, own in _as_found:
        _set(library, own if least is None else least)


@contextlib.contextmanager
def limit_blas(threads: int) -> Iterator[None]:
    """Hold BLAS to so many threads; its own number is left as found when the last block of any Python thread ends.

    A BLAS pool that is larger than the work needs costs more than it gives: on two busy cores a product of 64 rows took
    9 ms instead of 20 us.
    """
    here = threading.get_ident()
    limit = _Limit(threads, here)
    own = [(library, library.get_num_threads()) for library in _libraries(per_thread=True)]
    try:
        with _lock:
            outer = [other.threads for other in _limits if other.holder == here]
            while _forks and not outer:
                _changed.wait()
            for library, _ in own:
                _set(library, min([threads, *outer]))
            if not _limits:
                _as_found[:] = [(library, library.get_num_threads()) for library in _libraries(per_thread=False)]
            _limits.add(limit)
            _apply()
        yield
    finally:
        limit.end()
        for library, number in own:
            _set(library, number)


def _threads(count: int) -> ThreadPoolExecutor:
    global _pool
    if _pool is None or _pool._max_workers < count:
        _pool = ThreadPoolExecutor(count, "fastdl-product")
    return _pool


def _forget() -> None:
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)  # the threads stay with the parent


def matmul(a: np.ndarray, b: np.ndarray, out: np.ndarray, threads: int) -> None:
    """out (M, N) = a (M, K) b (K, N); large products in parts of rows or columns, one part a thread."""
    rows, cols = out.shape
    if threads < 2 or 2.0 * rows * cols * a.shape[1] < SPLIT_FLOPS:
        np.matmul(a, b, out=out)
        return
    cuts = [max(rows, cols) * t // threads for t in range(threads + 1)]
    parts = [slice(first, last) for first, last in itertools.pairwise(cuts)]

    def one(part: slice) -> None:
        if rows >= cols:
            np.matmul(a[part], b, out=out[part])
        else:
            np.matmul(a, b[:, part], out=out[:, part])

    with limit_blas(1):
        others = [_threads(threads - 1).submit(one, part) for part in parts[1:]]
        one(parts[0])
        for other in others:
            other.result()
