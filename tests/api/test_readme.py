"""What README.md shows is what happens."""

from __future__ import annotations

import pathlib
import re
import shutil
import subprocess

import pytest

import fastdl as fd
from fastdl import layers

ROOT = pathlib.Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def section(name: str) -> str:
    return re.search(rf"<!-- {name}:begin -->\n(.*)<!-- {name}:end -->", README, re.S).group(1)


def printed(fuse: bool) -> str:
    """The Program of README's net with batches of 64 rows."""
    net = fd.Sequential(
        [
            layers.Dense(128, use_bias=False),
            layers.BatchNorm(),
            layers.ReLU(),
            layers.Dropout(0.2),
            layers.Dense(10),
        ],
        seed=42,
    )
    net.compile("softmax_cross_entropy", fd.optimizers.Adam(3e-3), backend="cython", fuse=fuse)
    X, y = fd.data.load_digits()
    net.fit(X[:640], y[:640], batch_size=64, epochs=1, verbose=0)
    return str(net.program)


@pytest.mark.skipif(fd.backends()["cython"] != "available", reason="the compiled back end is not built")
@pytest.mark.parametrize("fuse", [False, True])
def test_the_program_shown_is_the_program(fuse: bool) -> None:
    assert printed(fuse) in section("program")


def test_the_example_runs() -> None:
    code = re.findall(r"```python\n(.*?)```", README, re.S)[0]
    names: dict[str, object] = {}
    exec(code, names)
    assert names["net"].evaluate(names["X"][names["test"]], names["y"][names["test"]])["accuracy"] > 0.95
    assert len(names["history"]["loss"]) == 30


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_activation_in_contributing_applies() -> None:
    """The diff of the how-to fits the code of today, and touches at most five files."""
    diff = re.search(r"```diff\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S).group(1)
    assert 1 < diff.count("diff --git") <= 4  # and README's generated table
    run = subprocess.run(["git", "apply", "--check", "-"], input=diff, text=True, capture_output=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
