"""Tables from CSV and NPZ files, with errors that name the row and the column.

CSV: UTF-8, commas, the first row names the columns. NPZ: one array per column or block of columns, one row per
sample; where there is an array ``X``, only it and the target are used. A two-dimensional array ``X`` gives the columns
``X[0]``, ``X[1]``, ... Rows count from 1, below the header.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fastdl.errors import DataError

#: Cells that mean "missing" in a column of numbers; in a column of text only the first two do.
MISSING = ("", "nan", "na", "n/a", "null", "none", "?")


@dataclass(frozen=True)
class Table:
    """Named columns of equal length; text columns hold ``str``. ``source`` is the file, for messages."""

    source: str
    columns: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def column(self, name: str) -> np.ndarray:
        try:
            return self.columns[name]
        except KeyError:
            raise DataError(f"{self.source}: there is no column {name!r}; columns: {listed(self.columns)}") from None

    def error(self, name: str, rows: np.ndarray, problem: str) -> DataError:
        """A `DataError` that names the first of the offending rows."""
        more = f" ({len(rows)} such rows)" if len(rows) > 1 else ""
        return DataError(f"{self.source}: row {rows[0] + 1}, column {name!r}: {problem}{more}")

    def numbers(self, name: str) -> np.ndarray | None:
        """A column as float64, or None if none of its cells is a number."""
        cells = self.column(name)
        if cells.dtype.kind == "U":
            values = self._parsed(name, cells)
            if values is None:
                return None
        else:
            values = cells.astype(np.float64)
        missing = np.flatnonzero(np.isnan(values))
        if len(missing):
            raise self.error(name, missing, "missing value; fill it in or remove the row")
        infinite = np.flatnonzero(np.isinf(values))
        if len(infinite):
            raise self.error(name, infinite, f"{values[infinite[0]]} is not a finite number")
        return values

    def _parsed(self, name: str, cells: np.ndarray) -> np.ndarray | None:
        """Text to float64, missing cells as NaN; None if no cell is a number."""
        try:
            return cells.astype(np.float64)
        except ValueError:
            values = [_number(cell) for cell in cells.tolist()]
        if all(value is None or np.isnan(value) for value in values):
            return None
        text = np.flatnonzero([value is None for value in values])
        if len(text):
            hint = f"make it one, or declare the column with --categorical {name}"
            raise self.error(
                name, text, f"{str(cells[text[0]])!r} is not a number, other cells of the column are; {hint}"
            )
        return np.array(values, np.float64)

    def texts(self, name: str) -> np.ndarray:
        """A column as text, without missing values."""
        cells = self.column(name)
        if cells.dtype.kind == "f":
            self.numbers(name)
        texts = cells if cells.dtype.kind == "U" else cells.astype(np.str_)
        missing = np.flatnonzero([text.lower() in MISSING[:2] for text in texts.tolist()])
        if len(missing):
            raise self.error(name, missing, "missing value; fill it in or remove the row")
        return texts


def _number(cell: str) -> float | None:
    if cell.lower() in MISSING:
        return np.nan
    try:
        return float(cell)
    except ValueError:
        return None


def listed(names: Iterable[str], limit: int = 20) -> str:
    names = list(names)
    more = f", ... ({len(names)} in all)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def read_table(path: str | os.PathLike[str], target: str | None = None) -> Table:
    """Read a CSV or NPZ file.

    Parameters
    ----------
    path : path
        Its ending decides: ``.npz``, or CSV for ``.csv`` and ``.txt``.
    target : str, optional
        Array of an NPZ file that is kept beside ``X``.

    Raises
    ------
    DataError
        With the row and the column where the file cannot be used.
    OSError
        The file cannot be opened.
    """
    source = os.fspath(path)
    ending = os.path.splitext(source)[1].lower()
    if ending == ".npz":
        return _read_npz(source, target)
    if ending in (".csv", ".txt"):
        return _read_csv(source)
    raise DataError(f"{source}: expected a .csv or .npz file, found {ending or 'no ending'}")


def _read_csv(source: str) -> Table:
    with open(source, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            names = [name.strip() for name in next(reader, [])]
            _check_header(source, names)
            rows = []
            for row in reader:
                if not row:
                    continue
                if len(row) != len(names):
                    raise DataError(
                        f"{source}: row {len(rows) + 1} (line {reader.line_num}) has {len(row)} cells, the header "
                        f"names {len(names)} columns"
                    )
                rows.append(row)
        except csv.Error as error:
            raise DataError(f"{source}: line {reader.line_num}: not a CSV file ({error})") from None
        except UnicodeDecodeError as error:
            raise DataError(f"{source}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
    if not rows:
        raise DataError(f"{source}: there are no rows below the header")
    cells = zip(*rows, strict=True)
    return Table(source, {name: np.char.strip(np.array(column)) for name, column in zip(names, cells, strict=True)})


def _check_header(source: str, names: Sequence[str]) -> None:
    if not names:
        raise DataError(f"{source}: the file is empty")
    for separator in ";\t":
        if len(names) == 1 and separator in names[0]:
            raise DataError(f"{source}: columns must be separated by commas, the header has {separator!r}")
    for k, name in enumerate(names):
        if not name:
            raise DataError(f"{source}: column {k + 1} has no name in the header (pandas: to_csv(index=False))")
        if name in names[:k]:
            raise DataError(f"{source}: the header names {name!r} twice")
    if all(_number(name) is not None for name in names):
        raise DataError(f"{source}: the first row must name the columns, found numbers: {listed(names, 5)}")


def _read_npz(source: str, target: str | None) -> Table:
    import zipfile  # here: most programs that import fastdl never read an archive

    try:
        with np.load(source, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (ValueError, zipfile.BadZipFile, EOFError, KeyError, AttributeError) as error:
        raise DataError(f"{source}: not a NumPy archive of plain arrays ({error})") from None
    if target is not None and target not in arrays:
        raise DataError(f"{source}: there is no array {target!r}; arrays: {listed(arrays) or 'none'}")
    if "X" in arrays:
        arrays = {name: array for name, array in arrays.items() if name in ("X", target)}
    columns: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        if array.ndim == 0 or array.dtype.kind not in "biufUS":
            raise DataError(
                f"{source}: array {name!r} must hold numbers or text per row, found {array.dtype} {array.shape}"
            )
        if array.dtype.kind == "S":
            array = np.char.decode(array, "utf-8")
        if array.dtype.kind == "U":
            array = np.char.strip(array)
        block = array.reshape(len(array), int(np.prod(array.shape[1:])))
        if block.shape[1] == 1 and name != "X":
            columns[name] = block[:, 0]
        else:
            columns |= {f"{name}[{k}]": block[:, k] for k in range(block.shape[1])}
    shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
    if not columns or len({len(column) for column in columns.values()}) != 1:
        raise DataError(f"{source}: every array needs the same number of rows, found {shapes or 'no array'}")
    if not len(next(iter(columns.values()))):
        raise DataError(f"{source}: the arrays have no rows: {shapes}")
    return Table(source, columns)
