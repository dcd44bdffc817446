"""Texts about a model: the table of its layers, and who runs it and why."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from fastdl.kernels import dispatch
from fastdl.kernels.registry import ALL_BACKENDS
from fastdl.program import Program

if TYPE_CHECKING:
    from fastdl.layers import Layer
    from fastdl.run.runtime import Runtime


def explain(runtime: Runtime, program: Program) -> str:
    """Which back end runs a model with how many threads, and why not another."""
    threads, why = runtime.threads(program)
    note = dispatch.note(runtime.backend)
    lines = [f"back end {runtime.backend}, {threads} thread{'s' if threads > 1 else ''} ({why}){note}"]
    for name in ALL_BACKENDS:
        if name != runtime.backend:
            reasons = runtime.refusals(name)
            lines.append(f"  {name}: {reasons[0] if reasons else 'could run it'}")
    return "\n".join(lines)


def summary(layers: Iterable[tuple[str, Layer]], runtime: Runtime) -> str:
    """Layers with their outputs and numbers of parameters."""
    builder = runtime.builder
    rows = [("layer", "type", "output", "parameters")]
    for (name, layer), width in zip(layers, builder.outputs, strict=True):
        sizes = [int(np.prod(s.buffer.shape)) for n, s in builder.segments.items() if n.startswith(f"{name}/")]
        rows.append((name, type(layer).__name__, f"(N, {width})", f"{sum(sizes):,}"))
    widths = [max(len(r[k]) for r in rows) for k in range(4)]
    lines = [f"{r[0]:<{widths[0]}}  {r[1]:<{widths[1]}}  {r[2]:<{widths[2]}}  {r[3]:>{widths[3]}}" for r in rows]
    total = sum(int(np.prod(s.buffer.shape)) for s in builder.segments.values())
    settings = f"{runtime.settings.dtype}, back end {runtime.backend}"
    lines.append(f"{total:,} parameters, input (N, {builder.width}), {settings}")
    return "\n".join(lines)
