"""Optimisers: the published rules computed independently, clipping, threads, levels, and their descriptions."""

import json
import math

import numpy as np
import pytest

import fastdl as fd
from fastdl import optimizers
from fastdl.kernels import dispatch

EPS = {np.float32: 2e-6, np.float64: 1e-14}


def torch_sgd(w, gradients, lr, momentum=0.0, nesterov=False, l2=0.0, weight_decay=0.0):
    """torch.optim.SGD, element by element in Python floats (decoupled decay as in AdamW)."""
    w, buffer = [float(x) for x in w], [None] * len(w)
    for g in gradients:
        for i in range(len(w)):
            d = float(g[i]) + l2 * w[i]
            if momentum:
                buffer[i] = d if buffer[i] is None else momentum * buffer[i] + d
                d = d + momentum * buffer[i] if nesterov else buffer[i]
            w[i] = w[i] * (1 - lr * weight_decay) - lr * d
    return np.array(w)


def torch_adam(w, gradients, lr, beta1=0.9, beta2=0.999, eps=1e-8, l2=0.0, weight_decay=0.0):
    """Kingma & Ba's Algorithm 1; torch.optim.Adam with l2, torch.optim.AdamW with weight_decay."""
    w, m, v = [float(x) for x in w], [0.0] * len(w), [0.0] * len(w)
    for t, g in enumerate(gradients, 1):
        for i in range(len(w)):
            d = float(g[i]) + l2 * w[i]
            w[i] *= 1 - lr * weight_decay
            m[i] = beta1 * m[i] + (1 - beta1) * d
            v[i] = beta2 * v[i] + (1 - beta2) * d * d
            w[i] -= lr * (m[i] / (1 - beta1**t)) / (math.sqrt(v[i] / (1 - beta2**t)) + eps)
    return np.array(w)


def draw(size, steps, dtype, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal(size).astype(dtype), rng.standard_normal((steps, size)).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.5, "l2": 0.1},
        {"l2": 0.1},
        {"momentum": 0.9, "nesterov": True, "l2": 0.01, "weight_decay": 0.2},
    ],
)
def test_sgd_follows_torch_for_ten_steps(backend, dtype, settings):
    w, gradients = draw(37, 10, dtype)
    want = torch_sgd(w, gradients, 0.05, **settings)
    v = np.zeros_like(w) if settings.get("momentum") else None
    params = {**settings, "nesterov": int(settings.get("nesterov", 0))}
    for g in gradients:
        dispatch.run("sgd_step", w, g, v, None, backend=backend, **params, lr=0.05)
    np.testing.assert_allclose(w, want, rtol=0, atol=EPS[dtype])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "settings", [{}, {"beta1": 0.8, "beta2": 0.99, "eps": 1e-3}, {"l2": 0.1}, {"weight_decay": 0.1}]
)
def test_adam_follows_algorithm_1_for_ten_steps(backend, dtype, settings):
    w, gradients = draw(37, 10, dtype)
    want = torch_adam(w, gradients, 0.05, **settings)
    m, v = np.zeros_like(w), np.zeros_like(w)
    for step, g in enumerate(gradients):
        dispatch.run("adam_step", w, g, m, v, None, backend=backend, **settings, update=step, lr=0.05)
    np.testing.assert_allclose(w, want, rtol=0, atol=EPS[dtype])


def test_the_first_adam_step_is_the_sign_of_the_gradient(backend):
    w, g = np.zeros(5), np.array([1e-3, -2.0, 5e4, -1e-2, 3.0])
    dispatch.run("adam_step", w, g, np.zeros(5), np.zeros(5), None, backend=backend, eps=1e-30, update=0, lr=0.25)
    np.testing.assert_allclose(w, -0.25 * np.sign(g), rtol=1e-12)


def test_lr_factor_and_scale_multiply(backend):
    w, (g,) = draw(70, 1, np.float64)
    one, two = w.copy(), w.copy()
    dispatch.run("sgd_step", one, g, None, None, backend=backend, lr=0.02)
    dispatch.run("sgd_step", two, g, None, np.array([0.5]), backend=backend, lr=0.1, lr_factor=0.4)
    np.testing.assert_allclose(one, two, rtol=1e-14)
    m, v = np.zeros_like(w), np.zeros_like(w)
    dispatch.run("adam_step", w, g, m, v, np.array([0.5]), backend=backend, lr=0.1)
    np.testing.assert_allclose(m, 0.05 * g, rtol=1e-13)
    np.testing.assert_allclose(v, 0.00025 * g * g, rtol=1e-12)


def test_infinite_weights_and_nan_gradients(backend):
    w, g, v = np.array([np.inf, 1.0, 2.0]), np.array([1.0, np.nan, 1.0]), np.zeros(3)
    dispatch.run("sgd_step", w, g, v, None, backend=backend, momentum=0.9, lr=1.0)
    assert w[0] == np.inf
    assert np.isnan(w[1])
    assert (w[2], v[0]) == (1.0, 1.0)  # l2 = 0 makes no 0 * inf


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [0, 1, 15, 4096, 4097, 100_003])
def test_squared_norm_adds_in_float64(backend, dtype, size):
    g = np.random.default_rng(1).standard_normal(size).astype(dtype)
    total = np.array([2.0])
    dispatch.run("squared_norm", g, total, backend=backend)
    want = 2.0 + math.fsum(float(x) ** 2 for x in g)
    assert total[0] == pytest.approx(want, rel=1e-13)


@pytest.mark.parametrize(("norm", "want"), [(5.0, 0.2), (1.0, 1.0), (0.5, 1.0), (0.0, 1.0), (np.inf, 0.0)])
def test_clip_scale(backend, norm, want):
    scale, total = np.array([np.nan]), np.array([norm * norm])
    dispatch.run("clip_scale", total, scale, backend=backend, max_norm=1.0)
    assert scale[0] == pytest.approx(want)
    assert total[0] == 0  # ready for the next step


def test_clip_scale_keeps_nan(backend):
    scale = np.zeros(1)
    dispatch.run("clip_scale", np.array([np.nan]), scale, backend=backend, max_norm=1.0)
    assert np.isnan(scale[0])


def test_clipped_gradients_have_the_norm(backend):
    gradients = [np.random.default_rng(k).standard_normal(100 + k) * 3 for k in range(3)]
    total, scale = np.zeros(1), np.empty(1)
    for g in gradients:
        dispatch.run("squared_norm", g, total, backend=backend)
    dispatch.run("clip_scale", total, scale, backend=backend, max_norm=2.0)
    moved = [np.zeros_like(g) for g in gradients]
    for w, g in zip(moved, gradients, strict=True):
        dispatch.run("sgd_step", w, g, None, scale, backend=backend, lr=1.0)
    assert np.linalg.norm(np.concatenate(moved)) == pytest.approx(2.0, rel=1e-12)


def test_every_step_of_a_net_is_clipped_afresh(backend):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((64, 8)).astype(np.float32), np.arange(64) % 3
    net = fd.Sequential([fd.layers.Dense(3)], seed=1)
    net.compile("softmax_cross_entropy", fd.optimizers.SGD(1.0, clip_norm=0.05), backend=backend)
    net.train_on_batch(x, y)
    for _ in range(3):
        before = np.concatenate([net.weights[name].ravel() for name in net.weights])
        net.train_on_batch(x, y)
        after = np.concatenate([net.weights[name].ravel() for name in net.weights])
        assert np.linalg.norm(after - before) == pytest.approx(0.05, rel=1e-4)


def run_all(size, dtype, threads, backend="cython"):
    """Bytes of every array after two steps of each sweep, and of the norm."""
    w, (g, h) = draw(size, 2, dtype)
    m, v, u, x, total = np.zeros_like(w), np.zeros_like(w), np.zeros_like(w), w.copy(), np.zeros(1)
    for step, gradient in enumerate((g, h)):
        how = {"backend": backend, "threads": threads, "lr": 0.1}
        dispatch.run("adam_step", w, gradient, m, v, None, **how, update=step, l2=0.1)
        dispatch.run("sgd_step", x, gradient, u, None, **how, momentum=0.9)
        dispatch.run("squared_norm", gradient, total, backend=backend, threads=threads)
    return [a.tobytes() for a in (w, m, v, x, u, total)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [1, 31, 1024, 12_345])
def test_no_thread_count_changes_a_bit(level, dtype, size):
    one = run_all(size, dtype, 1)
    assert all(run_all(size, dtype, threads) == one for threads in (2, 3, 7))
    reference = [np.frombuffer(b, dtype) for b in run_all(size, dtype, 1, "numpy")[:5]]
    for got, want in zip([np.frombuffer(b, dtype) for b in one[:5]], reference, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=10 * EPS[dtype])


def test_sgd_with_momentum_needs_its_velocity():
    for backend in ("numpy", "numba"):
        if dispatch.load(backend) == "available":
            with pytest.raises(ValueError, match="velocity"):
                dispatch.run("sgd_step", np.ones(3), np.ones(3), None, None, backend=backend, momentum=0.9, lr=0.1)


# ---------------------------------------------------------------------------------------------- descriptions


def test_get_knows_names_and_instances():
    assert optimizers.get("sgd") == optimizers.SGD()
    assert optimizers.get("Adam") == optimizers.Adam(1e-3)
    assert optimizers.get("adamw").params()["weight_decay"] == 0.01
    mine = optimizers.SGD(0.1, momentum=0.9)
    assert optimizers.get(mine) is mine
    with pytest.raises(ValueError, match=r"unknown optimizer 'adamax', known: adam, adamw, sgd"):
        optimizers.get("adamax")


@pytest.mark.parametrize(
    "optimizer",
    [optimizers.SGD(0.5, momentum=0.9, nesterov=True, clip_norm=1.0), optimizers.Adam(l2=0.1), optimizers.AdamW(2e-3)],
)
def test_descriptions_go_through_json_and_fit_their_op(optimizer):
    assert optimizers.from_config(json.loads(json.dumps(optimizer.to_config()))) == optimizer
    spec = dispatch.registry.spec(optimizer.op)
    assert set(optimizer.params()) <= {p.name for p in spec.params}
    assert all(spec.array(state).role == "inout" for state in optimizer.states)


def test_sgd_keeps_a_state_only_with_momentum():
    assert optimizers.SGD().states == ()
    assert optimizers.SGD(momentum=0.5).states == ("v",)
    assert optimizers.Adam().states == ("m", "v")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optimizers.SGD(lr=-1), r"SGD\(lr=...\): expected a finite learning rate >= 0, found -1"),
        (lambda: optimizers.SGD(lr="fast"), r"expected a finite learning rate >= 0, found 'fast'"),
        (lambda: optimizers.SGD(lr=math.nan), r"finite learning rate"),
        (lambda: optimizers.SGD(momentum=1.0), r"expected a momentum in \[0, 1\), found 1.0"),
        (lambda: optimizers.SGD(nesterov=True), r"expected momentum > 0"),
        (lambda: optimizers.SGD(momentum=0.9, nesterov=1), r"expected True or False, found 1"),
        (lambda: optimizers.Adam(beta2=1.5), r"Adam\(beta2=...\): expected a decay in \[0, 1\)"),
        (lambda: optimizers.Adam(eps=0.0), r"expected a positive finite number, found 0.0"),
        (lambda: optimizers.AdamW(clip_norm=0), r"expected a finite norm > 0, or None"),
        (lambda: optimizers.from_config({"name": "sgd", "rho": 1}), r"found \['rho'\]"),
        (lambda: optimizers.from_config({"lr": 1}), r"unknown optimizer None"),
    ],
)
def test_bad_settings_say_what_is_expected(make, message):
    with pytest.raises(ValueError, match=message):
        make()
