"""The layer contract: a layer says what, and never touches an array."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from fastdl import initializers
from fastdl.described import Described
from fastdl.program import Buffer
from fastdl.trace import Trace

#: Layer classes by name, for model files and `Activation(name)`.
CLASSES: dict[str, type[Layer]] = {}


@dataclasses.dataclass(eq=False)
class Layer(Described):
    """Base of all layers.

    A subclass is a dataclass of its settings and has a method ``trace(t, x, name) -> y`` that names parameters and
    calls through the `Trace` ``t``. Settings are fixed when the layer is made.
    """

    #: Prefix of the layer's name in a model: ``dense`` gives ``dense_0``, ``dense_1``, ...
    prefix: ClassVar[str] = "layer"

    def __init_subclass__(cls, abstract: bool = False, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not abstract:
            CLASSES[cls.__name__] = cls

    def trace(self, t: Trace, x: Buffer, name: str) -> Buffer:
        """Add this layer's forward calls and return its output."""
        own = type(self).__name__
        known = ", ".join(sorted(name for name in CLASSES if name != own))
        raise TypeError(f"{own} has no trace(t, x, name), which says what a layer does; write one, or use {known}")

    def get_config(self) -> dict[str, Any]:
        """Settings as JSON values, with the class name."""
        config: dict[str, Any] = {"class": type(self).__name__}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            config[field.name] = value.to_config() if isinstance(value, initializers.Initializer) else value
        return config


def from_config(config: dict[str, Any]) -> Layer:
    """The layer that `Layer.get_config` described."""
    settings = dict(config)
    name = settings.pop("class", None)
    if name not in CLASSES:
        raise ValueError(f"unknown layer {name!r}, known: {', '.join(sorted(CLASSES))}")
    cls = CLASSES[name]
    known = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise ValueError(f"layer {name}: unknown settings {unknown}, known: {sorted(known)}")
    made = {k: initializers.from_config(v) if k.endswith("_initializer") else v for k, v in settings.items()}
    return cls(**made)


def width_of(x: Buffer, layer: str) -> int:
    """Number of features of a batch buffer."""
    if len(x.shape) != 1:
        raise ValueError(
            f"{layer}: expected an input of shape (N, features), found (N, {', '.join(map(str, x.shape))})"
        )
    return x.shape[0]
