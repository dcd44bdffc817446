"""NPZ files of any kind and damage, and preprocessing as model files hold it: a table, an answer, or one sentence."""

import copy
import io
import json
import pickle
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastdl import data
from fastdl.errors import DataError

in_a_folder = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def archive(**arrays):
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


GOOD = archive(X=np.arange(600.0).reshape(200, 3), y=np.arange(200) % 2)


@given(data_=st.data())
@in_a_folder
def test_damaged_archives(tmp_path, data_):
    """Whatever is damaged: a table, or a DataError; never what zipfile, zlib or ast raise."""
    content = bytearray(GOOD)
    for at in data_.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[at] = data_.draw(st.integers(0, 255))
    content = content[: data_.draw(st.sampled_from([len(content), len(content) // 2]))]
    path = tmp_path / "t.npz"
    path.write_bytes(bytes(content))
    try:
        read = data.read_table(path, "y")
    except DataError:
        return
    assert len(read) > 0


def npy_header(text):
    body = text.encode() + b" " * 20 + b"\n"
    return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000, 100), }",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (-1,), }",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (((((",
        "{'descr': '<f8', 'shape': " + "9" * 9000,
        "{'descr': '|V0', 'fortran_order': False, 'shape': (3,), }",
        "\x00\x01",
    ],
)
def test_headers_that_lie(tmp_path, header):
    path = tmp_path / "t.npz"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("X.npy", npy_header(header))
    with pytest.raises(DataError, match=r"t\.npz"):
        data.read_table(path)


def test_files_that_are_no_archives(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(3))
    locked = bytearray(GOOD)
    for at in (GOOD.find(b"PK\x01\x02") + 8, 6):
        locked[at] |= 1
    method = bytearray(GOOD)
    method[8] = method[GOOD.find(b"PK\x01\x02") + 10] = 99
    text = "no NPZ archive, in spite of its name; a CSV file must be called .csv or .txt"
    for kind, content, words in (
        ("npy", (tmp_path / "a.npy").read_bytes(), r"one array, as np.save writes it \(.npy\)"),
        ("text", b"a,b\n1,2\n", text),
        ("keys", b"PK,y\n1,2\n", text),
        ("pickle", pickle.dumps({"X": 1}), text),
        ("empty", b"", "the file is empty"),
        ("half", GOOD[:300], "not a NumPy archive of plain arrays"),
        ("encrypted", locked, "not a NumPy archive of plain arrays"),
        ("method", method, "not a NumPy archive of plain arrays"),
    ):
        path = tmp_path / f"{kind}.npz"
        path.write_bytes(bytes(content))
        with pytest.raises(DataError, match=f"{kind}.npz: {words}") as error:
            data.read_table(path, "y")
        assert "allow_pickle" not in str(error.value)


def test_arrays_of_python_objects(tmp_path):
    np.savez(tmp_path / "t.npz", X=np.array([[1, "a"]], object), y=np.ones(1))
    with pytest.raises(DataError, match=r"t\.npz: array 'X' holds Python objects, expected numbers or text") as error:
        data.read_table(tmp_path / "t.npz", "y")
    assert "allow_pickle" not in str(error.value)


@pytest.mark.parametrize("save", [np.save, np.savez])
def test_tables_that_are_no_text(tmp_path, save):
    path = tmp_path / "t.csv"
    with open(path, "wb") as file:
        save(file, np.zeros((9, 9)))
    with pytest.raises(DataError, match=r"t\.csv: no text but an archive .* or an array; save it as CSV"):
        data.read_table(path)
    path.write_text("PK,y\n1,2\n")  # a primary key
    assert list(data.read_table(path).columns) == ["PK", "y"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_archive_of_one_name_twice(tmp_path):
    with zipfile.ZipFile(tmp_path / "t.npz", "w") as archive:
        for name in ("a.npy", "y.npy", "a.npy"):
            with archive.open(name, "w") as member:
                np.save(member, np.arange(4))
    with pytest.raises(DataError, match="the archive holds two arrays of one name: a, y, a"):
        data.read_table(tmp_path / "t.npz")


def test_arrays_that_nobody_asks_for_are_not_read(tmp_path):
    path = tmp_path / "t.npz"
    np.savez(path, X=np.zeros((2, 2)), y=[0, 1], notes=np.array([None, "x"], object))
    assert list(data.read_table(path, "y").columns) == ["X[0]", "X[1]", "y"]
    np.savez(path, a=[1, 2], image=np.zeros((2, 2)), notes=np.array([None, "x"], object), meta=np.zeros(7))
    assert list(data.read_table(path, needed=["a", "image[0]"]).columns) == ["a", "image[0]", "image[1]"]


def test_arrays_without_a_number_for_a_label(tmp_path):
    np.savez(tmp_path / "t.npz", X=np.zeros((2, 1)), y=np.array([b"caf\xe9", b"tea"]))
    with pytest.raises(DataError, match="array 'y' holds bytes that are not UTF-8"):
        data.read_table(tmp_path / "t.npz", "y")
    if np.dtype(np.longdouble).itemsize > 8:
        np.savez(tmp_path / "t.npz", X=np.zeros((2, 1)), y=np.zeros(2, np.longdouble))
        with pytest.raises(DataError, match="array 'y' must hold numbers or text"):
            data.read_table(tmp_path / "t.npz", "y")


@pytest.mark.parametrize("drop", [[], ["X[1]"], ["X[2]"]])
def test_arrays_of_other_widths_are_refused(tmp_path, drop):
    path = tmp_path / "t.npz"
    np.savez(path, X=np.eye(4)[:, :3], y=[0, 1, 0, 1])
    read = data.read_table(path, "y")
    preprocessing = data.Preprocessing.describe(read, "y", drop=drop).fit(read, np.arange(4))
    preprocessing = data.Preprocessing.from_json(json.loads(json.dumps(preprocessing.to_json())))
    assert preprocessing.features(read).shape == (4, 3 - len(drop))
    for width in (2, 5):
        np.savez(path, X=np.zeros((2, width)))
        with pytest.raises(DataError, match=f"array 'X' has {width} columns, that of the training had 3"):
            preprocessing.features(data.read_table(path))


# preprocessing of model files


#: As fastdl 0.1 wrote it: labels as numbers, no spellings, no widths of arrays.
OLD = {
    "target": "code",
    "task": "classification",
    "classes": [7, 10],
    "mean": 0.0,
    "std": 1.0,
    "columns": [
        {"name": "a", "mean": 1.0, "std": 2.0, "levels": None},
        {"name": "town", "mean": 0.0, "std": 1.0, "levels": ["Bonn", "Ulm"]},
    ],
}


def test_preprocessing_of_older_versions(tmp_path):
    preprocessing = data.Preprocessing.from_json(OLD)
    (tmp_path / "t.csv").write_text("a,town,code\n3,Ulm,007\n1,Bonn,10\n")
    read = data.read_table(tmp_path / "t.csv")
    assert preprocessing.features(read).tolist() == [[1, 0, 1], [0, 1, 0]]
    assert preprocessing.targets(read).tolist() == [0, 1]
    assert preprocessing.answers(np.eye(2)).tolist() == [7, 10]
    old = {**OLD, "task": "regression", "classes": None, "mean": 5.0, "std": 2.0}
    assert data.Preprocessing.from_json(old).answers(np.ones((1, 1))).tolist() == [7.0]
    old = {**OLD, "columns": [{"name": "X[0]", "mean": 0.0, "std": 1.0, "levels": None}]}
    data.Preprocessing.from_json(old)


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)


@given(value=json_values, key=st.sampled_from([*OLD, "label_dtype", "blocks", "more"]), part=st.integers(0, 4))
@settings(max_examples=300, deadline=None)
def test_foreign_preprocessing(value, key, part):
    """One kind of error, or a preprocessing that works."""
    foreign = copy.deepcopy(OLD)
    if part == 0:
        foreign = value
    elif part == 1:
        foreign[key] = value
    elif part == 2:
        foreign.pop(key, None)
    elif part == 3:
        foreign["columns"][0][key if key in ("mean", "std") else "levels"] = value
    else:
        foreign["columns"][0][key if key in ("more",) else "spelling"] = value
    try:
        preprocessing = data.Preprocessing.from_json(foreign)
    except DataError:
        return
    assert preprocessing.width > 0
    assert len(preprocessing.answers(np.zeros((3, preprocessing.outputs)))) == 3
    json.dumps(preprocessing.to_json(), allow_nan=False)
