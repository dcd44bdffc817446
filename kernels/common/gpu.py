"""What a CUDA kernel and its launches are, without any package of CUDA: a plan of launches can be made anywhere.

A family's ``numba_cuda.py`` declares its kernels with `kernel` and, for every op, a function that turns the op's arrays
into launches (`Impl.launches`). Who carries them out is a device: the driver (``driver.py``) or, in the tests, an
interpreter of the same PTX.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastdl.kernels.registry import RUNTIME

#: 32-bit words of the run-time block, which every kernel reads from device memory: nothing that changes from step to
#: step is an argument, so that a captured graph can be replayed. ``lr`` and ``scale`` are the bits of a float32. An
#: epoch's ``batch`` and ``count`` (rows of the data set) let the device go on to the next step by itself.
RUN_WORDS = (*RUNTIME, "rows", "batch", "count")
STEP, EPOCH, FIRST_ROW, TOTAL_ROWS, OFFSET, UPDATE, LR, SCALE, ROWS, BATCH, COUNT = range(len(RUN_WORDS))


def run_block(**values: float) -> np.ndarray:
    """The words of a run-time block; where nothing is said a scale of 1, else zero."""
    words = np.zeros(len(RUN_WORDS), np.uint32)
    for name, value in {"scale": 1.0, **values}.items():
        floats = name in ("lr", "scale")
        bits = np.float32(value).view(np.uint32) if floats else np.uint32(int(value) & 0xFFFFFFFF)
        words[RUN_WORDS.index(name)] = bits
    return words


THREADS = 256  # of a block, where nothing speaks for another number
ROOM = 8 * THREADS  # floats of shared memory, eight a thread
MAX_GRID_Y = 65535


@dataclass(frozen=True)
class Kernel:
    """A kernel before it is compiled.

    Parameters
    ----------
    name : str
        Its entry point.
    function : callable
        Python code for numba-cuda.
    arguments : tuple of (kind, name)
        ``kind`` is "i4", "u4", "f4", "i8", "f8", or a pointer: one of them with ``*``, "u1*", "u2*" (bfloat16
        too), or "T*" to the op's floats.
    doubles : str
        Why the kernel computes in float64, if it does: by accident none may.
    registers : int
        Most that a thread may use: 64 leave room for 1024 threads on a multiprocessor.
    """

    name: str
    function: Callable[..., None]
    arguments: tuple[tuple[str, str], ...]
    doubles: str = ""
    registers: int = 64


def kernel(
    signature: str, name: str | None = None, doubles: str = "", registers: int = 64
) -> Callable[[Callable[..., None]], Kernel]:
    """Declare a kernel: ``@kernel("T* x, T* y, i4 cols")``."""
    arguments = tuple(tuple(part.split()) for part in signature.split(","))

    def declare(function: Callable[..., None]) -> Kernel:
        return Kernel(name or function.__name__, function, arguments, doubles, registers)

    return declare


@dataclass(frozen=True)
class View:
    """An array in device memory: address of the first element, shape, elements between rows."""

    address: int
    shape: tuple[int, ...]
    row_stride: int
    dtype: np.dtype | str  # NumPy's, or "bfloat16"
    name: str = ""

    @property
    def itemsize(self) -> int:
        return 2 if self.dtype == "bfloat16" else np.dtype(self.dtype).itemsize

    @property
    def nbytes(self) -> int:
        """Of the elements, without gaps between rows."""
        return int(np.prod(self.shape)) * self.itemsize

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def cols(self) -> int:
        return self.shape[1] if len(self.shape) > 1 else 1

    @property
    def contiguous(self) -> bool:
        return len(self.shape) < 2 or self.row_stride == self.cols

    @property
    def by_eights(self) -> bool:
        """Whether every row can be read eight elements at a time."""
        return self.address % 16 == 0 and self.row_stride * self.itemsize % 16 == 0


@dataclass(frozen=True)
class Launch:
    """One launch: a kernel for one float type, its grid and block, and its arguments (views, numbers, None)."""

    kernel: Kernel
    grid: tuple[int, int]
    block: tuple[int, int]
    arguments: tuple[Any, ...]
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if len(self.arguments) != len(self.kernel.arguments):
            raise TypeError(f"{self.kernel.name}: {len(self.kernel.arguments)} arguments, found {len(self.arguments)}")

    def __str__(self) -> str:
        grid, block = ("x".join(map(str, size)) for size in (self.grid, self.block))
        return f"{self.kernel.name}<<<{grid}, {block}>>> {self.dtype}"


#: What a library's product can do beside the product, as cuBLASLt names it (``CUBLASLT_EPILOGUE_...``).
EPILOGUES = (
    "DEFAULT",
    "BIAS",  # + bias
    "RELU_BIAS",
    "RELU_AUX_BIAS",  # and a bit for each positive element
    "GELU_AUX_BIAS",  # by tanh; and the values before it
    "DRELU",  # times the bits
    "DGELU",  # times the derivative at the values
    "BGRADA",  # and the sums of b over its rows
)


@dataclass(frozen=True)
class Product:
    """One product by a library: c = epilogue(a b), a (M, K), b (K, N), c (M, N).

    Parameters
    ----------
    a, b, c : View
        Rows in memory; ``a_turned`` and ``b_turned`` say that the transpose is stored. a and b have one type, c has it
        too or is float32.
    epilogue : str
        One of `EPILOGUES`.
    vector : View, optional
        Bias (N,), read; or the sums of b (N,), written. Of c's type.
    aux : View, optional
        Bits: (M, words) of uint32, a multiple of four words from row to row, bit n of a row is column n's. Or values
        (M, N) of c's type.
    """

    a: View
    b: View
    c: View
    a_turned: bool = False
    b_turned: bool = False
    epilogue: str = "DEFAULT"
    vector: View | None = None
    aux: View | None = None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """M, N, K."""
        return self.c.rows, self.c.cols, self.a.rows if self.a_turned else self.a.cols

    def __str__(self) -> str:
        return f"cublaslt {self.epilogue.lower()} {'x'.join(map(str, self.sizes))} {float_type(self.a)}"


@dataclass
class Planner:
    """What a plan may ask for beside the op's own arrays: the run-time block and scratch memory."""

    run: View
    allocate: Callable[[int], int]  # bytes -> address of zeros, for as long as the plan lives
    library: Any = None  # has(product) -> bool: products of a library, on a device that has one
    scratches: list[View] = field(default_factory=list)

    def scratch(self, *shape: int, dtype: Any = np.float32) -> View:
        size = int(np.prod(shape))
        view = View(self.allocate(size * np.dtype(dtype).itemsize), shape, shape[-1], np.dtype(dtype), "scratch")
        self.scratches.append(view)
        return view


def float_type(view: View) -> str:
    return "bfloat16" if view.dtype == "bfloat16" else np.dtype(view.dtype).name


def spans(rows: int, cols: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Grid and block for a matrix of which each thread takes eight columns of a row at a time.

    Threads side by side take the column blocks of a row, at most a warp's worth so that narrow matrices fill their
    warps with rows.
    """
    blocks = max(1, -(-cols // 8))
    across = 1
    while across < min(blocks, THREADS):
        across *= 2
    down = THREADS // across
    return (-(-blocks // across), min(MAX_GRID_Y, max(1, -(-rows // down)))), (across, down)


#: Rows of a strip that a thread sums before the strip is cut (the cut's sums cost another trip to memory), and after
#: which it is cut even without idle multiprocessors, so that blocks are many and short beside the last ones to end.
LEAST_ROWS, MOST_ROWS = 8, 32
BLOCKS = 4 * 132  # on the device at a time: an H200


def strips(rows: int, cols: int, across: int, least: int = 1) -> tuple[tuple[int, int], tuple[int, int]]:
    """Grid and block where a thread stays with its eight columns: their constants or sums are in its registers.

    The grid's x counts strips of ``8 * across`` columns (less for a narrow matrix), its y the blocks that share the
    rows of a strip, every so many rows each: at least ``least`` a thread.
    """
    blocks = max(1, -(-cols // 8))
    while across // 2 >= blocks:
        across //= 2
    down = THREADS // across
    wide = -(-blocks // across)
    cuts = min(-(-rows // (least * down)), max(-(-BLOCKS // wide), -(-rows // (MOST_ROWS * down))))
    return (wide, min(MAX_GRID_Y, max(1, cuts))), (across, down)
