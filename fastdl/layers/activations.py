"""One layer class per activation of the registry.

An activation is written down once, in ``kernels/activations``; its class (``layers.ReLU``, ``layers.ELU(alpha=1.0)``)
is made here from that entry.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from fastdl import checks, initializers
from fastdl.initializers import Initializer
from fastdl.kernels.activations.reference import ACTIVATIONS
from fastdl.layers.base import CLASSES, Layer, width_of
from fastdl.program import Buffer
from fastdl.trace import Trace


def _trace(op: str, params: dict[str, Any], t: Trace, x: Buffer, name: str, **more: Buffer) -> Buffer:
    y = t.batch(name, *x.shape)
    t.call(f"{op}_forward", params, x=x, y=y, **more)
    return y


@dataclasses.dataclass(eq=False)
class Elementwise(Layer, abstract=True):
    """Base of the layers that apply one activation to every element."""

    activation: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if hasattr(self, "alpha"):
            alpha = checks.FINITE.check(self.alpha, f"{type(self).__name__} alpha")
            self.alpha = ACTIVATIONS[self.activation].checked_alpha(alpha)

    def trace(self, t: Trace, x: Buffer, name: str) -> Buffer:
        params = {"alpha": self.alpha} if hasattr(self, "alpha") else {}
        return _trace(self.activation, params, t, x, name)


@dataclasses.dataclass(eq=False)
class PReLU(Layer):
    """max(0, x) + slope * min(0, x) with one learned slope per channel (He et al. 2015).

    Parameters
    ----------
    slope_initializer : str, float or Initializer
        0.25 by default. No weight decay applies to slopes.
    """

    prefix: ClassVar[str] = "prelu"
    slope_initializer: str | float | Initializer = 0.25

    def __post_init__(self) -> None:
        self.slope_initializer = initializers.get(self.slope_initializer)

    def trace(self, t: Trace, x: Buffer, name: str) -> Buffer:
        slope = t.parameter(f"{name}/slope", (width_of(x, name),), self.slope_initializer, decay=False)
        return _trace("prelu", {}, t, x, name, slope=slope)


@dataclasses.dataclass(eq=False)
class GELU(Layer):
    """x Phi(x) with the normal distribution function Phi (Hendrycks & Gimpel 2016).

    Parameters
    ----------
    approximate : {"none", "tanh"}
        "none" uses erf (PyTorch's and Keras' default), "tanh" the formula that JAX takes by default; they differ by at
        most 4.7e-4.
    """

    prefix: ClassVar[str] = "gelu"
    approximate: str = "none"

    def __post_init__(self) -> None:
        if not isinstance(self.approximate, str) or self.approximate not in ("none", "tanh"):
            raise ValueError(f"GELU approximate: expected 'none' or 'tanh', found {self.approximate!r}")
        self.approximate = str(self.approximate)

    def trace(self, t: Trace, x: Buffer, name: str) -> Buffer:
        return _trace("gelu" if self.approximate == "none" else "gelu_tanh", {}, t, x, name)


def _make(name: str) -> type[Layer]:
    """The layer class of an activation without settings of its own but ``alpha``."""
    info = ACTIVATIONS[name]
    fields = [] if info.alpha is None else [("alpha", float, dataclasses.field(default=info.alpha))]
    cls = dataclasses.make_dataclass(
        info.layer, fields, bases=(Elementwise,), namespace={"activation": name, "prefix": name}, eq=False
    )
    cls.__module__ = __name__
    cls.__doc__ = f"{info.summary}\n\n{info.formula}\n\nSource: {info.source}"
    CLASSES[cls.__name__] = cls
    return cls


#: Layer class of every activation, by the activation's name.
BY_NAME: dict[str, type[Layer]] = {}
for _name, _info in ACTIVATIONS.items():
    if _info.layer not in globals():
        globals()[_info.layer] = _make(_name)
    BY_NAME[_name] = globals()[_info.layer]


def Activation(name: str) -> Layer:
    """The layer of an activation with its default settings.

    Raises
    ------
    ValueError
        For an unknown name; the known ones are listed.
    """
    if not isinstance(name, str) or name not in BY_NAME:
        raise ValueError(f"unknown activation {name!r}, known: {', '.join(BY_NAME)}")
    return GELU(approximate="tanh") if name == "gelu_tanh" else BY_NAME[name]()
