"""``info`` says what runs here and why; ``cubins`` compiles the CUDA kernels ahead."""

from __future__ import annotations

import argparse
import importlib.metadata
import pathlib
import platform
import re
import time

import numpy as np

import fastdl as fd
from fastdl.kernels import dispatch

#: Where README.md keeps the table of ops.
OPS_BEGIN, OPS_END = "<!-- ops:begin -->", "<!-- ops:end -->"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ops", action="store_true", help="the table of ops by back end, in Markdown")
    parser.add_argument("--into", metavar="FILE", help="with --ops: write the table between the markers of this file")


def add_cubins_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--into", default=None, metavar="DIR", help="instead of the installation's own folder")
    parser.add_argument("--arch", default="80,90,100,120", help="compute capabilities")
    parser.add_argument("--only", default="", help="a regular expression over the names of kernels")


def run(options: argparse.Namespace) -> None:
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


def run_cubins(options: argparse.Namespace) -> None:
    dispatch.load_cuda()
    from fastdl.cuda import ahead
    from fastdl.kernels.common import cubins

    if not re.fullmatch(r"\d{2,3}(,\d{2,3})*", options.arch):
        raise ValueError(f"--arch: expected compute capabilities like 80,90, found {options.arch!r}")
    try:
        only = re.compile(options.only)
    except re.error as error:
        raise ValueError(f"--only: no regular expression: {options.only!r} ({error})") from None
    chosen = [kernel for kernel in ahead.kernels() if only.search(kernel.name)]
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
