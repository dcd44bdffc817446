"""The command line, run in this process, and tables for it."""

import pytest

from fastdl import cli


@pytest.fixture
def run(capsys):
    """``run(*arguments)`` -> (exit status, stdout, stderr)."""

    def call(*arguments):
        status = cli.main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def written(tmp_path):
    """``written(text)``: the file t.csv with it."""

    def write(text, name="t.csv"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8", newline="")
        return path

    return write
