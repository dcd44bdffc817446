"""Data sets of models on CUDA: staged where they do not fit, used where they lie in GPU memory."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace

import numpy as np
import pytest
from gpu.nets import data, normalised, plain

import fastdl as fd
from fastdl.cuda.arrays import DeviceArray
from fastdl.kernels.common import driver, numba_cuda
from fastdl.kernels.common.gpu import View

needs_compiler = pytest.mark.skipif(numba_cuda.MISSING is not None, reason=str(numba_cuda.MISSING))


# ---------------------------------------------------------------------------------------------- large data sets
class Late:
    """A device that does nothing before somebody waits; copies beside the work are ``early`` or as late as may be."""

    def __init__(self, early: bool, room: int) -> None:
        from gpu.device import Interpreted

        self.gpu, self.early, self.room, self.library = Interpreted(), early, room, None
        self.queue: list[Callable[[], None]] = []
        self.copies: list[Callable[[], None]] = []
        self.log: list[str] = []
        self.filled: set[int] = set()

    def __getattr__(self, name: str) -> object:
        """Whatever is not a copy beside the work comes after all that is asked for."""
        self.log.append(name)
        self.wait(len(self.queue))
        return getattr(self.gpu, name)

    def free_bytes(self) -> int:
        return self.room

    def pinned(self, shape: tuple[int, ...], dtype: object) -> np.ndarray:
        return np.full(shape, 77, dtype)

    def copy_down(self, address: int, array: np.ndarray) -> None:
        self.log.append("copy_down")
        self.filled.add(address)
        copy = functools.partial(self.gpu.write, address, array)  # reads the array when it runs
        if self.early:
            copy()
        else:
            self.copies.append(copy)

    def copied(self) -> None:
        self.queue += self.copies
        self.copies = []

    def graph(self, launches: Sequence[object]) -> object:
        def replay(times: int = 1) -> None:
            self.log.append("replay")
            self.queue.append(lambda: self.gpu.run(list(launches) * times))

        return SimpleNamespace(replay=replay)

    def mark(self) -> Callable[[], None]:
        self.queue.append(lambda: None)
        return self.queue[-1]

    def wait(self, event: Callable[[], None] | int) -> None:
        if not isinstance(event, int):
            event = self.queue.index(event) + 1 if event in self.queue else 0
        for work in self.queue[:event]:
            work()
        del self.queue[:event]


@needs_compiler
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_a_data_set_that_does_not_fit_is_staged(shuffle: bool, weighted: bool) -> None:
    """Bit for bit the results of one that fits, whether copies run as early or as late as they may."""
    X, y = data(70, 20)
    weight = np.linspace(0.5, 2, 70).astype(np.float32) if weighted else None
    states, histories = [], []
    for early, room in ((True, 1 << 40), (True, 1000), (False, 1000)):
        gpu = Late(early, room)
        before = driver.use(gpu)
        try:
            net = fd.Sequential(normalised(2), seed=3).compile("softmax_cross_entropy", backend="cuda")
            kept = net.fit(X, y, batch_size=16, epochs=3, shuffle=shuffle, sample_weight=weight, verbose=0)
            states.append(net.get_state())
            histories.append(kept)
        finally:
            driver.use(before)
        assert len(gpu.filled) == (0 if room > 1000 else 6 if weighted else 4)  # two buffers for each array
        for asked in " ".join(gpu.log).split(" read ")[1:3]:  # the epochs for which all plans are made
            assert re.fullmatch(r"write write( (copy_down|replay))+", asked)  # inside, nobody waits for an idle GPU
    for history, state in zip(histories[1:], states[1:], strict=True):
        assert history == histories[0]
        for name, value in states[0].items():
            np.testing.assert_array_equal(state[name], value)


# ---------------------------------------------------------------------------------------------- arrays on the GPU
class Tensor:
    """What another library's array in GPU memory shows of itself."""

    def __init__(self, array: DeviceArray) -> None:
        self.kept, self.ndim, self.shape = array, array.ndim, array.shape

    @property
    def __cuda_array_interface__(self) -> dict:
        return self.kept.__cuda_array_interface__


def on_gpu(array: np.ndarray, gap: int = 0) -> Tensor:
    view = driver.current().put(array, gap=gap)
    return Tensor(DeviceArray(view.address, view.shape, array.dtype, view.row_stride if array.ndim == 2 else None))


@pytest.fixture
def interpreted() -> Iterator[object]:
    gpu = importlib.import_module("gpu.device").Interpreted()
    before = driver.use(gpu)
    yield gpu
    driver.use(before)


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_arrays_on_the_gpu_are_used_where_they_lie(interpreted, dtype: str) -> None:
    X, y = data(45, 20)
    weight = np.linspace(0.5, 2, 45).astype(np.float32)
    nets = []
    for place in (lambda a, gap=0: a, on_gpu):
        net = fd.Sequential(normalised(2), seed=3).compile("softmax_cross_entropy", backend="cuda", dtype=dtype)
        given = place(X, gap=4), place(y), place(weight)
        history = net.fit(*given[:2], sample_weight=given[2], batch_size=16, epochs=2, verbose=0)
        losses = [net.train_on_batch(given[0], given[1]), net.train_on_batch(*given)]
        nets.append((net, history, losses, net.evaluate(*given[:2]), net.predict(given[0]), net.forward(given[0])))
    assert nets[0][1:4] == nets[1][1:4]
    for name, value in nets[0][0].weights.items():
        np.testing.assert_array_equal(nets[1][0].weights[name], value)
    read = {a.address for launch in interpreted.launched for a in launch.arguments if isinstance(a, View)}
    assert {tensor.kept.address for tensor in given} <= read
    for host, device_array in zip(nets[0][4:], nets[1][4:], strict=True):
        assert isinstance(device_array, DeviceArray)
        np.testing.assert_array_equal(device_array.numpy(), host)


@needs_compiler
def test_arrays_on_the_gpu_that_do_not_fit(interpreted) -> None:
    X, y = data(12, 20)
    net = fd.Sequential(plain(2), seed=3).compile("softmax_cross_entropy", backend="cuda").build(20)
    before = net.get_state()
    with pytest.raises(TypeError, match="X: expected float32, found float64"):
        net.train_on_batch(on_gpu(X.astype(np.float64)), y)
    with pytest.raises(TypeError, match="y: expected int64, found int32"):
        net.train_on_batch(on_gpu(X), on_gpu(y.astype(np.int32)))
    with pytest.raises(ValueError, match=r"y: expected labels of shape \(N,\) or .* found shape \(12, 4\)"):
        net.train_on_batch(on_gpu(X), on_gpu(X[:, :4].copy()))
    with pytest.raises(ValueError, match="y: expected 12 rows"):
        net.train_on_batch(on_gpu(X), on_gpu(y[:11]))
    with pytest.raises(ValueError, match="sample_weight: expected shape"):
        net.train_on_batch(on_gpu(X), y, on_gpu(X[0, :5].copy()))
    host = fd.Sequential(plain(2), seed=3).compile("softmax_cross_entropy", backend="numpy")
    with pytest.raises(TypeError, match=r"X: expected an array in host memory, found Tensor in GPU memory; compile"):
        host.fit(on_gpu(X), y, verbose=0)
    for name, value in before.items():
        np.testing.assert_array_equal(net.weights[name], value)


@needs_compiler
def test_a_wrong_label_on_the_gpu_is_no_read_past_the_row(interpreted) -> None:
    X, y = data(12, 20)
    net = fd.Sequential(plain(2), seed=3).compile("softmax_cross_entropy", backend="cuda").build(20)
    for wrong in (-1, 5, 1 << 40):
        assert np.isnan(net.train_on_batch(on_gpu(X), on_gpu(np.where(np.arange(12) == 3, wrong, y))))
