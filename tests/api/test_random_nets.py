"""Nets that nobody would write: any layers in any order, any width, any rows; back ends, fusion and threads agree.

A net is trained by a loop of one's own, by single steps and by `fit`, and asked for predictions in between. Whatever it
gave is compared by name.

The nets come from NumPy by their number, for of 30 examples that hypothesis made 12 had two layers and most were copies
of another one but for a setting. No net of the first 200 hangs on rounding (a kink near a value, a column in front of a
batch normalisation that is constant but for rounding): inputs changed by 1e-13 change results by less than 1e-9.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import fastdl as fd
from fastdl import layers
from fastdl.kernels.activations.reference import ACTIVATIONS

BACKENDS = [name for name, state in fd.backends().items() if state == "available"]
needs_cython = pytest.mark.skipif("cython" not in BACKENDS, reason="the compiled back end is not built")
needs_numba = pytest.mark.skipif("numba" not in BACKENDS, reason="numba is not installed")
NETS = range(30)
#: Of the largest value of an array. Rounding is 1e-16 an operation, and 1 / sqrt(eps) = 30 a batch normalisation.
CLOSE = 1e-8

#: The values that each setting of a layer is drawn from.
SETTINGS: dict[str, list[Any]] = {
    "units": list(range(1, 101)),
    "activation": [None, *ACTIVATIONS],
    "use_bias": [True, False],
    "kernel_initializer": ["glorot_uniform", "he_normal"],
    "decay": [0.0, 0.5, 0.9],
    "eps": [1e-3, 0.1],
    "rate": [0.0, 0.2, 0.5, 0.9],
    "slope_initializer": [0.25, 0.0, -0.5],
    "approximate": ["none", "tanh"],
    "alpha": [0.0, 0.01, 0.3, 1.0],
}
ELEMENTWISE = list(dict.fromkeys(type(layers.Activation(name)) for name in ACTIVATIONS))
OPTIMIZERS = [
    fd.optimizers.SGD(1e-2, momentum=0.9, nesterov=True, l2=1e-3),
    fd.optimizers.SGD(1e-2, clip_norm=0.5),
    fd.optimizers.AdamW(1e-3, eps=1e-3, weight_decay=0.1),
]


@dataclass(frozen=True)
class Case:
    """A net and how it is trained; its text makes it again."""

    stack: list[layers.Layer]
    width: int
    rows: int
    batch: int
    loss: str
    optimizer: fd.optimizers.Optimizer
    seed: int

    def net(self, backend: str, fuse: bool = True, threads: int = 1, dtype: str = "float64") -> fd.Sequential:
        net = fd.Sequential(self.stack, seed=self.seed)
        net.compile(self.loss, self.optimizer, backend=backend, fuse=fuse, threads=threads, dtype=dtype)
        return net.build(self.width)


def draw(rng: np.random.Generator) -> Case:
    def one_of(values: Any) -> Any:
        return values[int(rng.integers(len(values)))]

    stack = []
    for _ in range(rng.integers(1, 8)):
        cls = one_of([layers.Dense, layers.BatchNorm, layers.Dropout, one_of(ELEMENTWISE)])
        names = [field.name for field in dataclasses.fields(cls) if field.name in SETTINGS]
        stack.append(cls(**{name: one_of(SETTINGS[name]) for name in names}))
    rows = int(rng.integers(1, 66))
    loss = one_of(["mse", "binary_cross_entropy", "softmax_cross_entropy"])
    if loss == "softmax_cross_entropy" and _ends_in_softmax(stack):
        loss = "mse"
    return Case(
        stack,
        width=int(rng.integers(1, 101)),
        rows=rows,
        batch=int(rng.integers(1, rows + 1)),
        loss=loss,
        optimizer=one_of(OPTIMIZERS),
        seed=int(rng.integers(100)),
    )


def _ends_in_softmax(stack: list[layers.Layer]) -> bool:
    """Dropout may stand behind it: at prediction it is nothing."""
    last = next((one for one in reversed(stack) if not isinstance(one, layers.Dropout)), None)
    return isinstance(last, layers.Softmax) or getattr(last, "activation", None) == "softmax"


def life(case: Case, net: fd.Sequential) -> dict[str, np.ndarray]:
    """All that a net gives in its life, by name."""
    rng, seen = np.random.default_rng(case.seed), {}
    X = rng.standard_normal((case.rows, case.width))
    out = net.predict(X).shape[1]
    values = rng.uniform(0, 1, (case.rows, out))
    y = rng.integers(0, out, case.rows) if case.loss == "softmax_cross_entropy" else values

    def keep(when: str, **arrays: Any) -> None:
        seen.update({f"{name} {when}": np.asarray(value) for name, value in arrays.items()})

    def look(when: str) -> None:
        keep(when, **net.weights, predict=net.predict(X), one_row=net.predict(X[:1]), loss=net.evaluate(X, y)["loss"])

    look("at first")
    keep("of the loop", forward=net.forward(X, training=True), dx=net.backward(values - 0.3), **net.gradients)
    net.update()
    look("after the loop")
    keep("of steps", losses=[net.train_on_batch(X, y) for _ in range(3)])
    look("after steps")
    keep("of fit", losses=net.fit(X, y, batch_size=case.batch, epochs=2, verbose=0)["loss"])
    look("after fit")
    return seen


def differences(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, float]:
    """The largest difference of each array, as a share of its largest value or of 1."""
    assert a.keys() == b.keys()
    return {
        name: float(np.max(np.abs(a[name] - b[name]), initial=0)) / max(1.0, float(np.max(np.abs(b[name]), initial=0)))
        for name in a
    }


@functools.cache
def drawn(number: int) -> tuple[Case, dict[str, np.ndarray]]:
    """The case of a number, and what NumPy gives without fusion."""
    case = draw(np.random.default_rng(number))
    return case, life(case, case.net("numpy", fuse=False))


def agrees(number: int, backend: str, **settings: Any) -> None:
    case, want = drawn(number)
    shares = differences(life(case, case.net(backend, **settings)), want)
    far = {name: share for name, share in shares.items() if not share <= CLOSE}
    assert not far, f"{case}: {far}"


@pytest.mark.parametrize("number", NETS)
def test_fused_numpy(number: int) -> None:
    agrees(number, "numpy")


@needs_cython
@pytest.mark.parametrize("number", NETS)
@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "plain"])
def test_compiled(number: int, fuse: bool) -> None:
    agrees(number, "cython", fuse=fuse, threads=2)


@needs_numba
@pytest.mark.parametrize("number", NETS[:3])
@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "plain"])
def test_numba(number: int, fuse: bool) -> None:
    agrees(number, "numba", fuse=fuse)


@needs_cython
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("number", NETS)
def test_bits_do_not_depend_on_threads(number: int, dtype: str) -> None:
    case, _ = drawn(number)
    one, three = (life(case, case.net("cython", threads=threads, dtype=dtype)) for threads in (1, 3))
    for name, value in one.items():
        np.testing.assert_array_equal(three[name], value, err_msg=f"{case}: {name}")


def test_what_is_drawn() -> None:
    """Every depth, loss and optimiser, the layers that are more than an activation, and half of the activations."""
    cases = [draw(np.random.default_rng(number)) for number in NETS]
    assert {len(case.stack) for case in cases} == set(range(1, 8))
    assert len({case.loss for case in cases}) == 3
    assert {case.optimizer for case in cases} == set(OPTIMIZERS)
    kinds = {type(one) for case in cases for one in case.stack}
    assert kinds >= {layers.Dense, layers.BatchNorm, layers.Dropout}
    assert 2 * len(kinds.intersection(ELEMENTWISE)) >= len(ELEMENTWISE)
