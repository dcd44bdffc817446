"""Activations: closed forms, special values, softmax, slopes, layouts, threads, and the three lists that must agree."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastdl.kernels import dispatch, registry
from fastdl.kernels.activations.reference import ACTIVATIONS
from fastdl.kernels.engine.panels import Panels, pack

ELEMENTWISE = [name for name, info in ACTIVATIONS.items() if not info.row_op]
BACKENDS = [b for b in ("numpy", "numba", "cython") if dispatch.load(b) == "available"]
compiled = pytest.mark.skipif("cython" not in BACKENDS, reason="no compiled kernels")

#: value and derivative for one float64 number, in the plainest form
CLOSED = {
    "identity": (lambda x: x, lambda x: 1.0),
    "relu": (lambda x: max(0.0, x), lambda x: float(x > 0)),
    "abs": (abs, lambda x: math.copysign(1, x)),
    "leaky_relu": (lambda x: x if x > 0 else 0.01 * x, lambda x: 1.0 if x > 0 else 0.01),
    "elu": (lambda x: x if x > 0 else math.expm1(x), lambda x: 1.0 if x > 0 else math.exp(x)),
    "sigmoid": (lambda x: 1 / (1 + math.exp(-x)), lambda x: math.exp(-x) / (1 + math.exp(-x)) ** 2),
    "tanh": (math.tanh, lambda x: 1 / math.cosh(x) ** 2),
    "hard_tanh": (lambda x: min(1.0, max(-1.0, x)), lambda x: float(abs(x) < 1)),
    "softplus": (lambda x: math.log1p(math.exp(x)), lambda x: 1 / (1 + math.exp(-x))),
    "gelu": (
        lambda x: x * 0.5 * math.erfc(-x / math.sqrt(2)),
        lambda x: 0.5 * math.erfc(-x / math.sqrt(2)) + x * math.exp(-x * x / 2) / math.sqrt(2 * math.pi),
    ),
    "gelu_tanh": (
        lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        lambda x: (
            0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
            + 0.5
            * x
            / math.cosh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)) ** 2
            * math.sqrt(2 / math.pi)
            * (1 + 3 * 0.044715 * x * x)
        ),
    ),
    "cos": (math.cos, lambda x: -math.sin(x)),
}


def forward(name: str, x: np.ndarray, backend: str, threads: int = 1, **params: float) -> np.ndarray:
    y = np.full_like(x, np.nan)
    slope = (np.full(x.shape[1], 0.25, x.dtype),) if ACTIVATIONS[name].per_channel else ()
    dispatch.run(f"{name}_forward", x, *slope, y, backend=backend, threads=threads, **params)
    return y


def backward(name: str, dy: np.ndarray, x: np.ndarray, backend: str, threads: int = 1, **params: float) -> np.ndarray:
    saved = x if ACTIVATIONS[name].saves == "x" else forward(name, x, backend, **params)
    dx = np.full_like(dy, np.nan)
    dispatch.run(f"{name}_backward", dy, saved, dx, backend=backend, threads=threads, **params)
    return dx


@pytest.mark.parametrize("name", CLOSED)
def test_closed_forms(name, backend, rng):
    x = rng.standard_normal((37, 13)) * 2
    dy = rng.standard_normal(x.shape)
    value, derivative = CLOSED[name]
    np.testing.assert_allclose(forward(name, x, backend), np.vectorize(value)(x), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(backward(name, dy, x, backend), dy * np.vectorize(derivative)(x), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", [n for n in ELEMENTWISE if registry.spec(f"{n}_forward").special])
def test_special_values(name, dtype, backend):
    x, want = np.array(registry.spec(f"{name}_forward").special, dtype).T.copy()
    got = forward(name, np.tile(x, (33, 1)), backend)
    np.testing.assert_allclose(got, np.tile(want, (33, 1)), rtol=4 * np.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize(
    ("name", "x", "slope"),
    [
        ("relu", 0.0, 0.0), ("relu", -0.0, 0.0), ("abs", 0.0, 0.0), ("abs", -0.0, 0.0), ("leaky_relu", 0.0, 0.01),
        ("elu", 0.0, 1.0), ("hard_tanh", 1.0, 0.0), ("hard_tanh", -1.0, 0.0),
        ("relu", np.nan, 1.0), ("hard_tanh", np.nan, 1.0), ("leaky_relu", np.nan, 0.01), ("abs", np.nan, np.nan),
        ("elu", np.nan, np.nan), ("sigmoid", np.nan, np.nan), ("tanh", np.nan, np.nan), ("softplus", np.nan, np.nan),
        ("gelu", np.nan, np.nan), ("gelu_tanh", np.nan, np.nan), ("cos", np.nan, np.nan),
        ("gelu", np.inf, 1.0), ("gelu", -np.inf, 0.0), ("gelu_tanh", np.inf, 1.0), ("gelu_tanh", -np.inf, 0.0),
        ("sigmoid", -np.inf, 0.0), ("tanh", np.inf, 0.0), ("softplus", np.inf, 1.0), ("softplus", -np.inf, 0.0),
    ],
)  # fmt: skip
def test_derivative_at_kinks_nan_and_infinities(name, x, slope, backend):
    """The table of README.md."""
    for dtype in ("float32", "float64"):
        dx = backward(name, np.full((3, 5), 2.0, dtype), np.full((3, 5), x, dtype), backend)
        np.testing.assert_array_equal(dx, np.full((3, 5), 2 * slope, dtype))


@pytest.mark.parametrize(
    ("name", "alpha"), [("leaky_relu", 0.3), ("leaky_relu", 1.5), ("leaky_relu", -0.5), ("elu", 0.5)]
)
def test_alpha(name, alpha, backend, rng):
    x = rng.standard_normal((9, 21))
    low = alpha * (x if name == "leaky_relu" else np.expm1(x))
    np.testing.assert_allclose(forward(name, x, backend, alpha=alpha), np.where(x > 0, x, low), rtol=1e-14)
    slope = np.where(x > 0, 1, alpha * (1 if name == "leaky_relu" else np.exp(x)))
    np.testing.assert_allclose(backward(name, x, x, backend, alpha=alpha), x * slope, rtol=1e-13)


def test_softmax(backend, rng):
    for shape in ((1, 1), (5, 10), (33, 100), (4, 1000)):
        x = rng.standard_normal(shape).astype(np.float32) * 5
        y = forward("softmax", x, backend)
        np.testing.assert_allclose(y.sum(axis=1), 1, rtol=2e-6)
        np.testing.assert_allclose(forward("softmax", x + np.float32(8), backend), y, rtol=2e-5)
        wide = np.exp(x.astype(np.float64) - x.max(axis=1, keepdims=True))
        np.testing.assert_allclose(y, wide / wide.sum(axis=1, keepdims=True), rtol=4e-6)
        dx = backward("softmax", rng.standard_normal(shape).astype(np.float32), x, backend)
        np.testing.assert_allclose(dx.sum(axis=1), 0, atol=2e-6)


def test_softmax_of_large_and_non_finite_rows(backend):
    x = np.array([[1e4, 1e4, -1e4], [np.nan, 1, 2], [np.inf, 1, 2], [-np.inf, 1, 1]], np.float32)
    want = [[0.5, 0.5, 0], [np.nan] * 3, [np.nan] * 3, [0, 0.5, 0.5]]
    np.testing.assert_array_equal(forward("softmax", x, backend), np.array(want, np.float32))


@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (100, 5), (129, 70)])
def test_prelu_gradient(shape, backend, rng):
    dy, x = rng.standard_normal(shape), rng.standard_normal(shape)
    slope = rng.uniform(-0.5, 1.5, shape[1])
    y, dx, dslope = np.empty(shape), np.empty(shape), np.full(shape[1], np.nan)
    dispatch.run("prelu_forward", x, slope, y, backend=backend)
    dispatch.run("prelu_backward", dy, x, slope, dx, dslope, backend=backend)
    np.testing.assert_allclose(y, np.where(x > 0, x, slope * x), rtol=1e-15)
    np.testing.assert_allclose(dx, np.where(x > 0, dy, slope * dy), rtol=1e-15)
    np.testing.assert_allclose(dslope, (dy * np.minimum(x, 0)).sum(axis=0), rtol=1e-12, atol=1e-13)
    step = 1e-6
    moved = [np.where(x > 0, x, (slope + s) * x) for s in (step, -step)]
    numeric = ((moved[0] - moved[1]) * dy).sum(axis=0) / (2 * step)
    np.testing.assert_allclose(dslope, numeric, rtol=1e-7, atol=1e-7)


def cases(rng: np.random.Generator, shape: tuple[int, int], dtype: str):
    """Every op of the family with arrays of one shape."""
    for spec in registry.specs():
        if spec.family == "activations":
            yield spec, spec.make(rng, {"N": shape[0], "C": shape[1]}, dtype)


@compiled
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (257, 100), (64, 2048)])
def test_threads_change_no_bit(shape, dtype, rng):
    for spec, arrays in cases(rng, shape, dtype):
        results = []
        for threads in (1, 2, 3, 4):
            mine = [a.copy() for a in arrays]
            dispatch.run(spec.name, *mine, backend="cython", threads=threads)
            results.append(mine)
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                np.testing.assert_array_equal(a, b, err_msg=spec.name)


@compiled
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 32), (70, 33), (33, 100)])
def test_panels_have_the_bits_of_plain_rows(shape, dtype, rng):
    for spec, arrays in cases(rng, shape, dtype):
        plain = [a.copy() for a in arrays]
        dispatch.run(spec.name, *plain, backend="cython")
        panels = [pack(a) if a.ndim == 2 else a.copy() for a in arrays]
        dispatch.run(spec.name, *panels, backend="cython", threads=2)
        for array, a, b in zip(spec.arrays, plain, panels, strict=True):
            np.testing.assert_array_equal(a, b.unpack() if isinstance(b, Panels) else b, err_msg=spec.name)
            if isinstance(b, Panels) and array.role == "out" and shape[1] % 32:
                assert not b.data[-1, :, shape[1] % 32 :].any(), f"{spec.name} wrote into the padding"


@compiled
def test_identity_converts_layouts(rng):
    x = rng.standard_normal((45, 77)).astype(np.float32)
    panels, back = pack(np.zeros_like(x)), np.zeros_like(x)
    dispatch.run("identity_forward", x, panels, backend="cython", threads=2)
    np.testing.assert_array_equal(panels.unpack(), x)
    dispatch.run("identity_forward", panels, back, backend="cython", threads=2)
    np.testing.assert_array_equal(back, x)


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_row_strides_and_in_place(name, backend, rng):
    if ACTIVATIONS[name].per_channel:
        pytest.skip("test_threads and test_panels cover slopes")
    wide = rng.standard_normal((19, 50)).astype(np.float32)
    x = wide[:, 7:40]
    room = np.zeros((19, 64), np.float32)
    dispatch.run(f"{name}_forward", x, room[:, :33], backend=backend)
    want = forward(name, x.copy(), backend)
    np.testing.assert_array_equal(room[:, :33], want)
    assert not room[:, 33:].any()
    dense = x.copy()
    dispatch.run(f"{name}_forward", dense, dense, backend=backend)
    np.testing.assert_array_equal(dense, want)
    dispatch.run(f"{name}_forward", x, x, backend=backend)
    np.testing.assert_array_equal(x, want)
    dy = rng.standard_normal(x.shape).astype(np.float32)
    gradient = np.empty_like(dy)
    dispatch.run(f"{name}_backward", dy, want, gradient, backend=backend)
    dispatch.run(f"{name}_backward", dy, x, dy, backend=backend)
    np.testing.assert_array_equal(dy, gradient)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty(shape, backend):
    for name in ACTIVATIONS:
        assert forward(name, np.zeros(shape), backend).shape == shape


@compiled
def test_compiled_levels_agree(level, rng):
    for spec, arrays in cases(rng, (65, 47), "float32"):
        want = [a.astype(np.float64) for a in arrays]
        spec.reference(*want)
        dispatch.run(spec.name, *arrays, backend="cython")
        tolerances = spec.tolerances({"N": 65, "C": 47})
        for array, got, exact in zip(spec.arrays, arrays, want, strict=True):
            if array.role == "in":
                continue
            tolerance = tolerances[array.name]
            bound = tolerance.ulp * np.abs(exact) + tolerance.norm * np.abs(exact).max()
            assert (np.abs(got - exact) <= np.finfo(np.float32).eps * bound).all(), f"{spec.name} at {level}"


@compiled
def test_compiled_table_follows_the_registry():
    from fastdl.kernels.activations import _cython

    assert list(_cython.names()) == [n for n in ELEMENTWISE if n != "identity"]
    for name in _cython.names():
        assert _cython.saves_output(name) == (ACTIVATIONS[name].saves == "y")
    assert _cython.index(None) == _cython.index("identity") == -1
    with pytest.raises(ValueError, match=r"unknown activation 'rely', known: identity, relu, abs"):
        _cython.index("rely")
    assert set(_cython.kernels()) == {s.name for s in registry.specs() if s.family == "activations"}


@pytest.mark.skipif("numba" not in BACKENDS, reason="no numba")
def test_numba_points_follow_the_registry():
    from fastdl.kernels.activations.points import POINTS

    assert list(POINTS) == [n for n in ELEMENTWISE if n != "identity"]


@pytest.mark.parametrize("name", ["abs", "tanh"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("offset", [0, 1, 5])
def test_outputs_beyond_the_caches(level: str, name: str, dtype: type, offset: int) -> None:
    """Large outputs are written past the caches: the same bits as in pieces, at every alignment, nothing beside."""
    n = (16 << 20) // np.dtype(dtype).itemsize + 37
    x = np.random.default_rng(0).standard_normal(n).astype(dtype)
    memory = np.full(n + 16, 7, dtype)
    y = memory[offset : offset + n]
    dispatch.run(f"{name}_forward", x[None], y[None], backend="cython")
    pieces = np.empty_like(x)
    for start in range(0, n, 100_003):
        part = slice(start, start + 100_003)
        dispatch.run(f"{name}_forward", x[None, part], pieces[None, part], backend="cython")
    assert np.array_equal(y, pieces)
    assert (memory[:offset] == 7).all()
    assert (memory[offset + n :] == 7).all()
    memory[offset : offset + n] = x
    dispatch.run(f"{name}_forward", y[None], y[None], backend="cython")  # in place
    assert np.array_equal(y, pieces)
