"""What is measured: shapes and nets with the reason for each, and the cases made from them and the registry.

No op is known by name here: shapes follow from an op's dimension letters, arrays that may be absent from their roles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastdl import layers
from fastdl.kernels import registry
from fastdl.kernels.registry import OpSpec

#: Back ends that are measured; the third one, numpy, is the baseline.
BACKENDS = ("cython", "numba")
#: Values of the run-time block in every case.
RUNTIME = {"step": 3, "epoch": 1, "first_row": 0, "total_rows": 0, "offset": 0, "update": 3, "lr": 1e-3, "scale": 1.0}


@dataclass(frozen=True)
class Shape:
    """Rows and columns of the matrices of a case, and why they are measured."""

    name: str
    rows: int
    cols: int
    why: str


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("L1", 32, 64, "8 KB a matrix: what a call costs"),
        Shape("L2", 256, 512, "512 KB a matrix: a usual batch, and the arithmetic of the loop shows"),
        Shape("odd", 129, 257, "one more than a multiple of every vector, panel and row block: the tails of the loops"),
        Shape("memory", 4096, 2048, "32 MB a matrix: every pass goes to memory, fewer passes win"),
    )
}
#: Shapes of the README's table.
TABLE_SHAPES = ("L2", "memory")


def sizes(spec: OpSpec, shape: Shape) -> dict[str, int]:
    """Values of an op's dimension letters.

    N are rows and C, I, O columns. Without columns, N counts what a matrix has one of for eight elements (Philox
    counters; labels are fewer). P is the flat length of the whole matrix. A source S of rows is as long as their index.
    """
    letters = set(spec.letters)
    rows = shape.rows if letters & set("CIO") else shape.rows * shape.cols // 8
    values = {"N": rows, "S": rows, "P": shape.rows * shape.cols}
    return {letter: values.get(letter, shape.cols) for letter in spec.letters}


def without(spec: OpSpec, params: Mapping[str, Any]) -> tuple[str, ...]:
    """Optional arrays that a plain call leaves out.

    These are weights of rows, the clipping scale, a second copy of the output, slopes where no PReLU is fused, and the
    output that a fused ReLU's gradient may look at.
    """
    required = {a.shape for a in spec.outputs if not a.optional}
    prelu = params.get("activation") == "prelu" or all(p.kind != "activation" for p in spec.params)
    names = []
    for array in spec.arrays:
        weight = array.role == "in" and array.shape in ("N", "1")
        copy = array.role == "out" and array.shape in required and array.shape.count(",")
        slope = array.name in ("slope", "dslope") and not prelu
        gate = array.name == "y" and params.get("activation", "identity") != "relu"
        if array.optional and (weight or copy or slope or gate):
            names.append(array.name)
    return tuple(names)


@dataclass(frozen=True)
class OpCase:
    """One op, parameter variant, shape and back end."""

    op: str
    variant: int
    shape: str
    backend: str

    @property
    def spec(self) -> OpSpec:
        return registry.spec(self.op)

    @property
    def params(self) -> dict[str, Any]:
        params = dict(self.spec.variants[self.variant])
        if "n" in params:  # how many an index picks from: at least as many as it picks
            params["n"] = max(params["n"], sizes(self.spec, SHAPES[self.shape])["N"])
        return params

    @property
    def name(self) -> str:
        return f"{self.op}{f'#{self.variant}' if self.variant else ''}-{self.shape}"

    @property
    def group(self) -> str:
        """Which of pytest-benchmark's tables shows it."""
        return self.spec.family

    @property
    def quick(self) -> bool:
        """Part of the smoke run."""
        return self.shape == "odd"


@dataclass(frozen=True)
class ChainCase:
    """Layers as one fused stretch of a Program, forward and backward."""

    group = "chains"
    chain: str
    shape: str
    backend: str

    @property
    def name(self) -> str:
        return f"{self.chain}-{self.shape}"

    @property
    def quick(self) -> bool:
        return self.shape == "odd"

    def layers(self) -> list[layers.Layer]:
        block = [layers.BatchNorm(), layers.ReLU(), layers.Dropout(0.5)]
        dense = [layers.Dense(SHAPES[self.shape].cols, use_bias=False)]
        return dense + block if self.chain.startswith("dense") else block


CHAINS = ("batchnorm+relu+dropout", "dense+batchnorm+relu+dropout")


@dataclass(frozen=True)
class Net:
    """A classifier of blocks Dense (no bias), BatchNorm, ReLU, Dropout, and a Dense layer; trained by Adam."""

    name: str
    batch: int
    widths: tuple[int, ...]  # input, hidden layers, classes
    rate: float
    fit_steps: int  # steps of one timed call of fit
    why: str

    def layers(self) -> list[layers.Layer]:
        stack: list[layers.Layer] = []
        for width in self.widths[1:-1]:
            dropout = layers.Dropout(self.rate)
            stack += [layers.Dense(width, use_bias=False), layers.BatchNorm(), layers.ReLU(), dropout]
        return [*stack, layers.Dense(self.widths[-1])]


NETS = {
    net.name: net
    for net in (
        Net("tiny", 32, (16, 32, 32, 2), 0.1, 256, "1 us of arithmetic: the overhead of a step"),
        Net("tabular", 128, (64, 128, 128, 10), 0.1, 64, "the usual tabular problem; everything in L2"),
        Net("deep", 256, (256,) * 10 + (10,), 0.2, 8, "nine equal layers: what a layer costs beside its product"),
        Net("mnist", 256, (784, 512, 512, 10), 0.5, 8, "the textbook net; weights outgrow L2"),
        Net("wide", 512, (1024, 2048, 2048, 1000), 0.5, 2, "dense products and the optimiser's sweep through memory"),
    )
}
#: How a step is run: one call a step, or inside an epoch of `fit`.
ENTRIES = ("train_on_batch", "fit")


@dataclass(frozen=True)
class NetCase:
    """One training step of a net."""

    group = "training steps"
    net: str
    entry: str
    backend: str

    @property
    def name(self) -> str:
        return f"{self.net}-{self.entry}"

    @property
    def quick(self) -> bool:
        return self.net in ("tiny", "tabular")


Case = OpCase | ChainCase | NetCase


def op_cases() -> list[OpCase]:
    """Every op: its plain variant in every shape, the other variants in L2. Back ends of a shape stand together.

    An op whose arrays have no dimension letter works on a number or two: one case.
    """
    found = []
    for spec in registry.specs():
        for shape in SHAPES if spec.letters else ("odd",):
            for variant in range(len(spec.variants) if shape == "L2" else 1):
                found += [OpCase(spec.name, variant, shape, backend) for backend in BACKENDS]
    return found


def chain_cases() -> list[ChainCase]:
    return [ChainCase(c, s, b) for c in CHAINS for s in ("L2", "odd", "memory") for b in BACKENDS]


def net_cases() -> list[NetCase]:
    return [NetCase(n, e, b) for n in NETS for e in ENTRIES for b in BACKENDS]


def identity(case: Case) -> str:
    """A case's name, with its back end: the name in tables, files and ``--only``."""
    return f"{case.name}-{case.backend}"
