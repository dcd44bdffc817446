"""A kernel is compiled once for all tests of CUDA: many ask for its PTX, which takes up to some seconds."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest

from fastdl.kernels.common import numba_cuda


@pytest.fixture(autouse=True, scope="session")
def compiled_once() -> Iterator[None]:
    before = numba_cuda.ptx
    kept = functools.cache(before)

    def ptx(kernel: Any, dtype: str = "float32", cc: tuple[int, int] = (9, 0)) -> str:
        return kept(kernel, dtype, cc)

    numba_cuda.ptx = ptx
    yield
    numba_cuda.ptx = before
