"""From the calls of a Program to launches. It needs neither a GPU nor a package of CUDA: `net.plan("cuda")` prints one.

A call is one launch or a few (batch normalisation: sums, then values). Calls marked ``tail`` by `fastdl.fuse.epilogues`
run in the registers of the dense product before them, and the optimiser's sweeps over both groups of parameters are one
launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastdl.kernels import registry
from fastdl.kernels.common.gpu import RUN_WORDS, Launch, Planner, View
from fastdl.program import Buffer, Call, Program


@dataclass(frozen=True)
class Step:
    """The launches of one call, or of several that run together."""

    calls: tuple[Call, ...]
    launches: tuple[Launch, ...]

    @property
    def phase(self) -> str:
        return self.calls[0].phase


Views = Callable[[Buffer], View]


def steps_of(program: Program, view: Views, planner: Planner) -> list[Step]:
    """Launches for every call of a Program, in order."""
    return [Step(tuple(group), tuple(_launches(group, view, planner))) for group in groups(program.calls)]


def groups(calls: Sequence[Call]) -> list[list[Call]]:
    """Calls that are launched together: a product with its tails, the sweeps of one optimiser."""
    found: list[list[Call]] = []
    for call in calls:
        last = found[-1] if found else None
        if call.tail or (last and _same_sweep(last[0], call)):
            last.append(call)
        else:
            found.append([call])
    return found


def _same_sweep(a: Call, b: Call) -> bool:
    decays = ("l2", "weight_decay")
    if a.op != b.op or a.op not in ("adam_step", "sgd_step"):
        return False
    return {k: v for k, v in a.params.items() if k not in decays} == {
        k: v for k, v in b.params.items() if k not in decays
    }


def _launches(group: Sequence[Call], view: Views, planner: Planner) -> list[Launch]:
    head, *rest = group

    def arrays(call: Call) -> list[View | None]:
        return [None if b is None else view(b) for b in call.arrays()]

    impl = registry.find(head.op, "cuda")
    params = {**head.spec.defaults(), **head.params}
    if not rest:
        return impl.launches(arrays(head), params, planner)
    if head.op == "dense_forward":
        return [_forward(head, rest, arrays(head), view, params, planner)]
    if head.op == "dense_backward_input":
        return [_backward(rest, arrays(head), view, params, planner)]
    from fastdl.kernels.optimizers.numba_cuda import update_launch

    return [update_launch([(arrays(c), {**c.spec.defaults(), **c.params}) for c in group], planner)]


def _forward(
    head: Call, rest: Sequence[Call], arrays: list[View | None], view: Views, params: dict[str, Any], planner: Planner
) -> Launch:
    from fastdl.kernels.dense.numba_cuda import forward_launch

    (dropout,) = rest
    arrays[[a.name for a in head.spec.arrays].index("y")] = view(dropout.buffers["y"])
    return forward_launch(arrays, params, planner, dropout=dict(dropout.params))


def _backward(
    rest: Sequence[Call], arrays: list[View | None], view: Views, params: dict[str, Any], planner: Planner
) -> Launch:
    from fastdl.kernels.dense.numba_cuda import backward_input_launch

    fused: dict[str, Any] = {"out": view(rest[-1].buffers["dx"])}
    for call in rest:
        if call.op == "dropout_backward":
            fused["dropout"] = dict(call.params)
        else:
            saved = next(b for name, b in call.buffers.items() if name in ("x", "y"))
            fused |= {"activation": call.op.removesuffix("_backward"), "saved": view(saved)}
            fused["alpha"] = float(call.params.get("alpha", 0.0))
    return backward_input_launch(arrays, params, planner, **fused)


# ---------------------------------------------------------------------------------------------------- on paper
class Paper:
    """A device that only hands out addresses."""

    def __init__(self) -> None:
        self.top = 1 << 32

    def allocate(self, size: int) -> int:
        address, self.top = self.top, self.top + (size + 255) // 256 * 256
        return address

    def write(self, address: int, array: Any) -> None:
        """Paper keeps no values."""

    def free(self, address: int) -> None:
        """Nor memory."""


def described(program: Program, steps: Sequence[Step], scratch: int) -> str:
    """A table of the launches: what runs, with what grid, for which calls of the Program."""
    rows = [("phase", "launch", "grid", "block", "calls")]
    for step in steps:
        names = " + ".join(call.op for call in step.calls)
        for launch in step.launches:
            grid, block = ("x".join(map(str, size)) for size in (launch.grid, launch.block))
            rows.append((step.phase, launch.kernel.name, grid, block, names))
    widths = [max(len(r[k]) for r in rows) for k in range(5)]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(r, widths, strict=True)).rstrip() for r in rows]
    count = sum(len(step.launches) for step in steps)
    feed = sum(len(step.launches) for step in steps if step.phase == "feed")
    head = f"{program.name} on cuda, up to {program.rows} rows: {count} launches"
    if feed:
        head += f", {feed} of them to bring the batch in"
    return f"{head}; {4 * len(RUN_WORDS)} B of run-time block, {scratch / 1e3:.1f} kB of scratch\n" + "\n".join(lines)
