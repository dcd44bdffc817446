"""Dense products: exact on small integers at every level and layout, equal bits for every thread count."""

from __future__ import annotations

import numpy as np
import pytest

from fastdl.kernels import dispatch
from fastdl.kernels.engine import panels

LAYOUTS = ("plain", "strided", "transposed", "panels")
DTYPES = (np.float32, np.float64)
NAMED = ((1, 1, 1), (7, 13, 5), (129, 257, 63), (1, 4096, 1000), (4096, 1, 3))
EMPTY = ((0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0))


def shapes(count: int) -> list[tuple[int, int, int]]:
    """The named shapes, tile and panel edges, then log-uniform ones up to 300 (N, I, O)."""
    rng = np.random.default_rng(11)
    edges = [(n, i, o) for n in (6, 14, 15) for i in (31, 32, 33) for o in (8, 16, 32, 33, 64)]
    blocks = [(600, 40, 33), (33, 1100, 40), (40, 33, 1100), (130, 64, 96), (1, 1, 300), (300, 300, 1)]
    blocks += [(1, 700, 490), (2, 40, 257), (3, 600, 230)]  # several panels at once
    found = [*NAMED, *blocks, *edges]
    while len(found) < count:
        found.append(tuple(int(v) for v in np.exp(rng.uniform(0, np.log(300), 3))))
    return found[:count]


def laid_out(a: np.ndarray, layout: str):
    """The values of ``a`` in a layout; what surrounds them is NaN."""
    if layout == "strided":
        around = np.full((2 * a.shape[0] + 1, a.shape[1] + 5), np.nan, a.dtype)
        view = around[1::2, 3 : 3 + a.shape[1]]
        view[...] = a
        return view
    if layout == "transposed":
        return np.ascontiguousarray(a.T).T
    return panels.pack(a) if layout == "panels" else a


def blank(shape: tuple[int, int], dtype: type, layout: str):
    """An output full of NaN (its padding is 0 in panels)."""
    return laid_out(np.full(shape, np.nan, dtype), "plain" if layout == "transposed" else layout)


def plain(a) -> np.ndarray:
    return a.unpack() if isinstance(a, panels.Panels) else a


def integers(rng: np.random.Generator, n: int, i: int, o: int) -> list[np.ndarray]:
    """x, w, b, dy of whole numbers: every sum of products is exact in float32, whatever its order."""
    return [rng.integers(-3, 4, shape).astype(np.float64) for shape in ((n, i), (i, o), (o,), (n, o))]


def products(arrays: list[np.ndarray]) -> list[np.ndarray]:
    """z, dx, dw, db in float64."""
    x, w, b, dy = arrays
    return [x @ w + b, dy @ w.T, x.T @ dy, dy.sum(axis=0)]


def check_exact(
    arrays: list[np.ndarray], dtype: type, layout: str, backend: str, threads: int, want: list[np.ndarray] | None = None
) -> None:
    x, w, b, dy = arrays
    want_z, want_dx, want_dw, want_db = want or products(arrays)
    n, i, o = x.shape[0], x.shape[1], w.shape[1]
    xs, ws, ds = (laid_out(a.astype(dtype), layout) for a in (x, w, dy))
    bias = b.astype(dtype)
    options = {"backend": backend, "threads": threads}
    y, z, dx, dw = (blank(s, dtype, layout) for s in ((n, o), (n, o), (n, i), (i, o)))
    db = np.full(o, np.nan, dtype)
    dispatch.run("dense_forward", xs, ws, bias, y, z, activation="relu", **options)
    np.testing.assert_array_equal(plain(z), want_z)
    np.testing.assert_array_equal(plain(y), np.maximum(want_z, 0))
    y, z = blank((n, o), dtype, layout), blank((n, o), dtype, layout)
    dispatch.run("dense_forward", xs, ws, None, y, None, **options)
    np.testing.assert_array_equal(plain(y), want_z - b)
    dispatch.run("dense_forward", xs, ws, bias, y, z, **options)
    np.testing.assert_array_equal(plain(y), want_z)
    np.testing.assert_array_equal(plain(z), want_z)
    dispatch.run("dense_backward_input", ds, ws, dx, **options)
    np.testing.assert_array_equal(plain(dx), want_dx)
    dispatch.run("dense_backward_weights", xs, ds, dw, db, **options)
    np.testing.assert_array_equal(plain(dw), want_dw)
    np.testing.assert_array_equal(db, want_db)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_exact_at_every_level(level, layout):
    rng = np.random.default_rng(3)
    for shape in shapes(200):
        arrays = integers(rng, *shape)
        want = products(arrays)
        for dtype in DTYPES:
            for threads in (1, 2):
                check_exact(arrays, dtype, layout, "cython", threads, want)


@pytest.mark.parametrize("name", ["numpy", "numba"])
@pytest.mark.parametrize("layout", LAYOUTS[:3])
def test_exact_elsewhere(name, layout):
    if dispatch.load(name) != "available":
        pytest.skip(f"{name}: {dispatch.load(name)}")
    rng = np.random.default_rng(4)
    for shape in shapes(20):
        for threads in (1, 2):
            check_exact(integers(rng, *shape), np.float32, layout, name, threads)


@pytest.mark.parametrize("shape", EMPTY)
def test_without_rows_inputs_or_outputs(level, shape):
    for layout in LAYOUTS[:3]:
        for threads in (1, 3):
            check_exact(integers(np.random.default_rng(5), *shape), np.float32, layout, "cython", threads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_bit(level, dtype):
    rng = np.random.default_rng(6)
    for n, i, o in [*shapes(30), (700, 800, 70), (70, 1300, 200), (1100, 70, 40)]:
        x, w, b, dy = (rng.standard_normal(s).astype(dtype) for s in ((n, i), (i, o), (o,), (n, o)))
        seen = set()
        for threads in (1, 2, 3, 5):
            y, dx, dw, db = (np.full(s, np.nan, dtype) for s in ((n, o), (n, i), (i, o), (o,)))
            options = {"backend": "cython", "threads": threads}
            dispatch.run("dense_forward", x, w, b, y, None, activation="relu", **options)
            dispatch.run("dense_backward_input", dy, w, dx, **options)
            dispatch.run("dense_backward_weights", x, dy, dw, db, **options)
            seen.add(b"".join(a.tobytes() for a in (y, dx, dw, db)))
        assert len(seen) == 1, f"bits depend on the thread count at {(n, i, o)}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["plain", "strided", "panels"])
def test_few_rows_have_the_bits_of_many(level, layout, dtype):
    """Transposed weights are left out: few rows times them are dot products, whose lanes are k."""
    rng = np.random.default_rng(9)
    for i, o in ((37, 300), (1100, 490), (64, 33)):
        x, w, b = (rng.standard_normal(s).astype(dtype) for s in ((20, i), (i, o), (o,)))
        ws = laid_out(w, layout)
        for activation in ("identity", "relu", "tanh"):
            options = {"activation": activation, "backend": "cython"}
            want, want_z = blank((20, o), dtype, layout), blank((20, o), dtype, layout)
            dispatch.run("dense_forward", laid_out(x, layout), ws, b, want, want_z, **options)
            for rows, threads in ((1, 1), (1, 3), (2, 1), (3, 2), (4, 1)):
                xs = laid_out(x[:rows], layout)
                y, z = blank((rows, o), dtype, layout), blank((rows, o), dtype, layout)
                dispatch.run("dense_forward", xs, ws, b, y, z, threads=threads, **options)
                np.testing.assert_array_equal(plain(y), plain(want)[:rows])
                np.testing.assert_array_equal(plain(z), plain(want_z)[:rows])


@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "gelu", "leaky_relu", "elu", "softplus"])
@pytest.mark.parametrize("layout", ["plain", "panels"])
def test_activation_on_the_finished_panel(level, activation, layout):
    """An activation from the table equals the activation's own op on z, bit for bit."""
    rng = np.random.default_rng(7)
    for n, i, o in ((1, 3, 5), (230, 70, 45), (40, 1100, 64)):
        x, w, b = (rng.standard_normal(s).astype(np.float32) for s in ((n, i), (i, o), (o,)))
        w /= np.float32(np.sqrt(i))
        options = {"backend": "cython", "threads": 2}
        params = {"alpha": 0.01} if activation in ("leaky_relu", "elu") else {}
        y, z, alone = (blank((n, o), np.float32, layout) for _ in range(3))
        want = np.empty((n, o), np.float32)
        xs, ws = laid_out(x, layout), laid_out(w, layout)
        dispatch.run("dense_forward", xs, ws, b, y, z, activation=activation, **params, **options)
        dispatch.run("dense_forward", xs, ws, b, alone, None, activation=activation, **params, **options)
        dispatch.run(f"{activation}_forward", plain(z), want, **params, **options)
        np.testing.assert_array_equal(plain(y), want)
        np.testing.assert_array_equal(plain(alone), want)


@pytest.mark.parametrize("layout", ["plain", "panels"])
def test_non_finite_values_follow_ieee(level, layout):
    """0 * inf is NaN, NaN passes the ReLU, and neither leaves its row; the padding of panels stays 0."""
    x, w = np.zeros((40, 40), np.float32), np.ones((40, 37), np.float32)
    x[3, 5], x[4, 0], w[7, 2] = np.nan, np.inf, np.inf
    y = blank((40, 37), np.float32, layout)
    dispatch.run(
        "dense_forward", laid_out(x, layout), laid_out(w, layout), None, y, None, activation="relu", backend="cython"
    )
    with np.errstate(invalid="ignore"):
        want = x @ w
    assert np.isnan(want[0, 2])
    np.testing.assert_array_equal(plain(y), np.where(want < 0, 0, want))
    if layout == "panels":
        assert not y.data[1, :, 37 - 32 :].any()


@pytest.mark.parametrize("name", ["y", "dx", "dw", "db"])
def test_the_exact_check_can_fail(monkeypatch, name):
    """One element off by one, in any of the products, is found."""
    place = {"y": ("dense_forward", 3), "dx": ("dense_backward_input", 2), "dw": ("dense_backward_weights", 2)}
    op, position = place.get(name, ("dense_backward_weights", 3))
    honest = dispatch.run

    def faulty(called, *arrays, **options):
        honest(called, *arrays, **options)
        if called == op:
            arrays[position].flat[-1] += 1

    monkeypatch.setattr(dispatch, "run", faulty)
    with pytest.raises(AssertionError):
        check_exact(integers(np.random.default_rng(8), 9, 9, 9), np.float32, "plain", "numpy", 1)
