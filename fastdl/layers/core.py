"""Dense, BatchNorm, Dropout."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from fastdl import checks, initializers
from fastdl.initializers import Initializer
from fastdl.inputs import whole_number
from fastdl.kernels.common import philox
from fastdl.layers.base import Layer, width_of
from fastdl.program import Buffer
from fastdl.trace import Trace

_OLD = checks.Range("the weight of the old statistic, in [0, 1)", 0.0, 1.0)


@dataclasses.dataclass(eq=False)
class Dense(Layer):
    """y = x W + b, followed by an activation if one is named.

    Parameters
    ----------
    units : int
        Width O of the output.
    activation : str, optional
        Short for an activation layer behind this one.
    use_bias : bool
        Leave it out before batch normalisation: the bias has a zero gradient there.
    kernel_initializer, bias_initializer : str or Initializer
        ``glorot_uniform`` and ``zeros`` by default.

    Notes
    -----
    Shapes: x (N, I), kernel (I, O), bias (O,), y (N, O). The kernel is stored input-first, as in Keras; PyTorch's
    ``Linear.weight`` is its transpose.
    """

    prefix: ClassVar[str] = "dense"
    units: int
    activation: str | None = None
    use_bias: bool = True
    kernel_initializer: str | Initializer = "glorot_uniform"
    bias_initializer: str | Initializer = "zeros"

    def __post_init__(self) -> None:
        from fastdl.layers.activations import Activation

        self.units = whole_number(self.units, "Dense units")
        if self.activation is not None:
            Activation(self.activation)
            self.activation = str(self.activation)
        self.use_bias = checks.flag(self.use_bias, "Dense use_bias")
        self.kernel_initializer = initializers.get(self.kernel_initializer)
        self.bias_initializer = initializers.get(self.bias_initializer)

    def trace(self, t: Trace, x: Buffer, name: str) -> Buffer:
        from fastdl.layers.activations import Activation

        width = width_of(x, name)
        w = t.parameter(f"{name}/kernel", (width, self.units), self.kernel_initializer, decay=True)
        b = None
        if self.use_bias:
            b = t.parameter(f"{name}/bias", (self.units,), self.bias_initializer, decay=False)
        y = t.batch(name, self.units)
        t.call("dense_forward", x=x, w=w, b=b, y=y)
        return y if self.activation is None else Activation(self.activation).trace(t, y, f"{name}.{self.activation}")


@dataclasses.dataclass(eq=False)
class BatchNorm(Layer):
    """Batch normalisation (Ioffe & Szegedy 2015): y = gamma (x - mean) / sqrt(var + eps) + beta.

    Parameters
    ----------
    decay : float
        Weight of the **old** running statistic: running = decay * running + (1 - decay) * batch. Keras calls this value
        ``momentum``; PyTorch's ``momentum`` is 1 - decay.
    eps : float
        Added to the variance.

    Notes
    -----
    Training normalises with the biased batch variance and updates the running variance with the unbiased one
    (m / (m-1)); a batch of one row uses variance 0 and leaves the running statistics alone. Prediction uses the running
    statistics.

    Deviations are squared and added up in the model's dtype. In float32 columns within +-1e15 are safe; from deviations
    of 1e19 / sqrt(m) on the variance is infinite, the column becomes beta, and the running variance stays infinite.
    Scale such columns, or compile with float64.
    """

    prefix: ClassVar[str] = "batchnorm"
    decay: float = 0.9
    eps: float = 1e-5
    momentum: dataclasses.InitVar[float | None] = None

    def __post_init__(self, momentum: float | None) -> None:
        if momentum is not None:
            raise ValueError(
                f"BatchNorm: momentum= is ambiguous. For Keras' momentum={momentum} (weight of the old statistic) "
                f"write decay={momentum}; for PyTorch's momentum={momentum} (weight of the new one) write "
                f"decay={1 - momentum:g}"
            )
        self.decay = _OLD.check(self.decay, "BatchNorm decay")
        self.eps = checks.POSITIVE.check(self.eps, "BatchNorm eps")

    def trace(self, t: Trace, x: Buffer, name: str) -> Buffer:
        width = width_of(x, name)
        buffers = {
            "x": x,
            "gamma": t.parameter(f"{name}/gamma", (width,), initializers.get("ones"), decay=False),
            "beta": t.parameter(f"{name}/beta", (width,), initializers.get("zeros"), decay=False),
            "running_mean": t.state(f"{name}/running_mean", (width,), initializers.get("zeros")),
            "running_var": t.state(f"{name}/running_var", (width,), initializers.get("ones")),
            "y": t.batch(name, width),
        }
        if t.training:
            saved = {"mean": t.cell(f"{name}.mean", width), "inv_std": t.cell(f"{name}.inv_std", width)}
            t.call("batchnorm_forward", {"decay": self.decay, "eps": self.eps}, **buffers, **saved)
        else:
            t.call("batchnorm_inference", {"eps": self.eps}, **buffers)
        return buffers["y"]


@dataclasses.dataclass(eq=False)
class Dropout(Layer):
    """Zeroes each element with probability ``rate`` in training and scales the others by 1 / (1 - rate).

    Parameters
    ----------
    rate : float
        Probability to **drop**, in [0, 1). It is quantised to 16 bits, and the scale is the inverse of the quantised
        keep probability.

    Notes
    -----
    The mask is a pure function of (seed, layer, step, row, column): equal bits on every back end and thread count
    (Srivastava et al. 2014; Salmon et al. 2011 for the generator).
    """

    prefix: ClassVar[str] = "dropout"
    rate: float

    def __post_init__(self) -> None:
        self.rate = checks.RATE.check(self.rate, "Dropout rate")
        philox.threshold(self.rate)

    def trace(self, t: Trace, x: Buffer, name: str) -> Buffer:
        layer = t.next_stochastic()
        if not t.training or self.rate == 0:
            return x
        y = t.batch(name, *x.shape)
        t.call("dropout_forward", {"rate": self.rate, "seed": t.seed, "layer": layer}, x=x, y=y)
        return y
