"""Files of the command line: inputs are kept, errors name the file, and what a file cannot hold is told beforehand."""

import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

import fastdl as fd
from fastdl import cli, data
from fastdl.data.preprocessing import Column, Preprocessing
from fastdl.run import checkpoint

QUICK = ["--epochs", "1", "--layers", "4", "--no-baseline", "--quiet"]
TABLE = "a,y\n" + "".join(f"{k},{('süß', 'bös')[k % 2]}\n" for k in range(40))


def refused(result, sentence):
    status, stdout, stderr = result
    assert (status, stdout) == (1, "")
    assert stderr.startswith("fastdl: ")
    assert stderr.count("\n") == 1
    assert sentence in stderr


@pytest.fixture
def model(run, written, tmp_path):
    """A net of the table t.csv."""
    assert run("train", written(TABLE), "--target", "y", *QUICK, "--save", tmp_path / "net")[0] == 0
    return tmp_path / "net"


# what is read is not written


@pytest.mark.parametrize("link", [None, os.symlink, os.link])
@pytest.mark.parametrize("place", ["save", "out over table", "out over model"])
def test_an_input_is_never_replaced(run, model, link, place):
    table = model.with_name("t.csv")
    victim = model if place == "out over model" else table
    named, before = victim, victim.read_bytes()
    if link is not None:
        named = victim.with_name("link")
        link(victim, named)
    command = (
        ["train", table, "--target", "y", *QUICK, "--save"] if place == "save" else ["predict", model, table, "--out"]
    )
    refused(run(*command, named), f"{named} would replace {victim}, which this command reads; name another file")
    assert victim.read_bytes() == before


def test_the_digits_are_no_file(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").write_text("an older net")
    assert run("train", "digits", *QUICK, "--save", "digits")[0] == 0
    assert len(fd.load("digits").predict(data.load_digits()[0][:3])) == 3


# files are named


def test_files_that_are_no_nets(run, written):
    table = written(TABLE)
    refused(run("predict", os.devnull, table), f"{os.devnull}: ")
    refused(run("predict", table.parent, table), f"{table.parent}: ")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize("name", ["full.csv", "full.npz"])
def test_a_full_disk_is_named(run, model, name):
    out = model.with_name(name)
    os.symlink("/dev/full", out)
    refused(run("predict", model, model.with_name("t.csv"), "--out", out), f"{out}: No space left on device")


def test_a_full_disk_at_the_end_of_a_training(run, written, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    status, _, stderr = run("train", written(TABLE), "--target", "y", *QUICK, "--save", tmp_path / "net")
    assert (status, stderr) == (1, f"fastdl: {tmp_path / 'net'}: No space left on device\n")


# columns


def test_two_arrays_of_one_column(run, tmp_path):
    """As two columns of one name in a CSV file: one of them would be lost."""
    numbers = np.arange(20.0)
    for block, options in (("a", []), ("X", ["--target", "X[0]"])):
        arrays = {block: np.ones((20, 2)), f"{block}[0]": numbers, "y": numbers % 2}
        for order in (list(arrays), list(reversed(arrays))):
            np.savez(tmp_path / "t.npz", **{name: arrays[name] for name in order})
            refused(run("train", tmp_path / "t.npz", *QUICK, *options), f"two arrays give a column '{block}[0]'")
    # not read, so no column
    assert run("train", tmp_path / "t.npz", *QUICK)[0] == 0


@pytest.mark.parametrize("option", ["--drop", "--categorical"])
def test_the_target_is_no_column_to_drop(run, written, option):
    refused(run("train", written(TABLE), "--target", "y", *QUICK, option, "a,y"), f"{option} y: this is the target")


def test_a_column_is_dropped_or_encoded(run, written):
    path = written("b," + "\n1,".join(TABLE.splitlines()) + "\n")
    options = ["--drop", "b", "--categorical", "b"]
    refused(run("train", path, "--target", "y", *QUICK, *options), "both --categorical and --drop name 'b'")


# encodings


def program(*arguments, folder):
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "fastdl", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=120)


def test_answers_that_the_terminal_cannot_show(model):
    done = program("predict", "net", "t.csv", folder=model.parent)
    assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (1, b"", 1)
    assert b"has no '\\xf6' of the class names; name a file with --out, or set PYTHONIOENCODING=utf-8" in done.stderr
    assert program("predict", "net", "t.csv", "--out", "p.csv", folder=model.parent).returncode == 0
    assert set((model.parent / "p.csv").read_text("utf-8").split()[1].split(",")[0]) <= set("süßbö")


def test_names_of_files_that_the_terminal_cannot_show(written):
    path = written(TABLE, "tü.csv")
    options = ["--target", "y", "--epochs", "1", "--no-baseline", "--save", "süß"]
    done = program("train", path.name, *options, folder=path.parent)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"data t\\xfc.csv: 40 rows" in done.stdout
    assert b"saved s\\xfc\\xdf" in done.stdout


# sizes


def header(path):
    """Bytes of a safetensors file's header."""
    with open(path, "rb") as file:
        return int.from_bytes(file.read(8), "little")


@pytest.mark.parametrize("letter", ["x", "ß", "€", "𝄞", '"', "\\", "\x01", "\ud800"])
def test_the_size_of_a_description_is_known_before_the_training(tmp_path, monkeypatch, letter):
    def described(length):
        levels = tuple(f"{letter * length}{k}" for k in range(50))
        return Preprocessing("y", "regression", columns=(Column("a"), Column("notes", levels=levels)))

    long, short = described(1000), described(0)
    sizes = []
    for preprocessing in (long, short):
        checkpoint.write(tmp_path / "net", {"w": np.zeros(1)}, {"extra": preprocessing.to_json()})
        sizes.append(header(tmp_path / "net"))
    grown = sizes[0] - sizes[1]
    monkeypatch.setattr(cli.train, "LARGEST_DESCRIPTION", int(1.1 * grown))
    cli.train._check_description(long)
    monkeypatch.setattr(cli.train, "LARGEST_DESCRIPTION", int(0.99 * grown))
    cli.train._check_description(short)
    with pytest.raises(ValueError, match=r"--save: .*3 columns, most text in 'notes'\): leave"):
        cli.train._check_description(long)


def test_too_much_text_is_refused_before_the_training(run, written, tmp_path, monkeypatch):
    def fit(*arguments, **options):
        raise AssertionError("the training has started")

    monkeypatch.setattr(fd.Sequential, "fit", fit)
    monkeypatch.setattr(cli.train, "LARGEST_DESCRIPTION", 1000)
    path = written("t,a,y\n" + "".join(f"{'long' * 20}{k},{k},{k}\n" for k in range(40)))
    refused(run("train", path, "--target", "y", *QUICK, "--save", tmp_path / "net"), "3 columns, most text in 't')")
    assert os.listdir(tmp_path) == ["t.csv"]
    with pytest.raises(AssertionError, match="the training has started"):
        run("train", path, "--target", "y", *QUICK)  # what is not saved may be as long as it likes


@pytest.mark.parametrize(("letter", "most"), [("ß", 2), ("€", 3), ("𝄞", 4), ("\ud800", 7)])
def test_text_is_stored_as_it_stands(tmp_path, letter, most):
    checkpoint.write(tmp_path / "net", {"w": np.zeros(1)}, {"text": letter * 10_000})
    assert header(tmp_path / "net") <= most * 10_000 + 1000
    assert checkpoint.read(tmp_path / "net")[1]["text"] == letter * 10_000


@pytest.fixture
def matrix(tmp_path):
    X = np.random.default_rng(0).standard_normal((2000, 500)).astype(np.float32)  # 4 MB
    np.savez(tmp_path / "t.npz", X=X, y=np.arange(2000) % 2)
    return tmp_path / "t.npz"


def test_the_rows_are_kept_once(run, matrix, monkeypatch):
    kept = {}

    def fit(net, X, *arguments, **options):
        kept["at training"] = tracemalloc.get_traced_memory()[0]
        raise KeyboardInterrupt

    monkeypatch.setattr(fd.Sequential, "fit", fit)
    tracemalloc.start()
    try:
        assert run("train", matrix, *QUICK)[0] == 130
    finally:
        tracemalloc.stop()
    assert 4e6 < kept["at training"] < 5e6  # with a copy of the training rows 7.2 MB


@pytest.mark.parametrize(("pages", "fits"), [(1500, False), (3000, True)])
def test_the_table_and_its_features_are_counted(run, matrix, monkeypatch, pages, fits):
    """4 MB in the file's array and 4 MB in that of the features."""
    monkeypatch.setattr(cli.train.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": pages}.get)
    if fits:
        assert run("train", matrix, *QUICK)[0] == 0
    else:
        refused(run("train", matrix, *QUICK), "need 0.00802 GB; this machine has 0.00614 GB")


# the program itself


def test_version_and_help(run, capsys):
    for arguments, text in ((["--version"], f"fastdl {fd.__version__}\n"), (["train", "--help"], "numpy or cuda")):
        with pytest.raises(SystemExit) as stop:
            run(*arguments)
        assert stop.value.code == 0
        assert text in capsys.readouterr().out


def test_interrupted_while_it_is_imported(tmp_path):
    code = (
        "import runpy, sys, fastdl\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'fastdl.cli':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "runpy.run_module('fastdl', run_name='__main__', alter_sys=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "info"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "fastdl: interrupted\n")
