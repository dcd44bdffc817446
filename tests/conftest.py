"""What all tests share: poisoned memory, seeds from test names, back ends with the reason of a skip."""

from __future__ import annotations

import ctypes
import fnmatch
import pathlib
import sys
import types
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "cuda")]  # the packages of helpers: `api`, `contract` and `gpu`
sys.path.append(str(HERE.parent))  # the package `bench`, wherever pytest starts
pytest.register_assert_rewrite("contract.checks")

import host  # noqa: E402

import fastdl as fd  # noqa: E402
from fastdl.kernels import dispatch  # noqa: E402
from fastdl.kernels.common import driver, numba_cuda, simd  # noqa: E402


# ---------------------------------------------------------------------------------------------- poisoned memory
class PoisonedNumPy(types.ModuleType):
    """numpy whose fresh arrays hold NaN (or -1), so that a result which is not fully written shows."""

    def __init__(self) -> None:
        super().__init__("numpy")

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    @staticmethod
    def empty(*args: Any, **kwargs: Any) -> np.ndarray:
        return _poison(np.empty(*args, **kwargs))

    @staticmethod
    def empty_like(*args: Any, **kwargs: Any) -> np.ndarray:
        return _poison(np.empty_like(*args, **kwargs))


def _poison(x: np.ndarray) -> np.ndarray:
    if x.dtype.kind == "f":
        x.fill(np.nan)
    elif x.dtype.kind in "iu":
        x.fill(np.iinfo(x.dtype).max)
    return x


@pytest.fixture(autouse=True, scope="session")
def poisoned_memory() -> Iterator[None]:
    """NaN in what fastdl's own Python code allocates; large numbers in what its compiled code takes from malloc.

    Modules that compile with Numba keep numpy itself: Numba reads their globals.
    """
    dispatch.backends()
    poisoned = PoisonedNumPy()
    changed = [
        module
        for name, module in list(sys.modules.items())
        if name.split(".")[0] == "fastdl" and getattr(module, "np", None) is np and not _is_compiled(module)
    ]
    for module in changed:
        module.np = poisoned
    if sys.platform == "linux":
        M_PERTURB, byte = -6, 0x80  # glibc fills with the complement, 0x7F: 3e38 in float32, 1e306 in float64
        getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)(M_PERTURB, byte)
    yield
    for module in changed:
        module.np = np


def _is_compiled(module: types.ModuleType) -> bool:
    file = getattr(module, "__file__", "") or ""
    return not file.endswith(".py") or any("numba" in str(getattr(v, "__module__", "")) for v in vars(module).values())


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers that depend on the test's name alone."""
    return np.random.default_rng(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def host_left_as_found() -> Iterator[None]:
    """Every test leaves the process as it was, but for Numba's threads, which the first one starts."""
    before = host.state()
    yield
    after = host.state()
    if before["Numba threads"] is None:
        after["Numba threads"] = None
    changed = {name: (value, after[name]) for name, value in before.items() if after[name] != value}
    assert not changed, f"(before, after): {changed}"


# ---------------------------------------------------------------------------------------------- back ends
@dataclass(frozen=True)
class Runner:
    """A back end, at a SIMD level where it has one."""

    backend: str
    level: str | None = None

    def __str__(self) -> str:
        return self.backend if self.level is None else f"{self.backend}-{self.level}"


def runners(levels: bool = True) -> list[Any]:
    """Every back end, with every SIMD level of this CPU or the best one; one that cannot run is skipped, saying why."""
    found: list[Any] = []
    for backend, state in fd.backends().items():
        if state != "available":
            found.append(
                pytest.param(Runner(backend), id=backend, marks=pytest.mark.skip(reason=f"{backend}: {state}"))
            )
        elif backend == "cython":
            chosen = simd.levels() if levels else simd.levels()[-1:]
            found += [pytest.param(Runner(backend, level), id=f"{backend}-{level}") for level in chosen]
        else:
            found.append(pytest.param(Runner(backend), id=backend))
    return found


@pytest.hookimpl(trylast=True)  # back ends vary fastest: the same draws serve all of them
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``runner``: back ends with all SIMD levels; ``backend``: back ends by name; ``level``: the levels of this CPU."""
    if "runner" in metafunc.fixturenames:
        levels = metafunc.definition.get_closest_marker("best_level") is None
        metafunc.parametrize("runner", runners(levels), indirect=True)
    if "backend" in metafunc.fixturenames:
        named = [
            name if state == "available" else pytest.param(name, marks=pytest.mark.skip(reason=f"{name}: {state}"))
            for name, state in fd.backends().items()
        ]
        metafunc.parametrize("backend", named)
    if "level" in metafunc.fixturenames:
        if fd.backends()["cython"] == "available":
            metafunc.parametrize("level", simd.levels(), indirect=True)
        else:
            skip = pytest.mark.skip(reason=f"cython: {fd.backends()['cython']}")
            metafunc.parametrize("level", [pytest.param("none", marks=skip)], indirect=True)


@pytest.fixture(params=["numpy", "numba", "cython", "cuda"])
def anywhere(request: pytest.FixtureRequest) -> Iterator[str]:
    """Back ends by name; CUDA by the interpreter of its PTX where there is no GPU."""
    state = fd.backends()[request.param]
    if state == "available":
        yield request.param
        return
    if request.param != "cuda" or numba_cuda.MISSING:
        pytest.skip(f"{request.param}: {state}")
    from gpu.device import Interpreted

    before = driver.use(Interpreted())
    yield "cuda"
    driver.use(before)


@pytest.fixture
def runner(request: pytest.FixtureRequest) -> Iterator[Runner]:
    """A back end, with its SIMD level selected for the test."""
    chosen = request.param
    before = simd.level() if chosen.level else None
    if chosen.level:
        simd.select(chosen.level)
    yield chosen
    if before:
        simd.select(before)


@pytest.fixture
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """A SIMD level, selected for the test."""
    before = simd.level()
    simd.select(request.param)
    yield request.param
    simd.select(before)


# ---------------------------------------------------------------------------------------------- options
def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the whole contract matrix, not the slice for CI")
    parser.addoption(
        "--expect-skips",
        metavar="FILE",
        type=pathlib.Path,
        help="fail if tests were skipped for a reason that FILE does not list, or more often than it says",
    )


def _is_full(config: pytest.Config) -> bool:
    return config.getoption("--full") or "full" in (config.getoption("-m") or "")


@pytest.fixture(scope="session")
def full_matrix(pytestconfig: pytest.Config) -> bool:
    """Whether the whole matrix was asked for."""
    return _is_full(pytestconfig)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "best_level: the compiled back end runs at the best SIMD level alone")
    config.pluginmanager.register(Skips(config.getoption("--expect-skips")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked ``full`` run with --full or -m full."""
    if _is_full(config):
        return
    out = [item for item in items if item.get_closest_marker("full")]
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if not item.get_closest_marker("full")]


# ---------------------------------------------------------------------------------------------- skips
class Skips:
    """Counts skips by their reason, for the end of the report and for ``--expect-skips``.

    A line of the file is a number and a pattern of `fnmatch`: so many tests at most may be skipped for the reasons that
    match. A reason belongs to the first line that it matches.
    """

    def __init__(self, expected: pathlib.Path | None) -> None:
        self.reasons: Counter[str] = Counter()
        lines = expected.read_text().splitlines() if expected else []
        pairs = (line.split(maxsplit=1) for line in lines if line.strip() and not line.startswith("#"))
        self.expected = {pattern: int(most) for most, pattern in pairs} if expected else None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            self._count(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self._count(report)

    def _count(self, report: Any) -> None:
        _, _, reason = report.longrepr
        self.reasons[reason.removeprefix("Skipped: ").partition("\n")[0]] += 1

    def unexpected(self) -> list[str]:
        """What the file does not allow."""
        if self.expected is None:
            return []
        counts = dict.fromkeys(self.expected, 0)
        wrong = []
        for reason, count in self.reasons.items():
            pattern = next((p for p in counts if fnmatch.fnmatchcase(reason, p)), None)
            if pattern is None:
                wrong.append(f"{count} skipped for a reason that is not listed: {reason}")
            else:
                counts[pattern] += count
        for pattern, count in counts.items():
            if count > self.expected[pattern]:
                wrong.append(f"{count} skipped, at most {self.expected[pattern]} expected: {pattern}")
        return wrong

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if session.exitstatus == pytest.ExitCode.OK and self.unexpected():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.reasons:
            terminalreporter.section("skips by reason")
        for reason, count in self.reasons.most_common():
            terminalreporter.line(f"{count:6d}  {reason}")
        for line in self.unexpected():
            terminalreporter.line(f"NOT EXPECTED: {line}", red=True)
