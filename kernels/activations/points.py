"""Scalar point functions of the activations for Numba, on the CPU and on CUDA: the mathematics alone, no loops.

    forward(x, a)       y = f(x)
    backward(dy, s, a)  dx = dy f'(x), from s = y or x as ``saves`` of reference.py says

``a`` is alpha or the column's slope. Formulas, NaN rules and kinks: README.md. Comparisons are written so that a NaN
passes; constants are cast to the argument's type, since a literal would turn float32 into float64.

A new activation is its pair here and its line in ``POINTS``.
"""

from __future__ import annotations

from fastdl.kernels.common.numba_math import (
    all_near,
    cast,
    cos,
    cos_near,
    exp,
    expm1,
    log1p_unit,
    normal_cdf,
    sin,
    sin_near,
    tanh,
)

BOUND = 40.0  # beyond it both forms of GELU are x or -0


def relu(x, a):
    return cast(0, x) if x <= 0 else x


def relu_backward(dy, y, a):
    return cast(0, dy) if y <= 0 else dy


def absolute(x, a):
    return abs(x)


def absolute_backward(dy, x, a):
    sign = cast(1, x) if x > 0 else cast(-1, x)
    sign = x if x == 0 or x != x else sign
    return dy * sign


def leaky_relu(x, a):
    return x if x > 0 else a * x


def leaky_relu_backward(dy, x, a):
    return dy if x > 0 else a * dy


def slope_gradient(dy, x):
    """What one element adds to the gradient of its column's slope."""
    return cast(0, dy) if x > 0 else dy * x


def elu(x, a):
    return x if x > 0 else a * expm1(x)


def elu_backward(dy, y, a):
    return dy if y > 0 else dy * (y + a)


def sigmoid(x, a):
    e = exp(-abs(x))
    return (e if x < 0 else cast(1, x)) / (e + cast(1, x))


def sigmoid_backward(dy, y, a):
    return dy * (y * (cast(1, y) - y))


def hyperbolic(x, a):
    return tanh(x)


def hyperbolic_backward(dy, y, a):
    return dy * ((cast(1, y) - y) * (cast(1, y) + y))


def hard_tanh(x, a):
    x = cast(-1, x) if x < -1 else x
    return cast(1, x) if x > 1 else x


def hard_tanh_backward(dy, y, a):
    return cast(0, dy) if abs(y) >= 1 else dy


def softplus(x, a):
    return (cast(0, x) if x <= 0 else x) + log1p_unit(exp(-abs(x)))


def softplus_backward(dy, y, a):
    return dy * -expm1(-y)


def gelu(x, a):
    bound = cast(-BOUND, x)
    return (bound if x < bound else x) * normal_cdf(x)


def gelu_backward(dy, x, a):
    low, high = cast(-BOUND, x), cast(BOUND, x)
    z = low if x < low else x
    z = high if z > high else z
    return dy * (normal_cdf(z) + z * (exp(z * z * cast(-0.5, x)) * cast(0.39894228040143267794, x)))


def gelu_tanh(x, a):
    bound = cast(-BOUND, x)
    z = bound if x < bound else x
    return z / (exp(z * -(cast(0.07135481627260025, x) * (z * z) + cast(1.59576912160573071176, x))) + cast(1, x))


def gelu_tanh_backward(dy, x, a):
    low, high, one = cast(-BOUND, x), cast(BOUND, x), cast(1, x)
    c1, c3 = cast(1.59576912160573071176, x), cast(0.07135481627260025, x)
    z = low if x < low else x
    z = high if z > high else z
    s = z * z
    p = one / (exp(z * -(c3 * s + c1)) + one)
    return dy * (p + z * (p * (one - p)) * (cast(3, x) * c3 * s + c1))


def cosine(x, a):
    return cos(x)


def cosine_backward(dy, x, a):
    return -(dy * sin(x))


def cosine_near(x, a):
    return cos_near(x)


def cosine_near_backward(dy, x, a):
    return -(dy * sin_near(x))


#: name -> (forward, backward[, gradient of the slope])
POINTS = {
    "relu": (relu, relu_backward),
    "abs": (absolute, absolute_backward),
    "leaky_relu": (leaky_relu, leaky_relu_backward),
    "prelu": (leaky_relu, leaky_relu_backward, slope_gradient),
    "elu": (elu, elu_backward),
    "sigmoid": (sigmoid, sigmoid_backward),
    "tanh": (hyperbolic, hyperbolic_backward),
    "hard_tanh": (hard_tanh, hard_tanh_backward),
    "softplus": (softplus, softplus_backward),
    "gelu": (gelu, gelu_backward),
    "gelu_tanh": (gelu_tanh, gelu_tanh_backward),
    "cos": (cosine, cosine_backward),
}

#: name -> (test, forward, backward): faster forms for blocks of which test(block of x) is true. Few will need it.
NEAR = {"cos": (all_near, cosine_near, cosine_near_backward)}
