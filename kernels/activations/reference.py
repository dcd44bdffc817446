"""Activations on NumPy: the table from which ops, layers, tests and benches are made.

One class per activation, declared by the decorator ``activation``: ``forward`` takes the arrays of ``<name>_forward``
in the order of its spec, ``backward`` those of ``<name>_backward``. ``y`` may be ``x``, ``dx`` may be ``dy``. Formulas,
derivatives, saved tensors, NaN rules and kinks: README.md.

Shapes: x, y, dy, dx (N, C); slope, dslope (C,).
"""

from __future__ import annotations

import numpy as np

from fastdl.kernels.activations.declare import ACTIVATIONS as ACTIVATIONS
from fastdl.kernels.activations.declare import activation
from fastdl.kernels.activations.normal import BOUND, normal_cdf
from fastdl.kernels.registry import Tolerance

INF, NAN, TINY = np.inf, np.nan, 1e-40  # TINY is subnormal in float32


def _room(out: np.ndarray, *inputs: np.ndarray) -> np.ndarray:
    """``out`` as room for intermediate values, or a new array where it is one of the inputs."""
    return np.empty_like(out) if any(np.may_share_memory(out, a) for a in inputs) else out


def _keep(dy: np.ndarray, drop: np.ndarray, dx: np.ndarray) -> None:
    """dx = dy where not ``drop`` (a fresh mask), else 0."""
    np.multiply(dy, np.logical_not(drop, out=drop), out=dx)


# ------------------------------------------------------------------------------------------------ piecewise linear
@activation(
    "identity", layer="Identity", summary="The input itself", formula="y = x", derivative="1", source="-", saves="y",
    special=((-INF, -INF), (INF, INF), (NAN, NAN), (-0.0, -0.0), (TINY, TINY)), flops=(0, 0),
)  # fmt: skip
class Identity:
    @staticmethod
    def forward(x: np.ndarray, y: np.ndarray) -> None:
        np.copyto(y, x)

    @staticmethod
    def backward(dy: np.ndarray, y: np.ndarray, dx: np.ndarray) -> None:
        np.copyto(dx, dy)


@activation(
    "relu", layer="ReLU", summary="Rectified linear unit", formula="y = max(0, x)", derivative="[y > 0]",
    source="Nair & Hinton 2010; Glorot, Bordes & Bengio 2011", saves="y",
    special=((-INF, 0.0), (INF, INF), (NAN, NAN), (-0.0, 0.0), (TINY, TINY), (-TINY, 0.0)), kinks=(0.0,),
)  # fmt: skip
class ReLU:
    @staticmethod
    def forward(x: np.ndarray, y: np.ndarray) -> None:
        np.maximum(x, 0, out=y)

    @staticmethod
    def backward(dy: np.ndarray, y: np.ndarray, dx: np.ndarray) -> None:
        _keep(dy, y <= 0, dx)


@activation(
    "abs", layer="Abs", summary="Absolute value rectification", formula="y = |x|", derivative="sign(x)",
    source="Jarrett, Kavukcuoglu, Ranzato & LeCun 2009", saves="x",
    special=((-INF, INF), (INF, INF), (NAN, NAN), (-0.0, 0.0), (-TINY, TINY)), kinks=(0.0,),
)  # fmt: skip
class Abs:
    @staticmethod
    def forward(x: np.ndarray, y: np.ndarray) -> None:
        np.abs(x, out=y)

    @staticmethod
    def backward(dy: np.ndarray, x: np.ndarray, dx: np.ndarray) -> None:
        np.multiply(dy, np.sign(x, out=_room(dx, dy, x)), out=dx)


SLOPED = Tolerance(ulp=2.0, why="alpha and one product are rounded")


@activation(
    "leaky_relu", layer="LeakyReLU", summary="Leaky rectifier", formula="y = x for x > 0, else alpha x",
    derivative="(1 for x > 0, else alpha)", source="Maas, Hannun & Ng 2013", saves="x", alpha=0.01,
    special=((-INF, -INF), (INF, INF), (NAN, NAN), (-0.0, 0.0), (TINY, TINY)), kinks=(0.0,), tolerance=SLOPED,
)  # fmt: skip
class LeakyReLU:
    @staticmethod
    def forward(x: np.ndarray, y: np.ndarray, alpha: float = 0.01) -> None:
        scaled = np.multiply(x, alpha, out=_room(y, x))
        (np.maximum if alpha <= 1 else np.minimum)(x, scaled, out=y)

    @staticmethod
    def backward(dy: np.ndarray, x: np.ndarray, dx: np.ndarray, alpha: float = 0.01) -> None:
        if not 0 <= alpha <= 1:
            one, alpha = dy.dtype.type(1), dy.dtype.type(alpha)
            np.multiply(dy, np.where(x > 0, one, alpha), out=dx)
            return
        slope = np.greater(x, 0, out=_room(dx, dy, x))  # 1 or 0, many times as fast as np.where
        np.maximum(slope, alpha, out=slope)
        np.multiply(dy, slope, out=dx)


@activation(
    "prelu", layer="PReLU", summary="Parametric rectifier, one learned slope per channel",
    formula="y = x for x > 0, else slope x", derivative="(1 for x > 0, else slope); dslope = sum of dy min(x, 0)",
    source="He, Zhang, Ren & Sun 2015", saves="x", per_channel=True,
    special=((-INF, -INF), (INF, INF), (NAN, NAN), (-0.0, 0.0), (TINY, TINY)), kinks=(0.0,), tolerance=SLOPED,
    slope_tolerance=lambda sizes: {
        "dx": Tolerance(ulp=4.0, why="the slope's factor and one product are rounded"),
        "dslope": Tolerance(ulp=4.0, norm=2.0 + 2.0 * float(np.sqrt(sizes["N"])), why="a sum of N rounded products"),
    }, flops=(1, 4),
)  # fmt: skip
class PReLU:
    @staticmethod
    def forward(x: np.ndarray, slope: np.ndarray, y: np.ndarray) -> None:
        low = np.minimum(x, 0)
        low *= slope
        np.maximum(x, 0, out=y)
        y += low

    @staticmethod
    def backward(dy: np.ndarray, x: np.ndarray, slope: np.ndarray, dx: np.ndarray, dslope: np.ndarray) -> None:
        np.einsum("nc,nc->c", dy, np.minimum(x, 0), out=dslope)
        factor = np.greater(x, 0, out=_room(dx, dy, x))  # 1 or 0
        factor *= 1 - slope
        factor += slope
        np.multiply(dy, factor, out=dx)


# ------------------------------------------------------------------------------------------------ saturating
@activation(
    "elu", layer="ELU", summary="Exponential linear unit", formula="y = x for x > 0, else alpha (e^x - 1)",
    derivative="(1 for y > 0, else y + alpha)", source="Clevert, Unterthiner & Hochreiter 2016", saves="y", alpha=1.0,
    domain="all real numbers; alpha >= 0, since backward tells the side by the sign of y",
    special=((-INF, -1.0), (INF, INF), (NAN, NAN), (-0.0, -0.0), (TINY, TINY), (-TINY, -TINY)), kinks=(0.0,),
    tolerance=Tolerance(ulp=4.0, why="expm1 within 2 ulp, alpha and one product are rounded"),
    tolerance_backward=Tolerance(ulp=4.0, norm=1.0, why="y + alpha cancels near y = -alpha"), flops=(16, 2),
)  # fmt: skip
class ELU:
    @staticmethod
    def forward(x: np.ndarray, y: np.ndarray, alpha: float = 1.0) -> None:
        low = np.minimum(x, 0)
        np.expm1(low, out=low)
        low *= alpha
        np.maximum(x, 0, out=y)
        y += low

    @staticmethod
    def backward(dy: np.ndarray, y: np.ndarray, dx: np.ndarray, alpha: float = 1.0) -> None:
        slope = np.minimum(y, 0, out=_room(dx, dy, y))
        slope += alpha
        if alpha != 1:
            np.copyto(slope, 1, where=y > 0)
        np.multiply(dy, slope, out=dx)


@activation(
    "sigmoid", layer="Sigmoid", summary="Logistic sigmoid", formula="y = 1 / (1 + e^-x)", derivative="y (1 - y)",
    source="Rumelhart, Hinton & Williams 1986", saves="y",
    special=((-INF, 0.0), (INF, 1.0), (NAN, NAN), (-0.0, 0.5), (TINY, 0.5)),
    tolerance=Tolerance(ulp=6.0, why="exp within 3 ulp, a sum and a quotient"), flops=(18, 3),
)  # fmt: skip
class Sigmoid:
    @staticmethod
    @np.errstate(over="ignore")  # e^-x = inf gives 0, as it should
    def forward(x: np.ndarray, y: np.ndarray) -> None:
        np.negative(x, out=y)
        np.exp(y, out=y)
        np.add(y, 1, out=y)
        np.reciprocal(y, out=y)

    @staticmethod
    def backward(dy: np.ndarray, y: np.ndarray, dx: np.ndarray) -> None:
        slope = np.subtract(1, y, out=_room(dx, dy, y))
        slope *= y
        np.multiply(dy, slope, out=dx)


@activation(
    "tanh", layer="Tanh", summary="Hyperbolic tangent", formula="y = tanh(x)", derivative="(1 - y^2)",
    source="LeCun, Bottou, Orr & Mueller 1998", saves="y",
    special=((-INF, -1.0), (INF, 1.0), (NAN, NAN), (-0.0, -0.0), (TINY, TINY)),
    tolerance=Tolerance(ulp=4.0, why="tanh within 3 ulp"),
    tolerance_backward=Tolerance(ulp=4.0, norm=2.0, why="1 - y^2 cancels near |y| = 1"), flops=(18, 3),
)  # fmt: skip
class Tanh:
    @staticmethod
    def forward(x: np.ndarray, y: np.ndarray) -> None:
        np.tanh(x, out=y)

    @staticmethod
    def backward(dy: np.ndarray, y: np.ndarray, dx: np.ndarray) -> None:
        slope = np.multiply(y, y, out=_room(dx, dy, y))
        np.subtract(1, slope, out=slope)
        np.multiply(dy, slope, out=dx)


@activation(
    "hard_tanh", layer="HardTanh", summary="Hard hyperbolic tangent", formula="y = max(-1, min(1, x))",
    derivative="[|y| < 1]", source="Collobert 2004", saves="y",
    special=((-INF, -1.0), (-1.0, -1.0), (1.0, 1.0), (INF, 1.0), (NAN, NAN), (-0.0, 0.0), (TINY, TINY)),
    kinks=(-1.0, 1.0), flops=(2, 2),
)  # fmt: skip
class HardTanh:
    @staticmethod
    def forward(x: np.ndarray, y: np.ndarray) -> None:
        np.clip(x, -1, 1, out=y)

    @staticmethod
    def backward(dy: np.ndarray, y: np.ndarray, dx: np.ndarray) -> None:
        _keep(dy, np.abs(y, out=_room(dx, dy, y)) >= 1, dx)


@activation(
    "softplus", layer="Softplus", summary="Softplus", formula="y = log(1 + e^x) = max(x, 0) + log1p(e^-|x|)",
    derivative="sigmoid(x) = 1 - e^-y", source="Dugas, Bengio, Belisle, Nadeau & Garcia 2001", saves="y",
    special=((-INF, 0.0), (INF, INF), (NAN, NAN), (-0.0, float(np.log(2))), (TINY, float(np.log(2)))),
    tolerance=Tolerance(ulp=6.0, why="exp within 3 ulp, log1p within 2, a sum"),
    tolerance_backward=Tolerance(ulp=4.0, why="expm1 within 2 ulp, one product"), flops=(32, 16),
)  # fmt: skip
class Softplus:
    @staticmethod
    def forward(x: np.ndarray, y: np.ndarray) -> None:
        low = np.abs(x)
        np.negative(low, out=low)
        np.exp(low, out=low)
        np.log1p(low, out=low)
        np.maximum(x, 0, out=y)
        y += low

    @staticmethod
    def backward(dy: np.ndarray, y: np.ndarray, dx: np.ndarray) -> None:
        slope = np.negative(y, out=_room(dx, dy, y))
        np.expm1(slope, out=slope)
        np.negative(slope, out=slope)
        np.multiply(dy, slope, out=dx)


# ------------------------------------------------------------------------------------------------ GELU
TAIL = Tolerance(ulp=32.0, norm=2.0, why="a rounded exponent of size z^2/2 moves the tail by z^2/4 ulp")
TAIL_BACKWARD = Tolerance(ulp=32.0, norm=8.0, why="as forward; Phi(z) + z phi(z) cancels near z = -0.75")


@activation(
    "gelu", layer="GELU", summary="Gaussian error linear unit", formula="y = x Phi(x) = x (1 + erf(x / sqrt 2)) / 2",
    derivative="(Phi(x) + x phi(x))", source="Hendrycks & Gimpel 2016", saves="x",
    special=((-INF, 0.0), (INF, INF), (NAN, NAN), (-0.0, -0.0), (TINY, TINY / 2)),
    tolerance=TAIL, tolerance_backward=TAIL_BACKWARD, flops=(36, 40),
)  # fmt: skip
class GELU:
    @staticmethod
    def forward(x: np.ndarray, y: np.ndarray) -> None:
        p = normal_cdf(x)
        np.maximum(x, -BOUND, out=y)  # -inf gives its limit
        y *= p

    @staticmethod
    def backward(dy: np.ndarray, x: np.ndarray, dx: np.ndarray) -> None:
        z = np.clip(x, -BOUND, BOUND)
        slope = np.square(z)
        slope *= -0.5
        np.exp(slope, out=slope)
        slope *= z
        slope *= 1 / np.sqrt(2 * np.pi)
        slope += normal_cdf(x)
        np.multiply(dy, slope, out=dx)


C1 = 2 * np.sqrt(2 / np.pi)
C3 = 0.044715 * C1


@activation(
    "gelu_tanh", layer="GELU", summary="GELU by tanh",
    formula="y = x (1 + tanh u) / 2 = x / (1 + e^-2u), u = sqrt(2/pi) (x + 0.044715 x^3)",
    derivative="(p + 2 x u' p (1 - p)), p = 1 / (1 + e^-2u)", source="Hendrycks & Gimpel 2016", saves="x",
    special=((-INF, 0.0), (INF, INF), (NAN, NAN), (-0.0, -0.0), (TINY, TINY / 2)),
    tolerance=TAIL, tolerance_backward=TAIL_BACKWARD, flops=(22, 30),
)  # fmt: skip
class GELUTanh:
    @staticmethod
    @np.errstate(over="ignore")  # e^-2u = inf gives 0, as it should
    def forward(x: np.ndarray, y: np.ndarray) -> None:
        z = np.maximum(x, -BOUND)
        np.divide(z, _one_plus_exp(z), out=y)

    @staticmethod
    @np.errstate(over="ignore")
    def backward(dy: np.ndarray, x: np.ndarray, dx: np.ndarray) -> None:
        z = np.clip(x, -BOUND, BOUND)
        p = np.reciprocal(_one_plus_exp(z))
        slope = np.square(z)
        slope *= 3 * float(C3)
        slope += float(C1)
        slope *= z
        slope *= 1 - p
        slope += 1
        slope *= p
        np.multiply(dy, slope, out=dx)


def _one_plus_exp(z: np.ndarray) -> np.ndarray:
    """1 + e^-2u, u = sqrt(2/pi) (z + 0.044715 z^3)."""
    e = np.square(z)
    e *= -float(C3)
    e -= float(C1)
    e *= z
    np.exp(e, out=e)
    e += 1
    return e


# ------------------------------------------------------------------------------------------------ periodic
@activation(
    "cos", layer="Cos", summary="Cosine", formula="y = cos(x)", derivative="-sin(x)",
    source="Goodfellow, Bengio & Courville 2016, section 6.3.3", saves="x", domain="finite numbers; NaN for infinities",
    special=((-INF, NAN), (INF, NAN), (NAN, NAN), (-0.0, 1.0), (TINY, 1.0)),
    tolerance=Tolerance(ulp=4.0, why="cos and sin within 2 ulp, one product"), flops=(18, 19),
)  # fmt: skip
class Cos:
    @staticmethod
    @np.errstate(invalid="ignore")
    def forward(x: np.ndarray, y: np.ndarray) -> None:
        np.cos(x, out=y)

    @staticmethod
    @np.errstate(invalid="ignore")
    def backward(dy: np.ndarray, x: np.ndarray, dx: np.ndarray) -> None:
        slope = np.sin(x, out=_room(dx, dy, x))
        np.multiply(dy, slope, out=dx)
        np.negative(dx, out=dx)


# ------------------------------------------------------------------------------------------------ over a row
@activation(
    "softmax", layer="Softmax", summary="Softmax over the columns of a row",
    formula="y = e^(x - max) / sum of e^(x - max)", derivative="see README: dx = y (dy - sum of dy y)",
    source="Bridle 1990", saves="y", row_op=True, tolerance=Tolerance(
        ulp=16.0, norm=2.0, why="x - max is rounded before exp, and the sum of a row's terms"
    ), tolerance_backward=Tolerance(ulp=8.0, norm=8.0, why="dy - sum(dy y) cancels"), flops=(16, 4),
)  # fmt: skip
class Softmax:
    @staticmethod
    @np.errstate(invalid="ignore")  # infinities and NaN make their row NaN
    def forward(x: np.ndarray, y: np.ndarray) -> None:
        if not x.size:
            return
        np.subtract(x, x.max(axis=1, keepdims=True), out=y)
        np.exp(y, out=y)
        y /= y.sum(axis=1, keepdims=True)

    @staticmethod
    def backward(dy: np.ndarray, y: np.ndarray, dx: np.ndarray) -> None:
        dot = np.einsum("nc,nc->n", dy, y)
        slope = np.subtract(dy, dot[:, None], out=_room(dx, dy, y))
        np.multiply(slope, y, out=dx)
