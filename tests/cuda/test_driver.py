"""`kernels/common/driver.py` without a driver: its calls, held against the real package's, do what they should."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest

import fastdl as fd
from fastdl import layers
from fastdl.kernels.common import cubins, driver, numba_cuda
from fastdl.kernels.common.gpu import Kernel

if numba_cuda.MISSING:
    pytest.skip(numba_cuda.MISSING, allow_module_level=True)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    made = importlib.import_module("gpu.stand_in").StandIn()
    bindings = importlib.import_module("cuda.bindings")
    monkeypatch.setattr(bindings, "driver", made)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", made)
    monkeypatch.setenv("FASTDL_CUBLASLT", "0")

    def code(kernel: Kernel, dtype: str, cc: tuple[int, int]) -> bytes:
        assert cc == (9, 0)
        image = f"{kernel.name} {dtype}".encode()
        made.kernels[image] = kernel, dtype
        return image

    monkeypatch.setattr(cubins, "code", code)
    before = driver.use(driver.Driver())
    yield made
    driver.use(before)


def test_a_net_trains_through_the_driver(stand_in) -> None:
    """Epochs, single batches, prediction, weights to and fro: equal to NumPy; every allocation is given back once."""
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((45, 12)).astype(np.float32), rng.integers(0, 4, 45)
    nets = []
    for backend in ("numpy", "cuda"):
        stack = [layers.Dense(16, use_bias=False), layers.BatchNorm(), layers.ReLU(), layers.Dropout(0.2)]
        net = fd.Sequential([*stack, layers.Dense(4)], seed=3)
        net.compile("softmax_cross_entropy", fd.optimizers.Adam(1e-2), backend=backend)
        history = net.fit(X, y, batch_size=16, epochs=2, verbose=0)
        nets.append((net, history["loss"], net.train_on_batch(X[:7], y[:7]), net.predict(X)))
    np.testing.assert_allclose(nets[1][1], nets[0][1], rtol=1e-5)
    assert nets[1][2] == pytest.approx(nets[0][2], rel=1e-4)
    np.testing.assert_allclose(nets[1][3], nets[0][3], atol=1e-4)
    del net, nets
    gc.collect()
    assert not {kind for kind, _ in stand_in.living} & {"memory", "event"}
    assert stand_in.called.count("cuModuleLoadData") == len(
        {image for image in stand_in.kernels if isinstance(image, bytes)}
    )


def test_a_data_set_is_staged_through_the_driver(stand_in, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((40, 12)).astype(np.float32), rng.integers(0, 4, 40)
    states = []
    for free in (1 << 30, 100):
        monkeypatch.setattr(stand_in, "_cuMemGetInfo", lambda free=free: (free, 1 << 40))
        net = fd.Sequential([layers.Dense(8), layers.ReLU(), layers.Dense(4)], seed=3)
        net.compile("softmax_cross_entropy", backend="cuda").fit(X, y, batch_size=16, epochs=2, verbose=0)
        states.append(net.get_state())
    for name, value in states[0].items():
        np.testing.assert_array_equal(states[1][name], value)
    del net
    gc.collect()
    assert not {kind for kind, _ in stand_in.living} & {"memory", "event", "host"}


def test_times_and_orders(stand_in) -> None:
    gpu = driver.current()
    room = gpu.allocate(64)
    assert gpu.seconds_of_copy(room + 32, room, 32) == 2.5e-3
    gpu.order(before=1, after=int(gpu.stream))
    gpu.wait(gpu.mark())
    assert not [kind for kind, _ in stand_in.living if kind == "event"]
    gpu.free(room)


def test_an_error_of_the_driver_is_told(stand_in, monkeypatch: pytest.MonkeyPatch) -> None:
    status = SimpleNamespace(name="CUDA_ERROR_OUT_OF_MEMORY")
    monkeypatch.setattr(stand_in, "cuMemAlloc", lambda size: (status, None), raising=False)
    with pytest.raises(RuntimeError, match="CUDA: CUDA_ERROR_OUT_OF_MEMORY, an error"):
        driver.current().allocate(1 << 40)
