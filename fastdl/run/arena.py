"""Vectors that hold a model's tensors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fastdl.kernels.engine import panels
from fastdl.kernels.engine.panels import Panels
from fastdl.layout import ArenaLayout


def aligned(size: int, dtype: Any, fill: float = 0) -> np.ndarray:
    """A vector that starts at a cache line."""
    dtype = np.dtype(dtype)
    raw = np.empty(size * dtype.itemsize + 64, np.uint8)
    start = -raw.ctypes.data % 64
    out = raw[start : start + size * dtype.itemsize].view(dtype)
    out[...] = fill
    return out


class Arena:
    """The values of an `ArenaLayout`."""

    def __init__(self, layout: ArenaLayout, dtype: Any) -> None:
        self.layout, self.dtype = layout, np.dtype(dtype)
        self.values = aligned(layout.size, dtype)

    def view(self, name: str, arena: np.ndarray | None = None) -> np.ndarray | Panels:
        """The segment inside an arena of this layout (its own values by default)."""
        arena = self.values if arena is None else arena
        first, shape = self.layout.offsets[name], self.layout.shapes[name]
        return self._shaped(arena[first : first + self.layout.padded_size(shape)], shape)

    def blank(self, shape: tuple[int, ...]) -> np.ndarray | Panels:
        """Zeros outside of the arena, in its layout."""
        return self._shaped(aligned(self.layout.padded_size(shape), self.dtype), shape)

    def _shaped(self, flat: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | Panels:
        if not self.layout.panel_layout:
            return flat[: math.prod(shape)].reshape(shape)
        if len(shape) == 1:
            return flat[: shape[0]]
        return Panels(flat.reshape(panels.count(shape[1]), shape[0], panels.WIDTH), shape[1])

    def read(self, name: str, arena: np.ndarray | None = None) -> np.ndarray:
        """A copy in plain layout."""
        view = self.view(name, arena)
        return view.unpack() if isinstance(view, Panels) else view.copy()

    def write(self, name: str, value: np.ndarray, arena: np.ndarray | None = None) -> None:
        """Copy a plain tensor in."""
        view = self.view(name, arena)
        if isinstance(view, Panels):
            view.fill_from(value)
        else:
            view[...] = value
