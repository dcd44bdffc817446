"""What belongs to the host process is left as found: thread counts of BLAS and Numba, environment, error states."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

import fastdl as fd
from api.nets import BACKENDS, X, Y, net
from fastdl import layers
from fastdl.kernels.common.blas import _libraries, limit_blas

needs_numba = pytest.mark.skipif("numba" not in BACKENDS, reason="numba is not available")


def blas_threads() -> set[int]:
    return {library.get_num_threads() for library in _libraries()}


@pytest.fixture
def blas_at_three() -> object:
    """The host's own number, which is none that a block asks for."""
    before = [(library, library.get_num_threads()) for library in _libraries()]
    for library, _ in before:
        library.set_num_threads(3)
    yield
    for library, number in before:
        library.set_num_threads(number)


def test_the_smallest_of_the_limits_that_are_active_holds(blas_at_three: None) -> None:
    """Blocks of two Python threads that overlap, the outer one of the first ending first."""
    entered, left = threading.Event(), threading.Event()
    seen = []

    def other() -> None:
        with limit_blas(1):
            entered.set()
            left.wait(60)
            seen.append(blas_threads())
        seen.append(blas_threads())

    with limit_blas(2):
        seen.append(blas_threads())
        thread = threading.Thread(target=other)
        thread.start()
        entered.wait(60)
        with limit_blas(4):
            seen.append(blas_threads())
    seen.append(blas_threads())
    left.set()
    thread.join()
    assert seen == [{2}, {1}, {1}, {1}, {3}]


def test_a_limit_ends_with_an_error_in_its_block(blas_at_three: None) -> None:
    with pytest.raises(KeyError), limit_blas(1):
        raise KeyError
    assert blas_threads() == {3}


@pytest.mark.parametrize("name", BACKENDS)
def test_trainings_at_once_leave_blas_its_number(name: str, blas_at_three: None) -> None:
    def train(threads: int) -> None:
        made = fd.Sequential([layers.Dense(64), layers.ReLU(), layers.Dense(3)])
        made.compile("softmax_cross_entropy", backend=name, threads=threads).fit(
            X, Y, 16, epochs=4 + threads, verbose=0
        )

    team = [threading.Thread(target=train, args=(threads,)) for threads in (1, 2, 1)]
    for thread in team:
        thread.start()
    for thread in team:
        thread.join()
    assert blas_threads() == {3}


@needs_numba
@pytest.mark.parametrize("threads", [1, 2])
def test_numba_keeps_its_number_of_threads(threads: int) -> None:
    import numba

    most, before = numba.config.NUMBA_NUM_THREADS, numba.get_num_threads()
    x, y = np.ones((4096, 256), "f4"), np.arange(4096) % 2
    try:
        for own in {1, most}:
            numba.set_num_threads(own)
            fd.ops.relu_forward(x, backend="numba", threads=threads)
            assert numba.get_num_threads() == own
            made = fd.Sequential([layers.Dense(256), layers.ReLU(), layers.Dense(2)])
            made.compile("softmax_cross_entropy", backend="numba", threads=threads).fit(x, y, 2048, verbose=0)
            assert numba.get_num_threads() == own
    finally:
        numba.set_num_threads(before)


@needs_numba
def test_starting_numba_leaves_the_environment() -> None:
    code = """
import ctypes, os, numpy as np, fastdl as fd
get = ctypes.CDLL(None).getenv
get.restype = ctypes.c_char_p
before = dict(os.environ)
fd.ops.relu_forward(np.ones((512, 512), "f4"), backend="numba", threads=2)
import numba
print(numba.threading_layer() != "", dict(os.environ) == before, get(b"GOMP_SPINCOUNT"))
"""
    variables = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables, check=True)
    assert run.stdout.split() == ["True", "True", "None"]


@pytest.mark.parametrize("name", BACKENDS)
def test_underflow_is_no_error_whatever_numpy_is_told(name: str) -> None:
    """Sigmoids, softmax and Adam's moments underflow in every training."""
    far = (X * 200).astype("f4")
    with np.errstate(all="raise"):
        stack = [layers.Dense(16), layers.Sigmoid(), layers.BatchNorm(), layers.ELU(), layers.Dropout(0.2)]
        made = fd.Sequential([*stack, layers.Dense(3)], seed=1)
        made.compile("softmax_cross_entropy", fd.optimizers.AdamW(0.1, clip_norm=1.0), backend=name)
        made.fit(far, Y, 32, epochs=3, verbose=0, validation_split=0.2)
        made.evaluate(far, Y)
        assert np.isfinite(made.predict(far)).all()
        y, _ = fd.ops.softmax_forward(np.array([[-300.0, 0.0]], "f4"), backend=name)
        assert y.tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("name", BACKENDS)
def test_floating_point_mode_is_the_hosts_in_callbacks_and_after(name: str) -> None:
    """Compiled Programs flush denormals, in their own time alone."""
    tiny, seen = np.array([1e-310]), []
    watch = fd.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(float(tiny[0] * 1.0) > 0.0))
    net(name).fit(X, Y, 32, epochs=2, callbacks=[watch], verbose=0)
    assert seen == [True, True]
    assert float(tiny[0] * 1.0) > 0.0
