"""Matrices in column panels: the layout of every matrix inside a compiled Program.

A panel holds 32 columns of all rows, ``data[panel, row, column % 32]``. One panel is at the same time a packed operand
B and a packed operand A of a product, and a column-local op finishes a panel while it is in cache. The width is padded
with zeros to a multiple of 32.
"""

from __future__ import annotations

import numpy as np

WIDTH = 32


def count(cols: int) -> int:
    """Panels of a matrix of ``cols`` columns."""
    return -(-cols // WIDTH)


class Panels:
    """A matrix (rows, cols) in panel layout.

    Parameters
    ----------
    data : ndarray (count(cols), maximum rows, 32)
        C-contiguous.
    cols : int
    rows : int, optional
        Rows in use, the maximum by default.
    """

    __slots__ = ("cols", "data", "rows")

    def __init__(self, data: np.ndarray, cols: int, rows: int | None = None) -> None:
        if data.ndim != 3 or data.shape[0] != count(cols) or data.shape[2] != WIDTH or not data.flags.c_contiguous:
            raise ValueError(f"expected C-contiguous data of shape ({count(cols)}, rows, {WIDTH}), found {data.shape}")
        self.data, self.cols, self.rows = data, cols, data.shape[1] if rows is None else rows

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.cols

    @property
    def dtype(self) -> np.dtype:
        return self.data.dtype

    def unpack(self) -> np.ndarray:
        """A copy in plain rows."""
        rows = self.data[:, : self.rows].transpose(1, 0, 2).reshape(self.rows, -1)
        return rows[:, : self.cols].copy()  # one row or one panel is a view up to here

    def fill_from(self, plain: np.ndarray) -> None:
        """Copy a plain matrix in; the padding becomes zero."""
        self.data[...] = 0
        for p in range(self.data.shape[0]):
            piece = plain[:, p * WIDTH : (p + 1) * WIDTH]
            self.data[p, : piece.shape[0], : piece.shape[1]] = piece


def pack(plain: np.ndarray) -> Panels:
    """A plain matrix (rows, cols) in panel layout."""
    rows, cols = plain.shape
    packed = Panels(np.zeros((count(cols), rows, WIDTH), plain.dtype), cols)
    packed.fill_from(plain)
    return packed
