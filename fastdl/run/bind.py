"""Which executor runs a Program: the one place that knows them all, by name."""

from __future__ import annotations

import importlib
from collections.abc import Iterable

from fastdl.program import Buffer, Program
from fastdl.run.executor import Executor
from fastdl.run.storage import Memory

#: Module and class of each back end's executor; imported when a Program is first bound to it.
EXECUTORS = {
    "numpy": ("fastdl.run.python", "PythonExecutor"),
    "numba": ("fastdl.run.python", "PythonExecutor"),
    "cython": ("fastdl.run.native", "NativeExecutor"),
    "cuda": ("fastdl.cuda.executor", "CudaExecutor"),
}


def bind(program: Program, memory: Memory, backend: str, threads: int, keep: Iterable[Buffer] = ()) -> Executor:
    """Bind a Program to a back end."""
    module, name = EXECUTORS[backend]
    kind = getattr(importlib.import_module(module), name)
    return kind(program, memory, backend, threads, keep)
