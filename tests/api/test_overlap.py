"""An array that an op writes shares elements with no other one: refused before anything is written, by the op's roles.

Pairs come from the registry: every array that is written against every other one of the call.
"""

from __future__ import annotations

import numpy as np
import pytest
from contract.checks import refuses

from fastdl import checks, ops
from fastdl.cuda.arrays import DeviceArray
from fastdl.kernels import registry
from fastdl.kernels.activations.reference import ACTIVATIONS

SIZES = {"N": 5, "C": 4, "I": 4, "O": 4, "P": 20}
F4 = np.float32


def backward_of(name, forward):
    def prepare(a):
        _, ctx = forward(a)
        return lambda: getattr(ops, f"{name}_backward")(a["dy"], ctx, out=a["out"])

    return prepare


def activation(name):
    slope = ("slope",) if ACTIVATIONS[name].per_channel else ()
    forward = getattr(ops, f"{name}_forward")

    def call(a, out="out"):
        return forward(a["x"], *(a[s] for s in slope), out=a[out])

    saved = ACTIVATIONS[name].saves
    yield f"{name}_forward", ("x", *slope, "out"), lambda a: lambda: call(a)
    yield f"{name}_backward", (saved, *slope, "dy", "out"), backward_of(name, lambda a: call(a, "y"))


VECTORS = ("gamma", "beta", "running_mean", "running_var", "slope")


def batchnorm(a, out="out", training=True):
    vectors = {name: a[name] for name in VECTORS}
    return ops.batchnorm_forward(a["x"], **vectors, activation="prelu", training=training, out=a[out])


def loss(name):
    return lambda a: lambda: getattr(ops, name)(a["z"], a["targets"], a["sample_weight"], out=a["out"])


#: op -> (the caller's arrays, what makes a call with them)
CALLS = {
    "dense_forward": (
        ("x", "w", "b", "out"),
        lambda a: lambda: ops.dense_forward(a["x"], a["w"], a["b"], out=a["out"]),
    ),
    "dropout_forward": (("x", "out"), lambda a: lambda: ops.dropout_forward(a["x"], 0.5, 1, out=a["out"])),
    "dropout_backward": (
        ("dy", "out"),
        backward_of("dropout", lambda a: ops.dropout_forward(np.ones((5, 4), F4), 0.5, 1)),
    ),
    "batchnorm_forward": (("x", *VECTORS, "out"), lambda a: lambda: batchnorm(a)),
    "batchnorm_inference": (("x", *VECTORS, "out"), lambda a: lambda: batchnorm(a, training=False)),
    "batchnorm_backward": (
        ("dy", "x", "gamma", "beta", "slope", "out"),
        backward_of("batchnorm", lambda a: batchnorm(a, "y", training=False)),
    ),
    "sgd_step": (("w", "g", "v"), lambda a: lambda: ops.sgd_step(a["w"], a["g"], a["v"], momentum=0.5)),
    "adam_step": (("w", "g", "m", "v"), lambda a: lambda: ops.adam_step(a["w"], a["g"], a["m"], a["v"], 0)),
    **{name: (("z", "targets", "sample_weight", "out"), loss(name)) for name in ("mse", "binary_cross_entropy")},
    "softmax_cross_entropy": (("z", "targets", "sample_weight", "out"), loss("softmax_cross_entropy")),
    "softmax_cross_entropy_onehot": (("z", "targets", "sample_weight", "out"), loss("softmax_cross_entropy")),
    **{op: (names, call) for name in ACTIVATIONS for op, names, call in activation(name)},
}
#: What `out` may be.
ALIAS = {"dropout_forward": "x", "dropout_backward": "dy"}
ALIAS |= {f"{name}_forward": "x" for name, info in ACTIVATIONS.items() if not info.row_op}
ALIAS |= {f"{name}_backward": "dy" for name, info in ACTIVATIONS.items() if not info.row_op}


def shape_and_dtype(op, name):
    if name in ("out", "y"):
        return (5, 4), F4
    array = registry.spec(op).array({"sample_weight": "weight"}.get(name, name))
    return array.dims(SIZES), np.int64 if array.dtype == "i8" else F4


def arrays_of(op):
    """Arrays that own their memory; 1 is in the domain of every float array, 0 of labels."""
    names, _ = CALLS[op]
    made = {}
    for name in {*names, "x", "y"} if "backward" in op else names:
        shape, dtype = shape_and_dtype(op, name) if name in names else ((5, 4), F4)
        made[name] = np.full(shape, dtype is F4, dtype)
    if op.startswith("batchnorm"):
        made |= {name: np.ones(4, F4) for name in VECTORS}
    if op.startswith("prelu"):
        made["slope"] = np.ones(4, F4)
    return made


def together(a, b, apart):
    """Two arrays like these in one piece of memory, the second ``apart`` bytes behind the first."""
    memory = np.zeros(a.nbytes + b.nbytes + apart, np.uint8)
    floats = F4 in (a.dtype, b.dtype) and np.int64 not in (a.dtype, b.dtype)
    memory.view(F4)[...] = float(floats)
    first = memory[: a.nbytes].view(a.dtype).reshape(a.shape)
    return memory, first, memory[apart : apart + b.nbytes].view(b.dtype).reshape(b.shape)


PAIRS = [
    pytest.param(op, name, other, id=f"{op}-{name}-{other}")
    for op, (names, _) in CALLS.items()
    for name in names
    for other in names
    if name in checks.written(op) and name != other
]


@pytest.mark.parametrize(("op", "name", "other"), PAIRS)
def test_what_is_written_overlaps_nothing(op, name, other):
    prepare = CALLS[op][1]
    given = arrays_of(op)
    prepare({n: x.copy() for n, x in given.items()})()  # apart, it runs
    for apart in (0, 8):  # the same place, and one or two elements on
        if apart == 0 and other == ALIAS.get(op):
            continue
        memory, first, second = together(given[name], given[other], apart)
        call = prepare({**given, name: first, other: second})
        refuses(call, ValueError, ["overlaps", name, other, "hand over another array"], [memory, *given.values()])


@pytest.mark.parametrize("op", ALIAS)
def test_in_place_is_the_same_as_apart(op):
    prepare, alias = CALLS[op][1], ALIAS[op]
    rng = np.random.default_rng(0)
    given = {name: np.abs(rng.standard_normal(x.shape)).astype(F4) for name, x in arrays_of(op).items()}
    apart = {name: x.copy() for name, x in given.items()}
    prepare(apart)()
    given["out"] = given[alias]
    prepare(given)()
    np.testing.assert_array_equal(given["out"], apart["out"])


def test_every_public_op_is_here():
    functions = {name.removesuffix("_forward").removesuffix("_backward") for name in ops.__all__ if name[0].islower()}
    assert functions == {op.rsplit("_forward")[0].removesuffix("_backward") for op in CALLS} - {
        "batchnorm_inference",
        "softmax_cross_entropy_onehot",
    }


def test_one_vector_twice_in_batch_normalisation(backend):
    """What people type: ones for gamma and the variance, zeros for beta and the mean."""
    x, ones, zeros = np.arange(12, dtype=F4).reshape(3, 4), np.ones(4, F4), np.zeros(4, F4)
    refuses(
        lambda: ops.batchnorm_forward(x, ones, zeros, zeros, ones, backend=backend),
        ValueError,
        ["running_mean: overlaps beta", "hand over another array"],
        [x, ones, zeros],
    )
    ops.batchnorm_forward(x, ones, zeros, zeros, ones, training=False, backend=backend)  # nothing is written there


def test_rows_of_out_do_not_overlap_each_other():
    x = np.ones((3, 4), F4)
    for out in (
        np.lib.stride_tricks.as_strided(np.zeros(12, F4), (3, 4), (4, 4)),
        np.lib.stride_tricks.as_strided(np.zeros(12, F4), (3, 4), (0, 4)),
        np.lib.stride_tricks.as_strided(np.zeros(12, F4)[6:], (3, 4), (-8, 4)),
    ):
        refuses(lambda out=out: ops.relu_forward(x, out=out), ValueError, ["out", "its own rows overlap"], [out])
    room = np.zeros((6, 9), F4)
    for out in (room[::2, 2:6], room[:3, :4][::-1]):  # gaps between rows, and backwards
        assert ops.relu_forward(x, out=out)[0] is out
        assert (out == 1).all()


def test_arrays_in_gpu_memory_are_told_apart_by_their_addresses():
    """No GPU is needed to say where an array lies."""
    x, same, behind, far = (DeviceArray(place, (4, 8), "float32") for place in (4096, 4096, 4128, 8192))
    checks.apart("relu_forward", {"x": x, "out": same}, alias="x")
    checks.apart("relu_forward", {"x": x, "out": far}, alias="x")
    for op, given, alias in (
        ("relu_forward", {"x": x, "out": behind}, "x"),
        ("softmax_forward", {"x": x, "out": same}, ""),
        ("adam_step", {"w": x, "g": same, "m": far}, ""),
        ("batchnorm_forward", {"x": far, "gamma": x, "running_var": same, "out": None}, ""),
    ):
        with pytest.raises(ValueError, match=r"overlaps .*(is allowed|share nothing): hand over another array"):
            checks.apart(op, given, alias)
