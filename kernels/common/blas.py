"""NumPy's matrix product for back ends that call it: its threads, and a product shared among Python threads.

A BLAS pool of more than one thread spins, and so does Numba's; two spinning pools on the same cores take the cores from
each other (a tabular step took 48 ms instead of 0.3). One pool at a time: the NumPy back end holds BLAS to the
Program's threads, the Numba back end holds it to one and splits large products itself.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

#: Operations of a product from which it is split: handing a part to a sleeping thread costs 30 to 50 us, which is 8
#: Mflop at 200 Gflop/s.
SPLIT_FLOPS = 3e7

_controller: Any = None
_held: int | None = None  # the limit of the `with` block that is running
_pool: ThreadPoolExecutor | None = None


@contextlib.contextmanager
def limit_blas(threads: int) -> Iterator[None]:
    """Hold BLAS to so many threads; its own number is left as found afterwards.

    A BLAS pool that is larger than the work needs costs more than it gives: on two busy cores a product of 64 rows took
    9 ms instead of 20 us.
    """
    global _controller, _held
    if _held == threads:
        yield
        return
    if _controller is None:
        from threadpoolctl import ThreadpoolController

        _controller = ThreadpoolController()  # kept: making one costs 230 us, using it 9
    outer, _held = _held, threads
    try:
        with _controller.limit(limits=threads, user_api="blas"):
            yield
    finally:
        _held = outer


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
