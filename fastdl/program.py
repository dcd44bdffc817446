"""The Program: a flat list of kernel calls on named buffers, the same for every back end.

A model is traced once over a maximum batch size (`fastdl.trace`), rewritten by `fastdl.fuse`, and bound to a back end
(`fastdl.run`). ``print(program)`` lists every call with shapes, bytes and flops: what is profiled is what runs.

The compiled back end runs a Program with denormal numbers as zeros, in its own threads (a moment that decays into them
costs 150 cycles an element); eager calls and the Python back ends keep them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastdl.initializers import Initializer
from fastdl.kernels import registry

#: Phases in the order in which they run.
PHASES = ("feed", "forward", "loss", "backward", "update")
#: The phase before them: what is made from the parameters, run only when these have changed.
FOLD = "fold"


@dataclass(frozen=True, eq=False)
class Buffer:
    """One array of a Program.

    Parameters
    ----------
    name : str
    shape : tuple
        Trailing shape for batch buffers (the rows come from the run-time block), the whole shape for the others.
    kind : {"batch", "parameter", "gradient", "state", "slot", "cell", "flat", "folded"}
        ``slot``: the caller's array, bound before a run. ``cell``: small values of a fixed size, e.g. the loss.
        ``flat``: the stretch ``span`` of an arena. ``folded``: made from parameters and states by the phase `FOLD`, one
        tensor of a name for all Programs of a model.
    dtype : {"T", "f8", "i8"}
    span : (arena, first, last), optional
        The arena is "parameters", "gradients" or the name of an optimiser's state.
    """

    name: str
    shape: tuple[int, ...]
    kind: str = "batch"
    dtype: str = "T"
    span: tuple[str, int, int] | None = None

    @property
    def is_matrix(self) -> bool:
        """Two-dimensional once the rows of a batch are counted."""
        return len(self.shape) == (1 if self.kind == "batch" else 2)

    def size(self, rows: int) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * (rows if self.kind == "batch" else 1)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, eq=False)
class Segment:
    """One parameter (or running statistic) of a model."""

    buffer: Buffer
    initializer: Initializer
    decay: bool

    @property
    def name(self) -> str:
        return self.buffer.name


@dataclass(frozen=True, eq=False)
class Call:
    """One kernel call: an op, its buffers by array name, its fixed parameters."""

    op: str
    buffers: Mapping[str, Buffer | None]
    params: Mapping[str, Any] = field(default_factory=dict)
    phase: str = "forward"
    tail: bool = False  #: runs on each finished output panel of the call before it

    def __post_init__(self) -> None:
        spec = self.spec
        unknown = [n for n in self.buffers if n not in {a.name for a in spec.arrays}]
        missing = [a.name for a in spec.arrays if not a.optional and self.buffers.get(a.name) is None]
        if unknown or missing:
            raise ValueError(f"call of {self.op}: unknown arrays {unknown}, missing arrays {missing}")

    @property
    def spec(self) -> registry.OpSpec:
        return registry.spec(self.op)

    def arrays(self) -> list[Buffer | None]:
        """Buffers in the order of the spec."""
        return [self.buffers.get(a.name) for a in self.spec.arrays]

    def _with_role(self, roles: tuple[str, ...]) -> Iterator[Buffer]:
        for array in self.spec.arrays:
            buffer = self.buffers.get(array.name)
            if buffer is not None and array.role in roles:
                yield buffer

    @property
    def reads(self) -> list[Buffer]:
        return list(self._with_role(("in", "inout")))

    @property
    def writes(self) -> list[Buffer]:
        return list(self._with_role(("out", "inout")))

    def sizes(self, rows: int) -> dict[str, int]:
        """Values of the spec's dimension letters."""
        sizes: dict[str, int] = {}
        for array in self.spec.arrays:
            buffer = self.buffers.get(array.name)
            if buffer is None:
                continue
            shape = ((rows,) if buffer.kind == "batch" else ()) + buffer.shape
            if len(shape) < len(array.letters):
                shape = (rows, *shape)
            for letter, size in zip(array.letters, shape, strict=False):
                if not letter.isdigit():
                    sizes.setdefault(letter, int(size))
        return sizes

    def moved(self, rows: int, itemsize: int) -> float:
        """Logical bytes of the arrays that the call has."""
        absent = [a.name for a in self.spec.arrays if self.buffers.get(a.name) is None]
        return self.spec.moved(self.sizes(rows), itemsize, absent)


class Program:
    """Calls in order, for at most ``rows`` rows.

    Parameters
    ----------
    name : str
    rows : int
        Maximum rows of a batch.
    calls : sequence of Call
    itemsize : int
        Bytes of the Program's float type.
    """

    def __init__(self, name: str, rows: int, calls: Sequence[Call], itemsize: int = 4) -> None:
        self.name, self.rows, self.calls, self.itemsize = name, rows, tuple(calls), itemsize

    def replaced(self, calls: Sequence[Call]) -> Program:
        return Program(self.name, self.rows, calls, self.itemsize)

    @property
    def buffers(self) -> list[Buffer]:
        """Every buffer once, in order of first use."""
        seen: dict[Buffer, None] = {}
        for call in self.calls:
            for buffer in call.arrays():
                if buffer is not None:
                    seen.setdefault(buffer)
        return list(seen)

    def readers(self, buffer: Buffer) -> list[Call]:
        return [c for c in self.calls if buffer in c.reads]

    def writers(self, buffer: Buffer) -> list[Call]:
        return [c for c in self.calls if buffer in c.writes]

    def lifetimes(self) -> dict[Buffer, tuple[int, int]]:
        """First and last call that touches each batch buffer."""
        spans: dict[Buffer, tuple[int, int]] = {}
        for k, call in enumerate(self.calls):
            for buffer in call.arrays():
                if buffer is not None and buffer.kind == "batch":
                    spans[buffer] = (spans.get(buffer, (k, k))[0], k)
        return spans

    @property
    def folds(self) -> int:
        """Calls of the phase `FOLD`; they stand first."""
        return sum(c.phase == FOLD for c in self.calls)

    @property
    def changes_parameters(self) -> bool:
        """Whether a run leaves other parameters or running statistics behind."""
        return any(b.kind in ("parameter", "state", "flat") for c in self.calls for b in c.writes)

    def flops(self) -> float:
        return sum(c.spec.flops(c.sizes(self.rows)) for c in self.calls[self.folds :])

    def bytes(self) -> float:
        return sum(c.moved(self.rows, self.itemsize) for c in self.calls[self.folds :])

    def __len__(self) -> int:
        return len(self.calls)

    def __str__(self) -> str:
        rows = [("phase", "call", "arrays", "kB", "Mflop")]
        for call in self.calls:
            sizes = call.sizes(self.rows)
            inputs = ", ".join(f"{b}" for b in call.reads if b.kind != "gradient")
            outputs = ", ".join(f"{b}" for b in call.writes)
            shown = {k: v for k, v in call.params.items() if v not in ("identity", 0, 0.0, None) and k not in _QUIET}
            params = ", ".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in shown.items())
            rows.append(
                (
                    call.phase,
                    ("+ " if call.tail else "") + call.op + (f"({params})" if params else ""),
                    f"{inputs} -> {outputs}  [{', '.join(f'{k}={v}' for k, v in sizes.items())}]",
                    f"{call.moved(self.rows, self.itemsize) / 1e3:.1f}",
                    f"{call.spec.flops(sizes) / 1e6:.2f}",
                )
            )
        widths = [max(len(r[k]) for r in rows) for k in range(4)]
        lines = [
            f"{r[0]:<{widths[0]}}  {r[1]:<{widths[1]}}  {r[3]:>{widths[3]}}  {r[4]:>7}  {r[2]}".rstrip() for r in rows
        ]
        total = f"{len(self)} calls, {self.bytes() / 1e6:.2f} MB moved, {self.flops() / 1e6:.2f} Mflop"
        return f"{self.name} program, up to {self.rows} rows: {total}\n" + "\n".join(lines)


#: Parameters that say nothing about the work of a call.
_QUIET = {"seed", "layer", "n", "decay", "eps", "alpha", "beta1", "beta2", "lr_factor"}
