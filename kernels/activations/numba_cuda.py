"""The element-wise activations on CUDA: a kernel for each point function of points.py, forward and backward.

    y = f(x)        dx = dy f'(s)        x, y, dy, dx (N, C), s as reference.py's ``saves`` says

A thread takes eight neighbours: 1 read and 1 write (backward 2 and 1) in accesses of 16 bytes and nothing else, so that
a launch can run at copy bandwidth. Contiguous arrays are one long row. Rows that are not a multiple of 16 bytes apart
and the end of a row go element by element. The number of rows comes from the run-time block, grids are for the largest
batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastdl.kernels.activations import rows_cuda as rows_cuda  # registers softmax and the slopes per column
from fastdl.kernels.activations.points import NEAR, POINTS
from fastdl.kernels.common import numba_cuda as gpu
from fastdl.kernels.common.gpu import Kernel, Launch, Planner, View, float_type, kernel, spans
from fastdl.kernels.registry import Impl, register


def identity(x, a):
    return x


def identity_backward(dy, s, a):
    return dy


def _doubles(name: str) -> str:
    """Functions with a faster form near 0 reduce large arguments by 2 / pi in float64."""
    return "reduction of large arguments" if name.removesuffix("_forward") in NEAR else ""


def forward_kernel(name: str, f: Callable[..., Any], x: str = "T*", y: str = "T*") -> Kernel:
    """``x`` and ``y`` are the pointers' types."""
    point, eight = gpu.point(f), gpu.each(f, 2)

    @kernel(f"{x} x, i8 x_row, {y} y, i8 y_row, u4* run, i8 cols, f4 a, i4 flat, i4 wide", name, _doubles(name))
    def forward(x, x_row, y, y_row, run, cols, a, flat, wide):
        last = gpu.rows_of(run)
        if flat != 0:
            cols *= last
            last = gpu.i4(1)
        c = gpu.i8(8) * gpu.column()
        r = gpu.i8(gpu.row())
        while r < last and c < cols:
            i, j = r * x_row + c, r * y_row + c
            if wide != 0 and c + 8 <= cols:
                gpu.store8(y, j, eight(gpu.load8(x, i), a))
            else:
                for k in range(min(gpu.i8(8), cols - c)):
                    gpu.store(y, j + k, point(gpu.load(x, i + k), a))
            r += gpu.row_step()

    return forward


def backward_kernel(name: str, f: Callable[..., Any]) -> Kernel:
    point, eight = gpu.point(f), gpu.each(f, 3)

    @kernel(
        "T* dy, i8 dy_row, T* s, i8 s_row, T* dx, i8 dx_row, u4* run, i8 cols, f4 a, i4 flat, i4 wide",
        f"{name}_backward",
        _doubles(name),
    )
    def backward(dy, dy_row, s, s_row, dx, dx_row, run, cols, a, flat, wide):
        last = gpu.rows_of(run)
        if flat != 0:
            cols *= last
            last = gpu.i4(1)
        c = gpu.i8(8) * gpu.column()
        r = gpu.i8(gpu.row())
        while r < last and c < cols:
            i, j, k0 = r * dy_row + c, r * s_row + c, r * dx_row + c
            if wide != 0 and c + 8 <= cols:
                gpu.store8(dx, k0, eight(gpu.load8(dy, i), gpu.load8(s, j), a))
            else:
                for k in range(min(gpu.i8(8), cols - c)):
                    gpu.store(dx, k0 + k, point(gpu.load(dy, i + k), gpu.load(s, j + k), a))
            r += gpu.row_step()

    return backward


def elementwise(launched: Kernel, views: Sequence[View], a: float, planner: Planner) -> list[Launch]:
    """One launch over matrices of one shape."""
    rows, cols = views[0].shape
    flat = all(view.contiguous for view in views)
    wide = all(view.address % 16 == 0 if flat else view.by_eights for view in views)
    grid, block = spans(1, rows * cols) if flat else spans(rows, cols)
    matrices = [part for view in views for part in (view, view.row_stride)]
    arguments = (*matrices, planner.run, cols, a, int(flat), int(wide))
    dtype = "bfloat16" if any(view.dtype == "bfloat16" for view in views) else float_type(views[0])
    return [Launch(launched, grid, block, arguments, dtype)]


KERNELS = {"identity_forward": forward_kernel("identity_forward", identity)}
KERNELS["identity_backward"] = backward_kernel("identity", identity_backward)
for _name, (_forward, _backward, *_slope) in POINTS.items():
    if not _slope:  # those with a slope per column have kernels of their own
        KERNELS[f"{_name}_forward"] = forward_kernel(f"{_name}_forward", _forward)
        KERNELS[f"{_name}_backward"] = backward_kernel(_name, _backward)


#: Between float32 and bfloat16: where a batch comes in and results go out.
ROUND = forward_kernel("round_forward", identity, "f4*", "T*")
WIDEN = forward_kernel("widen_forward", identity, "T*", "f4*")


def launch_identity(arrays: Sequence[View | None], params: Mapping[str, Any], planner: Planner) -> list[Launch]:
    types = tuple(float_type(view) for view in arrays)
    changes = {("float32", "bfloat16"): ROUND, ("bfloat16", "float32"): WIDEN}
    return elementwise(changes.get(types, KERNELS["identity_forward"]), arrays, 0.0, planner)


def _launches(op: str) -> Callable[..., list[Launch]]:
    def launches(arrays: Sequence[View | None], params: Mapping[str, Any], planner: Planner) -> list[Launch]:
        return elementwise(KERNELS[op], arrays, float(params.get("alpha", 0.0)), planner)

    return launches


for _op in KERNELS:
    _found = launch_identity if _op == "identity_forward" else _launches(_op)
    register(Impl(_op, "cuda", launches=_found))
