"""The Program: tracing, fusion, memory, printing; fused == unfused on every back end."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

import fastdl as fd
from fastdl import layers
from fastdl.builder import Feed
from fastdl.kernels import dispatch
from fastdl.kernels.activations.reference import ACTIVATIONS
from fastdl.run.storage import plan_arena, stored_size

BACKENDS = [name for name, state in fd.backends().items() if state == "available"]
ACTIVATION_NAMES = [n for n, info in ACTIVATIONS.items() if not info.row_op]


def block_net(activation: str = "relu", rate: float = 0.3, seed: int = 5) -> fd.Sequential:
    return fd.Sequential(
        [
            layers.Dense(37, use_bias=False),
            layers.BatchNorm(),
            layers.Activation(activation),
            layers.Dropout(rate),
            layers.Dense(20),
            layers.Activation(activation),
            layers.Dropout(rate),
            layers.Dense(5),
        ],
        seed=seed,
    )


def data(rows: int = 50, width: int = 13) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    return rng.standard_normal((rows, width)), rng.integers(0, 5, rows)


def trained(backend: str, fuse: bool, activation: str, dtype: str = "float64", steps: int = 3) -> fd.Sequential:
    X, y = data()
    net = block_net(activation).compile(
        "softmax_cross_entropy", fd.optimizers.Adam(1e-2), backend=backend, dtype=dtype, fuse=fuse
    )
    for _ in range(steps):
        net.train_on_batch(X, y)
    return net


@pytest.mark.parametrize("activation", ACTIVATION_NAMES)
def test_fused_equals_unfused(backend: str, activation: str) -> None:
    fused, plain = trained(backend, True, activation), trained(backend, False, activation)
    ops, unfused = (Counter(call.op for call in net.program.calls) for net in (fused, plain))
    into_batchnorm = [f"{activation}_forward", "dropout_forward", "dropout_backward", f"{activation}_backward"]
    into_dense = [] if activation in ("prelu", "identity") else [f"{activation}_forward"]
    assert unfused - ops >= Counter(into_batchnorm + into_dense)
    assert not ops - unfused
    for name, value in fused.weights.items():
        np.testing.assert_allclose(value, plain.weights[name], rtol=1e-9, atol=1e-11, err_msg=name)


def test_back_ends_agree_over_steps(backend: str) -> None:
    reference, net = trained("numpy", False, "relu"), trained(backend, True, "relu")
    for name, value in net.weights.items():
        np.testing.assert_allclose(value, reference.weights[name], rtol=1e-9, atol=1e-11, err_msg=name)


def test_fusion_absorbs_the_block() -> None:
    net = block_net().compile("softmax_cross_entropy", "adam", backend="numpy")
    net.build(13)
    ops = [c.op for c in net.program.calls]
    assert "relu_backward" in ops  # of the block without batch normalisation
    norm = next(c for c in net.program.calls if c.op == "batchnorm_forward")
    assert norm.params["activation"] == "relu"
    assert norm.params["rate"] == 0.3
    assert [c.op for c in net.program.calls if c.phase == "forward"] == [
        "dense_forward",
        "batchnorm_forward",
        "dense_forward",
        "dropout_forward",
        "dense_forward",
    ]


def test_relu_takes_its_mask_from_the_dropout_behind_it() -> None:
    """Bit for bit, whatever values: where dropout has put a zero there is no gradient anyway."""
    net = block_net().compile("softmax_cross_entropy", "adam", backend="numpy").build(13)
    program = net.program
    (back,) = [c for c in program.calls if c.op == "relu_backward"]
    drop = next(c for c in program.calls if c.op == "dropout_forward" and c.phase == "forward")
    assert back.buffers["y"] is drop.buffers["y"]
    assert program.readers(drop.buffers["x"]) == [drop]
    values = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-45, 1e38, 1.0, -1.0], np.float32)
    z, dy = (np.tile(v, 13).reshape(10, 13) for v in (values, values[::-1]))
    for seed in range(5):
        words = {"rate": 0.4, "seed": seed, "layer": 1, "step": 2}
        y, saved = fd.ops.relu_forward(z, backend="numpy")
        out, drawn = fd.ops.dropout_forward(y, **words, backend="numpy")
        dy_in = fd.ops.dropout_backward(dy, drawn)
        want = fd.ops.relu_backward(dy_in, saved)
        found = np.empty_like(want)
        dispatch.run("relu_backward", dy_in, out, found, backend="numpy")
        np.testing.assert_array_equal(found.view(np.int32), want.view(np.int32))


@pytest.mark.skipif("cython" not in BACKENDS, reason="the compiled back end is not built")
def test_tails_follow_dense_products() -> None:
    net = block_net().compile("softmax_cross_entropy", "adam", backend="cython")
    net.build(13)
    calls = net.program.calls
    tails = [c.op for c in calls if c.tail]
    assert "batchnorm_forward" in tails
    assert "batchnorm_backward" in tails
    for before, call in itertools.pairwise(calls):
        if call.tail:
            assert before.tail or before.op.startswith("dense_")


def test_first_layer_needs_no_input_gradient() -> None:
    net = block_net().compile("softmax_cross_entropy", "adam", backend="numpy")
    net.build(13)
    assert sum(c.op == "dense_backward_input" for c in net.program.calls) == 2
    assert sum(c.op == "dense_backward_weights" for c in net.program.calls) == 3


def test_printed_program_lists_every_call() -> None:
    net = block_net().compile("softmax_cross_entropy", "adam", backend="numpy")
    net.build(13)
    text = str(net.program)
    assert text.count("\n") == len(net.program) + 1
    for call in net.program.calls:
        assert call.op in text
    assert "Mflop" in text


def test_program_needs_an_input_width() -> None:
    net = block_net().compile("softmax_cross_entropy")
    with pytest.raises(ValueError, match="build"):
        str(net.program)


def test_arena_keeps_live_buffers_apart() -> None:
    net = block_net().compile("softmax_cross_entropy", "adam", backend="numpy")
    net.build(13)
    builder = net._runtime.builder
    layout = builder.layout("numpy")
    program, _ = builder.train(64, Feed(labels=True), net.loss, net.optimizer, layout, False)
    ranges, top = plan_arena(program, lambda buffer: 4 * stored_size(buffer, 64, layout), ())
    spans = program.lifetimes()
    total = sum(end - start for start, end in ranges.values())
    for a in spans:
        for b in spans:
            if a is b or spans[a][1] < spans[b][0] or spans[b][1] < spans[a][0]:
                continue
            assert ranges[a][1] <= ranges[b][0] or ranges[b][1] <= ranges[a][0], (a.name, b.name)
    assert top < total  # memory is reused


@pytest.mark.skipif("cython" not in BACKENDS, reason="the compiled back end is not built")
@pytest.mark.parametrize("rows", [1, 50])
@pytest.mark.parametrize("activation", ACTIVATION_NAMES)
def test_padding_of_panels_stays_zero(activation: str, rows: int) -> None:
    """Gradient clipping sums over the arena, padding included; cos and softplus make non-zero values of zeros."""
    X, y = data(rows)
    net = block_net(activation).compile("softmax_cross_entropy", "adam", backend="cython")
    for _ in range(3):
        net.train_on_batch(X, y)
    memory = net._runtime.memory
    for arena, tensors in ((memory.parameters.values, net.weights), (memory.gradients, net.gradients)):
        real = np.concatenate([tensors[name].ravel() for name in net.gradients])
        assert np.isfinite(arena).all()
        assert np.count_nonzero(arena) == np.count_nonzero(real)
