"""The README's table: ``python bench/table.py``.

Ratios to the NumPy back end in float32 on one thread: every op in (256, 512) and (4096, 2048), the fused chains forward
and backward, training steps. Printed as markdown; the run is kept in ``bench/history/<date>-<cpu>.json`` with machine,
versions and command.

``--into README.md`` puts the table between the lines ``<!-- bench:begin -->`` and ``<!-- bench:end -->`` of a file.
"""

from __future__ import annotations

import argparse
import datetime
import json
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # behind everything: fastdl is the installed one, or PYTHONPATH's

HISTORY = ROOT / "bench" / "history"
MARKS = ("<!-- bench:begin -->", "<!-- bench:end -->")
#: Columns that `cells` fills.
CELLS = ("ratio", "roofline", "bound", "time")


def cells(found: Mapping[str, Any]) -> list[str]:
    """Ratio, share of the roofline, what bounds it, and the time of a step."""
    roofline = "-" if found.get("roofline") is None else f"{found['roofline']:.0%}"
    return [f"{found['ratio']:.2f}", roofline, str(found.get("bound", "-")), duration(found["seconds"])]


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1 or unit == "us":
            return f"{seconds * factor:.3g} {unit}"
    raise AssertionError


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table, aligned for reading as text: the first column left, the others right."""
    widths = [max(len(str(row[k])) for row in (header, *rows)) for k in range(len(header))]
    lines = []
    for row in (header, *rows):
        padded = [f"{row[0]:<{widths[0]}}", *(f"{c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))]
        lines.append(f"| {' | '.join(padded)} |")
    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    return "\n".join([lines[0], f"| {' | '.join(rule)} |", *lines[1:]])


def render(results: Sequence[Mapping[str, Any]], machine: Mapping[str, Any]) -> str:
    """The table of a run; ``results`` have the keys row, column and ratio."""
    columns = list(dict.fromkeys(r["column"] for r in results))
    rows: dict[str, dict[str, str]] = {}
    for r in results:
        text = "-" if r.get("ratio") is None else f"{r['ratio']:.2f}"
        rows.setdefault(r["row"], {})[r["column"]] = text
    body = [[row, *(values.get(c, "") for c in columns)] for row, values in rows.items()]
    about = (
        f"{machine['cpu']}, level {machine['level']}, one thread, float32; NumPy {machine['numpy']}, "
        f"Numba {machine['numba']}, Python {machine['python']}."
    )
    return f"{about}\n\n{markdown(['ratio to NumPy', *columns], body)}"


def replace_block(text: str, block: str, marks: tuple[str, str] = MARKS) -> str:
    """A file's text with a new block between the marks."""
    first, last = (text.find(mark) for mark in marks)
    if not 0 <= first < last:
        raise SystemExit(f"no lines {marks[0]} and {marks[1]} in the file; put them where the table belongs")
    return f"{text[: first + len(marks[0])]}\n{block}\n{text[last:]}"


def _rows(nets: Sequence[str]) -> list[tuple[Any, str, str]]:
    """(case, row, column) of everything in the table."""
    from bench.cases import BACKENDS, SHAPES, TABLE_SHAPES, ChainCase, NetCase, chain_cases, op_cases

    found: list[tuple[Any, str, str]] = []
    for case in (*op_cases(), *chain_cases()):
        if case.shape not in TABLE_SHAPES or getattr(case, "variant", 0):
            continue
        shape = SHAPES[case.shape]
        row = f"{case.chain.replace('+', ' + ')}, forward and backward" if isinstance(case, ChainCase) else case.op
        found.append((case, row, f"{case.backend} ({shape.rows}, {shape.cols})"))
    first = SHAPES[TABLE_SHAPES[0]]
    for net in nets:
        for entry in ("train_on_batch", "fit"):
            cases = [NetCase(net, entry, backend) for backend in BACKENDS]
            found += [(c, f"training step: {net}, {entry}", f"{c.backend} ({first.rows}, {first.cols})") for c in cases]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench/table.py", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.5, help="seconds of interleaved rounds per number (0.5)")
    parser.add_argument("--only", default="", help="a regular expression over names like relu_forward-L2-cython")
    parser.add_argument("--nets", default="tabular", help="nets whose training step is measured, comma-separated")
    parser.add_argument("--into", type=pathlib.Path, help="file whose block is replaced")
    parser.add_argument("--no-history", action="store_true", help="keep no JSON of the run, as for a run of --only")
    options = parser.parse_args(arguments)

    from bench.cases import identity
    from bench.measure import machine, pinned, run
    from fastdl.errors import BackendUnavailable

    results = []
    with pinned():
        for case, row, column in _rows(options.nets.split(",")):
            if not re.search(options.only, identity(case)):
                continue
            try:
                found = run(case, options.seconds)
            except BackendUnavailable as error:
                found = {"case": identity(case), "ratio": None, "reason": str(error)}
            results.append({"row": row, "column": column, **found})
            print(results[-1]["case"], *(cells(found) if found["ratio"] else ["-"]), file=sys.stderr)
    text = render(results, machine())
    print(text)
    if options.into is not None:
        options.into.write_text(replace_block(options.into.read_text(), text))
    if not (options.no_history or options.only):
        now = datetime.datetime.now(datetime.UTC)
        name = re.sub(r"[^a-z0-9]+", "-", machine()["cpu"].lower()).strip("-")
        HISTORY.mkdir(exist_ok=True)
        path = HISTORY / f"{now:%Y-%m-%d}-{name}.json"
        command = " ".join(["python bench/table.py", *(sys.argv[1:] if arguments is None else arguments)])
        kept = {"date": now.isoformat(timespec="seconds"), "command": command, "machine": machine(), "results": results}
        path.write_text(json.dumps(kept, indent=1) + "\n")
        print(f"kept in {path.relative_to(ROOT)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
