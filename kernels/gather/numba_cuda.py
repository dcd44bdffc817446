"""Gathers on CUDA, and the launch that moves an epoch on to its next step. Copies: every bit is kept, unless the data
set is float32 and the batch bfloat16, which is rounded on its way.

    out[i] = source[index[i]]        source (S, C) or (S,), index (N,), out (N, C) or (N,)

A thread copies eight columns of a row; rows that start at a multiple of 16 bytes go 16 bytes at a time. The data set
stays in device memory, so an epoch reads every row once, in the order of the permutation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastdl.kernels.common import numba_cuda as gpu
from fastdl.kernels.common.gpu import (
    BATCH,
    COUNT,
    OFFSET,
    ROWS,
    STEP,
    TOTAL_ROWS,
    UPDATE,
    Kernel,
    Launch,
    Planner,
    View,
    float_type,
    kernel,
    spans,
)
from fastdl.kernels.registry import Impl, register


def rows_kernel(name: str, source: str) -> Kernel:
    @kernel(f"{source} source, i8 source_row, i8* index, T* out, i8 out_row, u4* run, i8 cols, i4 wide", name)
    def gather(source, source_row, index, out, out_row, run, cols, wide):
        rows = gpu.rows_of(run)
        c = gpu.i8(8) * gpu.column()
        r = gpu.i8(gpu.row())
        while r < rows and c < cols:
            i, j = index[r] * source_row + c, r * out_row + c
            if wide != 0 and c + 8 <= cols:
                gpu.store8(out, j, gpu.load8(source, i))
            else:
                for k in range(min(gpu.i8(8), cols - c)):
                    gpu.store(out, j + k, gpu.load(source, i + k))
            r += gpu.row_step()

    return gather


GATHER, GATHER_AND_ROUND = rows_kernel("gather_rows", "T*"), rows_kernel("gather_rows_rounded", "f4*")


@kernel("i8* source, i8* index, i8* out, u4* run")
def gather_labels(source, index, out, run):
    i = gpu.column()
    if i < gpu.rows_of(run):
        out[i] = source[index[i]]


@kernel("T* source, i8* index, T* out, u4* run")
def gather_values(source, index, out, run):
    i = gpu.column()
    if i < gpu.rows_of(run):
        gpu.store(out, i, gpu.load(source, index[i]))


@kernel("i8* index, u4* run")
def row_range(index, run):
    i = gpu.column()
    if i < gpu.rows_of(run):
        index[i] = gpu.i8(run[OFFSET]) + i


@kernel("u4* run, f8* stats, f8* totals", doubles="sums of an epoch, one addition a step")
def next_step(run, stats, totals):
    """One thread: add the step's loss to the epoch's totals (`Executor.totals`), and go on to the next batch."""
    rows, mass = gpu.rows_of(run), stats[1]
    if mass != 0:  # a batch of zero weights has no mean
        totals[0] += stats[0] * mass
        totals[1] += mass
    totals[2] += stats[2]
    totals[3] += rows
    run[STEP] = gpu.u4(run[STEP] + gpu.u4(1))
    run[UPDATE] = gpu.u4(run[UPDATE] + gpu.u4(1))
    offset = gpu.u4(run[OFFSET] + gpu.u4(rows))
    left = gpu.u4(run[COUNT] - offset)
    run[OFFSET] = offset
    rows = min(gpu.u4(run[BATCH]), left)
    run[ROWS] = run[TOTAL_ROWS] = rows


def _vector_grid(view: View) -> tuple[tuple[int, int], tuple[int, int]]:
    """A thread for each element."""
    return spans(1, 8 * view.rows)


def launch_rows(arrays: Sequence[View | None], params: Mapping[str, Any], planner: Planner) -> list[Launch]:
    source, index, out = arrays
    grid, block = spans(*out.shape)
    arguments = (source, source.row_stride, index, out, out.row_stride, planner.run, out.cols)
    wide = int(source.by_eights and out.by_eights)
    same = float_type(source) == float_type(out)
    return [Launch(GATHER if same else GATHER_AND_ROUND, grid, block, (*arguments, wide), float_type(out))]


def launch_labels(arrays: Sequence[View | None], params: Mapping[str, Any], planner: Planner) -> list[Launch]:
    return [Launch(gather_labels, *_vector_grid(arrays[2]), (*arrays, planner.run))]


def launch_values(arrays: Sequence[View | None], params: Mapping[str, Any], planner: Planner) -> list[Launch]:
    return [Launch(gather_values, *_vector_grid(arrays[2]), (*arrays, planner.run), float_type(arrays[2]))]


def launch_range(arrays: Sequence[View | None], params: Mapping[str, Any], planner: Planner) -> list[Launch]:
    return [Launch(row_range, *_vector_grid(arrays[0]), (arrays[0], planner.run))]


def next_step_launch(planner: Planner, stats: View, totals: View) -> Launch:
    return Launch(next_step, (1, 1), (1, 1), (planner.run, stats, totals))


register(Impl("gather_rows", "cuda", launches=launch_rows))
register(Impl("gather_labels", "cuda", launches=launch_labels))
register(Impl("gather_values", "cuda", launches=launch_values))
register(Impl("row_range", "cuda", launches=launch_range))
