"""Memory of a Program: the arenas that a model's Programs share, and where each batch buffer lies in its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastdl.kernels import registry
from fastdl.kernels.engine import panels
from fastdl.kernels.engine.panels import Panels
from fastdl.layout import Layout
from fastdl.program import Buffer, Program
from fastdl.run.arena import Arena, aligned

#: Equal offsets of two buffers must not fall on the same cache sets: buffers start this many bytes apart, modulo 4 KB.
STAGGER = 832
#: A buffer's memory is reused only this many calls after its last use, so that independent calls stay independent.
REUSE_DISTANCE = 3


@dataclass(frozen=True)
class Memory:
    """The arenas that the Programs of one model share."""

    layout: Layout
    parameters: Arena
    gradients: np.ndarray
    states: Arena
    moments: Mapping[str, np.ndarray]  #: of the optimiser, by the names of its states
    #: One integer, raised with every change of parameters or states: what is folded is made anew then.
    version: np.ndarray
    #: The arenas in device memory, on a back end that has one (`fastdl.cuda.mirror.Mirror`).
    mirror: Any = None
    folded: dict[str, np.ndarray | Panels] = field(default_factory=dict)  # tensors made from parameters and states

    @classmethod
    def allocate(cls, layout: Layout, moments: Iterable[str], device: Any = None) -> Memory:
        """Zeros everywhere. With a ``device`` the arenas have a copy in its memory."""
        version, mirror = np.zeros(1, np.int64), None
        if device is not None:
            from fastdl.cuda.mirror import Mirror

            mirror = Mirror(device, version)
        parameters, states = Arena(layout.parameters, layout.dtype), Arena(layout.states, layout.dtype)
        size, dtype = layout.parameters.size, layout.dtype
        kept = {name: aligned(size, dtype) for name in moments}
        return cls(layout, parameters, aligned(size, dtype), states, kept, version, mirror)

    def flat(self, span: tuple[str, int, int]) -> np.ndarray:
        """A stretch of the parameters, the gradients or a moment."""
        arena, first, last = span
        if arena == "parameters":
            return self.parameters.values[first:last]
        return (self.gradients if arena == "gradients" else self.moments[arena])[first:last]

    def take(self, other: Memory, moments: bool = True) -> None:
        """Copy the values of another layout in, with the ``moments`` and the gradients where these are wanted."""
        other.pull()
        for mine, theirs in ((self.parameters, other.parameters), (self.states, other.states)):
            for name in theirs.layout.offsets:
                mine.write(name, theirs.read(name))
        kept = [(self.moments[key], other.moments[key]) for key in self.moments] if moments else []
        for mine, theirs in [*kept, (self.gradients, other.gradients)] if moments else ():
            for name in other.parameters.layout.offsets:
                self.parameters.write(name, other.parameters.read(name, theirs), mine)
        self.changed()

    def changed(self) -> None:
        """Somebody has written to the parameters, the states or the moments of the host."""
        self.version[0] += 1

    def pull(self) -> None:
        """Bring the arenas of the host up to date."""
        if self.mirror is not None:
            self.mirror.pull()


def dtype_of(buffer: Buffer, layout: Layout) -> np.dtype:
    """The type of a buffer's elements."""
    return np.dtype(registry.DTYPES[buffer.dtype] or layout.dtype)


def plan_arena(
    program: Program, size_of: Callable[[Buffer], int], keep: Iterable[Buffer]
) -> tuple[dict[Buffer, tuple[int, int]], int]:
    """Byte range of each batch buffer in one arena: first fit over lifetimes.

    Returns the ranges and the arena's size.
    """
    keep = set(keep)
    spans = program.lifetimes()
    chain_end = list(range(len(program)))  # a tail runs inside its head: their buffers live until the chain ends
    for k in range(len(program) - 2, -1, -1):
        if program.calls[k + 1].tail:
            chain_end[k] = chain_end[k + 1]
    placed: list[tuple[int, int, int, int, Buffer]] = []  # start, end, first, last
    top = 0
    for buffer, (first, last) in sorted(spans.items(), key=lambda item: item[1][0]):
        head = first
        while head and program.calls[head].tail:
            head -= 1
        first, last = head, len(program) if buffer in keep else chain_end[last] + REUSE_DISTANCE
        size = (size_of(buffer) + 63) // 64 * 64 + STAGGER
        at = 0
        for start, end, a, b, _ in sorted(placed, key=lambda p: p[0]):
            if a <= last and first <= b:  # alive at the same time
                if at + size <= start:
                    break
                at = max(at, end)
        placed.append((at, at + size, first, last, buffer))
        top = max(top, at + size)
    return {p[4]: (p[0], p[1]) for p in placed}, top


def panel_rows(rows: int) -> int:
    """Rows of a panel buffer: two at least, or its strides could not be told from those of a plain row."""
    return max(2, rows)


def stored_size(buffer: Buffer, rows: int, layout: Layout) -> int:
    """Elements that a batch buffer takes up."""
    if layout.panel_layout and buffer.is_matrix and buffer.dtype == "T":
        return panels.count(buffer.shape[0]) * panels.WIDTH * panel_rows(rows)
    if layout.panel_layout and not buffer.shape:
        return rows
    return buffer.size(rows)
