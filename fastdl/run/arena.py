"""Where parameters live: one arena of values, one of gradients in the same order, one per optimiser state.

Segments with weight decay stand first, so that an optimiser needs one sweep per group of equal settings. Back ends that
work on column panels keep matrices in that layout (`fastdl.kernels.engine.panels`) and pad vectors to whole panels, on
a GPU every segment starts at a multiple of 128 bytes; the padding is zero in every arena and stays so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import numpy as np

from fastdl.kernels.engine import panels
from fastdl.kernels.engine.panels import Panels
from fastdl.program import Segment


def aligned(size: int, dtype: Any, fill: float = 0) -> np.ndarray:
    """A vector that starts at a cache line."""
    dtype = np.dtype(dtype)
    raw = np.empty(size * dtype.itemsize + 64, np.uint8)
    start = -raw.ctypes.data % 64
    out = raw[start : start + size * dtype.itemsize].view(dtype)
    out[...] = fill
    return out


class Arena:
    """Segments laid out in one vector, those of plain layout each at a multiple of so many elements."""

    def __init__(self, segments: list[Segment], dtype: Any, panel_layout: bool, multiple: int = 1) -> None:
        self.dtype, self.panel_layout, self.multiple = np.dtype(dtype), panel_layout, multiple
        self.segments = sorted(segments, key=lambda s: not s.decay)
        self.offsets: dict[str, int] = {}
        self.group_end = 0  # first element after the segments with decay
        at = 0
        for segment in self.segments:
            self.offsets[segment.name] = at
            at += self.padded_size(segment.buffer.shape)
            if segment.decay:
                self.group_end = at
        self.size = at
        self.values = aligned(at, dtype)

    def padded_size(self, shape: tuple[int, ...]) -> int:
        if not self.panel_layout:
            return -(-int(np.prod(shape)) // self.multiple) * self.multiple
        if len(shape) == 1:
            return panels.count(shape[0]) * panels.WIDTH
        return panels.count(shape[1]) * panels.WIDTH * shape[0]

    def view(self, name: str, arena: np.ndarray | None = None) -> np.ndarray | Panels:
        """The segment inside an arena of this layout (its own values by default)."""
        arena = self.values if arena is None else arena
        shape = next(s.buffer.shape for s in self.segments if s.name == name)
        return self._shaped(arena[self.offsets[name] : self.offsets[name] + self.padded_size(shape)], shape)

    def blank(self, shape: tuple[int, ...]) -> np.ndarray | Panels:
        """Zeros outside of the arena, in its layout."""
        return self._shaped(aligned(self.padded_size(shape), self.dtype), shape)

    def _shaped(self, flat: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | Panels:
        if not self.panel_layout:
            return flat[: int(np.prod(shape))].reshape(shape)
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


class Weights(MutableMapping[str, np.ndarray]):
    """Named tensors of a model: reading copies out in plain layout, assigning copies in.

    Shapes are those of the layer: kernels (I, O), vectors (O,). ``version``, one integer, is raised by an assignment.
    ``pull`` brings the arenas up to date, where a device has newer values.
    """

    def __init__(
        self,
        arenas: list[tuple[Arena, np.ndarray]],
        names: list[str],
        version: np.ndarray,
        pull: Callable[[], None],
    ) -> None:
        self._arenas, self._names, self._version, self._pull = arenas, names, version, pull

    def _place(self, name: str) -> tuple[Arena, np.ndarray]:
        for arena, values in self._arenas:
            if name in arena.offsets:
                return arena, values
        raise KeyError(f"no tensor {name!r}; the model has {', '.join(self._names)}")

    def __getitem__(self, name: str) -> np.ndarray:
        arena, values = self._place(name)
        self._pull()
        return arena.read(name, values)

    def __setitem__(self, name: str, value: Any) -> None:
        arena, values = self._place(name)
        value = np.asarray(value)
        shape = next(s.buffer.shape for s in arena.segments if s.name == name)
        if value.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, found {value.shape}")
        if value.dtype.kind not in "fiu":
            raise TypeError(f"{name}: expected numbers, found dtype {value.dtype}")
        if values is not arena.values:
            raise TypeError(f"{name}: gradients are read-only here; they are written by backward()")
        self._pull()
        arena.write(name, value.astype(arena.dtype))
        self._version += 1

    def __delitem__(self, name: str) -> None:
        raise TypeError("tensors of a model cannot be deleted")

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return "\n".join(f"{name} {self[name].shape}" for name in self)
