"""The engine: no allocation inside epochs, interrupts, import time."""

from __future__ import annotations

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest

import fastdl as fd
from fastdl import layers

CYTHON = fd.backends()["cython"]
needs_cython = pytest.mark.skipif(CYTHON != "available", reason=f"compiled back end: {CYTHON}")

COUNTER = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <stdatomic.h>
static atomic_long calls;
long allocations(void) { return calls; }
extern void* __libc_malloc(size_t);
extern void* __libc_calloc(size_t, size_t);
extern void* __libc_realloc(void*, size_t);
extern void* __libc_memalign(size_t, size_t);
void* malloc(size_t n) { calls++; return __libc_malloc(n); }
void* calloc(size_t n, size_t m) { calls++; return __libc_calloc(n, m); }
void* realloc(void* p, size_t n) { calls++; return __libc_realloc(p, n); }
void* aligned_alloc(size_t a, size_t n) { calls++; return __libc_memalign(a, n); }
int posix_memalign(void** p, size_t a, size_t n) { calls++; *p = __libc_memalign(a, n); return *p == NULL; }
"""

EPOCHS = """
import ctypes, numpy as np, fastdl as fd
from fastdl import layers
count = ctypes.CDLL(None).allocations
count.restype = ctypes.c_long
net = fd.Sequential([layers.Dense(33), layers.BatchNorm(), layers.ReLU(), layers.Dropout(0.5), layers.Dense(20),
                     layers.GELU(), layers.Dense(10)], seed=1)
net.compile("softmax_cross_entropy", fd.optimizers.Adam(clip_norm=1.0), backend="cython", threads={threads})
X, y = np.random.default_rng(0).standard_normal((1000, 17)).astype("f4"), np.arange(1000) % 10
net.fit(X, y, batch_size=32, epochs=1, verbose=0)
(bound,) = [b for k, b in net._runtime.placement._bound.items() if k[0] == "train"]
native = bound.executor.native
spent = []
for steps in (32, 32, 32 * 20):  # the first warms up; an epoch has 32 steps
    before = count()
    for start in range(0, steps, 32):
        native.steps(0, native.count, 1000, 32, 32, start, 1, 0, start, 1e-3, 1.0)
    spent.append(count() - before)
print(*spent)
"""


PREDICTIONS = """
import ctypes, numpy as np, fastdl as fd
from fastdl import layers
count = ctypes.CDLL(None).allocations
count.restype = ctypes.c_long
net = fd.Sequential([layers.Dense(300), layers.BatchNorm(), layers.ReLU(), layers.Dense(10)], seed=1)
net.compile(backend="cython", threads={threads})
x, spent = np.ones((1, 17), "f4"), []
for rows in (10, 1, 2000):
    before = count()
    for _ in range(rows):
        net.predict(x)
    spent.append(count() - before)
print(*spent)
"""


@needs_cython
@pytest.mark.skipif(not sys.platform.startswith("linux") or shutil.which("cc") is None, reason="needs Linux and cc")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("program", [EPOCHS, PREDICTIONS], ids=["epochs", "predictions of a row"])
def test_no_allocation(tmp_path: pathlib.Path, program: str, threads: int) -> None:
    """Small results come from NumPy's own cache: `malloc` is not called for them either."""
    library = tmp_path / "count.so"
    (tmp_path / "count.c").write_text(COUNTER)
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, tmp_path / "count.c"], check=True)
    run = subprocess.run(
        [sys.executable, "-c", program.format(threads=threads)],
        env={**os.environ, "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        check=True,
    )
    _, once, often = map(int, run.stdout.split())
    assert (once, often) == (0, 0), f"mallocs in one and in many: {once}, {often}"


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, as it does not in a process that was started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_interrupt_stops_an_epoch_and_leaves_a_model() -> None:
    """One epoch of some seconds: it ends before its time, and by itself if the signal is lost."""
    rng, rows = np.random.default_rng(0), 40_000
    X, y = rng.standard_normal((rows, 32)).astype("f4"), rng.integers(0, 4, rows)
    net = fd.Sequential([layers.Dense(512), layers.ReLU(), layers.Dense(512), layers.ReLU(), layers.Dense(4)], seed=0)
    net.compile("softmax_cross_entropy", "adam")
    net.train_on_batch(X[:1], y[:1])
    thread = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))

    def train() -> None:
        thread.start()
        net.fit(X, y, batch_size=1, epochs=1, verbose=0)

    with pytest.raises(KeyboardInterrupt):
        train()
    thread.join()
    assert net.step < rows
    assert np.isfinite(net.predict(X[:10])).all()
    before = net.step
    net.fit(X[:640], y[:640], batch_size=64, epochs=1, verbose=0)
    assert net.step == before + 10


def test_import_adds_little_to_numpy() -> None:
    """At most 0.10 s on a machine at rest; what is tested is that nothing heavy is imported."""
    heavy = ("numba", "llvmlite", "tqdm", "safetensors", "threadpoolctl")
    code = f"import sys, fastdl; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@needs_cython
def test_simd_level_from_the_environment() -> None:
    code = "import fastdl; from fastdl.kernels.common import simd; print(simd.level())"
    for level in ("portable", "avx2"):
        run = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "FASTDL_SIMD": level}, capture_output=True, text=True
        )
        assert run.stdout.strip() == level or "this CPU runs" in run.stderr
    run = subprocess.run(
        [sys.executable, "-c", "import fastdl as fd; fd.backends()"],
        env={**os.environ, "FASTDL_SIMD": "mmx"},
        capture_output=True,
        text=True,
    )
    assert "portable" in run.stderr
