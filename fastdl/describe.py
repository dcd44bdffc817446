"""Texts about a model: the table of its layers, and who runs it and why."""

from __future__ import annotations

import math

from fastdl.kernels import dispatch
from fastdl.kernels.registry import ALL_BACKENDS
from fastdl.program import Program
from fastdl.run.runtime import Runtime


def explain(runtime: Runtime, program: Program) -> str:
    """Which back end runs a model with how many threads, and why not another."""
    threads, why = runtime.threads(program)
    chosen = runtime.wanted()
    lines = [f"back end {chosen}, {threads} thread{'s' if threads > 1 else ''} ({why}){dispatch.note(chosen)}"]
    if runtime.settings.note:
        lines.append(f"  {runtime.settings.note}")
    for name in ALL_BACKENDS:
        if name != chosen:
            reasons = runtime.refusals(name)
            lines.append(f"  {name}: {reasons[0] if reasons else 'could run it'}")
    return "\n".join(lines)


def summary(runtime: Runtime) -> str:
    """Layers with their outputs and numbers of parameters."""
    builder = runtime.builder
    rows = [("layer", "type", "output", "parameters")]
    sizes = {name: math.prod(s.buffer.shape) for name, s in builder.segments.items()}
    for (name, layer), width, tensors in zip(builder.layers, builder.outputs, builder.tensors, strict=True):
        count = sum(sizes.get(tensor, 0) for tensor in tensors)
        rows.append((name, type(layer).__name__, f"(N, {width})", f"{count:,}"))
    widths = [max(len(r[k]) for r in rows) for k in range(4)]
    lines = [f"{r[0]:<{widths[0]}}  {r[1]:<{widths[1]}}  {r[2]:<{widths[2]}}  {r[3]:>{widths[3]}}" for r in rows]
    settings = f"{runtime.settings.dtype}, back end {runtime.wanted()}"
    lines.append(f"{sum(sizes.values()):,} parameters, input (N, {builder.width}), {settings}")
    return "\n".join(lines)
