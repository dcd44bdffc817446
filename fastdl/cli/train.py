"""``train``: read a table, hold rows out, train, test, save."""

from __future__ import annotations

import argparse
import itertools
import math
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import fastdl as fd
from fastdl import data, layers, optimizers
from fastdl.cli.output import keep_inputs, naming, show, tell, tell_notices
from fastdl.data.preprocessing import TASKS, Column
from fastdl.data.table import listed
from fastdl.errors import DataError
from fastdl.run import checkpoint

#: The held-out rows are the same for every seed of the training.
SPLIT_SEED = 0
#: The baseline runs for so many epochs (the first is not counted), or for so many seconds.
BASELINE_EPOCHS, BASELINE_SECONDS = 6, 2.0
#: More than any memory holds: the arithmetic of sizes stays in range.
WIDEST = 2**40
#: Bytes of names in a model file: the header of a safetensors file has 100 MB, the layers need a part of them.
LARGEST_DESCRIPTION = 99_000_000
#: Epochs are counted in 32 bits.
MOST_EPOCHS = 2**32 - 1
DIGITS = data.Preprocessing(
    "digit",
    "classification",
    tuple(range(10)),
    columns=tuple(Column(f"X[{k}]", 0.0, 16.0) for k in range(64)),
    label_dtype="<i8",
    blocks={"X": 64},
)


def _widths(text: str) -> list[int]:
    try:
        widths = [int(part) for part in text.split(",")] if text else []
    except ValueError:
        widths = [0]
    if not all(1 <= width <= WIDEST for width in widths):
        raise argparse.ArgumentTypeError(
            f"expected integers from 1 to {WIDEST} with commas, e.g. 128,64, found {text[:80]!r}"
        )
    return widths


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, found {text!r}")
    return value


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("data", help='"digits", or a .csv or .npz file')
    add("--target", help="column to predict (of a .npz file: y, unless named)")
    add("--task", choices=TASKS, default="auto", help="what the target is")
    add("--categorical", type=_names, default=[], help="columns to encode one-hot even if they look like numbers")
    add("--drop", type=_names, default=[], help="columns to leave out, with commas")
    add("--test-fraction", type=_fraction, default=0.2, help="share of the rows to hold out")
    add("--layers", type=_widths, default=[128, 64], help="widths of the hidden layers, with commas")
    add("--activation", default="relu", help="activation of the hidden layers")
    add("--dropout", type=float, default=0.2, help="probability to drop a hidden value")
    add("--optimizer", default="adam", help="sgd, adam or adamw")
    add("--lr", type=float, default=3e-3, help="learning rate; if the training diverges, try a smaller one")
    add("--epochs", type=int, default=30)
    add("--batch-size", type=int, default=64)
    add("--seed", type=int, default=0, help="of weights, dropout and order; not of the held-out rows")
    add("--dtype", choices=("float32", "float64", "mixed_bfloat16"), default="float32")
    add("--save", metavar="MODEL", help="write the trained net to this file")
    add("--no-baseline", action="store_true", help="do not time the same net on the numpy back end")
    add("--quiet", action="store_true", help="result lines only")


@dataclass(frozen=True)
class Problem:
    """Training rows and then held-out rows, in one array: two of their own would be a copy of the data."""

    preprocessing: data.Preprocessing
    X: np.ndarray
    y: np.ndarray
    #: how many rows of the training come first
    split: int
    notices: Sequence[str] = ()

    @property
    def train(self) -> tuple[np.ndarray, np.ndarray]:
        return self.X[: self.split], self.y[: self.split]

    @property
    def held(self) -> tuple[np.ndarray, np.ndarray]:
        return self.X[self.split :], self.y[self.split :]

    def __str__(self) -> str:
        kind = f"{self.preprocessing.outputs} classes" if self.preprocessing.classes else "regression"
        rows, features = self.X.shape
        return f"{rows:,} rows, {features:,} features, {kind}; {rows - self.split:,} rows held out"


def _digits(options: argparse.Namespace) -> Problem:
    if options.target or options.categorical or options.drop or options.task != "auto":
        raise ValueError("--target, --task, --categorical and --drop are for files, not for the digits")
    X, y = data.load_digits()
    _check_memory(options, DIGITS, len(X), X.nbytes)
    train, held = data.stratified_split(y, options.test_fraction, SPLIT_SEED)
    order = np.concatenate([train, held])
    return Problem(DIGITS, X[order], y[order], len(train))


def _file(options: argparse.Namespace) -> Problem:
    target = options.target
    if target is None and options.data.lower().endswith(".npz"):
        target = "y"
    table = data.read_table(options.data, target)
    if target is None:
        raise DataError(f"{options.data}: name the column to predict with --target; columns: {listed(table.columns)}")
    described = data.Preprocessing.describe(table, target, options.task, options.categorical, options.drop)
    if described.classes is None:
        train, held = data.random_split(len(table), options.test_fraction, SPLIT_SEED)
    else:
        train, held = data.stratified_split(described.targets(table), options.test_fraction, SPLIT_SEED)
    if not len(held):
        raise DataError(f"{options.data}: too few rows of each class to hold any out")
    fitted = described.fit(table, train)
    _check_memory(options, fitted, len(table), table.nbytes)
    dtype, order = _arrays(options.dtype), np.concatenate([train, held])
    X, y = fitted.features(table, dtype, order), fitted.targets(table, dtype)[order]
    return Problem(fitted, X, y, len(train), table.notices)


def _check_memory(options: argparse.Namespace, preprocessing: data.Preprocessing, rows: int, table: int) -> None:
    """Refuse what cannot fit: systems that promise more memory than they have kill the process later.

    The table, of so many bytes, is there until the features are made of it, the net comes afterwards.
    """
    if not hasattr(os, "sysconf"):
        return
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    widths = [preprocessing.width, *options.layers, preprocessing.outputs]
    weights = sum(before * after for before, after in itertools.pairwise(widths))
    itemsize = np.dtype(_arrays(options.dtype)).itemsize
    needed = rows * preprocessing.width * itemsize + max(table, 4 * weights * itemsize)
    if needed > memory:
        raise ValueError(
            f"{rows:,} rows of {widths[0]:,} features, beside the table that they come from and then beside "
            f"{weights:.3g} weights with gradients and moments, need {needed / 1e9:.3g} GB; this machine has "
            f"{memory / 1e9:.3g} GB"
        )


def _arrays(dtype: str) -> str:
    """Type of the data for a type of the model."""
    return "float64" if dtype == "float64" else "float32"


def _net(options: argparse.Namespace, problem: Problem, backend: str, threads: int | str) -> fd.Sequential:
    stack: list[layers.Layer] = []
    for width in options.layers:
        stack += [layers.Dense(width, use_bias=False), layers.BatchNorm(), layers.Activation(options.activation)]
        if options.dropout:
            stack.append(layers.Dropout(options.dropout))
    net = fd.Sequential([*stack, layers.Dense(problem.preprocessing.outputs)], seed=options.seed)
    net.compile(
        loss="mse" if problem.preprocessing.classes is None else "softmax_cross_entropy",
        optimizer=optimizers.from_config({"name": options.optimizer, "lr": options.lr}),
        backend=backend,
        threads=threads,
        dtype=options.dtype if backend != "numpy" else _arrays(options.dtype),
    )
    return net.build(problem.X.shape[1])


class Watch(fd.callbacks.Callback):
    """Seconds of every epoch; stops the training when they add up to a limit, or when it has diverged."""

    def __init__(self, limit: float = float("inf")) -> None:
        self.limit, self.seconds = limit, []
        self.diverged: str | None = None

    def on_epoch_begin(self, epoch: int) -> None:
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)
        if not math.isfinite(logs["loss"]):
            self.diverged = f"the loss of epoch {epoch + 1} is {logs['loss']}"
        if sum(self.seconds) > self.limit or self.diverged:
            self.model.stop_training = True

    def on_train_end(self) -> None:
        weights = self.model.weights.values()
        if not self.diverged and not all(np.isfinite(values).all() for values in weights):
            self.diverged = f"the weights after epoch {len(self.seconds)} are not finite"

    def median(self) -> float:
        """Of all epochs but the first, which warms up (unless there was no other)."""
        return statistics.median(self.seconds[1:] or self.seconds)


def _copies() -> int:
    """Processes that an MPI launcher has started of this command; 1 where none has."""
    counts = (os.environ.get(name, "") for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"))
    return max(int(text) if text.isascii() and text.isdecimal() and len(text) < 9 else 1 for text in counts)


def run(options: argparse.Namespace) -> None:
    if (copies := _copies()) > 1:
        tell(
            f"note: a launcher has started {copies} copies of this command; training is not shared among processes, "
            "so each of them trains the same net and prints the same result"
        )
    if options.save is not None:
        keep_inputs("--save", options.save, *([] if options.data == "digits" else [options.data]))
        checkpoint.check_writable(options.save)  # now, not after the training
    if options.epochs > MOST_EPOCHS:
        raise ValueError(f"--epochs: at most {MOST_EPOCHS}, found {options.epochs}")
    problem = _digits(options) if options.data == "digits" else _file(options)
    if options.layers and min(options.batch_size, problem.split) == 1:
        raise ValueError(
            "batches of one row: the batch norm behind every hidden layer has no spread to learn from; use a "
            "--batch-size of 2 or more (and as many rows), or no hidden layers (--layers '')"
        )
    if options.save is not None:
        _check_description(problem.preprocessing)
    net = _net(options, problem, options.backend, options.threads)
    tell_notices(options.data, problem.notices)
    try:
        if not options.quiet:
            show(f"data {options.data}: {problem}")
            print(f"net {_described(options, problem)}")
            print(net.explain(), flush=True)
    except BrokenPipeError:
        if options.save is None:  # nobody will see a result
            raise
    with np.errstate(all="ignore"):  # a training that goes astray is told in words
        _train_and_test(options, problem, net)
    if options.save is not None and not options.quiet:
        show(f"saved {options.save}")


def _train_and_test(options: argparse.Namespace, problem: Problem, net: fd.Sequential) -> None:
    watch = Watch()
    start = time.perf_counter()
    net.fit(*problem.train, options.batch_size, options.epochs, callbacks=[watch], verbose=0 if options.quiet else 1)
    seconds = time.perf_counter() - start
    if watch.diverged:
        raise ValueError(
            f"the training diverged ({watch.diverged}); try a --lr smaller than {options.lr:g}"
            + (f"; {options.save} is not written" if options.save is not None else "")
        )
    try:
        print(_score(net, problem))
        print(f"seconds {seconds:.2f}")
        if net.backend != "numpy" and not options.no_baseline:
            baseline = Watch(BASELINE_SECONDS)
            slow = _net(options, problem, "numpy", net.threads)
            slow.fit(*problem.train, options.batch_size, BASELINE_EPOCHS, callbacks=[baseline], verbose=0)
            print(f"ratio to the numpy back end {baseline.median() / watch.median():.1f}")
        print(f"weights sha256 {checkpoint.digest(dict(net.weights))}")
    finally:  # the net is trained, even if nobody reads on or waits for the baseline
        if options.save is not None:
            with naming(options.save):
                net.save(options.save, extra={"preprocessing": problem.preprocessing.to_json()})


def _check_description(preprocessing: data.Preprocessing) -> None:
    """Refuse before the training what a model file cannot hold after it: the names of categories and classes."""
    size = len(checkpoint.as_json(checkpoint.as_json(preprocessing.to_json())).encode())  # JSON as text in JSON
    if size > LARGEST_DESCRIPTION:
        texts = {column.name: sum(map(len, column.levels or ())) for column in preprocessing.columns}
        texts[preprocessing.target] = len("".join(map(str, preprocessing.classes or ())))
        raise ValueError(
            f"--save: a model file can hold {LARGEST_DESCRIPTION / 1e6:.0f} MB of names of columns, categories and "
            f"classes; here they take {size / 1e6:.0f} MB ({len(texts):,} columns, most text in "
            f"{max(texts, key=texts.get)!r}): leave columns out with --drop, or shorten their text"
        )


def _described(options: argparse.Namespace, problem: Problem) -> str:
    widths = "-".join(str(width) for width in (problem.X.shape[1], *options.layers, problem.preprocessing.outputs))
    block = f"batch norm, {options.activation}, dropout {options.dropout:g} after each hidden layer; "
    return (
        f"{widths}; {block if options.layers else ''}{options.optimizer}, learning rate {options.lr:g}, "
        f"batches of {options.batch_size}, {options.epochs} epochs, seed {options.seed}, {options.dtype}"
    )


def _score(net: fd.Sequential, problem: Problem) -> str:
    X, y = problem.held
    if problem.preprocessing.classes is not None:
        return f"test accuracy {net.evaluate(X, y)['accuracy']:.4f}"
    truth = y.astype(np.float64)
    unexplained = np.square(truth - net.predict(X)).sum()
    total = np.square(truth - truth.mean()).sum()
    return f"test r2 {1 - unexplained / total if total else float('nan'):.4f}"
