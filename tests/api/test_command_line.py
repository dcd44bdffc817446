"""The command line: what training accepts, predict accepts; a mistake is one line, told before the training."""

import csv
import io
import os
import subprocess
import sys

import numpy as np
import pytest

import fastdl as fd
from fastdl import cli, data
from fastdl.data.preprocessing import Column, Preprocessing

QUICK = ["--epochs", "1", "--layers", "4", "--no-baseline", "--quiet"]
LABELS = ["p", "q"] * 20


@pytest.fixture
def no_training(monkeypatch):
    """Everything is told before a training starts."""

    def fit(*arguments, **options):
        raise AssertionError("the training has started")

    monkeypatch.setattr(fd.Sequential, "fit", fit)


def lines(*columns):
    return "".join(",".join(map(str, row)) + "\n" for row in zip(*columns, strict=True))


def program(command, **options):
    """A command of the shell; ``fastdl`` stands for the program."""
    if command.startswith("fastdl "):
        command = command.replace("fastdl ", f"{sys.executable} -m fastdl ", 1)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, env=buffered, **options)


# what training accepts, predict accepts


N = range(40)
ACCEPTED = {
    "numbered columns": "0,1,y\n" + lines(N, N, LABELS),
    "numbered columns and an index": ",0,1,y\n" + lines(N, N, N, LABELS),
    "row names of R": '"","a","y"\n' + lines([f'"car {k}"' for k in N], N, LABELS),
    "blank first lines": "\n , \n\na,y\n" + lines(N, LABELS),
    "blank before quotes": '"a", "y"\n' + lines(N, [f' "{label}"' for label in LABELS]),
    "thousands": "a,y\n" + lines([f'"{1000 + k:,}"' for k in N], LABELS),
    "decimal commas": "a,y\n" + lines([f'"{k},5"' for k in N], LABELS),
    "currencies and units": "a,b,y\n" + lines([f"${k}.50" for k in N], [f"{k} kg" for k in N], LABELS),
    "categories": "a,b,y\n" + lines(N, ["x y", "_1", "1_a", "1-2"] * 10, LABELS),
    "text of many values": "a,b,y\n" + lines(N, [f"2021-{k}-01" for k in N], LABELS),
    "a long cell": "a,b,y\n" + lines(N, ["x" * 300_000, *["short"] * 39], LABELS),
    "names of classes": "a,y\n" + lines(N, ["007", "1.10", "1e3", "1_1", "11"] * 8),
}


@pytest.mark.parametrize("kind", ACCEPTED)
def test_what_training_accepts(run, written, tmp_path, kind):
    path, model = written(ACCEPTED[kind]), tmp_path / "net"
    task = ["--task", "classification"]
    status, _, stderr = run("train", path, "--target", "y", *task, *QUICK, "--save", model)
    assert status == 0, stderr
    assert all(line.startswith("fastdl: note: ") for line in stderr.splitlines())
    status, stdout, told = run("predict", model, path)
    assert status == 0, told
    answers = [row["prediction"] for row in csv.DictReader(io.StringIO(stdout, newline=""))]
    assert len(answers) == 40
    assert set(answers) <= {row.rsplit(",", 1)[-1].strip().strip('"') for row in ACCEPTED[kind].splitlines()}
    if "index" in kind or "row names" in kind:  # said each time
        index = "the first column has no name and numbers or names the rows: left out"
        assert stderr == told == f"fastdl: note: {path}: {index}\n"
    if kind in ("thousands", "decimal commas", "currencies and units"):
        assert stderr.count("are read as numbers: a (") == len(stderr.splitlines()) == 1
    # one row, without the target
    longest = csv.field_size_limit(2**20)
    rows = list(csv.reader(io.StringIO(ACCEPTED[kind], newline=""), skipinitialspace=True))
    csv.field_size_limit(longest)
    first = next(k for k, row in enumerate(rows) if any(cell.strip() for cell in row))
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(row[:-1] for row in rows[first : first + 2])
    status, one, stderr = run("predict", model, path)
    assert (status, one.splitlines()) == (0, stdout.splitlines()[:2]), stderr


def test_the_digits_are_a_table(run, tmp_path):
    run("train", "digits", "--epochs", "8", "--no-baseline", "--quiet", "--save", tmp_path / "net")
    status, stdout, _ = run("predict", tmp_path / "net", "digits")
    assert status == 0
    answers = [int(line.split(",")[0]) for line in stdout.splitlines()[1:]]
    assert np.mean(answers == data.load_digits()[1]) > 0.9


def test_model_files_of_older_versions(run, written, tmp_path):
    old = {
        "target": "y",
        "task": "classification",
        "classes": [7, 10],
        "mean": 0.0,
        "std": 1.0,
        "columns": [{"name": "a", "mean": 1.0, "std": 2.0, "levels": None}],
    }
    net = fd.Sequential([fd.layers.Dense(2)]).compile("softmax_cross_entropy").build(1)
    net.save(tmp_path / "net", extra={"preprocessing": old})
    status, stdout, _ = run("predict", tmp_path / "net", written("a\n1\n3\n"))
    assert status == 0
    assert {line.split(",")[0] for line in stdout.splitlines()[1:]} <= {"7", "10"}


# answers


def test_all_digits_of_an_answer(run, written, tmp_path):
    path = written("a,price\n" + lines([k / 10 for k in N], [12345678 + k / 8 for k in N]))
    model, options = tmp_path / "net", ["--epochs", "30", "--layers", "", "--dtype", "float64", "--no-baseline"]
    assert run("train", path, "--target", "price", *options, "--save", model)[0] == 0
    net = fd.load(model)
    preprocessing = Preprocessing.from_json(net.extra["preprocessing"])
    expected = preprocessing.answers(net.predict(preprocessing.features(data.read_table(path), np.float64)))
    stdout = run("predict", model, path)[1]
    assert [float(line) for line in stdout.splitlines()[1:]] == expected.tolist()
    assert len(set(expected)) == 40


@pytest.mark.parametrize("name", ["p.npz", "P.NPZ", "q.csv", "q.CSV", "plain", "sub.dir"])
def test_the_file_named_is_the_file_made(run, tmp_path, name):
    X = np.linspace(0, 1, 40)[:, None]
    labels = np.tile(np.array([1, 2], np.int16), 20)
    folder = tmp_path / "out"
    folder.mkdir()
    np.savez(tmp_path / "t.npz", X=X, y=labels)
    run("train", tmp_path / "t.npz", *QUICK, "--save", tmp_path / "net")
    assert run("predict", tmp_path / "net", tmp_path / "t.npz", "--out", folder / name)[:2] == (0, "")
    assert os.listdir(folder) == [name]
    if name.lower().endswith(".npz"):
        with np.load(folder / name, allow_pickle=False) as answers:
            assert answers["prediction"].dtype == labels.dtype


def test_text_answers_in_an_archive(run, written, tmp_path):
    path = written("a,y\n" + lines(N, ["007", "süß"] * 20))
    run("train", path, "--target", "y", "--task", "classification", *QUICK, "--save", tmp_path / "net")
    assert run("predict", tmp_path / "net", path, "--out", tmp_path / "p.npz")[0] == 0
    with np.load(tmp_path / "p.npz", allow_pickle=False) as answers:
        assert set(answers["prediction"].tolist()) <= {"007", "süß"}


# mistakes


def one_line(status, stdout, stderr):
    return status == 1 and not stdout and stderr.startswith("fastdl: ") and stderr.count("\n") == 1


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    "options",
    [
        ["--layers", "10000000000"],
        ["--layers", "1099511627776,1099511627776"],
        ["--epochs", "99999999999999999999"],
        ["--epochs", "0"],
        ["--batch-size", "0"],
        ["--batch-size", "-9999999999999999999999"],
        ["--seed", "18446744073709551616"],
        ["--lr", "nan"],
        ["--dropout", "nan"],
        ["--dropout", "2"],
    ],
)
def test_absurd_options(run, monkeypatch, options):
    if options[1] == "0" or options[0] == "--batch-size":
        monkeypatch.undo()  # fit itself says it, before its first step
    assert one_line(*run("train", "digits", "--quiet", "--no-baseline", *options))


@pytest.mark.parametrize(
    "option",
    [
        *("--threads=99999999999", "--threads=2147483648", "--threads=²", "--threads=1_0", "--threads=" + "9" * 5000),
        *("--layers=99999999999999", "--layers=" + "9" * 5000, "--epochs=" + "9" * 5000, "--test-fraction=nan"),
    ],
)
def test_options_that_no_machine_has(run, option, capsys):
    with pytest.raises(SystemExit) as stop:
        run("train", "digits", option)
    assert stop.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.usefixtures("no_training")
def test_more_than_the_memory_of_the_machine(run, written, monkeypatch):
    """Told by arithmetic: a system may promise memory that it does not have, and kill the process later."""
    monkeypatch.setattr(cli.train.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}.get)  # 4 MB
    status, stdout, stderr = run("train", "digits", "--quiet", "--layers", "10000")
    assert one_line(status, stdout, stderr)
    assert "1,797 rows of 64 features, beside the table" in stderr
    assert "7.4e+05 weights with gradients and moments, need 0.0123 GB" in stderr
    rows = written("a,y\n" + lines([f"x{k % 900}" for k in range(1800)], LABELS * 45))
    status, stdout, stderr = run("train", rows, "--target", "y", *QUICK)
    assert one_line(status, stdout, stderr)
    assert "1,800 rows of 900 features" in stderr


@pytest.mark.parametrize("variable", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"])
def test_a_launcher_is_noticed(run, monkeypatch, variable):
    """`mpiexec -n 2` starts the command twice, and nothing is shared."""
    quick = ("train", "digits", "--epochs", "1", "--quiet", "--no-baseline")
    for count in ("1", "", "x"):
        monkeypatch.setenv(variable, count)
        assert run(*quick)[2] == ""
    monkeypatch.setenv(variable, "2")
    status, _, stderr = run(*quick)
    assert (status, len(stderr.splitlines())) == (0, 1)
    assert "a launcher has started 2 copies of this command" in stderr


@pytest.mark.usefixtures("no_training")
def test_batches_of_one_row_and_batch_norm(run, written):
    status, stdout, stderr = run("train", "digits", "--batch-size", "1", "--quiet")
    assert one_line(status, stdout, stderr)
    assert "batches of one row: the batch norm" in stderr
    two = written("a,y\n1,1.5\n2,2.5\n")  # one row is held out
    assert "batches of one row: the batch norm" in run("train", two, "--target", "y", "--quiet")[2]


def test_batches_of_one_row_without_batch_norm(run, written):
    assert (
        run("train", "digits", "--batch-size", "1", "--layers", "", "--epochs", "1", "--quiet", "--no-baseline")[0] == 0
    )
    # 65 rows of training: the last batch of 64 has one
    last_of_one = written("a,y\n" + lines(range(81), [*LABELS, *LABELS, "p"]))
    status, stdout, _ = run("train", last_of_one, "--target", "y", *QUICK)
    assert (status, "nan" in stdout) == (0, False)


@pytest.mark.parametrize("command", ["train t.csv --target y", "predict net t.csv"])
def test_no_memory(run, monkeypatch, tmp_path, command):
    net = fd.Sequential([fd.layers.Dense(2)]).compile("mse").build(1)
    extra = Preprocessing("y", "classification", ("p", "q"), columns=(Column("a"),)).to_json()
    net.save(tmp_path / "net", extra={"preprocessing": extra})
    monkeypatch.chdir(tmp_path)

    def read_table(*arguments, **options):
        raise MemoryError("Unable to allocate 7.45 GiB")

    monkeypatch.setattr(data, "read_table", read_table)
    assert run(*command.split()) == (1, "", "fastdl: not enough memory; Unable to allocate 7.45 GiB\n")


@pytest.mark.usefixtures("no_training")
def test_where_a_net_cannot_be_saved(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("models")
    os.mkfifo("pipe")
    os.symlink("absent/net", "link")
    for place in ("models", "models/", "new/", "absent/net", "", ".", "a" * 300, "x\n/y", "pipe", "link", "a\0b"):
        assert one_line(*run("train", "digits", "--quiet", "--save", place)), place
    if os.path.isdir("/proc"):
        assert run("train", "digits", "--quiet", "--save", "/proc/net")[2].startswith("fastdl: /proc/net: ")
    assert sorted(os.listdir()) == ["link", "models", "pipe"]
    assert os.listdir("models") == []
    with pytest.raises(AssertionError, match="the training has started"):
        run("train", "digits", "--quiet", "--save", "net")
    assert sorted(os.listdir()) == ["link", "models", "pipe"]  # what was tried is gone


def test_a_net_is_saved_even_if_nobody_reads_on(run, tmp_path, monkeypatch):
    """The training is over when the results are printed, and when the baseline is interrupted."""

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.train, "_score", interrupted)
    assert run("train", "digits", *QUICK, "--save", tmp_path / "net")[0] == 130
    assert len(fd.load(tmp_path / "net").predict(data.load_digits()[0][:3])) == 3


@pytest.mark.parametrize(
    "foreign", ["standard scaler", {"mean": [0.0]}, None, ["a"], 3, {"columns": [{"nome": "a"}], "classes": None}]
)
def test_foreign_preprocessing(run, written, tmp_path, foreign):
    net = fd.Sequential([fd.layers.Dense(1)]).compile("mse").build(1)
    net.save(tmp_path / "net", extra={"preprocessing": foreign})
    status, stdout, stderr = run("predict", tmp_path / "net", written("a\n1\n2\n"))
    assert one_line(status, stdout, stderr)
    assert "no preprocessing that fastdl wrote" in stderr
    assert "fastdl.load(...).predict(X) in Python" in stderr


@pytest.mark.parametrize(("inputs", "outputs"), [(2, 2), (1, 3), (1, 1)])
def test_preprocessing_of_another_net(run, written, tmp_path, inputs, outputs):
    net = fd.Sequential([fd.layers.Dense(outputs)]).compile("mse").build(inputs)
    other = Preprocessing("y", "classification", ("p", "q"), columns=(Column("a"),))
    net.save(tmp_path / "net", extra={"preprocessing": other.to_json()})
    assert one_line(*run("predict", tmp_path / "net", written("a\n1\n2\n")))


@pytest.mark.parametrize("value", ["1e300", "-1e308", "1e25"])
def test_an_absurd_value_is_named(run, written, tmp_path, value):
    train = written("a,b,y\n" + lines(N, N, LABELS))
    run("train", train, "--target", "y", *QUICK, "--save", tmp_path / "net")
    status, stdout, stderr = run("predict", tmp_path / "net", written(f"a,b\n1,1\n2,{value}\n3,3\n", "n.csv"))
    assert one_line(status, stdout, stderr)
    assert "row 2, column 'b'" in stderr


def test_an_answer_that_is_not_finite_is_named(run, written, tmp_path):
    net = fd.Sequential([fd.layers.Dense(1)]).compile("mse").build(3)
    net.weights["dense_0/kernel"] = np.full((3, 1), 1e30, np.float32)
    columns = (Column("c", levels=("x", "y")), Column("a"))
    other = Preprocessing("y", "regression", columns=columns)
    net.save(tmp_path / "net", extra={"preprocessing": other.to_json()})
    status, stdout, stderr = run("predict", tmp_path / "net", written("c,a\nx,1\ny,1e12\n"))
    assert one_line(status, stdout, stderr)
    assert "row 2, column 'a': 1e12 is too far from the training: the net's answer is not finite" in stderr


def test_mistakes_come_without_notices(run, written):
    """One line: what was dropped or read as a number does not matter where nothing is trained."""
    path = written(",a,b,y\n" + lines(N, [f"{k}%" for k in N], ["1.5e308", "-1e308"] * 20, LABELS))
    assert one_line(*run("train", path, "--target", "y", *QUICK))


def test_an_expression_that_is_none(run):
    status, _, stderr = run("cubins", "--only", "(")
    assert status == 1
    assert "--only: no regular expression: '('" in stderr


def test_the_limit_of_cells_is_the_hosts(run, written):
    before = csv.field_size_limit(1234)
    try:
        run("train", written("a\n"), "--target", "a")
        assert csv.field_size_limit() == 1234
    finally:
        csv.field_size_limit(before)


# streams and interpreters


def test_without_docstrings(tmp_path):
    done = program(f"{sys.executable} -OO -m fastdl info", cwd=tmp_path)  # fastdl.__doc__ is None
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_outputs_that_nobody_takes(run, written, tmp_path):
    path = written("a,y\n" + lines(N, LABELS))
    written(",a,y\n" + lines(N, N, LABELS), "i.csv")
    run("train", path, "--target", "y", *QUICK, "--save", tmp_path / "net")
    for command, status, message in (
        ("fastdl predict net t.csv >&-", 1, "fastdl: there is no standard output; name a file with --out\n"),
        ("fastdl predict net t.csv --out p.csv >&- && test -s p.csv", 0, ""),
        ("fastdl predict net t.csv >/dev/full", 1, "fastdl: [Errno 28] No space left on device\n"),
        ("fastdl predict net t.csv --out /dev/full", 1, "fastdl: /dev/full: No space left on device\n"),
        ("fastdl info >/dev/full", 1, "fastdl: [Errno 28] No space left on device\n"),
        ("fastdl predict absent t.csv 2>&-", 1, ""),
        ("fastdl predict absent t.csv 2>/dev/full", 1, ""),
        # a notice that nobody takes
        ("fastdl train i.csv --target y --quiet --no-baseline --save i 2>/dev/full >&- && test -s i", 0, ""),
        ("fastdl train t.csv --target y --quiet --no-baseline --save n <&- >&- 2>&- && test -s n", 0, ""),
    ):
        done = program(command, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (status, ""), command
        assert done.stderr == message, command
    for quiet in ("", "--quiet"):
        command = f"fastdl train t.csv --target y --no-baseline {quiet} --save k | true; test -s k && rm k"
        done = program(command, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
