"""Where an array lies: in rows with a gap, backwards, in panels, off its alignment, before a guard page.

Every array of a call gets memory of its own in which each byte outside the array is 0xFF: NaN for a kernel that reads
it, and a changed byte afterwards tells that a kernel wrote it.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

from fastdl.kernels.engine.panels import WIDTH, Panels, count
from fastdl.kernels.registry import Array, OpSpec

MARGIN = 64
GAP = 5  # elements between the end of a row and the next: odd, so that rows start at every alignment


class Placed:
    """An array in marked memory.

    Parameters
    ----------
    value : ndarray
    shape, strides, offset
        Where its elements lie in ``raw``.
    raw : ndarray of bytes
    """

    def __init__(self, value: np.ndarray, strides: Sequence[int], offset: int, raw: np.ndarray) -> None:
        raw[...] = 0xFF
        self.raw, self.value = raw, value
        self.view = np.ndarray(value.shape, value.dtype, raw, offset, tuple(strides))
        self.view[...] = value
        self.before = raw.copy()

    def argument(self) -> Any:
        """What is handed to the implementation."""
        return self.view

    def read(self) -> np.ndarray:
        """The array's values; raises if a byte around it has changed."""
        found = self.view.copy()
        self.view[...] = self.value
        if not np.array_equal(self.raw, self.before):
            at = int(np.flatnonzero(self.raw != self.before)[0])
            raise AssertionError(f"wrote outside the array (byte {at} of the memory around it)")
        return found


class ReadOnly(Placed):
    def argument(self) -> np.ndarray:
        view = self.view.view()
        view.flags.writeable = False
        return view


class InPanels:
    """A matrix in column panels with room for more rows; rows beyond hold NaN, the padding of the columns 0."""

    def __init__(self, value: np.ndarray, array: Array, spare: int) -> None:
        rows, cols = value.shape
        raw = _memory((count(cols) * (rows + spare) * WIDTH) * value.itemsize)
        raw[...] = 0xFF
        self.array, self.value = array, value
        self.data = np.ndarray((count(cols), rows + spare, WIDTH), value.dtype, raw, MARGIN)
        self.panels = Panels(self.data, cols, rows)
        self._fill()
        self.raw, self.before = raw, raw.copy()

    def _fill(self) -> None:
        rows = self.value.shape[0]
        for p in range(self.data.shape[0]):
            piece = self.value[:, p * WIDTH : (p + 1) * WIDTH]
            self.data[p, :rows] = 0
            self.data[p, :rows, : piece.shape[1]] = piece

    def argument(self) -> Panels:
        return self.panels

    def read(self) -> np.ndarray:
        found = self.panels.unpack()
        rows, cols = self.value.shape
        padding = self.data[-1, :rows, cols % WIDTH :] if cols % WIDTH else self.data[:0]
        if not np.isfinite(padding).all():
            raise AssertionError(f"{self.array.name}: the padding of its panels is not finite")
        if "N" not in self.array.letters and padding.any():
            raise AssertionError(f"{self.array.name}: the padding of its panels is not 0, and sweeps read it")
        self._fill()
        if not np.array_equal(self.raw, self.before):
            raise AssertionError(f"{self.array.name}: wrote outside the rows in use of its panels")
        return found


def _memory(size: int) -> np.ndarray:
    """``size`` bytes that start on a line of 64, with margins on both sides."""
    raw = np.empty(size + 3 * MARGIN, np.uint8)
    start = -raw.ctypes.data % MARGIN
    return raw[start : start + size + 2 * MARGIN]


def _strides(shape: tuple[int, ...], itemsize: int, gap: int = 0) -> list[int]:
    """Strides of an array in rows; ``gap`` elements lie between the rows of a matrix."""
    if len(shape) == 2:
        return [(shape[1] + gap) * itemsize, itemsize]
    return list(np.empty(shape, f"V{itemsize}").strides)


def _span(shape: tuple[int, ...], strides: Sequence[int], itemsize: int) -> int:
    """Bytes from the first element to the end of the last one (strides of any sign)."""
    if 0 in shape:
        return 0
    return sum((n - 1) * abs(s) for n, s in zip(shape, strides, strict=True)) + itemsize


def plain(value: np.ndarray, array: Array, product: bool = False) -> Placed:
    return Placed(value, _strides(value.shape, value.itemsize), MARGIN, _memory(value.nbytes))


def strided(value: np.ndarray, array: Array, product: bool = False) -> Placed:
    strides = _strides(value.shape, value.itemsize, GAP)
    return Placed(value, strides, MARGIN, _memory(_span(value.shape, strides, value.itemsize)))


def reversed_rows(value: np.ndarray, array: Array, product: bool = False) -> Placed:
    """Rows from the bottom up."""
    if value.ndim != 2 or 0 in value.shape:
        return plain(value, array)
    row, column = _strides(value.shape, value.itemsize, GAP)
    span = _span(value.shape, (row, column), value.itemsize)
    return Placed(value, (-row, column), MARGIN + (value.shape[0] - 1) * row, _memory(span))


def shifted(value: np.ndarray, array: Array, product: bool = False) -> Placed:
    """One element past a line of 64 bytes."""
    return Placed(
        value, _strides(value.shape, value.itemsize), MARGIN + value.itemsize, _memory(value.nbytes + value.itemsize)
    )


def read_only(value: np.ndarray, array: Array, product: bool = False) -> Placed:
    kind = ReadOnly if array.role == "in" else Placed
    return kind(value, _strides(value.shape, value.itemsize), MARGIN, _memory(value.nbytes))


def repeated(value: np.ndarray, array: Array, product: bool = False) -> Placed:
    """Row 0 for every row, by a stride of 0. Only inputs, and only where all rows are equal."""
    if array.role != "in" or value.ndim != 2 or 0 in value.shape or not _rows_equal(value):
        return plain(value, array)
    return Placed(value, (0, value.itemsize), MARGIN, _memory(value.shape[1] * value.itemsize))


def _rows_equal(value: np.ndarray) -> bool:
    return bool((value == value[:1]).all())


def transposed(value: np.ndarray, array: Array, product: bool = False) -> Placed:
    """Inputs of a product by columns."""
    if not product or array.role != "in" or value.ndim != 2:
        return plain(value, array)
    strides = (value.itemsize, (value.shape[0] + 3) * value.itemsize)
    return Placed(value, strides, MARGIN, _memory(_span(value.shape, strides, value.itemsize)))


def in_panels(value: np.ndarray, array: Array, product: bool = False) -> Placed | InPanels:
    """Matrices of the op's float type as they lie in a Program; only rows of a batch have room for more rows."""
    if value.ndim != 2 or array.dtype != "T" or 0 in value.shape:
        return plain(value, array)
    return InPanels(value, array, 3 if "N" in array.letters else 0)


# ---------------------------------------------------------------------------------------------- guard pages
if sys.platform != "win32":
    _protect = ctypes.CDLL(None, use_errno=True).mprotect
    _protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Fenced:
    """Memory between two pages that end the process when touched; kept for later calls of the same size."""

    _kept: ClassVar[dict[tuple[int, int], np.ndarray]] = {}

    @classmethod
    def take(cls, size: int, number: int) -> np.ndarray:
        """The bytes between the pages, at least ``size``; calls with other numbers get other memory."""
        page = mmap.PAGESIZE
        pages = max(1, -(-size // page))
        if (pages, number) not in cls._kept:
            whole = np.frombuffer(mmap.mmap(-1, (pages + 2) * page), np.uint8)
            for start in (0, (pages + 1) * page):
                if _protect(whole.ctypes.data + start, page, 0):
                    raise OSError(ctypes.get_errno(), "mprotect failed")
            cls._kept[pages, number] = whole[page:-page]
        return cls._kept[pages, number]


def fenced(at_end: bool, gap: int, number: int) -> Callable[[np.ndarray, Array], Placed]:
    """A layout whose array ends right before a forbidden page, or starts right after one."""

    def place(value: np.ndarray, array: Array, product: bool = False) -> Placed:
        strides = _strides(value.shape, value.itemsize, gap)
        span = _span(value.shape, strides, value.itemsize)
        raw = Fenced.take(span, number)
        return Placed(value, strides, raw.size - span if at_end else 0, raw)

    return place


LAYOUTS: dict[str, Callable[..., Any]] = {
    "plain": plain,
    "strided": strided,
    "reversed": reversed_rows,
    "shifted": shifted,
    "read-only": read_only,
    "repeated": repeated,
    "transposed": transposed,
    "panels": in_panels,
}


def place(spec: OpSpec, values: Sequence[np.ndarray | None], layout: str, product: bool) -> list[Any]:
    """Every array of a call in one layout; layout "fence-end" and "fence-start" are between forbidden pages."""
    placed: list[Any] = []
    for k, (array, value) in enumerate(zip(spec.arrays, values, strict=True)):
        if value is None:
            placed.append(None)
        elif layout.startswith("fence"):
            placed.append(fenced(layout.startswith("fence-end"), GAP if layout.endswith("gap") else 0, k)(value, array))
        else:
            placed.append(LAYOUTS[layout](value, array, product))
    return placed
