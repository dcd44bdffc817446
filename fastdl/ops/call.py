"""What the ops share: dispatch of a checked call, and the context between a forward and its backward call."""

from __future__ import annotations

from typing import Any
from weakref import ref

import numpy as np

from fastdl import checks, config
from fastdl.kernels import dispatch

#: Bytes moved below which one thread is used: a parallel region costs about 1 us, which is 30 kB at memory speed.
BYTES_PER_THREAD = 1 << 20


class Context:
    """What a forward call keeps for its backward call.

    The backward kernels take pointers by what was checked in the forward call, so nothing that the caller does to his
    arrays in between may move or shrink them: the context keeps views, whose shape, strides and dtype nobody else can
    set, and weak references, for which NumPy refuses ``x.resize``, ``refcheck=False`` or not. 0.3 us an array.
    """

    __slots__ = ("_still", "arrays", "backend", "op", "params", "runtime", "shape", "threads")

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
        self.op, self.params, self.runtime, self.shape = op, params, runtime, shape
        self.backend, self.threads = backend, threads
        self.arrays, self._still = arrays, {}
        for name, x in arrays.items():
            if isinstance(x, np.ndarray):
                arrays[name] = x = x.view()
                self._still[name] = ref(x.base)  # what x is a view of: the owner of the memory, if it is NumPy's

    def __reduce__(self) -> tuple[Any, ...]:
        given = self.op, dict(self.arrays), self.params, self.runtime, self.shape, self.backend, self.threads
        return Context, given  # a copy looks after its own arrays

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
        if backend is not None and config.check_backend(backend) not in ("auto", "cuda"):
            raise ValueError(f"backend: expected 'cuda' for arrays in GPU memory, found {backend!r}; leave it out")
        backend = "cuda"
    call = dispatch.bound(op, config.resolve_backend(backend), arrays, arguments)
    number = config.resolve_threads(threads)
    if number is None:
        number = 1 if size < BYTES_PER_THREAD else config.available_threads()[0]
    call(arrays, arguments, number)
