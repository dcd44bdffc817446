"""Batch normalisation: closed forms, precision, running statistics, fusion, layouts, threads, levels, gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastdl import ops
from fastdl.kernels import dispatch, registry
from fastdl.kernels.activations.reference import ACTIVATIONS
from fastdl.kernels.engine.panels import Panels, pack

FUSABLE = [name for name, a in ACTIVATIONS.items() if not a.row_op]
compiled = pytest.mark.skipif(dispatch.load("cython") != "available", reason="no compiled kernels")
Arrays = dict[str, Any]


def arguments(activation: str = "identity", rate: float = 0.0, **more: Any) -> Arrays:
    alpha = ACTIVATIONS[activation].alpha or 0.0
    return {"activation": activation, "alpha": alpha, "rate": rate, "seed": 42, "layer": 3, "step": 5, **more}


def draw(
    rows: int, cols: int, dtype: Any = np.float32, mean: float = 0.3, deviation: float = 1.0, seed: int = 0
) -> Arrays:
    rng = np.random.default_rng(seed)
    made = {
        "x": mean + deviation * rng.standard_normal((rows, cols)),
        "gamma": rng.uniform(0.5, 1.5, cols),
        "beta": rng.standard_normal(cols),
        "slope": rng.uniform(0.1, 0.4, cols),
        "dy": rng.standard_normal((rows, cols)),
        "running_mean": rng.standard_normal(cols),
        "running_var": rng.uniform(0.5, 1.5, cols),
    }
    return {name: value.astype(dtype) for name, value in made.items()}


def run(op: str, given: Arrays, backend: str, threads: int = 1, panels: bool = False, **arguments: Any) -> Arrays:
    """Run an op on copies; outputs by name, filled with NaN before."""
    spec = registry.spec(op)
    sizes = {"N": given["x"].shape[0], "C": given["x"].shape[1]}
    arrays: list[Any] = []
    for array in spec.arrays:
        if array.role == "out":
            value = np.full(array.dims(sizes), np.nan, given["x"].dtype)
        else:
            value = given[array.name].copy() if array.name in given else None
        needed = arguments.get("activation") == ("relu" if array.name == "y" else "prelu")
        if array.optional and not needed:
            value = None
        arrays.append(pack(value) if panels and value is not None and value.ndim == 2 else value)
    known = {p.name for p in spec.params} | set(spec.runtime)
    dispatch.run(op, *arrays, backend=backend, threads=threads, **{k: v for k, v in arguments.items() if k in known})
    out = {a.name: v for a, v in zip(spec.arrays, arrays, strict=True) if a.role != "in" and v is not None}
    return {name: value.unpack() if isinstance(value, Panels) else value for name, value in out.items()}


def forward_backward(given: Arrays, backend: str, **options: Any) -> Arrays:
    """Training forward, then backward from what it saved."""
    y = run("batchnorm_forward", given, backend, **options)
    return y | run("batchnorm_backward", given | y, backend, **options)


def exact(given: Arrays, eps: float = 1e-5) -> Arrays:
    """The formulas of the README in float64, without activation and dropout."""
    x, gamma, beta, dy = (given[k].astype(np.float64) for k in ("x", "gamma", "beta", "dy"))
    m = len(x)
    mean = x.mean(axis=0)
    mean += (x - mean).mean(axis=0)
    inv_std = 1 / np.sqrt(np.square(x - mean).mean(axis=0) + eps)
    xhat = (x - mean) * inv_std
    dgamma, dbeta = (dy * xhat).sum(axis=0), dy.sum(axis=0)
    dx = gamma * inv_std * (dy - dbeta / m - xhat * dgamma / m)
    return {"y": gamma * xhat + beta, "mean": mean, "inv_std": inv_std, "dx": dx, "dgamma": dgamma, "dbeta": dbeta}


def error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


def same_bits(a: Arrays, b: Arrays) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].tobytes() == b[name].tobytes(), f"{name}: {np.abs(a[name] - b[name]).max()}"


# ---------------------------------------------------------------------------------------------- values
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_two_symmetric_rows_become_plus_and_minus_gamma(backend: str, dtype: Any) -> None:
    given = draw(2, 3, dtype) | {"x": np.array([[1, -2, 5], [3, 2, 5]], dtype)}
    got = run("batchnorm_forward", given, backend, eps=1e-12)
    gamma, beta = given["gamma"], given["beta"]
    want = np.stack([beta - gamma * [1, 1, 0], beta + gamma * [1, 1, 0]])
    np.testing.assert_allclose(got["y"], want, rtol=1e-6)
    np.testing.assert_array_equal(got["mean"], [2, 0, 5])
    np.testing.assert_allclose(got["inv_std"], [1, 0.5, 1e6], rtol=1e-6)


@pytest.mark.parametrize("shape", [(2, 1), (3, 7), (50, 33), (257, 130), (4100, 40)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_formulas(backend: str, dtype: Any, shape: tuple[int, int]) -> None:
    given = draw(*shape, dtype)
    got, want = forward_backward(given, backend), exact(given)
    if shape[0] == 2:  # dx is eps / var of its terms
        del want["dx"]
    bound = (64 + np.sqrt(shape[0])) * np.finfo(dtype).eps
    for name, value in want.items():
        assert error(got[name], value) <= bound, name


@pytest.mark.parametrize("first", [0.0, 10.0])
@pytest.mark.parametrize("shape", [(64, 40), (256, 33), (4096, 70)])
def test_large_mean_small_deviation(backend: str, shape: tuple[int, int], first: float) -> None:
    """float32 at mean 1e4, deviation 1e-2 (ten ulps of x); also when the first rows are no hint of the mean."""
    given = draw(*shape, mean=1e4, deviation=1e-2)
    given["x"][:8] += np.float32(first)
    got, want = forward_backward(given, backend), exact(given)
    for name, value in want.items():
        assert error(got[name], value) <= (2e-5 if backend == "numpy" else 4e-6), name


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_running_statistics(backend: str, dtype: Any) -> None:
    given = draw(37, 45, dtype)
    got = run("batchnorm_forward", given, backend, decay=0.75)
    x = given["x"].astype(np.float64)
    mean, var = 0.75 * given["running_mean"] + 0.25 * x.mean(0), 0.75 * given["running_var"] + 0.25 * x.var(0, ddof=1)
    np.testing.assert_allclose(got["running_mean"], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got["running_var"], var, rtol=1e-5)


def test_one_row_has_no_variance_and_leaves_the_running_statistics(backend: str) -> None:
    given = draw(1, 70)
    got = forward_backward(given, backend)
    np.testing.assert_array_equal(got["y"][0], given["beta"])
    np.testing.assert_array_equal(got["mean"], given["x"][0])
    np.testing.assert_allclose(got["inv_std"], 1 / np.sqrt(1e-5), rtol=1e-6)
    for name in ("running_mean", "running_var"):
        np.testing.assert_array_equal(got[name], given[name])
    np.testing.assert_array_equal(got["dx"], 0)
    np.testing.assert_array_equal(got["dgamma"], 0)
    np.testing.assert_array_equal(got["dbeta"], given["dy"][0])


@pytest.mark.parametrize("activation", ["identity", "relu", "prelu", "tanh"])
def test_inference_uses_the_running_statistics(backend: str, activation: str) -> None:
    given = draw(33, 50)
    got = run("batchnorm_inference", given, backend, **arguments(activation))["y"]
    wide = {name: value.astype(np.float64) for name, value in given.items()}
    u = wide["gamma"] * (wide["x"] - wide["running_mean"]) / np.sqrt(wide["running_var"] + 1e-5) + wide["beta"]
    want = np.empty_like(u)
    ACTIVATIONS[activation].forward(u, want, slope=wide["slope"])
    assert error(got, want) <= 2e-6


def test_nan_stays_in_its_column(backend: str) -> None:
    given = draw(50, 40)
    clean = forward_backward(given, backend, **arguments("relu"))
    given["x"][20, 7] = np.nan
    got = forward_backward(given, backend, **arguments("relu"))
    others = np.arange(40) != 7
    for name in ("y", "dx", "dgamma"):
        assert np.isnan(got[name][..., 7]).all(), name
    np.testing.assert_array_equal(got["y"][:, others], clean["y"][:, others])
    np.testing.assert_array_equal(got["dx"][:, others], clean["dx"][:, others])


# ---------------------------------------------------------------------------------------------- fusion
def composed(given: Arrays, backend: str, activation: str, rate: float) -> Arrays:
    """batchnorm, activation and dropout as ops of their own."""
    options, info = arguments(activation, rate), ACTIVATIONS[activation]
    stream = {k: options[k] for k in ("rate", "seed", "layer", "step")}
    alpha = {} if info.alpha is None else {"alpha": info.alpha}
    slope = (given["slope"],) if info.per_channel else ()
    out = run("batchnorm_forward", given, backend)
    u, act, dz = out["y"], np.empty_like(out["y"]), np.empty_like(out["y"])
    dispatch.run(f"{activation}_forward", u, *slope, act, backend=backend, **alpha)
    out["y"], dy = act.copy(), given["dy"]
    if rate:
        dispatch.run("dropout_forward", act, out["y"], backend=backend, **stream)
        dy = np.empty_like(dz)
        dispatch.run("dropout_backward", given["dy"], dy, backend=backend, **stream)
    saved = act if info.saves == "y" else u
    dslope = {"dslope": np.empty_like(given["slope"])} if info.per_channel else {}
    dispatch.run(f"{activation}_backward", dy, saved, *slope, dz, *dslope.values(), backend=backend, **alpha)
    return out | run("batchnorm_backward", given | out | {"dy": dz}, backend) | dslope


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("activation", FUSABLE)
def test_fused_is_the_composition(backend: str, activation: str, rate: float) -> None:
    """NumPy and compiled kernels do the same operations in the same order; LLVM may contract a fused loop otherwise."""
    given = draw(70, 45)
    got, want = (
        forward_backward(given, backend, **arguments(activation, rate)),
        composed(given, backend, activation, rate),
    )
    if backend == "numba":
        assert got.keys() == want.keys()
        for name in got:
            np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=2e-6 * np.abs(want[name]).max())
        np.testing.assert_array_equal(got["y"] == 0, want["y"] == 0)
    else:
        same_bits(got, want)


@pytest.mark.parametrize("mean", [0.3, 1e4])
def test_relu_passes_exactly_what_it_let_through(backend: str, mean: float) -> None:
    """dbeta of dy = 1 counts the positive outputs: one that backward rounds to the other side of zero would show."""
    given = draw(3000, 200, mean=mean, deviation=1.0 if mean < 1 else 1e-2)
    given["dy"][...] = 1
    got = forward_backward(given, backend, **arguments("relu"))
    np.testing.assert_array_equal(got["dbeta"], (got["y"] > 0).sum(axis=0))


def test_a_batch_in_two_parts_draws_the_same_mask(backend: str) -> None:
    given = draw(40, 50, np.float64) | {"gamma": np.zeros(50), "beta": np.ones(50)}
    whole = run("batchnorm_forward", given, backend, **arguments(rate=0.5))["y"]
    parts = [
        run("batchnorm_forward", given | {"x": x}, backend, **arguments(rate=0.5, first_row=first))["y"]
        for first, x in ((0, given["x"][:13]), (13, given["x"][13:]))
    ]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert 0.4 < (whole == 0).mean() < 0.6


def test_dx_may_be_dy(backend: str) -> None:
    given = draw(70, 45)
    for options in (arguments(), arguments("relu", 0.3), arguments("gelu", 0.3)):
        want = forward_backward(given, backend, **options)
        names = ("x", "gamma", "beta", "mean", "inv_std")
        both, dgamma, dbeta = given["dy"].copy(), np.empty(45, np.float32), np.empty(45, np.float32)
        y = want["y"] if options.get("activation") == "relu" else None
        arrays = (both, *((given | want)[k] for k in names), None, y, both, dgamma, dbeta, None)
        dispatch.run("batchnorm_backward", *arrays, backend=backend, **options)
        np.testing.assert_array_equal(both, want["dx"])


# ---------------------------------------------------------------------------------------------- forms of one kernel
@pytest.mark.parametrize("options", [arguments(), arguments("relu", 0.3), arguments("prelu", 0.3), arguments("gelu")])
def test_threads_do_not_change_a_bit(backend: str, options: Arrays) -> None:
    given = draw(300, 330)
    want = forward_backward(given, backend, **options)
    for threads in (2, 3, 4):
        same_bits(forward_backward(given, backend, threads=threads, **options), want)


@compiled
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("options", [arguments(), arguments("relu", 0.3), arguments("prelu", 0.3), arguments("tanh")])
@pytest.mark.parametrize("shape", [(1, 5), (7, 32), (300, 100)])
def test_panels_give_the_bits_of_plain_rows(shape: tuple[int, int], options: Arrays, threads: int) -> None:
    given = draw(*shape)
    plain = forward_backward(given, "cython", **options)
    same_bits(forward_backward(given, "cython", panels=True, threads=threads, **options), plain)
    inference = {"given": given, "op": "batchnorm_inference", "backend": "cython", **options}
    same_bits(run(panels=True, **inference), run(**inference))


@compiled
def test_padding_of_panels_stays_zero() -> None:
    given = draw(50, 45)
    x, dy = pack(given["x"]), pack(given["dy"])
    y, dx = (Panels(np.full_like(x.data, np.nan), 45) for _ in range(2))
    mean, inv_std, dgamma, dbeta = (np.empty(45, np.float32) for _ in range(4))
    options = arguments("cos", 0.3)
    vectors = (given["gamma"], given["beta"])
    statistics = (given["running_mean"], given["running_var"])
    dispatch.run("batchnorm_forward", x, *vectors, *statistics, None, y, mean, inv_std, backend="cython", **options)
    arrays = (dy, x, *vectors, mean, inv_std, None, None, dx, dgamma, dbeta, None)
    dispatch.run("batchnorm_backward", *arrays, backend="cython", **options)
    np.testing.assert_array_equal(y.data[1, :, 13:], 0)
    np.testing.assert_array_equal(dx.data[1, :, 13:], 0)


@pytest.mark.parametrize("options", [arguments(), arguments("relu", 0.3), arguments("softplus", 0.3)])
def test_levels_agree(level: str, options: Arrays) -> None:
    given = draw(300, 77)
    want = forward_backward({k: v.astype(np.float64) for k, v in given.items()}, "numpy", **options)
    got = forward_backward(given, "cython", **options)
    for name in want:
        assert error(got[name], want[name]) <= 2e-6, name


def test_strided_rows(backend: str) -> None:
    given = draw(50, 40)
    want = run("batchnorm_forward", given, backend)["y"]
    wide = np.full((50, 90), np.nan, np.float32)
    wide[:, 3:43] = given["x"]
    y, mean, inv_std = np.zeros((50, 64), np.float32), np.empty(40, np.float32), np.empty(40, np.float32)
    vectors = [given[k].copy() for k in ("gamma", "beta", "running_mean", "running_var")]
    dispatch.run("batchnorm_forward", wide[:, 3:43], *vectors, None, y[:, 5:45], mean, inv_std, backend=backend)
    np.testing.assert_allclose(y[:, 5:45], want, rtol=1e-5, atol=1e-6)
    assert not np.delete(y, np.s_[5:45], axis=1).any()


# ---------------------------------------------------------------------------------------------- gradients
@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("activation", FUSABLE)
def test_central_differences(backend: str, activation: str, rate: float) -> None:
    """Of sum(dy y) through the fused forward op, float64."""
    given, options = draw(9, 5, np.float64, seed=1), arguments(activation, rate)
    got, h = forward_backward(given, backend, **options), 1e-5
    for name in ("x", "gamma", "beta", "slope")[: 4 if activation == "prelu" else 3]:
        numeric = np.empty_like(given[name])
        for k in np.ndindex(numeric.shape):
            values = []
            for sign in (1, -1):
                moved = given[name].copy()
                moved[k] += sign * h
                y = run("batchnorm_forward", given | {name: moved}, backend, **options)["y"]
                values.append((y * given["dy"]).sum())
            numeric[k] = (values[0] - values[1]) / (2 * h)
        analytic = got[f"d{name}"]
        assert np.abs(analytic - numeric).max() / max(1, np.abs(analytic).max()) <= 1e-8, name


def test_constant_statistics_give_the_plain_chain_rule(backend: str) -> None:
    given = draw(33, 50) | {"mean": draw(1, 50)["beta"], "inv_std": draw(1, 50)["gamma"]}
    got = run("batchnorm_backward", given, backend, **arguments(training=0))
    xhat = (given["x"].astype(np.float64) - given["mean"]) * given["inv_std"]
    np.testing.assert_allclose(got["dx"], given["dy"] * (given["gamma"] * given["inv_std"]), rtol=1e-6)
    assert error(got["dgamma"], (given["dy"] * xhat).sum(axis=0)) <= 1e-5
    assert error(got["dbeta"], given["dy"].astype(np.float64).sum(axis=0)) <= 1e-5


def test_float32_holds_columns_within_1e15_and_loses_larger_ones_without_nan(backend, rng):
    """The limit that `layers.BatchNorm` names: squares of deviations are added up in float32."""
    base = rng.standard_normal((1000, 3))
    for size, lost in ((1e15, False), (1e25, True)):
        x, gamma, beta = (base * size).astype(np.float32), np.ones(3, np.float32), np.full(3, 0.5, np.float32)
        mean, var = np.zeros(3, np.float32), np.ones(3, np.float32)
        with np.errstate(over="ignore"):
            y, _ = ops.batchnorm_forward(x, gamma, beta, mean, var, backend=backend)
        want = np.full_like(y, 0.5) if lost else (base - base.mean(0)) / base.std(0) + 0.5
        np.testing.assert_allclose(y, want, atol=1e-4)
        assert np.isinf(var).all() == lost
