"""Where a model's tensors lie on a back end, on paper: nothing is allocated here.

Segments with weight decay stand first, so that an optimiser needs one sweep per group of equal settings. Back ends that
work on column panels keep matrices in that layout (`fastdl.kernels.engine.panels`) and pad vectors to whole panels. On
a GPU every segment starts at a multiple of 128 bytes. The padding is zero in every arena and stays so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from fastdl.kernels.engine import panels
from fastdl.program import Segment

#: Elements between the starts of two parameters on a GPU: a line of 128 bytes, of a bfloat16 copy too.
DEVICE_MULTIPLE = 64


class ArenaLayout:
    """Segments laid out in one vector, those of plain layout each at a multiple of so many elements."""

    def __init__(self, segments: Iterable[Segment], panel_layout: bool, multiple: int = 1) -> None:
        self.panel_layout, self.multiple = panel_layout, multiple
        self.segments = sorted(segments, key=lambda s: not s.decay)
        self.shapes = {s.name: s.buffer.shape for s in self.segments}
        self.offsets: dict[str, int] = {}
        self.group_end = 0  #: first element after the segments with decay
        self.size = 0
        for segment in self.segments:
            self.offsets[segment.name] = self.size
            self.size += self.padded_size(segment.buffer.shape)
            if segment.decay:
                self.group_end = self.size

    def padded_size(self, shape: tuple[int, ...]) -> int:
        """Elements that a tensor takes up."""
        if not self.panel_layout:
            return -(-math.prod(shape) // self.multiple) * self.multiple
        return panels.count(shape[-1]) * panels.WIDTH * math.prod(shape[:-1])


@dataclass(frozen=True, eq=False)
class Layout:
    """What a Program is made for: how a back end lays out parameters, states and the matrices of a batch."""

    parameters: ArenaLayout
    states: ArenaLayout
    dtype: np.dtype  #: of the arenas
    panel_layout: bool = False
    mixed: bool = False  #: products round their operands to bfloat16
    device: bool = False  #: the arenas have a copy in a GPU's memory
