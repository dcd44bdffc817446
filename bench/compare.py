"""Two git refs against each other: ``python bench/compare.py REF_A REF_B``.

Each ref is checked out into a throw-away worktree and built there in place; this tree's cases are then measured in
processes that alternate between the two. The compared number is the ratio to NumPy, which a busy or throttled machine
moves little; the change of a case is the median over rounds of ratio A / ratio B. A case that looks slower than the
threshold allows is measured again, up to three times, and counts only if it is slower each time.

Exit status: 0 no case has slowed, 1 some case has, 2 the comparison could not be made.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # behind PYTHONPATH: fastdl comes from the worktree, the cases from here

#: Measurements of a suspicious case before it counts as slower.
ATTEMPTS = 3
Round = Mapping[str, Mapping[str, float]]  # case -> {"ratio", "seconds"}


class Failed(Exception):
    """The comparison could not be made."""


# ---------------------------------------------------------------------------------------------- arithmetic
def changes(a: Sequence[Round], b: Sequence[Round], absolute: bool = False) -> dict[str, float]:
    """How much slower each case is in B: 0.1 is 10 % more time for the same work. Round k of A goes with round k of B.

    Parameters
    ----------
    a, b : sequences of rounds
    absolute : bool
        Compare seconds and not ratios: for refs whose NumPy references differ.
    """
    found = {}
    for case in a[0]:
        if all(case in r for r in (*a, *b)):
            pairs = [(x[case], y[case]) for x, y in zip(a, b, strict=True)]
            quotients = [y["seconds"] / x["seconds"] if absolute else x["ratio"] / y["ratio"] for x, y in pairs]
            found[case] = statistics.median(quotients) - 1
    return found


def slower(change: Mapping[str, float], threshold: float) -> list[str]:
    """Cases that have slowed by more than the threshold."""
    return [case for case, value in change.items() if value > threshold]


# ---------------------------------------------------------------------------------------------- worktrees
def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


@contextlib.contextmanager
def _worktree(commit: str, folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A checkout of a commit."""
    _git("worktree", "add", "--detach", str(folder), commit)
    try:
        yield folder
    finally:
        _git("worktree", "remove", "--force", str(folder))


def stale(changed: Sequence[str]) -> list[str] | None:
    """Families whose extension differs between two commits, from the changed files; None for all of them."""
    native = [path for path in changed if path == "setup.py" or not path.endswith((".py", ".md"))]
    if any(path == "setup.py" or path.endswith((".h", ".hpp", ".pxi")) for path in native):
        return None
    return sorted({path.split("/")[1] for path in native})


def _build(commit: str, tree: pathlib.Path, other: tuple[str, pathlib.Path] | None) -> None:
    """Build a checkout in place; extensions that are the same in another one are copied from there."""
    families = None
    if other is not None:
        families = stale(_git("diff", "--name-only", other[0], commit, "--", "setup.py", "kernels").splitlines())
    environment = dict(os.environ)
    if families is not None:
        for built in other[1].glob("kernels/*/_cython*.so"):
            if built.parent.name not in families:
                shutil.copy2(built, tree / "kernels" / built.parent.name)
        environment["FASTDL_FAMILIES"] = ",".join(families)
    print(f"building {commit[:12]}: {'everything' if families is None else families or 'nothing new'}", file=sys.stderr)
    if families != []:
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
            raise Failed(f"building {commit[:12]} failed (it needs Cython, setuptools and a compiler):\n{lines}")
    # fastdl.kernels of an editable installation would come before ../kernels of this checkout
    (tree / "fastdl" / "kernels").symlink_to(tree / "kernels")


# ---------------------------------------------------------------------------------------------- measuring
def _measure(tree: pathlib.Path, options: argparse.Namespace, cases: Sequence[str]) -> dict[str, dict[str, float]]:
    """One round of a checkout, in a process of its own."""
    command = [sys.executable, str(ROOT / "bench" / "compare.py"), "--worker", str(tree)]
    command += ["--seconds", str(options.seconds), "--only", options.only, "--cases", ",".join(cases)]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tree)
    if done.returncode:
        raise Failed(f"measuring in {tree.name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _worker(options: argparse.Namespace) -> int:
    """Measure cases with the fastdl of PYTHONPATH; print JSON."""
    import fastdl.kernels
    from bench.cases import identity
    from bench.measure import paired, pinned
    from bench.prepare import prepare
    from fastdl.errors import BackendUnavailable

    origin = pathlib.Path(fastdl.kernels.__file__).resolve()
    if pathlib.Path(options.worker).resolve() not in origin.parents:
        raise Failed(f"measured the wrong tree: kernels come from {origin}")
    wanted, found = set(filter(None, options.cases.split(","))), {}
    with pinned():
        for case in _cases():
            name = identity(case)
            if not re.search(options.only, name) or (wanted and name not in wanted):
                continue
            try:
                prepared = prepare(case)
            except BackendUnavailable:
                continue
            pair = paired(prepared.ours, prepared.baseline, options.seconds)
            found[name] = {"ratio": pair.ratio, "seconds": pair.seconds}
    print(json.dumps(found))
    return 0


def _cases() -> list[Any]:
    """Plain variants and chains in L2, and the two small nets: seconds a round, and every kernel runs."""
    from bench.cases import SHAPES, chain_cases, net_cases, op_cases

    found = [c for c in op_cases() if not c.variant and c.shape in ("L2" if c.spec.letters else SHAPES)]
    found += [c for c in chain_cases() if c.shape == "L2"]
    return found + [c for c in net_cases() if c.quick]


def _rounds(trees: Sequence[pathlib.Path], options: argparse.Namespace, cases: Sequence[str] = ()) -> list[list[Round]]:
    """Rounds of A and of B, in alternating order."""
    found: list[list[Round]] = [[], []]
    for k in range(options.rounds):
        for side in (0, 1) if k % 2 == 0 else (1, 0):
            found[side].append(_measure(trees[side], options, cases))
        print(f"round {k + 1} of {options.rounds}", file=sys.stderr)
    return found


def compare(options: argparse.Namespace) -> int:
    """Measure, print the table, return the exit status."""
    from bench.table import duration, markdown

    commits = [_git("rev-parse", "--verify", f"{ref}^{{commit}}") for ref in (options.ref_a, options.ref_b)]
    changed = _git("diff", "--name-only", *commits, "--", "kernels/*/reference.py")
    if changed:
        print("the NumPy references differ: comparing seconds, not ratios", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="fastdl-compare-") as folder, contextlib.ExitStack() as stack:
        built: dict[str, pathlib.Path] = {}
        for commit in dict.fromkeys(commits):  # the same commit twice is built once
            tree = stack.enter_context(_worktree(commit, pathlib.Path(folder, commit[:12])))
            _build(commit, tree, next(iter(built.items()), None))
            built[commit] = tree
        trees = [built[commit] for commit in commits]
        a, b = _rounds(trees, options)
        change = changes(a, b, bool(changed))
        if not change:
            raise Failed("no case is measured in both refs; see --only")
        for attempt in range(ATTEMPTS):
            again = slower(change, options.threshold)
            if not again:
                break
            print(f"measuring again ({attempt + 1} of {ATTEMPTS}): {', '.join(again)}", file=sys.stderr)
            more = changes(*_rounds(trees, options, again), bool(changed))
            change |= {case: min(change[case], more.get(case, change[case])) for case in again}
    failed = slower(change, options.threshold)
    rows = []
    for case, value in sorted(change.items(), key=lambda item: -item[1]):
        seconds, ratios = (
            [statistics.median(r[case][key] for r in side) for side in (a, b)] for key in ("seconds", "ratio")
        )
        shown = [*map(duration, seconds), *(f"{r:.2f}" for r in ratios), f"{value:+.1%}"]
        rows.append([case, *shown, "SLOWER" if case in failed else "ok"])
    print(markdown(["case", "time A", "time B", "ratio A", "ratio B", "change", "verdict"], rows))
    print(f"{len(failed)} of {len(rows)} cases slowed by more than {options.threshold:.0%}")
    return 1 if failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench/compare.py", description=__doc__.splitlines()[0])
    parser.add_argument("ref_a", nargs="?", metavar="REF_A", help="the older ref")
    parser.add_argument("ref_b", nargs="?", metavar="REF_B", help="the newer ref")
    parser.add_argument("--only", default="", help="a regular expression over names like relu_forward-L2-cython")
    parser.add_argument("--threshold", type=float, default=0.1, help="share of time that a case may slow by (0.1)")
    parser.add_argument("--rounds", type=int, default=5, help="processes per ref (5)")
    parser.add_argument("--seconds", type=float, default=0.1, help="seconds of interleaved rounds per case (0.1)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--cases", default="", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        if options.worker:
            return _worker(options)
        if options.ref_b is None:
            parser.error("two refs are needed")
        return compare(options)
    except Failed as error:
        print(f"bench/compare.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
