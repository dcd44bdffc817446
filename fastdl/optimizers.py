"""Optimisers: descriptions of an update rule. The arithmetic is in ``fastdl/kernels/optimizers``.

>>> SGD(lr=0.1, momentum=0.9)
SGD(lr=0.1, momentum=0.9, nesterov=False, l2=0.0, weight_decay=0.0, clip_norm=None)
>>> get("adam").states
('m', 'v')
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fastdl import checks
from fastdl.described import Described


@dataclass(unsafe_hash=True)
class Optimizer(Described):
    """What every optimiser tells: the op of its sweep, the state arrays that the op keeps, and the op's parameters."""

    #: public name, as in ``compile(optimizer="adam")``
    name: ClassVar[str]
    #: op of ``fastdl.kernels``
    op: ClassVar[str]

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, self._checked(field.name, getattr(self, field.name)))

    def _checked(self, field: str, value: Any) -> Any:
        who = f"{type(self).__name__}({field}=...)"
        if field == "nesterov":
            return checks.flag(value, who)
        if field == "clip_norm" and value is None:
            return None
        return checks.OPTIMIZER[field].check(value, who)

    def _instead(self, name: str, value: Any) -> str:
        if name == "lr":
            return f"assign to the net, net.lr = {value!r}"
        return f"compile again, with dataclasses.replace(optimizer, {name}={value!r})"

    @property
    @abstractmethod
    def states(self) -> tuple[str, ...]:
        """Names of the op's state arrays, each of the parameters' shape, zero at the start."""

    @abstractmethod
    def params(self) -> dict[str, float | int]:
        """Parameters of the op, all but ``lr_factor``, which belongs to the parameter."""

    def to_config(self) -> dict[str, Any]:
        """A JSON-ready description; `from_config` reads it."""
        return {"name": self.name, **dataclasses.asdict(self)}


def check_lr(value: Any) -> float:
    """A learning rate as Python's float: finite and not negative."""
    return checks.LEARNING_RATE.check(value, "lr")


@dataclass(unsafe_hash=True)
class SGD(Optimizer):
    """Stochastic gradient descent with momentum.

    v <- momentum v + g; w <- w - lr v, with Nesterov w <- w - lr (g + momentum v). The velocity has no learning rate
    in it (PyTorch's form; Keras keeps v <- momentum v - lr g, which differs whenever lr changes).

    Parameters
    ----------
    lr : float
        Learning rate.
    momentum : float
        In [0, 1); 0 keeps no state.
    nesterov : bool
        Look ahead along the velocity; needs a momentum.
    l2 : float
        Adds l2 * w to the gradient (PyTorch's ``weight_decay``, Keras' ``L2(l2 / 2)``).
        Not on biases, batch norm, PReLU.
    weight_decay : float
        Decoupled: w <- (1 - lr weight_decay) w, apart from the gradient.
    clip_norm : float, optional
        Scales all gradients together so that their norm is at most this.

    References
    ----------
    Sutskever, Martens, Dahl, Hinton: On the importance of initialization and momentum in deep learning, ICML 2013.
    Pascanu, Mikolov, Bengio: On the difficulty of training recurrent neural networks, ICML 2013 (clipping).
    """

    name: ClassVar[str] = "sgd"
    op: ClassVar[str] = "sgd_step"
    lr: float = 0.01
    momentum: float = 0.0
    nesterov: bool = False
    l2: float = 0.0
    weight_decay: float = 0.0
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov and not self.momentum:
            raise ValueError("SGD(nesterov=True): expected momentum > 0, found 0.0; pass momentum=0.9, say")

    @property
    def states(self) -> tuple[str, ...]:
        return ("v",) if self.momentum else ()

    def params(self) -> dict[str, float | int]:
        return {
            "momentum": self.momentum,
            "nesterov": int(self.nesterov),
            "l2": self.l2,
            "weight_decay": self.weight_decay,
        }


@dataclass(unsafe_hash=True)
class Adam(Optimizer):
    """Adam: step along the mean gradient, divided by its root mean square.

    m <- beta1 m + (1 - beta1) g; v <- beta2 v + (1 - beta2) g^2; w <- w - lr m_hat / (sqrt(v_hat) + eps) with
    m_hat = m / (1 - beta1^t), v_hat = v / (1 - beta2^t): Algorithm 1 of the paper, as in PyTorch. Keras and
    scikit-learn take the bias correction out of the root, which makes their eps a larger one in the first steps.

    Parameters
    ----------
    lr : float
        Learning rate.
    beta1, beta2 : float
        Weights of the old mean and mean square, in [0, 1).
    eps : float
        Added to the root; at least the smallest normal number of the model's dtype (1.2e-38 in float32). A smaller one
        rounds to 0, and a weight without a gradient would become 0 / 0.
    l2 : float
        Adds l2 * w to the gradient; not on biases, batch norm, PReLU. For decay apart from the gradient see `AdamW`.
    clip_norm : float, optional
        Scales all gradients together so that their norm is at most this.

    References
    ----------
    Kingma, Ba: Adam: a method for stochastic optimization, ICLR 2015.
    """

    name: ClassVar[str] = "adam"
    op: ClassVar[str] = "adam_step"
    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    l2: float = 0.0
    clip_norm: float | None = None

    @property
    def states(self) -> tuple[str, ...]:
        return ("m", "v")

    def params(self) -> dict[str, float | int]:
        return {"beta1": self.beta1, "beta2": self.beta2, "eps": self.eps, "l2": self.l2, "weight_decay": 0.0}


@dataclass(unsafe_hash=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay: w <- (1 - lr weight_decay) w, then Adam's step.

    Parameters
    ----------
    lr, beta1, beta2, eps, clip_norm
        As in `Adam`.
    weight_decay : float
        Multiplied by lr, as in PyTorch and Keras. Not on biases, batch norm, PReLU.

    References
    ----------
    Loshchilov, Hutter: Decoupled weight decay regularization, ICLR 2019.
    """

    name: ClassVar[str] = "adamw"
    op: ClassVar[str] = "adam_step"
    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float | None = None

    @property
    def states(self) -> tuple[str, ...]:
        return ("m", "v")

    def params(self) -> dict[str, float | int]:
        return {
            "beta1": self.beta1,
            "beta2": self.beta2,
            "eps": self.eps,
            "l2": 0.0,
            "weight_decay": self.weight_decay,
        }


_KNOWN: dict[str, type[Optimizer]] = {kind.name: kind for kind in (SGD, Adam, AdamW)}


def _find(name: Any) -> type[Optimizer]:
    kind = _KNOWN.get(name.lower()) if isinstance(name, str) else None
    if kind is None:
        raise ValueError(f"unknown optimizer {name!r}, known: {', '.join(sorted(_KNOWN))}")
    return kind


def get(optimizer: str | Optimizer) -> Optimizer:
    """An optimiser by name (with its defaults), or the instance that was given."""
    return optimizer if isinstance(optimizer, Optimizer) else _find(optimizer)()


def from_config(config: Mapping[str, Any]) -> Optimizer:
    """The optimiser that `Optimizer.to_config` described."""
    values = dict(config)
    kind = _find(values.pop("name", None))
    known = {field.name for field in dataclasses.fields(kind)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"optimizer {kind.name!r}: expected settings among {sorted(known)}, found {unknown}")
    return kind(**values)
