"""Frames, series, tensors, sparse matrices of other libraries: taken as the numbers they hold, or named by column."""

from __future__ import annotations

import copy

import numpy as np
import pytest

import fastdl as fd
from api.nets import X, Y, refused, small
from fastdl import inputs


class Frame:
    """As pandas' frames look: columns by name, and one array of objects for all where types differ."""

    def __init__(self, **columns: object) -> None:
        self.data = {name: np.asarray(values) for name, values in columns.items()}
        self.columns = list(columns)
        self.dtypes = [values.dtype for values in self.data.values()]
        self.shape = (len(next(iter(self.data.values()))), len(columns))

    def items(self):
        return self.data.items()

    def __getitem__(self, names):
        return Frame(**{name: self.data[name] for name in names})

    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
        same = len({values.dtype for values in self.data.values()}) == 1
        return np.stack([v if same else v.astype(object) for v in self.data.values()], 1)


A, B, T = np.linspace(0, 1, 90), np.arange(90) % 7, np.arange(90) % 2 == 0


def test_frames_of_mixed_columns_are_their_numbers() -> None:
    want = np.stack([A, B, T], 1)
    for frame in (
        Frame(a=A, b=B, t=T),
        Frame(a=A.astype(object), b=B.astype(object), t=T.astype(object)),
        Frame(a=A.astype("f4").astype("f8"), b=B.astype("i2"), t=T),
    ):
        got = inputs.as_matrix(frame, "float64", "X")
        np.testing.assert_allclose(got, want, rtol=1e-6)
        small().fit(frame, Y, verbose=0)
    plain = np.stack([A, A], 1)
    np.testing.assert_array_equal(inputs.as_matrix(Frame(a=A, b=A), "float64", "X"), plain)
    refused(lambda: inputs.as_matrix(Frame(a=[]), "float64", "X"), ValueError, "at least one row")


def test_frames_name_their_columns() -> None:
    holes = B.astype(object)
    holes[4] = None
    words = {
        "text": (Frame(a=A, word=np.array(["x"] * 90, object)), TypeError, "column 'word'", "str 'x' in row 0"),
        "None": (Frame(a=A, hole=holes), TypeError, "column 'hole'", "a missing value in row 4", "fill it"),
        "dates": (Frame(a=A, day=B.astype("M8[D]")), TypeError, "column 'day'", "dates", "timedelta64"),
        "NaN": (Frame(a=A, gap=np.where(B == 3, np.nan, A)), ValueError, "nan in row 3, column 'gap'"),
        "1e300": (Frame(a=A, far=np.where(B == 2, 1e300, A)), ValueError, "1e+300 in row 2, column 'far'"),
    }
    for frame, kind, *rest in words.values():
        refused(lambda frame=frame: small().fit(frame, Y), kind, "X:", *rest)


def test_columns_are_told_by_their_names(tmp_path) -> None:
    """A net that was built with a frame takes the columns of another one by name, also after load and in copies."""
    frame, turned = Frame(a=A, b=B, t=T), Frame(t=T, a=A, b=B)
    net = small()
    net.fit(frame, Y, verbose=0)
    net.save(tmp_path / "net")
    want = net.predict(frame)
    for same in (net, fd.load(tmp_path / "net"), copy.deepcopy(net)):
        assert same.feature_names == ["a", "b", "t"]
        np.testing.assert_array_equal(same.predict(turned), want)
        np.testing.assert_array_equal(same.forward(turned), want)
        np.testing.assert_array_equal(same.predict(np.stack([A, B, T], 1)), want)  # arrays have no names
        assert same.evaluate(turned, Y) == same.evaluate(frame, Y)
        refused(lambda same=same: same.predict(Frame(a=A, b=B, c=T)), ValueError, "missing ['t']", "X[['a', 'b', 't']]")
        refused(lambda same=same: same.predict(Frame(a=A, b=B, t=T, c=A)), ValueError, "unknown ['c']")
        refused(lambda same=same: same.train_on_batch(Frame(a=A, b=B, c=T), Y), ValueError, "missing ['t']")
    unnamed = small()
    unnamed.fit(np.stack([A, B, T], 1), Y, verbose=0)
    assert unnamed.feature_names is None
    unnamed.predict(turned)  # a net that was built with an array asks for no names


def test_pandas() -> None:
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame({"a": A, "b": B.astype("i2"), "c": A * 2})
    y = pd.Series(Y, index=np.arange(90)[::-1])

    def weights(X, y):
        model = small()
        model.fit(X, y, verbose=0)
        return model.weights["dense_0/kernel"]

    want = weights(frame, y)
    same = {
        "float32": frame.astype("f4"),
        "nullable": frame.astype({"a": "Float64", "b": "Int16"}),
        "objects": frame.astype(object),
        "another index": frame.set_index(np.arange(90)[::-1]),
    }
    if pytest.importorskip("pyarrow"):
        same["Arrow"] = frame.convert_dtypes(dtype_backend="pyarrow")
    for name, other in same.items():
        np.testing.assert_allclose(weights(other, y), want, atol=1e-5, err_msg=name)
    dummies = pd.get_dummies(frame.assign(colour=["red", "blue", "red"] * 30))
    assert weights(dummies, y).shape == (5, 3)
    kinds = ["Int64", "category", object, float, "int64[pyarrow]"]
    for labels in [*(y.astype(kind) for kind in kinds), y.to_frame().iloc[:, 0]]:
        np.testing.assert_array_equal(weights(frame, labels), want)
    for column, word in (
        (pd.array([1, None] * 45, "Int64"), "in row 1"),
        (pd.array([1, None] * 45, "int64[pyarrow]"), "in row 1"),
        (["x"] * 90, "str"),
        (pd.Timestamp("2024-01-01"), "dates"),
        (pd.Categorical(["u", "v"] * 45), "str 'u' in row 0"),
    ):
        refused(lambda column=column: small().fit(frame.assign(odd=column), y), (TypeError, ValueError), "'odd'", word)
    refused(lambda: small().fit(frame, pd.Series(["u", "v"] * 45)), TypeError, "y: ", "np.unique")
    refused(lambda: small().fit(frame, pd.array([0, None] * 45, "Int64")), (TypeError, ValueError), "in row 1")
    gap = frame.assign(gap=np.where(B == 3, np.nan, A))
    refused(lambda: small().fit(gap, y), ValueError, "nan in row 3, column 'gap'")
    refused(lambda: small().fit(frame[[]], y), ValueError, "at least one row and one feature")


def test_polars() -> None:
    pl = pytest.importorskip("polars")
    frame = pl.DataFrame({"a": A, "b": B.astype("i2"), "t": T})
    np.testing.assert_allclose(inputs.as_matrix(frame, "float64", "X"), np.stack([A, B, T], 1))
    small().fit(frame, pl.Series(Y), verbose=0)
    odd = frame.with_columns(pl.Series("word", ["x"] * 90))
    refused(lambda: small().fit(odd, Y), TypeError, "X: column 'word'")


def test_polars_plans_are_named() -> None:
    pl = pytest.importorskip("polars")
    refused(lambda: small().fit(pl.LazyFrame({"a": A}), Y), TypeError, "X: ", "LazyFrame")


def test_scipy() -> None:
    sp = pytest.importorskip("scipy.sparse")
    for value in (sp.csr_matrix(X), sp.csr_array(X), sp.coo_matrix(X), sp.lil_matrix(X), sp.dia_array(np.eye(6))):
        name = type(value).__name__
        refused(lambda value=value: small().fit(value, Y), TypeError, "X: ", f"sparse {name}", "X.toarray()")
        refused(lambda value=value: small().predict(value), TypeError, "X: ", f"sparse {name}", "X.toarray()")


def test_torch() -> None:
    torch = pytest.importorskip("torch")
    want = small().predict(X)
    np.testing.assert_array_equal(small().predict(torch.tensor(X)), want)
    for value in (torch.tensor(X).bfloat16(), torch.tensor(X, requires_grad=True)):
        refused(lambda value=value: small().predict(value), TypeError, "X: ", "tensor", "detach().float()")
