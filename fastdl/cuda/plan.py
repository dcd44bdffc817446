"""From the calls of a Program to launches. It needs neither a GPU nor a package of CUDA: `net.plan("cuda")` prints one.

A call is one launch or a few (batch normalisation: sums, then values). Calls marked ``tail`` by `fastdl.fuse.epilogues`
run in the registers of the dense product before them, and the optimiser's sweeps over both groups of parameters are one
launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fastdl.cuda.products import Products
from fastdl.kernels import registry
from fastdl.kernels.common.gpu import RUN_WORDS, Launch, Planner, Product, View
from fastdl.program import Buffer, Call, Program

DENSE = ("dense_forward", "dense_backward_input", "dense_backward_weights")
#: Optimisers: one launch over all groups of parameters.
SWEEPS = ("adam_step", "sgd_step")


@dataclass(frozen=True)
class Step:
    """The launches of one call, or of several that run together."""

    calls: tuple[Call, ...]
    launches: tuple[Launch | Product, ...]

    @property
    def phase(self) -> str:
        return self.calls[0].phase


class Views(Protocol):
    """Where the buffers of a Program lie in device memory."""

    def view(self, buffer: Buffer, array: registry.Array | None = None) -> View:
        """A buffer as an array of a call: parameters have a float32 and may have a bfloat16 form."""

    def rounded(self, buffer: Buffer) -> View | None:
        """The bfloat16 copy of a stretch of the parameters, if one is kept."""


def steps_of(program: Program, views: Views, planner: Planner) -> list[Step]:
    """Launches for every call of a Program, in order."""
    found = groups(program.calls)
    products = Products(found, views, planner) if planner.library is not None else None
    return [Step(tuple(group), tuple(_launches(group, views, planner, products))) for group in found]


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
    if a.op != b.op or a.op not in SWEEPS:
        return False
    return {k: v for k, v in a.params.items() if k not in decays} == {
        k: v for k, v in b.params.items() if k not in decays
    }


def _launches(
    group: Sequence[Call], views: Views, planner: Planner, products: Products | None
) -> list[Launch | Product]:
    head, *rest = group
    if products is not None and head.op in DENSE and (found := products.launches(group)) is not None:
        return found

    def arrays(call: Call) -> list[View | None]:
        pairs = zip(call.arrays(), call.spec.arrays, strict=True)
        return [None if b is None else views.view(b, array) for b, array in pairs]

    impl = registry.find(head.op, "cuda")
    params = {**head.spec.defaults(), **head.params}
    if head.op in SWEEPS:
        from fastdl.kernels.optimizers.numba_cuda import update_launch

        updates = [(arrays(c), {**c.spec.defaults(), **c.params}, views.rounded(c.buffers["w"])) for c in group]
        return [update_launch(updates, planner)]
    if not rest:
        return impl.launches(arrays(head), params, planner)
    if head.op == "dense_forward":
        return [_forward(head, rest, arrays(head), views, params, planner)]
    return [_backward(rest, arrays(head), views, params, planner)]


def _forward(
    head: Call, rest: Sequence[Call], arrays: list[View | None], views: Views, params: dict[str, Any], planner: Planner
) -> Launch:
    from fastdl.kernels.dense.numba_cuda import forward_launch

    (dropout,) = rest
    arrays[[a.name for a in head.spec.arrays].index("y")] = views.view(dropout.buffers["y"])
    return forward_launch(arrays, params, planner, dropout=dict(dropout.params))


def _backward(
    rest: Sequence[Call], arrays: list[View | None], views: Views, params: dict[str, Any], planner: Planner
) -> Launch:
    from fastdl.kernels.dense.numba_cuda import backward_input_launch

    fused: dict[str, Any] = {"out": views.view(rest[-1].buffers["dx"])}
    for call in rest:
        if call.op == "dropout_backward":
            fused["dropout"] = dict(call.params)
        else:
            saved = next(b for name, b in call.buffers.items() if name in ("x", "y"))
            fused |= {"activation": call.op.removesuffix("_backward"), "saved": views.view(saved)}
            fused["alpha"] = float(call.params.get("alpha", 0.0))
    return backward_input_launch(arrays, params, planner, **fused)


# ---------------------------------------------------------------------------------------------------- on paper
class Paper:
    """A device that only hands out addresses; ``library`` says which products it would have."""

    def __init__(self, library: Any = None) -> None:
        self.top, self.library = 1 << 32, library

    def allocate(self, size: int) -> int:
        address, self.top = self.top, self.top + (size + 255) // 256 * 256
        return address

    def write(self, address: int, array: Any) -> None:
        """Paper keeps no values."""

    def free(self, address: int) -> None:
        """Nor memory."""

    def run(self, launches: Any) -> None:
        """Nor runs anything."""


def described(program: Program, steps: Sequence[Step], scratch: int) -> str:
    """A table of the launches: what runs, with what grid, for which calls of the Program."""
    rows = [("phase", "launch", "grid", "block", "calls")]
    for step in steps:
        names = " + ".join(call.op for call in step.calls)
        for launch in step.launches:
            if isinstance(launch, Product):
                rows.append((step.phase, str(launch), "", "", names))
                continue
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
