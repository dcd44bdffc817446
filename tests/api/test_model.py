"""`Sequential`: training, prediction, loops of one's own, files, errors."""

from __future__ import annotations

import numpy as np
import pytest

import fastdl as fd
from fastdl import layers
from fastdl.kernels.activations.reference import ACTIVATIONS

BACKENDS = [name for name, state in fd.backends().items() if state == "available"]


def spirals(rows: int = 300, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Three interleaved arms: not separable by a linear model."""
    rng = np.random.default_rng(seed)
    y = np.arange(rows) % 3
    r = rng.uniform(0.1, 1.0, rows)
    t = 4 * r + y * 2 * np.pi / 3 + 0.1 * rng.standard_normal(rows)
    return np.stack([r * np.cos(t), r * np.sin(t)], 1).astype(np.float32), y


def small_net(backend: str, seed: int = 1, **compile_args: object) -> fd.Sequential:
    net = fd.Sequential(
        [layers.Dense(48), layers.BatchNorm(), layers.ReLU(), layers.Dropout(0.1), layers.Dense(3)], seed=seed
    )
    return net.compile("softmax_cross_entropy", fd.optimizers.Adam(1e-2), backend=backend, **compile_args)


def test_learns(backend: str) -> None:
    X, y = spirals()
    net = small_net(backend)
    history = net.fit(X, y, batch_size=32, epochs=40, verbose=0)
    assert net.backend == backend
    assert history["loss"][-1] < history["loss"][0] / 2
    assert net.evaluate(X, y)["accuracy"] > 0.9
    assert set(history) == {"loss", "accuracy"}
    assert len(history["loss"]) == 40


def test_regression_with_mse(backend: str) -> None:
    rng = np.random.default_rng(0)
    X = rng.standard_normal((200, 4)).astype(np.float32)
    y = X @ np.array([1.0, -2.0, 0.5, 3.0], np.float32) + 0.7
    net = fd.Sequential([layers.Dense(1)], seed=0).compile("mse", fd.optimizers.SGD(0.1, momentum=0.5), backend=backend)
    net.fit(X, y, batch_size=50, epochs=60, verbose=0)
    np.testing.assert_allclose(net.weights["dense_0/kernel"].ravel(), [1, -2, 0.5, 3], atol=1e-3)
    np.testing.assert_allclose(net.weights["dense_0/bias"], [0.7], atol=1e-3)


def test_binary_cross_entropy(backend: str) -> None:
    rng = np.random.default_rng(0)
    X = rng.standard_normal((200, 2)).astype(np.float32)
    y = (X[:, 0] > X[:, 1]).astype(float)
    net = fd.Sequential([layers.Dense(1)], seed=0).compile(
        "binary_cross_entropy", fd.optimizers.Adam(0.1), backend=backend
    )
    net.fit(X, y, batch_size=40, epochs=20, verbose=0)
    assert net.evaluate(X, y)["accuracy"] > 0.97


def test_one_hot_targets_equal_labels(backend: str) -> None:
    X, y = spirals(90)
    a, b = small_net(backend), small_net(backend)
    ha = a.fit(X, y, epochs=3, verbose=0)
    hb = b.fit(X, np.eye(3, dtype=np.float32)[y], epochs=3, verbose=0)
    np.testing.assert_allclose(ha["loss"], hb["loss"], rtol=1e-5)


def test_validation_early_stopping_and_best_weights(backend: str) -> None:
    X, y = spirals(240)
    Xv, yv = spirals(90, seed=9)
    net = small_net(backend)
    stop = fd.callbacks.EarlyStopping(patience=2, min_delta=10.0)  # nothing is an improvement of 10
    history = net.fit(X, y, epochs=50, validation_data=(Xv, yv), callbacks=[stop], verbose=0)
    assert len(history["val_loss"]) == 3
    assert {"val_loss", "val_accuracy"} <= set(history)
    assert net.evaluate(Xv, yv)["loss"] == pytest.approx(history["val_loss"][0], rel=1e-6)


def test_validation_split_takes_the_last_rows(backend: str) -> None:
    X, y = spirals(100)
    net, other = small_net(backend), small_net(backend)
    a = net.fit(X, y, epochs=2, validation_split=0.2, verbose=0)
    b = other.fit(X[:80], y[:80], epochs=2, validation_data=(X[80:], y[80:]), verbose=0)
    assert a == b


def test_sample_weights(backend: str) -> None:
    X, y = spirals(60)
    weight = (np.arange(60) % 2).astype(np.float32)
    net, other = small_net(backend), small_net(backend)
    net.compile("softmax_cross_entropy", "sgd", backend=backend)
    other.compile("softmax_cross_entropy", "sgd", backend=backend)
    a = net.train_on_batch(X, y, weight)
    assert a != pytest.approx(other.train_on_batch(X, y))
    fresh = small_net(backend).evaluate(X, y, weight)["loss"]
    assert fresh == pytest.approx(small_net(backend).evaluate(X[1::2], y[1::2])["loss"], rel=1e-5)
    net.fit(X, y, sample_weight=weight, epochs=1, verbose=0)


def test_partial_batches_and_growing_batches(backend: str) -> None:
    X, y = spirals(101)
    net = small_net(backend)
    for batch in (1, 7, 32, 101, 500):
        net.fit(X, y, batch_size=batch, epochs=1, verbose=0)
    assert net.epoch == 5
    assert net.step == 101 + 15 + 4 + 1 + 1


def test_fit_equals_train_on_batch(backend: str) -> None:
    X, y = spirals(64)
    a, b = small_net(backend), small_net(backend)
    a.fit(X, y, batch_size=16, epochs=2, verbose=0)
    for epoch in range(2):
        order = fd.random.permutation(64, b.seed, epoch)
        for start in range(0, 64, 16):
            rows = order[start : start + 16]
            b.train_on_batch(X[rows], y[rows])
    for name, value in a.weights.items():
        np.testing.assert_array_equal(value, b.weights[name], err_msg=name)


def test_no_shuffle_keeps_the_order(backend: str) -> None:
    X, y = spirals(48)
    a, b = small_net(backend), small_net(backend)
    a.fit(X, y, batch_size=16, epochs=1, shuffle=False, verbose=0)
    for start in range(0, 48, 16):
        b.train_on_batch(X[start : start + 16], y[start : start + 16])
    np.testing.assert_array_equal(a.weights["dense_0/kernel"], b.weights["dense_0/kernel"])


def test_own_loop_equals_train_on_batch(backend: str) -> None:
    X, y = spirals(32)
    a, b = small_net(backend, dtype="float64"), small_net(backend, dtype="float64")
    for _ in range(3):
        a.train_on_batch(X, y)
        z = b.forward(X, training=True)
        _, dz = fd.ops.softmax_cross_entropy(z, y, backend=backend)
        dx = b.backward(dz)
        b.update()
    assert dx.shape == X.shape
    for name, value in a.weights.items():
        np.testing.assert_allclose(value, b.weights[name], rtol=1e-12, atol=1e-13, err_msg=name)


def test_accumulated_gradients_add(backend: str) -> None:
    X, _ = spirals(32)
    net = fd.Sequential([layers.Dense(8), layers.Tanh(), layers.Dense(3)], seed=0)
    net.compile("mse", "sgd", backend=backend, dtype="float64")
    dy = np.ones((32, 3))
    net.forward(X, training=True)
    net.backward(dy)
    whole = dict(net.gradients)
    for k, part in enumerate((slice(0, 20), slice(20, 32))):
        net.forward(X[part], training=True)
        net.backward(dy[part], accumulate=k > 0)
    for name, value in net.gradients.items():
        np.testing.assert_allclose(value, whole[name], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", [n for n, info in ACTIVATIONS.items() if not info.row_op])
def test_whole_net_gradients_by_central_differences(backend: str, name: str) -> None:
    rng = np.random.default_rng(0)
    X, dy = rng.standard_normal((12, 5)), rng.standard_normal((12, 3))
    blocks = []
    for units in (6, 7, 4):
        blocks += [layers.Dense(units), layers.BatchNorm(), layers.Activation(name), layers.Dropout(0.2)]
    net = fd.Sequential([*blocks, layers.Dense(3)], seed=2).compile("mse", "sgd", backend=backend, dtype="float64")
    net.build(5)
    for key in list(net.weights):
        if key.endswith(("gamma", "beta", "slope")):
            net.weights[key] = net.weights[key] + 0.1 * rng.standard_normal(net.weights[key].shape)
    net.forward(X, training=True)
    net.backward(dy)
    for key, analytic in dict(net.gradients).items():
        base, h = net.weights[key], 1e-5
        for place in [tuple(rng.integers(0, n) for n in base.shape) for _ in range(3)]:
            values = []
            for sign in (1, -1):
                moved = base.copy()
                moved[place] += sign * h
                net.weights[key] = moved
                values.append(float((net.forward(X, training=True, first_row=0) * dy).sum()))
            net.weights[key] = base
            numeric = (values[0] - values[1]) / (2 * h)
            assert abs(numeric - analytic[place]) / max(1.0, np.abs(analytic).max()) <= 1e-6, (key, place)


def test_predict_any_number_of_rows(backend: str) -> None:
    X, _ = spirals(700)
    net = small_net(backend).build(2)
    whole = net.predict(X)
    assert whole.shape == (700, 3)
    assert whole.dtype == np.float32
    np.testing.assert_allclose(net.predict(X[:1]), whole[:1], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(net.forward(X), whole)


def test_softmax_layer_predicts_probabilities(backend: str) -> None:
    net = fd.Sequential([layers.Dense(4), layers.Softmax()], seed=0).compile(backend=backend)
    p = net.predict(np.ones((3, 2)))
    np.testing.assert_allclose(p.sum(1), 1, rtol=1e-6)


def test_save_and_load(tmp_path, backend: str) -> None:
    X, y = spirals(64)
    net = fd.Sequential(
        [
            layers.Dense(8, activation="elu", kernel_initializer="he_normal"),
            layers.PReLU(),
            layers.BatchNorm(decay=0.8),
            layers.GELU(approximate="tanh"),
            layers.LeakyReLU(alpha=0.2),
            layers.Dense(3),
        ],
        seed=3,
    ).compile("softmax_cross_entropy", fd.optimizers.AdamW(1e-2, clip_norm=1.0), backend=backend)
    net.fit(X, y, epochs=2, verbose=0)
    path = tmp_path / "net.safetensors"
    net.save(path, extra={"classes": [1, 2]})
    again = fd.load(path, backend=backend)
    assert repr(again) == repr(net)
    assert again.extra == {"classes": [1, 2]}
    assert again.step == net.step
    np.testing.assert_array_equal(again.predict(X), net.predict(X))
    assert again.optimizer == net.optimizer


def test_weights_read_copies_and_write(backend: str) -> None:
    net = small_net(backend).build(2)
    assert list(net.weights) == [
        "dense_0/kernel",
        "dense_0/bias",
        "batchnorm_0/gamma",
        "batchnorm_0/beta",
        "batchnorm_0/running_mean",
        "batchnorm_0/running_var",
        "dense_1/kernel",
        "dense_1/bias",
    ]
    kernel = net.weights["dense_0/kernel"]
    assert kernel.shape == (2, 48)
    kernel[:] = 7
    assert not (net.weights["dense_0/kernel"] == 7).any()
    net.weights["dense_0/kernel"] = kernel
    assert (net.weights["dense_0/kernel"] == 7).all()
    with pytest.raises(ValueError, match=r"expected shape \(2, 48\), found \(48, 2\)"):
        net.weights["dense_0/kernel"] = kernel.T
    with pytest.raises(KeyError, match="dense_0/kernel"):
        net.weights["nothing"]


def test_initial_weights_and_masks_are_the_same_everywhere() -> None:
    nets = {name: small_net(name, seed=11).build(2) for name in BACKENDS}
    for name in nets["numpy"].weights:
        values = [net.weights[name] for net in nets.values()]
        for value in values[1:]:
            np.testing.assert_array_equal(value, values[0])


def test_repeated_runs_have_equal_bits(backend: str) -> None:
    X, y = spirals(150)
    runs = []
    for _ in range(2):
        net = small_net(backend)
        net.fit(X, y, epochs=3, verbose=0)
        runs.append(np.concatenate([v.ravel() for v in net.weights.values()]))
    np.testing.assert_array_equal(runs[0], runs[1])


@pytest.mark.skipif("cython" not in BACKENDS, reason="the compiled back end is not built")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_threads_do_not_change_bits(dtype: str) -> None:
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((130, 70)), rng.integers(0, 10, 130)
    results = []
    for threads in (1, 2, 3, 4):
        net = fd.Sequential(
            [
                layers.Dense(100), layers.BatchNorm(), layers.ReLU(), layers.Dropout(0.4),
                layers.Dense(65), layers.PReLU(), layers.Dropout(0.2), layers.Dense(10),
            ],
            seed=1,
        )  # fmt: skip
        net.compile("softmax_cross_entropy", "adam", backend="cython", threads=threads, dtype=dtype)
        net.fit(X, y, batch_size=50, epochs=3, verbose=0)
        assert net.threads == threads
        results.append(np.concatenate([v.ravel() for v in net.weights.values()]))
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)


def test_context_moves_a_built_model() -> None:
    X, y = spirals(64)
    net = small_net("auto").build(2)
    net.fit(X, y, epochs=1, verbose=0)
    before = net.predict(X)
    with fd.backend("numpy"):
        assert net.backend == "numpy"
        np.testing.assert_allclose(net.predict(X), before, rtol=1e-4, atol=1e-5)
        net.fit(X, y, epochs=1, verbose=0)
    assert "back end" in net.explain()


def test_learning_rate_can_be_changed() -> None:
    X, y = spirals(64)
    net = small_net("numpy")
    seen = []
    schedule = fd.callbacks.LearningRateSchedule(lambda epoch: 0.1 / (epoch + 1))
    watch = fd.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(net.lr))
    net.fit(X, y, epochs=3, callbacks=[schedule, watch], verbose=0)
    assert seen == pytest.approx([0.1, 0.05, 0.1 / 3])


def test_gradient_clipping_bounds_the_step(backend: str) -> None:
    X, y = spirals(64)
    net = fd.Sequential([layers.Dense(3)], seed=0)
    net.compile("softmax_cross_entropy", fd.optimizers.SGD(1.0, clip_norm=1e-3), backend=backend)
    net.build(2)
    before = np.concatenate([v.ravel() for v in net.weights.values()])
    for _ in range(2):
        net.train_on_batch(X, y)
    after = np.concatenate([v.ravel() for v in net.weights.values()])
    assert 1e-3 < np.linalg.norm(after - before) <= 2.001e-3


# ---------------------------------------------------------------------------------------------- errors
def test_unknown_names_list_the_known_ones() -> None:
    net = small_net("numpy")
    for call, known in (
        (lambda: net.compile(loss="hinge"), "softmax_cross_entropy"),
        (lambda: net.compile(loss="mse", optimizer="lion"), "adamw"),
        (lambda: net.compile(loss="mse", backend="tpu"), "cython"),
        (lambda: net.compile(loss="mse", dtype="float16"), "float64"),
        (lambda: layers.Activation("swish"), "relu"),
        (lambda: layers.Dense(3, kernel_initializer="lecun"), "he_normal"),
    ):
        with pytest.raises(ValueError, match=known):
            call()


@pytest.mark.parametrize(
    ("X", "y", "error"),
    [
        (np.ones((4, 2, 2)), np.zeros(4, int), ValueError),
        (np.array([["a", "b"]] * 4), np.zeros(4, int), TypeError),
        (np.ones((4, 2), object), np.zeros(4, int), TypeError),
        (np.ones((0, 2)), np.zeros(0, int), ValueError),
        (np.ones((4, 2)), np.zeros(5, int), ValueError),
        (np.ones((4, 2)), np.array([0, 1, 2, 3]), ValueError),
        (np.ones((4, 2)), np.array([0, -1, 2, 1]), ValueError),
        (np.ones((4, 2)), np.array([0, np.nan, 2, 1]), ValueError),
        (np.ones((4, 2)), np.array([0.5, 1, 2, 1]), ValueError),
        (np.ones((4, 2)), np.array(["a", "b", "c", "a"]), TypeError),
    ],
)
def test_bad_data_changes_nothing(X: np.ndarray, y: np.ndarray, error: type[Exception]) -> None:
    net = small_net("auto").build(2)
    before = net.get_state()
    for call in (net.fit, net.train_on_batch, net.evaluate):
        with pytest.raises(error, match="expected"):
            call(X, y)
    for name, value in net.weights.items():
        np.testing.assert_array_equal(value, before[name])


def test_wrong_settings() -> None:
    net = small_net("numpy")
    X, y = spirals(10)
    for arguments in ({"batch_size": 0}, {"epochs": 0}, {"batch_size": 2.5}, {"validation_split": 1.0}):
        with pytest.raises(ValueError, match="expected"):
            net.fit(X, y, **arguments)
    with pytest.raises(ValueError, match="momentum"):
        layers.BatchNorm(momentum=0.1)
    for rate in (1.0, -0.1, 2, "a", True, 0.99999999):
        with pytest.raises(ValueError, match="rate"):
            layers.Dropout(rate)
    with pytest.raises(ValueError, match="alpha: elu expects a finite number of at least 0"):
        layers.ELU(alpha=-1.0)
    with pytest.raises(ValueError, match="compile"):
        fd.Sequential([layers.Dense(2)]).fit(X, y)
    with pytest.raises(ValueError, match="forward"):
        small_net("numpy").build(2).backward(np.ones((2, 3)))
    with pytest.raises(ValueError, match="expected 2 features"):
        net.build(2).predict(np.ones((3, 5)))
    with pytest.raises(TypeError, match="layers"):
        fd.Sequential(["dense"])
    with pytest.raises(ValueError, match="seed"):
        fd.Sequential([], seed=-1)


def test_broken_model_files(tmp_path) -> None:
    path = tmp_path / "net.safetensors"
    small_net("numpy").build(2).save(path)
    data = path.read_bytes()
    for broken in (data[: len(data) // 2], data[:10], b"", b"PK\x03\x04 not a model"):
        path.write_bytes(broken)
        with pytest.raises(fd.errors.ModelFileError):
            fd.load(path)
