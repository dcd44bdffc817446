"""Threads of the host's BLAS, for the back ends that call it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

_controller = None


@contextlib.contextmanager
def limit_blas(backend: str, threads: int | None) -> Iterator[None]:
    """Hold BLAS to a number of threads that was asked for; it is left as found afterwards.

    The compiled back end never calls BLAS.
    """
    global _controller
    if threads is None or backend == "cython":
        yield
        return
    if _controller is None:
        from threadpoolctl import ThreadpoolController

        _controller = ThreadpoolController()  # kept: making one costs 230 us, using it 9
    with _controller.limit(limits=threads, user_api="blas"):
        yield
