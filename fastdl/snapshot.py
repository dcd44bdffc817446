"""Everything that a net is at one moment: what files, copies and pickles hold.

A file keeps the description as JSON beside the tensors (`fastdl.run.checkpoint`). What an optimiser remembers stands
there as ``optimizer/<state>/<parameter>``, so that a net that is loaded goes on as if nothing had happened.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fastdl import config, losses, optimizers
from fastdl.builder import Builder, named
from fastdl.checks import whole
from fastdl.inputs import whole_number
from fastdl.kernels import dispatch
from fastdl.layers.base import Layer, from_config
from fastdl.run.runtime import Runtime
from fastdl.run.settings import Settings, cannot_run
from fastdl.run.state import TrainState

#: Layers of a net that a file may describe: more are not a net, but a way to keep the reader busy.
MOST_LAYERS = 10_000
#: Where the tensors of the optimiser stand, and gradients that wait for the update. Names of layers end in a number, so
#: none begins like this.
MOMENTS, GRADIENTS = "optimizer", "gradients"


def read(runtime: Runtime, moments: bool, gradients: bool) -> dict[str, np.ndarray]:
    """Copies of a net's tensors in plain layout."""
    memory = runtime.memory
    memory.pull()
    parameters, states = memory.parameters, memory.states
    own = parameters.layout.offsets
    tensors = {name: (parameters if name in own else states).read(name) for name in runtime.builder.names}
    for key, values in memory.moments.items() if moments else ():
        tensors |= {f"{MOMENTS}/{key}/{name}": parameters.read(name, values) for name in own}
    if gradients:
        tensors |= {f"{GRADIENTS}/{name}": parameters.read(name, memory.gradients) for name in own}
    return tensors


@dataclass(frozen=True)
class Snapshot:
    """Everything that a net is at one moment. ``width`` is None before it knows its input."""

    layers: list[Layer]
    seed: int
    width: int | None
    settings: Settings
    state: TrainState
    tensors: dict[str, np.ndarray]
    feature_names: list[str] | None
    extra: dict[str, Any]
    attributes: dict[str, Any] = field(default_factory=dict)  #: of a user's own; they are no part of a file

    def write(self, runtime: Runtime) -> None:
        """Put all tensors back; without moments the optimiser starts anew."""
        memory = runtime.memory
        for name, value in self.tensors.items():
            kind, _, rest = name.partition("/")
            if kind == GRADIENTS:
                memory.parameters.write(rest, value, memory.gradients)
            elif kind == MOMENTS:
                key, _, parameter = rest.partition("/")
                memory.parameters.write(parameter, value, memory.moments[key])
            else:
                (memory.parameters if name in memory.parameters.layout.offsets else memory.states).write(name, value)
        memory.changed()

    # ------------------------------------------------------------------ from and into a file
    def describe(self) -> dict[str, Any]:
        """JSON values; `from_description` reads them.

        Raises
        ------
        ValueError
            For a loss that is none of the library's: a file could not name it.
        """
        loss, optimizer = self.settings.loss, self.settings.optimizer
        if loss is not None and losses.KNOWN.get(loss.name) != loss:
            raise ValueError(
                f"loss: expected one of {', '.join(sorted(losses.KNOWN))} in a model file, found {loss.name!r}; "
                "compile with a loss of the library before save, or keep the weights of get_state()"
            )
        return {
            "layers": [layer.get_config() for layer in self.layers],
            "seed": self.seed,
            "width": self.width,
            "dtype": self.settings.dtype,
            "state": self.state.to_config(),
            "loss": None if loss is None else loss.name,
            "optimizer": None if optimizer is None else optimizer.to_config(),
            "feature_names": self.feature_names,
            "extra": self.extra,
        }

    @classmethod
    def from_description(
        cls,
        description: Mapping[str, Any],
        tensors: dict[str, np.ndarray],
        version: int,
        backend: str,
        threads: int | str,
        dtype: str | None,
    ) -> Snapshot:
        """What a file holds, checked on paper: no memory is asked for that the file does not have.

        Raises
        ------
        KeyError, TypeError, ValueError, AttributeError
            The description does not fit itself, or the tensors.
        BackendUnavailable
        """
        configs = description["layers"]
        if len(configs) > MOST_LAYERS:
            raise ValueError(f"expected at most {MOST_LAYERS} layers, found {len(configs)}")
        layers = [from_config(c) for c in configs]
        width = whole_number(description["width"], "width")
        optimizer = description["optimizer"]
        optimizer = optimizers.get("adam") if optimizer is None else optimizers.from_config(optimizer)
        note = ""
        if dtype is None:
            dtype = description["dtype"]
            why = cannot_run(dtype, config.resolve_backend(None, backend)) if dtype == dispatch.MIXED else None
            if why:
                dtype, note = "float32", f"float32 instead of the file's {dtype}: {why}"
        settings = Settings.checked(description["loss"], optimizer, backend, threads, dtype, True, note)
        if version == 1:  # weights and counters alone: the optimiser starts anew
            counters = {"step": description["step"], "epoch": description["epoch"], "lr": optimizer.lr}
            state = TrainState.from_config({**TrainState().to_config(), **counters})
        else:
            state = TrainState.from_config(description["state"])
        extra = description["extra"]
        if not isinstance(extra, dict):
            raise TypeError(f"extra: expected a mapping, found {type(extra).__name__}")
        names = description.get("feature_names")
        if names is not None and not (
            isinstance(names, list) and len(names) == width and all(isinstance(n, str) for n in names)
        ):
            raise ValueError(f"feature_names: expected {width} names, found {names!r:.80}")
        seed = whole(description["seed"], "seed", 64)
        snapshot = cls(layers, seed, width, settings, state, tensors, names, extra)
        if snapshot._check_tensors():
            return snapshot
        return replace(snapshot, state=replace(state, update=0))  # the optimiser starts anew

    def _check_tensors(self) -> bool:
        """Whether the optimiser's tensors are all there; an error where the tensors are not those of the layers."""
        builder = Builder(named(self.layers), self.width, self.seed, self.settings.dtype)
        parameters = {name: s.buffer.shape for name, s in builder.segments.items()}
        shapes = parameters | {name: s.buffer.shape for name, s in builder.states.items()}
        kinds = {name.partition("/")[0] for name in self.tensors}
        kept, moments = self.settings.optimizer.states, MOMENTS in kinds
        for prefix in [f"{MOMENTS}/{key}" for key in kept if moments] + [GRADIENTS] * (GRADIENTS in kinds):
            shapes |= {f"{prefix}/{name}": shape for name, shape in parameters.items()}
        if other := set(self.tensors) ^ set(shapes):
            raise ValueError(f"tensors {sorted(other)[:10]} do not match the layers")
        for name, shape in shapes.items():
            value = self.tensors[name]
            if value.shape != shape or value.dtype.kind != "f":
                raise ValueError(f"{name}: expected floats of shape {shape}, found {value.dtype} {value.shape}")
        return moments or not kept
