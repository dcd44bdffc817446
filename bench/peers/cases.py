"""What is compared with whom, and how much faster fastdl is meant to be at least.

A case is plain data: it travels to the processes as JSON.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

#: Sides of a training step. ``numpy`` is fastdl's NumPy back end, written as a NumPy user writes.
FRAMEWORKS = ("numpy", "torch", "torch_compile", "jax")
#: (N, I, O) of `relu(linear)`: from 64 to 4096, square, tall, wide, thin, and no multiples of a tile.
LINEAR = (
    (64, 64, 64),
    (128, 64, 128),
    (128, 128, 128),
    (256, 256, 256),
    (256, 784, 512),
    (256, 512, 512),
    (256, 512, 10),
    (512, 512, 512),
    (1000, 100, 300),
    (100, 1000, 100),
    (64, 4096, 64),
    (4096, 64, 64),
    (4096, 64, 512),
    (512, 1024, 2048),
    (512, 2048, 1000),
    (1024, 1024, 1024),
    (64, 2048, 2048),
    (257, 513, 129),
    (2048, 2048, 2048),
    (4096, 1024, 256),
)


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Parameters
    ----------
    name : str
    kind : {"step", "op", "linear", "predict", "product", "copy", "start"}
        Which function of a side prepares it.
    what : dict
        Arguments of that function.
    peers : tuple of str
    threads : int
    bars : dict
        Least ratio to a peer, or to the fastest one under ``best``; least share of a ceiling under ``share``.
    ours : str
        fastdl's back end.
    level : str
        SIMD level that is forced, or "".
    """

    name: str
    kind: str
    what: dict[str, Any]
    peers: tuple[str, ...] = ()
    threads: int = 1
    bars: dict[str, float] = field(default_factory=dict)
    ours: str = "cython"
    level: str = ""


def _steps() -> Iterator[Case]:
    bars = {
        ("tiny", "train_on_batch", 1): 12.0,
        ("tiny", "fit", 1): 22.0,
        ("tabular", "train_on_batch", 1): 3.8,
        ("tabular", "train_on_batch", 2): 6.5,
        ("deep", "train_on_batch", 2): 3.2,
        ("mnist", "train_on_batch", 2): 2.3,
        ("wide", "train_on_batch", 2): 1.6,
    }
    for net in ("tiny", "tabular", "deep", "mnist", "wide"):
        for entry in ("train_on_batch", "fit"):
            for threads in (1, 2):
                bar = bars.get((net, entry, threads))
                what = {"net": net, "entry": entry}
                name = f"step {net} {entry}, {threads}T"
                yield Case(name, "step", what, FRAMEWORKS, threads, {"best": bar} if bar else {})
    for net in ("tiny", "tabular", "deep", "mnist", "wide"):
        what = {"net": net, "entry": "train_on_batch"}
        bar = {"numpy": 1.6 if net == "wide" else 2.0}
        yield Case(f"step {net} Numba back end, 2T", "step", what, ("numpy",), 2, bar, ours="numba")
    for net in ("mnist", "wide"):
        for threads in (1, 2):
            what = {"net": net, "entry": "train_on_batch", "mixed": True}
            yield Case(f"step {net} bfloat16, {threads}T", "step", what, ("torch",), threads, {"torch": 2.0})
    what = {"net": "tabular", "entry": "train_on_batch", "plain": True}
    yield Case("step tabular without batch norm and dropout, 1T", "step", what, ("sklearn", "torch", "jax"))


#: op: bars at (256, 512), bars at (4096, 2048), peers
_OPS: dict[str, tuple[dict[str, float], dict[str, float]]] = {
    "dropout_forward": ({"torch": 30.0, "jax": 10.0}, {"torch": 20.0}),
    "batchnorm_forward": ({"best": 1.8}, {}),
    "batchnorm_backward": ({"best": 2.0}, {}),
    "softmax_cross_entropy": ({"best": 2.0}, {}),
    "elu_forward": ({"best": 3.0}, {}),
    "sigmoid_forward": ({"best": 1.3}, {}),
    "softplus_forward": ({"best": 1.3}, {}),
    "tanh_forward": ({"best": 1.25}, {}),
    "gelu_forward": ({"best": 1.15}, {}),
    "relu_forward": ({}, {}),
    "adam_step": ({}, {}),
}


def _ops() -> Iterator[Case]:
    for rows, cols, place in ((256, 512, 0), (4096, 2048, 1)):
        for op, bars in _OPS.items():
            what = {"op": op, "rows": rows, "cols": cols}
            yield Case(f"{op} ({rows}, {cols})", "op", what, ("torch", "jax"), 1, bars[place])


def _copies() -> Iterator[Case]:
    """Every element-wise op, dropout and batch norm in (4096, 2048) as a share of copy bandwidth."""
    from bench.cases import OpCase
    from fastdl.kernels import registry

    for spec in registry.specs():
        if spec.family in ("activations", "dropout", "batchnorm") and spec.name != "dropout_mask":
            case = OpCase(spec.name, 0, "memory", "cython")
            yield Case(f"copy {case.op}", "copy", {"op": case.op}, bars={"share": 0.85})


def _products() -> Iterator[Case]:
    for size, bars in ((512, (0.90, 0.85)), (2048, (0.85, 0.80))):
        for product, bar in (("forward", bars[0]), ("backward_input", bars[1]), ("backward_weights", bars[1])):
            what = {"product": product, "size": size}
            yield Case(f"dense {product} {size}, prepacked", "product", what, bars={"share": bar})
    what = {"product": "forward", "size": 512}
    yield Case("dense forward 512, prepacked, AVX2", "product", what, bars={"share": 0.85}, level="avx2")
    for shape in LINEAR:
        yield Case(
            f"relu(linear) {'x'.join(map(str, shape))}", "linear", {"shape": shape}, ("torch",), 1, {"best": 0.95}
        )


def _bfloat16_product() -> Iterator[Case]:
    """1024^3 of bfloat16, packing timed; fastdl reads float32 and rounds, PyTorch reads bfloat16. Bar for AMX."""
    what = {"shape": (1024, 1024, 1024), "mixed": True}
    yield Case("linear bfloat16 1024x1024x1024", "linear", what, ("torch",), 1, {"torch": 1.3})


def _predictions() -> Iterator[Case]:
    for net in ("tiny", "tabular", "mnist"):
        for rows in (1, 256):
            what = {"net": net, "rows": rows}
            yield Case(
                f"predict {net}, {rows} rows", "predict", what, ("onnxruntime", "torch"), 1, {"onnxruntime": 1.0}
            )


def cases() -> list[Case]:
    """All of them, in the order of the table."""
    start = Case("start: process to first step of tiny", "start", {}, ("torch", "jax"), 2, {"seconds": 0.35})
    return [*_steps(), *_ops(), *_copies(), *_products(), *_bfloat16_product(), *_predictions(), start]
