"""From layers to calls.

A layer names its parameters and its forward op. The backward calls follow from the registry: the gradient ops of a
forward op name their arrays after it (``dy`` is the gradient of its output ``y``, ``dx`` of its input ``x``, a shared
name is the same array), so nothing about a backward pass is written twice.
"""

from __future__ import annotations

from typing import Any

from fastdl.initializers import Initializer
from fastdl.kernels import registry
from fastdl.program import Buffer, Call, Segment


class Trace:
    """Collects calls, parameters and states while the layers of a model are walked.

    Parameters
    ----------
    training : bool
    seed : int
        Key of the model's random streams.
    segments, states : dict, optional
        Those of an earlier trace of the same model: train and predict Programs share them.
    """

    def __init__(
        self,
        training: bool,
        seed: int,
        segments: dict[str, Segment] | None = None,
        states: dict[str, Segment] | None = None,
    ) -> None:
        self.training, self.seed = training, seed
        self.segments = {} if segments is None else segments
        self.states = {} if states is None else states
        self.calls: list[Call] = []
        self.made: list[str] = []  #: names of the tensors that this trace was the first to ask for
        self._tape: list[Call] = []
        self._used: set[Buffer] = set()
        self._names: dict[str, int] = {}
        self._stochastic = 0
        self._gradients: dict[Buffer, Buffer] = {}

    # ------------------------------------------------------------------ what a layer may ask for
    def parameter(self, name: str, shape: tuple[int, ...], initializer: Initializer, decay: bool) -> Buffer:
        """A trainable tensor; ``decay`` says whether weight decay and l2 apply to it."""
        return self._segment(self.segments, name, shape, initializer, decay, "parameter")

    def state(self, name: str, shape: tuple[int, ...], initializer: Initializer) -> Buffer:
        """A tensor that training updates without a gradient, e.g. running statistics."""
        return self._segment(self.states, name, shape, initializer, False, "state")

    def _segment(
        self,
        table: dict[str, Segment],
        name: str,
        shape: tuple[int, ...],
        initializer: Initializer,
        decay: bool,
        kind: str,
    ) -> Buffer:
        found = table.get(name)
        if found is None:
            found = table[name] = Segment(Buffer(name, shape, kind), initializer, decay)
            self.made.append(name)
        elif found.buffer.shape != shape:
            raise ValueError(f"{name}: expected shape {found.buffer.shape} as built, found {shape}")
        return found.buffer

    def batch(self, name: str, *shape: int, dtype: str = "T") -> Buffer:
        """A buffer with one entry per row."""
        return Buffer(self._unique(name), shape, "batch", dtype)

    def cell(self, name: str, *shape: int, dtype: str = "T") -> Buffer:
        """A buffer of a fixed size."""
        return Buffer(self._unique(name), shape, "cell", dtype)

    def next_stochastic(self) -> int:
        """Ordinal of the next stochastic layer: its stream in the random contract."""
        self._stochastic += 1
        return self._stochastic - 1

    def call(
        self, op: str, params: dict[str, Any] | None = None, phase: str = "forward", **buffers: Buffer | None
    ) -> Call:
        """Append a call; a forward call with gradients is remembered for `backward`.

        Raises
        ------
        ValueError
            A parameter is used a second time: each use would need a gradient of its own, and they would have to be
            added.
        """
        made = Call(op, buffers, params or {}, phase)
        self.calls.append(made)
        if phase == "forward" and self.training:
            self._tape.append(made)
            for parameter in dict.fromkeys(b for b in made.reads if b.kind == "parameter"):
                if parameter in self._used:
                    raise ValueError(
                        f"{parameter.name}: expected a parameter to be used once, found a second use in {op}; "
                        "give each use a parameter of its own"
                    )
                self._used.add(parameter)
        return made

    def undo(self, op: str) -> Buffer:
        """Take back the last call of ``op``, which only copies may follow; returns what it would have read."""
        while True:
            last = self.calls.pop()
            if self.training:
                self._tape.pop()
            if last.op == op:
                return last.buffers["x"]

    # ------------------------------------------------------------------ backward
    def gradient_of(self, buffer: Buffer) -> Buffer:
        """The buffer of a gradient: one per parameter in the gradient arena, one per batch buffer."""
        found = self._gradients.get(buffer)
        if found is None:
            kind = "gradient" if buffer.kind == "parameter" else "batch"
            found = self._gradients[buffer] = Buffer(f"d {buffer.name}", buffer.shape, kind)
        return found

    def backward(self, output: Buffer, stop: Buffer | None) -> None:
        """Append the backward calls of everything on the tape.

        Parameters
        ----------
        output : Buffer
            Its gradient is where the backward pass starts.
        stop : Buffer or None
            The net's input when its gradient is not asked for; calls that give nothing else are left out.
        """
        known = {output}
        for forward in reversed(self._tape):
            spec = forward.spec
            produced = [forward.buffers.get(a.name) for a in spec.arrays if a.role == "out"]
            if not any(b in known for b in produced):
                continue
            for op in spec.gradients:
                self._backward_call(forward, registry.spec(op), stop)
            for array in spec.arrays:
                buffer = forward.buffers.get(array.name)
                if buffer is not None and array.role == "in" and buffer.kind == "batch":
                    if buffer in known:
                        raise ValueError(
                            f"{buffer.name} has more than one reader; its gradients would have to be added"
                        )
                    known.add(buffer)

    def _backward_call(self, forward: Call, spec: registry.OpSpec, stop: Buffer | None) -> None:
        inputs = {a.name for a in forward.spec.arrays if a.role != "out"}
        outputs = {a.name for a in forward.spec.arrays if a.role == "out"}
        buffers: dict[str, Buffer | None] = {}
        wanted = False
        for array in spec.arrays:
            base = array.name[1:]
            if array.optional and array.name in outputs:
                continue  # a help that fusion hands over where it pays: it lengthens the output's life
            if array.name in forward.buffers:
                buffers[array.name] = forward.buffers[array.name]
            elif array.role == "in" and base in outputs:
                buffers[array.name] = self.gradient_of(forward.buffers[base])
            elif array.role == "out" and base in inputs and forward.buffers.get(base) is not None:
                source = forward.buffers[base]
                buffers[array.name] = self.gradient_of(source)
                wanted = wanted or source is not stop
        if wanted:
            names = {p.name for p in spec.params}
            params = {k: v for k, v in forward.params.items() if k in names}
            self.calls.append(Call(spec.name, buffers, params, "backward"))

    def _unique(self, name: str) -> str:
        count = self._names.get(name, 0)
        self._names[name] = count + 1
        return name if not count else f"{name}.{count}"
