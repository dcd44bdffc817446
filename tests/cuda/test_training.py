"""Models on CUDA without a GPU: plans on paper, and whole training steps carried out by the interpreter of the PTX."""

from __future__ import annotations

import functools
import gc
import importlib
import re
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace

import numpy as np
import pytest

import fastdl as fd
from fastdl import layers
from fastdl.cuda.arrays import DeviceArray
from fastdl.kernels.common import driver, numba_cuda
from fastdl.kernels.common.gpu import Product, View
from fastdl.kernels.dense import cublaslt

needs_compiler = pytest.mark.skipif(numba_cuda.MISSING is not None, reason=str(numba_cuda.MISSING))


def plain(count: int, width: int = 32, outputs: int = 5) -> list[layers.Layer]:
    """``count`` dense layers with ReLU between them."""
    hidden = [layer for _ in range(count - 1) for layer in (layers.Dense(width), layers.ReLU())]
    return [*hidden, layers.Dense(outputs)]


def normalised(count: int, width: int = 32, outputs: int = 5) -> list[layers.Layer]:
    """The same with batch normalisation and dropout."""
    hidden = []
    for _ in range(count - 1):
        hidden += [layers.Dense(width, use_bias=False), layers.BatchNorm(), layers.ReLU(), layers.Dropout(0.25)]
    return [*hidden, layers.Dense(outputs)]


def launches(stack: list[layers.Layer], optimizer: str = "adam") -> int:
    """Launches of a training step, without those that bring the batch in."""
    net = fd.Sequential(stack, seed=1).compile("softmax_cross_entropy", optimizer, backend="numpy").build(20)
    lines = net.plan("cuda", batch_size=64).splitlines()[2:]
    return sum(not line.startswith("feed") for line in lines)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_launches_of_a_plain_step(count: int, optimizer: str) -> None:
    assert launches(plain(count), optimizer) <= 3 * count + 1


@pytest.mark.parametrize("count", [2, 3, 5])
def test_launches_with_batch_normalisation_and_dropout(count: int) -> None:
    assert launches(normalised(count)) <= 3 * count + 1 + 4 * (count - 1)


def test_a_plan_is_printed_anywhere() -> None:
    net = fd.Sequential(normalised(2), seed=1).compile("softmax_cross_entropy", backend="numpy").build(20)
    text = net.plan("cuda", batch_size=1000)
    assert "up to 1000 rows" in text
    assert "batchnorm_forward" in text
    assert "adam_step + adam_step" in text
    with pytest.raises(ValueError, match=r"expected 'cuda', found 'numpy'"):
        net.plan("numpy")


def test_without_a_gpu_the_reason_is_told() -> None:
    if fd.backends()["cuda"] == "available":
        pytest.skip("a GPU is here")
    with pytest.raises(fd.errors.BackendUnavailable, match=r"cuda.*(pip install|driver|GPU)"):
        fd.Sequential(plain(2)).compile("mse", backend="cuda")


# ---------------------------------------------------------------------------------------------- by the interpreter
@pytest.fixture(
    params=[
        pytest.param("interpreted", marks=needs_compiler),
        pytest.param("gpu", marks=pytest.mark.skipif(driver.missing() is not None, reason=str(driver.missing()))),
    ]
)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where launches run: in the interpreter, and on a GPU where there is one."""
    if request.param == "gpu":
        yield "gpu"
        return
    from gpu.device import Interpreted

    before = driver.use(Interpreted())
    yield "interpreted"
    driver.use(before)


def pair(stack: list[layers.Layer], width: int, **settings: object) -> tuple[fd.Sequential, fd.Sequential]:
    """The same net on NumPy and on CUDA."""
    nets = []
    for backend in ("numpy", "cuda"):
        settings = {"loss": "softmax_cross_entropy", "optimizer": fd.optimizers.Adam(1e-2), **settings}
        nets.append(fd.Sequential(stack, seed=3).compile(backend=backend, **settings).build(width))
    return tuple(nets)


def close(a: fd.Sequential, b: fd.Sequential, tolerance: float = 2e-5) -> None:
    for name, value in a.weights.items():
        np.testing.assert_allclose(
            b.weights[name], value, rtol=0, atol=tolerance * max(1, np.abs(value).max()), err_msg=name
        )


def data(rows: int, width: int, classes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((rows, width)).astype(np.float32), rng.integers(0, classes, rows)


@pytest.mark.parametrize("stack", [plain, normalised], ids=["plain", "normalised"])
def test_training_steps_equal_those_of_numpy(stack, device) -> None:
    X, y = data(40, 20)
    numpy_net, cuda_net = pair(stack(2), 20)
    for rows in (40, 23):  # a smaller batch runs on the same plan
        losses = [net.train_on_batch(X[:rows], y[:rows]) for net in (numpy_net, cuda_net)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    close(numpy_net, cuda_net)


def test_an_epoch_of_graphs_equals_one_of_numpy(device) -> None:
    X, y = data(70, 20)
    nets = pair(normalised(3), 20)
    histories = [net.fit(X, y, batch_size=32, epochs=2, verbose=0) for net in nets]
    np.testing.assert_allclose(histories[1]["loss"], histories[0]["loss"], rtol=1e-5)
    np.testing.assert_allclose(histories[1]["accuracy"], histories[0]["accuracy"])
    close(*nets)
    np.testing.assert_allclose(nets[1].predict(X[:9]), nets[0].predict(X[:9]), atol=1e-4)
    found = [net.evaluate(X, y) for net in nets]
    assert found[1]["loss"] == pytest.approx(found[0]["loss"], rel=1e-4)


def test_fused_equals_plain_and_runs_repeat(device) -> None:
    X, y = data(33, 20)
    states = []
    for fuse in (True, True, False):
        net = fd.Sequential(normalised(2), seed=3).compile("softmax_cross_entropy", backend="cuda", fuse=fuse)
        net.train_on_batch(X, y)
        states.append(net.get_state())
    for name, value in states[0].items():
        np.testing.assert_array_equal(states[1][name], value)
        np.testing.assert_allclose(states[2][name], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("stack", [plain, normalised], ids=["plain", "normalised"])
def test_mixed_training_stays_near_float32(stack, device) -> None:
    """Matrices of bfloat16 beside float32 parameters, whose rounded copy follows every step and every assignment."""
    X, y = data(70, 20)
    numpy_net, _ = pair(stack(2), 20)
    cuda_net = fd.Sequential(stack(2), seed=3).compile(
        "softmax_cross_entropy", fd.optimizers.Adam(1e-2), backend="cuda", dtype="mixed_bfloat16"
    )
    histories = [net.fit(X, y, batch_size=32, epochs=2, verbose=0) for net in (numpy_net, cuda_net)]
    np.testing.assert_allclose(histories[1]["loss"], histories[0]["loss"], rtol=0.01)
    assert histories[1]["loss"] != histories[0]["loss"]
    gap = [np.abs(numpy_net.weights[n] - w).max() for n, w in cuda_net.weights.items()]
    assert max(gap) < 0.05
    numpy_net.set_state(cuda_net.get_state())
    np.testing.assert_allclose(cuda_net.predict(X[:9]), numpy_net.predict(X[:9]), atol=0.05)
    assert cuda_net.evaluate(X, y)["loss"] == pytest.approx(numpy_net.evaluate(X, y)["loss"], rel=0.01)
    before = cuda_net.predict(X[:9])
    cuda_net.weights["dense_0/kernel"] = 2 * cuda_net.weights["dense_0/kernel"]
    numpy_net.set_state(cuda_net.get_state())
    np.testing.assert_allclose(cuda_net.predict(X[:9]), numpy_net.predict(X[:9]), atol=0.1)
    assert np.abs(cuda_net.predict(X[:9]) - before).max() > 0.1 or stack is normalised
    cuda_net.forward(X[:9], training=True)
    dx = cuda_net.backward(np.ones((9, 5), np.float32))
    numpy_net.step = cuda_net.step
    numpy_net.forward(X[:9], training=True)
    want = numpy_net.backward(np.ones((9, 5), np.float32))
    assert dx.dtype == np.float32
    np.testing.assert_allclose(dx, want, atol=0.05 * np.abs(want).max() + 0.02)


def test_mixed_regression_keeps_its_targets(device) -> None:
    X, _ = data(24, 12)
    y = (1000 + X[:, :1]).astype(np.float32)  # bfloat16 would know such numbers to 8 only
    net = fd.Sequential([layers.Dense(1)], seed=1).compile("mse", backend="cuda", dtype="mixed_bfloat16").build(12)
    net.weights["dense_0/kernel"] = np.zeros((12, 1))
    loss = net.fit(X, y, batch_size=24, epochs=1, verbose=0)["loss"][0]
    assert loss == pytest.approx(float(np.mean(y.astype(np.float64) ** 2)), rel=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "clipped"])
def test_optimisers(optimizer: str, device) -> None:
    X, y = data(24, 12)
    made = {
        "sgd": fd.optimizers.SGD(0.1, momentum=0.9, nesterov=True, l2=1e-3),
        "adamw": fd.optimizers.AdamW(1e-2, weight_decay=0.1),
        "clipped": fd.optimizers.Adam(1e-2, clip_norm=0.05),
    }[optimizer]
    nets = pair(plain(2), 12, optimizer=made)
    for net in nets:
        net.train_on_batch(X, y)
        net.train_on_batch(X, y)
    close(*nets)


def test_loops_of_the_users_own_and_weights_that_are_set(device) -> None:
    X, _ = data(17, 12)
    nets = pair(plain(2), 12)
    found = []
    for net in nets:
        net.weights["dense_0/bias"] = np.full(32, 0.25)
        net.forward(X, training=True)
        dx = net.backward(np.ones((17, 5), np.float32))
        net.backward(np.ones((17, 5), np.float32), accumulate=True)
        net.update()
        found.append((dx, net.gradients["dense_0/kernel"], net.weights["dense_1/kernel"]))
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5)


def test_eager_calls_copy_to_the_device_and_back(device) -> None:
    x = np.linspace(-2, 2, 60, dtype=np.float32).reshape(5, 12)
    y, ctx = fd.ops.relu_forward(x, backend="cuda")
    np.testing.assert_array_equal(y, np.maximum(x, 0))
    np.testing.assert_array_equal(fd.ops.relu_backward(np.ones_like(x), ctx), (x > 0).astype(np.float32))
    mask = fd.random.dropout_mask((9, 21), 0.3, seed=5, layer=2, step=7, backend="cuda")
    np.testing.assert_array_equal(mask, fd.random.dropout_mask((9, 21), 0.3, seed=5, layer=2, step=7, backend="numpy"))
    with pytest.raises(TypeError, match=r"float32, found float64"):
        fd.ops.relu_forward(x.astype(np.float64), backend="cuda")


@needs_compiler
def test_a_model_that_is_dropped_gives_its_memory_back() -> None:
    gpu = importlib.import_module("gpu.device").Interpreted()
    before = driver.use(gpu)
    try:
        X, y = data(8, 12)
        net = fd.Sequential(plain(2), seed=3).compile("softmax_cross_entropy", backend="cuda")
        net.train_on_batch(X, y)
        del net
        gc.collect()
        assert len(gpu.freed) == len(set(gpu.freed)) == gpu.allocated > 5
    finally:
        driver.use(before)


def test_other_types_are_refused(device) -> None:
    with pytest.raises(fd.errors.BackendUnavailable, match=r"computes in float32"):
        fd.Sequential(plain(2)).compile("mse", backend="cuda", dtype="float64")


# ---------------------------------------------------------------------------------------------- with a library
class Library:
    """cuBLASLt as documented (`gpu.products`), of which parts may be missing."""

    def __init__(self, without: tuple[str, ...] = ()) -> None:
        self.without = without

    def has(self, product: Product) -> bool:
        cublaslt.check(product)  # nothing may be asked for that the library would refuse
        return product.epilogue not in self.without


@pytest.fixture
def with_library(request: pytest.FixtureRequest) -> Iterator[object]:
    from gpu.device import Interpreted

    gpu = Interpreted(Library(getattr(request, "param", ())))
    before = driver.use(gpu)
    yield gpu
    driver.use(before)


MISSING_PARTS = [(), ("RELU_AUX_BIAS",), ("DRELU",), ("BGRADA",), ("RELU_BIAS", "RELU_AUX_BIAS"), ("DEFAULT",)]


@needs_compiler
@pytest.mark.parametrize("with_library", MISSING_PARTS, ids=lambda parts: "-".join(parts) or "whole", indirect=True)
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_products_of_a_library(with_library, dtype: str) -> None:
    """Whole epochs, with a smaller batch at the end, by products where the library has them."""
    X, y = data(45, 16)
    nets = [fd.Sequential(plain(3), seed=3) for _ in range(2)]
    for net, backend, kind in zip(nets, ("numpy", "cuda"), ("float32", dtype), strict=True):
        net.compile("softmax_cross_entropy", fd.optimizers.SGD(0.1, momentum=0.9), backend=backend, dtype=kind)
    histories = [n.fit(X, y, batch_size=32, epochs=2, verbose=0) for n in nets]
    coarse = dtype != "float32"
    np.testing.assert_allclose(histories[1]["loss"], histories[0]["loss"], rtol=0.01 if coarse else 1e-5)
    close(*nets, 0.01 if coarse else 2e-5)
    products = {str(p).split()[1] for p in with_library.launched if isinstance(p, Product)}
    assert products
    assert not {part.lower() for part in with_library.library.without} & products
    if not with_library.library.without:
        assert {"relu_aux_bias", "drelu", "bgrada", "bias"} <= products


@needs_compiler
@pytest.mark.parametrize("stack", ["gelu_tanh", "gelu_tanh odd", "elu", "relu odd", "normalised", "dropped"])
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_products_and_sweeps(stack: str, dtype: str, with_library) -> None:
    stacks = {
        "normalised": normalised(2),
        "dropped": [layers.Dense(24), layers.ReLU(), layers.Dropout(0.3), layers.Dense(16), layers.Dropout(0.2)],
    }
    odd = stack.endswith("odd")
    name = stack.removesuffix(" odd")
    hidden = [layers.Dense(21 if odd else 24), layers.Activation(name)] if stack not in stacks else stacks[stack]
    X, y = data(20, 16)
    coarse = dtype != "float32"
    nets = [fd.Sequential([*hidden, layers.Dense(5)], seed=3) for _ in range(2)]
    for net, backend, kind in zip(nets, ("numpy", "cuda"), ("float32", dtype), strict=True):
        optimizer = fd.optimizers.SGD(0.1, momentum=0.9) if coarse else fd.optimizers.Adam(1e-2)
        net.compile("softmax_cross_entropy", optimizer, backend=backend, dtype=kind)
        net.train_on_batch(X, y)
        net.train_on_batch(X[:13], y[:13])
    close(*nets, 0.02 if coarse else 2e-5)
    sweeps = {launch.kernel.name for launch in with_library.launched if not isinstance(launch, Product)}
    assert stack != "dropped" or {"bias_relu_dropout", "bias_identity_dropout", "relu_dropout_backward"} <= sweeps
    epilogues = {p.epilogue for p in with_library.launched if isinstance(p, Product)}
    assert stack != "gelu_tanh" or {"GELU_AUX_BIAS", "DGELU"} <= epilogues
    np.testing.assert_allclose(nets[1].predict(X), nets[0].predict(X), atol=0.1 if coarse else 1e-4)


@needs_compiler
def test_a_folded_bias_is_rounded_for_products(with_library) -> None:
    """Batch normalisation that is folded into a product gives it a bias that no optimiser keeps a copy of."""
    X, y = data(20, 16)
    nets = [fd.Sequential(normalised(2), seed=3) for _ in range(2)]
    for net, backend, dtype in zip(nets, ("numpy", "cuda"), ("float32", "mixed_bfloat16"), strict=True):
        net.compile("softmax_cross_entropy", fd.optimizers.SGD(0.1), backend=backend, dtype=dtype).build(16)
        net.weights["batchnorm_0/beta"] = np.linspace(-2, 2, 32)
    np.testing.assert_allclose(nets[1].predict(X), nets[0].predict(X), atol=0.05)
    for net in nets:
        net.train_on_batch(X, y)
    np.testing.assert_allclose(nets[1].predict(X), nets[0].predict(X), atol=0.05)


@needs_compiler
def test_launches_with_a_library(with_library) -> None:
    X, y = data(32, 20)
    for count in (2, 4):
        net = fd.Sequential(plain(count), seed=1).compile("softmax_cross_entropy", backend="cuda")
        net.train_on_batch(X, y)
        with_library.launched.clear()
        net.train_on_batch(X, y)
        assert len(with_library.launched) - 1 <= 3 * count + 1  # one brings the batch in


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
