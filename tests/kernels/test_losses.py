"""Losses: closed forms, stability, gradients, weights, layouts, threads, levels, and the checks of targets."""

import math

import numpy as np
import pytest

from fastdl import losses
from fastdl.kernels import dispatch
from fastdl.kernels.engine import panels

OPS = ("softmax_cross_entropy", "softmax_cross_entropy_onehot", "binary_cross_entropy", "mse")
RTOL = {np.float32: 3e-6, np.float64: 1e-14}


def draw(op, rows, cols, dtype=np.float64, seed=0):
    """Logits, targets and weights of a case."""
    rng = np.random.default_rng(seed)
    z = (3 * rng.standard_normal((rows, cols))).astype(dtype)
    if op == "softmax_cross_entropy":
        targets = rng.integers(0, cols, rows)
    elif op == "softmax_cross_entropy_onehot":
        targets = rng.dirichlet(np.ones(cols), rows).astype(dtype)
    elif op == "binary_cross_entropy":
        targets = rng.random((rows, cols)).astype(dtype)
    else:
        targets = rng.standard_normal((rows, cols)).astype(dtype)
    return z, targets, (0.5 + rng.random(rows)).astype(dtype)


def run(op, z, targets, weight=None, backend="numpy", gradient=True, **settings):
    stats, dz = np.full(3, np.nan), np.full_like(z, np.nan) if gradient else None
    dispatch.run(op, z, targets, weight, stats, dz, backend=backend, **settings)
    return stats, dz


def exact(op, z, targets, weight=None):
    """Row by row with math.fsum: (loss, right predictions)."""
    total, right = [], 0
    for r in range(len(z)):
        row = [float(x) for x in z[r]]
        if op.startswith("softmax"):
            t = np.eye(len(row))[targets[r]] if targets.ndim == 1 else targets[r]
            top = max(row)
            lse = top + math.log(math.fsum(math.exp(x - top) for x in row))
            value = math.fsum(float(p) * (lse - x) for p, x in zip(t, row, strict=True))
            right += int(np.argmax(row) == np.argmax(t))
        elif op == "binary_cross_entropy":
            pairs = [(x, float(t)) for x, t in zip(row, targets[r], strict=True)]
            value = math.fsum(max(x, 0) - x * t + math.log1p(math.exp(-abs(x))) for x, t in pairs) / len(row)
            right += all((x > 0) == (t > 0.5) for x, t in pairs)
        else:
            value = math.fsum((x - float(t)) ** 2 for x, t in zip(row, targets[r], strict=True)) / len(row)
        total.append(value * (1.0 if weight is None else float(weight[r])))
    return math.fsum(total) / (len(z) if weight is None else math.fsum(map(float, weight))), right


# ------------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("rows", "cols"), [(1, 1), (1, 2), (3, 10), (64, 16), (65, 17), (130, 32), (7, 33), (129, 100), (5, 1000), (200, 1)]
)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("weighted", [False, True])
def test_closed_forms(backend, op, rows, cols, dtype, weighted):
    z, targets, weight = draw(op, rows, cols, dtype)
    weight = weight if weighted else None
    stats, dz = run(op, z, targets, weight, backend)
    value, right = exact(op, z, targets, weight)
    assert stats[0] == pytest.approx(value, rel=RTOL[dtype] * 10, abs=RTOL[dtype])
    assert stats[1] == pytest.approx(rows if weight is None else weight.sum(dtype=np.float64), rel=1e-12)
    assert stats[2] == right
    _, want = run(op, z.astype(np.float64), targets if targets.ndim == 1 else targets.astype(np.float64),
                  None if weight is None else weight.astype(np.float64))  # fmt: skip
    np.testing.assert_allclose(dz, want, rtol=20 * RTOL[dtype], atol=2 * RTOL[dtype] / rows)
    evaluated, nothing = run(op, z, targets, weight, backend, gradient=False)
    assert nothing is None
    np.testing.assert_allclose(evaluated, stats, rtol=RTOL[dtype])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("weighted", [False, True])
def test_gradient_by_central_differences(backend, op, weighted):
    z, targets, weight = draw(op, 5, 7)
    weight = weight if weighted else None
    _, dz = run(op, z, targets, weight, backend)
    numeric, h = np.empty_like(z), 1e-5
    for index in np.ndindex(z.shape):
        moved = []
        for sign in (1, -1):
            x = z.copy()
            x[index] += sign * h
            moved.append(run(op, x, targets, weight, backend, gradient=False)[0][0])
        numeric[index] = (moved[0] - moved[1]) / (2 * h)
    assert np.abs(dz - numeric).max() / max(1, np.abs(numeric).max()) <= 1e-8


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_large_logits_neither_overflow_nor_cancel(backend, dtype):
    z = np.array([[1e4, 1e4 - 1, -1e4], [-1e4, -1e4, -1e4 - 2]], dtype)
    want = [math.log1p(math.exp(-1)), math.log(2 + math.exp(-2))]
    stats, dz = run("softmax_cross_entropy", z, np.array([0, 1]), None, backend)
    assert stats[0] == pytest.approx(sum(want) / 2, rel=10 * RTOL[dtype])
    assert np.isfinite(dz).all()
    np.testing.assert_allclose(dz.sum(axis=1), 0, atol=RTOL[dtype])
    stats, _ = run("softmax_cross_entropy_onehot", z, np.eye(3, dtype=dtype)[[0, 1]], None, backend)
    assert stats[0] == pytest.approx(sum(want) / 2, rel=10 * RTOL[dtype])
    stats, dz = run(
        "binary_cross_entropy", np.array([[1e4], [-1e4]], dtype), np.array([[0], [0]], dtype), None, backend
    )
    assert stats[0] == pytest.approx(5000)
    np.testing.assert_array_equal(dz, [[0.5], [0]])


@pytest.mark.parametrize("op", OPS)
def test_total_rows_split_a_batch(backend, op):
    z, targets, _ = draw(op, 100, 12)
    whole, dz = run(op, z, targets, None, backend)
    parts = [run(op, z[s], targets[s], None, backend, total_rows=100) for s in (slice(0, 30), slice(30, 100))]
    assert sum(stats[0] for stats, _ in parts) == pytest.approx(whole[0], rel=1e-13)
    assert [stats[1] for stats, _ in parts] == [30, 70]
    np.testing.assert_allclose(np.concatenate([d for _, d in parts]), dz, rtol=1e-13)


@pytest.mark.parametrize("op", OPS)
def test_weighted_shares_add_up_to_the_mean_times_the_mean_weight(backend, op):
    z, targets, weight = draw(op, 100, 12)
    weight[:40:3] = 0
    whole, dz = run(op, z, targets, weight, backend, total_rows=100)  # all rows: the mean already
    np.testing.assert_array_equal(run(op, z, targets, weight, backend)[0], whole)
    shares = slice(0, 1), slice(1, 30), slice(30, 100)
    parts = [run(op, z[s], targets[s], weight[s], backend, total_rows=100) for s in shares]
    scale = 100 / sum(stats[1] for stats, _ in parts)
    assert scale == pytest.approx(100 / weight.sum(), rel=1e-13)
    assert sum(stats[0] for stats, _ in parts) * scale == pytest.approx(whole[0], rel=1e-13)
    np.testing.assert_allclose(np.concatenate([d for _, d in parts]) * scale, dz, rtol=1e-12, atol=1e-17)


@pytest.mark.parametrize("op", OPS)
def test_weights_are_repetitions(backend, op):
    z, targets, _ = draw(op, 6, 4)
    times = np.array([1, 3, 0, 2, 1, 1])
    weighted, dz = run(op, z, targets, times.astype(float), backend)
    repeated, _ = run(op, np.repeat(z, times, axis=0), np.repeat(targets, times, axis=0), None, backend)
    assert weighted[0] == pytest.approx(repeated[0], rel=1e-13)
    assert weighted[1] == 8
    assert not dz[2].any()
    nothing, dz = run(op, z, targets, np.zeros(6), backend)
    assert nothing[:2].tolist() == [0, 0]
    assert not dz.any()


def test_the_first_maximum_is_the_prediction(backend):
    z = np.array([[1.0, 2.0, 2.0], [2.0, 2.0, 1.0], [0.0, 0.0, 0.0], [1.0, 2.0, 3.0]])
    for labels, right in (([1, 0, 0, 2], 4), ([2, 1, 2, 2], 1)):
        assert run("softmax_cross_entropy", z, np.array(labels), None, backend)[0][2] == right
        assert run("softmax_cross_entropy_onehot", z, np.eye(3)[labels], None, backend)[0][2] == right
    wide = np.zeros((2, 100))
    wide[:, 70:] = 1
    assert run("softmax_cross_entropy", wide, np.array([70, 71]), None, backend)[0][2] == 1


def test_binary_counts_rows_in_which_every_column_is_right(backend):
    z, t = np.array([[1.0, -1.0], [1.0, 1.0], [0.0, -2.0]]), np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    assert run("binary_cross_entropy", z, t, None, backend)[0][2] == 2


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("cols", [1, 3, 40])
def test_nan_stays_nan_and_is_never_right(backend, op, cols):
    z, targets, _ = draw(op, 3, cols)
    z[1, 0] = np.nan
    stats, dz = run(op, z, targets, None, backend)
    assert np.isnan(stats[0])
    assert stats[2] <= 2
    assert np.isnan(dz[1, 0])
    assert np.isfinite(dz[[0, 2]]).all()


@pytest.mark.parametrize("op", OPS)
def test_the_gradient_may_overwrite_the_logits(backend, op):
    z, targets, _ = draw(op, 70, 45)
    want_stats, want = run(op, z, targets, None, backend)
    stats = np.empty(3)
    dispatch.run(op, z, targets, None, stats, z, backend=backend)
    np.testing.assert_allclose(z, want, rtol=1e-12, atol=1e-17)
    np.testing.assert_allclose(stats, want_stats, rtol=1e-13)


@pytest.mark.parametrize("op", OPS)
def test_strided_rows_leave_their_surroundings_alone(backend, op):
    z, targets, weight = draw(op, 66, 10)
    room = np.full((66, 32), 7.0)
    room[:, :10] = z
    out, stats = np.full((66, 32), 5.0), np.empty(3)
    dispatch.run(op, room[:, :10], targets, weight, stats, out[:, :10], backend=backend)
    want_stats, want = run(op, z, targets, weight, backend)
    np.testing.assert_allclose(out[:, :10], want, rtol=1e-13, atol=1e-16)
    assert (out[:, 10:] == 5).all()
    np.testing.assert_allclose(stats, want_stats, rtol=1e-13)


# ------------------------------------------------------------------------------------- the compiled back end


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("rows", "cols"), [(2, 1), (130, 10), (65, 17), (64, 32), (70, 45), (3, 200)])
def test_panels_give_the_bits_of_plain_rows(level, op, rows, cols, dtype):
    z, targets, weight = draw(op, rows, cols, dtype)
    want_stats, want = run(op, z, targets, weight, "cython")
    reference, dref = run(op, z, targets, weight, "numpy")
    np.testing.assert_allclose(want_stats, reference, rtol=20 * RTOL[dtype])
    np.testing.assert_allclose(want, dref, rtol=50 * RTOL[dtype], atol=4 * RTOL[dtype] / rows)
    packed = panels.pack(z)
    packed.data[-1, :, (cols - 1) % 32 + 1 :] = 1e30  # finite, and never looked at
    dz = panels.Panels(np.full_like(packed.data, np.nan), cols)
    stats = np.empty(3)
    packed_targets = targets if targets.ndim == 1 else panels.pack(targets)
    dispatch.run(op, packed, packed_targets, weight, stats, dz, backend="cython")
    np.testing.assert_array_equal(stats, want_stats)
    np.testing.assert_array_equal(dz.unpack(), want)
    assert not dz.data[-1, :, (cols - 1) % 32 + 1 :].any()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("rows", "cols"), [(1, 10), (64, 10), (517, 10), (200, 70), (1000, 1)])
def test_no_thread_count_changes_a_bit(level, op, rows, cols, dtype):
    z, targets, weight = draw(op, rows, cols, dtype)
    for w in (None, weight):
        stats, dz = run(op, z, targets, w, "cython", threads=1)
        for threads in (2, 3, 7):
            again, d = run(op, z, targets, w, "cython", threads=threads)
            assert again.tobytes() == stats.tobytes()
            assert d.tobytes() == dz.tobytes()


def test_a_label_out_of_range_is_nan_and_touches_nothing(level):
    z, targets, _ = draw("softmax_cross_entropy", 4, 6)
    for bad in (-1, 6, 10**12):
        targets[2] = bad
        stats, dz = run("softmax_cross_entropy", z, targets, None, "cython")
        assert np.isnan(stats[0])
        assert np.isfinite(dz).all()


def test_numba_threads_agree():
    if dispatch.load("numba") != "available":
        pytest.skip(dispatch.load("numba"))
    for op in OPS:
        z, targets, weight = draw(op, 300, 20)
        one, dz = run(op, z, targets, weight, "numba", threads=1)
        two, d = run(op, z, targets, weight, "numba", threads=2)
        np.testing.assert_allclose(two, one, rtol=1e-13)
        np.testing.assert_allclose(d, dz, rtol=1e-12, atol=1e-18)


# ---------------------------------------------------------------------------------------------- descriptions


def test_get_lists_the_known_names():
    assert losses.get("mse").op == "mse"
    mine = losses.get("softmax_cross_entropy")
    assert losses.get(mine) is mine
    with pytest.raises(
        ValueError, match="unknown loss 'hinge', known: binary_cross_entropy, mse, softmax_cross_entropy"
    ):
        losses.get("hinge")


def test_targets_are_converted_once():
    loss = losses.get("softmax_cross_entropy")
    for y in ([0, 2, 1], np.array([0.0, 2.0, 1.0]), np.array([0, 2, 1], np.uint8), np.array([9, 0, 9, 2, 9, 1])[1::2]):
        checked = loss.check_targets(y, 3)
        assert checked.dtype == np.int64
        assert checked.flags.c_contiguous
        assert checked.tolist() == [0, 2, 1]
        assert loss.op_for(checked) == "softmax_cross_entropy"
    onehot = loss.check_targets(np.eye(3, dtype=int)[[0, 2]], 3, np.float64)
    assert onehot.dtype == np.float64
    assert loss.op_for(onehot) == "softmax_cross_entropy_onehot"
    assert losses.get("binary_cross_entropy").check_targets([True, False], 1).tolist() == [[1.0], [0.0]]
    assert losses.get("mse").check_targets(np.arange(6).reshape(3, 2), 2).dtype == np.float32
    assert [losses.get(n).metric for n in ("softmax_cross_entropy", "binary_cross_entropy", "mse")] == [
        "accuracy", "accuracy", None
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("loss", "y", "outputs", "message"),
    [
        ("softmax_cross_entropy", [0, 3], 3, r"labels in \[0, 3\), found 3 in row 1; the last layer needs 4 outputs"),
        ("softmax_cross_entropy", [0, -1], 3, r"labels in \[0, 3\), found -1 in row 1; number the classes from 0"),
        ("softmax_cross_entropy", [0.0, np.nan], 3, r"expected labels, found nan in row 1"),
        ("softmax_cross_entropy", [0.0, 1.5], 3, r"expected integer labels, found 1.5 in row 1"),
        ("softmax_cross_entropy", [[0], [1]], 3, r"\(N,\).*found shape \(2, 1\); y.ravel\(\)"),
        ("softmax_cross_entropy", 1, 3, r"found shape \(\)"),
        ("softmax_cross_entropy", [], 3, r"at least one target, found shape \(0,\)"),
        ("softmax_cross_entropy", [[0.5, -0.5, 1.0]], 3, r"all >= 0, found -0.5"),
        ("binary_cross_entropy", [0, 2], 1, r"in \[0, 1\], found 2.0; encode"),
        ("binary_cross_entropy", [-1, 1], 1, r"in \[0, 1\], found -1.0"),
        ("binary_cross_entropy", [0, 1], 2, r"shape \(N, 2\), found shape \(2,\)"),
        ("mse", [[1.0, np.nan]], 2, r"finite targets in float32, found nan at \[0, 1\]"),
        ("mse", [1e300], 1, r"finite targets in float32, found 1e\+300"),
        ("mse", np.zeros((2, 2, 2)), 2, r"found shape \(2, 2, 2\)"),
    ],
)
def test_bad_targets_say_what_is_expected(loss, y, outputs, message):
    with pytest.raises(ValueError, match=message):
        losses.get(loss).check_targets(y, outputs)


@pytest.mark.parametrize(
    ("loss", "y", "message"),
    [
        ("softmax_cross_entropy", ["cat", "dog"], r"found dtype <U3, text; number the classes with"),
        ("softmax_cross_entropy", np.array([0, None]), "found dtype object"),
        ("softmax_cross_entropy", [[0], [1, 2]], "expected an array of numbers"),
        ("mse", [1j], "found dtype complex128, complex numbers; take"),
    ],
)
def test_targets_that_are_no_numbers(loss, y, message):
    with pytest.raises(TypeError, match=message):
        losses.get(loss).check_targets(y, 3)
