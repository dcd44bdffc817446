"""Wrong arguments of any kind: the error has words of ours, which name the argument and what came."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from contract.checks import refuses

import fastdl as fd
from fastdl import layers, ops
from fastdl.callbacks import EarlyStopping

Z, C = np.ones((6, 4), np.float32), np.ones(4, np.float32)
TWO = np.array([1, 2])  #: has no truth value, no hash, and compares element by element
BAD = (TypeError, ValueError)


def net(**settings):
    return fd.Sequential([layers.Dense(3)]).compile(loss="mse", **settings)


def fit(X, **settings):
    return net().fit(X, np.ones((len(X), 3)), verbose=settings.pop("verbose", 0), **settings)


def batchnorm(**settings):
    return ops.batchnorm_forward(Z, C, C, C.copy(), C.copy(), **settings)


ARRAYS = {
    "backend of an op": (lambda v: ops.relu_forward(Z, backend=v), "backend"),
    "backend of a context": (lambda v: fd.backend(v).__enter__(), "backend"),
    "backend of random": (lambda v: fd.random.permutation(5, 1, backend=v), "backend"),
    "backend of compile": (lambda v: net(backend=v), "backend"),
    "threads of an op": (lambda v: ops.relu_forward(Z, threads=v), "threads"),
    "threads of a context": (lambda v: fd.backend("numpy", v).__enter__(), "threads"),
    "threads of compile": (lambda v: net(threads=v), "threads"),
    "fuse": (lambda v: net(fuse=v), "fuse"),
    "dtype": (lambda v: net(dtype=v), "dtype"),
    "loss": (lambda v: net().compile(loss=v), "loss"),
    "optimizer": (lambda v: net(optimizer=v), "optimizer"),
    "activation of dense_forward": (lambda v: ops.dense_forward(Z, np.eye(4, dtype="f4"), activation=v), "activation"),
    "activation of batchnorm_forward": (lambda v: batchnorm(activation=v), "activation"),
    "activation of Dense": (lambda v: layers.Dense(3, activation=v), "activation"),
    "approximate": (lambda v: layers.GELU(approximate=v), "approximate"),
    "training": (lambda v: batchnorm(training=v), "training"),
    "training of forward": (lambda v: net().forward(Z, training=v), "training"),
    "accumulate": (lambda v: net().backward(Z, accumulate=v), "accumulate"),
    "stop_training": (lambda v: setattr(net(), "stop_training", v), "stop_training"),
    "momentum": (lambda v: ops.sgd_step(C.copy(), C, momentum=v), "momentum"),
    "monitor": (lambda v: EarlyStopping(monitor=v), "monitor"),
    "mode": (lambda v: EarlyStopping(mode=v), "mode"),
    "verbose": (lambda v: fit(Z, verbose=v), "verbose"),
    "shuffle": (lambda v: fit(Z, shuffle=v), "shuffle"),
    "rows": (lambda v: fd.data.random_split(v), "rows"),
    "fraction": (lambda v: fd.data.random_split(9, v), "fraction"),
    "seed": (lambda v: fd.data.random_split(9, 0.5, v), "seed"),
}


@pytest.mark.parametrize(("call", "name"), ARRAYS.values(), ids=ARRAYS)
def test_an_array_for_a_setting(call, name):
    for value in (TWO, np.array(["auto", "auto"]), np.ones((2, 2))):
        refuses(lambda v=value: call(v), ValueError, [name, "array("])


SENTENCES = {
    "monitor": (lambda: EarlyStopping(monitor=None), ValueError, ["monitor", "name of the history", "None"]),
    "dtype 0": (lambda: net(dtype=0), ValueError, ["dtype", "0", "float32, float64"]),
    "dtype None": (lambda: net(dtype=None), ValueError, ["dtype", "None", "float32, float64"]),
    "dtype int": (lambda: net(dtype=np.int32), ValueError, ["dtype", "'int32'", "float32, float64"]),
    "fuse": (lambda: net(fuse="no"), ValueError, ["fuse", "True or False", "'no'"]),
    "training": (lambda: net().forward(Z, training="no"), ValueError, ["training", "True or False", "'no'"]),
    "accumulate": (lambda: net().backward(Z, accumulate=2), ValueError, ["accumulate", "True or False", "2"]),
    "verbose": (lambda: fit(Z, verbose="yes"), ValueError, ["verbose", "integer", "'yes'"]),
    "no layers": (lambda: fd.Sequential(None), TypeError, ["layers: expected layers in a list", "None"]),
    "one layer": (lambda: fd.Sequential(layers.ReLU()), TypeError, ["layers: expected layers in a list", "ReLU"]),
    "split inf": (lambda: fd.data.random_split(float("inf")), ValueError, ["rows", "integer of at least 2", "inf"]),
    "split 5.5": (lambda: fd.data.random_split(5.5), ValueError, ["rows", "integer of at least 2", "5.5"]),
    "split 1": (lambda: fd.data.random_split(1), ValueError, ["rows", "integer of at least 2", "1"]),
    "split 0": (lambda: fd.data.random_split(9, 0.0), ValueError, ["fraction", "between 0 and 1", "0.0"]),
    "split all": (lambda: fd.data.random_split(9, 1.0), ValueError, ["fraction", "between 0 and 1", "1.0"]),
    "split NaN": (lambda: fd.data.random_split(9, np.nan), ValueError, ["fraction", "between 0 and 1", "nan"]),
    "split a": (lambda: fd.data.stratified_split(TWO, "a"), ValueError, ["fraction", "between 0 and 1", "'a'"]),
    "split seed": (lambda: fd.data.random_split(9, seed=2.5), ValueError, ["seed", "integer", "2.5"]),
    "strata seed": (lambda: fd.data.stratified_split(TWO, 0.5, -1), ValueError, ["seed", "integer", "-1"]),
    "strata None": (lambda: fd.data.stratified_split(None), ValueError, ["labels", "(N,)", "()"]),
    "strata ragged": (lambda: fd.data.stratified_split([1, [2]]), TypeError, ["labels: expected classes of one type"]),
    "strata mixed": (lambda: fd.data.stratified_split([1, None]), TypeError, ["labels: expected classes of one type"]),
    "mask None": (lambda: fd.random.dropout_mask(None, 0.5, 1), ValueError, ["shape", "at least 0", "None"]),
    "mask -1": (lambda: fd.random.dropout_mask((-1, 2), 0.5, 1), ValueError, ["shape", "at least 0", "(-1, 2)"]),
    "mask 2.0": (lambda: fd.random.dropout_mask((3, 2.0), 0.5, 1), ValueError, ["shape", "integers", "(3, 2.0)"]),
    "mask text": (lambda: fd.random.dropout_mask("ab", 0.5, 1), ValueError, ["shape", "integers", "'ab'"]),
    "out in columns": (lambda: ops.mse(Z, Z, out=np.asfortranarray(Z)), ValueError, ["out: expected adjacent columns"]),
    "out reversed": (lambda: ops.relu_forward(Z, out=Z[::-1]), ValueError, ["out may be x itself, or share nothing"]),
    "out of a row op": (
        lambda: ops.softmax_forward(Z, out=Z),
        ValueError,
        ["out: overlaps x", "no overlap is allowed"],
    ),
    "a list in a row": (lambda: fit([[1, [2]]] * 2), TypeError, ["X: ", "in row 0 rows of different lengths", "(1,)"]),
    "fractions": (lambda: fit([[Fraction(1, 2)]] * 2), TypeError, ["X: ", "Fraction", "np.array(X, float)"]),
    "10**400": (lambda: fit([[1.0], [10**400]]), TypeError, ["X: ", "beyond float64 at [1, 0]", "scale"]),
}


@pytest.mark.parametrize(("call", "kind", "words"), SENTENCES.values(), ids=SENTENCES)
def test_sentence(call, kind, words):
    refuses(call, kind, words)


def test_the_advice_on_fractions_helps():
    X = np.array([[Fraction(1, 2)]] * 2, float)
    fit(X)


@pytest.mark.parametrize("n", [3, np.int64(3)])
def test_a_mask_of_a_vector(n):
    assert fd.random.dropout_mask(n, 0.5, 1).shape == (3,)
    assert fd.random.dropout_mask([n, 2], 0.5, 1).shape == (3, 2)


def test_unknown_activations_are_listed_once():
    with pytest.raises(ValueError, match="unknown activation") as error:
        layers.Activation("gelu_tan")
    known = str(error.value).partition("known: ")[2].split(", ")
    assert len(known) == len(set(known))
    assert "gelu_tanh" in known
    assert layers.Activation("gelu_tanh").approximate == "tanh"
    assert layers.Activation("gelu").approximate == "none"


@pytest.mark.parametrize("kind", [layers.Layer, type("Mine", (layers.Layer,), {})])
def test_a_layer_without_a_trace_is_told_of_layers_that_there_are(kind):
    with pytest.raises(TypeError, match="trace") as error:
        fd.Sequential([kind()]).compile(loss="mse").fit(Z, Z, verbose=0)
    names = str(error.value).rpartition("use ")[2].split(", ")
    assert "Dense" in names
    assert kind.__name__ not in names
    assert [n for n in names if n != "Mine" and not hasattr(layers, n)] == []


class Raising:
    """An array whose library raises whatever it likes, wherever it is asked."""

    def __len__(self):
        return 6

    def __dlpack_device__(self):
        raise RuntimeError("sharded")

    @property
    def __cuda_array_interface__(self):
        raise RuntimeError("sharded")

    def absent(self):
        raise AttributeError

    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("sharded")


@pytest.mark.parametrize("hidden", [(), ("__cuda_array_interface__",), ("__dlpack_device__",)])
def test_arrays_that_raise(hidden):
    X = type("Raising", (Raising,), dict.fromkeys(hidden, property(Raising.absent)))()
    refuses(lambda: fit(X), TypeError, ["X: expected an array of numbers", "Raising", "sharded"])
    refuses(lambda: net().predict(X), TypeError, ["X: expected an array of numbers", "Raising", "sharded"])
    refuses(lambda: net().fit(Z, X), TypeError, ["y: expected an array of numbers", "Raising", "sharded"])
    refuses(lambda: ops.relu_forward(X), TypeError, ["x: expected a NumPy array", "Raising"])
    refuses(lambda: ops.mse(Z, X), TypeError, ["targets: expected a NumPy array", "Raising"])


@pytest.mark.parametrize("name", ["FASTDL_CUBLASLT", "FASTDL_TF32"])
def test_switches_of_the_environment(name, monkeypatch):
    from fastdl.kernels.common.driver import Driver
    from fastdl.kernels.dense import cublaslt

    for value, on in (("0", False), ("1", True), ("", True)):
        monkeypatch.setenv(name, value)
        assert cublaslt.switch(name, True) is on
    for value in ("foo", "2", "true", " 1"):
        monkeypatch.setenv(name, value)
        refuses(lambda: Driver.library.func(object()), ValueError, [name, "expected 0 or 1", repr(value)])
