"""Gathers: rows, labels and weights of a data set by index into the buffers of a batch. Copies, so every bit is kept.

``row_range`` is the index of an epoch that is not shuffled (``epoch_indices`` of the random family is the other one).

Shape letters: S rows of the data set, N rows of the batch, C columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastdl.kernels.registry import Array, OpSpec, Tolerance, register_op


def gather_rows(source: np.ndarray, index: np.ndarray, out: np.ndarray, *, threads: int = 1) -> None:
    """out[i] = source[index[i]]; the indices have been checked above ("clip" spares NumPy a buffer for out)."""
    np.take(source, index, axis=0, out=out, mode="clip")


gather_labels = gather_values = gather_rows


def row_range(index: np.ndarray, *, offset: int = 0, threads: int = 1) -> None:
    """index = offset, offset + 1, ...: the batches of an epoch that is not shuffled."""
    index[...] = np.arange(offset, offset + len(index))


def _source_labels(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype, made: Mapping[str, Any]
) -> np.ndarray:
    return rng.integers(0, 10, shape)


def _index(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype, made: Mapping[str, Any]) -> np.ndarray:
    return rng.integers(0, max(1, len(made["source"])), shape)


INDEX = Array("index", "N", dtype="i8", fill=_index)
EXACT = Tolerance(ulp=0.0, why="copies")


def _moved(sizes: Mapping[str, int], itemsize: int) -> float:
    """A gathered element is read and written once; the rest of the data set is not touched."""
    return float(sizes["N"] * (2 * sizes.get("C", 1) * itemsize + 8))


for _name, _reference, _source, _out, _of in (
    ("gather_rows", gather_rows, Array("source", "S,C"), Array("out", "N,C", "out"), "rows"),
    (
        "gather_labels",
        gather_labels,
        Array("source", "S", dtype="i8", fill=_source_labels),
        Array("out", "N", "out", dtype="i8"),
        "class labels",
    ),
    ("gather_values", gather_values, Array("source", "S"), Array("out", "N", "out"), "sample weights"),
):
    register_op(
        OpSpec(
            name=_name,
            family="gather",
            summary=f"{_of} of a data set by index",
            arrays=(_source, INDEX, _out),
            reference=_reference,
            tolerance=lambda sizes: EXACT,
            no_gradient=("source",),
            bytes=_moved,
        )
    )

register_op(
    OpSpec(
        name="row_range",
        family="gather",
        summary="rows of a data set in order",
        arrays=(Array("index", "N", "out", dtype="i8"),),
        reference=row_range,
        runtime=("offset",),
        tolerance=lambda sizes: EXACT,
    )
)
