"""Eager ops on arrays in GPU memory: shared without a copy, results stay there, as NumPy's on the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import fastdl as fd
from fastdl.cuda.arrays import DeviceArray
from fastdl.kernels.activations.reference import ACTIVATIONS
from fastdl.kernels.common import driver, numba_cuda

needs_compiler = pytest.mark.skipif(numba_cuda.MISSING is not None, reason=str(numba_cuda.MISSING))
ops = fd.ops


@pytest.fixture(
    autouse=True,
    params=[
        pytest.param("interpreted", marks=needs_compiler),
        pytest.param("gpu", marks=pytest.mark.skipif(driver.missing() is not None, reason=str(driver.missing()))),
    ],
)
def device(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "gpu":
        yield
        return
    from gpu.device import Interpreted

    before = driver.use(Interpreted())
    yield
    driver.use(before)


class Tensor:
    """Another library's array: what it shows of itself is the protocol."""

    def __init__(self, values: np.ndarray, gap: int = 0) -> None:
        gpu, rows = driver.current(), values.shape[0]
        padded = np.full((rows, values.size // rows + gap), 77, values.dtype)
        padded[:, : padded.shape[1] - gap] = values.reshape(rows, -1)
        stride = padded.shape[1] if values.ndim == 2 else None
        self.array = DeviceArray(gpu.allocate(padded.nbytes), values.shape, values.dtype, stride)
        gpu.write(self.array.address, padded)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return self.array.__cuda_array_interface__


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def same(found: Any, want: Any, tolerance: float = 5e-6) -> None:
    assert isinstance(found, DeviceArray)
    assert found.shape == want.shape
    np.testing.assert_allclose(found.numpy(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations(name: str) -> None:
    x, dy = draw(5, 19), draw(5, 19, seed=1)
    slope = [draw(19, seed=2)] if ACTIVATIONS[name].per_channel else []
    forward, backward = getattr(ops, f"{name}_forward"), getattr(ops, f"{name}_backward")
    y, ctx = forward(Tensor(x, gap=5), *map(Tensor, slope))
    want, kept = forward(x, *slope)
    same(y, want)
    found, wanted = backward(Tensor(dy), ctx), backward(dy, kept)
    for a, b in zip(*((found, wanted) if slope else ((found,), (wanted,))), strict=True):
        same(a, b, 2e-5)


@pytest.mark.parametrize("activation", ["identity", "gelu", "relu"])
def test_dense(activation: str) -> None:
    x, w, b, dy = draw(7, 20), draw(20, 9, seed=1), draw(9, seed=2), draw(7, 9, seed=3)
    y, ctx = ops.dense_forward(Tensor(x, gap=3), Tensor(w), Tensor(b), activation=activation)
    want, kept = ops.dense_forward(x, w, b, activation=activation)
    same(y, want)
    for found, wanted in zip(ops.dense_backward(Tensor(dy), ctx), ops.dense_backward(dy, kept), strict=True):
        same(found, wanted, 2e-5)


@pytest.mark.parametrize("training", [True, False])
def test_batch_normalisation(training: bool) -> None:
    x, dy = draw(12, 20), draw(12, 20, seed=1)
    vectors = [np.abs(draw(20, seed=k)) for k in range(4)]
    settings = {"training": training, "activation": "relu", "rate": 0.2, "seed": 3}
    given = [Tensor(v) for v in vectors]
    y, ctx = ops.batchnorm_forward(Tensor(x), *given, **settings)
    want, kept = ops.batchnorm_forward(x, *vectors, **settings)
    same(y, want)
    for tensor, value in zip(given, vectors, strict=True):  # running statistics are written in place
        same(tensor.array, value)
    for found, wanted in zip(ops.batchnorm_backward(Tensor(dy), ctx), ops.batchnorm_backward(dy, kept), strict=True):
        same(found, wanted, 2e-5)


@pytest.mark.parametrize("shape", [(6, 21), (13,), (3, 4, 5)])
def test_dropout_draws_the_same_mask(shape: tuple[int, ...]) -> None:
    x, dy = draw(*shape), draw(*shape, seed=1)
    y, ctx = ops.dropout_forward(Tensor(x), 0.4, seed=2, step=3)
    want, kept = ops.dropout_forward(x, 0.4, seed=2, step=3)
    same(y, want, 0)
    same(ops.dropout_backward(Tensor(dy), ctx), ops.dropout_backward(dy, kept), 0)


def test_losses() -> None:
    z, labels = draw(9, 5), np.arange(9) % 5
    weight, soft = np.linspace(0.5, 2, 9).astype(np.float32), np.eye(5, dtype=np.float32)[labels]
    for loss, targets in (("softmax_cross_entropy", labels), ("softmax_cross_entropy", soft), ("mse", soft)):
        value, dz = getattr(ops, loss)(Tensor(z), Tensor(targets), Tensor(weight))
        want, wanted = getattr(ops, loss)(z, targets, weight)
        assert value == pytest.approx(want, rel=1e-6)
        same(dz, wanted)


@pytest.mark.parametrize("op", ["sgd_step", "adam_step"])
def test_optimisers_write_in_place(op: str) -> None:
    values = [draw(3, 11, seed=k) ** 2 for k in range(3 if op == "sgd_step" else 4)]
    given = [Tensor(v) for v in values]
    settings = {"lr": 0.1, **({"momentum": 0.9} if op == "sgd_step" else {"step": 4})}
    getattr(ops, op)(*given, **settings)
    getattr(ops, op)(*values, **settings)
    for tensor, value in zip(given, values, strict=True):
        same(tensor.array, value)


def test_outputs_that_are_given() -> None:
    x = draw(4, 10)
    tensor, out = Tensor(x), Tensor(np.zeros_like(x), gap=2)
    y, _ = ops.relu_forward(tensor, out=out)
    assert y.address == out.array.address
    same(out.array, np.maximum(x, 0), 0)
    ops.sigmoid_forward(tensor, out=tensor)
    same(tensor.array, ops.sigmoid_forward(x)[0])
    whole = DeviceArray(tensor.array.address, (3, 10), np.float32)
    with pytest.raises(ValueError, match="out: overlaps x; out may be x itself, or share nothing"):
        ops.relu_forward(whole, out=DeviceArray(whole.address + 40, (3, 10), np.float32))
    with pytest.raises(ValueError, match="gelu_backward needs the input"):
        ops.gelu_backward(tensor, ops.gelu_forward(tensor, out=tensor)[1])


WRONG: list[tuple[str, str, Callable[[np.ndarray], Any]]] = [
    ("memory", "w: expected an array in GPU memory", lambda x: ops.dense_forward(Tensor(x), x.T.copy())),
    ("memory", "w: expected a NumPy array as the first one", lambda x: ops.dense_forward(x, Tensor(x.T.copy()))),
    ("memory", "out: expected an array in GPU memory", lambda x: ops.relu_forward(Tensor(x), out=x.copy())),
    ("dtype", "x: expected float32, found float64", lambda x: ops.relu_forward(Tensor(x.astype(np.float64)))),
    ("dtype", "targets: expected int64 or float32", lambda x: _loss(x, np.zeros(4, np.int32))),
    ("shape", "w: expected 10 rows", lambda x: ops.dense_forward(Tensor(x), Tensor(x))),
    ("backend", "'cuda' for arrays in GPU memory", lambda x: ops.relu_forward(Tensor(x), backend="cython")),
]  # fmt: skip


def _loss(z: np.ndarray, targets: np.ndarray) -> Any:
    return ops.softmax_cross_entropy(Tensor(z), Tensor(targets))


@pytest.mark.parametrize(("message", "call"), [c[1:] for c in WRONG], ids=[f"{c[0]}-{k}" for k, c in enumerate(WRONG)])
def test_what_does_not_fit_is_refused(message: str, call: Callable[[np.ndarray], Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call(draw(4, 10))
