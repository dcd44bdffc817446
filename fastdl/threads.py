"""Threads of the host's BLAS, for the back ends that call it (the compiled one never does)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

_controller = None


@contextlib.contextmanager
def limit_blas(threads: int) -> Iterator[None]:
    """Hold BLAS to the Program's threads; its own number is left as found afterwards.

    A BLAS pool that is larger than the work needs costs more than it gives: on two busy cores a product of 64 rows took
    9 ms instead of 20 us.
    """
    global _controller
    if _controller is None:
        from threadpoolctl import ThreadpoolController

        _controller = ThreadpoolController()  # kept: making one costs 230 us, using it 9
    with _controller.limit(limits=threads, user_api="blas"):
        yield
