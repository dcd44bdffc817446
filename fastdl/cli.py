"""The command line: ``train`` a net on the digits or on a table, ``predict`` with a saved one, ``info``.

Mistakes of the caller end in one line on stderr and exit status 1 (2 for the command line itself, 130 for Ctrl-C).
"""

from __future__ import annotations

import argparse
import csv
import errno
import importlib.metadata
import os
import pathlib
import platform
import re
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import fastdl as fd
from fastdl import data, layers, optimizers
from fastdl.data.preprocessing import TASKS, Column
from fastdl.data.table import listed
from fastdl.errors import DataError, FastdlError
from fastdl.kernels import dispatch
from fastdl.run import checkpoint

#: The held-out rows are the same for every seed of the training.
SPLIT_SEED = 0
#: The baseline runs for so many epochs (the first is not counted), or for so many seconds.
BASELINE_EPOCHS, BASELINE_SECONDS = 6, 2.0
#: Where README.md keeps the table of ops.
OPS_BEGIN, OPS_END = "<!-- ops:begin -->", "<!-- ops:end -->"
DIGITS = data.Preprocessing(
    "digit", "classification", tuple(range(10)), columns=tuple(Column(f"X[{k}]", 0.0, 16.0) for k in range(64))
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:  # the reader of the output has seen enough; the interpreter must not flush into it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except (FastdlError, ValueError) as error:
        return _fail(str(error))
    return 0


def _fail(message: str, status: int = 1) -> int:
    print("fastdl:", " ".join(message.split()), file=sys.stderr)
    return status


# ------------------------------------------------------------------ options
def _widths(text: str) -> list[int]:
    try:
        widths = [int(part) for part in text.split(",")] if text else []
    except ValueError:
        widths = [0]
    if any(width < 1 for width in widths):
        raise argparse.ArgumentTypeError(f"expected positive integers with commas, e.g. 128,64, found {text!r}")
    return widths


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _threads(text: str) -> int | str:
    if text != "auto" and not (text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"expected auto or a positive integer, found {text!r}")
    return text if text == "auto" else int(text)


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, found {text!r}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fastdl", description=fd.__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="{train,predict,info}")
    show = argparse.ArgumentDefaultsHelpFormatter

    train = commands.add_parser("train", help="train a net and test it on held-out rows", formatter_class=show)
    train.set_defaults(run=_train)
    train.add_argument("data", help='"digits", or a .csv or .npz file')
    train.add_argument("--target", help="column to predict (of a .npz file: y, unless named)")
    train.add_argument("--task", choices=TASKS, default="auto", help="what the target is")
    train.add_argument("--categorical", type=_names, default=[], help="numeric columns to encode one-hot, with commas")
    train.add_argument("--drop", type=_names, default=[], help="columns to leave out, with commas")
    train.add_argument("--test-fraction", type=_fraction, default=0.2, help="share of the rows to hold out")
    train.add_argument("--layers", type=_widths, default=[128, 64], help="widths of the hidden layers, with commas")
    train.add_argument("--activation", default="relu", help="activation of the hidden layers")
    train.add_argument("--dropout", type=float, default=0.2, help="probability to drop a hidden value")
    train.add_argument("--optimizer", default="adam", help="sgd, adam or adamw")
    train.add_argument("--lr", type=float, default=3e-3, help="learning rate")
    train.add_argument("--epochs", type=int, default=30)
    train.add_argument("--batch-size", type=int, default=64)
    train.add_argument("--seed", type=int, default=0, help="of weights, dropout and order; not of the held-out rows")
    train.add_argument("--dtype", choices=("float32", "float64", "mixed_bfloat16"), default="float32")
    train.add_argument("--save", metavar="MODEL", help="write the trained net to this file")
    train.add_argument("--no-baseline", action="store_true", help="do not time the same net on the numpy back end")
    train.add_argument("--quiet", action="store_true", help="result lines only")

    predict = commands.add_parser("predict", help="apply a net that train --save wrote", formatter_class=show)
    predict.set_defaults(run=_predict)
    predict.add_argument("model", help="file that train --save wrote")
    predict.add_argument("data", help="a .csv or .npz file with the columns of the training")
    predict.add_argument("--out", help=".csv or .npz file to write; CSV on the terminal otherwise")

    for command in (train, predict):
        command.add_argument("--backend", default="auto", help="auto, cython, numba or numpy")
        command.add_argument("--threads", type=_threads, default="auto", help="auto, or a number")

    cubins = commands.add_parser(
        "cubins", help="compile the CUDA kernels, without a GPU; they join the next wheel", formatter_class=show
    )
    cubins.set_defaults(run=_cubins)
    cubins.add_argument("--into", default=None, metavar="DIR", help="instead of the installation's own folder")
    cubins.add_argument("--arch", default="80,90,100,120", help="compute capabilities")
    cubins.add_argument("--only", default="", help="a regular expression over the names of kernels")

    info = commands.add_parser("info", help="version, SIMD level, threads and back ends, and why")
    info.set_defaults(run=_info)
    info.add_argument("--ops", action="store_true", help="the table of ops by back end, in Markdown")
    info.add_argument("--into", metavar="FILE", help="with --ops: write the table into this file, between its markers")
    return parser


# ------------------------------------------------------------------ train
@dataclass(frozen=True)
class Problem:
    """Training and held-out rows, and how to read a row of either."""

    preprocessing: data.Preprocessing
    X: np.ndarray
    y: np.ndarray
    train: np.ndarray
    held: np.ndarray

    @property
    def outputs(self) -> int:
        return len(self.preprocessing.classes or (None,))

    def __str__(self) -> str:
        kind = f"{self.outputs} classes" if self.preprocessing.classes else "regression"
        rows, features = self.X.shape
        return f"{rows:,} rows, {features:,} features, {kind}; {len(self.held):,} rows held out"


def _digits(options: argparse.Namespace) -> Problem:
    if options.target or options.categorical or options.drop or options.task != "auto":
        raise ValueError("--target, --task, --categorical and --drop are for files, not for the digits")
    X, y = data.load_digits()
    return Problem(DIGITS, X, y, *data.stratified_split(y, options.test_fraction, SPLIT_SEED))


def _file(options: argparse.Namespace) -> Problem:
    target = options.target
    if target is None and options.data.lower().endswith(".npz"):
        target = "y"
    table = data.read_table(options.data, target)
    if target is None:
        raise DataError(f"{options.data}: name the column to predict with --target; columns: {listed(table.columns)}")
    found = data.Preprocessing.describe(table, target, options.task, options.categorical, options.drop)
    if found.classes is None:
        train, held = data.random_split(len(table), options.test_fraction, SPLIT_SEED)
    else:
        train, held = data.stratified_split(found.targets(table), options.test_fraction, SPLIT_SEED)
    if not len(held):
        raise DataError(f"{options.data}: too few rows of each class to hold any out")
    fitted = found.fit(table, train)
    dtype = _arrays(options.dtype)
    return Problem(fitted, fitted.features(table, dtype), fitted.targets(table, dtype), train, held)


def _arrays(dtype: str) -> str:
    """Type of the data for a type of the model."""
    return "float64" if dtype == "float64" else "float32"


def _net(options: argparse.Namespace, problem: Problem, backend: str, threads: int | str) -> fd.Sequential:
    stack: list[layers.Layer] = []
    for width in options.layers:
        stack += [layers.Dense(width, use_bias=False), layers.BatchNorm(), layers.Activation(options.activation)]
        if options.dropout:
            stack.append(layers.Dropout(options.dropout))
    net = fd.Sequential([*stack, layers.Dense(problem.outputs)], seed=options.seed)
    net.compile(
        loss="mse" if problem.preprocessing.classes is None else "softmax_cross_entropy",
        optimizer=optimizers.from_config({"name": options.optimizer, "lr": options.lr}),
        backend=backend,
        threads=threads,
        dtype=options.dtype if backend != "numpy" else _arrays(options.dtype),
    )
    return net.build(problem.X.shape[1])


class Stopwatch(fd.callbacks.Callback):
    """Seconds of every epoch; stops the training when they add up to a limit."""

    def __init__(self, limit: float = float("inf")) -> None:
        self.limit, self.seconds = limit, []

    def on_epoch_begin(self, epoch: int) -> None:
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)
        if sum(self.seconds) > self.limit:
            self.model.stop_training = True

    def median(self) -> float:
        """Of all epochs but the first, which warms up (unless there was no other)."""
        return statistics.median(self.seconds[1:] or self.seconds)


def _train(options: argparse.Namespace) -> None:
    if options.save and not pathlib.Path(options.save).absolute().parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "the folder does not exist", options.save)  # now, not after the training
    problem = _digits(options) if options.data == "digits" else _file(options)
    net = _net(options, problem, options.backend, options.threads)
    train = {"X": problem.X[problem.train], "y": problem.y[problem.train], "batch_size": options.batch_size}
    if not options.quiet:
        print(f"data {options.data}: {problem}")
        print(f"net {_described(options, problem)}")
        print(net.explain(), flush=True)
    watch = Stopwatch()
    start = time.perf_counter()
    net.fit(**train, epochs=options.epochs, callbacks=[watch], verbose=0 if options.quiet else 1)
    seconds = time.perf_counter() - start
    print(_score(net, problem))
    print(f"seconds {seconds:.2f}")
    if net.backend != "numpy" and not options.no_baseline:
        baseline = Stopwatch(BASELINE_SECONDS)
        slow = _net(options, problem, "numpy", net.threads)
        slow.fit(**train, epochs=BASELINE_EPOCHS, callbacks=[baseline], verbose=0)
        print(f"ratio to the numpy back end {baseline.median() / watch.median():.1f}")
    print(f"weights sha256 {checkpoint.digest(dict(net.weights))}")
    if options.save:
        net.save(options.save, extra={"preprocessing": problem.preprocessing.to_json()})
        if not options.quiet:
            print(f"saved {options.save}")


def _described(options: argparse.Namespace, problem: Problem) -> str:
    widths = "-".join(str(width) for width in (problem.X.shape[1], *options.layers, problem.outputs))
    block = f"batch norm, {options.activation}, dropout {options.dropout:g} after each hidden layer; "
    return (
        f"{widths}; {block if options.layers else ''}{options.optimizer}, learning rate {options.lr:g}, "
        f"batches of {options.batch_size}, {options.epochs} epochs, seed {options.seed}, {options.dtype}"
    )


def _score(net: fd.Sequential, problem: Problem) -> str:
    X, y = problem.X[problem.held], problem.y[problem.held]
    if problem.preprocessing.classes is not None:
        return f"test accuracy {net.evaluate(X, y)['accuracy']:.4f}"
    truth = y.astype(np.float64)
    unexplained = np.square(truth - net.predict(X)).sum()
    total = np.square(truth - truth.mean()).sum()
    return f"test r2 {1 - unexplained / total if total else float('nan'):.4f}"


# ------------------------------------------------------------------ predict
def _predict(options: argparse.Namespace) -> None:
    net = fd.load(options.model, backend=options.backend, threads=options.threads)
    if "preprocessing" not in net.extra:
        raise DataError(f"{options.model}: saved without preprocessing; use fastdl.load(...).predict(X) in Python")
    preprocessing = data.Preprocessing.from_json(net.extra["preprocessing"])
    table = data.read_table(options.data)
    outputs = net.predict(preprocessing.features(table, np.float64)).astype(np.float64)
    columns = {"prediction": preprocessing.answers(outputs)}
    if preprocessing.classes is not None:
        columns["probability"] = _softmax(outputs).max(axis=1)
    if options.out and options.out.lower().endswith(".npz"):
        np.savez(options.out, **columns)
    elif options.out:
        with open(options.out, "w", encoding="utf-8", newline="") as file:
            _write(file, columns)
    else:
        _write(sys.stdout, columns)


def _softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def _write(file: Any, columns: dict[str, np.ndarray]) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    shown = [[f"{v:.6g}" if isinstance(v, float) else v for v in values.tolist()] for values in columns.values()]
    writer.writerows(zip(*shown, strict=True))


# ------------------------------------------------------------------ info
def _info(options: argparse.Namespace) -> None:
    if options.ops:
        _show_ops(options.into)
        return
    versions = f"Python {platform.python_version()}, NumPy {np.__version__}, Numba {_version('numba')}"
    print(f"fastdl {fd.__version__}, {versions}, {platform.platform()}")
    available = fd.backends()
    if available["cython"] == "available":
        from fastdl.kernels.common import simd

        print(f"SIMD level {simd.level()} (this CPU runs {', '.join(simd.levels())}; FASTDL_SIMD forces one)")
        print(f"mixed_bfloat16 {_bfloat16()}")
    else:
        print("SIMD level none: no compiled kernels")
    from fastdl import config

    asked = config.resolve_threads()
    count, why = (asked, "FASTDL_NUM_THREADS") if asked else config.available_threads()
    print(f"threads at most {count} ({why}); a small step uses fewer")
    print(f"back end by default {config.resolve_backend()}")
    for name, state in available.items():
        print(f"  {name}: {state}")


def _cubins(options: argparse.Namespace) -> None:
    dispatch.load_cuda()
    from fastdl.cuda import ahead
    from fastdl.kernels.common import cubins

    if not re.fullmatch(r"\d{2,3}(,\d{2,3})*", options.arch):
        raise ValueError(f"--arch: expected compute capabilities like 80,90, found {options.arch!r}")
    chosen = [kernel for kernel in ahead.kernels() if re.search(options.only, kernel.name)]
    architectures = [(int(text[:-1]), int(text[-1])) for text in options.arch.split(",")]
    folder = pathlib.Path(options.into or cubins.PACKED)
    start = time.perf_counter()
    count = cubins.build(chosen, architectures, folder)
    print(f"{count} cubins of {len(chosen)} kernels in {folder} ({time.perf_counter() - start:.0f} s)")


def _bfloat16() -> str:
    if why := dispatch.refuses("cython", dispatch.MIXED):
        return f"none: {why}"
    from fastdl.kernels.dense import _cython as dense

    units = ", ".join(dense.bfloat16_units())
    return f"by {dense.bfloat16_unit()} (this CPU has {units}; FASTDL_BFLOAT16 forces one)"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _show_ops(path: str | None) -> None:
    if path is None:
        print(ops_table())
        return
    text = pathlib.Path(path).read_text(encoding="utf-8")
    before, begin, rest = text.partition(OPS_BEGIN)
    _, end, after = rest.partition(OPS_END)
    if not end:
        raise ValueError(f"{path}: expected the markers {OPS_BEGIN!r} and {OPS_END!r}")
    pathlib.Path(path).write_text(f"{before}{begin}\n{ops_table()}\n{end}{after}", encoding="utf-8")


def ops_table() -> str:
    """Every op with the back ends that have a kernel for it, as a Markdown table."""
    from fastdl.kernels import registry

    names = list(fd.backends())
    rows: dict[str, tuple[list[str], str, list[str]]] = {}
    for spec in registry.specs():
        stem, _, direction = re.sub(r"_(?=forward|backward)", " ", spec.name, count=1).partition(" ")
        marks = ["yes" if registry.find(spec.name, name) else "-" for name in names]
        directions, _, known = rows.setdefault(stem, ([], spec.summary, marks))
        directions.append(direction.replace("_", " "))
        rows[stem] = (directions, rows[stem][1], [a if a == b else "partly" for a, b in zip(known, marks, strict=True)])
    lines = [f"| op | {' | '.join(names)} | |", "|" + " --- |" * (len(names) + 2)]
    for stem, (directions, summary, marks) in rows.items():
        ways = ", ".join(direction for direction in directions if direction)
        text = summary.replace("|", r"\|")
        lines.append(f"| `{stem}`{f' ({ways})' if ways else ''} | {' | '.join(marks)} | {text} |")
    return "\n".join(lines)
