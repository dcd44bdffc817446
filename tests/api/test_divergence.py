"""A training that diverges is told in one line; no warning of NumPy, no net of NaN in the place of a good one."""

import subprocess
import sys

import numpy as np
import pytest

import fastdl as fd
from fastdl.data.preprocessing import Column, Preprocessing

BACKENDS = [name for name in ("numpy", "cython") if fd.backends()[name] == "available"]
WILD = ["--lr", "1e30", "--optimizer", "sgd", "--epochs", "4", "--quiet"]


@pytest.fixture
def slope(tmp_path):
    X = np.random.default_rng(0).standard_normal((400, 8))
    np.savez(tmp_path / "slope.npz", X=X, y=X.sum(axis=1))
    return tmp_path / "slope.npz"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kernels", BACKENDS)
def test_divergence_is_told_and_not_saved(run, slope, tmp_path, kernels):
    model = tmp_path / "net"
    model.write_text("a good net")
    status, stdout, stderr = run("train", slope, *WILD, "--backend", kernels, "--save", model)
    assert (status, stdout) == (1, "")
    assert stderr == (
        "fastdl: the training diverged (the loss of epoch 1 is nan); try a --lr smaller than 1e+30; "
        f"{model} is not written\n"
    )
    assert model.read_text() == "a good net"


@pytest.mark.filterwarnings("error")
def test_the_last_step_alone(run, slope):
    """One step: the loss is that of the weights before it."""
    once = ["--epochs", "1", "--batch-size", "400", "--lr", "1e38", "--optimizer", "sgd", "--layers", "", "--dtype"]
    large = slope.with_name("large.npz")
    with np.load(slope) as arrays:
        np.savez(large, X=np.repeat(arrays["X"][:, :1], 8, axis=1) * [[1e8]] + 1, y=arrays["y"])
    status, stdout, stderr = run("train", large, *once, "float32", "--backend", "numpy", "--quiet")
    assert (status, stdout) == (1, "")
    assert "the training diverged (the weights after epoch 1 are not finite)" in stderr


@pytest.mark.skipif("cython" not in BACKENDS, reason="the compiled back end is not built")
def test_the_baseline_warns_of_nothing(slope):
    """The net trains; the baseline, a program of its own on NumPy, may run away and must not end in a traceback."""
    code = (
        "import numpy as np, sys, fastdl as fd\n"
        "from fastdl import cli\n"
        "from fastdl.cli import train\n"
        "honest = train._net\n"
        "def net(options, problem, backend, threads):\n"
        "    built = honest(options, problem, backend, threads)\n"
        "    if backend == 'numpy':\n"
        "        built.lr = 1e30\n"
        "    return built\n"
        "train._net = net\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    quick = ["train", str(slope), "--epochs", "2", "--quiet", "--optimizer", "sgd", "--backend", "cython"]
    done = subprocess.run([sys.executable, "-W", "error", "-c", code, *quick], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "ratio to the numpy back end" in done.stdout


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_net_that_is_not_finite_is_blamed_not_the_rows(run, written, tmp_path, value):
    net = fd.Sequential([fd.layers.Dense(3), fd.layers.ReLU(), fd.layers.Dense(1)]).compile("mse").build(1)
    net.weights["dense_1/bias"] = np.full(1, value, np.float32)
    net.save(
        tmp_path / "net", extra={"preprocessing": Preprocessing("y", "regression", columns=(Column("a"),)).to_json()}
    )
    status, stdout, stderr = run("predict", tmp_path / "net", written("a\n1\n2\n"))
    assert (status, stdout) == (1, "")
    assert stderr.startswith(f"fastdl: {tmp_path / 'net'}: weights that are not finite (dense_1/bias): the training")
    assert stderr.count("\n") == 1
