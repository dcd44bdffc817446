"""Settings of layers, initialisers, optimisers and calls: taken in any type of number, kept as Python's, saved, fixed.

Every public layer goes with every setting through fit, weights, save, load and predict.
"""

from __future__ import annotations

import copy
import dataclasses
import fractions
import inspect
import pickle

import numpy as np
import pytest

import fastdl as fd
from api.nets import X, Y
from fastdl import callbacks, initializers, layers, losses, optimizers
from fastdl.kernels.activations.reference import ACTIVATIONS

REALS = [np.float16, np.float32, np.float64, np.longdouble, np.array, fractions.Fraction]
WHOLES = [np.int8, np.uint8, np.int32, np.int64, np.uint64, np.array]
KINDS = {name: getattr(layers, name) for name in layers.__all__ if name not in ("Layer", "Activation")}
MADE = {"Dense": {"units": 4}, "Dropout": {"rate": 0.25}}
INITIALIZERS = [
    *initializers._KNOWN, 0.5, np.float32(0.5), np.int64(1), initializers.Normal(np.float32(0), np.float16(0.5))
]  # fmt: skip


def values(name: str) -> list[object]:
    """What a setting may be."""
    if name == "units":
        return [kind(4) for kind in WHOLES]
    if name in ("alpha", "rate", "decay", "eps"):
        return [0.25, *(kind(0.25) for kind in REALS)]
    if name in ("use_bias",):
        return [True, False, np.True_, np.False_]
    if name == "activation":
        return [None, np.str_("relu"), *ACTIVATIONS]
    if name == "approximate":
        return ["none", "tanh", np.str_("tanh")]
    if name.endswith("initializer"):
        vectors = name != "kernel_initializer"
        return [v for v in INITIALIZERS if not (vectors and isinstance(v, str) and v.startswith(("he", "glorot")))]
    raise KeyError(f"the setting {name} needs values here")


CASES = [
    pytest.param(cls, {**MADE.get(name, {}), field.name: value}, id=f"{name}-{field.name}-{value!r}"[:60])
    for name, cls in KINDS.items()
    for field in dataclasses.fields(cls)
    for value in values(field.name)
]
CASES += [pytest.param(cls, MADE.get(name, {}), id=f"{name}-defaults") for name, cls in KINDS.items()]


@pytest.mark.parametrize(("cls", "settings"), CASES)
def test_every_layer_with_every_setting(cls, settings, tmp_path) -> None:
    layer = cls(**settings)
    for field in dataclasses.fields(layer):
        value = getattr(layer, field.name)
        assert type(value) in (int, float, bool, str, type(None)) or isinstance(value, initializers.Initializer)
    net = fd.Sequential([layers.Dense(5), layer, layers.Dense(3)], seed=3).compile("softmax_cross_entropy")
    net.fit(X, Y, 30, epochs=1, verbose=0)
    assert all(np.isfinite(value).all() for value in net.weights.values())
    net.save(tmp_path / "net")
    again = fd.load(tmp_path / "net")
    assert repr(again) == repr(net)
    assert list(again.weights) == list(net.weights)
    np.testing.assert_array_equal(again.predict(X), net.predict(X))


@pytest.mark.parametrize("name", KINDS)
def test_settings_of_a_layer_are_fixed(name: str) -> None:
    layer = KINDS[name](**MADE.get(name, {}))
    for twin in (layer, copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        for field in dataclasses.fields(twin):
            before = getattr(twin, field.name)
            with pytest.raises(AttributeError, match=rf"{name}.{field.name}: .*fixed when they are made.*replace"):
                setattr(twin, field.name, before)
            with pytest.raises(AttributeError, match=rf"{name}.{field.name}: .*cannot be deleted"):
                delattr(twin, field.name)
            assert getattr(twin, field.name) == before
        twin.note = "attributes of one's own are free"


def test_a_layer_of_ones_own_may_tidy_its_settings_and_is_fixed_then() -> None:
    @dataclasses.dataclass(eq=False)
    class Scaled(layers.Dense):
        scale: float = 1.0

        def __post_init__(self) -> None:
            super().__post_init__()
            self.scale = float(self.scale)

    layer = Scaled(3, scale=np.float32(2))
    assert (layer.units, layer.scale) == (3, 2.0)
    with pytest.raises(dataclasses.FrozenInstanceError, match=r"Scaled\.scale"):
        layer.scale = 3.0
    assert dataclasses.replace(layer, scale=3).scale == 3.0


OPTIMIZERS = [optimizers.SGD, optimizers.Adam, optimizers.AdamW]


@pytest.mark.parametrize("kind", REALS)
@pytest.mark.parametrize("rule", OPTIMIZERS)
def test_optimizers_take_numbers_of_any_type(rule, kind, tmp_path) -> None:
    names = [f.name for f in dataclasses.fields(rule) if f.name != "nesterov"]
    made = rule(**{name: kind(0.25) for name in names})
    assert made == rule(**dict.fromkeys(names, 0.25))
    assert all(type(getattr(made, name)) is float for name in names)
    net = fd.Sequential([layers.Dense(3)]).compile("mse", made).build(6)
    net.save(tmp_path / "net")
    assert fd.load(tmp_path / "net").optimizer == made
    net.lr = kind(0.5)
    assert type(net.lr) is float
    assert net.lr == 0.5


def test_settings_of_optimizers_and_initializers_are_fixed() -> None:
    rule = optimizers.Adam(1e-3)
    with pytest.raises(AttributeError, match=r"Adam\.lr: .*found an assignment of 0\.1; .*net\.lr = 0\.1"):
        rule.lr = 0.1
    with pytest.raises(AttributeError, match=r"Adam\.eps: .*compile again, with dataclasses\.replace"):
        rule.eps = 0.1
    with pytest.raises(AttributeError, match=r"Normal\.std: .*fixed when they are made"):
        initializers.Normal().std = 1.0
    for made in (rule, initializers.Normal(std=2)):
        assert made == copy.deepcopy(made) == pickle.loads(pickle.dumps(made))
        assert hash(made) == hash(copy.deepcopy(made))
        assert made != dataclasses.replace(made, **{dataclasses.fields(made)[0].name: 0.5})


@pytest.mark.parametrize("kind", REALS)
def test_initializers_take_numbers_of_any_type(kind) -> None:
    for cls in initializers._KNOWN.values():
        names = [f.name for f in dataclasses.fields(cls)]
        assert cls(**{name: kind(0.25) for name in names}) == cls(**dict.fromkeys(names, 0.25))
    assert initializers.get(kind(0.25)) == initializers.Constant(0.25)


NO_NUMBERS = [None, True, np.True_, "0.25", 1j, np.array([0.25]), [0.25], float("nan"), float("inf"), 10**400]


@pytest.mark.parametrize("bad", NO_NUMBERS, ids=repr)
@pytest.mark.parametrize(
    "make",
    [
        lambda v: layers.Dropout(v),
        lambda v: layers.BatchNorm(decay=v),
        lambda v: layers.BatchNorm(eps=v),
        lambda v: layers.LeakyReLU(alpha=v),
        lambda v: layers.ELU(v),
        lambda v: optimizers.Adam(eps=v),
        lambda v: optimizers.SGD(v),
        lambda v: initializers.Constant(v),
        lambda v: initializers.Normal(std=v),
        lambda v: optimizers.check_lr(v),
        lambda v: callbacks.EarlyStopping(min_delta=v),
    ],
    ids=["rate", "decay", "eps", "alpha", "ELU", "adam-eps", "lr", "constant", "std", "check_lr", "min_delta"],
)
def test_what_is_no_finite_number_is_refused(make, bad) -> None:
    with pytest.raises(ValueError, match=r"expected .*found"):
        make(bad)


@pytest.mark.parametrize("kind", WHOLES)
def test_whole_numbers_of_any_type(kind) -> None:
    net = fd.Sequential([layers.Dense(kind(3))], seed=kind(7)).compile("softmax_cross_entropy", threads=kind(1))
    want = fd.Sequential([layers.Dense(3)], seed=7).compile("softmax_cross_entropy", threads=1)
    stop = callbacks.EarlyStopping("loss", patience=kind(5))
    got = net.fit(X, Y, batch_size=kind(32), epochs=kind(2), callbacks=stop, verbose=0)
    assert got == want.fit(X, Y, batch_size=32, epochs=2, verbose=0)
    with fd.backend("numpy", threads=kind(1)):
        pass
    mask = fd.random.dropout_mask((4, 3), 0.5, kind(1), layer=kind(2), step=kind(3), first_row=kind(4))
    np.testing.assert_array_equal(mask, fd.random.dropout_mask((4, 3), 0.5, 1, layer=2, step=3, first_row=4))
    np.testing.assert_array_equal(fd.random.permutation(kind(9), kind(1)), fd.random.permutation(9, 1))


@pytest.mark.parametrize("bad", [None, True, np.True_, 2.0, np.float64(2), "2", np.array([2]), -1, 1 << 64], ids=repr)
def test_what_is_no_whole_number_is_refused(bad) -> None:
    net = fd.Sequential([layers.Dense(2)]).compile("mse")
    calls = {
        "seed": lambda: fd.Sequential([], seed=bad),
        "patience": lambda: callbacks.EarlyStopping(patience=bad),
        "step": lambda: setattr(net, "step", bad),
    }
    if type(bad) is not int or bad < 0:  # no limit above
        calls |= {
            "units": lambda: layers.Dense(bad),
            "batch_size": lambda: net.fit(X, X[:, :2], batch_size=bad, verbose=0),
            "epochs": lambda: net.fit(X, X[:, :2], epochs=bad, verbose=0),
            "threads": lambda: net.compile("mse", threads=bad),
            "n:": lambda: fd.random.permutation(bad, 0),
        }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"{name}.*expected"):
            call()


# ---------------------------------------------------------------------------------------------- numbers and the dtype
@pytest.mark.parametrize(
    ("layer", "optimizer", "word"),
    [
        (layers.ReLU(), optimizers.Adam(eps=1e-46), "Adam eps"),
        (layers.ReLU(), optimizers.AdamW(eps=1e-40), "AdamW eps"),
        (layers.ReLU(), optimizers.SGD(lr=1e39), "SGD lr"),
        (layers.ReLU(), optimizers.SGD(clip_norm=1e39), "SGD clip_norm"),
        (layers.BatchNorm(eps=1e-39), "sgd", "BatchNorm eps"),
        (layers.LeakyReLU(alpha=-1e39), "sgd", "LeakyReLU alpha"),
        (layers.PReLU(1e39), "sgd", "Constant value"),
        (layers.Dense(2, kernel_initializer=initializers.Uniform(-1e39, 0)), "sgd", "Uniform low"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_settings_that_float32_cannot_hold_are_refused_by_compile(layer, optimizer, word: str) -> None:
    net = fd.Sequential([layer]).compile("mse", "sgd", dtype="float64")
    before = net.optimizer
    with pytest.raises(ValueError, match=rf"{word}: expected at .* in float32, found"):
        net.compile("mse", optimizer, dtype="float32")
    assert net.optimizer == before
    net.compile("mse", optimizer, dtype="float64").build(2)


def test_weights_without_a_gradient_stay_at_the_smallest_eps(backend: str) -> None:
    """Adam's step is 0 / (0 + eps) there."""
    x = X.copy()
    x[:, 1] = 0
    for dtype in ("float32", "float64"):
        net = fd.Sequential([layers.Dense(4), layers.ReLU(), layers.Dense(3)], seed=1)
        rule = optimizers.Adam(1e-3, eps=float(np.finfo(dtype).tiny))
        net.compile("softmax_cross_entropy", rule, backend=backend, dtype=dtype).build(6)
        before = net.weights["dense_0/kernel"][1]
        net.fit(x, Y, epochs=2, verbose=0)
        np.testing.assert_array_equal(net.weights["dense_0/kernel"][1], before)


# ---------------------------------------------------------------------------------------------- optimiser ops
ADAM = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "l2": 0.0, "weight_decay": 0.0}
SGD = {"lr": 0.1, "momentum": 0.0, "l2": 0.0, "weight_decay": 0.0}
OUTSIDE = {"momentum": [-0.1, 1.0], "beta1": [-0.1, 1.0], "beta2": [1.0, 1.5], "eps": [0.0, -1e-8, 1e-46]}


@pytest.mark.parametrize(("op", "name"), [("adam_step", n) for n in ADAM] + [("sgd_step", n) for n in SGD])
def test_settings_of_optimizer_ops_are_those_of_the_classes(op: str, name: str, backend: str) -> None:
    for bad in (*NO_NUMBERS[:6], np.nan, np.inf, 1e39, *OUTSIDE.get(name, [-0.1])):
        w, g, m, v = (np.ones(3, np.float32) for _ in range(4))
        arrays = (w, g, v) if op == "sgd_step" else (w, g, m, v)
        more = {} if op == "sgd_step" else {"step": 0}
        with pytest.raises(ValueError, match=f"{name}: expected .*found"):
            getattr(fd.ops, op)(*arrays, **more, **{name: bad}, backend=backend)
        assert all((x == 1).all() for x in arrays)


def test_optimizer_ops_take_numbers_of_any_type(backend: str) -> None:
    results = []
    for kind in (float, *REALS):
        w, g, m, v = (np.linspace(0.1, 1, 5, dtype=np.float32) for _ in range(4))
        given = {name: kind(0.25) for name in ADAM}
        fd.ops.adam_step(w, g, m, v, np.int64(2), **given, backend=backend)
        fd.ops.sgd_step(w, g, v, **{name: kind(0.25) for name in SGD}, nesterov=np.True_, backend=backend)
        results.append(w)
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])
    with pytest.raises(ValueError, match="nesterov: expected True or False, found 1"):
        fd.ops.sgd_step(w, g, v, momentum=0.5, nesterov=1)
    with pytest.raises(ValueError, match="step: expected an integer"):
        fd.ops.adam_step(w, g, m, v, 2.0)


@pytest.mark.parametrize("bad", [*NO_NUMBERS[1:], 1e39], ids=repr)
def test_alpha_of_ops(bad) -> None:
    x, vectors = np.ones((3, 2), np.float32), [np.ones(2, np.float32) for _ in range(4)]
    for call in (
        lambda: fd.ops.leaky_relu_forward(x, bad),
        lambda: fd.ops.elu_forward(x, alpha=bad),
        lambda: fd.ops.dense_forward(x, np.ones((2, 2), np.float32), activation="elu", alpha=bad),
        lambda: fd.ops.batchnorm_forward(x, *vectors, activation="leaky_relu", alpha=bad),
    ):
        with pytest.raises(ValueError, match="alpha: expected"):
            call()
    assert all((v == 1).all() for v in vectors)


@pytest.mark.parametrize("bad", [*NO_NUMBERS, 0.0, 1e-46], ids=repr)
def test_eps_and_decay_of_batch_normalisation_ops(bad) -> None:
    x, vectors = np.ones((3, 2), np.float32), [np.ones(2, np.float32) for _ in range(4)]
    with pytest.raises(ValueError, match="eps: expected"):
        fd.ops.batchnorm_forward(x, *vectors, eps=bad)
    if bad not in (0.0, 1e-46):
        with pytest.raises(ValueError, match="decay: expected"):
            fd.ops.batchnorm_forward(x, *vectors, decay=bad)
    assert all((v == 1).all() for v in vectors)


# ---------------------------------------------------------------------------------------------- losses
LOGITS = [("softmax_cross_entropy", "softmax"), ("binary_cross_entropy", "sigmoid")]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("loss", "activation"), LOGITS)
def test_an_activation_that_the_loss_applies_itself_is_applied_once(loss: str, activation: str, dtype: str) -> None:
    """Training and evaluation are those of the net without it, `predict` and `forward` have it."""
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((40, 5)), np.eye(3)[np.arange(40) % 3]
    bare = fd.Sequential([layers.Dense(3)], seed=2).compile(loss, dtype=dtype)
    ends = [
        [layers.Dense(3), layers.Activation(activation)],
        [layers.Dense(3, activation=activation)],
        [layers.Dense(3, activation=activation), layers.Identity()],
        [layers.Dense(3), layers.Activation(activation), layers.Identity(), layers.Dropout(0.0)],
    ]
    nets = [fd.Sequential(end, seed=2).compile(loss, dtype=dtype) for end in ends]
    want = bare.fit(X, y, 16, epochs=3, validation_data=(X, y), verbose=0)
    want_step = bare.train_on_batch(X, y)
    act = getattr(fd.ops, f"{activation}_forward")
    for net in nets:
        assert net.fit(X, y, 16, epochs=3, validation_data=(X, y), verbose=0) == want
        assert net.train_on_batch(X, y) == want_step
        assert net.evaluate(X, y) == bare.evaluate(X, y)
        for name, value in bare.weights.items():
            np.testing.assert_array_equal(net.weights[name], value)
        for out in (net.predict(X), net.forward(X, training=True)):
            np.testing.assert_allclose(out, act(bare.predict(X))[0], rtol=1e-5, atol=1e-7)
    big = 1e4 * np.eye(3)  # the softmax of which is 0 and 1: its logarithm would be -inf
    net = nets[0]
    net.set_state({"dense_0/kernel": np.vstack([big, np.zeros((2, 3))]), "dense_0/bias": np.zeros(3)})
    assert np.isfinite(net.evaluate(np.eye(5)[:3], np.eye(3)[[1, 2, 0]])["loss"])


@pytest.mark.parametrize(("loss", "activation"), LOGITS)
def test_such_an_activation_elsewhere_is_a_layer_like_others(loss: str, activation: str) -> None:
    X, y = np.eye(5), np.eye(3)[np.arange(5) % 3]
    for stack in (
        [layers.Activation(activation), layers.Dense(3)],
        [layers.Dense(3), layers.Activation(activation), layers.Dropout(0.5)],
        [layers.Dense(3, activation=activation), layers.BatchNorm()],
    ):
        net = fd.Sequential(stack).compile(loss).build(5)
        assert f"{activation}_forward" in str(net.program) or f"activation={activation}" in str(net.program)
        assert np.isfinite(net.fit(X, y, verbose=0)["loss"]).all()


@pytest.mark.parametrize(("loss", "activation"), LOGITS)
def test_logits_give_the_probabilities_that_the_advice_promises(loss: str, activation: str) -> None:
    net = fd.Sequential([layers.Dense(3)]).build(6)
    z = net.predict(X)
    p, _ = getattr(fd.ops, f"{activation}_forward")(z)
    want = np.exp(z) / np.exp(z).sum(1, keepdims=True) if activation == "softmax" else 1 / (1 + np.exp(-z))
    np.testing.assert_allclose(p, want, rtol=1e-5)


def test_a_loss_of_ones_own_trains_and_is_refused_by_save(tmp_path) -> None:
    mine = losses.Loss("mine", "mse", "values")
    net = fd.Sequential([layers.Dense(2)]).compile(mine)
    net.fit(X, X[:, :2], verbose=0)
    with pytest.raises(ValueError, match=r"loss: .*'mine'.*compile"):
        net.save(tmp_path / "net")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"target_kind: expected 'labels' or 'values', found 'rows'"):
        losses.Loss("mine", "mse", "rows")


@pytest.mark.parametrize("kind", [*KINDS.values(), optimizers.SGD, optimizers.Adam, initializers.Normal])
def test_help_shows_the_settings(kind: type) -> None:
    shown = inspect.signature(kind).parameters
    assert set(shown) >= {field.name for field in dataclasses.fields(kind)}
    assert "self" not in shown
    assert "args" not in shown
