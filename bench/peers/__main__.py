"""Takes turns between the libraries' processes and prints the table.

``python -m bench.peers``                          everything: 5 rounds of 1 s a side, about half an hour
``python -m bench.peers --only "^step tabular"``   some cases, by a regular expression over their names
``python -m bench.peers --list``                   the names and bars
``--quick``                                        3 rounds of 0.2 s: for a look, not for a claim
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from bench.measure import machine
from bench.peers.cases import LINEAR, Case, cases
from bench.table import HISTORY, ROOT, duration, markdown, replace_block

#: Settings of a user's shell that would slow a peer down or speed it up: no side gets them.
FOREIGN = ("OPENBLAS_", "MKL_", "OMP_", "GOMP_", "KMP_", "GOTO_", "XLA_", "NUMBA_NUM", "FASTDL_", "PYTHONDONTWRITE")
#: Around the README's table.
PEER_MARKS = ("<!-- peers:begin -->", "<!-- peers:end -->")
#: Pause between two turns, so that the pool of the last one is asleep.
REST = 0.05
#: Starts that are timed for a start case, the quickest counts.
STARTS = 7
#: What a start runs: imports, a net, data, one step.
START_OF = {
    "fastdl": """
import numpy as np, fastdl as fd
from fastdl import layers
stack = [l for _ in range(2) for l in (layers.Dense(32, use_bias=False), layers.BatchNorm(), layers.ReLU(),
         layers.Dropout(0.1))]
net = fd.Sequential([*stack, layers.Dense(2)], seed=1)
net.compile(loss="softmax_cross_entropy", optimizer="adam", backend="cython")
net.train_on_batch(np.ones((32, 16), np.float32), np.zeros(32, np.int64))
""",
    "torch": "from bench.peers import torch_side as s; s.step('tiny', 'train_on_batch', 2, '').call()",
    "jax": "from bench.peers import jax_side as s; s.step('tiny', 'train_on_batch', 2, '').call()",
}


def environment(case: Case) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN)}
    kept |= {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    kept |= {"OMP_NUM_THREADS": str(case.threads), "OPENBLAS_NUM_THREADS": str(case.threads)}
    kept |= {"MKL_NUM_THREADS": str(case.threads)}
    return kept | ({"FASTDL_SIMD": case.level} if case.level else {})


class Side:
    """A library's process, pinned to as many cores as it may use threads; asleep while it is not asked."""

    def __init__(self, name: str, case: Case) -> None:
        cores = sorted(os.sched_getaffinity(0))[-case.threads :]
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from bench.peers.worker import main; main()", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env=environment(case),
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"error": f"the process ended with {self.process.wait()}"}

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


class Sides:
    """Processes by library, threads and SIMD level; started when first needed."""

    def __init__(self) -> None:
        self.running: dict[tuple[str, int, str], Side] = {}

    def get(self, name: str, case: Case) -> Side:
        key = name, case.threads, case.level
        if key not in self.running:
            self.running[key] = Side(name, case)
        return self.running[key]

    def close(self) -> None:
        for side in self.running.values():
            side.close()


def compare(case: Case, sides: Sides, seconds: float, rounds: int) -> dict[str, Any]:
    """Medians of each side, ratios of the peers to ours by round, shares of a ceiling."""
    notes: dict[str, str] = {}
    ready: list[Side] = []
    for name in ("fastdl", *case.peers):
        side = sides.get(name, case)
        answer = side.ask(prepare=vars(case))
        if answer:
            notes[name] = next(iter(answer.values()))
        else:
            ready.append(side)
        time.sleep(REST)
    times: dict[str, list[float]] = {side.name: [] for side in ready}
    shares: list[float] = []
    for turn in range(rounds):
        for k in range(len(ready)):
            side = ready[(turn + k) % len(ready)]
            answer = side.ask(measure=seconds)
            if "seconds" not in answer:
                notes[side.name] = next(iter(answer.values()))
                continue
            times[side.name].append(answer["seconds"])
            if "share" in answer:
                shares.append(answer["share"])
            time.sleep(REST)
    return result(case, times, shares, notes)


def result(case: Case, times: dict[str, list[float]], shares: Sequence[float], notes: dict[str, str]) -> dict[str, Any]:
    """A line of the table from the rounds."""
    complete = {name: found for name, found in times.items() if found and name not in notes}
    ours = complete.get("fastdl", [])
    ratios = {
        name: statistics.median(b / a for a, b in zip(ours, found, strict=True))
        for name, found in complete.items()
        if name != "fastdl" and ours
    }
    found: dict[str, Any] = {
        "case": case.name,
        "threads": case.threads,
        "seconds": {name: statistics.median(t) for name, t in complete.items()},
        "ratios": ratios,
        "bars": case.bars,
        "notes": notes,
    }
    if ratios:
        found["best"] = min(ratios, key=ratios.__getitem__)
    if shares:
        found["share"] = statistics.median(shares)
    found["met"] = met(found)
    return found


def met(found: dict[str, Any]) -> dict[str, bool]:
    """Which bars hold; a bar without its number is missed."""
    answer = {}
    for against, bar in found["bars"].items():
        if against == "share":
            answer[against] = found.get("share", 0.0) >= bar
        elif against == "seconds":
            answer[against] = found["seconds"].get("fastdl", float("inf")) <= bar
        else:
            name = found.get("best") if against == "best" else against
            answer[against] = found["ratios"].get(name, 0.0) >= bar
    return answer


def starts(case: Case) -> dict[str, Any]:
    """Seconds from process start to the end of the first step, the interpreter's own included."""
    times: dict[str, list[float]] = {}
    notes: dict[str, str] = {}
    for turn in range(STARTS):
        for name in ("fastdl", *case.peers):
            start = time.perf_counter()
            command = [sys.executable, "-c", START_OF[name]]
            done = subprocess.run(command, cwd=ROOT, env=environment(case), capture_output=True, check=False)
            if done.returncode:
                notes[name] = done.stderr.decode().strip().splitlines()[-1]
            elif turn:  # the first one fills the file cache
                times.setdefault(name, []).append(time.perf_counter() - start)
    return result(case, times, [], notes)


def cell(found: dict[str, Any]) -> list[str]:
    """Case, our time, each peer's time and ratio, share, bars."""
    peers = "; ".join(
        f"{name} {duration(found['seconds'][name])} ({ratio:.2f})" for name, ratio in found["ratios"].items()
    )
    share = f"{found['share']:.0%}" if "share" in found else ""
    bars = ", ".join(
        f"{against} {bar:g}: {'yes' if found['met'][against] else 'NO'}" for against, bar in found["bars"].items()
    )
    ours = duration(found["seconds"]["fastdl"]) if "fastdl" in found["seconds"] else "-"
    notes = "; ".join(f"{name}: {text}" for name, text in found["notes"].items())
    return [found["case"], ours, share, "; ".join(filter(None, [peers, notes])), bars]


def scaling(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One thread's time over two threads', and float32's over bfloat16's, where both were measured."""
    ours = {r["case"]: r["seconds"]["fastdl"] for r in results if "fastdl" in r["seconds"]}
    lines = []
    for name in ours:
        single = name.replace("bfloat16", "train_on_batch")
        if "bfloat16" in name and single in ours:
            line = {"case": f"{name} against float32", "threads": 2, "seconds": {"fastdl": ours[name]}, "notes": {}}
            bars = {"share": 1.6} if "wide" in name else {}
            line |= {"ratios": {}, "bars": bars, "share": ours[single] / ours[name]}
            lines.append(line | {"met": met(line)})
    bars = {"wide": 1.85, "mnist": 1.85, "deep": 1.85, "tabular": 1.5, "tiny": 0.95}
    for name in ours:
        one = name.replace(", 2T", ", 1T")
        if name.endswith(", 2T") and one in ours and "train_on_batch" in name:
            bar = bars[name.split()[1]]
            line = {"case": f"{name} against 1T", "threads": 2, "seconds": {"fastdl": ours[name]}, "notes": {}}
            line |= {"ratios": {}, "bars": {"share": bar}, "share": ours[one] / ours[name]}
            lines.append(line | {"met": met(line)})
    return lines


def products(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The median ratio over the listed shapes of `relu(linear)`."""
    ratios = [r["ratios"]["torch"] for r in results if r["case"].startswith("relu(linear)") and "torch" in r["ratios"]]
    if len(ratios) < len(LINEAR):
        return []
    line: dict[str, Any] = {"case": f"relu(linear), median of {len(ratios)} shapes", "threads": 1, "seconds": {}}
    line |= {"ratios": {}, "notes": {}, "bars": {"share": 1.0}, "share": statistics.median(ratios)}
    return [line | {"met": met(line)}]


def summary(results: Sequence[dict[str, Any]], about: dict[str, Any]) -> str:
    """The README's table: steps and predictions, a column for each library."""
    chosen = [r for r in results if r["case"].startswith(("step", "predict")) and r["ratios"]]
    libraries = list(dict.fromkeys(name for r in chosen for name in r["ratios"]))
    rows = []
    for r in chosen:
        cells = [f"{duration(r['seconds'][n])} ({r['ratios'][n]:.1f})" if n in r["ratios"] else "" for n in libraries]
        rows.append([r["case"], duration(r["seconds"]["fastdl"]), *cells])
    head = f"{about['cpu']}, level {about['level']}, NumPy {about['numpy']}, Python {about['python']}.\n\n"
    return head + markdown(["case (T: threads)", "fastdl", *libraries], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="a regular expression over the names of cases")
    parser.add_argument("--seconds", type=float, default=1.0, help="seconds of a side's turn (1)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side (5)")
    parser.add_argument("--quick", action="store_true", help="3 rounds of 0.2 s")
    parser.add_argument("--list", action="store_true", help="names and bars, nothing is measured")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file (bench/history/<date>-peers-<cpu>.json)")
    parser.add_argument("--into", type=pathlib.Path, help="file whose block of steps and predictions is replaced")
    parser.add_argument("--no-history", action="store_true", help="keep no JSON, as a run of --only without --out")
    options = parser.parse_args(arguments)
    if options.quick:
        options.seconds, options.rounds = 0.2, 3
    chosen = [case for case in cases() if re.search(options.only, case.name)]
    if options.list:
        for case in chosen:
            print(case.name, case.bars or "")
        return 0
    sides, results = Sides(), []
    try:
        for case in chosen:
            found = starts(case) if case.kind == "start" else compare(case, sides, options.seconds, options.rounds)
            results.append(found)
            print(*cell(found), sep=" | ", file=sys.stderr, flush=True)
    finally:
        sides.close()
    results += scaling(results) + products(results)
    about = machine()
    print(f"{about['cpu']}, level {about['level']}, float32; NumPy {about['numpy']}, Python {about['python']}\n")
    print(markdown(["case", "fastdl", "share", "peers: time (ratio)", "bars"], [cell(r) for r in results]))
    missed = [r["case"] for r in results if not all(r["met"].values())]
    print(f"\n{len(missed)} of {sum(bool(r['bars']) for r in results)} bars missed", *missed, sep="\n  ")
    if options.into is not None:
        text = replace_block(options.into.read_text(), summary(results, about), PEER_MARKS)
        options.into.write_text(text)
    if options.out or not (options.no_history or options.only):
        now = datetime.datetime.now(datetime.UTC)
        slug = re.sub(r"[^a-z0-9]+", "-", about["cpu"].lower()).strip("-")
        path = options.out or HISTORY / f"{now:%Y-%m-%d}-peers-{slug}.json"
        command = " ".join(["python -m bench.peers", *(sys.argv[1:] if arguments is None else arguments)])
        kept = {"date": now.isoformat(timespec="seconds"), "command": command, "machine": about, "results": results}
        path.write_text(json.dumps(kept, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
