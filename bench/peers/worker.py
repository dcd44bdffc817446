"""A process that measures for one library: requests come as JSON lines on stdin, answers go to stdout.

``{"prepare": case}`` makes a case ready and warm; ``{"measure": seconds}`` times it for so long.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

#: A sample lasts at least so long.
SAMPLE = 50e-6


class Missing(Exception):
    """A library that is not installed, or cannot do this case."""


@dataclass
class Work:
    """One call does ``steps`` units of work; ``ceiling`` gives the least seconds that the machine needs for a unit."""

    call: Callable[[], Any]
    steps: int = 1
    ceiling: Callable[[], float] | None = None


def prepare(side: str, case: dict[str, Any]) -> Work:
    """The case in a library, called often enough for caches, compilers and thread pools to be warm."""
    name, _, variant = side.partition("_")
    try:
        module = importlib.import_module(f"bench.peers.{name}_side")
    except ImportError as error:
        raise Missing(f"not installed: {error}") from error
    make = getattr(module, case["kind"], None)
    if make is None:
        raise Missing(f"{name} has no {case['kind']}")
    work = make(**case["what"], threads=case["threads"], variant=variant or case["ours"])
    stop = time.perf_counter() + 0.2
    for _ in range(3):
        work.call()
    while time.perf_counter() < stop:
        work.call()
    return work


def measure(work: Work, seconds: float) -> dict[str, float]:
    """Median seconds of a unit, and the ceiling's, in turn."""
    start = time.perf_counter()
    work.call()
    repeat = max(1, int(SAMPLE / max(time.perf_counter() - start, 1e-9)))
    samples, ceilings = [], []
    gc.collect()
    gc.disable()
    stop = time.perf_counter() + seconds
    while len(samples) < 3 or time.perf_counter() < stop:
        start = time.perf_counter()
        for _ in range(repeat):
            work.call()
        samples.append((time.perf_counter() - start) / repeat)
        if work.ceiling is not None:
            ceilings.append(work.ceiling())
    gc.enable()
    found = {"seconds": statistics.median(samples) / work.steps}
    if ceilings:
        found["share"] = statistics.median(c / s for c, s in zip(ceilings, samples, strict=True))
    return found


def main() -> None:
    side, answers = sys.argv[1], os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to stderr
    work: Work | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "prepare" in request:
                work = None
                gc.collect()
                work = prepare(side, request["prepare"])
                answer: dict[str, Any] = {}
            else:
                answer = measure(work, request["measure"])
        except Missing as error:
            answer = {"missing": str(error)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
