"""Losses on Numba: value and gradient of each row while it is in cache. Formulas: reference.py.

A call is cut into blocks of 64 rows, each with its own float64 sums, which are added in order. Absent weights and
gradients come as arrays of size 0, so that one compiled kernel per dtype serves every call.

Sums run in vector lanes because their addition may be reordered (`_add`). A maximum of floats may not (NaN), so rows
are compared as integers: with the bits of negative numbers flipped, integers are in the order of the floats, and their
maximum runs in lanes, 7 times faster. A NaN comes out as NaN, here or from the exponentials.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from ..common import numba_math
from ..common.numba_cpu import FASTMATH, parallel_kernel, point, serial_kernel
from ..registry import Impl, register

ROWS = 64


@numba.njit(fastmath=FASTMATH | {"reassoc"})
def _add(a, b):
    """An addition that may be reordered: that lets a sum run in vector lanes. Compiled once, its order is fixed."""
    return a + b


@point
def _row_max(bits, flip, slot):
    """Leaves the maximum of a row of floats, given as integers, in slot[0]. flip: all bits but the sign."""
    best = bits.dtype.type(~flip)
    for i in range(bits.size):
        k = bits[i]
        best = max(best, bits.dtype.type(k if k >= 0 else k ^ flip))
    slot[0] = best if best >= 0 else best ^ flip


@point
def _first(row, value):
    """The first column that holds a value, -1 if none (NaN)."""
    for i in range(row.size):
        if row[i] == value:
            return i
    return -1


@serial_kernel
def _softmax(z, bits, targets, weight, dz, scale, flip, slot, slot_bits, sums):
    loss, right = 0.0, 0
    for r in range(z.shape[0]):
        row, label = z[r], targets[r]
        _row_max(bits[r], flip, slot_bits)
        top = slot[0]
        known = 0 <= label < row.size  # a label out of range gives a NaN loss and no stray access
        picked = row[label] if known else np.nan
        hit = picked == top and _first(row, top) == label
        w = weight[r] if weight.size else scale.dtype.type(1)
        total = scale[0] * 0
        if dz.size:
            d = dz[r]
            for i in range(row.size):
                e = numba_math.exp(row[i] - top)
                d[i] = e
                total = _add(total, e)
            gain = w * scale[0]
            factor = gain / total
            for i in range(row.size):
                d[i] *= factor
            if known:
                d[label] -= gain
        else:
            for i in range(row.size):
                total = _add(total, numba_math.exp(row[i] - top))
        value = np.log(total) - (picked - top)
        loss += np.float64(w) * np.float64(value)
        right += hit and value == value
    sums[0], sums[1] = loss, right


@serial_kernel
def _softmax_onehot(z, bits, targets, target_bits, weight, dz, scale, flip, slot, slot_bits, sums):
    loss, right = 0.0, 0
    for r in range(z.shape[0]):
        row, target = z[r], targets[r]
        _row_max(target_bits[r], flip, slot_bits)
        label = _first(target, slot[0])
        _row_max(bits[r], flip, slot_bits)
        top = slot[0]
        hit = label >= 0 and row[label] == top and _first(row, top) == label
        w = weight[r] if weight.size else scale.dtype.type(1)
        total = mass = dot = scale[0] * 0
        for i in range(row.size):
            mass = _add(mass, target[i])
            dot = _add(dot, target[i] * (row[i] - top))
        if dz.size:
            d = dz[r]
            for i in range(row.size):
                e = numba_math.exp(row[i] - top)
                d[i] = e
                total = _add(total, e)
            gain = w * scale[0]
            factor = gain * mass / total
            for i in range(row.size):
                d[i] = d[i] * factor - target[i] * gain
        else:
            for i in range(row.size):
                total = _add(total, numba_math.exp(row[i] - top))
        value = mass * np.log(total) - dot
        loss += np.float64(w) * np.float64(value)
        right += hit and value == value
    sums[0], sums[1] = loss, right


@point
def _binary_point(z, t, zero, one):
    """Loss and gradient of one logit."""
    e = numba_math.exp(-abs(z))
    loss = (z if z > zero else zero) - z * t + numba_math.log1p_unit(e)
    return loss, (one if z >= zero else e) / (one + e) - t


@serial_kernel
def _binary(z, targets, weight, dz, scale, sums):
    zero = scale[0] * 0
    one = zero + scale.dtype.type(1)
    half = scale.dtype.type(0.5)
    loss, right = 0.0, 0
    for r in range(z.shape[0]):
        row, target = z[r], targets[r]
        w = weight[r] if weight.size else one
        gain = w * scale[0]
        value, wrong = 0.0, 0
        if dz.size:
            d = dz[r]
            for i in range(row.size):
                l, g = _binary_point(row[i], target[i], zero, one)
                value = _add(value, np.float64(l))
                wrong += (row[i] > zero) != (target[i] > half)
                d[i] = g * gain
        else:
            for i in range(row.size):
                l, _ = _binary_point(row[i], target[i], zero, one)
                value = _add(value, np.float64(l))
                wrong += (row[i] > zero) != (target[i] > half)
        loss += np.float64(w) * value
        right += wrong == 0 and value == value
    sums[0], sums[1] = loss, right


@serial_kernel
def _mse(z, targets, weight, dz, scale, sums):
    loss = 0.0
    for r in range(z.shape[0]):
        row, target = z[r], targets[r]
        w = weight[r] if weight.size else scale.dtype.type(1)
        gain = w * scale[0]
        value = 0.0
        if dz.size:
            d = dz[r]
            for i in range(row.size):
                g = row[i] - target[i]
                value = _add(value, np.float64(g * g))
                d[i] = g * gain
        else:
            for i in range(row.size):
                g = row[i] - target[i]
                value = _add(value, np.float64(g * g))
        loss += np.float64(w) * value
    sums[0], sums[1] = loss, 0.0


@parallel_kernel
def _softmax_parallel(z, bits, targets, weight, dz, scale, flip, slot, slot_bits, sums):
    for k in numba.prange(sums.shape[0]):
        a, b = k * ROWS, (k + 1) * ROWS
        s = slice(k, k + 1)
        _softmax(z[a:b], bits[a:b], targets[a:b], weight[a:b], dz[a:b], scale, flip, slot[s], slot_bits[s], sums[k])


@parallel_kernel
def _softmax_onehot_parallel(z, bits, targets, target_bits, weight, dz, scale, flip, slot, slot_bits, sums):
    for k in numba.prange(sums.shape[0]):
        a, b = k * ROWS, (k + 1) * ROWS
        s = slice(k, k + 1)
        _softmax_onehot(
            z[a:b], bits[a:b], targets[a:b], target_bits[a:b], weight[a:b], dz[a:b],
            scale, flip, slot[s], slot_bits[s], sums[k],
        )  # fmt: skip


@parallel_kernel
def _binary_parallel(z, targets, weight, dz, scale, sums):
    for k in numba.prange(sums.shape[0]):
        a, b = k * ROWS, (k + 1) * ROWS
        _binary(z[a:b], targets[a:b], weight[a:b], dz[a:b], scale, sums[k])


@parallel_kernel
def _mse_parallel(z, targets, weight, dz, scale, sums):
    for k in numba.prange(sums.shape[0]):
        a, b = k * ROWS, (k + 1) * ROWS
        _mse(z[a:b], targets[a:b], weight[a:b], dz[a:b], scale, sums[k])


def _integers(x: np.ndarray) -> np.ndarray:
    """The floats' bits, without a copy."""
    return x.view(np.int32 if x.itemsize == 4 else np.int64)


def _run(
    serial: Callable[..., None],
    parallel: Callable[..., None],
    inputs: tuple[np.ndarray, ...],
    weight: np.ndarray | None,
    stats: np.ndarray,
    dz: np.ndarray | None,
    total_rows: int,
    threads: int,
    columns: int = 1,
    gain: float = 1.0,
    ordered: bool = False,
) -> None:
    """Run the blocks and add their sums. columns: of the mean; gain: of the gradient; ordered: rows need a maximum."""
    z = inputs[0]
    T, rows = z.dtype.type, len(z)
    count = float(rows if weight is None else weight.sum(dtype=np.float64))
    over = count if total_rows in (0, rows) else total_rows
    scale = 1.0 / over if over else 0.0
    if weight is None:
        weight = np.empty(0, T)
    if dz is None:
        dz = np.empty((0, 0), T)
    shared = threads > 1 and rows > ROWS  # one block cannot be shared
    sums = np.empty(((rows + ROWS - 1) // ROWS if shared else 1, 2))
    extra: tuple[Any, ...] = ()
    if ordered:
        slot = np.empty(len(sums), T)
        bits = _integers(slot)
        extra = bits.dtype.type(np.iinfo(bits.dtype).max), slot, bits
    arguments = (*inputs, weight, dz, np.array([gain * scale / columns], T), *extra)
    if shared:
        parallel(*arguments, sums, threads=threads)
    else:
        serial(*arguments, sums[0])
    loss, right = sums.sum(axis=0)
    stats[:] = loss * scale / columns, count, right


def softmax_cross_entropy(
    z: np.ndarray,
    targets: np.ndarray,
    weight: np.ndarray | None,
    stats: np.ndarray,
    dz: np.ndarray | None,
    total_rows: int = 0,
    threads: int = 1,
) -> None:
    """Softmax cross-entropy of logits and class labels."""
    inputs = z, _integers(z), targets
    _run(_softmax, _softmax_parallel, inputs, weight, stats, dz, total_rows, threads, ordered=True)


def softmax_cross_entropy_onehot(
    z: np.ndarray,
    targets: np.ndarray,
    weight: np.ndarray | None,
    stats: np.ndarray,
    dz: np.ndarray | None,
    total_rows: int = 0,
    threads: int = 1,
) -> None:
    """Softmax cross-entropy of logits and one distribution over the classes per row."""
    inputs = z, _integers(z), targets, _integers(targets)
    _run(_softmax_onehot, _softmax_onehot_parallel, inputs, weight, stats, dz, total_rows, threads, ordered=True)


def binary_cross_entropy(
    z: np.ndarray,
    targets: np.ndarray,
    weight: np.ndarray | None,
    stats: np.ndarray,
    dz: np.ndarray | None,
    total_rows: int = 0,
    threads: int = 1,
) -> None:
    """Mean binary cross-entropy of logits and targets in [0, 1]."""
    columns = z.shape[1]
    _run(_binary, _binary_parallel, (z, targets), weight, stats, dz, total_rows, threads, columns)


def mse(
    z: np.ndarray,
    targets: np.ndarray,
    weight: np.ndarray | None,
    stats: np.ndarray,
    dz: np.ndarray | None,
    total_rows: int = 0,
    threads: int = 1,
) -> None:
    """Mean squared error over rows and columns."""
    _run(_mse, _mse_parallel, (z, targets), weight, stats, dz, total_rows, threads, z.shape[1], gain=2.0)


register(Impl("softmax_cross_entropy", "numba", softmax_cross_entropy))
register(Impl("softmax_cross_entropy_onehot", "numba", softmax_cross_entropy_onehot))
register(Impl("binary_cross_entropy", "numba", binary_cross_entropy))
register(Impl("mse", "numba", mse))
