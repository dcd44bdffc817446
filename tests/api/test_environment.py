"""What the environment says and lacks: thread limits, control groups, folders for the cache, packages."""

from __future__ import annotations

import builtins
import io
import os
import pathlib
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest

import fastdl as fd
from api.nets import BACKENDS, X, Y, net
from fastdl import config
from fastdl.kernels.common import cache

needs_numba = pytest.mark.skipif("numba" not in BACKENDS, reason="numba is not available")
needs_users = pytest.mark.skipif(not hasattr(os, "getuid"), reason="this platform has no users as Unix has")


# ------------------------------------------------------------------------------------------------ threads
@pytest.fixture
def eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of eight CPUs without a quota."""
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(config, "_cgroup_quota", lambda: None)
    for name in ("FASTDL_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


def test_the_order_is_ours_then_openmps_then_auto(eight_cpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    large, small = 1e12, 1e6
    assert config.threads_for(large)[0] == 8
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert config.threads_for(large) == (3, "OMP_NUM_THREADS")
    assert config.threads_for(small)[0] == 1  # a limit, no request
    monkeypatch.setenv("FASTDL_NUM_THREADS", "5")
    assert config.threads_for(small) == (5, "asked for")
    assert config.threads_for(small, 2)[0] == 2


@pytest.mark.parametrize(
    ("text", "threads"), [("2,4", 2), (" 2 ", 2), ("", 8), ("0", 8), ("-1", 8), ("x", 8), ("99", 8)]
)
def test_values_of_openmps_variable(text: str, threads: int, eight_cpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What OpenMP does not understand it passes over; more threads than CPUs are never wanted."""
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert config.available_threads()[0] == threads


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.0", "²", "٣"])
def test_a_wrong_number_of_threads_is_named(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDL_NUM_THREADS", text)
    with pytest.raises(ValueError, match="FASTDL_NUM_THREADS: expected an integer of at least 1"):
        config.resolve_threads()


@pytest.mark.parametrize("text", ["99999999999", "9" * 5000, "2147483648"])
def test_more_threads_than_any_machine_has_are_as_many_as_can_be(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDL_NUM_THREADS", text)
    assert config.resolve_threads() == config.MOST_THREADS
    fd.ops.relu_forward(X)


def test_threads_are_integers_of_any_type() -> None:
    assert config.check_threads(np.int64(3)) == 3
    assert config.check_threads(2**40) == config.MOST_THREADS
    for wrong in (True, np.bool_(True), 0, -1, 2.0, "2", None):
        with pytest.raises(ValueError, match="threads: expected 'auto' or an integer of at least 1"):
            config.check_threads(wrong)


@pytest.mark.parametrize("name", BACKENDS)
def test_environ_may_be_a_plain_dictionary(name: str) -> None:
    with mock.patch("os.environ", {"PATH": "/bin", "FASTDL_NUM_THREADS": "2"}):
        assert config.resolve_threads() == 2
        net(name).fit(X, Y, 32, verbose=0)
        fd.ops.relu_forward(X, backend=name)
        assert fd.backends()[name] == "available"


# ------------------------------------------------------------------------------------------------ control groups
ROOT = "/sys/fs/cgroup"
V1 = {"/proc/self/cgroup": "4:cpu,cpuacct:/docker/abc\n2:memory:/docker/abc\n"}
GROUPS = {
    "version 2": ({f"{ROOT}/cpu.max": "200000 100000\n"}, 2.0),
    "version 2, a fraction": ({f"{ROOT}/cpu.max": "50000 100000\n"}, 0.5),
    "version 2, no limit": ({f"{ROOT}/cpu.max": "max 100000\n"}, None),
    "version 2, nonsense": ({f"{ROOT}/cpu.max": ""}, None),
    "nested": (
        {"/proc/self/cgroup": "0::/a.slice/b.service\n", f"{ROOT}/a.slice/b.service/cpu.max": "200000 100000"},
        2.0,
    ),
    "the smallest on the path": (
        {
            "/proc/self/cgroup": "0::/a/b/c\n",
            f"{ROOT}/a/b/c/cpu.max": "max 100000",
            f"{ROOT}/a/b/cpu.max": "600000 100000",
            f"{ROOT}/a/cpu.max": "300000 100000",
        },
        3.0,
    ),
    "the path is the host's": ({"/proc/self/cgroup": "0::/docker/abc\n", f"{ROOT}/cpu.max": "400000 100000"}, 4.0),
    "another root": ({"/proc/self/cgroup": "0::/../../x\n", f"{ROOT}/x/cpu.max": "400000 100000"}, 4.0),
    "version 1": ({f"{ROOT}/cpu/cpu.cfs_quota_us": "200000", f"{ROOT}/cpu/cpu.cfs_period_us": "100000"}, 2.0),
    "version 1, no limit": ({f"{ROOT}/cpu/cpu.cfs_quota_us": "-1", f"{ROOT}/cpu/cpu.cfs_period_us": "100000"}, None),
    "version 1, nested": (
        {
            **V1,
            f"{ROOT}/cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "-1",
            f"{ROOT}/cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000",
            f"{ROOT}/cpu,cpuacct/docker/cpu.cfs_quota_us": "150000",
            f"{ROOT}/cpu,cpuacct/docker/cpu.cfs_period_us": "100000",
        },
        1.5,
    ),
    "both": (
        {
            "/proc/self/cgroup": "1:cpu:/a\n0::/b\n",
            f"{ROOT}/cpu/a/cpu.cfs_quota_us": "300000",
            f"{ROOT}/cpu/a/cpu.cfs_period_us": "100000",
            f"{ROOT}/unified/b/cpu.max": "200000 100000",
        },
        2.0,
    ),
    "nothing": ({}, None),
    "a damaged list": ({"/proc/self/cgroup": "nonsense\n", f"{ROOT}/cpu.max": "200000 100000\n"}, 2.0),
}


@pytest.mark.parametrize("case", GROUPS)
def test_the_quota_of_a_control_group_is_kept(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files, quota = GROUPS[case]
    real = builtins.open

    def read(path: object, *args: object, **kwargs: object) -> object:
        if not str(path).startswith((ROOT, "/proc/self/cgroup")):
            return real(path, *args, **kwargs)
        if path not in files:
            raise FileNotFoundError(path)
        return io.StringIO(files[path])

    monkeypatch.setattr(builtins, "open", read)
    assert config._cgroup_quota.__wrapped__() == quota


# ------------------------------------------------------------------------------------------------ the cache
@pytest.fixture
def away(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """No home, no folder of temporary files but one of this test's own, and an empty current folder."""
    for name in ("HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # no entry in the list of users either
    (tmp_path / "tmp").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


@needs_users
@pytest.mark.parametrize("variables", [{}, {"NUMBA_CACHE_DIR": "~/x"}, {"XDG_CACHE_HOME": "cache"}, {"HOME": ""}])
def test_without_a_home_nothing_is_left_in_the_current_folder(
    variables: dict[str, str], away: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    chosen, _ = cache.folder("key")
    assert chosen == str(away / "tmp" / f"fastdl-{os.getuid()}" / "key")
    assert os.listdir() == []
    assert os.stat(chosen).st_mode & 0o777 == 0o700


@needs_users
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_cache_that_others_can_write_to_is_refused(
    mode: int, away: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numba unpickles what lies there."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(away / "shared"))
    first, _ = cache.folder("key")
    assert first == str(away / "shared" / "kernels-key")
    os.chmod(first, mode)
    second, refusals = cache.folder("key")
    assert second == str(away / "tmp" / f"fastdl-{os.getuid()}" / "key")
    assert refusals == [f"{first} can be written by others (mode {mode:o}); remove it"]


@needs_users
def test_a_cache_whose_place_others_can_take_is_refused(away: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(away / "shared"))
    (away / "shared").mkdir()
    os.chmod(away / "shared", 0o777)
    assert cache.folder("key")[0] != str(away / "shared" / "kernels-key")
    os.chmod(away / "shared", 0o1777)  # sticky: nobody can exchange what is another's
    assert cache.folder("key")[0] == str(away / "shared" / "kernels-key")


@needs_users
def test_a_link_in_the_place_of_the_cache_is_refused(away: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(away))
    (away / "elsewhere").mkdir()
    (away / "kernels-key").symlink_to(away / "elsewhere")
    assert cache.folder("key")[0] != str(away / "kernels-key")


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can give a folder away")
def test_a_cache_of_another_user_is_refused(away: pathlib.Path) -> None:
    chosen, _ = cache.folder("key")
    os.chown(chosen, 4321, 4321)
    assert cache.folder("key")[0] is None
    os.chown(chosen, 0, 0)
    os.chown(os.path.dirname(chosen), 4321, 4321)
    assert cache.folder("key")[0] is None


NOWHERE = """
import os, tempfile
os.environ["NUMBA_CACHE_DIR"] = "/proc/nothing"
tempfile._candidate_tempdir_list = lambda: ["/proc/nothing"]
import numpy as np, fastdl as fd
x = np.array([[-1.0, 2.0]], "f4")
print(fd.ops.relu_forward(x, backend="numba")[0].tolist(), fd.backends()["numba"])
with fd.backend("numba"):
    print(fd.explain("relu_forward", x, x).splitlines()[2])
    print(fd.Sequential([fd.layers.Dense(2)]).compile("mse").build(3).explain().splitlines()[0])
"""


@needs_numba
@needs_users
def test_where_nothing_can_be_written_numba_compiles_and_explain_says_so() -> None:
    run = subprocess.run([sys.executable, "-c", NOWHERE], capture_output=True, text=True, check=True)
    result, op, made = run.stdout.splitlines()
    assert result == "[[0.0, 2.0]] available"
    for text in (op, made):
        assert "(compiled anew in every process, there is no folder to keep it in: /proc/nothing" in text


# ------------------------------------------------------------------------------------------------ packages
ABSENT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "numba":
            raise {error}

sys.meta_path.insert(0, Absent())
import numpy as np, fastdl as fd
print(fd.backends()["numba"], fd.backends()["cuda"], sep="\\n")
net = fd.Sequential([fd.layers.Dense(2)]).compile("softmax_cross_entropy")
net.fit(np.eye(4, dtype="f4"), [0, 1, 0, 1], verbose=0)
net.explain(), fd.explain("relu_forward", np.eye(4, dtype="f4"), np.eye(4, dtype="f4"))
for work in (net.plan, lambda: fd.ops.relu_forward(np.eye(4, dtype="f4"), backend="numba")):
    try:
        work()
    except fd.errors.BackendUnavailable as error:
        print(error)
from fastdl.cli import main
sys.stdout = None
sys.exit(main(["info"]))
"""


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ("ModuleNotFoundError('No module named numba', name='numba')", "the package numba is not installed"),
        ("ImportError('Numba needs NumPy 2.9 or less')", "cannot be imported (Numba needs NumPy 2.9 or less)"),
        ("AttributeError('np.something')", "cannot be imported (np.something)"),
    ],
)
def test_without_numba_all_else_works_and_says_why(error: str, reason: str) -> None:
    run = subprocess.run([sys.executable, "-c", ABSENT.format(error=error)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == 4
    assert all(reason in line for line in lines)
