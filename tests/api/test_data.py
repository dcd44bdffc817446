"""Data: the shipped digits, splits, tables from files, and their preprocessing."""

import hashlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdl import data
from fastdl.errors import DataError

PEOPLE = """age, town ,income,member,paid
30,Ulm,1000,yes,1
41,Bonn,2000.5,no,0
 28 ,Ulm,1e3,yes,1
50,"Köln, Süd",3000,no,0
"""


def csv(tmp_path, text, encoding="utf-8"):
    path = tmp_path / "table.csv"
    path.write_bytes(text.encode(encoding))
    return path


def npz(tmp_path, **arrays):
    path = tmp_path / "table.npz"
    np.savez(path, **arrays)
    return path


def prepared(table, target, rows=None, **options):
    preprocessing = data.Preprocessing.describe(table, target, **options)
    return preprocessing.fit(table, np.arange(len(table)) if rows is None else rows)


# digits and splits


def test_digits():
    X, y = data.load_digits()
    assert (X.shape, X.dtype, y.shape, y.dtype) == ((1797, 64), np.float32, (1797,), np.int64)
    assert X.min() == 0
    assert X.max() == 1
    assert np.bincount(y).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    np.testing.assert_array_equal(X * 16, np.round(X * 16))


def test_digits_are_those_of_scikit_learn():
    datasets = pytest.importorskip("sklearn.datasets")
    X, y = data.load_digits()
    theirs = datasets.load_digits()
    np.testing.assert_array_equal(X * 16, theirs.data)
    np.testing.assert_array_equal(y, theirs.target)


def test_held_out_digits_never_change():
    _, held = data.stratified_split(data.load_digits()[1])
    assert len(held) == 359
    assert hashlib.sha256(held.astype("<i8").tobytes()).hexdigest().startswith("83ac77e38f69c650")


@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    fraction=st.floats(0.05, 0.9),
    seed=st.integers(0, 2**63),
)
@settings(max_examples=60, deadline=None)
def test_stratified_split(counts, fraction, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    if len(labels) < 2:
        return
    train, held = data.stratified_split(labels, fraction, seed)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, held])), np.arange(len(labels)))
    for label, count in enumerate(counts):
        share = np.count_nonzero(labels[held] == label)
        assert share <= count - 1
        assert abs(share - fraction * count) <= 1 or share == count - 1
    if min(counts) * (1 - fraction) > 1:
        assert len(held) == max(round(len(labels) * fraction), 1)
    again = data.stratified_split(labels, fraction, seed)
    np.testing.assert_array_equal(held, again[1])


def test_split_depends_on_its_seed():
    labels = np.repeat([0, 1], 50)
    assert not np.array_equal(data.stratified_split(labels, seed=0)[1], data.stratified_split(labels, seed=1)[1])
    assert not np.array_equal(data.random_split(100, seed=0)[1], data.random_split(100, seed=1)[1])


def test_random_split():
    train, held = data.random_split(11, 0.2)
    assert (len(train), len(held)) == (9, 2)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, held])), np.arange(11))
    assert [len(part) for part in data.random_split(2, 0.01)] == [1, 1]
    assert [len(part) for part in data.random_split(2, 0.99)] == [1, 1]


@pytest.mark.parametrize(("rows", "fraction"), [(1, 0.2), (10, 0.0), (10, 1.0), (10, float("nan"))])
def test_split_refuses(rows, fraction):
    with pytest.raises(ValueError, match=r"at least 2|between 0 and 1"):
        data.random_split(rows, fraction)
    with pytest.raises(ValueError, match=r"at least 2|between 0 and 1"):
        data.stratified_split(np.zeros(rows), fraction)


# tables


def test_csv(tmp_path):
    table = data.read_table(csv(tmp_path, PEOPLE))
    assert list(table.columns) == ["age", "town", "income", "member", "paid"]
    assert len(table) == 4
    assert table.numbers("income").tolist() == [1000, 2000.5, 1000, 3000]
    assert table.numbers("town") is None
    assert table.texts("town")[3] == "Köln, Süd"


def test_byte_order_mark_and_blank_lines(tmp_path):
    table = data.read_table(csv(tmp_path, "a,b\r\n\r\n1,2\r\n\r\n3,4\r\n", "utf-8-sig"))
    assert list(table.columns) == ["a", "b"]
    assert table.numbers("a").tolist() == [1, 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("a,b\n", "no rows"),
        ("a,b\n1,2\n3\n", r"row 2 \(line 3\) has 1 cells, the header names 2"),
        ("a,b\n1,2,3\n", r"row 1 \(line 2\) has 3 cells"),
        ("a,a\n1,2\n", "'a' twice"),
        ("a,\n0,2\n", "column 2 has no name"),
        (",a\n5,2\n5,3\n", "column 1 has no name"),
        (",a\n0.5,2\n1.5,3\n", "column 1 has no name"),
        ("\n\n", "the file is empty"),
        ("a,b\n1,\0\n", "line 2: NUL"),
        ("a;b\n1;2\n", "separated by commas"),
        ("a\tb\n1\t2\n", "separated by commas"),
        ("1,2\n3,4\n", "first row must name"),
        ('a,b\n"1"x,2\n', "not a CSV"),
    ],
)
def test_unusable_csv(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        data.read_table(csv(tmp_path, text))


def test_other_encodings_and_endings(tmp_path):
    with pytest.raises(DataError, match="UTF-8"):
        data.read_table(csv(tmp_path, "a,b\nMünchen,2\n", "latin-1"))
    with pytest.raises(DataError, match=r"expected a \.csv or \.npz file, found \.parquet"):
        data.read_table(tmp_path / "x.parquet")
    with pytest.raises(FileNotFoundError):
        data.read_table(tmp_path / "absent.csv")


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (["1", "", "3"], r"row 2, column 'v': missing value"),
        (["1", "2", "NaN"], r"row 3, column 'v': missing value"),
        (["NA", "?", "3"], r"row 1, column 'v': missing value.*2 such rows"),
        (["", "", ""], r"row 1, column 'v': missing value.*3 such rows"),
        (["1", "abc", "3"], r"row 2, column 'v': 'abc' is not a number.*--categorical v"),
        (["red", "", "blue"], r"row 2, column 'v': missing value"),
        (["red", "nan", "blue"], r"row 2, column 'v': missing value"),
        (["1", "2", "inf"], r"row 3, column 'v': inf is not a finite number"),
    ],
)
def test_unusable_cells(tmp_path, cells, message):
    table = data.read_table(csv(tmp_path, "v,y\n" + "".join(f'"{cell}",{k % 2}\n' for k, cell in enumerate(cells))))
    with pytest.raises(DataError, match=message):
        data.Preprocessing.describe(table, "y", task="classification")


def test_npz_of_x_and_y(tmp_path):
    X = np.arange(12.0).reshape(4, 3)
    table = data.read_table(npz(tmp_path, X=X, y=[[0], [1], [0], [1]], other=np.zeros(9)), "y")
    assert list(table.columns) == ["X[0]", "X[1]", "X[2]", "y"]
    np.testing.assert_array_equal(table.numbers("X[1]"), X[:, 1])
    assert table.numbers("y").tolist() == [0, 1, 0, 1]


def test_npz_of_columns(tmp_path):
    table = data.read_table(npz(tmp_path, a=[1, 2], colour=np.array([b"red", b"blue"]), image=np.zeros((2, 2, 2))), "a")
    assert list(table.columns) == ["a", "colour", "image[0]", "image[1]", "image[2]", "image[3]"]
    assert table.texts("colour") == ["red", "blue"]


def test_unusable_npz(tmp_path):
    with pytest.raises(DataError, match=r"no array 'z'; arrays: X, y"):
        data.read_table(npz(tmp_path, X=np.zeros((2, 2)), y=[0, 1]), "z")
    with pytest.raises(DataError, match=r"same number of rows, found a \(2,\), b \(3,\)"):
        data.read_table(npz(tmp_path, a=[0, 1], b=[0, 1, 2]))
    with pytest.raises(DataError, match="numbers or text"):
        data.read_table(npz(tmp_path, a=[0j, 1j]))
    with pytest.raises(DataError, match="array 'a' holds Python objects"):
        data.read_table(npz(tmp_path, a=np.array([None, "x"], object)))
    with pytest.raises(DataError, match="no rows"):
        data.read_table(npz(tmp_path, a=np.zeros(0)))
    with pytest.raises(DataError, match="no array"):
        data.read_table(npz(tmp_path))
    with pytest.raises(DataError, match=r"row 2, column 'a': missing"):
        data.read_table(npz(tmp_path, a=[0, np.nan, 1])).numbers("a")
    broken = tmp_path / "broken.npz"
    for content in (b"", b"PK\x03\x04 no archive", npz(tmp_path, a=np.arange(999)).read_bytes()[:700]):
        broken.write_bytes(content)
        with pytest.raises(DataError, match=r"plain arrays|the file is empty"):
            data.read_table(broken)


# preprocessing


def test_standardised_and_encoded(tmp_path):
    table = data.read_table(csv(tmp_path, PEOPLE))
    train = np.array([0, 1, 2])
    preprocessing = prepared(table, "paid", train, task="classification")
    X = preprocessing.features(table, np.float64)
    assert X.shape == (4, 1 + 3 + 1 + 2)
    np.testing.assert_allclose(X[train][:, [0, 4]].mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(X[train][:, [0, 4]].std(axis=0), 1)
    # Bonn, Köln, Ulm; no, yes
    assert X[:, 1:4].tolist() == [[0, 0, 1], [1, 0, 0], [0, 0, 1], [0, 1, 0]]
    assert X[:, 5:].tolist() == [[0, 1], [1, 0], [0, 1], [1, 0]]
    assert preprocessing.features(table).dtype == np.float32
    assert preprocessing.classes == ("0", "1")
    assert preprocessing.targets(table).tolist() == [1, 0, 1, 0]


def test_constant_column_becomes_zero(tmp_path):
    table = data.read_table(npz(tmp_path, X=np.full((7, 2), 0.1), y=[0, 1, 0, 1, 0, 1, 0]), "y")
    preprocessing = prepared(table, "y")
    assert [column.std for column in preprocessing.columns] == [1.0, 1.0]
    np.testing.assert_allclose(preprocessing.features(table), 0, atol=1e-15)


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["b", "a", "b", "c"], ("a", "b", "c")),
        ([3, -1, 3, -1], (-1, 3)),
        ([True, False, True, True], (False, True)),
        ([1.0, 2.0, 1.0, 2.0], (1.0, 2.0)),
        ([2**60 + 1, 2**60 + 2, 2**60 + 1, 2**60 + 2], (2**60 + 1, 2**60 + 2)),
    ],
)
def test_class_labels_of_any_dtype(tmp_path, labels, classes):
    table = data.read_table(npz(tmp_path, X=np.zeros((4, 2)), y=labels), "y")
    for task in ("auto", "classification"):
        preprocessing = prepared(table, "y", task=task)
        assert preprocessing.classes == classes
        assert [type(label) for label in preprocessing.classes] == [type(label) for label in classes]
        codes = preprocessing.targets(table)
        assert [classes[code] for code in codes] == labels
        assert preprocessing.answers(np.eye(len(classes))[codes]).tolist() == labels


def test_class_labels_of_a_csv(tmp_path):
    def classes(*cells):
        table = data.read_table(csv(tmp_path, "x,y\n" + "".join(f"1,{cell}\n" for cell in cells)))
        return data.Preprocessing.describe(table, "y", "classification").classes

    assert classes("10", "9", "10") == ("9", "10")
    assert classes("1.5", "0.5") == ("0.5", "1.5")
    assert classes("1", "01", "1.0", "0") == ("0", "01", "1", "1.0")
    assert classes("true", "false") == ("false", "true")
    assert classes("1", "2", "unknown") == ("1", "2", "unknown")


def test_task(tmp_path):
    def task(y, **options):
        return data.Preprocessing.describe(
            data.read_table(npz(tmp_path, X=np.zeros(len(y)), y=y), "y"), "y", **options
        ).task

    assert task([0, 1] * 10) == "classification"
    assert task(np.repeat(np.arange(20), 2)) == "classification"
    assert task(np.repeat(np.arange(21), 2)) == "regression"
    assert task(np.arange(10)) == "regression"
    assert task([0.5, 1.5] * 10) == "regression"
    assert task([0, 1] * 10, task="regression") == "regression"
    assert task(np.arange(10), task="classification") == "classification"
    assert task(["a", "b"]) == "classification"
    with pytest.raises(ValueError, match="auto, classification, regression"):
        task([0, 1], task="ranking")
    with pytest.raises(DataError, match="needs numbers"):
        task(["a", "b"], task="regression")
    with pytest.raises(DataError, match="1 classes"):
        task(["a", "a"])


def test_regression_target_comes_back(tmp_path):
    y = np.array([1000.0, 3000.5, -20.0, 7.0])
    table = data.read_table(npz(tmp_path, X=np.zeros((4, 1)), y=y), "y")
    preprocessing = prepared(table, "y")
    scaled = preprocessing.targets(table, np.float64)
    assert scaled.shape == (4, 1)
    np.testing.assert_allclose([scaled.mean(), scaled.std()], [0, 1], atol=1e-12)
    np.testing.assert_allclose(preprocessing.answers(scaled), y)


def test_survives_json(tmp_path):
    table = data.read_table(csv(tmp_path, PEOPLE))
    for target, options in (("paid", {"task": "classification"}), ("income", {"drop": ["age"]}), ("town", {})):
        preprocessing = prepared(table, target, **options)
        again = data.Preprocessing.from_json(json.loads(json.dumps(preprocessing.to_json())))
        assert again == preprocessing
        np.testing.assert_array_equal(again.features(table), preprocessing.features(table))


def test_categorical_and_drop(tmp_path):
    table = data.read_table(csv(tmp_path, PEOPLE))
    preprocessing = prepared(table, "paid", categorical=["age"], drop=["income", "member"], task="classification")
    assert preprocessing.features(table).shape == (4, 4 + 3)
    with pytest.raises(DataError, match="no column is left"):
        data.Preprocessing.describe(table, "paid", "classification", drop=["age", "town", "income", "member"])
    for option in ("categorical", "drop"):
        with pytest.raises(DataError, match=r"no column 'size'; columns: age, town"):
            data.Preprocessing.describe(table, "paid", "classification", **{option: ["size"]})


def test_unknown_target_lists_the_columns(tmp_path):
    table = data.read_table(csv(tmp_path, PEOPLE))
    with pytest.raises(DataError, match=r"no column 'salary'; columns: age, town, income, member, paid"):
        data.Preprocessing.describe(table, "salary")


def test_too_many_categories(tmp_path):
    table = data.read_table(npz(tmp_path, name=[f"n{k}" for k in range(1001)], y=[0, 1, 1] * 333 + [0, 1]), "y")
    with pytest.raises(DataError, match=r"'name' has 1001 different values.*--drop name"):
        data.Preprocessing.describe(table, "y")


def test_other_table(tmp_path):
    preprocessing = prepared(data.read_table(csv(tmp_path, PEOPLE)), "paid", task="classification")
    shuffled = data.read_table(csv(tmp_path, "member,income,town,extra,age\nno,2000.5,Bonn,x,41\n"))
    np.testing.assert_allclose(preprocessing.features(shuffled)[0, 1:4], [1, 0, 0])
    with pytest.raises(DataError, match=r"missing columns income, member; found age, town"):
        preprocessing.features(data.read_table(csv(tmp_path, "age,town\n1,Ulm\n")))
    with pytest.raises(DataError, match=r"row 1, column 'town': unknown category 'Rom'; known: Bonn, Köln, Süd, Ulm"):
        preprocessing.features(data.read_table(csv(tmp_path, "age,town,income,member\n1,Rom,3,no\n")))
    with pytest.raises(DataError, match=r"row 1, column 'age': 'old' is not a number"):
        preprocessing.features(data.read_table(csv(tmp_path, "age,town,income,member\nold,Ulm,3,no\n")))
    with pytest.raises(DataError, match=r"row 2, column 'paid': unknown class '2'; known: 0, 1"):
        preprocessing.targets(data.read_table(csv(tmp_path, "paid\n1\n2\n")))
