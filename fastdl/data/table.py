"""Tables from CSV and NPZ files, with errors that name the row and the column.

CSV: UTF-8, commas, the first row that is not blank names the columns. NPZ: one array per column or block of columns,
one row per sample; where there is an array ``X``, only it and the target are read. A two-dimensional array ``X`` gives
the columns ``X[0]``, ``X[1]``, ... Rows count from 1, below the header.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BufferedReader, TextIOWrapper

import numpy as np

from fastdl.data.spelling import PLAIN, Spelling, nearly, spelling_of
from fastdl.errors import DataError

#: Cells that mean "missing" in a column of numbers; in a column of text only the first two do.
MISSING = ("", "nan", "na", "n/a", "null", "none", "?")
#: Cells that a program writes where a number has become too large.
INFINITE = tuple(sign + word for sign in ("", "+", "-") for word in ("inf", "infinity"))

#: How archives (NPZ files, spreadsheets) and single arrays of NumPy begin.
ZIP, NPY = (b"PK\x03\x04", b"PK\x05\x06"), b"\x93NUMPY"

#: Cells of one column: text as it stands in a CSV file, or an array of an NPZ file.
Cells = Sequence[str] | np.ndarray


@dataclass(frozen=True)
class Table:
    """Named columns of equal length. ``source`` is the file, for messages."""

    source: str
    columns: Mapping[str, Cells]
    #: arrays of an NPZ file that gave several columns, and how many
    blocks: Mapping[str, int] = field(default_factory=dict)
    #: what a user should know about how the file was read, a sentence each
    notices: list[str] = field(default_factory=list)
    #: what text has been read as; reading takes longer than all the rest
    _numbers: dict[tuple[str, Spelling], np.ndarray] = field(default_factory=dict, init=False, repr=False)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    @property
    def nbytes(self) -> int:
        """Memory of the cells, roughly: a cell of text is a pointer, a string of 50 bytes or more, and a number."""
        arrays = (cells.nbytes if isinstance(cells, np.ndarray) else 66 * len(cells) for cells in self.columns.values())
        return sum(arrays)

    def column(self, name: str) -> Cells:
        try:
            return self.columns[name]
        except KeyError:
            raise DataError(f"{self.source}: there is no column {name!r}; columns: {listed(self.columns)}") from None

    def error(self, name: str, rows: np.ndarray, problem: str) -> DataError:
        """A `DataError` that names the first of the offending rows."""
        more = f" ({len(rows)} such rows)" if len(rows) > 1 else ""
        return DataError(f"{self.source}: row {rows[0] + 1}, column {name!r}: {problem}{more}")

    def missing(self, name: str, rows: np.ndarray) -> DataError:
        cell = str(self.column(name)[rows[0]])
        shown = f" ({cell})" if cell else ""
        return self.error(name, rows, f"missing value{shown}; fill it in or remove the row")

    def holds_text(self, name: str) -> bool:
        cells = self.column(name)
        return not isinstance(cells, np.ndarray) or cells.dtype.kind == "U"

    def spelling(self, name: str, remedy: str | None = None) -> Spelling | None:
        """How the numbers of a column are written, or None if it holds text.

        A mixture is an error; ``remedy`` is what to do if the numbers are meant as text.
        """
        if not self.holds_text(name):
            return PLAIN
        cells = self._texts(name)
        values = _plain_numbers(cells)
        if values is not None:
            self._numbers[name, PLAIN] = values
            return PLAIN
        kinds = dict.fromkeys(cells)  # each once, in the order of the rows
        distinct = [cell for cell in kinds if cell.strip().lower() not in MISSING + INFINITE]
        if not distinct and any(cell.strip().lower() in INFINITE for cell in kinds):
            return PLAIN
        spelling = spelling_of(distinct)
        if spelling is None and (usual := nearly(distinct)):
            strange = {cell for cell in distinct if usual.read(cell) is None}
            rows = np.flatnonzero([cell in strange for cell in cells])
            remedy = remedy or f"declare the column with --categorical {name}"
            raise self.error(
                name,
                rows,
                f"{cells[rows[0]]!r} is not a number, other cells of the column are; make it one, or {remedy}",
            )
        return spelling

    def numbers(self, name: str, spelling: Spelling | None = None) -> np.ndarray | None:
        """A column as float64.

        Parameters
        ----------
        name : str
        spelling : Spelling, optional
            How the numbers must be written. Without it, what the cells show decides, and a column of text gives None.
        """
        if spelling is None:
            spelling = self.spelling(name)
            if spelling is None:
                return None
        known = self._numbers.get((name, spelling))
        if known is not None:
            return known
        text = self.holds_text(name)
        values = self._read(name, spelling) if text else self.column(name).astype(np.float64)
        if not np.isfinite(values).all():
            missing = np.flatnonzero(np.isnan(values))
            if len(missing):
                raise self.missing(name, missing)
            infinite = np.flatnonzero(np.isinf(values))
            raise self.error(name, infinite, f"{self.column(name)[infinite[0]]} is not a finite number")
        if text:
            self._numbers[name, spelling] = values
        return values

    def _read(self, name: str, spelling: Spelling) -> np.ndarray:
        """Text as numbers written in one way, missing cells as NaN, infinities as they are."""
        cells = self._texts(name)
        values = _plain_numbers(cells) if spelling == PLAIN else None
        if values is not None:
            return values
        read = {cell: _number(cell, spelling) for cell in dict.fromkeys(cells)}
        strange = {cell for cell, value in read.items() if value is None}
        if strange:
            rows = np.flatnonzero([cell in strange for cell in cells])
            like = "" if spelling == PLAIN else f" written like {str(spelling)!r}"
            raise self.error(name, rows, f"{cells[rows[0]]!r} is not a number{like}")
        return np.fromiter((read[cell] for cell in cells), np.float64, len(cells))

    def _texts(self, name: str) -> Sequence[str]:
        """The cells of a column as ``str``; those of an array of numbers as NumPy prints them."""
        cells = self.column(name)
        return cells.astype(np.str_).tolist() if isinstance(cells, np.ndarray) else cells

    def texts(self, name: str) -> Sequence[str]:
        """A column as text, without missing values."""
        if not self.holds_text(name):
            self.numbers(name)
        cells = self._texts(name)
        missing = np.flatnonzero([cell.strip().lower() in MISSING[:2] for cell in cells])
        if len(missing):
            raise self.missing(name, missing)
        return cells


def _plain_numbers(cells: Sequence[str]) -> np.ndarray | None:
    """Cells that are all plain numbers, at the speed of C; None where one of them wants a closer look."""
    joined = "".join(cells)
    if not joined.isascii() or "_" in joined:  # Python's float() reads digits of other scripts, and 1_000
        return None
    try:
        values = np.fromiter(map(float, cells), np.float64, len(cells))
    except ValueError:
        return None
    return values if np.isfinite(values).all() else None


def _number(cell: str, spelling: Spelling) -> float | None:
    lower = cell.strip().lower()
    if lower in MISSING:
        return np.nan
    return np.inf if lower in INFINITE else spelling.read(cell)


def listed(names: Iterable[str], limit: int = 20) -> str:
    names = list(names)
    more = f", ... ({len(names)} in all)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def read_table(path: str | os.PathLike[str], target: str | None = None, needed: Collection[str] = ()) -> Table:
    """Read a CSV or NPZ file.

    Parameters
    ----------
    path : path
        Its ending decides: ``.npz``, or CSV for ``.csv`` and ``.txt``.
    target : str, optional
        Array of an NPZ file that is kept beside ``X``.
    needed : collection of str
        Names of columns that will be asked for; other arrays of an NPZ file are not read. A first row of numbers alone
        names the columns of a CSV file if it holds all of these, or if it counts from 0 as pandas does; otherwise it is
        taken for a missing header.

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
        return _read_npz(source, target, needed)
    if ending in (".csv", ".txt"):
        return _read_csv(source, needed)
    raise DataError(f"{source}: expected a .csv or .npz file, found {ending or 'no ending'}")


# ------------------------------------------------------------------ CSV
def _read_csv(source: str, needed: Collection[str]) -> Table:
    with open(source, encoding="utf-8-sig", newline="") as file:
        if file.buffer.peek(6).startswith((*ZIP, NPY)):
            raise DataError(f"{source}: no text but an archive (a spreadsheet, or NPZ) or an array; save it as CSV")
        reader = csv.reader(_lines(source, file), strict=True, skipinitialspace=True)
        try:
            names: list[str] = []
            while not any(names):
                row = next(reader, None)
                if row is None:
                    raise DataError(f"{source}: the file is empty")
                names = [name.strip() for name in row]
            _check_header(source, names, needed)
            rows = []
            for row in reader:
                if not row or (len(row) == 1 < len(names) and not row[0].strip()):
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
    # lists of str, not arrays: one long cell would make every cell of an array as long
    columns = {
        name: [cell.strip() for cell in cells] for name, cells in zip(names, zip(*rows, strict=True), strict=True)
    }
    table = Table(source, columns)
    if not names[0]:
        _leave_out_index(table, needed)
    return table


def _lines(source: str, file: TextIOWrapper) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        if "\0" in line:
            raise DataError(f"{source}: line {number}: NUL characters; save the file as UTF-8 text")
        yield line


def _check_header(source: str, names: Sequence[str], needed: Collection[str]) -> None:
    for separator in ";\t":
        if len(names) == 1 and separator in names[0]:
            raise DataError(f"{source}: columns must be separated by commas, the header has {separator!r}")
    seen: set[str] = set()
    for k, name in enumerate(names):
        if not name and k:
            raise DataError(f"{source}: column {k + 1} has no name in the header")
        if name in seen:
            raise DataError(f"{source}: the header names {name!r} twice")
        seen.add(name)
    named = [name for name in names if name]
    counted = all(name == str(k) for k, name in enumerate(named))
    known = counted or (needed and seen.issuperset(needed))
    if not known and all(_number(name, PLAIN) is not None for name in named):
        raise DataError(f"{source}: the first row must name the columns, found numbers: {listed(named, 5)}")


def _leave_out_index(table: Table, needed: Collection[str]) -> None:
    """Drop a first column without a name: the index that R and pandas write.

    Unless it is known what will be asked for, it must number or name the rows.
    """
    cells = table.columns[""]
    values = _plain_numbers(cells)
    whole = values is None or np.array_equal(values, np.round(values))
    tells_apart = whole and all(cells) and len(set(cells)) == len(cells)
    if not (tells_apart or (needed and table.columns.keys() >= set(needed))):
        raise DataError(f"{table.source}: column 1 has no name in the header, and does not number or name the rows")
    del table.columns[""]
    table.notices.append("the first column has no name and numbers or names the rows: left out")


# ------------------------------------------------------------------ NPZ
def _read_npz(source: str, target: str | None, needed: Collection[str]) -> Table:
    arrays = _arrays(source, target, needed)
    columns: dict[str, np.ndarray] = {}
    blocks: dict[str, int] = {}
    for name, array in arrays.items():
        if array.ndim == 0 or array.dtype.kind not in "biufUS" or (array.dtype.kind == "f" and array.itemsize > 8):
            raise DataError(
                f"{source}: array {name!r} must hold numbers or text per row, found {array.dtype} {array.shape}"
            )
        if array.dtype.kind == "S":
            try:
                array = np.char.decode(array, "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{source}: array {name!r} holds bytes that are not UTF-8 ({error.reason})") from None
        block = array.reshape(len(array), int(np.prod(array.shape[1:])))
        if block.shape[1] == 1 and name != "X":
            given = {name: block[:, 0]}
        else:
            blocks[name] = block.shape[1]
            given = {f"{name}[{k}]": block[:, k] for k in range(block.shape[1])}
        if twice := [column for column in given if column in columns]:
            raise DataError(
                f"{source}: two arrays give a column {twice[0]!r}, one by its name and one by its columns; rename one"
            )
        columns |= given
    shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
    if not columns or len({len(column) for column in columns.values()}) != 1:
        raise DataError(f"{source}: every array needs the same number of rows, found {shapes or 'no array'}")
    if not len(next(iter(columns.values()))):
        raise DataError(f"{source}: the arrays have no rows: {shapes}")
    return Table(source, columns, blocks)


def _arrays(source: str, target: str | None, needed: Collection[str]) -> dict[str, np.ndarray]:
    """The arrays of an archive that are used: those that will be asked for, or ``X`` and the target, or all."""
    with open(source, "rb") as file:
        _check_archive(source, file)
        try:
            with np.load(file, allow_pickle=False) as archive:
                names = archive.files
                if len(set(names)) < len(names):
                    raise DataError(f"{source}: the archive holds two arrays of one name: {listed(names)}")
                if target is not None and target not in names:
                    raise DataError(f"{source}: there is no array {target!r}; arrays: {listed(names) or 'none'}")
                if "X" in names:
                    names = [name for name in names if name in ("X", target)]
                arrays_of = {*needed, *(name.rpartition("[")[0] for name in needed)}
                names = [name for name in names if name in arrays_of] or names
                return {name: _array(source, archive, name) for name in names}
        except DataError:
            raise
        except Exception as error:  # a damaged archive raises what zipfile, zlib, lzma, tokenize and ast think of it
            what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise DataError(f"{source}: not a NumPy archive of plain arrays ({what})") from None


def _check_archive(source: str, file: BufferedReader) -> None:
    """Tell other files by how they begin: np.load takes them for arrays, or for pickles that it advises to allow."""
    begin = file.peek(6)[:6]
    if not begin:
        raise DataError(f"{source}: the file is empty")
    if begin == NPY:
        raise DataError(
            f"{source}: one array, as np.save writes it (.npy); an NPZ file holds several by name: "
            "np.savez(path, X=X, y=y)"
        )
    if not begin.startswith(ZIP):
        raise DataError(f"{source}: no NPZ archive, in spite of its name; a CSV file must be called .csv or .txt")


def _array(source: str, archive: np.lib.npyio.NpzFile, name: str) -> np.ndarray:
    try:
        return archive[name]
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
        raise DataError(
            f"{source}: array {name!r} holds Python objects, expected numbers or text; save it with .astype(float) or "
            ".astype(str)"
        ) from None
