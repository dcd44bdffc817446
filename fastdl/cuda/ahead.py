"""Kernels compiled ahead of time: all that a net of fastdl's layers, losses and optimisers, or an op, can launch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np

from fastdl import layers, losses, optimizers
from fastdl.cuda import dry
from fastdl.cuda.plan import Paper
from fastdl.kernels import dispatch, registry
from fastdl.kernels.activations.reference import ACTIVATIONS
from fastdl.kernels.common.gpu import Kernel, Launch, Planner, Product, View
from fastdl.kernels.gather.numba_cuda import next_step
from fastdl.kernels.optimizers.numba_cuda import round_parameters
from fastdl.model import Sequential

#: (batch, width): below and above the shapes from which kernels have other tiles or blocks.
SHAPES = ((32, 24), (4096, 1024))


def _stacks(width: int) -> Iterator[list[layers.Layer]]:
    """Every activation behind a dense layer and behind a batch normalisation, with and without dropout."""
    for name in ACTIVATIONS:
        for rate in (0.0, 0.5):
            first, second, third = ([layers.Dropout(rate)] if rate else [] for _ in range(3))
            body = [layers.Dense(width), layers.Activation(name), *first, layers.Dense(width), *second]
            body += [layers.BatchNorm(), layers.Activation(name), *third]
            yield [*body, layers.Dense(width)]
        yield [layers.BatchNorm(), layers.Activation(name), layers.Dense(width, use_bias=False)]


class _Plain:
    """A library of products without epilogues but the bias: all else is left to sweeps."""

    def has(self, product: Product) -> bool:
        return product.epilogue in ("DEFAULT", "BIAS")


def _of_nets() -> Iterator[Launch | Product]:
    moving = optimizers.SGD(0.1, momentum=0.9, clip_norm=1.0)
    for rows, width in SHAPES:
        nets = [(stack, "softmax_cross_entropy", "adam", fuse) for stack in _stacks(width) for fuse in (True, False)]
        small = [layers.Dense(width)]
        nets += [(small, loss, by, True) for loss, by in itertools.product(losses.KNOWN, ("sgd", "adamw", moving))]
        for stack, loss, by, fuse in nets:
            net = Sequential(stack, seed=0).compile(loss, by, backend="numpy", fuse=fuse).build(width)
            yield from dry.launches(net._runtime.builder, net._settings, rows, mixed=False)
            if fuse:
                yield from dry.launches(net._runtime.builder, net._settings, rows, mixed=True, library=_Plain())


def _of_calls() -> Iterator[Launch]:
    """What eager calls launch."""
    paper = Paper()
    for spec in registry.specs():
        if (impl := registry.find(spec.name, "cuda")) is None:
            continue
        views = []
        for array in spec.arrays:
            shape, kind = array.dims(dict.fromkeys(spec.letters, 64)), registry.DTYPES[array.dtype] or np.float32
            views.append(View(paper.allocate(1 << 16), shape, math.prod(shape[1:]), np.dtype(kind)))
        for variant in spec.variants:
            yield from impl.launches(views, {**spec.defaults(), **variant}, Planner(views[0], paper.allocate))


def kernels() -> list[Kernel]:
    """Each kernel once."""
    dispatch.load_cuda()
    found: dict[str, Kernel] = {kernel.name: kernel for kernel in (next_step, round_parameters)}
    for launch in itertools.chain(_of_nets(), _of_calls()):
        if isinstance(launch, Launch):
            found[launch.kernel.name] = launch.kernel
    return list(found.values())
