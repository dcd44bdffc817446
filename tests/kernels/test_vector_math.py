"""The vector functions of common/math.hpp and common/numba_math.py: error in ulp over bit patterns, special values."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest

from fastdl.kernels import dispatch
from fastdl.kernels.activations.normal import normal_cdf
from fastdl.kernels.common import simd

INF, NAN = np.inf, np.nan
NAMES = ("exp", "expm1", "log", "log1p", "tanh", "erf", "sin", "cos")
BOUND = 4.0  # ulp
PATTERNS = 10_000_000  # over all functions and levels

#: exact results, the sign of zero included
SPECIAL = {
    "exp": [(0.0, 1.0), (-0.0, 1.0), (INF, INF), (-INF, 0.0), (89.0, INF), (-104.0, 0.0), (1e-45, 1.0)],
    "expm1": [(0.0, 0.0), (-0.0, -0.0), (INF, INF), (-INF, -1.0), (1e-45, 1e-45), (-1e-45, -1e-45), (89.0, INF)],
    "log": [(1.0, 0.0), (0.0, -INF), (-0.0, -INF), (INF, INF), (-1.0, NAN), (-INF, NAN), (-1e-45, NAN)],
    "log1p": [(0.0, 0.0), (-0.0, -0.0), (-1.0, -INF), (INF, INF), (-2.0, NAN), (-INF, NAN), (1e-45, 1e-45)],
    "tanh": [(0.0, 0.0), (-0.0, -0.0), (INF, 1.0), (-INF, -1.0), (20.0, 1.0), (1e-45, 1e-45), (-1e-45, -1e-45)],
    "erf": [(0.0, 0.0), (-0.0, -0.0), (INF, 1.0), (-INF, -1.0), (5.0, 1.0), (-5.0, -1.0), (1e-45, 1e-45)],
    "sin": [(0.0, 0.0), (-0.0, -0.0), (INF, NAN), (-INF, NAN), (1e-45, 1e-45)],
    "cos": [(0.0, 1.0), (-0.0, 1.0), (INF, NAN), (-INF, NAN), (1e-45, 1.0)],
}


def compiled_levels() -> list[str]:
    return list(simd.levels()) if dispatch.load("cython") == "available" else []


@functools.cache
def numba_loop(name: str):
    import numba

    from fastdl.kernels.common import numba_math
    from fastdl.kernels.common.numba_cpu import FASTMATH

    function = numba_math.FUNCTIONS[name]

    @numba.njit(fastmath=FASTMATH, error_model="numpy")
    def loop(x, y):
        for i in range(x.size):
            y[i] = function(x[i])

    return loop


@pytest.fixture(params=["numba", *compiled_levels()])
def evaluate(request):
    """evaluate(name, x) -> y on Numba or on one SIMD level of the compiled functions."""
    if request.param == "numba":
        pytest.importorskip("numba")

        def run(name: str, x: np.ndarray) -> np.ndarray:
            y = np.empty_like(x)
            numba_loop(name)(x, y)
            return y

        yield run
        return
    from fastdl.kernels.activations import _cython

    def run(name: str, x: np.ndarray) -> np.ndarray:
        y = np.empty_like(x)
        _cython.evaluate(name, x, y)
        return y

    before = simd.level()
    simd.select(request.param)
    yield run
    simd.select(before)


def exact(name: str, x: np.ndarray) -> np.ndarray:
    """float64 values of a function at float32 arguments."""
    with np.errstate(all="ignore"):  # signalling NaN
        wide = x.astype(np.float64)
        if name == "erf":
            return np.array([math.erf(v) for v in wide])
        return getattr(np, name)(wide)


def ulps(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """Distance in units of the last place of the float32 nearest to ``want``; inf where one alone is not finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        nearest = want.astype(np.float32)
        _, exponent = np.frexp(np.where(np.isfinite(want), want, 1.0))
        unit = np.ldexp(1.0, np.maximum(exponent, -125) - 24)
        error = np.abs(got.astype(np.float64) - want) / unit
    same = (got == nearest) | (np.isnan(got) & np.isnan(nearest))
    return np.where(same, 0.0, np.where(np.isfinite(got) & np.isfinite(nearest), error, np.inf))


def patterns(rng: np.random.Generator, count: int) -> np.ndarray:
    """float32 values spread over all 2^32 bit patterns, NaN, infinities and subnormals among them."""
    step = 2**32 // count
    bits = np.arange(count, dtype=np.uint64) * step + rng.integers(0, step)
    return bits.astype(np.uint32).view(np.float32)


@pytest.mark.parametrize("name", NAMES)
def test_error_over_bit_patterns(evaluate, name):
    levels = 1 + len(compiled_levels())
    x = patterns(np.random.default_rng(7), PATTERNS // levels // len(NAMES))
    worst = ulps(evaluate(name, x), exact(name, x))
    assert worst.max() <= BOUND, f"{name}({x[worst.argmax()]!r}): {worst.max()} ulp"


@pytest.mark.parametrize("name", ["exp", "log1p", "tanh", "erf"])
def test_error_where_it_matters(evaluate, name):
    """Densely over the arguments that nets see."""
    x = np.linspace(-0.999 if name == "log1p" else -10, 10, 200_003, dtype=np.float32)
    worst = ulps(evaluate(name, x), exact(name, x))
    assert worst.max() <= BOUND, f"{name}({x[worst.argmax()]!r}): {worst.max()} ulp"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_special_values(evaluate, name, dtype):
    pairs = [
        p for p in [*SPECIAL[name], (NAN, NAN)] if dtype == "float32" or abs(p[0]) in (0, 1, 2, INF) or p[0] != p[0]
    ]
    x, want = np.array(pairs, dtype).T.copy()
    got = evaluate(name, x)
    np.testing.assert_array_equal(got, want)
    number = ~np.isnan(want)
    np.testing.assert_array_equal(np.signbit(got[number]), np.signbit(want[number]))


@pytest.mark.parametrize("name", NAMES)
def test_float64_is_accurate(evaluate, name):
    x = np.abs(np.random.default_rng(3).standard_normal(1000)) * 3
    want = np.array([getattr(math, name)(v) for v in x])
    np.testing.assert_allclose(evaluate(name, x), want, rtol=4e-16, atol=0)


@pytest.mark.parametrize("count", [1, 3, 15, 16, 17, 33])
def test_tails_have_the_bits_of_whole_registers(evaluate, count):
    x = np.linspace(-3, 3, 64, dtype=np.float32)
    for name in ("exp", "tanh", "erf", "cos"):
        np.testing.assert_array_equal(evaluate(name, x[:count].copy()), evaluate(name, x)[:count])


def test_normal_cdf_in_float64():
    x = np.concatenate([np.linspace(-38, 38, 5001), np.linspace(-2, 2, 3001)])
    want = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x])
    tiny = want < 1e-300
    np.testing.assert_allclose(normal_cdf(x)[~tiny], want[~tiny], rtol=2e-13)  # the argument's rounding, times x^2
    np.testing.assert_allclose(normal_cdf(x)[np.abs(x) < 4], want[np.abs(x) < 4], rtol=8e-15)
    np.testing.assert_array_equal(normal_cdf(np.array([-INF, INF, NAN])), [0.0, 1.0, NAN])


def test_unknown_function_lists_the_known_ones():
    if not compiled_levels():
        pytest.skip("no compiled kernels")
    from fastdl.kernels.activations import _cython

    with pytest.raises(ValueError, match="unknown function 'sinh', known: exp"):
        _cython.evaluate("sinh", np.zeros(1), np.zeros(1))
    with pytest.raises(TypeError, match="float32"):
        _cython.evaluate("exp", np.zeros(1, int), np.zeros(1, int))
