"""Programs of a model: training steps, loops of the user's own, prediction, evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastdl.fuse import fuse
from fastdl.kernels import dispatch
from fastdl.layers.base import Layer
from fastdl.layout import DEVICE_MULTIPLE, ArenaLayout, Layout
from fastdl.losses import Loss
from fastdl.optimizers import Optimizer
from fastdl.program import Buffer, Call, Program, Segment
from fastdl.trace import Trace


def named(layers: Sequence[Layer]) -> list[tuple[str, Layer]]:
    """Layers with their names in a model: ``dense_0``, ``dense_1``, ..."""
    counts: dict[str, int] = {}
    pairs = []
    for layer in layers:
        number = counts.get(layer.prefix, 0)
        counts[layer.prefix] = number + 1
        pairs.append((f"{layer.prefix}_{number}", layer))
    return pairs


@dataclass(frozen=True)
class Feed:
    """Where a step's rows come from.

    ``rows`` of a data set are gathered by the epoch's permutation when it is positive; 0 means that the caller hands
    over one batch at a time. ``labels``: targets are class numbers (N,), not values (N, O).
    """

    rows: int = 0
    shuffle: bool = True
    weighted: bool = False
    labels: bool = False


class Builder:
    """Traces a model's layers into Programs, on paper.

    Parameters
    ----------
    layers : list of (name, Layer)
    width : int
        Features of the input.
    seed : int
    dtype : {"float32", "float64", "mixed_bfloat16"}
    """

    def __init__(self, layers: list[tuple[str, Layer]], width: int, seed: int, dtype: str) -> None:
        self.layers, self.width, self.seed = layers, width, seed
        self.mixed = dtype == dispatch.MIXED
        self.dtype = np.dtype(np.float32 if self.mixed else dtype)
        self.segments: dict[str, Segment] = {}
        self.states: dict[str, Segment] = {}
        trace = Trace(True, seed, self.segments, self.states)
        #: width of each layer's output
        self.outputs: list[int] = []
        #: names of each layer's parameters and running statistics
        self.tensors: list[list[str]] = []
        x = trace.batch("x", width)
        for name, layer in layers:
            first = len(trace.made)
            x = layer.trace(trace, x, name)
            self.outputs.append(x.shape[0])
            self.tensors.append(trace.made[first:])
        #: the op that makes the output, in training
        self.last_op = next((c.op for c in reversed(trace.calls) if c.op != "identity_forward"), "")

    @property
    def names(self) -> list[str]:
        """Names of all parameters and running statistics, layer by layer."""
        return [name for names in self.tensors for name in names]

    @property
    def out_width(self) -> int:
        return self.outputs[-1] if self.outputs else self.width

    def _walk(self, trace: Trace, x: Buffer) -> Buffer:
        """Trace every layer; the output of the last."""
        for name, layer in self.layers:
            x = layer.trace(trace, x, name)
        return x

    # ------------------------------------------------------------------ memory
    def layout(self, backend: str, mixed: bool | None = None) -> Layout:
        """How a back end lays the model out; ``mixed`` is that of the model unless given."""
        device = backend == "cuda"
        panel_layout, multiple = backend == "cython", DEVICE_MULTIPLE if device else 1
        parameters = ArenaLayout(self.segments.values(), panel_layout, multiple)
        states = ArenaLayout(self.states.values(), panel_layout, multiple)
        mixed = self.mixed if mixed is None else mixed
        return Layout(parameters, states, self.dtype, panel_layout, mixed, device)

    # ------------------------------------------------------------------ programs
    def _trace(self, training: bool) -> tuple[Trace, Buffer, Buffer]:
        trace = Trace(training, self.seed, self.segments, self.states)
        x = trace.batch("x", self.width)
        return trace, x, self._walk(trace, x)

    def _feed(self, x: Buffer, feed: Feed, loss: Loss | None) -> tuple[list[Call], dict[str, Buffer | None]]:
        """Calls that bring a batch in, and the buffers: x, targets, weight (slots) and those that the loss reads."""
        whole = feed.rows > 0
        source = Buffer("X", (feed.rows, self.width) if whole else (self.width,), "slot")
        found: dict[str, Buffer | None] = {"x": source, "targets": None, "weight": None, "weight_slot": None}
        calls: list[Call] = []
        width, kind = ((), "i8") if feed.labels else ((self.out_width,), "T")
        if not whole:
            calls.append(Call("identity_forward", {"x": source, "y": x}, {}, "feed"))
            if loss is not None:
                found["targets"] = found["target_slot"] = Buffer("targets", width, "slot", kind)
                if feed.weighted:
                    found["weight"] = found["weight_slot"] = Buffer("weight", (), "slot")
            return calls, found
        index = Buffer("index", (), "batch", "i8")
        if feed.shuffle:
            calls.append(Call("epoch_indices", {"index": index}, {"n": feed.rows, "seed": self.seed}, "feed"))
        else:
            calls.append(Call("row_range", {"index": index}, {}, "feed"))
        calls.append(Call("gather_rows", {"source": source, "index": index, "out": x}, {}, "feed"))
        found["target_slot"] = Buffer("Y", (feed.rows, *width), "slot", kind)
        found["targets"] = Buffer("targets", width, "batch", kind)
        op = "gather_labels" if feed.labels else "gather_rows"
        calls.append(Call(op, {"source": found["target_slot"], "index": index, "out": found["targets"]}, {}, "feed"))
        if feed.weighted:
            found["weight_slot"] = Buffer("sample_weight", (feed.rows,), "slot")
            found["weight"] = Buffer("weight", (), "batch")
            buffers = {"source": found["weight_slot"], "index": index, "out": found["weight"]}
            calls.append(Call("gather_values", buffers, {}, "feed"))
        return calls, found

    def _scores(self, trace: Trace, y: Buffer, loss: Loss) -> Buffer:
        """What the loss reads: where the net ends with the activation that the loss applies itself, what goes into it.

        The loss of softmax's input is exact where that of its output underflows; `predict` has the activation.
        """
        op = f"{loss.activation}_forward"
        return trace.undo(op) if op == self.last_op else y

    def _loss(self, loss: Loss, z: Buffer, fed: dict[str, Buffer | None], dz: Buffer | None) -> Call:
        stats = Buffer("loss", (3,), "cell", "f8")
        buffers = {"z": z, "targets": fed["targets"], "weight": fed["weight"], "stats": stats, "dz": dz}
        soft = loss.onehot_op is not None and fed["targets"].dtype == "T"
        return Call(loss.onehot_op if soft else loss.op, buffers, {}, "loss")

    def _update(self, optimizer: Optimizer, layout: Layout) -> list[Call]:
        """One sweep per group of settings over the flat arenas, clipped by the global norm if asked for."""
        arena = layout.parameters
        calls, scale = [], None

        def flat(name: str, span: tuple[str, int, int]) -> Buffer:
            return Buffer(name, (span[2] - span[1],), "flat", span=span)

        if optimizer.clip_norm is not None:
            total, scale = Buffer("squared norm", (1,), "cell", "f8"), Buffer("clip scale", (1,), "cell", "f8")
            g = flat("gradients", ("gradients", 0, arena.size))
            calls.append(Call("squared_norm", {"g": g, "total": total}, {}, "update"))
            params = {"max_norm": float(optimizer.clip_norm)}
            calls.append(Call("clip_scale", {"total": total, "scale": scale}, params, "update"))
        for group, first, last in (("kernels", 0, arena.group_end), ("vectors", arena.group_end, arena.size)):
            if first == last:
                continue
            params = dict(optimizer.params())
            if group == "vectors":  # no decay on biases, batch normalisation and slopes
                params |= {"l2": 0.0, "weight_decay": 0.0}
            buffers = {
                "w": flat(group, ("parameters", first, last)),
                "g": flat(f"d {group}", ("gradients", first, last)),
                "clip": scale,
                **{name: flat(f"{name} {group}", (name, first, last)) for name in optimizer.states},
            }
            calls.append(Call(optimizer.op, buffers, params, "update"))
        return calls

    def train(
        self,
        rows: int,
        feed: Feed,
        loss: Loss,
        optimizer: Optimizer,
        layout: Layout,
        fused: bool = True,
    ) -> tuple[Program, dict[str, Any]]:
        """Feed, forward, loss, backward, update: a whole training step."""
        trace, x, y = self._trace(True)
        y = self._scores(trace, y, loss)
        calls, fed = self._feed(x, feed, loss)
        calls += trace.calls
        calls.append(self._loss(loss, y, fed, trace.gradient_of(y)))
        trace.calls = []
        trace.backward(y, x)
        calls += trace.calls + self._update(optimizer, layout)
        return self._program("training", rows, calls, layout, fused), {**fed, "y": y}

    def loop(
        self,
        rows: int,
        optimizer: Optimizer | None,
        layout: Layout,
        fused: bool = True,
    ) -> tuple[Program, dict[str, Any]]:
        """Forward, backward to the input and update, for loops of the user's own."""
        trace, x, y = self._trace(True)
        calls, fed = self._feed(x, Feed(), None)
        calls += trace.calls
        dy = Buffer("dY", (self.out_width,), "slot")
        calls.append(Call("identity_forward", {"x": dy, "y": trace.gradient_of(y)}, {}, "backward"))
        trace.calls = []
        trace.backward(y, None)
        calls += trace.calls
        if optimizer is not None:
            calls += self._update(optimizer, layout)
        found = {**fed, "y": y, "dy": dy, "dx": trace.gradient_of(x)}
        return self._program("loop", rows, calls, layout, fused), found

    def predict(self, rows: int, layout: Layout, fused: bool = True) -> tuple[Program, dict[str, Any]]:
        """Forward from the caller's rows into the result's: nothing is copied at either end."""
        trace = Trace(False, self.seed, self.segments, self.states)
        x, y = Buffer("X", (self.width,), "slot"), Buffer("Y", (self.out_width,), "slot")
        rounds = layout.mixed and layout.device  # slots are float32, what lies between them bfloat16
        first = trace.batch("x", self.width) if rounds else x
        if rounds:
            trace.call("identity_forward", phase="feed", x=x, y=first)
        last = self._walk(trace, first)
        if rounds or last is x:  # or no layer does anything here
            trace.call("identity_forward", x=last, y=y)
            calls = trace.calls
        else:
            calls = [
                replace(c, buffers={name: y if b is last else b for name, b in c.buffers.items()}) for c in trace.calls
            ]
        return self._program("predict", rows, calls, layout, fused), {"x": x, "y": y}

    def evaluate(
        self, rows: int, feed: Feed, loss: Loss, layout: Layout, fused: bool = True
    ) -> tuple[Program, dict[str, Any]]:
        """Forward with running statistics, and the loss without its gradient."""
        trace, x, y = self._trace(False)
        y = self._scores(trace, y, loss)
        calls, fed = self._feed(x, feed, loss)
        calls += trace.calls
        calls.append(self._loss(loss, y, fed, None))
        return self._program("evaluate", rows, calls, layout, fused), {**fed, "y": y}

    def _program(self, name: str, rows: int, calls: list[Call], layout: Layout, fused: bool) -> Program:
        program = Program(name, rows, calls, self.dtype.itemsize)
        return fuse(program, layout.panel_layout, layout.device) if fused else program
