"""pytest-benchmark with what fastdl tracks: the paired ratio to NumPy and the share of the roofline.

``pytest bench/``                                measure everything
``pytest bench/ --benchmark-autosave``           and keep it, ratio and share in ``extra_info``
``pytest bench/ --benchmark-compare``            and show the ratios of the last kept run beside the new ones
``pytest bench/ --benchmark-disable``            a smoke run: a slice of the cases, two rounds each
``pytest bench/ -k "relu and L2"``               some cases; names are op-shape-backend

One thread on either side unless ``--threads`` says otherwise: the process is pinned to so many cores, and BLAS is
limited to so many threads for the session.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))  # the package `bench`, wherever pytest starts

from bench import table
from bench.cases import Case, identity
from bench.measure import machine, measure, pinned
from bench.prepare import prepare
from fastdl.errors import BackendUnavailable

#: What one benchmark function of pytest-benchmark costs in rounds; its own statistics are secondary here.
PEDANTIC_ROUNDS = 5


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastdl")
    group.addoption("--seconds", type=float, default=0.3, help="seconds of interleaved rounds per case (0.3)")
    group.addoption("--threads", type=int, default=1, help="threads on either side (1)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    config.addinivalue_line("python_functions", "bench_*")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("benchmark_disable"):
        left_out = [item for item in items if not item.callspec.params["case"].quick]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["fastdl"] = machine()


@pytest.fixture(scope="session", autouse=True)
def conditions(request: pytest.FixtureRequest) -> Iterator[None]:
    with pinned(request.config.getoption("threads")):
        yield


@pytest.fixture
def track(request: pytest.FixtureRequest, benchmark: Any) -> Callable[[Case], None]:
    """Check a case, take the paired ratio, then let pytest-benchmark time our side."""
    threads, smoke = request.config.getoption("threads"), not benchmark.enabled

    def run(case: Case) -> None:
        try:
            prepared = prepare(case, threads)
        except BackendUnavailable as error:
            pytest.skip(str(error))
        seconds, least = (0.0, 2) if smoke else (request.config.getoption("seconds"), 5)
        found = measure(prepared, seconds, least, threads)
        benchmark.group = case.group
        benchmark.extra_info.update({"case": identity(case), **found, **machine()})
        repeat = max(1, int(1e-3 / found["seconds"] / prepared.steps))
        benchmark.pedantic(prepared.ours, rounds=PEDANTIC_ROUNDS, iterations=repeat, warmup_rounds=1)

    return run


@pytest.hookimpl(trylast=True)  # below pytest-benchmark's own tables
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Ratio and share of the roofline, which pytest-benchmark keeps but does not show."""
    session = config._benchmarksession
    found = [bench for bench in session.benchmarks if bench.extra_info.get("ratio")]
    if not found:
        return
    before = list((session.compared_mapping or {}).values())[-1:]
    rows = []
    for bench in found:
        info = bench.extra_info
        row = [info["case"], *table.cells(info)]
        for kept in before:
            old = kept.get(bench.fullname, {}).get("extra_info", {}).get("ratio")
            row += ["-", "-"] if old is None else [f"{old:.2f}", f"{info['ratio'] / old - 1:+.0%}"]
        rows.append(row)
    header = ["case", *table.CELLS, *(["ratio before", "change"] if before else [])]
    terminalreporter.section("fastdl: ratio to NumPy (above 1 is faster), share of the roofline")
    terminalreporter.write_line(table.markdown(header, rows))
