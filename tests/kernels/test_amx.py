"""Products on AMX tiles, on CPUs without them too: the shipped instructions run under an emulator of them."""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import sys

import pytest

from fastdl.kernels import dispatch

HERE = pathlib.Path(__file__).parent
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")

#: Installs the emulator, takes the tiles without asking the CPU, then runs the lines of a test.
PRELUDE = """
import ctypes, sys
emulator = ctypes.CDLL(sys.argv[1])
assert emulator.install() == 0
import numpy as np
from fastdl.kernels.dense import _cython as dense
dense.use_bfloat16("amx", ask=False)
assert dense.bfloat16_unit() == "amx"
sys.path.insert(0, sys.argv[2])
"""


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    if dispatch.load("cython") != "available":
        pytest.skip("compiled back end: not built")
    from fastdl.kernels.dense import _cython as dense

    if not sys.platform.startswith("linux") or not dense.bfloat16_units():
        pytest.skip("AVX512-BF16, which packs for AMX: absent")
    if COMPILER is None:
        pytest.skip("C compiler: absent")
    library = tmp_path_factory.mktemp("amx") / "emulator.so"
    command = [COMPILER, "-O2", "-mfma", "-shared", "-fPIC", "-o", library, HERE / "amx_emulator.c"]
    subprocess.run(command, check=True)
    return library


def run(emulator: pathlib.Path, lines: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PRELUDE + lines, emulator, HERE]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=600, check=False)


def test_the_tests_of_mixed_precision_pass_on_tiles(emulator: pathlib.Path) -> None:
    lines = """
import pytest
status = pytest.main(["-q", "-p", "no:faulthandler", "-p", "no:cacheprovider", sys.argv[2] + "/test_mixed.py"])
trapped = emulator.tile_instructions()
assert trapped > 100_000 or "amx" in dense.bfloat16_units(), trapped
sys.exit(status)
"""
    done = run(emulator, lines)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


def test_both_units_agree(emulator: pathlib.Path) -> None:
    """The sums of AMX are other chains than those of AVX512-BF16: equal but for float32's rounding, on any edge."""
    lines = """
import test_mixed as mixed
rng = np.random.default_rng(0)
for n, i, o in [*mixed.SHAPES, (15, 16, 17), (16, 15, 16), (17, 1030, 33), (48, 64, 16), (113, 31, 32), (33, 513, 48)]:
    x, w, dy = (rng.standard_normal(s).astype(np.float32) for s in ((n, i), (i, o), (n, o)))
    found = {}
    for unit in ("amx", "avx512_bf16"):
        dense.use_bfloat16(unit, ask=False)
        found[unit] = mixed.three_products(x, w, dy)
        again = mixed.three_products(x, w, dy, threads=2)
        for one, two in zip(found[unit], again):
            np.testing.assert_array_equal(one, two)
    for tiles, vectors, depth in zip(found["amx"], found["avx512_bf16"], (i, o, n, n)):
        np.testing.assert_allclose(tiles, vectors, rtol=0, atol=2.0**-21 * (4 + depth**0.5) * np.abs(vectors).max())
"""
    done = run(emulator, lines)
    assert done.returncode == 0, done.stderr[-3000:]


def test_epilogues(emulator: pathlib.Path) -> None:
    """Bias, the value before the activation, ReLU and a second K block, in whole panels and at their ends."""
    lines = """
import test_mixed as mixed
from fastdl.kernels.engine.panels import pack
rng = np.random.default_rng(1)
for n, i, o in [(64, 32, 64), (70, 1100, 42), (5, 40, 10), (32, 600, 32)]:
    x, w = rng.integers(-3, 4, (n, i)).astype(np.float32), rng.integers(-3, 4, (i, o)).astype(np.float32)
    b = rng.integers(-9, 10, o).astype(np.float32)
    z = x @ w + b
    for bias in (None, b):
        for activation, keep in (("relu", False), ("relu", True), ("tanh", True), ("identity", False)):
            y, kept = pack(np.zeros((n, o), np.float32)), pack(np.zeros((n, o), np.float32)) if keep else None
            mixed.product("dense_forward", pack(x), pack(w), bias, y, kept, activation=activation, alpha=0.0)
            want = z if bias is not None else z - b
            if keep:
                np.testing.assert_array_equal(kept.unpack(), want)
            f = {"relu": lambda v: np.maximum(v, 0), "tanh": np.tanh, "identity": lambda v: v}[activation]
            np.testing.assert_allclose(y.unpack(), f(want), rtol=1e-6)
            assert not y.data[-1, :, (o - 1) % 32 + 1 :].any()
"""
    done = run(emulator, lines)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_emulator_refuses_what_hardware_refuses(emulator: pathlib.Path) -> None:
    """A thread that uses tiles without setting them up ends the process, so the tests above can fail."""
    code = bytes([0xC4, 0xE2, 0x7B, 0x49, 0xC0, 0xC3])  # tilezero tmm0; ret
    lines = f"""
import mmap
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write({code!r})
ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
"""
    done = run(emulator, lines)
    assert done.returncode != 0
    from fastdl.kernels.dense import _cython as dense

    if "amx" not in dense.bfloat16_units():
        assert "tiles are not set up" in done.stderr, done.stderr[-500:]
