"""The command line, run in this process; one test starts it as a program."""

import csv
import hashlib
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

import fastdl as fd
from fastdl.cli import info

README = pathlib.Path(__file__).resolve().parents[2] / "README.md"
RESULTS = ("test accuracy", "test r2", "seconds", "ratio to the numpy back end", "weights sha256")
QUICK = ["--epochs", "2", "--layers", "16", "--no-baseline"]


@pytest.fixture
def flowers(tmp_path):
    """A separable table with numbers, a category and text classes."""
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 3, 300)
    path = tmp_path / "flowers.csv"
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["length", "width", "colour", "constant", "kind"])
        for kind in kinds:
            colour = "blue" if kind == 2 else rng.choice(["red", "white"])
            writer.writerow([f"{rng.normal(5 * kind, 1):.3f}", f"{rng.normal(100, 30):.3f}", colour, 7, "abc"[kind]])
    return path


@pytest.fixture
def slope(tmp_path):
    """A line to regress, far from standard scale."""
    rng = np.random.default_rng(1)
    X = rng.normal(50, 10, (400, 3))
    path = tmp_path / "slope.npz"
    np.savez(path, X=X, y=1e4 + 200 * X[:, 0] - 50 * X[:, 2])
    return path


def results(stdout):
    """Result lines by name, in order."""
    return dict(re.findall(rf"^({'|'.join(RESULTS)}) (\S+)$", stdout, re.M))


# train


def test_digits_reach_their_accuracy(run):
    status, stdout, _ = run("train", "digits", "--no-baseline")
    assert status == 0
    found = results(stdout)
    assert list(found) == ["test accuracy", "seconds", "weights sha256"]
    assert float(found["test accuracy"]) >= 0.96  # one seed; the median of seeds 0 to 4 is at least 0.97
    assert re.fullmatch("[0-9a-f]{64}", found["weights sha256"])
    assert "1,797 rows, 64 features, 10 classes; 359 rows held out" in stdout
    assert re.search(r"^back end \w+, \d+ thread", stdout, re.M)


def test_ratio_to_numpy(run):
    compiled = next((name for name in ("cython", "numba") if fd.backends()[name] == "available"), None)
    if compiled is None:
        pytest.skip("only the numpy back end is here")
    status, stdout, _ = run("train", "digits", *QUICK[:-1], "--quiet", "--backend", compiled)
    assert status == 0
    assert [line.rsplit(" ", 1)[0] for line in stdout.splitlines()] == [
        "test accuracy",
        "seconds",
        "ratio to the numpy back end",
        "weights sha256",
    ]
    assert float(results(stdout)["ratio to the numpy back end"]) > 0


def test_numpy_has_no_ratio_to_itself(run):
    status, stdout, _ = run("train", "digits", *QUICK[:-1], "--quiet", "--backend", "numpy")
    assert status == 0
    assert list(results(stdout)) == ["test accuracy", "seconds", "weights sha256"]


def test_seed_decides_the_weights(run):
    def sha(seed):
        return results(run("train", "digits", *QUICK, "--seed", seed)[1])["weights sha256"]

    assert sha(3) == sha(3)
    assert sha(3) != sha(4)


def test_sha_is_of_the_plain_weights(run, tmp_path):
    path = tmp_path / "net.safetensors"
    _, stdout, _ = run("train", "digits", *QUICK, "--save", path)
    weights = fd.load(path).weights
    sha = hashlib.sha256()
    for name in sorted(weights):
        assert weights[name].dtype == np.float32
        sha.update(weights[name].tobytes())
    assert results(stdout)["weights sha256"] == sha.hexdigest()


@pytest.mark.parametrize(
    "options",
    [
        ["--layers", "", "--optimizer", "sgd"],
        ["--layers", "8,8", "--activation", "gelu", "--dropout", "0", "--optimizer", "adamw"],
        ["--dtype", "float64", "--backend", "numpy", "--threads", "1", "--batch-size", "1000", "--lr", "0.01"],
    ],
)
def test_options(run, options):
    status, stdout, stderr = run("train", "digits", *QUICK, *options)
    assert status == 0, stderr
    assert "test accuracy" in results(stdout)


def test_classes_from_csv_and_predict(run, flowers, tmp_path):
    model, out = tmp_path / "net.safetensors", tmp_path / "out.csv"
    options = ["--epochs", "30", "--layers", "16", "--no-baseline", "--save", model]
    status, stdout, stderr = run("train", flowers, "--target", "kind", *options)
    assert status == 0, stderr
    assert float(results(stdout)["test accuracy"]) > 0.9
    assert f"saved {model}" in stdout
    assert "300 rows, 6 features, 3 classes; 60 rows held out" in stdout

    status, stdout, _ = run("predict", model, flowers)
    lines = stdout.splitlines()
    assert (status, lines[0], len(lines)) == (0, "prediction,probability", 301)
    with open(flowers, encoding="utf-8") as file:
        truth = [row["kind"] for row in csv.DictReader(file)]
    right = [line.split(",")[0] == kind for line, kind in zip(lines[1:], truth, strict=True)]
    assert np.mean(right) > 0.9
    assert all(1 / 3 <= float(line.split(",")[1]) <= 1 for line in lines[1:])

    assert run("predict", model, flowers, "--out", out)[0] == 0
    assert out.read_text(encoding="utf-8") == stdout
    out = out.with_suffix(".npz")
    assert run("predict", model, flowers, "--out", out)[0] == 0
    with np.load(out) as arrays:
        assert arrays["prediction"].tolist() == [line.split(",")[0] for line in lines[1:]]


def test_regression_from_npz_and_predict(run, slope, tmp_path):
    model = tmp_path / "net.safetensors"
    options = ["--epochs", "60", "--layers", "32", "--dropout", "0", "--no-baseline", "--save", model]
    status, stdout, stderr = run("train", slope, *options)
    assert status == 0, stderr
    assert float(results(stdout)["test r2"]) > 0.9
    status, stdout, _ = run("predict", model, slope)
    assert status == 0
    predicted = np.array([float(line) for line in stdout.splitlines()[1:]])
    with np.load(slope) as arrays:
        assert np.corrcoef(predicted, arrays["y"])[0, 1] > 0.95
        assert abs(predicted.mean() - arrays["y"].mean()) < 0.2 * arrays["y"].std()


def test_saved_digits_predict_from_grey_values(run, tmp_path):
    model, images = tmp_path / "net.safetensors", tmp_path / "images.npz"
    run("train", "digits", "--epochs", "10", "--no-baseline", "--save", model)
    X, y = fd.data.load_digits()
    np.savez(images, X=(X[:50] * 16).astype(np.uint8).reshape(50, 8, 8))
    status, stdout, _ = run("predict", model, images)
    assert status == 0
    assert np.mean([int(line.split(",")[0]) for line in stdout.splitlines()[1:]] == y[:50]) > 0.9


# mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "absent.csv", "--target", "x"], "absent.csv: No such file"),
        (
            ["train", "{flowers}", "--target", "size"],
            "no column 'size'; columns: length, width, colour, constant, kind",
        ),
        (["train", "{flowers}"], "with --target; columns: length, width"),
        (["train", "{flowers}", "--target", "kind", "--task", "regression"], "a regression needs numbers"),
        (["train", "{slope}", "--target", "z"], "no array 'z'; arrays: X, y"),
        (["train", "digits", "--target", "x"], "for files"),
        (["train", "digits", "--optimizer", "adagrad"], "unknown optimizer 'adagrad', known: adam, adamw, sgd"),
        (["train", "digits", "--activation", "step"], "relu"),
        (["train", "digits", "--backend", "tpu"], "unknown back end 'tpu', known: auto, cython, numba, numpy"),
        (["train", "digits", "--dropout", "1.5"], "1.5"),
        (["train", "digits", "--lr", "-1"], "-1"),
        (["train", "digits", "--epochs", "0"], "epochs"),
        (["train", "digits", "--seed", "-1"], "seed"),
        (["train", "digits", "--save", "{folder}/absent/net"], "the folder does not exist"),
        (["predict", "{folder}/absent", "{flowers}"], "No such file"),
        (["predict", "{flowers}", "{flowers}"], "not a safetensors file"),
    ],
)
def test_one_line_for_a_mistake(run, flowers, slope, tmp_path, arguments, message):
    filled = [argument.format(flowers=flowers, slope=slope, folder=tmp_path) for argument in arguments]
    status, _, stderr = run(*filled)
    assert status == 1
    assert stderr.startswith("fastdl: ")
    assert message in stderr
    assert len(stderr.splitlines()) == 1


def test_missing_value_names_row_and_column(run, flowers):
    lines = flowers.read_text(encoding="utf-8").splitlines()
    lines[5] = lines[5].replace(lines[5].split(",")[1], "")
    flowers.write_text("\n".join(lines), encoding="utf-8")
    status, _, stderr = run("train", flowers, "--target", "kind")
    assert status == 1
    assert "row 5, column 'width': missing value" in stderr


def test_model_of_python_has_no_preprocessing(run, flowers, tmp_path):
    net = fd.Sequential([fd.layers.Dense(2)])
    net.compile(loss="mse")
    net.build(3)
    net.save(tmp_path / "net")
    status, _, stderr = run("predict", tmp_path / "net", flowers)
    assert status == 1
    assert "without preprocessing" in stderr


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["train"],
        ["train", "digits", "--layers", "12,x"],
        ["train", "digits", "--layers", "0"],
        ["train", "digits", "--threads", "0"],
        ["train", "digits", "--test-fraction", "1"],
        ["train", "digits", "--dtype", "float16"],
    ],
)
def test_wrong_command_line(run, capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_interrupt(run, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(fd.Sequential, "fit", interrupt)
    assert run("train", "digits")[::2] == (130, "fastdl: interrupted\n")


# info


def test_info(run, monkeypatch):
    monkeypatch.setenv("FASTDL_NUM_THREADS", "3")
    status, stdout, _ = run("info")
    assert status == 0
    assert stdout.startswith(f"fastdl {fd.__version__}, Python ")
    assert "threads at most 3 (FASTDL_NUM_THREADS)" in stdout
    for name, state in fd.backends().items():
        assert f"  {name}: {state}\n" in stdout
    if fd.backends()["cython"] == "available":
        assert re.search(r"^SIMD level (portable|avx2|avx512) \(this CPU runs portable", stdout, re.M)


def test_as_a_program(tmp_path):
    command = [sys.executable, "-m", "fastdl", "info", "--ops"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "| `dense` (forward, backward input, backward weights) | " in done.stdout


def test_readme_holds_the_table_of_ops():
    if any(state != "available" for name, state in fd.backends().items() if name != "cuda"):
        pytest.skip("the table is that of a full installation")
    between = README.read_text(encoding="utf-8").partition(info.OPS_BEGIN)[2].partition(info.OPS_END)[0]
    assert between.strip() == info.ops_table(), "run: python -m fastdl info --ops --into README.md"


def test_table_of_ops_into_a_file(run, tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"before\n{info.OPS_BEGIN}\nold\n{info.OPS_END}\nafter\n", encoding="utf-8")
    for _ in range(2):
        assert run("info", "--ops", "--into", path)[0] == 0
    expected = f"before\n{info.OPS_BEGIN}\n{info.ops_table()}\n{info.OPS_END}\nafter\n"
    assert path.read_text(encoding="utf-8") == expected
    path.write_text("no markers", encoding="utf-8")
    status, _, stderr = run("info", "--ops", "--into", path)
    assert status == 1
    assert "expected the markers" in stderr
    assert path.read_text(encoding="utf-8") == "no markers"


def test_readme_example_runs(capsys):
    example = README.read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    exec(compile(example, str(README), "exec"), {})
    assert float(capsys.readouterr().out.split()[-1]) > 0.95
