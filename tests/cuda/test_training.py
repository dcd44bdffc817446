"""Models on CUDA without a GPU: plans on paper, and whole training steps carried out by the interpreter of the PTX."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Iterator

import numpy as np
import pytest
from gpu.nets import data, normalised, plain

import fastdl as fd
from fastdl import layers
from fastdl.kernels.common import driver, numba_cuda
from fastdl.kernels.common.gpu import Product
from fastdl.kernels.dense import cublaslt

needs_compiler = pytest.mark.skipif(numba_cuda.MISSING is not None, reason=str(numba_cuda.MISSING))


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
