"""What `fit`, `predict` and the ops take as data, and the sentence that everything else is refused with."""

from __future__ import annotations

import subprocess
import sys
import types
import warnings

import numpy as np
import pytest

import fastdl as fd
from api.nets import X, Y, net, refused, small
from fastdl import callbacks, convert, inputs

V = X[:, :1]  # values of a regression


# ---------------------------------------------------------------------------------------------- what holds no numbers
class Sparse:
    """As SciPy's matrices look."""

    shape, nnz, dtype = (6, 6), 6, np.dtype("f4")

    def toarray(self) -> np.ndarray:
        return np.eye(6)


class Tensor:
    """As PyTorch's tensors in host memory look, of a type that NumPy lacks or with a gradient."""

    ndim, shape, requires_grad = 2, (6, 6), True

    def detach(self) -> Tensor:
        return self

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
        raise RuntimeError("Can't call numpy() on Tensor that requires grad.")


def masked() -> np.ma.MaskedArray:
    hidden = np.ma.array(X.copy())
    hidden[3, 1] = np.ma.masked
    return hidden


ODD = {
    "masked": (masked(), ["without a mask", "1 hidden value", "filled"]),
    "masked, nothing hidden": (np.ma.array(X), ["without a mask", "0 hidden values", "data"]),
    "masked rows in a list": ([*masked()[3:]], ["without a mask", "1 hidden value"]),
    "sparse": (Sparse(), ["sparse Sparse of shape (6, 6)", "toarray"]),
    "tensor": (Tensor(), ["tensor", "requires grad", "detach().float().cpu().numpy()"]),
    "ragged": ([[1.0, 2.0], [3.0]], ["rows of different lengths", "(2,) in row 0", "(1,) in row 1"]),
    "ragged within": ([[[1.0], [2.0, 3.0]], [[1.0], [2.0]]], ["rows of different lengths"]),
    "tensors in a list": ([Tensor(), Tensor()], ["list, which NumPy cannot read", "requires grad"]),
    "ragged tuple": (((1.0, 2.0), 3.0), ["rows of different lengths"]),
    "None": (None, ["found None"]),
    "dict": ({"a": [1, 2]}, ["found dict"]),
    "set": ({1, 2}, ["found set"]),
    "generator": ((row for row in X), ["found generator"]),
    "object": (X.astype(object), ["dtype object", "astype(float)"]),
    "text among objects": (np.array([["a", 1], ["b", 2]], object), ["dtype object", "str 'a' at [0, 0]"]),
    "None among objects": (np.array([[1.0, None]], object), ["None at [0, 1]"]),
    "text": (X.astype("U"), ["text"]),
    "one text": ("1, 2", ["text"]),
    "bytes": (X.astype("S"), ["text"]),
    "StringDType": (X.astype("U").astype(np.dtypes.StringDType()), ["text"]),
    "dates": (X.astype("i8").astype("M8[s]"), ["dates", "np.timedelta64(1, 'D')"]),
    "spans": (X.astype("i8").astype("m8[s]"), ["spans of time", "np.timedelta64"]),
    "complex": (X + 1j, ["complex", "real and imaginary"]),
    "records": (np.zeros(6, [("a", "f4"), ("b", "f4")]), ["records", "structured_to_unstructured"]),
    "void": (np.zeros(6, "V8"), ["records"]),
}


@pytest.mark.parametrize(("value", "words"), ODD.values(), ids=ODD)
def test_x_that_holds_no_numbers(value, words) -> None:
    cold, warm = small(), small().build(6)
    for _ in range(3):
        warm.train_on_batch(X, Y)
        warm.predict(X)
        warm.predict(X[:1])
    before = warm.get_state()
    for model in (cold, warm):
        for call in (
            lambda model=model: model.fit(value, Y, verbose=0),
            lambda model=model: model.train_on_batch(value, Y),
            lambda model=model: model.evaluate(value, Y),
            lambda model=model: model.predict(value),
            lambda model=model: model.forward(value, training=True),
        ):
            refused(call, TypeError, "X: expected an array", *words)
    refused(lambda: warm.fit(X, Y, validation_data=(value, Y)), TypeError, "validation X: expected an array", *words)
    assert all(np.array_equal(v, before[k]) for k, v in warm.get_state().items())
    with pytest.raises(ValueError, match="does not know its input"):
        cold.weights  # noqa: B018


@pytest.mark.parametrize("loss", ["softmax_cross_entropy", "mse", "binary_cross_entropy"])
@pytest.mark.parametrize(("value", "words"), ODD.values(), ids=ODD)
def test_y_and_weights_that_hold_no_numbers(value, words, loss: str) -> None:
    model, good = small(loss).build(6), Y if loss.startswith("softmax") else abs(V).clip(0, 1)
    for _ in range(3):
        model.train_on_batch(X, good)
    for call in (model.fit, model.train_on_batch, model.evaluate):
        refused(lambda call=call: call(X, value), TypeError, "y: expected an array", *words)
        if value is not None:
            refused(lambda call=call: call(X, good, sample_weight=value), TypeError, "sample_weight: expected", *words)
    model.forward(X, training=True)
    refused(lambda: model.backward(value), TypeError, "dy: expected an array", *words)


def test_text_labels_get_the_advice_that_numbers_them() -> None:
    for y in (np.array(["a", "b"] * 45), ["a", "b"] * 45, np.array(["a", None] * 45, object)):
        refused(lambda y=y: small().fit(X, y), TypeError, "y: ", "np.unique(y, return_inverse=True)")


def test_weights_are_assigned_by_the_same_rules() -> None:
    model = small().build(6)
    before = model.get_state()
    for value, words in ODD.values():
        refused(lambda value=value: model.set_state({"dense_0/kernel": value}), TypeError, "dense_0/kernel: ", words[0])
    far = np.ones((6, 3))
    far[2, 1] = 1e300
    refused(lambda: model.set_state({"dense_0/kernel": far}), ValueError, "dense_0/kernel: ", "row 2, column 1")
    refused(lambda: model.set_state({"dense_0/kernel": far.T}), ValueError, "expected shape (6, 3), found (3, 6)")
    assert all(np.array_equal(v, before[k]) for k, v in model.get_state().items())


@pytest.mark.parametrize("shape", [(), (6,), (3, 6, 1), (0, 6), (6, 0)])
def test_x_of_another_shape(shape) -> None:
    for value in (np.ones(shape), np.ones(shape, "f4"), np.ones(shape).tolist()):
        for model in (small(), small().build(6)):
            refused(lambda model=model, value=value: model.predict(value), ValueError, "X: expected", "found")
            refused(lambda model=model, value=value: model.train_on_batch(value, Y[:6]), ValueError, "X: expected")


def test_masked_arrays_in_ops() -> None:
    x, hidden = np.ones((3, 4), "f4"), np.ma.array(np.ones((3, 4), "f4"), mask=np.eye(3, 4))
    ones = np.ones(4, "f4")
    calls = [
        lambda: fd.ops.relu_forward(hidden),
        lambda: fd.ops.relu_forward(x, out=hidden),
        lambda: fd.ops.dense_forward(x, np.ma.array(np.ones((4, 2), "f4"))),
        lambda: fd.ops.batchnorm_forward(x, ones, np.ma.array(ones), ones.copy(), ones.copy()),
        lambda: fd.ops.mse(x, hidden),
        lambda: fd.ops.mse(x, x, np.ma.array(np.ones(3, "f4"))),
        lambda: fd.ops.softmax_cross_entropy(x, np.ma.array([0, 1, 2])),
        lambda: fd.ops.sgd_step(x, hidden),
    ]
    for call in calls:
        refused(call, TypeError, "without a mask", "filled")


# ---------------------------------------------------------------------------------------------- values
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "g", ">f4"])
def test_fit_refuses_what_is_not_finite(value: float, dtype: str) -> None:
    bad = X.astype(dtype)
    bad[5, 1] = value
    model = net()
    refused(lambda: model.fit(bad, Y), ValueError, "X: expected finite numbers", f"{value} in row 5, column 1")
    refused(
        lambda: model.fit(X, Y, validation_data=(bad, Y)),
        ValueError,
        "validation X: expected finite",
        "row 5, column 1",
    )
    with pytest.raises(ValueError, match="does not know its input"):
        model.weights  # noqa: B018
    assert np.isfinite(model.predict(X)).all()
    assert not np.isfinite(model.predict(bad)[5]).all()  # a prediction of a row without a value is none
    assert np.isfinite(np.delete(model.predict(bad), 5, 0)).all()


def test_finite_numbers_whose_sum_is_not_are_taken() -> None:
    large = np.full((90, 6), 3e38, "f4")
    convert.finite(large, "X")
    assert small().fit(large * 1e-38, Y, verbose=0)
    assert inputs.as_matrix(large.astype("f8"), "float32", "X").max() == np.float32(3e38)


@pytest.mark.parametrize(
    ("value", "model", "words"),
    [
        (1e300, small(), ["at most 3.4e+38, as float32 holds", "found 1e+300", "compile(dtype='float64')"]),
        (-1e39, small(), ["at most 3.4e+38, as float32 holds", "found -1e+39"]),
        (np.longdouble("1e400"), small(), ["at most 3.4e+38, as float32 holds"]),
        (np.longdouble("-1e400"), small(dtype="float64"), ["at most 1.8e+308, as float64 holds", "scale them"]),
    ],
)
def test_numbers_beyond_the_dtype_are_refused_everywhere(value, model, words) -> None:
    if np.finfo(np.longdouble).max == np.finfo(float).max and abs(value) > 1e308:
        pytest.skip("long double is float64 here")
    bad = X.astype(type(value))
    bad[5, 1] = value
    for call in (
        lambda: model.fit(bad, Y),
        lambda: model.fit(X, Y, validation_data=(bad, Y)),
        lambda: model.train_on_batch(bad, Y),
        lambda: model.evaluate(bad, Y),
        lambda: model.predict(bad),
    ):
        refused(call, ValueError, "X: expected numbers of", "row 5, column 1", *words)
    if abs(value) < 1e308:
        assert np.isfinite(small(dtype="float64").predict(bad)).all()


def test_small_numbers_and_strict_numpy_go_through() -> None:
    with np.errstate(all="raise"), warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny = np.full((90, 6), 1e-320)
        small().fit(tiny, Y, verbose=0)
        small("mse").fit(tiny, tiny[:, 0], verbose=0)
        refused(lambda: small("mse").fit(X, np.full(90, 1e300)), ValueError, "finite targets in float32", "1e+300")


def test_data_in_host_memory_imports_nothing_of_cuda() -> None:
    code = """
import sys, numpy as np, fastdl as fd
net = fd.Sequential([fd.layers.Dense(2)]).compile("softmax_cross_entropy", backend="numpy")
net.fit(((1.0, 2.0), (3.0, 4.0)), (0, 1), verbose=0)
net.predict([(1.0, 2.0)]); net.predict(memoryview(np.ones((1, 2)))); net.evaluate([[1, 2]], [1], [1.0])
class Tensor:
    def __dlpack_device__(self): return 1, 0
    def __array__(self, dtype=None, copy=None): return np.ones((1, 2))
net.predict(Tensor())
print([name for name in sys.modules if name.startswith("fastdl.cuda")])
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


# ---------------------------------------------------------------------------------------------- weights
@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (np.zeros(90), ["positive sum", "nothing but 0"]),
        (np.full(90, 1e-60), ["positive sum"]),  # 0 in float32
        (np.where(Y == 0, 1e-40, 1.0), ["at least 7.89e-31", "1e-40", "divide the weights by their mean"]),
        (np.full(90, 1e-38), ["at least 7.89e-31", "divide the weights by their mean"]),
        (np.full(90, 1e37), ["a sum of at most 1.27e+30", "divide the weights by their mean"]),
        (np.full(90, 1e300), ["numbers of at most 3.4e+38", "row 0"]),
        (np.where(Y == 1, -1.0, 1.0), ["finite values of at least 0", "-1.0 in row 1"]),
        (np.where(Y == 1, np.nan, 1.0), ["finite values of at least 0", "nan in row 1"]),
        (np.where(Y == 1, np.inf, 1.0), ["finite values of at least 0", "inf in row 1"]),
        (np.float64(1.0), ["expected shape (90,)", "found ()"]),
        (np.ones((90, 1)), ["expected shape (90,)", "found (90, 1)"]),
        (np.ones(89), ["expected shape (90,)", "found (89,)"]),
    ],
)
def test_weights_whose_mean_cannot_be_told(weights, words) -> None:
    model = net().build(6)
    before = model.get_state()
    for call in (model.fit, model.train_on_batch, model.evaluate):
        refused(lambda call=call: call(X, Y, sample_weight=weights), ValueError, "sample_weight: expected", *words)
    refused(
        lambda: model.fit(X, Y, validation_data=(X, Y, weights)),
        ValueError,
        "validation sample_weight: expected",
        *words,
    )
    assert all(np.array_equal(v, before[k]) for k, v in model.get_state().items())
    z = np.ones((90, 3), "f4")
    if weights.ndim == 1 and abs(weights[np.isfinite(weights)]).max() < 1e38:
        refused(lambda: fd.ops.mse(z, z, weights.astype("f4")), ValueError, "sample_weight: expected")


@pytest.mark.parametrize("scale", [1e-29, 1.0, 1e27])
def test_the_scale_of_weights_changes_nothing(scale: float, backend: str) -> None:
    weights = np.arange(90) % 3 * 1.0  # every third is 0
    made = [net(backend, "sgd"), net(backend, "sgd")]
    histories = [
        m.fit(X, Y, 30, epochs=2, sample_weight=w, verbose=0)
        for m, w in zip(made, (weights, weights * scale), strict=True)
    ]
    np.testing.assert_allclose(histories[0]["loss"], histories[1]["loss"], rtol=1e-4)
    for name, value in made[0].weights.items():
        np.testing.assert_allclose(made[1].weights[name], value, rtol=1e-3, atol=1e-5)


def test_both_sides_of_a_split_have_weight() -> None:
    first, last = np.r_[np.ones(72), np.zeros(18)], np.r_[np.zeros(72), np.ones(18)]
    fit = lambda w: net().fit(X, Y, validation_split=0.2, sample_weight=w, verbose=0)  # noqa: E731
    refused(lambda: fit(first), ValueError, "sample_weight of the last 18 rows", "validation_split=0.2", "positive sum")
    refused(lambda: fit(last), ValueError, "sample_weight of the first 72 rows", "validation_split=0.2", "positive sum")
    assert np.isfinite(fit(first + last)["val_loss"]).all()


# ---------------------------------------------------------------------------------------------- arguments of fit
def test_callbacks_are_several_or_one_or_none() -> None:
    want = small().fit(X, Y, epochs=2, verbose=0)
    stop = callbacks.EarlyStopping("loss")
    for given in (None, (), [], stop, [stop], (stop,), (c for c in [stop])):
        assert small().fit(X, Y, epochs=2, callbacks=given, verbose=0) == want
    for bad in (3, "stop", [None], callbacks.EarlyStopping, [callbacks.EarlyStopping], [lambda epoch: None]):
        refused(lambda bad=bad: small().fit(X, Y, callbacks=bad), TypeError, "callbacks: expected")
    refused(lambda: small().fit(X, Y, callbacks=[callbacks.EarlyStopping]), TypeError, "make one, with ()")


def test_validation_split_is_a_share() -> None:
    want = small().fit(X, Y, verbose=0)
    for given in (None, 0, 0.0, np.float32(0)):
        assert small().fit(X, Y, validation_split=given, verbose=0) == want
    assert "val_loss" in small().fit(X, Y, validation_split=np.float32(0.25), verbose=0)
    for bad in ("0.2", True, 1.0, -0.1, np.nan, [0.2], 1):
        refused(
            lambda bad=bad: small().fit(X, Y, validation_split=bad), ValueError, "validation_split: expected a share"
        )


def test_validation_data_is_a_tuple() -> None:
    weights = np.ones(90)
    for given in ((X, Y), [X, Y], (X, Y, None), (X, Y, weights), [X, Y, weights]):
        assert "val_loss" in small().fit(X, Y, validation_data=given, verbose=0)
    for bad in (X, X[:2], 3, (X,), (X, Y, weights, X), "XY", {"X": X, "y": Y}, zip(X, Y, strict=True)):
        refused(
            lambda bad=bad: small().fit(X, Y, validation_data=bad),
            ValueError,
            "validation_data: expected a tuple (X, y)",
        )
    refused(lambda: small().fit(X, Y, validation_data=((X, Y), None)), TypeError, "validation X: expected")
    refused(lambda: small().fit(X, Y, validation_data=(X[:, :2], Y)), ValueError, "validation X: expected 6 features")
    refused(lambda: small().fit(X, Y, validation_data=(X, Y[:3])), ValueError, "validation y: expected 90 rows")
    for bad in (None, 1, "batch"):
        refused(lambda bad=bad: small().fit(X, Y, shuffle=bad), ValueError, "shuffle: expected True or False")


def test_a_namespace_with_columns_alone_is_no_frame() -> None:
    refused(lambda: small().fit(types.SimpleNamespace(columns=["a"]), Y), TypeError, "X: ", "SimpleNamespace")
