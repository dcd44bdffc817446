"""Children of a fork work on every back end: after training, while another thread trains, loads or compiles."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from api.nets import BACKENDS

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")

START = """
import os, signal, sys, threading, time, numpy as np, fastdl as fd
from fastdl import layers

rng = np.random.default_rng(0)
X, y = rng.standard_normal((2048, 128)).astype("f4"), rng.integers(0, 3, 2048)  # 1 MB a layer: long enough for threads

def make(backend, threads="auto", norm=False):
    stack = [layers.Dense(256), layers.ReLU(), layers.Dropout(0.1), layers.Dense(3)]
    if norm:
        stack.insert(1, layers.BatchNorm())
    return fd.Sequential(stack, seed=4).compile("softmax_cross_entropy", backend=backend, threads=threads)

def trained(*settings):
    net = make(*settings)
    net.fit(X, y, 1024, epochs=1, verbose=0)
    return net

def child(work):
    pid = os.fork()
    if pid == 0:
        signal.alarm(150)  # a child that hangs is killed
        try:
            os._exit(0 if work() else 3)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(4)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""


def run(code: str, *arguments: str, **variables: str) -> str:
    """What a process of its own prints: libgomp is in this one already."""
    done = subprocess.run(
        [sys.executable, "-c", START + code, *arguments],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=280,
    )
    return done.stdout.strip() if done.returncode == 0 else done.stderr


AFTER = """
backend, threads = sys.argv[1], sys.argv[2] if sys.argv[2] == "auto" else int(sys.argv[2])
net = trained(backend, threads, True)
want = net.predict(X)
alike = lambda got: np.allclose(got, want, atol=1e-4)

def ops():
    kept, _ = fd.ops.dropout_forward(X, 0.5, 1, backend=backend, threads=2)
    fd.ops.softmax_forward(X, backend=backend, threads=2)
    order = fd.random.permutation(1000, 3, backend=backend)
    return (kept == 0).any() and len(set(order.tolist())) == 1000

def go_on():
    net.fit(X, y, 1024, epochs=1, verbose=0)
    return net.step == 4

works = [lambda: alike(net.predict(X)), lambda: alike(trained(backend, threads, True).predict(X)), go_on, ops]
print([child(work) for work in works])
"""


@pytest.mark.parametrize("threads", ["auto", "2"])
@pytest.mark.parametrize("name", BACKENDS)
def test_a_child_forked_after_training_works(name: str, threads: str) -> None:
    """libgomp kills a child that opens a parallel region after its parent has: Numba computes serially there."""
    assert run(AFTER, name, threads) == str([0] * 4)


WHILE = """
backend, done = sys.argv[1], []
net = make(backend, 2)
net.fit(X, y, 1024, epochs=1, verbose=0)

class Until(fd.callbacks.Callback):
    def on_epoch_end(self, epoch, logs):
        self.model.stop_training = bool(done)

trainer = threading.Thread(target=lambda: net.fit(X, y, 1024, epochs=10**6, callbacks=[Until()], verbose=0))
trainer.start()
codes = []
for _ in range(3):
    time.sleep(0.05)
    codes.append(child(lambda: np.isfinite(trained(backend).predict(X)).all() and len(fd.backends()) == 4))
done.append(True)
trainer.join()
print(codes)
"""


@pytest.mark.parametrize("name", BACKENDS)
def test_a_child_forked_while_another_thread_trains_works(name: str) -> None:
    assert run(WHILE, name) == str([0] * 3)


HELD = """
held = threading.Event()

def hold(lock):
    with lock:
        held.set()
        time.sleep(1)

def child_beside(lock, work):
    held.clear()
    thread = threading.Thread(target=hold, args=(lock,))
    thread.start()
    held.wait()
    code = child(work)
    thread.join()
    return code
"""


def test_a_fork_waits_for_a_back_end_that_is_being_loaded() -> None:
    """Half a back end in the child could neither be used nor loaded again."""
    code = """
from fastdl.kernels import dispatch
print(child_beside(dispatch._lock, lambda: fd.backends()["numpy"] == "available"))
"""
    assert run(HELD + code) == "0"


@pytest.mark.skipif("numba" not in BACKENDS, reason="numba is not available")
def test_a_fork_waits_for_a_kernel_that_is_being_compiled() -> None:
    code = """
import numba
from numba.core.compiler_lock import global_compiler_lock
fd.backends()
print(child_beside(global_compiler_lock, lambda: numba.njit(lambda x: x + 1)(1) == 2))
"""
    assert run(HELD + code) == "0"


def test_a_fork_waits_for_a_slice_of_another_thread() -> None:
    """OpenBLAS ends its threads before a fork, and a product that is under way on them would never return."""
    code = """
from fastdl.kernels.common.blas import _libraries, limit_blas
numbers = lambda: {library.get_num_threads() for library in _libraries()}
for library in _libraries():
    library.set_num_threads(3)
left = []

class Slice:
    def __enter__(self):
        self.block = limit_blas(1)
        self.block.__enter__()

    def __exit__(self, *error):
        left.append(numbers())
        self.block.__exit__(*error)

with limit_blas(2):
    code = child_beside(Slice(), lambda: left == [{1}] and numbers() == {2})
print(code, child_beside(Slice(), lambda: len(left) == 2 and numbers() == {3}), numbers())
"""
    assert run(HELD + code) == "0 0 {3}"


EXPLICIT = """
net = make("cython", 3)
members = lambda: len(os.listdir("/proc/self/task")) - 1
net.fit(X, y, 1024, epochs=1, verbose=0)

def explicit():
    net.fit(X, y, 1024, epochs=1, verbose=0)
    return members() == 2 and "3 threads (asked for)" in net.explain()

def auto():
    other = trained("cython")
    print(other.explain().splitlines()[0], flush=True)
    return members() == 0

print(child(explicit), child(auto))
"""


@pytest.mark.skipif("cython" not in BACKENDS, reason="the compiled back end is not built")
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted by Linux")
def test_threads_that_are_asked_for_are_there_in_a_child() -> None:
    """ "auto" takes one: workers are forked by the dozen."""
    text = run(EXPLICIT)
    assert text.endswith("0 0"), text
    assert "1 thread (a forked child takes one thread unless more are asked for)" in text


@pytest.mark.skipif("numba" not in BACKENDS, reason="numba is not available")
def test_explain_says_that_numba_has_one_thread_in_a_child() -> None:
    code = """
net = make("numba", 2).build(128)
print(net.explain().splitlines()[0], flush=True)
print(child(lambda: print(net.explain().splitlines()[0], flush=True) is None))
"""
    asked, alone, status = run(code).splitlines()
    assert "2 threads (asked for)" in asked
    assert "1 thread (Numba's threads do not survive a fork)" in alone
    assert status == "0"
