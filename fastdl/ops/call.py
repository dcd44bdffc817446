"""What the ops share: dispatch of a checked call, and the context between a forward and its backward call."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastdl import checks, config
from fastdl.kernels import dispatch

#: Bytes moved below which one thread is used: a parallel region costs about 1 us, which is 30 kB at memory speed.
BYTES_PER_THREAD = 1 << 20


class Context:
    """What a forward call keeps for its backward call."""

    __slots__ = ("arrays", "backend", "op", "params", "runtime", "shape", "threads")

    def __init__(
        self,
        op: str,
        arrays: dict[str, Any],
        params: dict[str, Any],
        runtime: dict[str, Any],
        shape: tuple[int, ...],
        backend: str | None,
        threads: int | None,
    ) -> None:
        self.op, self.arrays, self.params, self.runtime, self.shape = op, arrays, params, runtime, shape
        self.backend, self.threads = backend, threads

    def expect(self, op: str) -> Context:
        if self.op != op:
            raise ValueError(f"{op}_backward: expected the context of {op}_forward, found that of {self.op}_forward")
        return self

    def __repr__(self) -> str:
        saved = ", ".join(f"{k} {v.shape}" for k, v in self.arrays.items() if v is not None)
        return f"Context({self.op}: {saved})"


def context(ctx: Any, op: str) -> Context:
    if not isinstance(ctx, Context):
        raise TypeError(f"{op}_backward: expected the context that {op}_forward returned, found {type(ctx).__name__}")
    return ctx.expect(op)


def run(
    op: str, arrays: tuple[Any, ...], arguments: dict[str, Any], backend: str | None, threads: int | None, size: int
) -> None:
    """Dispatch a checked call; ``size`` is the bytes it moves."""
    if type(arrays[0]) is not np.ndarray and not checks.on_host(arrays[0]):
        if backend not in (None, "auto", "cuda"):
            raise ValueError(f"backend: expected 'cuda' for arrays in GPU memory, found {backend!r}; leave it out")
        backend = "cuda"
    call = dispatch.bound(op, config.resolve_backend(backend), arrays, arguments)
    number = config.resolve_threads(threads)
    if number is None:
        number = 1 if size < BYTES_PER_THREAD else config.available_threads()[0]
    call(arrays, arguments, number)
