"""Initial values of parameters: descriptions that name an op of the random family, or a constant.

The values are a function of the seed and the parameter's number alone, and equal bit for bit on every back end.

>>> get("he_normal").call((200, 10))
('normal', {'mean': 0.0, 'std': 0.1}, None)
"""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fastdl import checks
from fastdl.described import Described

_DEVIATION = checks.Range("a deviation >= 0", 0.0)

#: (op of the random family or None, its parameters, the value when there is no op)
Call = tuple[str | None, dict[str, float], float | None]


@dataclass(unsafe_hash=True)
class Initializer(Described):
    """Maps a parameter's shape to the call that fills it."""

    #: public name, as in ``Dense(10, kernel_initializer="he_normal")``
    name: ClassVar[str]

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            allowed = _DEVIATION if field.name == "std" else checks.FINITE
            value = allowed.check(getattr(self, field.name), f"{type(self).__name__}({field.name}=...)")
            setattr(self, field.name, value)

    @abstractmethod
    def call(self, shape: Sequence[int]) -> Call:
        """The op of the random family, its parameters, and the value of a constant (the op is None then)."""

    def to_config(self) -> dict[str, Any]:
        """A JSON-ready description; `from_config` reads it."""
        return {"name": self.name, **dataclasses.asdict(self)}

    def _fans(self, shape: Sequence[int]) -> tuple[int, int]:
        if len(shape) != 2 or min(shape) < 1:
            raise ValueError(
                f"initializer {self.name!r}: expected a shape (fan_in, fan_out) of positive numbers, "
                f"found {tuple(shape)}; vectors take zeros, ones, constant, uniform or normal"
            )
        return int(shape[0]), int(shape[1])


def _uniform(bound: float) -> Call:
    return "uniform", {"low": -bound, "high": bound}, None


def _normal(std: float) -> Call:
    return "normal", {"mean": 0.0, "std": std}, None


@dataclass(unsafe_hash=True)
class GlorotUniform(Initializer):
    """Uniform on +-sqrt(6 / (fan_in + fan_out)), for tanh-like activations.

    References
    ----------
    Glorot, Bengio: Understanding the difficulty of training deep feedforward neural networks, AISTATS 2010, eq. 16.
    """

    name: ClassVar[str] = "glorot_uniform"

    def call(self, shape: Sequence[int]) -> Call:
        return _uniform(math.sqrt(6.0 / sum(self._fans(shape))))


@dataclass(unsafe_hash=True)
class GlorotNormal(Initializer):
    """Normal of variance 2 / (fan_in + fan_out); not truncated, as in PyTorch (Keras cuts at two deviations).

    References
    ----------
    Glorot, Bengio: Understanding the difficulty of training deep feedforward neural networks, AISTATS 2010, eq. 12.
    """

    name: ClassVar[str] = "glorot_normal"

    def call(self, shape: Sequence[int]) -> Call:
        return _normal(math.sqrt(2.0 / sum(self._fans(shape))))


@dataclass(unsafe_hash=True)
class HeUniform(Initializer):
    """Uniform on +-sqrt(6 / fan_in), for rectifiers: the variance of `HeNormal`.

    References
    ----------
    He, Zhang, Ren, Sun: Delving deep into rectifiers, ICCV 2015.
    """

    name: ClassVar[str] = "he_uniform"

    def call(self, shape: Sequence[int]) -> Call:
        return _uniform(math.sqrt(6.0 / self._fans(shape)[0]))


@dataclass(unsafe_hash=True)
class HeNormal(Initializer):
    """Normal of variance 2 / fan_in, for rectifiers; not truncated, as in the paper and PyTorch (Keras cuts).

    References
    ----------
    He, Zhang, Ren, Sun: Delving deep into rectifiers, ICCV 2015, eq. 10.
    """

    name: ClassVar[str] = "he_normal"

    def call(self, shape: Sequence[int]) -> Call:
        return _normal(math.sqrt(2.0 / self._fans(shape)[0]))


@dataclass(unsafe_hash=True)
class Constant(Initializer):
    """The same value everywhere."""

    name: ClassVar[str] = "constant"
    value: float = 0.0

    def call(self, shape: Sequence[int]) -> Call:
        return None, {}, self.value


@dataclass(unsafe_hash=True)
class Zeros(Initializer):
    """0 everywhere."""

    name: ClassVar[str] = "zeros"

    def call(self, shape: Sequence[int]) -> Call:
        return None, {}, 0.0


@dataclass(unsafe_hash=True)
class Ones(Initializer):
    """1 everywhere."""

    name: ClassVar[str] = "ones"

    def call(self, shape: Sequence[int]) -> Call:
        return None, {}, 1.0


@dataclass(unsafe_hash=True)
class Uniform(Initializer):
    """Uniform on [low, high)."""

    name: ClassVar[str] = "uniform"
    low: float = -0.05
    high: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.low <= self.high:
            raise ValueError(f"Uniform: expected low <= high, found low={self.low}, high={self.high}")

    def call(self, shape: Sequence[int]) -> Call:
        return "uniform", {"low": self.low, "high": self.high}, None


@dataclass(unsafe_hash=True)
class Normal(Initializer):
    """Normal of a mean and a standard deviation."""

    name: ClassVar[str] = "normal"
    mean: float = 0.0
    std: float = 0.05

    def call(self, shape: Sequence[int]) -> Call:
        return "normal", {"mean": self.mean, "std": self.std}, None


@dataclass(unsafe_hash=True)
class TruncatedNormal(Initializer):
    """Normal, cut at two deviations from the mean.

    ``std`` is that of the normal before the cut, as in Keras and JAX; what comes out has 0.8796 std. (PyTorch's
    ``trunc_normal_`` cuts at the absolute values -2 and 2.)
    """

    name: ClassVar[str] = "truncated_normal"
    mean: float = 0.0
    std: float = 0.05

    def call(self, shape: Sequence[int]) -> Call:
        return "truncated_normal", {"mean": self.mean, "std": self.std}, None


_KNOWN: dict[str, type[Initializer]] = {
    kind.name: kind
    for kind in (
        GlorotUniform, GlorotNormal, HeUniform, HeNormal, Zeros, Ones, Constant, Uniform, Normal, TruncatedNormal
    )
}  # fmt: skip


def _find(name: Any) -> type[Initializer]:
    kind = _KNOWN.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ValueError(f"unknown initializer {name!r}, known: {', '.join(sorted(_KNOWN))}")
    return kind


def get(initializer: str | float | Initializer) -> Initializer:
    """An initialiser by name (with its defaults), a number as a constant, or the instance that was given."""
    if isinstance(initializer, Initializer):
        return initializer
    return Constant(initializer) if hasattr(initializer, "__float__") else _find(initializer)()


def from_config(config: Mapping[str, Any]) -> Initializer:
    """The initialiser that `Initializer.to_config` described."""
    values = dict(config)
    kind = _find(values.pop("name", None))
    known = {field.name for field in dataclasses.fields(kind)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"initializer {kind.name!r}: expected settings among {sorted(known)}, found {unknown}")
    return kind(**values)
