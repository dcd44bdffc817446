"""What turns a table into the net's input, and the net's output into an answer.

- A column whose cells are all numbers, written in one way (`fastdl.data.spelling`), is numeric and is standardised (a
  constant column becomes 0); one with no number among its cells is categorical and is encoded one-hot. A mixture is an
  error, as is a missing value.
- The target is a class if it is text or bool, or if it holds at most 20 different whole numbers, each twice or more
  often on average; otherwise it is a number to regress, standardised for the training. Numbers with separators, a
  currency or a unit are quantities, so never classes by themselves.
- A class is the text of a CSV file as it stands there ("007", "1.10"), or a value of an NPZ array in the array's dtype.
- Means and deviations come from the training rows alone, categories and classes from the whole table. A category or a
  class that was not there is an error, not a row of zeros.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fastdl.data.spelling import PLAIN, Spelling, doubtful
from fastdl.data.table import Table, listed
from fastdl.errors import DataError

#: A categorical column with more distinct values than this is taken for an identifier or free text.
MAX_CATEGORIES = 1000
#: One with more than this, or with a value for every other row, is worth a notice.
MANY_CATEGORIES, FEW_CATEGORIES = 100, 20
#: A whole-number target with at most this many distinct values is a class.
MAX_NUMBERED_CLASSES = 20
#: Squares of larger numbers, and of smaller differences, leave the range of float64.
LARGEST, SMALLEST = 1e150, 1e-150
_LABEL_DTYPES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
TASKS = ("auto", "classification", "regression")


@dataclass(frozen=True)
class Column:
    """How one column becomes numbers: ``(value - mean) / std``, or one 0/1 feature for each of ``levels``."""

    name: str
    mean: float = 0.0
    std: float = 1.0
    levels: tuple[str, ...] | None = None
    #: how its numbers are written, where that is not plain
    spelling: Spelling | None = None

    def __post_init__(self) -> None:
        texts = [self.name, *(self.levels or ())]
        if not all(isinstance(text, str) for text in texts) or self.levels == ():
            raise ValueError("a column needs a name, and levels that are text")
        _check_scale(self.mean, self.std)

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "spelling": self.spelling and vars(self.spelling)}

    @property
    def width(self) -> int:
        return 1 if self.levels is None else len(self.levels)

    @property
    def numbers(self) -> Spelling:
        return self.spelling or PLAIN


@dataclass(frozen=True)
class Preprocessing:
    """The rules above, decided for one table; survives a round trip through JSON.

    Made by `describe`, given means and deviations by `fit`, applied by `features` and `targets`.
    """

    target: str
    task: str
    #: class labels in order (classification)
    classes: tuple[Any, ...] | None = None
    #: mean and standard deviation of the target (regression)
    mean: float = 0.0
    std: float = 1.0
    columns: tuple[Column, ...] = ()
    #: dtype of the labels, where they came as an array of numbers
    label_dtype: str | None = None
    #: widths of the arrays of an NPZ file that the columns are of
    blocks: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_scale(self.mean, self.std)
        if not isinstance(self.target, str) or self.task not in TASKS[1:] or not self.columns:
            raise ValueError("preprocessing needs a target, a task and columns")
        if (self.classes is None) != (self.task == "regression"):
            raise ValueError("a classification has classes, a regression has none")
        if self.classes is not None:
            kinds = {type(label) for label in self.classes}
            if len(kinds) != 1 or not kinds <= {bool, int, float, str} or len(set(self.classes)) < 2:
                raise ValueError("classes must be at least two different labels of one type")
            if self.label_dtype is not None and np.dtype(self.label_dtype).str[1:] not in _LABEL_DTYPES:
                raise ValueError(f"labels of dtype {self.label_dtype}")
            np.array(self.classes, self.label_dtype)
        if not all(isinstance(name, str) and isinstance(width, int) for name, width in self.blocks.items()):
            raise ValueError("blocks are widths by name")

    @property
    def width(self) -> int:
        """Features of a row."""
        return sum(column.width for column in self.columns)

    @property
    def outputs(self) -> int:
        """What a net must give for a row: a value for each class, or the target."""
        return 1 if self.classes is None else len(self.classes)

    @classmethod
    def describe(
        cls,
        table: Table,
        target: str,
        task: str = "auto",
        categorical: Sequence[str] = (),
        drop: Sequence[str] = (),
    ) -> Preprocessing:
        """Decide the kind of every column, the categories and the classes from the whole table.

        What a user should know of these decisions is added to ``table.notices``.

        Parameters
        ----------
        table : Table
        target : str
            Column to predict.
        task : {"auto", "classification", "regression"}
        categorical, drop : sequences of column names
            Columns to encode one-hot even if they hold numbers, and columns to leave out.
        """
        if task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}, found {task!r}")
        for name in (target, *categorical, *drop):
            table.column(name)
        for option, names in (("--categorical", categorical), ("--drop", drop)):
            if target in names:
                raise DataError(f"{table.source}: {option} {target}: this is the target, not a column to predict from")
        if both := set(categorical).intersection(drop):
            raise DataError(f"{table.source}: both --categorical and --drop name {min(both)!r}")
        task = _task(table, target, task)
        classes, label_dtype = (None, None) if task == "regression" else _classes(table, target)
        categorical, left_out = set(categorical), {target, *drop}
        columns = tuple(
            _describe_column(table, name, name in categorical) for name in table.columns if name not in left_out
        )
        if not columns:
            raise DataError(f"{table.source}: no column is left to predict {target!r} from")
        used = {column.name.rpartition("[")[0] for column in columns}
        blocks = {name: width for name, width in table.blocks.items() if name in used}
        described = cls(target, task, classes, columns=columns, label_dtype=label_dtype, blocks=blocks)
        table.notices.extend(described._notices(table, categorical))
        return described

    def _notices(self, table: Table, categorical: set[str]) -> list[str]:
        """Decisions that a user may not expect, one sentence for each kind."""
        notices = []
        spellings = {column.name: column.spelling for column in self.columns if column.spelling is not None}
        if self.classes is None and table.spelling(self.target) != PLAIN:
            spellings[self.target] = table.spelling(self.target)
        if spellings:
            shown = listed(_example(table, name, spelling) for name, spelling in spellings.items())
            notices.append(f"numbers with separators, signs or units are read as numbers: {shown}")
        many = min(MANY_CATEGORIES, max(FEW_CATEGORIES, len(table) // 2))
        crowded = [
            f"{column.name} ({column.width} different values)"
            for column in self.columns
            if column.width > many and column.name not in categorical
        ]
        if crowded:
            notices.append(
                f"text with many values becomes a feature for each: {listed(crowded)}; --drop NAME leaves a column out"
            )
        return notices

    def fit(self, table: Table, rows: np.ndarray) -> Preprocessing:
        """The same with means and deviations of some rows (those of the training)."""
        fitted = []
        for column in self.columns:
            if column.levels is None:
                mean, std = _moments(table, column.name, column.numbers, rows)
                column = replace(column, mean=mean, std=std)
            fitted.append(column)
        mean, std = (0.0, 1.0) if self.classes is not None else _moments(table, self.target, None, rows)
        return replace(self, columns=tuple(fitted), mean=mean, std=std)

    def features(self, table: Table, dtype: Any = np.float32, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """The table as a matrix (N, F), or some of its rows in an order of their own."""
        absent = [column.name for column in self.columns if column.name not in table.columns]
        for name, width in self.blocks.items():
            if table.blocks.get(name, width) != width:
                raise DataError(
                    f"{table.source}: array {name!r} has {table.blocks[name]} columns, that of the training had {width}"
                )
        if absent:
            raise DataError(f"{table.source}: missing columns {listed(absent)}; found {listed(table.columns)}")
        count = len(table) if isinstance(rows, slice) else len(rows)
        out = np.empty((count, self.width), dtype)
        at = 0
        for column in self.columns:
            out[:, at : at + column.width] = _encoded(table, column, out.dtype, rows)
            at += column.width
        return out

    def targets(self, table: Table, dtype: Any = np.float32) -> np.ndarray:
        """Class numbers (N,) int64, or the standardised target (N, 1)."""
        if self.classes is None:
            values = table.numbers(self.target)
            if values is None:
                raise DataError(f"{table.source}: column {self.target!r} must hold numbers")
            return _standardised(table, self.target, values, self.mean, self.std, np.dtype(dtype))
        labels: Sequence[Any] = _labels(table, self.target).tolist()
        if isinstance(self.classes[0], str):
            labels = [str(label) for label in labels]
        elif table.holds_text(self.target):  # classes of an NPZ file, found again in a CSV file
            labels = table.numbers(self.target, PLAIN).tolist()
        index = {label: k for k, label in enumerate(self.classes)}
        codes = np.array([index.get(label, -1) for label in labels], np.int64)
        unknown = np.flatnonzero(codes < 0)
        if len(unknown):
            label = str(table.column(self.target)[unknown[0]])
            raise table.error(self.target, unknown, f"unknown class {label!r}; known: {listed(map(str, self.classes))}")
        return codes

    def answers(self, outputs: np.ndarray) -> np.ndarray:
        """The net's outputs (N, O) as class labels or as values of the target."""
        if outputs.shape[1] != self.outputs:
            raise DataError(f"the net has {outputs.shape[1]} outputs, its preprocessing has {self.outputs}")
        if self.classes is None:
            return outputs[:, 0].astype(np.float64) * self.std + self.mean
        # text as objects: one long label would make every element of an array of text as long
        dtype = object if isinstance(self.classes[0], str) else self.label_dtype
        return np.array(self.classes, dtype)[outputs.argmax(axis=1)]

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "blocks": dict(self.blocks), "columns": [column.to_json() for column in self.columns]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Preprocessing:
        """Read what `to_json` made, of this version or an older one.

        Raises
        ------
        DataError
            It is something else.
        """
        try:
            columns = tuple(
                Column(
                    **{
                        **column,
                        "levels": None if column["levels"] is None else tuple(column["levels"]),
                        "spelling": Spelling(**column["spelling"]) if column.get("spelling") else None,
                    }
                )
                for column in data["columns"]
            )
            classes = data["classes"]
            return cls(**{**data, "columns": columns, "classes": classes if classes is None else tuple(classes)})
        except (TypeError, KeyError, ValueError, AttributeError, OverflowError) as error:
            raise DataError(f"no preprocessing that fastdl wrote ({type(error).__name__}: {error})") from None


def _example(table: Table, name: str, spelling: Spelling) -> str:
    cell = next(cell for cell in table.column(name) if PLAIN.read(cell) is None)
    return f"{name} ({str(cell)!r} is {spelling.read(cell):.15g})"


def _check_scale(mean: float, std: float) -> None:
    if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
        raise ValueError(f"a mean and a positive deviation must be finite, found {mean!r} and {std!r}")


def _moments(table: Table, name: str, spelling: Spelling | None, rows: np.ndarray) -> tuple[float, float]:
    """Mean and deviation; 1 for a constant column, whose computed deviation may be a rounding error."""
    values = table.numbers(name, spelling)[rows]
    low, high = values.min(), values.max()
    if max(-low, high) > LARGEST or 0 < high - low < SMALLEST:
        raise DataError(
            f"{table.source}: column {name!r}: values from {low:g} to {high:g} cannot be standardised in float64; "
            "write the column in another unit"
        )
    return float(values.mean()), float(values.std()) if low < high else 1.0


def _describe_column(table: Table, name: str, categorical: bool) -> Column:
    if not categorical:
        spelling = table.spelling(name)
        if spelling is not None:
            table.numbers(name, spelling)
            return Column(name, spelling=None if spelling == PLAIN else spelling)
    levels = sorted({text.strip() for text in table.texts(name)})
    if not categorical and (problem := doubtful(levels)):
        raise DataError(f"{table.source}: column {name!r}: {problem}, or declare the column with --categorical {name}")
    if len(levels) > MAX_CATEGORIES:
        raise DataError(
            f"{table.source}: column {name!r} has {len(levels)} different values, more than {MAX_CATEGORIES}: leave it "
            f"out with --drop {name}"
        )
    return Column(name, levels=tuple(levels))


def _encoded(table: Table, column: Column, dtype: np.dtype, rows: np.ndarray | slice) -> np.ndarray:
    """The features of one column, (rows, width)."""
    if column.levels is None:
        values = table.numbers(column.name, column.numbers)
        return _standardised(table, column.name, values, column.mean, column.std, dtype)[rows]
    texts = table.texts(column.name)
    index = {level: k for k, level in enumerate(column.levels)}
    codes = np.fromiter((index.get(text.strip(), -1) for text in texts), np.int64, len(texts))
    unknown = np.flatnonzero(codes < 0)
    if len(unknown):
        text = texts[unknown[0]]
        raise table.error(column.name, unknown, f"unknown category {text!r}; known: {listed(column.levels)}")
    return codes[rows][:, None] == np.arange(column.width)


def _standardised(table: Table, name: str, values: np.ndarray, mean: float, std: float, dtype: np.dtype) -> np.ndarray:
    """``(values - mean) / std`` as a column (N, 1) of a dtype that can hold the squares as well."""
    with np.errstate(over="ignore"):
        scaled = (values - mean) / std
    far = np.flatnonzero(~(np.abs(scaled) <= math.sqrt(np.finfo(dtype).max)))
    if len(far):
        raise table.error(
            name, far, f"{values[far[0]]:g} is too far from the rows of the training (mean {mean:g}, deviation {std:g})"
        )
    return scaled.astype(dtype)[:, None]


def _labels(table: Table, name: str) -> np.ndarray:
    """Class labels: the text of a file, or an array as it came."""
    texts = table.texts(name)
    return np.array(texts, object) if table.holds_text(name) else table.column(name)


def _classes(table: Table, name: str) -> tuple[tuple[Any, ...], str | None]:
    """The different labels in order, numbers by their value; and the dtype of an array of numbers."""
    labels = _labels(table, name)
    classes = np.unique(labels).tolist()
    if not 2 <= len(classes) <= MAX_CATEGORIES:
        raise DataError(
            f"{table.source}: the target {name!r} has {len(classes)} classes, expected 2 to {MAX_CATEGORIES}"
        )
    if labels.dtype != object:
        return tuple(classes), labels.dtype.str
    values = [PLAIN.read(label) for label in classes]
    if None not in values:
        classes = [label for _, label in sorted(zip(values, classes, strict=True))]
    return tuple(classes), None


def _task(table: Table, name: str, task: str) -> str:
    """Classification or regression."""
    if task == "classification" or (task == "auto" and not table.holds_text(name) and table.column(name).dtype == bool):
        return "classification"
    spelling = table.spelling(name, remedy="take it for text with --task classification")
    if spelling is None:
        if task == "regression":
            raise DataError(f"{table.source}: the target {name!r} holds text, a regression needs numbers")
        return "classification"
    values = table.numbers(name, spelling)
    distinct = np.unique(values)
    few = len(distinct) <= min(MAX_NUMBERED_CLASSES, len(values) // 2)
    whole = np.array_equal(distinct, np.round(distinct))
    return "classification" if task == "auto" and spelling == PLAIN and few and whole else "regression"
