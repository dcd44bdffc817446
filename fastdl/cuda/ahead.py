"""Kernels compiled ahead of time: all that a net of fastdl's layers, losses and optimisers can launch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from fastdl import layers, losses, optimizers
from fastdl.kernels.activations.reference import ACTIVATIONS
from fastdl.kernels.common.gpu import Kernel
from fastdl.kernels.gather.numba_cuda import next_step
from fastdl.model import Sequential

#: (batch, width): below and above the shapes from which kernels have other tiles or blocks.
SHAPES = ((32, 24), (4096, 1024))


def _stacks(width: int) -> Iterator[list[layers.Layer]]:
    """Every activation behind a dense layer and behind a batch normalisation, with and without dropout."""
    for name in ACTIVATIONS:
        for rate in (0.0, 0.5):
            drop = [layers.Dropout(rate)] if rate else []
            body = [layers.Dense(width), layers.Activation(name), *drop, layers.Dense(width), *drop]
            body += [layers.BatchNorm(), layers.Activation(name), *drop]
            yield [*body, layers.Dense(width)]
        yield [layers.BatchNorm(), layers.Activation(name), layers.Dense(width, use_bias=False)]


def kernels() -> list[Kernel]:
    """Each kernel once."""
    found: dict[str, Kernel] = {next_step.name: next_step}
    moving = optimizers.SGD(0.1, momentum=0.9, clip_norm=1.0)
    for rows, width in SHAPES:
        nets = [(stack, "softmax_cross_entropy", "adam", fuse) for stack in _stacks(width) for fuse in (True, False)]
        small = [layers.Dense(width)]
        nets += [(small, loss, by, True) for loss, by in itertools.product(losses.KNOWN, ("sgd", "adamw", moving))]
        for stack, loss, by, fuse in nets:
            net = Sequential(stack, seed=0).compile(loss, by, backend="numpy", fuse=fuse).build(width)
            for launch in net.launches(rows):
                found[launch.kernel.name] = launch.kernel
    return list(found.values())
