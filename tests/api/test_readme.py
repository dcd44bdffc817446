"""What README.md shows is what happens."""

from __future__ import annotations

import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
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


def blocks(heading: str, language: str = "python") -> list[str]:
    """The code of a section."""
    text = README.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def test_the_example_runs() -> None:
    names: dict[str, object] = {}
    exec(blocks("In Python")[0], names)
    assert names["net"].evaluate(names["X"][names["test"]], names["y"][names["test"]])["accuracy"] > 0.95
    assert len(names["history"]["loss"]) == 30


def test_stop_save_and_go_on(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(blocks("In Python")[0], names)
    again, loop = blocks("Stop, save, go on")
    exec(again, names)
    assert names["net"].epoch == 60
    whole: dict[str, object] = {}
    exec(blocks("In Python")[0].replace("epochs=30", "epochs=60"), whole)
    for name, value in whole["net"].weights.items():
        np.testing.assert_array_equal(names["net"].weights[name], value)
    step = names["net"].step
    exec(loop, names | {"ops": fd.ops})
    assert names["net"].step == step + 1


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_activation_in_contributing_applies() -> None:
    """The diff of the how-to fits the code of today, and touches at most five files."""
    diff = re.search(r"```diff\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S).group(1)
    assert 1 < diff.count("diff --git") <= 4  # and README's generated table
    run = subprocess.run(["git", "apply", "--check", "-"], input=diff, text=True, capture_output=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_the_commands_run_one_after_the_other(tmp_path) -> None:
    """In an empty folder: they make the files that they read."""
    (commands,) = blocks("On the command line", "")
    run = subprocess.run(
        ["bash", "-e", "-c", re.sub("^python ", f"{sys.executable} ", commands, flags=re.M)],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert "200 rows, 3 features, regression; 40 rows held out" in run.stdout
    assert float(re.search(r"test r2 (\S+)", run.stdout).group(1)) > 0.9
    assert len((tmp_path / "answers.csv").read_text().splitlines()) == 1798
