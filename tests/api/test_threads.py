"""Any number of Python threads, any number of a team's threads, stacks of any size that Python allows."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

import fastdl as fd
from api.nets import BACKENDS
from fastdl import layers

needs_cython = pytest.mark.skipif("cython" not in BACKENDS, reason="the compiled back end is not built")
needs_numba = pytest.mark.skipif("numba" not in BACKENDS, reason="numba is not available")


@pytest.mark.parametrize("name", BACKENDS)
def test_two_python_threads_train_two_nets(name: str) -> None:
    results: dict[int, np.ndarray] = {}

    def train(k: int) -> None:
        rng = np.random.default_rng(k)
        net = fd.Sequential([layers.Dense(40), layers.BatchNorm(), layers.ReLU(), layers.Dense(3)], seed=k)
        net.compile("softmax_cross_entropy", "adam", backend=name, threads=2)
        X, y = rng.standard_normal((500, 20)), rng.integers(0, 3, 500)
        net.fit(X, y, batch_size=50, epochs=5, verbose=0)
        results[k] = net.weights["dense_0/kernel"].copy()

    for k in (1, 2):
        train(k)
    alone = dict(results)
    team = [threading.Thread(target=train, args=(k,)) for k in (1, 2)]
    for thread in team:
        thread.start()
    for thread in team:
        thread.join()
    for k in (1, 2):
        np.testing.assert_array_equal(results[k], alone[k])


def run(code: str, *arguments: object, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=250,
    )
    return done.stdout.strip() if done.returncode == 0 else f"status {done.returncode}: {done.stderr}"


LAYERS = """
import threading, numpy as np, fastdl as fd, numba
from fastdl import layers
X, y = np.random.default_rng(0).standard_normal((2048, 128)).astype("f4"), np.arange(2048) % 3
done = []

def work():
    net = fd.Sequential([layers.Dense(256), layers.ReLU(), layers.Dropout(0.1), layers.Dense(3)], seed=1)
    net.compile("softmax_cross_entropy", backend="numba", threads=2).fit(X, y, 1024, epochs=30, verbose=0)
    for _ in range(50):
        fd.ops.relu_forward(X, backend="numba", threads=2)
    done.append(float(net.weights["dense_0/kernel"].sum()))

team = [threading.Thread(target=work) for _ in range(3)]
[thread.start() for thread in team]
[thread.join() for thread in team]
print(numba.threading_layer(), len(set(done)), len(done))
"""


@needs_numba
@pytest.mark.parametrize("layer", ["workqueue", "omp"])
def test_python_threads_share_numbas_pool(layer: str) -> None:
    """The workqueue layer ends the process when two threads are in a parallel region: one at a time enters it."""
    text = run(LAYERS, NUMBA_THREADING_LAYER=layer, NUMBA_NUM_THREADS="2")
    if layer == "omp" and "No threading layer" in text:
        pytest.skip("Numba has no OpenMP here")
    assert text == f"{layer} 1 3"


ALONE = """
import sys, numpy as np, fastdl as fd
from numba.np.ufunc import parallel
x = np.ones((256, 256), "f4")
index, out = np.arange(256), np.empty_like(x)
from fastdl.kernels import dispatch
for threads in map(int, sys.argv[1]):
    fd.ops.dropout_forward(x, 0.5, 1, backend="numba", threads=threads)
    dispatch.run("gather_rows", x, index, out, backend="numba", threads=threads)
print(parallel._is_initialized)
"""


@needs_numba
def test_one_thread_never_enters_numbas_pool(tmp_path: object) -> None:
    """Nor does it find parallel code in the disk cache, where Numba tells kernels apart by their source alone."""
    folder = {"NUMBA_CACHE_DIR": str(tmp_path)}
    assert run(ALONE, 2, **folder) == "True"
    assert run(ALONE, 1, **folder) == "False"
    assert run(ALONE, 1, **folder) == "False"


CREWS = """
import os, sys, threading, time, numpy as np, fastdl as fd
from fastdl import layers
X, y = np.random.default_rng(0).standard_normal((1024, 64)).astype("f4"), np.arange(1024) % 3
count = lambda: len(os.listdir("/proc/self/task"))

def weights(threads):
    net = fd.Sequential([layers.Dense(256), layers.BatchNorm(), layers.ReLU(), layers.Dense(3)], seed=1)
    net.compile("softmax_cross_entropy", backend="cython", threads=threads).fit(X, y, 128, verbose=0)
    return net.get_state()["dense_0/kernel"].tobytes()

digests, before = {weights(1)}, count()
for threads in (2, 3, 4, 5, 6, 8, 3, 2):
    digests.add(weights(threads))
one = count() - before
team = [threading.Thread(target=lambda: digests.add(weights(4))) for _ in range(2)]
[thread.start() for thread in team]
[thread.join() for thread in team]
end = time.monotonic() + 30
while count() - before > 7 + 3 and time.monotonic() < end:
    time.sleep(0.01)  # a thread that was joined may take a moment to go
print(one, count() - before, len(digests))
"""


@needs_cython
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted by Linux")
def test_a_crew_is_as_large_as_the_largest_team() -> None:
    """Teams of 2 to 8 threads leave 7 members; callers at once have crews of their own; the bits are those of one."""
    assert run(CREWS) == "7 10 1"


STACKS = """
import sys, threading, numpy as np, fastdl as fd
from fastdl import layers
backend, kilobytes, threads, dtype = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]

def work():
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((700, 600)).astype(dtype), np.arange(700) % 10
    stack = [layers.Dense(700), layers.BatchNorm(), layers.GELU(), layers.Dropout(0.1), layers.Dense(10)]
    net = fd.Sequential(stack, seed=1)
    net.compile("softmax_cross_entropy", "adam", backend=backend, threads=threads, dtype=dtype)
    net.fit(X, y, 256, verbose=0)
    net.predict(X)
    wide = np.ones((3, 5000), dtype)
    ones = [np.ones(5000, dtype) for _ in range(4)]
    for activation in ("identity", "relu", "gelu"):
        y, ctx = fd.ops.batchnorm_forward(wide, *ones, activation=activation, backend=backend, threads=threads)
        fd.ops.batchnorm_backward(y, ctx)
        fd.ops.batchnorm_forward(wide, *ones, training=False, activation=activation, backend=backend, threads=threads)
    fd.ops.softmax_forward(X, backend=backend, threads=threads)
    fd.ops.dropout_forward(X, 0.5, 1, backend=backend, threads=threads)
    print("done")

threading.stack_size(kilobytes << 10)
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "numba"])
def test_a_stack_of_128_kilobytes_is_enough(name: str, dtype: str) -> None:
    """musl gives threads 128 KB. (Numba compiles on the caller's stack, and LLVM needs more.)"""
    assert run(STACKS, name, 128, 2, dtype) == "done"
