"""Losses: which op computes them, what targets they take, and the check of those targets.

>>> get("softmax_cross_entropy").check_targets([2, 0], n_outputs=3)
array([2, 0])
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastdl import convert


@dataclass(frozen=True)
class Loss:
    """One loss.

    Parameters
    ----------
    name : str
        Public name, as in ``compile(loss="mse")``.
    op : str
        Op of ``fastdl.kernels`` for ``target_kind`` targets.
    target_kind : {"labels", "values"}
        Labels are int64 (N,), values float (N, O).
    onehot_op : str, optional
        Op for float targets (N, O) of a loss on labels: one distribution over the classes per row.
    metric : str, optional
        Name of what ``stats[2] / stats[1]`` measures in an unweighted batch.
    unit : bool
        Values must lie in [0, 1].
    activation : str, optional
        What the loss applies itself: it reads what goes into such a last layer, or the output of a net without one.
    """

    name: str
    op: str
    target_kind: str
    onehot_op: str | None = None
    metric: str | None = None
    unit: bool = False
    activation: str | None = None

    def __post_init__(self) -> None:
        if self.target_kind not in ("labels", "values"):
            raise ValueError(f"Loss target_kind: expected 'labels' or 'values', found {self.target_kind!r}")

    @property
    def advice(self) -> str:
        """What to do with targets that are no numbers."""
        if self.target_kind == "labels":
            return "number the classes with `classes, y = np.unique(y, return_inverse=True)`"
        return "convert with y.astype(float)"

    def op_for(self, targets: np.ndarray) -> str:
        """The op for targets that `check_targets` gave back."""
        return self.onehot_op if self.onehot_op is not None and targets.dtype.kind == "f" else self.op

    def check_targets(self, y: npt.ArrayLike, n_outputs: int, dtype: npt.DTypeLike = np.float32) -> np.ndarray:
        """Targets as the op takes them: contiguous, int64 labels (N,) or values (N, n_outputs) of ``dtype``.

        Parameters
        ----------
        y : array_like
            Labels: whole numbers in [0, n_outputs), shape (N,), or distributions over the classes, (N, n_outputs).
            Values: shape (N, n_outputs), or (N,) when there is one output.
        n_outputs : int
            Columns of the network's output.
        dtype : dtype
            Float type of values and distributions.

        Raises
        ------
        TypeError
            Objects, strings, complex numbers, ragged lists.
        ValueError
            Wrong rank or shape, no rows, NaN or infinite targets, labels that are negative, too large or not integers,
            values outside [0, 1] where the loss needs them there.
        """
        y = convert.as_numbers(y, self.name, self.advice)
        if y.ndim and len(y) == 0:
            raise ValueError(
                f"{self.name}: expected at least one target, found shape {y.shape}; pass a batch with rows"
            )
        if self.target_kind == "labels" and y.ndim == 1:
            return self._labels(y, n_outputs)
        if self.target_kind == "values" and y.ndim == 1 and n_outputs == 1:
            y = y[:, None]
        if y.ndim != 2 or y.shape[1] != n_outputs:
            raise ValueError(self._wrong_shape(y, n_outputs))
        return self._values(y, np.dtype(dtype))

    def _wrong_shape(self, y: np.ndarray, n_outputs: int) -> str:
        if self.target_kind == "labels":
            expected = f"labels of shape (N,) or distributions of shape (N, {n_outputs})"
            advice = (
                "y.ravel() makes labels of one column" if y.ndim == 2 and y.shape[1] == 1 else "check the last layer"
            )
        else:
            expected = f"targets of shape (N, {n_outputs})" + (" or (N,)" if n_outputs == 1 else "")
            advice = "give the last layer one output per target column"
        return f"{self.name}: expected {expected}, found shape {y.shape}; {advice}"

    def _labels(self, y: np.ndarray, n_outputs: int) -> np.ndarray:
        if y.dtype.kind == "f":
            whole = np.isfinite(y)
            if not whole.all():
                row = int(np.argmin(whole))
                raise ValueError(
                    f"{self.name}: expected labels, found {y[row]} in row {row}; drop rows without a label"
                )
            whole = y == np.floor(y)
            if not whole.all():
                row = int(np.argmin(whole))
                raise ValueError(
                    f"{self.name}: expected integer labels, found {y[row]} in row {row}; "
                    "round them, or use loss='mse' for real targets"
                )
        low, high = y.min(), y.max()
        if low < 0 or high >= n_outputs:
            bad = low if low < 0 else high
            row = int(np.flatnonzero(y == bad)[0])
            advice = (
                f"the last layer needs {int(high) + 1} outputs, or number the classes from 0"
                if low >= 0
                else "number the classes from 0"
            )
            raise ValueError(
                f"{self.name}: expected labels in [0, {n_outputs}), found {bad} in row {row}; {advice} "
                "(np.unique(y, return_inverse=True))"
            )
        return np.ascontiguousarray(y, dtype=np.int64)

    def _values(self, y: np.ndarray, dtype: np.dtype) -> np.ndarray:
        with np.errstate(all="ignore"):
            values = np.ascontiguousarray(y, dtype=dtype)
        self.check_values(values, y)
        return values

    def check_values(self, values: np.ndarray, given: np.ndarray) -> None:
        """Refuse values or distributions (N, n_outputs) that the loss cannot be of; ``given`` is what they came as."""
        low, high = float(values.min()), float(values.max())  # NaN where one is among them
        if not (math.isfinite(low) and math.isfinite(high)):
            row, column = (int(k) for k in np.argwhere(~np.isfinite(values))[0])
            raise ValueError(
                f"{self.name}: expected finite targets in {values.dtype}, found {given[row, column]} at "
                f"[{row}, {column}]; drop or fill these rows, or scale the targets"
            )
        if self.unit and (low < 0 or high > 1):
            bad = low if low < 0 else high
            raise ValueError(f"{self.name}: expected targets in [0, 1], found {bad}; encode the two classes as 0 and 1")
        if self.target_kind == "labels" and low < 0:
            raise ValueError(f"{self.name}: expected distributions over the classes, all >= 0, found {low}")


KNOWN = {
    loss.name: loss
    for loss in (
        Loss(
            "softmax_cross_entropy",
            op="softmax_cross_entropy",
            target_kind="labels",
            onehot_op="softmax_cross_entropy_onehot",
            metric="accuracy",
            activation="softmax",
        ),
        Loss(
            "binary_cross_entropy",
            op="binary_cross_entropy",
            target_kind="values",
            metric="accuracy",
            unit=True,
            activation="sigmoid",
        ),
        Loss("mse", op="mse", target_kind="values"),
    )
}


def get(loss: str | Loss) -> Loss:
    """A loss by name, or the instance that was given."""
    if isinstance(loss, Loss):
        return loss
    known = KNOWN.get(loss) if isinstance(loss, str) else None
    if known is None:
        raise ValueError(f"unknown loss {loss!r}, known: {', '.join(sorted(KNOWN))}")
    return known
