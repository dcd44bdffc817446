"""Tables as people have them: names and numbers come back as they are written, or one sentence says why not."""

import csv
import io
import json
import tracemalloc
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fastdl import data
from fastdl.cli import predict
from fastdl.data.spelling import Spelling, spelling_of
from fastdl.data.table import MISSING
from fastdl.errors import DataError

in_a_folder = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
#: Cells that a CSV file can hold, as the table keeps them: without blanks around.
texts = (
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
    .map(str.strip)
    .filter(lambda text: text.lower() not in MISSING[:2])
)
numeric = st.from_regex(r"\A(0{0,2}[0-9]{1,4}(_[0-9])?|[0-9]\.[0-9]{1,2}0|[0-9]e[0-9]|\+[0-9])\Z")


@pytest.fixture
def table(tmp_path):
    """``table(rows)``: a CSV file of these rows, all cells in quotes, read back."""

    def write(rows, **options):
        path = tmp_path / "table.csv"
        with open(path, "w", encoding="utf-8", newline="") as file:
            csv.writer(file, quoting=csv.QUOTE_ALL).writerows(rows)
        return data.read_table(path, **options)

    return write


def column(table, cells, **options):
    """A table of one column to learn from, ``v``, and how it is prepared."""
    read = table([("v", "y"), *((cell, "pq"[k % 2]) for k, cell in enumerate(cells))])
    return read, data.Preprocessing.describe(read, "y", **options)


# names


@given(names=st.lists(st.one_of(texts, numeric), min_size=2, max_size=8, unique=True))
@example(names=["a\rb", "a\nb", "a,b", 'a"b', "'a'"])
@example(names=["01", "1", "1.0", "1_0", "10"])
@in_a_folder
def test_class_names_come_back_as_written(table, names):
    rows = [*names, *reversed(names)]
    read = table([("v", "name"), *((k, name) for k, name in enumerate(rows))])
    preprocessing = data.Preprocessing.describe(read, "name", "classification")
    preprocessing = data.Preprocessing.from_json(json.loads(json.dumps(preprocessing.to_json())))
    codes = preprocessing.targets(read)
    answers = preprocessing.answers(np.eye(len(names))[codes])
    assert answers.tolist() == rows
    shown = io.StringIO(newline="")
    predict._write(shown, {"prediction": answers, "probability": np.ones(len(rows))})
    assert [row["prediction"] for row in csv.DictReader(io.StringIO(shown.getvalue(), newline=""))] == rows


@pytest.mark.parametrize("dtype", ["?", "i1", "u8", ">i2", "f2", "f4", "f8", "U3", "S2"])
def test_labels_of_arrays_keep_their_dtype(tmp_path, dtype):
    labels = np.array([0, 1, 1, 0] if dtype == "?" else [1, 0, 1, 0], dtype)
    if dtype in ("f2", "f4"):
        labels = labels + np.array(0.1, dtype)
    np.savez(tmp_path / "t.npz", X=np.zeros((4, 1)), y=labels)
    read = data.read_table(tmp_path / "t.npz", "y")
    preprocessing = data.Preprocessing.describe(read, "y", "classification")
    preprocessing = data.Preprocessing.from_json(json.loads(json.dumps(preprocessing.to_json())))
    answers = predict._plain(preprocessing.answers(np.eye(2)[preprocessing.targets(read)]))
    expected = np.char.decode(labels) if labels.dtype.kind == "S" else labels
    assert answers.dtype.kind == expected.dtype.kind
    if labels.dtype.kind not in "SU":
        assert answers.dtype == labels.dtype
    np.testing.assert_array_equal(answers, expected)


def test_blanks_of_text_arrays(tmp_path):
    np.savez(tmp_path / "t.npz", c=np.array(["a ", "b", " a", "b "]), y=np.array(["p", "p ", "p", "p "]))
    read = data.read_table(tmp_path / "t.npz", "y")
    preprocessing = data.Preprocessing.describe(read, "y")
    assert preprocessing.classes == ("p", "p ")  # as they are
    assert preprocessing.columns[0].levels == ("a", "b")  # padding is no category
    assert preprocessing.features(read).tolist() == [[1, 0], [0, 1], [1, 0], [0, 1]]


def test_classes_of_an_array_in_a_csv_file(table, tmp_path):
    np.savez(tmp_path / "t.npz", v=[1.0, 2.0, 3.0, 4.0], y=[7, 10, 7, 10])
    read = data.read_table(tmp_path / "t.npz", "y")
    preprocessing = data.Preprocessing.describe(read, "y")
    assert preprocessing.targets(table([("v", "y"), (1, "10"), (2, "7")])).tolist() == [1, 0]


# numbers


STYLES = {
    "1,234.5": Spelling(",", "."),
    "1.234,5": Spelling(".", ","),
    "1 234.5": Spelling(" ", "."),
    "1 234,5": Spelling(" ", ","),
    "1'234.5": Spelling("'", "."),
    "$1,234.5": Spelling(",", ".", before="$"),
    "1.234,5 €": Spelling(".", ",", after="€"),
    "1234.5%": Spelling(after="%"),
    "1234.5 kg": Spelling(after="kg"),
    "CHF 1'234.5": Spelling("'", ".", before="CHF"),
}


def spelled(number, style):
    pattern = STYLES[style]
    text = f"{abs(number):,.2f}" if pattern.group else f"{abs(number):.2f}"
    text = text.translate({ord(","): pattern.group, ord("."): pattern.decimal})
    blank = " " * style.startswith("CHF"), " " * (style[-3:-1] in ("5 ", " k"))
    return f"{'-' * (number < 0)}{pattern.before}{blank[0]}{text}{blank[1]}{pattern.after}"


@pytest.mark.parametrize("style", STYLES)
@given(numbers=st.lists(st.integers(-(10**9), 10**9), min_size=2, max_size=12))
@in_a_folder
def test_numbers_in_every_spelling(table, style, numbers):
    values = [number / 100 for number in [*numbers, 123456789, 12]]  # these two show the style
    cells = [spelled(value, style) for value in values]
    assert spelling_of(cells) == STYLES[style]
    read, preprocessing = column(table, cells)
    assert preprocessing.columns[0].spelling == STYLES[style]
    assert read.numbers("v").tolist() == values
    again = data.Preprocessing.from_json(json.loads(json.dumps(preprocessing.to_json())))
    np.testing.assert_allclose(again.features(read, np.float64)[:, 0], values)


def test_one_notice_for_all_spellings(table):
    rows = [("price", "share", "rooms", "y"), *((f"${k},000", f"{k}%", k, f"{k},5") for k in range(1, 9))]
    read = table(rows)
    preprocessing = data.Preprocessing.describe(read, "y")
    assert preprocessing.task == "regression"
    assert read.notices == [
        "numbers with separators, signs or units are read as numbers: price ('$1,000' is 1000), share ('1%' is 1), "
        "y ('1,5' is 1.5)"
    ]


def test_the_training_decides_how_numbers_are_read(table):
    """1,234 is 1.234 beside 3,5, and 1234 beside 1,234.5; another table must not change that."""
    for cells, value in ((["3,5", "1,25"], 1.234), (["0,123", "2,456"], 1.234), (["2,345.5", "1"], 1234.0)):
        _, preprocessing = column(table, cells)
        assert preprocessing.features(table([("v",), ("1,234",)]), np.float64)[0, 0] == value
    with pytest.raises(DataError, match=r"row 2, column 'v': '3,5' is not a number written like '1,234.5'"):
        preprocessing.features(table([("v",), ("1",), ("3,5",)]))
    _, preprocessing = column(table, ["1", "2"])
    with pytest.raises(DataError, match=r"row 1, column 'v': '1,234' is not a number"):
        preprocessing.features(table([("v",), ("1,234",)]))


def test_quantities_are_no_classes(table):
    cells = ["1%", "2%", "1%", "2%"]
    assert data.Preprocessing.describe(table([("v", "y"), *((k, c) for k, c in enumerate(cells))]), "y").task == (
        "regression"
    )
    read = table([("v", "y"), *((k, c) for k, c in enumerate(cells))])
    assert data.Preprocessing.describe(read, "y", "classification").classes == ("1%", "2%")


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (
            ["1_2", "1_3", "12"],
            r"row 1, column 'v': '1_2' is not a number, other cells of the .*categorical v",
        ),
        (["2021_01", "2021_02"], r"column 'v': '2021_01' may be a number or a code.*--categorical v"),
        (["\u22121", "\u22122"], r"'\u22121' begins with a sign that is no minus: write '-'"),
        (["1", "\u22122"], r"row 2, column 'v': '\u22122' is not a number"),
        (["1,234", "2,345", "many"], r"row 3, column 'v': 'many' is not a number"),
        (["12", "1,234", "many"], r"row 3, column 'v': 'many' is not a number"),
        (["1,234", "", "5,678"], r"row 2, column 'v': missing value; "),
        (["1%", "none", "5%"], r"row 2, column 'v': missing value \(none\)"),
        (["1", "1e400"], r"row 2, column 'v': 1e400 is not a finite number"),
        (["inf", "-Infinity"], r"row 1, column 'v': inf is not a finite number \(2 such rows\)"),
    ],
)
def test_neither_numbers_nor_text(table, cells, message):
    with pytest.raises(DataError, match=message):
        column(table, cells)
    _, preprocessing = column(table, [cell or "?" for cell in cells], categorical=["v"])
    assert preprocessing.columns[0].levels == tuple(sorted({cell or "?" for cell in cells}))


@pytest.mark.parametrize(
    "cells",
    [
        *(["A1", "A2"], ["0-9", "10-19"], ["18+", "65+"], ["12:30", "12:45"], ["2021-01-05", "2021-02-05"]),
        *(["1 kg", "250 g"], ["٣", "٤"], ["0x10", "0x11"], ["1.2.3", "1.2.4"], ["Infinity", "Zero"], ["1_a", "2_b"]),
    ],
)
def test_codes_stay_text(table, cells):
    read, preprocessing = column(table, cells)
    assert preprocessing.columns[0].levels == tuple(sorted(cells))
    assert read.notices == []


def test_text_of_many_values_is_named(table):
    read, preprocessing = column(table, [f"2021-01-{k % 28 + 1:02} {k}h" for k in range(60)])
    assert preprocessing.width == 60
    assert len(read.notices) == 1
    assert "v (60 different values); --drop NAME" in read.notices[0]
    assert column(table, [f"town {k % 20}" for k in range(60)])[0].notices == []
    assert column(table, [f"n{k}" for k in range(60)], categorical=["v"])[0].notices == []


@pytest.mark.parametrize("values", [[1.5e308, -1.5e308], [0, 1e-320], [1e200, 1e200], [1e160, 0], [0, 1e-170]])
def test_columns_that_float64_cannot_scale(table, values):
    read, preprocessing = column(table, [repr(value) for value in values])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError, match=r"column 'v': values from .* cannot be standardised.*another unit"):
            preprocessing.fit(read, np.arange(2))
        read = table([("v", "y"), *((k, repr(value)) for k, value in enumerate(values))])
        preprocessing = data.Preprocessing.describe(read, "y", "regression")
        with pytest.raises(DataError, match=r"column 'y': values from"):
            preprocessing.fit(read, np.arange(2))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", ["1e300", "-1e300", "1.7e308"])
def test_a_value_far_from_the_training(table, dtype, value):
    read, preprocessing = column(table, ["1", "2", "3", "4"])
    preprocessing = preprocessing.fit(read, np.arange(4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError, match=r"row 2, column 'v': -?1\S+ is too far from the rows of the training"):
            preprocessing.features(table([("v",), ("1",), (value,)]), dtype)
        assert np.isfinite(preprocessing.features(table([("v",), ("1e15",)]), dtype)).all()


# files


INDEX = {
    "pandas": [str(k) for k in range(8)],
    "R": [str(k + 1) for k in range(8)],
    "shuffled": ["12", "3", "40", "5", "61", "7", "8", "0"],
    "row names": [f"car {k}" for k in range(8)],
}


@pytest.mark.parametrize("kind", INDEX)
def test_an_index_without_a_name_is_left_out(table, kind):
    rows = [("", "v", "y"), *((index, k, "pq"[k % 2]) for k, index in enumerate(INDEX[kind]))]
    read = table(rows)
    assert list(read.columns) == ["v", "y"]
    assert read.notices == ["the first column has no name and numbers or names the rows: left out"]
    # at predict time it is known that nobody will ask for it
    for rest in (rows[:2], rows[:1] + rows[1:2] * 3, [rows[0], ("0.5", 1, "p")]):
        assert list(table(rest, needed=["v"]).columns) == ["v", "y"]


@pytest.mark.parametrize("cells", [["1", "1"], ["a", "a"], ["0.5", "1.5"], ["1", ""]])
def test_another_column_without_a_name_is_refused(table, cells):
    with pytest.raises(DataError, match="column 1 has no name in the header, and does not number or name the rows"):
        table([("", "v"), *((cell, 1) for cell in cells)])
    with pytest.raises(DataError, match="column 2 has no name in the header"):
        table([("v", ""), *((k, k) for k in range(2))])


def test_columns_named_by_numbers(table):
    numbered = [("0", "1", "2"), ("5.1", "3.5", "1.4")]
    assert list(table(numbered).columns) == ["0", "1", "2"]  # as pandas counts them
    assert list(table([("", "0", "1"), ("0", "5.1", "3.5")]).columns) == ["0", "1"]
    for names in (("5.1", "3.5"), ("1", "2"), ("1", "nan"), ("0", "0.5")):
        with pytest.raises(DataError, match="the first row must name the columns, found numbers"):
            table([names, ("1", "2")])
    assert list(table([("2", "7"), ("1", "2")], needed=["7", "2"]).columns) == ["2", "7"]
    with pytest.raises(DataError, match="the first row must name the columns"):
        table([("2", "7"), ("1", "2")], needed=["7", "3"])


@pytest.mark.parametrize(
    "text",
    ["\na,b\n1,2\n", "  \n,,\n\na,b\n1,2\n", '"a" , "b"\n', 'a, "b"\n1, "2"\n', "\ufeff\n\na,b\n\n1,2\n \n"],
)
def test_blank_lines_and_quotes_after_blanks(tmp_path, text):
    path = tmp_path / "t.csv"
    path.write_text(text, encoding="utf-8")
    if text.startswith('"a" '):  # a blank behind a quote is no CSV; it is told
        with pytest.raises(DataError, match="line 1: not a CSV file"):
            data.read_table(path)
        return
    read = data.read_table(path)
    assert {name: list(cells) for name, cells in read.columns.items()} == {"a": ["1"], "b": ["2"]}


def test_a_long_cell_costs_its_own_length(table):
    rows = [("v", "notes", "y"), *((k, "x" * 100_000 if k == 77 else "fine", "pq"[k % 2]) for k in range(5000))]
    tracemalloc.start()
    try:
        read = table(rows)
        preprocessing = data.Preprocessing.describe(read, "y", drop=["notes"])
        preprocessing.features(read)
        kept = data.Preprocessing.describe(read, "y")
        kept.features(read)
        kept.answers(np.zeros((5000, 2)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20e6  # arrays of text take 2 GB


def test_arrays_are_not_kept_twice(tmp_path):
    np.savez(tmp_path / "t.npz", X=np.zeros((1000, 500), np.float32), y=np.arange(1000) % 2)
    read = data.read_table(tmp_path / "t.npz", "y")
    tracemalloc.start()
    try:
        data.Preprocessing.describe(read, "y").fit(read, np.arange(1000))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1e6  # 4 MB in float64


def test_long_class_names_cost_their_own_length():
    names = ("x" * 1_000_000, "y")
    preprocessing = data.Preprocessing("y", "classification", names, columns=(data.preprocessing.Column("v"),))
    tracemalloc.start()
    try:
        assert preprocessing.answers(np.tile([0.0, 1.0], (1000, 1))).tolist() == ["y"] * 1000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1e6  # an array of text takes 4 GB


class Names(list):
    """Counts how often a list of names is searched from its start."""

    searched = 0

    def __getitem__(self, key):
        if isinstance(key, slice):
            Names.searched += 1
        return super().__getitem__(key)


def test_the_header_is_looked_through_once():
    names = Names(f"gene{k}" for k in range(1000))
    data.table._check_header("t.csv", names, ())
    assert Names.searched == 0
    with pytest.raises(DataError, match="names 'gene7' twice"):
        data.table._check_header("t.csv", [*names, "gene7"], ())
