"""Where a kernel's machine code comes from: cubins that came with the wheel, the user's cache, or the compiler.

A cubin runs on every GPU of its compute capability's major number from its minor number on. Names carry a hash of all
kernel sources, so that an edited kernel never runs from an old file.
"""

from __future__ import annotations

import functools
import os
import pathlib
import tempfile
from collections.abc import Iterable

from fastdl.kernels.common.gpu import Kernel
from fastdl.kernels.common.numba_cpu import FOLDER, source_hash

#: Filled by ``python -m fastdl cubins``; part of a wheel if it was built with them.
PACKED = pathlib.Path(__file__).resolve().parent / "cubins"


@functools.cache
def _hash() -> str:
    return source_hash()


def file_name(kernel: Kernel, dtype: str, cc: tuple[int, int]) -> str:
    return f"{kernel.name}-{dtype}-sm_{cc[0]}{cc[1]}-{_hash()}.cubin"


def packed(kernel: Kernel, dtype: str, cc: tuple[int, int]) -> bytes | None:
    """The cubin that came with the installation, for this GPU or an older one of its generation."""
    for minor in range(cc[1], -1, -1):
        path = PACKED / file_name(kernel, dtype, (cc[0], minor))
        if path.exists():
            return path.read_bytes()
    return None


def code(kernel: Kernel, dtype: str, cc: tuple[int, int]) -> bytes:
    """Machine code of a kernel; compiled and kept when it is first asked for."""
    found = packed(kernel, dtype, cc)
    if found is not None:
        return found
    path = None if FOLDER is None else pathlib.Path(FOLDER) / file_name(kernel, dtype, cc)
    if path is not None and path.exists():
        return path.read_bytes()
    from fastdl.kernels.common import numba_cuda

    found, _ = numba_cuda.cubin(kernel, dtype, cc)
    if path is not None:
        write(path, found)
    return found


def write(path: pathlib.Path, content: bytes) -> None:
    """In one step: another process never reads half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    os.replace(file.name, path)


def build(kernels: Iterable[Kernel], architectures: Iterable[tuple[int, int]], to: pathlib.Path) -> int:
    """Compile kernels for storage of float32 and bfloat16; returns how many files were written."""
    from fastdl.kernels.common import numba_cuda

    count = 0
    for kernel in kernels:
        typed = any(kind == "T*" for kind, _ in kernel.arguments)
        for dtype in ("float32", "bfloat16") if typed else ("float32",):
            for cc in architectures:
                content, _ = numba_cuda.cubin(kernel, dtype, cc)
                write(to / file_name(kernel, dtype, cc), content)
                count += 1
    return count
