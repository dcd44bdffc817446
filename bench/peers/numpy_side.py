"""fastdl's NumPy back end: what a good NumPy user writes, on OpenBLAS."""

from __future__ import annotations

from typing import Any

from bench.peers import fastdl_side
from bench.peers.worker import Work


def step(threads: int, variant: str, **what: Any) -> Work:
    return fastdl_side.step(threads=threads, variant="numpy", **what)


def op(threads: int, variant: str, **what: Any) -> Work:
    return fastdl_side.op(threads=threads, variant="numpy", **what)
