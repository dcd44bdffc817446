"""Dense products on CUDA: one launch each, with what follows a product in the registers of its sums.

    forward           z = x w + b, y = act(z), dropout of y          x (N, I), w (I, O), b (O,), y and z (N, O)
    backward_input    dx = dy w^T, then backward of the layers below: dropout, activation          dy (N, O), dx (N, I)
    backward_weights  dw = x^T dy, db = column sums of dy

All three are the tile of ``tile_cuda.py``, whose docstring says how a sum is made; they differ in which operand runs
along k:

| product | a[m, k] | b[k, n] | length of the sums |
|---|---|---|---|
| forward | x, along | w, across | I |
| backward_input | dy, along | w, along | O |
| backward_weights | x, across | dy, across | rows of the batch |

A thread ends with several rows of eight neighbouring columns: the eight that one Philox counter draws, and a sector of
a float32 row to store. Sums, bias, activation and dropout are float32 with one rounding where a value is stored. db is
summed by the first row of tiles from the strips of dy that they have in shared memory.

Nothing is saved but z, on request. The grid is made for the largest batch; tiles below the run-time block's rows end at
once.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from fastdl.kernels.activations.numba_cuda import identity, identity_backward
from fastdl.kernels.activations.points import NEAR, POINTS
from fastdl.kernels.common import numba_cuda as gpu
from fastdl.kernels.common.gpu import Kernel, Launch, Planner, View, float_type, kernel
from fastdl.kernels.dense import tile_cuda as tile
from fastdl.kernels.dropout.numba_cuda import draw8, drop8, stream
from fastdl.kernels.registry import Impl, register

#: Of a thread: 128 leave room for two blocks of the widest tile on a multiprocessor.
REGISTERS = 128
#: Activations without a vector of slopes: (forward, backward).
ACTIVATIONS = {"identity": (identity, identity_backward)} | {
    name: tuple(points) for name, points in POINTS.items() if len(points) == 2
}
#: Why some kernels compute in float64.
DOUBLES = dict.fromkeys(NEAR, "reduction of large arguments")
DROPOUT = "u4 last, f4 scale, u4 layer, u4 k0, u4 k1"


@functools.cache
def forward_kernel(w: int, activation: str, dropout: bool) -> Kernel:
    product, at_thread, tall = tile.product(w, True, False), tile.thread_place(w), w // 16
    activate = gpu.each(ACTIVATIONS[activation][0], 2)

    @kernel(
        "T* x, i8 x_row, i4 x_wide, T* w, i8 w_row, i4 w_wide, f4* b, i4 with_b, T* y, i8 y_row, i4 y_wide, "
        f"T* z, i8 z_row, i4 z_wide, i4 with_z, u4* run, i4 inner, i4 cols, i4 shift, f4 alpha, {DROPOUT}",
        f"dense_forward_{activation}{'_dropout' if dropout else ''}_{w}",
        DOUBLES.get(activation, ""),
        registers=REGISTERS,
    )
    def forward(
        x, x_row, x_wide, weights, w_row, w_wide, b, with_b, y, y_row, y_wide, z, z_row, z_wide, with_z, run, inner,
        cols, shift, alpha, last, scale, layer, k0, k1,
    ):  # fmt: skip
        rows = gpu.rows_of(run)
        m0, n0 = tile.origin(shift, w)
        if m0 >= rows:
            return
        sums, _ = product(x, x_row, x_wide, weights, w_row, w_wide, m0, n0, rows, cols, inner)
        m0, n0 = tile.origin(shift, w)
        m, n = at_thread()
        c, left = gpu.i4(n0 + n), gpu.i4(cols - n0 - n)
        bias = gpu.load_some(b, c, gpu.i4(left if with_b != 0 else 0), tile.ZERO)
        for k in range(tall):
            r = gpu.i4(m0 + m + k)
            if r < rows and left > 0:
                t = gpu.add8(sums[k], bias)
                if with_z != 0:
                    tile.store8(z, r * z_row + c, t, left, z_wide)
                t = activate(t, alpha)
                if dropout:
                    t = drop8(t, draw8(c >> 3, r, run, layer, k0, k1), last, scale)
                tile.store8(y, r * y_row + c, t, left, y_wide)

    return forward


@functools.cache
def backward_input_kernel(w: int, activation: str | None, dropout: bool) -> Kernel:
    product, at_thread, tall = tile.product(w, True, True), tile.thread_place(w), w // 16
    fused = activation is not None
    undo = gpu.each(ACTIVATIONS[activation or "identity"][1], 3)
    names = [activation] * fused + ["dropout"] * dropout

    @kernel(
        "T* dy, i8 dy_row, i4 dy_wide, T* w, i8 w_row, i4 w_wide, T* s, i8 s_row, i4 s_wide, T* dx, i8 dx_row, "
        f"i4 dx_wide, u4* run, i4 inner, i4 cols, i4 shift, f4 alpha, {DROPOUT}",
        "_".join(["dense_backward_input", *names, str(w)]),
        DOUBLES.get(activation or "", ""),
        registers=REGISTERS,
    )
    def backward_input(
        dy, dy_row, dy_wide, weights, w_row, w_wide, s, s_row, s_wide, dx, dx_row, dx_wide, run, inner, cols, shift,
        alpha, last, scale, layer, k0, k1,
    ):  # fmt: skip
        rows = gpu.rows_of(run)
        m0, n0 = tile.origin(shift, w)
        if m0 >= rows:
            return
        sums, _ = product(dy, dy_row, dy_wide, weights, w_row, w_wide, m0, n0, rows, cols, inner)
        m0, n0 = tile.origin(shift, w)
        m, n = at_thread()
        c, left = gpu.i4(n0 + n), gpu.i4(cols - n0 - n)
        for k in range(tall):
            r = gpu.i4(m0 + m + k)
            if r < rows and left > 0:
                t = sums[k]
                if dropout:
                    t = drop8(t, draw8(c >> 3, r, run, layer, k0, k1), last, scale)
                if fused:
                    t = undo(t, tile.load8(s, r * s_row + c, left, s_wide), alpha)
                tile.store8(dx, r * dx_row + c, t, left, dx_wide)

    return backward_input


@functools.cache
def backward_weights_kernel(w: int, bias: bool) -> Kernel:
    product, at_thread, tall = tile.product(w, False, False, bias), tile.thread_place(w), w // 16

    @kernel(
        "T* x, i8 x_row, i4 x_wide, T* dy, i8 dy_row, i4 dy_wide, f4* dw, i8 dw_row, i4 dw_wide, f4* db, u4* run, "
        "i4 rows, i4 cols, i4 shift",
        f"dense_backward_weights{'_bias' if bias else ''}_{w}",
        registers=REGISTERS,
    )
    def backward_weights(
        x, x_row, x_wide, dy, dy_row, dy_wide, dw, dw_row, dw_wide, db, run, rows, cols, shift
    ):  # fmt: skip
        m0, n0 = tile.origin(shift, w)
        if m0 >= rows and m0 > 0:
            return
        sums, total = product(x, x_row, x_wide, dy, dy_row, dy_wide, m0, n0, rows, cols, gpu.rows_of(run))
        if bias:
            tile.store_total(db, m0, n0, cols, total, w)
        m0, n0 = tile.origin(shift, w)
        m, n = at_thread()
        c, left = gpu.i4(n0 + n), gpu.i4(cols - n0 - n)
        for k in range(tall):
            r = gpu.i4(m0 + m + k)
            if r < rows and left > 0:
                tile.store8(dw, r * dw_row + c, sums[k], left, dw_wide)

    return backward_weights


# --------------------------------------------------------------------------------------------------------- launches
def _matrix(view: View | None) -> tuple[Any, ...]:
    """What a kernel takes of a matrix: pointer, row stride, alignment."""
    return (view, view.row_stride, int(view.by_eights)) if view else (None, 0, 0)


def _drawn(dropout: Mapping[str, Any] | None) -> tuple[bool, tuple[Any, ...]]:
    """Whether anything is dropped, and the kernel's arguments."""
    kept, words = stream(dropout or {})
    return kept[1] != 1, (*kept, *words)


def forward_launch(
    arrays: Sequence[View | None],
    params: Mapping[str, Any],
    planner: Planner,
    dropout: Mapping[str, Any] | None = None,
) -> Launch:
    """y = dropout(act(x w + b)); ``dropout`` are the params of dropout_forward."""
    x, w, b, y, z = arrays
    size = tile.width(*y.shape)
    grid, shift = tile.grid(*y.shape, size)
    drops, drawn = _drawn(dropout)
    launched = forward_kernel(size, params.get("activation") or "identity", drops)
    arguments = (*_matrix(x), *_matrix(w), b, int(b is not None), *_matrix(y), *_matrix(z), int(z is not None))
    arguments += (planner.run, x.cols, y.cols, shift, float(params.get("alpha", 0.0)), *drawn)
    return Launch(launched, grid, (2 * size, 1), arguments, float_type(x))


def backward_input_launch(
    arrays: Sequence[View | None],
    params: Mapping[str, Any],
    planner: Planner,
    activation: str | None = None,
    alpha: float = 0.0,
    saved: View | None = None,
    dropout: Mapping[str, Any] | None = None,
    out: View | None = None,
) -> Launch:
    """dx = act'(saved) * undropped(dy w^T) into ``out`` or the op's dx.

    ``dropout`` are the params of the dropout below the product, ``activation`` and ``alpha`` those of the layer below
    that, which has saved ``saved`` (N, I).
    """
    dy, w, dx = arrays
    out = out or dx
    size = tile.width(*out.shape)
    grid, shift = tile.grid(*out.shape, size)
    drops, drawn = _drawn(dropout)
    launched = backward_input_kernel(size, activation, drops)
    arguments = (*_matrix(dy), *_matrix(w), *_matrix(saved), *_matrix(out), planner.run, dy.cols, out.cols, shift)
    return Launch(launched, grid, (2 * size, 1), (*arguments, float(alpha), *drawn), float_type(dy))


def backward_weights_launch(arrays: Sequence[View | None], params: Mapping[str, Any], planner: Planner) -> Launch:
    x, dy, dw, db = arrays
    size = tile.width(*dw.shape)
    grid, shift = tile.grid(*dw.shape, size)
    arguments = (*_matrix(x), *_matrix(dy), *_matrix(dw), db, planner.run, dw.rows, dw.cols, shift)
    return Launch(backward_weights_kernel(size, db is not None), grid, (2 * size, 1), arguments, float_type(x))


register(Impl("dense_forward", "cuda", launches=lambda *given: [forward_launch(*given)]))
register(Impl("dense_backward_input", "cuda", launches=lambda *given: [backward_input_launch(*given)]))
register(Impl("dense_backward_weights", "cuda", launches=lambda *given: [backward_weights_launch(*given)]))
