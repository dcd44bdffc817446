"""How an activation is declared: the decorator that makes its entry in ``ACTIVATIONS`` and the specs of its two ops."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastdl.kernels.registry import Array, OpSpec, Param, Tolerance, register_op


@dataclass(frozen=True)
class Activation:
    """What the rest of the house knows about one activation."""

    name: str
    layer: str  # class name in fastdl.layers
    summary: str
    formula: str
    derivative: str
    source: str
    saves: str  # "x" or "y": what backward reads
    alpha: float | None  # default of the scalar parameter, None without one
    per_channel: bool  # takes slope (C,), and backward gives dslope
    row_op: bool  # mixes the columns of a row: no epilogue, no panels
    domain: str
    pair: Any = field(repr=False)

    def checked_alpha(self, alpha: float | None) -> float:
        """The scalar parameter as a float: the default if left out.

        Backward from the output tells the side of the kink by the sign of y, so alpha must not be negative there.
        """
        if self.alpha is None:
            if alpha is None:
                return 0.0
            raise ValueError(f"alpha: {self.name} has no parameter, found {alpha!r}")
        value = float(self.alpha if alpha is None else alpha)
        if not np.isfinite(value) or (self.saves == "y" and value < 0):
            least = " of at least 0" if self.saves == "y" else ""
            raise ValueError(f"alpha: {self.name} expects a finite number{least}, found {alpha!r}")
        return value

    def forward(
        self, x: np.ndarray, y: np.ndarray, alpha: float | None = None, slope: np.ndarray | None = None
    ) -> None:
        """y = f(x), for callers that hold any activation; alpha is ignored by those without one."""
        params = {} if self.alpha is None else {"alpha": self.alpha if alpha is None else alpha}
        self.pair.forward(x, *((slope,) if self.per_channel else ()), y, **params)

    def backward(self, dy: np.ndarray, saved: np.ndarray, dx: np.ndarray, alpha: float | None = None) -> None:
        """dx = dy f'(x) from ``saved`` = x or y as ``saves`` says; not for activations with slopes."""
        params = {} if self.alpha is None else {"alpha": self.alpha if alpha is None else alpha}
        self.pair.backward(dy, saved, dx, **params)


#: name -> Activation; after identity the element-wise ones stand in the order of the compiled table, softmax is last.
ACTIVATIONS: dict[str, Activation] = {}

EXACT = Tolerance(ulp=0.0, why="comparisons and copies round nothing")


def _reference(function: Callable[..., None]) -> Callable[..., None]:
    """The calling convention of the registry: NumPy has no use for ``threads``."""

    @functools.wraps(function)
    def run(*arrays: np.ndarray, threads: int = 1, **params: float) -> None:
        function(*arrays, **params)

    return run


def activation(
    name: str,
    *,
    layer: str,
    summary: str,
    formula: str,
    derivative: str,
    source: str,
    saves: str,
    alpha: float | None = None,
    per_channel: bool = False,
    row_op: bool = False,
    domain: str = "all real numbers",
    special: tuple[tuple[float, float], ...] = (),
    kinks: tuple[float, ...] = (),
    tolerance: Tolerance = EXACT,
    tolerance_backward: Tolerance | None = None,
    slope_tolerance: Callable[[Any], Mapping[str, Tolerance]] | None = None,
    flops: tuple[int, int] = (1, 1),
) -> Callable[[type], type]:
    """Declare an activation: an entry of ``ACTIVATIONS`` and the specs of its two ops.

    Parameters
    ----------
    special : pairs (x, y)
        Values at infinities, NaN, signed zero, subnormals (default alpha).
    kinks : points without a derivative
    tolerance, tolerance_backward : Tolerance
        With their argument; backward has forward's unless given.
    slope_tolerance : callable, optional
        The tolerances of dx and dslope, from the sizes.
    flops : operations an element, forward and backward
    """

    def declare(pair: type) -> type:
        info = Activation(
            name, layer, summary, formula, derivative, source, saves, alpha, per_channel, row_op, domain, pair
        )
        ACTIVATIONS[name] = info
        params = () if alpha is None else (Param("alpha", "float", alpha),)
        slope = (Array("slope", "C", single=True, fill=_fill_slope),) if per_channel else ()
        dslope = (Array("dslope", "C", role="out", single=True),) if per_channel else ()
        saved = Array("x", "N,C") if saves == "x" else Array("y", "N,C", fill=_fill_output(info))
        common: dict[str, Any] = {"family": "activations", "params": params, "column_local": not row_op}
        backward_tolerance = slope_tolerance or (lambda sizes: tolerance_backward or tolerance)
        register_op(
            OpSpec(
                name=f"{name}_forward",
                summary=f"{summary}: {formula}",
                arrays=(Array("x", "N,C"), *slope, Array("y", "N,C", role="out")),
                reference=_reference(pair.forward),
                tolerance=lambda sizes: tolerance,
                gradients=(f"{name}_backward",),
                special=special,
                kinks=kinks,
                aliases=(("x", "y"),),
                flops=lambda sizes: float(flops[0] * sizes["N"] * sizes["C"]),
                **common,
            )
        )
        register_op(
            OpSpec(
                name=f"{name}_backward",
                summary=f"gradient of {name}: dx = dy * {derivative}",
                arrays=(Array("dy", "N,C"), saved, *slope, Array("dx", "N,C", role="out"), *dslope),
                reference=_reference(pair.backward),
                tolerance=backward_tolerance,
                kinks=kinks,
                aliases=(("dy", "dx"),),
                flops=lambda sizes: float(flops[1] * sizes["N"] * sizes["C"]),
                bytes=(lambda sizes, item: 2.0 * item * sizes["N"] * sizes["C"]) if name == "identity" else None,
                **common,
            )
        )
        return pair

    return declare


def _fill_slope(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any, made: Any) -> np.ndarray:
    return rng.uniform(0.1, 0.4, shape)


def _fill_output(info: Activation) -> Callable[..., np.ndarray]:
    """A backward op reads an output that its forward op has made."""

    def fill(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any, made: Any) -> np.ndarray:
        y = np.empty(shape, dtype)
        info.forward(rng.standard_normal(shape).astype(dtype), y)
        return y

    return fill
