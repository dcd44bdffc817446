"""exp, log, tanh, erf, sin, cos and the normal distribution function as Numba points: common/math.hpp in Python.

float32 evaluates the polynomials of math.hpp in float32, so that a loop over them is vectorised; float64 calls libm.
The bounds are those of math.hpp. Every constant is cast to the type of the argument: a bare literal would turn the
whole expression into float64.

The functions are overloads of plain Python functions, not dispatchers: any Numba target can compile a point that calls
them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload, register_jitable

from fastdl.kernels.common.numba_cpu import FASTMATH

_OPTIONS = {"fastmath": FASTMATH, "error_model": "numpy", "forceinline": True}
f4, i4 = np.float32, np.int32
_MAGIC = f4(12582912.0)  # 1.5 * 2^23: adding it rounds a float32 to the nearest integer
_point = register_jitable(**_OPTIONS)


def cast(value: float, like: float) -> float:
    """``value`` in the type of ``like``."""
    return type(like)(value)


@overload(cast, jit_options=_OPTIONS)
def _cast(value, like):
    kind = f4 if like == types.float32 else np.float64
    return lambda value, like: kind(value)


@_point
def _from_bits(i):
    return i4(i).view(f4)


@_point
def _bits(x):
    return f4(x).view(i4)


@_point
def _copysign(x, sign):
    return _from_bits((_bits(x) & i4(0x7FFFFFFF)) | (_bits(sign) & i4(-0x80000000)))


@_point
def _clamp(x, low, high):
    """Written so that a NaN passes."""
    x = low if x < low else x
    return high if x > high else x


@_point
def _nearest(x):
    return (x + _MAGIC) - _MAGIC


@_point
def _scale(x, k):
    """x 2^k for k in [-252, 254], rounded once."""
    n = i4(k)
    half = i4(n >> 1)
    return x * _from_bits(i4(half + 127) << 23) * _from_bits(i4(n - half + 127) << 23)


@_point
def _power_of_2(k):
    return _from_bits(i4(i4(k) + 127) << 23)


@_point
def _less_ln2(x, k):
    return (x - k * f4(0.693359375)) - k * f4(-2.12194440e-4)


@_point
def _expm1_reduced(r):
    p = (((f4(1.3950601e-3) * r + f4(8.36895406e-3)) * r + f4(4.1666206e-2)) * r + f4(1.66665182e-1)) * r + f4(0.5)
    return (p * r) * r + r


@_point
def _exp(x):
    x = _clamp(x, f4(-104), f4(89))
    k = _nearest(x * f4(1.44269504))
    return _scale(_expm1_reduced(_less_ln2(x, k)) + f4(1), k)


@_point
def _expm1(x):
    x = _clamp(x, f4(-18), f4(89))
    k = _nearest(x * f4(1.44269504))
    p = _expm1_reduced(_less_ln2(x, k))
    half = _power_of_2(k - f4(1))
    y = (half * p + (half - f4(0.5))) * f4(2)
    return _copysign(p if abs(x) < f4(0.25) else y, x)


@_point
def _log1p_reduced(f):
    p = f4(-7.84834772e-2) * f + f4(1.28877223e-1)
    p = p * f - f4(1.31351873e-1)
    p = p * f + f4(1.41806766e-1)
    p = p * f - f4(1.66239068e-1)
    p = p * f + f4(2.00022951e-1)
    p = p * f - f4(2.50008285e-1)
    return p * f + f4(3.33333164e-1)


@_point
def _log_sum(k, f):
    s = f * f
    return (((_log1p_reduced(f) * f) * s + k * f4(-2.12194440e-4) - f4(0.5) * s) + f) + k * f4(0.693359375)


@_point
def _log(x):
    tiny = x < f4(1.17549435e-38)
    i = i4(_bits(x * f4(8388608) if tiny else x) - i4(0x3F3504F3))
    f = _from_bits(i4(i & i4(0x7FFFFF)) + i4(0x3F3504F3)) - f4(1)
    y = _log_sum(f4(i4(i >> 23)) - (f4(23) if tiny else f4(0)), f)
    y = y if x < f4(np.inf) else x
    y = f4(-np.inf) if x == f4(0) else y
    return f4(np.nan) if x < f4(0) else y


@_point
def _log1p(x):
    u = x + f4(1)
    i = i4(_bits(u) - i4(0x3F3504F3))
    k = i4(i >> 23)
    scale = _from_bits(i4(127 - k) << 23)
    mantissa = _from_bits(i4(i & i4(0x7FFFFF)) + i4(0x3F3504F3)) - f4(1)
    f = mantissa if u > f4(33554432) else x * scale + (scale - f4(1))
    y = _log_sum(f4(k), f)
    y = y if x < f4(np.inf) else x
    y = x if x == f4(0) else y
    y = f4(-np.inf) if x == f4(-1) else y
    return f4(np.nan) if x < f4(-1) else y


@_point
def _log1p_unit(x):
    t = x / (x + f4(2))
    s = t * t
    p = ((s * f4(2.80119866e-1) + f4(2.80018061e-1)) * s + f4(4.00215268e-1)) * s + f4(6.66664183e-1)
    return (p * s) * t + (t + t)  # a sum: a product might or might not be contracted with what a caller adds


@_point
def _tanh(x):
    t = abs(x) * f4(2)
    t = f4(40) if t > f4(40) else t
    k = _nearest(t * f4(1.44269504))
    power = _power_of_2(k)
    u = power * _expm1_reduced(_less_ln2(t, k)) + (power - f4(1))
    return _copysign(u / (u + f4(2)), x)


@_point
def _erf(x):
    s = x * x
    t = abs(x)
    t = f4(3.95) if t > f4(3.95) else t
    p = f4(-6.09046023e-4) * s + f4(5.01198508e-3)
    p = p * s - f4(2.67789271e-2)
    p = p * s + f4(1.12821415e-1)
    p = p * s - f4(3.76125246e-1)
    p = p * s + f4(1.28379151e-1)
    q = f4(2.14620697e-4) * t - f4(3.22018587e-3)
    q = q * t + f4(2.29067001e-2)
    q = q * t - f4(1.05287895e-1)
    q = q * t - f4(6.35698617e-1)
    q = q * t - f4(1.12852013)
    return p * x + x if t < f4(0.9) else _copysign(f4(1) - _exp(q * t), x)


@_point
def _normal_cdf(x):
    u = abs(x)
    u = f4(40) if u > f4(40) else u
    p = ((u * f4(1.46926548e-2) + f4(1.09530866e-1)) * u + f4(3.44479471e-1)) * u + f4(0.5)
    q = (u * f4(3.68396342e-2) + f4(2.74191588e-1)) * u + f4(9.05429065e-1)
    q = (q * u + f4(1.48684001)) * u + f4(1)
    tail = _exp(u * u * f4(-0.5)) * (p / q)
    return f4(1) - tail if x > f4(0) else tail


def _turns() -> tuple[np.ndarray, np.ndarray]:
    """2 / pi modulo 4 at the scale of each float32 exponent, as a first piece of 28 bits and the rest.

    A float32 is m 2^q with an integer m of 24 bits, so x 2/pi modulo 4 is m (2^q 2/pi modulo 4): the table holds the
    bracket, divided by 2^q again so that x itself can be the factor. x times the first piece is exact.
    """
    digits = 320

    def arctan_of_inverse(n: int) -> int:
        total, term, k = 0, (1 << digits) // n, 1
        while term:
            total += term // k if k % 4 == 1 else -(term // k)
            term, k = term // (n * n), k + 2
        return total

    pi = 4 * (4 * arctan_of_inverse(5) - arctan_of_inverse(239))  # Machin 1706
    two_over_pi = (2 << (2 * digits)) // pi  # times 2^digits
    first, rest = np.full(256, np.nan), np.full(256, np.nan)
    for e in range(255):
        q = max(e, 1) - 150
        part = (two_over_pi << q) % (4 << digits) if q >= 0 else two_over_pi
        cut = max(part.bit_length() - 28, 0)
        head = part >> cut << cut
        scale = digits + max(q, 0)
        first[e], rest[e] = head / (1 << scale), (part - head) / (1 << scale)
    return first, rest


_TURN, _TURN_REST = _turns()


@_point
def _quadrant(x):
    """x = (n + t) pi/2 with |t| <= 1/2: any finite float32, without a branch (a branch to libm would not vectorise)."""
    e = (_bits(x) >> i4(23)) & i4(255)
    w = np.float64(x)
    p, rest = w * _TURN[e], w * _TURN_REST[e]
    n = ((p + rest) + 6755399441055744.0) - 6755399441055744.0
    return i4(n), f4(((p - n) + rest) * 1.57079632679489661923)


@_point
def _sin_or_cos(r, cosine):
    s = r * r
    a = f4(1) if cosine else r
    p = f4(-1.35912513e-3) if cosine else f4(-1.95146320e-4)
    p = p * s + (f4(4.16557342e-2) if cosine else f4(8.33215564e-3))
    p = p * s + (f4(-4.99998838e-1) if cosine else f4(-1.66666552e-1))
    return p * s * a + a


@_point
def _sin(x):
    n, r = _quadrant(x)
    y = _sin_or_cos(r, (n & 1) == 1)
    y = -y if n & 2 else y
    return x if x == f4(0) else y


@_point
def _cos(x):
    n, r = _quadrant(x)
    y = _sin_or_cos(r, (n & 1) == 0)
    return -y if (n + 1) & 2 else y


@_point
def _near_quadrant(x):
    """As _quadrant for |x| <= 2^16, in a third of the time: pi/2 in two pieces of float64, the first of 33 bits."""
    k = _nearest(x * f4(0.636619772))
    n = np.float64(k)
    return i4(k), f4((np.float64(x) - n * 1.57079632673412561417) - n * 6.07710050650619224932e-11)


@_point
def _sin_near(x):
    n, r = _near_quadrant(x)
    y = _sin_or_cos(r, (n & 1) == 1)
    y = -y if n & 2 else y
    return x if x == f4(0) else y


@_point
def _cos_near(x):
    n, r = _near_quadrant(x)
    y = _sin_or_cos(r, (n & 1) == 0)
    return -y if (n + 1) & 2 else y


def all_near(x: np.ndarray) -> bool:
    """Whether sin_near and cos_near may serve for a whole array; compiled code only."""


@overload(all_near, jit_options=_OPTIONS)
def _all_near(x):
    if x.dtype == types.float64:
        return lambda x: True

    def check(x):
        largest = i4(0)
        for c in range(x.shape[0]):
            largest = max(largest, i4(_bits(x[c]) & i4(0x7FFFFFFF)))  # infinities and NaN are the largest
        return largest <= i4(0x47800000)  # 2^16

    return check


@_point
def _normal_cdf_double(x):
    return 0.5 * math.erfc(x * -0.70710678118654752440)


def _by_dtype(name: str, single: Callable[..., Any], double: Callable[..., Any]) -> Callable[..., Any]:
    """A function that compiles to ``single`` for float32 and to ``double`` for float64."""

    def function(x):
        return double(x)

    function.__name__ = function.__qualname__ = name

    @overload(function, jit_options=_OPTIONS)
    def choose(x):
        chosen = single if x == types.float32 else double
        return lambda x: chosen(x)

    return function


exp = _by_dtype("exp", _exp, math.exp)
expm1 = _by_dtype("expm1", _expm1, math.expm1)
log = _by_dtype("log", _log, math.log)
log1p = _by_dtype("log1p", _log1p, math.log1p)
log1p_unit = _by_dtype("log1p_unit", _log1p_unit, math.log1p)  # for arguments in [0, 1]
tanh = _by_dtype("tanh", _tanh, math.tanh)
erf = _by_dtype("erf", _erf, math.erf)
sin = _by_dtype("sin", _sin, math.sin)
cos = _by_dtype("cos", _cos, math.cos)
sin_near = _by_dtype("sin_near", _sin_near, math.sin)  # float32: for |x| <= 2^16
cos_near = _by_dtype("cos_near", _cos_near, math.cos)
normal_cdf = _by_dtype("normal_cdf", _normal_cdf, _normal_cdf_double)

#: The functions that tests and other callers may look up by name.
FUNCTIONS = {"exp": exp, "expm1": expm1, "log": log, "log1p": log1p, "tanh": tanh, "erf": erf, "sin": sin, "cos": cos}
