"""The normal distribution function on NumPy arrays, without SciPy: what GELU is made of.

    Phi(x) = erfc(-x / sqrt 2) / 2

float64 follows fdlibm's piecewise rational erf and erfc (Sun Microsystems 1993), about 1e-15 relative. float32 takes
one rational function of u = |x|: Phi(-u) = e^(-u^2 / 2) P(u) / Q(u) with relative error (1 + u^2 / 4) 9e-8 on [0, 14],
which follows the u^2 / 4 ulp of the rounded exponent; the compiled kernels use the same one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

#: Beyond it e^(-x^2 / 2) is 0 in both types, Phi is 0 or 1, and x Phi(x) may be taken at the bound.
BOUND = 40.0

P = (0.5, 0.344479471, 0.109530866, 0.0146926548)
Q = (1.0, 1.48684001, 0.905429065, 0.274191588, 0.0368396342)

# fdlibm s_erf.c, by |x|: below 0.84375 x + x PP(x^2) / QQ(x^2); below 1.25 ERX + PA(|x| - 1) / QA(|x| - 1); above it
# erfc(|x|) = e^(-x^2 - 0.5625 + R(1/x^2) / S(1/x^2)) / |x| with RA, SA below 1 / 0.35 and RB, SB above.
ERX = 8.45062911510467529297e-01
PP = (
    1.28379167095512558561e-01, -3.25042107247001499370e-01, -2.84817495755985104766e-02, -5.77027029648944159157e-03,
    -2.37630166566501626084e-05,
)  # fmt: skip
QQ = (
    1.0, 3.97917223959155352819e-01, 6.50222499887672944485e-02, 5.08130628187576562776e-03, 1.32494738004321644526e-04,
    -3.96022827877536812320e-06,
)  # fmt: skip
PA = (
    -2.36211856075265944077e-03, 4.14856118683748331666e-01, -3.72207876035701323847e-01, 3.18346619901161753674e-01,
    -1.10894694282396677476e-01, 3.54783043256182359371e-02, -2.16637559486879084300e-03,
)  # fmt: skip
QA = (
    1.0, 1.06420880400844228286e-01, 5.40397917702171048937e-01, 7.18286544141962662868e-02, 1.26171219808761642112e-01,
    1.36370839120290507362e-02, 1.19844998467991074170e-02,
)  # fmt: skip
RA = (
    -9.86494403484714822705e-03, -6.93858572707181764372e-01, -1.05586262253232909814e01, -6.23753324503260060396e01,
    -1.62396669462573470355e02, -1.84605092906711035994e02, -8.12874355063065934246e01, -9.81432934416914548592e00,
)  # fmt: skip
SA = (
    1.0, 1.96512716674392571292e01, 1.37657754143519042600e02, 4.34565877475229228821e02, 6.45387271733267880336e02,
    4.29008140027567833386e02, 1.08635005541779435134e02, 6.57024977031928170135e00, -6.04244152148580987438e-02,
)  # fmt: skip
RB = (
    -9.86494292470009928597e-03, -7.99283237680523006574e-01, -1.77579549177547519889e01, -1.60636384855821916062e02,
    -6.37566443368389627722e02, -1.02509513161107724954e03, -4.83519191608651397019e02,
)  # fmt: skip
SB = (
    1.0, 3.03380607434824582924e01, 3.25792512996573918826e02, 1.53672958608443695994e03, 3.19985821950859553908e03,
    2.55305040643316442583e03, 4.74528541206955367215e02, -2.24409524465858183362e01,
)  # fmt: skip


def horner(coefficients: Sequence[float], x: np.ndarray) -> np.ndarray:
    """sum of coefficients[k] x^k, in one new array."""
    y = x * coefficients[-1]
    for c in coefficients[-2:0:-1]:
        y += c
        y *= x
    y += coefficients[0]
    return y


def _erfc(x: np.ndarray) -> np.ndarray:
    """erfc of float64 values; those below -0.84375 are 2 - erfc(-x)."""
    u = np.abs(x)
    y = np.full_like(u, np.nan)
    near = u < 0.84375
    v = x[near]
    y[near] = (0.5 - v) + (0.5 - v * (horner(PP, v * v) / horner(QQ, v * v)))
    middle = (u >= 0.84375) & (u < 1.25)
    v = u[middle] - 1
    y[middle] = (1 - ERX) - horner(PA, v) / horner(QA, v)
    for lower, upper, r, s in ((1.25, 1 / 0.35, RA, SA), (1 / 0.35, np.inf, RB, SB)):
        far = (u >= lower) & (u < upper)
        v = u[far]
        head = v.astype(np.float32).astype(np.float64)  # its square is exact: e^(-v^2) keeps its last digits
        w = 1 / (v * v)
        y[far] = np.exp(-head * head - 0.5625) * np.exp((head - v) * (head + v) + horner(r, w) / horner(s, w)) / v
    negative = x <= -0.84375
    y[negative] = 2 - y[negative]
    return y


def normal_cdf(x: np.ndarray) -> np.ndarray:
    """Phi(x) in a new array; 0 and 1 at the infinities, NaN for NaN."""
    if x.dtype == np.float64:
        y = _erfc(np.clip(x, -BOUND, BOUND) * -np.sqrt(0.5))
        y *= 0.5
        return y
    u = np.abs(x)
    np.minimum(u, BOUND, out=u)
    y = horner(P, u)
    y /= horner(Q, u)
    u *= u
    u *= -0.5
    y *= np.exp(u, out=u)
    np.subtract(np.greater(x, 0, out=u), y, out=y)  # 1 - tail or 0 - tail
    return np.abs(y, out=y)
