"""What turns a table into the net's input, and the net's output into an answer.

- A column whose cells are all numbers is numeric and is standardised (a constant column becomes 0); one with no number
  among its cells is categorical and is encoded one-hot. A mixture is an error, as is a missing value.
- The target is a class if it is text or bool, or if it holds at most 20 different whole numbers, each twice or more
  often on average; otherwise it is a number to regress, standardised for the training.
- Means and deviations come from the training rows alone, categories and classes from the whole table. A category or a
  class that was not there is an error, not a row of zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from fastdl.data.table import Table, listed
from fastdl.errors import DataError

#: A categorical column with more distinct values than this is taken for an identifier or free text.
MAX_CATEGORIES = 1000
#: A whole-number target with at most this many distinct values is a class.
MAX_NUMBERED_CLASSES = 20
TASKS = ("auto", "classification", "regression")


@dataclass(frozen=True)
class Column:
    """How one column becomes numbers: ``(value - mean) / std``, or one 0/1 feature for each of ``levels``."""

    name: str
    mean: float = 0.0
    std: float = 1.0
    levels: tuple[str, ...] | None = None

    @property
    def width(self) -> int:
        return 1 if self.levels is None else len(self.levels)


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
        task, classes = _target_kind(table, target, task)
        used = [name for name in table.columns if name != target and name not in drop]
        if not used:
            raise DataError(f"{table.source}: no column is left to predict {target!r} from")
        columns = tuple(_describe_column(table, name, name in categorical) for name in used)
        return cls(target, task, classes, columns=columns)

    def fit(self, table: Table, rows: np.ndarray) -> Preprocessing:
        """The same with means and deviations of some rows (those of the training)."""
        fitted = []
        for column in self.columns:
            if column.levels is None:
                mean, std = _moments(table.numbers(column.name)[rows])
                column = replace(column, mean=mean, std=std)
            fitted.append(column)
        mean, std = (0.0, 1.0) if self.classes is not None else _moments(table.numbers(self.target)[rows])
        return replace(self, columns=tuple(fitted), mean=mean, std=std)

    def features(self, table: Table, dtype: Any = np.float32) -> np.ndarray:
        """The table as a matrix (N, F)."""
        absent = [column.name for column in self.columns if column.name not in table.columns]
        if absent:
            raise DataError(f"{table.source}: missing columns {listed(absent)}; found {listed(table.columns)}")
        out = np.empty((len(table), sum(column.width for column in self.columns)), dtype)
        at = 0
        for column in self.columns:
            out[:, at : at + column.width] = _encoded(table, column)
            at += column.width
        return out

    def targets(self, table: Table, dtype: Any = np.float32) -> np.ndarray:
        """Class numbers (N,) int64, or the standardised target (N, 1)."""
        if self.classes is None:
            values = table.numbers(self.target)
            if values is None:
                raise DataError(f"{table.source}: column {self.target!r} must hold numbers")
            return ((values - self.mean) / self.std).astype(dtype)[:, None]
        index = {label: k for k, label in enumerate(self.classes)}
        codes = np.array([index.get(label, -1) for label in _labels(table, self.target).tolist()], np.int64)
        unknown = np.flatnonzero(codes < 0)
        if len(unknown):
            found = str(table.column(self.target)[unknown[0]])
            raise table.error(self.target, unknown, f"unknown class {found!r}; known: {listed(map(str, self.classes))}")
        return codes

    def answers(self, outputs: np.ndarray) -> np.ndarray:
        """The net's outputs (N, O) as class labels or as values of the target."""
        if self.classes is None:
            return outputs[:, 0].astype(np.float64) * self.std + self.mean
        return np.array(self.classes)[outputs.argmax(axis=1)]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Preprocessing:
        columns = tuple(Column(**{**c, "levels": c["levels"] and tuple(c["levels"])}) for c in data["columns"])
        classes = data["classes"]
        return cls(**{**data, "columns": columns, "classes": classes if classes is None else tuple(classes)})


def _moments(values: np.ndarray) -> tuple[float, float]:
    """Mean and deviation; 1 for a constant column, whose computed deviation may be a rounding error."""
    return float(values.mean()), float(values.std()) if values.min() < values.max() else 1.0


def _describe_column(table: Table, name: str, categorical: bool) -> Column:
    if not categorical and table.numbers(name) is not None:
        return Column(name)
    levels = np.unique(table.texts(name))
    if len(levels) > MAX_CATEGORIES:
        raise DataError(
            f"{table.source}: column {name!r} has {len(levels)} different values, more than {MAX_CATEGORIES}: leave it "
            f"out with --drop {name}"
        )
    return Column(name, levels=tuple(levels.tolist()))


def _encoded(table: Table, column: Column) -> np.ndarray:
    """The features of one column, (N, width)."""
    if column.levels is None:
        values = table.numbers(column.name)
        if values is None:
            found = str(table.column(column.name)[0])
            raise table.error(column.name, np.array([0]), f"{found!r} is not a number")
        return ((values - column.mean) / column.std)[:, None]
    texts, levels = table.texts(column.name), np.array(column.levels)
    codes = np.minimum(np.searchsorted(levels, texts), len(levels) - 1)
    unknown = np.flatnonzero(levels[codes] != texts)
    if len(unknown):
        found = str(texts[unknown[0]])
        raise table.error(column.name, unknown, f"unknown category {found!r}; known: {listed(column.levels)}")
    return codes[:, None] == np.arange(len(levels))


def _labels(table: Table, name: str) -> np.ndarray:
    """Class labels in the narrowest type that holds them all: bool, int, float or text."""
    cells = table.column(name)
    if cells.dtype.kind != "U":
        table.texts(name)
        return cells
    texts = table.texts(name)
    for kind in (np.int64, np.float64):
        try:
            return texts.astype(kind)
        except (ValueError, OverflowError):
            continue
    return texts


def _target_kind(table: Table, name: str, task: str) -> tuple[str, tuple[Any, ...] | None]:
    if task == "regression":
        if table.numbers(name) is None:
            raise DataError(f"{table.source}: the target {name!r} holds text, a regression needs numbers")
        return task, None
    if task == "auto" and table.column(name).dtype.kind != "b":
        values = table.numbers(name)
        if values is not None:
            distinct = np.unique(values)
            few = len(distinct) <= min(MAX_NUMBERED_CLASSES, len(values) // 2)
            if not (few and np.array_equal(distinct, np.round(distinct))):
                return "regression", None
    classes = tuple(np.unique(_labels(table, name)).tolist())
    if not 2 <= len(classes) <= MAX_CATEGORIES:
        raise DataError(
            f"{table.source}: the target {name!r} has {len(classes)} classes, expected 2 to {MAX_CATEGORIES}"
        )
    return "classification", classes
