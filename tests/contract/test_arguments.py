"""Wrong arguments of the public functions: an error with expected, found and what to do, and nothing written.

Here names of ops are known: the signatures are public.
"""

from __future__ import annotations

import numpy as np
import pytest

import fastdl as fd
from fastdl import losses, ops
from fastdl.errors import BackendUnavailable
from fastdl.kernels.activations.reference import ACTIVATIONS

from .checks import refuses

BAD = (TypeError, ValueError)
F4, F8 = np.float32, np.float64


def ones(*shape, dtype=F4):
    return np.ones(shape, dtype)


def off_by_a_byte(*shape, dtype=F4):
    """An array that no element-wise load may touch: its address is no multiple of the item size."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.zeros(size + 1, np.uint8)[1:].view(dtype).reshape(shape)


def read_only(*shape):
    x = ones(*shape)
    x.flags.writeable = False
    return x


def object_array(*shape):
    return np.full(shape, 1.0, object)


ELEMENTWISE = [name for name, info in ACTIVATIONS.items() if not info.per_channel]

#: What every function must refuse in its first array, with words of the message.
WRONG_ARRAYS = [
    pytest.param([[1.0, 2.0]], TypeError, ["expected a NumPy array", "list", "np.asarray"], id="list"),
    pytest.param(ones(3, 4, dtype=np.float16), TypeError, ["float32 or float64", "float16", "astype"], id="float16"),
    pytest.param(ones(3, 4, dtype=np.int64), TypeError, ["float32 or float64", "int64", "astype"], id="integers"),
    pytest.param(ones(3, 4, dtype=np.complex64), TypeError, ["float32 or float64", "complex64"], id="complex"),
    pytest.param(ones(3, 4, dtype=">f4"), TypeError, ["float32", "astype"], id="byte-order"),
    pytest.param(object_array(3, 4), TypeError, ["float32 or float64", "object", "astype"], id="objects"),
    pytest.param(ones(3, 8)[:, ::2], ValueError, ["adjacent", "np.ascontiguousarray"], id="columns-apart"),
    pytest.param(ones(3, 4)[:, ::-1], ValueError, ["adjacent", "np.ascontiguousarray"], id="columns-reversed"),
    pytest.param(off_by_a_byte(3, 4), ValueError, ["aligned", "np.array"], id="unaligned"),
]


def batchnorm(x, **options):
    c = x.shape[-1] if isinstance(x, np.ndarray) else 2
    return ops.batchnorm_forward(x, ones(c), ones(c), ones(c), ones(c), **options)


FIRST = {
    "relu": lambda x: ops.relu_forward(x),
    "softmax": lambda x: ops.softmax_forward(x),
    "prelu": lambda x: ops.prelu_forward(x, ones(4)),
    "dense": lambda x: ops.dense_forward(x, ones(4, 2)),
    "batchnorm": batchnorm,
    "dropout": lambda x: ops.dropout_forward(x, 0.5, 1),
    "softmax_cross_entropy": lambda z: ops.softmax_cross_entropy(z, np.zeros(3, np.int64)),
    "binary_cross_entropy": lambda z: ops.binary_cross_entropy(z, ones(3, 4)),
    "mse": lambda z: ops.mse(z, ones(3, 4)),
}


@pytest.mark.parametrize("function", FIRST.values(), ids=FIRST)
@pytest.mark.parametrize(("x", "error", "words"), WRONG_ARRAYS)
def test_first_array(function, x, error, words):
    refuses(lambda: function(x), error, words)


@pytest.mark.parametrize(
    "x", [ones(4), ones(2, 3, 4), np.float32(1) * ones(1)[0:0].reshape(0)], ids=["1d", "3d", "empty"]
)
def test_rank_of_matrices(x):
    for name in ("dense", "batchnorm", "softmax_cross_entropy", "binary_cross_entropy", "mse"):
        refuses(lambda name=name: FIRST[name](x), ValueError, ["expected two dimensions", str(x.shape)])


def test_scalar_and_empty():
    refuses(lambda: ops.relu_forward(np.array(1.0)), ValueError, ["expected at least one dimension", "scalar"])
    refuses(lambda: batchnorm(ones(0, 3)), ValueError, ["expected at least one row", "none"])
    for loss in (ops.mse, ops.binary_cross_entropy, ops.softmax_cross_entropy):
        refuses(lambda loss=loss: loss(ones(0, 3), ones(0, 3)), ValueError, ["expected at least one row", "(0, 3)"])
        refuses(lambda loss=loss: loss(ones(3, 0), ones(3, 0)), ValueError, ["one column", "(3, 0)"])


def test_empty_batches_of_ops_that_take_them(backend):
    x = ones(0, 3)
    y, ctx = ops.relu_forward(x, backend=backend)
    assert y.shape == ops.relu_backward(x, ctx).shape == (0, 3)
    y, ctx = ops.dense_forward(x, ones(3, 2), np.full(2, 5, F4), backend=backend)
    dx, dw, db = ops.dense_backward(y, ctx)
    assert (y.shape, dx.shape) == ((0, 2), (0, 3))
    assert not dw.any()
    assert not db.any()
    assert ops.dropout_forward(x, 0.5, 1, backend=backend)[0].shape == (0, 3)
    assert ops.relu_forward(ones(3, 0), backend=backend)[0].shape == (3, 0)
    assert np.array_equal(
        ops.dense_forward(ones(2, 0), ones(0, 2), np.full(2, 5, F4), backend=backend)[0], np.full((2, 2), 5)
    )


# ---------------------------------------------------------------------------------------------- shapes and dtypes
def test_dense_shapes_and_dtypes():
    x, w, b = ones(3, 4), ones(4, 2), ones(2)
    refuses(lambda: ops.dense_forward(x, ones(5, 2)), ValueError, ["w: expected 4 rows", "(5, 2)"])
    refuses(lambda: ops.dense_forward(x, ones(4)), ValueError, ["w: expected two dimensions", "(4,)"])
    refuses(lambda: ops.dense_forward(x, w.astype(F8)), TypeError, ["w: expected dtype float32", "float64", "astype"])
    refuses(lambda: ops.dense_forward(x, w, ones(3)), ValueError, ["b: expected shape (2,)", "(3,)"])
    refuses(lambda: ops.dense_forward(x, w, ones(1, 2)), ValueError, ["b: expected shape (2,)", "(1, 2)"])
    refuses(lambda: ops.dense_forward(x, w, b.astype(F8)), TypeError, ["b: expected dtype float32", "float64"])
    refuses(lambda: ops.dense_forward(x, w, ones(4)[::2]), ValueError, ["b: expected adjacent", "np.ascontiguousarray"])
    refuses(lambda: ops.dense_forward(x, w, b, alpha=0.3), ValueError, ["alpha", "identity", "0.3"])
    _, ctx = ops.dense_forward(x, w, b)
    refuses(lambda: ops.dense_backward(ones(3, 3), ctx), ValueError, ["dy: expected shape (3, 2)", "(3, 3)"])
    refuses(lambda: ops.dense_backward(ones(3, 2, dtype=F8), ctx), TypeError, ["dy: expected dtype float32", "float64"])


def test_contexts():
    y, ctx = ops.relu_forward(ones(3, 4))
    refuses(lambda: ops.relu_backward(y, None), TypeError, ["relu_backward", "relu_forward", "NoneType"])
    refuses(lambda: ops.tanh_backward(y, ctx), ValueError, ["tanh_forward", "relu_forward"])
    refuses(lambda: ops.dense_backward(y, ctx), ValueError, ["dense_forward", "relu_forward"])


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_upstream_gradients(name):
    x = np.linspace(0.1, 0.9, 12, dtype=F4).reshape(3, 4)
    _, ctx = getattr(ops, f"{name}_forward")(x)
    backward, out = getattr(ops, f"{name}_backward"), np.full((3, 4), 7, F4)
    refuses(lambda: backward(ones(4, 3), ctx, out=out), ValueError, ["dy: expected shape (3, 4)", "(4, 3)"], [out])
    refuses(lambda: backward(ones(3, 4, dtype=F8), ctx, out=out), TypeError, ["float32", "float64", "astype"], [out])


def test_batchnorm_vectors():
    x, c = ones(3, 4), ones(4)
    arrays = {"gamma": c.copy(), "beta": c.copy(), "running_mean": c.copy(), "running_var": c.copy()}
    for name in arrays:
        for bad, kind, words in (
            (ones(5), ValueError, ["expected shape (4,)", "(5,)"]),
            (ones(4, dtype=F8), TypeError, ["expected dtype float32", "float64"]),
            (ones(8)[::2], ValueError, ["adjacent"]),
            (object_array(4), TypeError, ["object"]),
        ):
            given = {**arrays, name: bad}
            untouched = [x, *(a for a in given.values() if a.dtype != object)]
            refuses(lambda given=given: ops.batchnorm_forward(x, **given), kind, [name, *words], untouched)
    for name in ("running_mean", "running_var"):
        given = {**arrays, name: read_only(4)}
        refuses(lambda given=given: ops.batchnorm_forward(x, **given), ValueError, [name, "writable", "read-only"], [x])
    refuses(lambda: batchnorm(x, decay=1.5), ValueError, ["decay", "[0, 1]", "1.5"])
    refuses(lambda: batchnorm(x, eps=0.0), ValueError, ["eps", "positive", "0.0"])
    refuses(lambda: batchnorm(x, slope=ones(4)), ValueError, ["slope", "prelu"])
    refuses(lambda: batchnorm(x, activation="prelu"), TypeError, ["slope", "NoneType"])
    for training in ("no", 1, None, np.ones(2)):
        refuses(lambda t=training: batchnorm(x, training=t), ValueError, ["training", "True or False", repr(training)])


# ---------------------------------------------------------------------------------------------- out=
OUT = {
    "relu": (lambda x, out: ops.relu_forward(x, out=out), (5, 4)),
    "softmax": (lambda x, out: ops.softmax_forward(x, out=out), (5, 4)),
    "dense": (lambda x, out: ops.dense_forward(x, np.eye(4, dtype=F4), out=out), (5, 4)),
    "batchnorm": (lambda x, out: batchnorm(x, out=out), (5, 4)),
    "dropout": (lambda x, out: ops.dropout_forward(x, 0.5, 1, out=out), (5, 4)),
    "mse": (lambda x, out: ops.mse(x, ones(5, 4), out=out), (5, 4)),
}


@pytest.mark.parametrize(("function", "shape"), OUT.values(), ids=OUT)
def test_out(function, shape):
    x = np.arange(20, dtype=F4).reshape(shape)
    locked = np.full(shape, 7, F4)
    locked.flags.writeable = False
    wrong_shape, wrong_dtype, apart = np.full((4, 5), 7, F4), np.full(shape, 7, F8), np.full((5, 8), 7, F4)
    refuses(lambda: function(x, locked), ValueError, ["out", "writable", "read-only"], [x, locked])
    refuses(lambda: function(x, wrong_shape), ValueError, ["out", "(5, 4)", "(4, 5)"], [x, wrong_shape])
    refuses(lambda: function(x, wrong_dtype), TypeError, ["out", "float32", "float64"], [x, wrong_dtype])
    refuses(lambda: function(x, apart[:, ::2]), ValueError, ["out", "adjacent"], [x, apart])
    refuses(lambda: function(x, [0.0]), TypeError, ["out", "list"], [x])
    refuses(lambda: function(x, off_by_a_byte(*shape)), ValueError, ["out", "aligned"], [x])


@pytest.mark.parametrize(("function", "shape"), OUT.values(), ids=OUT)
def test_overlap(function, shape):
    memory = np.arange(24, dtype=F4)
    x, one_row_on = memory[:20].reshape(shape), memory[4:].reshape(shape)
    refuses(
        lambda: function(x, one_row_on),
        ValueError,
        ["out", "overlaps x" if function is not OUT["mse"][0] else "overlaps z"],
        [memory],
    )
    flipped = x[::-1]
    refuses(lambda: function(x, flipped), ValueError, ["overlaps"], [memory])


@pytest.mark.parametrize("name", [n for n in FIRST if n not in ("relu", "prelu", "dropout")])
def test_in_place_is_for_element_wise_ops_alone(name):
    x = np.arange(12, dtype=F4).reshape(3, 4)
    call = {
        "softmax": lambda: ops.softmax_forward(x, out=x),
        "dense": lambda: ops.dense_forward(x, np.eye(4, dtype=F4), out=x),
        "batchnorm": lambda: batchnorm(x, out=x),
        "softmax_cross_entropy": lambda: ops.softmax_cross_entropy(x, np.zeros(3, np.int64), out=x),
        "binary_cross_entropy": lambda: ops.binary_cross_entropy(x, ones(3, 4), out=x),
        "mse": lambda: ops.mse(x, ones(3, 4), out=x),
    }[name]
    refuses(call, ValueError, ["out: overlaps", "hand over another array"], [x])


IN_PLACE = [name for name in ELEMENTWISE if not ACTIVATIONS[name].row_op]


@pytest.mark.parametrize("name", IN_PLACE)
def test_backward_after_a_forward_in_place(name):
    """An op that saves its output can go on, with the same gradient; one that has saved its input has lost it."""
    forward, backward = getattr(ops, f"{name}_forward"), getattr(ops, f"{name}_backward")
    x, dy = np.linspace(-2, 2, 12, dtype=F4).reshape(3, 4), ones(3, 4)
    want = backward(dy, forward(x)[1])
    _, ctx = forward(x, out=x)
    if ACTIVATIONS[name].saves == "x":
        refuses(lambda: backward(dy, ctx), ValueError, [f"{name}_backward", "overwritten"], [x, dy])
    else:
        np.testing.assert_array_equal(backward(dy, ctx), want)


def test_some_activations_save_their_input_and_some_their_output():
    assert {ACTIVATIONS[name].saves for name in IN_PLACE} == {"x", "y"}


# ---------------------------------------------------------------------------------------------- dropout, random
@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, np.nan, np.inf, True, "0.5", None])
def test_rate(rate):
    x, out = ones(3, 4), np.full((3, 4), 7, F4)
    words = ["rate", "[0, 1)", repr(rate)]
    refuses(lambda: ops.dropout_forward(x, rate, 1, out=out), ValueError, words, [x, out])
    refuses(lambda: fd.random.dropout_mask((3, 4), rate, 1), ValueError, words)
    refuses(lambda: batchnorm(x, rate=rate), ValueError, words, [x])


def test_rate_that_drops_everything():
    for call in (lambda r: ops.dropout_forward(ones(3, 4), r, 1), lambda r: fd.random.dropout_mask((3, 4), r, 1)):
        refuses(lambda call=call: call(1 - 1e-9), ValueError, ["rate", "drops every element"])


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("seed", -1),
        ("seed", 1 << 64),
        ("seed", 1.0),
        ("layer", -1),
        ("layer", 1 << 32),
        ("step", -1),
        ("step", 1 << 32),
        ("step", 0.5),
        ("first_row", -1),
        ("first_row", True),
    ],
)
def test_stream_positions(name, bad):
    given = {"seed": 1, name: bad}
    words = [name, "expected an integer", repr(bad)]
    refuses(lambda: ops.dropout_forward(ones(3, 4), 0.5, **given), BAD, words)
    refuses(lambda: fd.random.dropout_mask((3, 4), 0.5, **given), BAD, words)


def test_random():
    key = np.zeros(2, np.uint32)
    refuses(lambda: fd.random.philox4x32(np.zeros(3, np.uint32), key), ValueError, ["counter", "(..., 4)", "(3,)"])
    refuses(lambda: fd.random.philox4x32(np.zeros(4), key), ValueError, ["counter", "integers", "float64"])
    refuses(lambda: fd.random.philox4x32(np.full(4, -1), key), ValueError, ["counter", "[0, 2**32)"])
    refuses(
        lambda: fd.random.philox4x32(np.zeros(4, np.uint32), np.zeros(3, np.uint32)),
        ValueError,
        ["key", "(2,)", "(3,)"],
    )
    refuses(lambda: fd.random.permutation(0, 1), ValueError, ["n", "at least 1", "0"])
    refuses(lambda: fd.random.permutation(2.0, 1), ValueError, ["n", "integer", "2.0"])
    refuses(lambda: fd.random.dropout_mask((), 0.5, 1), ValueError, ["shape", "at least one dimension"])


# ---------------------------------------------------------------------------------------------- losses
def test_labels():
    z, out = ones(3, 4), np.full((3, 4), 7, F4)

    def loss(targets, **more):
        return lambda: ops.softmax_cross_entropy(z, targets, out=out, **more)

    refuses(loss(np.array([0, 1, 4])), ValueError, ["targets", "[0, 4)", "from 0 to 4"], [z, out])
    refuses(loss(np.array([0, -1, 2])), ValueError, ["targets", "[0, 4)", "from -1 to 2"], [z, out])
    refuses(loss(np.array([0, 1])), ValueError, ["targets", "(3,)", "(2,)"], [z, out])
    refuses(loss(np.array([0.0, 1.0, 2.0])), TypeError, ["targets", "integer", "float64"], [z, out])
    refuses(loss(np.array([0.0, np.nan, 2.0])), BAD, ["targets"], [z, out])
    refuses(loss(np.array(["a", "b", "c"])), TypeError, ["targets", "integer"], [z, out])
    refuses(loss(object_array(3)), TypeError, ["targets", "integer", "object"], [z, out])
    refuses(loss([0, 1, 2]), TypeError, ["targets", "NumPy array", "list"], [z, out])
    refuses(loss(ones(3, 5)), ValueError, ["targets", "(3, 4)", "(3, 5)"], [z, out])
    refuses(loss(ones(3, 4, dtype=F8)), TypeError, ["targets", "float32", "float64"], [z, out])


@pytest.mark.parametrize("function", [ops.softmax_cross_entropy, ops.binary_cross_entropy, ops.mse])
def test_targets_and_weights(function):
    z, t, out = ones(3, 4), ones(3, 4), np.full((3, 4), 7, F4)
    for bad in (np.nan, np.inf, -np.inf):
        not_finite = t.copy()
        not_finite[1, 2] = bad
        words = [function.__name__, "finite targets", f"found {bad} at [1, 2]"]
        refuses(lambda y=not_finite: function(z, y, out=out), ValueError, words, [z, out])
    for weight, kind, words in (
        (ones(4), ValueError, ["sample_weight", "(3,)", "(4,)"]),
        (ones(3, 1), ValueError, ["sample_weight", "(3,)", "(3, 1)"]),
        (ones(3, dtype=F8), TypeError, ["sample_weight", "float32", "float64"]),
        (np.array([1, -1, 1], F4), ValueError, ["sample_weight", "at least 0"]),
        (np.array([1, np.nan, 1], F4), ValueError, ["sample_weight", "finite"]),
        (np.zeros(3, F4), ValueError, ["sample_weight", "positive sum"]),
    ):
        refuses(lambda weight=weight: function(z, t, weight, out=out), kind, words, [z, t, out])


@pytest.mark.parametrize("bad", [-0.5, 1.5, np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", losses.KNOWN)
def test_targets_as_fit_refuses_them(name, bad):
    """In its words; what `fit` takes goes through."""
    z, t, out = ones(3, 4), np.full((3, 4), 0.25, F4), np.full((3, 4), 7, F4)
    t[2, 1] = bad
    try:
        losses.get(name).check_targets(t, 4)
    except ValueError as error:
        refuses(lambda: getattr(ops, name)(z, t, out=out), ValueError, [str(error)], [z, out])
    else:
        assert np.isfinite(getattr(ops, name)(z, t, out=out)[0])


@pytest.mark.parametrize("dtype", [F4, F8])
def test_binary_cross_entropy_of_infinite_logits(dtype, backend):
    """As the formula has it in IEEE arithmetic; the gradient is that of the limit."""
    for z, t, loss, slope in (
        (np.inf, 0.0, np.nan, 1.0),
        (np.inf, 0.5, np.nan, 0.5),
        (np.inf, 1.0, np.nan, 0.0),
        (-np.inf, 0.0, np.nan, 0.0),
        (-np.inf, 0.5, np.inf, -0.5),
        (-np.inf, 1.0, np.inf, -1.0),
    ):
        with np.errstate(all="ignore"):
            value, dz = ops.binary_cross_entropy(np.array([[z]], dtype), np.array([[t]], dtype), backend=backend)
        np.testing.assert_equal(value, loss)
        assert dz.item() == slope


# ---------------------------------------------------------------------------------------------- optimisers
@pytest.mark.parametrize("bad", ["g", "m", "v"])
def test_optimizer_arrays(bad):
    arrays = {name: np.full((3, 4), k + 1, F4) for k, name in enumerate(("w", "g", "m", "v"))}
    untouched = list(arrays.values())

    def step(x):
        given = {**arrays, bad: x}
        return lambda: ops.adam_step(given["w"], given["g"], given["m"], given["v"], 0)

    refuses(step(ones(4, 3)), ValueError, [bad, "(3, 4)", "(4, 3)"], untouched)
    refuses(step(ones(3, 4, dtype=F8)), TypeError, [bad, "float32", "float64"], untouched)
    refuses(step(ones(3, 8)[:, ::2]), ValueError, [bad, "C-contiguous"], untouched)
    refuses(step(arrays["w"]), ValueError, [bad, "overlaps w"], untouched)
    refuses(step(off_by_a_byte(3, 4)), ValueError, [bad, "aligned"], untouched)
    if bad != "g":
        refuses(step(read_only(3, 4)), ValueError, [bad, "writable", "read-only"], untouched)


def test_optimizer_arguments():
    w, g = ones(3), ones(3)
    refuses(lambda: ops.sgd_step(w, g, momentum=0.9), ValueError, ["v", "momentum"], [w, g])
    refuses(lambda: ops.adam_step(w, g, ones(3), ones(3), -1), ValueError, ["step", "-1"], [w, g])
    refuses(lambda: ops.sgd_step(read_only(3), g), ValueError, ["w", "writable"], [g])


# ---------------------------------------------------------------------------------------------- names
@pytest.mark.parametrize("name", ["relux", "", None, 3, "prelu", "softmax"])
def test_unknown_activation_lists_the_known_ones(name):
    known = [n for n in ELEMENTWISE if not ACTIVATIONS[n].row_op]
    words = ["activation", repr(name), *(f"{n}" for n in known)]
    refuses(lambda: ops.dense_forward(ones(3, 4), ones(4, 2), activation=name), ValueError, words)
    if name != "prelu":
        refuses(lambda: batchnorm(ones(3, 4), activation=name), ValueError, words)


@pytest.mark.parametrize("name", ["cyton", "metal", "", 3])
def test_unknown_back_end_lists_the_known_ones(name):
    x, words = ones(3, 4), [repr(name), "auto", "cython", "numba", "numpy"]
    refuses(lambda: ops.relu_forward(x, backend=name), ValueError, words)
    refuses(lambda: fd.random.dropout_mask((3, 4), 0.5, 1, backend=name), ValueError, words)

    def block():
        with fd.backend(name):
            pass

    refuses(block, ValueError, words)


def test_unknown_op_lists_the_known_ones():
    refuses(lambda: fd.explain("reluu_forward", ones(3, 4)), ValueError, ["reluu_forward", "relu_forward"])


def test_a_back_end_that_cannot_run_says_why(monkeypatch):
    from fastdl.kernels import dispatch

    monkeypatch.setitem(dispatch._state, "numba", "the package numba is not installed; run `pip install numba`")
    monkeypatch.setattr(dispatch, "_callers", {})
    call = lambda: ops.relu_forward(ones(3, 4), backend="numba")  # noqa: E731
    refuses(call, BackendUnavailable, ["numba", "relu_forward", "pip install numba"])
    assert "pip install numba" in fd.explain("relu_forward", ones(3, 4))
    assert fd.backends()["numba"].startswith("the package")


@pytest.mark.parametrize("threads", [0, -1, 1.5, "two", True])
def test_threads(threads):
    refuses(lambda: ops.relu_forward(ones(3, 4), threads=threads), BAD, ["threads", repr(threads)])
