"""``predict``: a saved net, a table, an answer for each row."""

from __future__ import annotations

import argparse
import re
import sys
from typing import Any, TextIO

import numpy as np

import fastdl as fd
from fastdl import data
from fastdl.cli.output import keep_inputs, naming, tell_notices
from fastdl.data.table import listed
from fastdl.errors import DataError

_SPECIAL = re.compile('[,"\r\n]')


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="file that train --save wrote")
    parser.add_argument("data", help='a .csv or .npz file with the columns of the training, or "digits"')
    parser.add_argument("--out", help=".csv or .npz file to write; CSV on the terminal otherwise")


def run(options: argparse.Namespace) -> None:
    if options.out is not None:
        keep_inputs("--out", options.out, options.model, *([] if options.data == "digits" else [options.data]))
    with naming(options.model):
        net = fd.load(options.model, backend=options.backend, threads=options.threads)
    preprocessing = _preprocessing(options.model, net.extra)
    if spoiled := [name for name, values in net.weights.items() if not np.isfinite(values).all()]:
        raise DataError(
            f"{options.model}: weights that are not finite ({listed(spoiled, 3)}): the training of this net diverged; "
            "train it again, with a smaller learning rate"
        )
    if options.out is None:
        _check_terminal(preprocessing)
    table = _table(options.data, preprocessing)
    outputs = _outputs(net, preprocessing, table)
    columns = {"prediction": preprocessing.answers(outputs)}
    tell_notices(table.source, table.notices)
    if preprocessing.classes is not None:
        columns["probability"] = _softmax(outputs).max(axis=1)
    if options.out is None:
        _write(sys.stdout, columns)
        return
    with naming(options.out):
        if options.out.lower().endswith(".npz"):
            with open(options.out, "wb") as file:  # np.savez would add .npz to the name P.NPZ
                np.savez(file, **{name: _plain(values) for name, values in columns.items()})
        else:
            with open(options.out, "w", encoding="utf-8", newline="") as file:
                _write(file, columns)


def _check_terminal(preprocessing: data.Preprocessing) -> None:
    """Can standard output take every answer? Half a file of answers helps nobody."""
    if sys.stdout is None:
        raise ValueError("there is no standard output; name a file with --out")
    encoding, errors = sys.stdout.encoding or "utf-8", sys.stdout.errors or "strict"
    try:
        "".join(map(str, preprocessing.classes or ())).encode(encoding, errors)
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the standard output's encoding, {encoding}, has no {error.object[error.start]!a} of the class names; "
            "name a file with --out, or set PYTHONIOENCODING=utf-8"
        ) from None


def _preprocessing(model: str, extra: Any) -> data.Preprocessing:
    if "preprocessing" not in extra:
        raise DataError(f"{model}: saved without preprocessing; use fastdl.load(...).predict(X) in Python")
    try:
        return data.Preprocessing.from_json(extra["preprocessing"])
    except DataError as error:
        raise DataError(f"{model}: {error}; use fastdl.load(...).predict(X) in Python") from None


def _table(source: str, preprocessing: data.Preprocessing) -> data.Table:
    if source == "digits":
        X, y = data.load_digits()
        grey = {f"X[{k}]": column * 16 for k, column in enumerate(X.T)}
        return data.Table(source, {**grey, "digit": y}, {"X": len(grey)})
    return data.read_table(source, needed=[column.name for column in preprocessing.columns])


def _outputs(net: fd.Sequential, preprocessing: data.Preprocessing, table: data.Table) -> np.ndarray:
    """What the net says of each row, float64; numbers that it cannot digest are named."""
    dtype = next((weight.dtype for weight in net.weights.values()), np.dtype(np.float32))
    X = preprocessing.features(table, dtype)
    with np.errstate(all="ignore"):
        outputs = net.predict(X).astype(np.float64)
    broken = np.flatnonzero(~np.isfinite(outputs).all(axis=1))
    if len(broken):
        at = int(np.abs(X[broken[0]]).argmax())
        ends = np.cumsum([column.width for column in preprocessing.columns])
        farthest = preprocessing.columns[int(np.searchsorted(ends, at, side="right"))].name
        value = table.column(farthest)[broken[0]]
        raise table.error(farthest, broken, f"{value} is too far from the training: the net's answer is not finite")
    return outputs


def _softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def _plain(values: np.ndarray) -> np.ndarray:
    """Text as an array that needs no pickle."""
    return values.astype(np.str_) if values.dtype == object else values


def _write(file: TextIO, columns: dict[str, np.ndarray]) -> None:
    """CSV; numbers with as many digits as bring them back."""
    shown = [values if values.dtype == object else values.astype(np.str_) for values in columns.values()]
    file.write(",".join(columns) + "\n")
    file.writelines(
        ",".join(map(_quoted, row)) + "\n" for row in zip(*(values.tolist() for values in shown), strict=True)
    )


def _quoted(text: str) -> str:
    """As csv.writer does it; but some versions of that leave a carriage return bare."""
    return '"' + text.replace('"', '""') + '"' if _SPECIAL.search(text) else text
