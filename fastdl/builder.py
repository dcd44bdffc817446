"""Programs of a model: training steps, loops of the user's own, prediction, evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastdl.fuse import fuse
from fastdl.kernels import dispatch
from fastdl.layers.base import Layer
from fastdl.losses import Loss
from fastdl.optimizers import Optimizer
from fastdl.program import Buffer, Call, Program, Segment
from fastdl.run.arena import Arena, aligned
from fastdl.run.bind import bind
from fastdl.run.executor import Executor
from fastdl.run.storage import Memory
from fastdl.trace import Trace

#: Elements between the starts of two parameters on a GPU: a line of 128 bytes, of a bfloat16 copy too.
DEVICE_MULTIPLE = 64


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


@dataclass
class Bound:
    """An executor with the buffers that its user needs to know."""

    executor: Executor
    x: Buffer  # slot
    y: Buffer  # output of the last layer; a slot for prediction
    direct: Callable[[Any], np.ndarray | None] | None = None  # predict's shorter way, see Executor.direct
    targets: Buffer | None = None  # slot
    weight: Buffer | None = None  # slot
    dy: Buffer | None = None  # slot
    dx: Buffer | None = None

    def feed(self, x: np.ndarray, targets: np.ndarray, weight: np.ndarray | None) -> None:
        """Bind the caller's arrays: a data set or one batch."""
        self.executor.slot(self.x, x)
        self.executor.slot(self.targets, targets)
        if weight is not None:
            self.executor.slot(self.weight, weight)


class Builder:
    """Traces a model's layers into Programs and keeps its memory.

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
        self.outputs = [b.shape[0] for b in self._walk(trace, trace.batch("x", width))]

    @property
    def out_width(self) -> int:
        return self.outputs[-1] if self.outputs else self.width

    def _walk(self, trace: Trace, x: Buffer) -> list[Buffer]:
        """Trace every layer; the output of each."""
        outputs = []
        for name, layer in self.layers:
            x = layer.trace(trace, x, name)
            outputs.append(x)
        return outputs

    # ------------------------------------------------------------------ memory
    def memory(
        self, panel_layout: bool, optimizer: Optimizer | None, device: Any = None
    ) -> tuple[Memory, dict[str, np.ndarray]]:
        """Arenas for this model: parameters and states, zero gradients, zero optimiser states.

        With a ``device`` they have a copy in its memory.
        """
        multiple = 1 if device is None else DEVICE_MULTIPLE
        parameters = Arena(list(self.segments.values()), self.dtype, panel_layout, multiple)
        states = Arena(list(self.states.values()), self.dtype, panel_layout, multiple)
        gradients = aligned(parameters.size, self.dtype)
        version, mirror = np.zeros(1, np.int64), None
        if device is not None:
            from fastdl.cuda.mirror import Mirror

            mirror = Mirror(device, version)
        memory = Memory(
            parameters,
            gradients,
            states,
            self.dtype,
            panel_layout,
            {},
            mixed=self.mixed,
            mirror=mirror,
            version=version,
        )
        moments = {name: aligned(parameters.size, self.dtype) for name in (optimizer.states if optimizer else ())}
        return memory, moments

    # ------------------------------------------------------------------ programs
    def _trace(self, training: bool) -> tuple[Trace, Buffer, Buffer]:
        trace = Trace(training, self.seed, self.segments, self.states)
        x = trace.batch("x", self.width)
        outputs = self._walk(trace, x)
        return trace, x, outputs[-1] if outputs else x

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

    def _loss(self, loss: Loss, z: Buffer, fed: dict[str, Buffer | None], dz: Buffer | None) -> Call:
        stats = Buffer("loss", (3,), "cell", "f8")
        buffers = {"z": z, "targets": fed["targets"], "weight": fed["weight"], "stats": stats, "dz": dz}
        soft = loss.onehot_op is not None and fed["targets"].dtype == "T"
        return Call(loss.onehot_op if soft else loss.op, buffers, {}, "loss")

    def _update(self, optimizer: Optimizer, memory: Memory, moments: dict[str, np.ndarray]) -> list[Call]:
        """One sweep per group of settings over the flat arenas, clipped by the global norm if asked for."""
        arena = memory.parameters
        calls, scale = [], None

        def flat(name: str, values: np.ndarray, first: int, last: int) -> Buffer:
            buffer = Buffer(name, (last - first,), "flat")
            memory.flats[buffer] = values[first:last]
            return buffer

        if optimizer.clip_norm is not None:
            total, scale = Buffer("squared norm", (1,), "cell", "f8"), Buffer("clip scale", (1,), "cell", "f8")
            g = flat("gradients", memory.gradients, 0, arena.size)
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
                "w": flat(f"{group}", arena.values, first, last),
                "g": flat(f"d {group}", memory.gradients, first, last),
                "clip": scale,
                **{name: flat(f"{name} {group}", values, first, last) for name, values in moments.items()},
            }
            calls.append(Call(optimizer.op, buffers, params, "update"))
        return calls

    def train(
        self,
        rows: int,
        feed: Feed,
        loss: Loss,
        optimizer: Optimizer,
        memory: Memory,
        moments: dict[str, np.ndarray],
        fused: bool = True,
    ) -> tuple[Program, dict[str, Any]]:
        """Feed, forward, loss, backward, update: a whole training step."""
        trace, x, y = self._trace(True)
        calls, fed = self._feed(x, feed, loss)
        calls += trace.calls
        calls.append(self._loss(loss, y, fed, trace.gradient_of(y)))
        trace.calls = []
        trace.backward(y, x)
        calls += trace.calls + self._update(optimizer, memory, moments)
        return self._program("training", rows, calls, memory, fused), {**fed, "y": y}

    def loop(
        self,
        rows: int,
        optimizer: Optimizer | None,
        memory: Memory,
        moments: dict[str, np.ndarray],
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
            calls += self._update(optimizer, memory, moments)
        found = {**fed, "y": y, "dy": dy, "dx": trace.gradient_of(x)}
        return self._program("loop", rows, calls, memory, fused), found

    def predict(self, rows: int, memory: Memory, fused: bool = True) -> tuple[Program, dict[str, Any]]:
        """Forward from the caller's rows into the result's: nothing is copied at either end."""
        trace = Trace(False, self.seed, self.segments, self.states)
        x, y = Buffer("X", (self.width,), "slot"), Buffer("Y", (self.out_width,), "slot")
        rounds = memory.mixed and memory.mirror is not None  # slots are float32, what lies between them bfloat16
        first = trace.batch("x", self.width) if rounds else x
        if rounds:
            trace.call("identity_forward", phase="feed", x=x, y=first)
        last = [first, *self._walk(trace, first)][-1]
        if rounds or last is x:  # or no layer does anything here
            trace.call("identity_forward", x=last, y=y)
            calls = trace.calls
        else:
            calls = [
                replace(c, buffers={name: y if b is last else b for name, b in c.buffers.items()}) for c in trace.calls
            ]
        return self._program("predict", rows, calls, memory, fused), {"x": x, "y": y}

    def evaluate(
        self, rows: int, feed: Feed, loss: Loss, memory: Memory, fused: bool = True
    ) -> tuple[Program, dict[str, Any]]:
        """Forward with running statistics, and the loss without its gradient."""
        trace, x, y = self._trace(False)
        calls, fed = self._feed(x, feed, loss)
        calls += trace.calls
        calls.append(self._loss(loss, y, fed, None))
        return self._program("evaluate", rows, calls, memory, fused), {**fed, "y": y}

    def _program(self, name: str, rows: int, calls: list[Call], memory: Memory, fused: bool) -> Program:
        program = Program(name, rows, calls, self.dtype.itemsize)
        return fuse(program, memory.panel_layout, memory.mirror is not None) if fused else program

    def bound(self, made: tuple[Program, dict[str, Any]], memory: Memory, backend: str, threads: int) -> Bound:
        """Bind a Program that this builder made."""
        program, found = made
        keep = [b for b in (found["y"], found.get("dx")) if b is not None]
        executor = bind(program, memory, backend, threads, keep)
        return Bound(
            executor,
            found["x"],
            found["y"],
            targets=found.get("target_slot"),
            weight=found.get("weight_slot"),
            dy=found.get("dy"),
            dx=found.get("dx"),
        )
