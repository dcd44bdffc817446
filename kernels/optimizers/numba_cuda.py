"""Optimisers on CUDA: one launch over both groups of parameters, 28 bytes a parameter for Adam and nothing else.

Formulas and papers: reference.py. Where products read bfloat16, the sweep keeps a rounded copy of the parameters (2
bytes more). A thread takes eight parameters. The first group has weight decay, the second none; blocks of the second
follow those of the first in the grid. Update count, learning rate and the gradient's scale come from the run-time
block, so a captured step stays right: 1 - beta^t is -expm1(t log beta), which float32 gets to 1e-7 for every t, where a
product of t factors would not. 1 - beta comes from the host for the same reason: 1 - float32(0.999) is off by 1e-5.

The squared norm adds a thread's squares in float32, threads and blocks in float64, in a fixed tree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastdl.kernels.common import numba_cuda as gpu
from fastdl.kernels.common.gpu import LR, SCALE, THREADS, UPDATE, Launch, Planner, View, float_type, kernel
from fastdl.kernels.common.numba_math import expm1
from fastdl.kernels.common.sums_cuda import arrives_last, sum_of_block
from fastdl.kernels.registry import Impl, register

if not gpu.MISSING:
    from numba import cuda

#: Blocks of the squared norm: enough to fill the device, few enough for one block to add up.
NORM_BLOCKS = 4 * 132
#: Arrays, params, and where a bfloat16 copy of the parameters is kept, if one is.
Group = tuple[Sequence[View | None], Mapping[str, Any], View | None]


# ---------------------------------------------------------------------------------------------- points
@gpu.point
def _gradient(g, w, scale, l2):
    g = g * scale
    if l2 != 0:  # not 0 * w: an infinite weight would make NaN
        g = g + l2 * w
    return g


def _adam_m(w, g, m, beta1, gain1):
    return beta1 * m + gain1 * g


def _adam_v(g, v, beta2, gain2):
    return beta2 * v + gain2 * (g * g)


def _adam_w(w, m, v, keep, factors):
    rate, root, eps = factors
    return w * keep - rate * m / (gpu.f4(math.sqrt(v)) * root + eps)


def _velocity(v, g, momentum):
    return momentum * v + g


def _sgd_w(w, g, v, keep, factors):
    rate, momentum, nesterov = factors
    d = g + momentum * v if nesterov != 0 else v
    return w * keep - rate * d


_gradient8, _m8, _v8 = gpu.each(_gradient, 4), gpu.each(_adam_m, 5), gpu.each(_adam_v, 4)
_adam8, _velocity8, _sgd8 = gpu.each(_adam_w, 5), gpu.each(_velocity, 3), gpu.each(_sgd_w, 5)


@gpu.point
def _rate(run, lr_factor):
    return gpu.float_of(run[LR]) * lr_factor


@gpu.point
def _kept_share(run, log_beta):
    """1 - beta^t with t = update + 1."""
    return -expm1((gpu.f4(run[UPDATE]) + gpu.f4(1)) * log_beta)


@gpu.point
def _scale(run, clip, clipped):
    """Factor of the gradient: clipping, and the run's own."""
    scale = gpu.float_of(run[SCALE])
    return scale * gpu.f4(clip[0]) if clipped != 0 else scale


# ---------------------------------------------------------------------------------------------- sweeps
@gpu.point
def _adam(w, g, m, v, rounded, i, n, scale, l2, keep, betas, factors, copied, wide):
    zero, whole = gpu.f4(0), wide != 0 and n >= 8
    weight, first = gpu.take8(w, i, n, whole, zero), gpu.take8(m, i, n, whole, zero)
    d = _gradient8(gpu.take8(g, i, n, whole, zero), weight, scale, l2)
    first = _m8(weight, d, first, betas[0], betas[1])
    second = _v8(d, gpu.take8(v, i, n, whole, zero), betas[2], betas[3])
    gpu.give8(m, i, first, n, whole)
    gpu.give8(v, i, second, n, whole)
    weight = _adam8(weight, first, second, keep, factors)
    gpu.give8(w, i, weight, n, whole)
    if copied != 0:
        gpu.give8(rounded, i, weight, n, whole)


@kernel(
    "u4* run, f8* clip, i4 clipped, f4 lr_factor, f4 beta1, f4 gain1, f4 log1, f4 beta2, f4 gain2, f4 log2, f4 eps, "
    "i4 first_blocks, i4 copied, i4 wide, T* w, T* g, T* m, T* v, u2* rounded, i8 n, f4 l2, f4 decay, "
    "T* w2, T* g2, T* m2, T* v2, u2* rounded2, i8 n2, f4 l2_2, f4 decay2",
    doubles="reads the factor of clipping",
    registers=96,
)
def adam_step(
    run, clip, clipped, lr_factor, beta1, gain1, log1, beta2, gain2, log2, eps, first_blocks,
    copied, wide, w, g, m, v, rounded, n, l2, decay, w2, g2, m2, v2, rounded2, n2, l2_2, decay2,
):  # fmt: skip
    one = gpu.f4(1)
    lr = _rate(run, lr_factor)
    factors = (lr / _kept_share(run, log1), one / gpu.f4(math.sqrt(_kept_share(run, log2))), eps)
    betas = beta1, gain1, beta2, gain2
    factor, block = _scale(run, clip, clipped), gpu.i8(cuda.blockIdx.x)
    if block < first_blocks:
        i = gpu.i8(8) * gpu.column()
        if i < n:
            _adam(w, g, m, v, rounded, i, n - i, factor, l2, one - lr * decay, betas, factors, copied, wide)
    else:
        i = gpu.i8(8) * (gpu.column() - gpu.i8(first_blocks) * THREADS)
        if i < n2:
            keep = one - lr * decay2
            _adam(w2, g2, m2, v2, rounded2, i, n2 - i, factor, l2_2, keep, betas, factors, copied, wide)


@gpu.point
def _sgd(w, g, v, rounded, i, n, scale, l2, keep, factors, moving, copied, wide):
    zero, whole = gpu.f4(0), wide != 0 and n >= 8
    weight = gpu.take8(w, i, n, whole, zero)
    d = _gradient8(gpu.take8(g, i, n, whole, zero), weight, scale, l2)
    speed = d
    if moving != 0:
        speed = _velocity8(gpu.take8(v, i, n, whole, zero), d, factors[1])
        gpu.give8(v, i, speed, n, whole)
    weight = _sgd8(weight, d, speed, keep, factors)
    gpu.give8(w, i, weight, n, whole)
    if copied != 0:
        gpu.give8(rounded, i, weight, n, whole)


@kernel(
    "u4* run, f8* clip, i4 clipped, f4 lr_factor, f4 momentum, i4 nesterov, i4 moving, i4 first_blocks, i4 copied, "
    "i4 wide, T* w, T* g, T* v, u2* rounded, i8 n, f4 l2, f4 decay, "
    "T* w2, T* g2, T* v2, u2* rounded2, i8 n2, f4 l2_2, f4 decay2",
    doubles="reads the factor of clipping",
    registers=96,
)
def sgd_step(
    run, clip, clipped, lr_factor, momentum, nesterov, moving, first_blocks, copied, wide,
    w, g, v, rounded, n, l2, decay, w2, g2, v2, rounded2, n2, l2_2, decay2,
):  # fmt: skip
    one = gpu.f4(1)
    lr = _rate(run, lr_factor)
    factors = (lr, momentum, gpu.f4(nesterov))
    factor, block = _scale(run, clip, clipped), gpu.i8(cuda.blockIdx.x)
    if block < first_blocks:
        i = gpu.i8(8) * gpu.column()
        if i < n:
            _sgd(w, g, v, rounded, i, n - i, factor, l2, one - lr * decay, factors, moving, copied, wide)
    else:
        i = gpu.i8(8) * (gpu.column() - gpu.i8(first_blocks) * THREADS)
        if i < n2:
            keep = one - lr * decay2
            _sgd(w2, g2, v2, rounded2, i, n2 - i, factor, l2_2, keep, factors, moving, copied, wide)


@kernel("f4* w, u2* rounded, i8 n")
def round_parameters(w, rounded, n):
    i = gpu.i8(8) * gpu.column()
    if i < n:
        whole = n - i >= 8
        gpu.give8(rounded, i, gpu.take8(w, i, n - i, whole, gpu.f4(0)), n - i, whole)


def round_launch(w: View, rounded: View) -> Launch:
    """The bfloat16 copy of parameters that the host has written; both start at a multiple of 16 bytes."""
    return Launch(round_parameters, (max(1, _blocks(w)), 1), (THREADS, 1), (w, rounded, w.rows))


# ---------------------------------------------------------------------------------------------- global norm
@kernel("u4* run, T* g, i8 n, f8* partial, u4* counter, f8* total, i4 wide", doubles="sums of threads and of blocks")
def squared_norm(run, g, n, partial, counter, total, wide):
    i, step = gpu.i8(8) * gpu.column(), gpu.i8(8) * gpu.i8(cuda.gridDim.x) * THREADS
    s = gpu.f4(0)
    while i < n:
        a, b, c, d, e, f, h, k = gpu.take8(g, i, n - i, wide != 0 and n - i >= 8, gpu.f4(0))
        s += ((a * a + b * b) + (c * c + d * d)) + ((e * e + f * f) + (h * h + k * k))
        i += step
    room, at = cuda.shared.array(THREADS, np.float64), gpu.place()
    whole = sum_of_block(room, np.float64(s))
    if at == 0:
        partial[cuda.blockIdx.x] = whole
    if arrives_last(counter, 0, cuda.gridDim.x):
        whole, k = np.float64(0), at
        while k < cuda.gridDim.x:
            whole += partial[k]
            k += THREADS
        whole = sum_of_block(room, whole)
        if at == 0:
            scale = np.float64(gpu.float_of(run[SCALE]))
            total[0] += whole * (scale * scale)


@kernel("f8* total, f8* scale, f8 max_norm", doubles="two numbers a step")
def clip_scale(total, scale, max_norm):
    factor = max_norm / math.sqrt(total[0])
    scale[0] = 1.0 if factor > 1.0 else factor  # NaN stays NaN
    total[0] = 0.0


# ---------------------------------------------------------------------------------------------- launches
def _blocks(view: View) -> int:
    return -(-view.rows // (8 * THREADS))


def _is_wide(groups: Sequence[Group]) -> int:
    return int(all(v.address % 16 == 0 for arrays, _, copy in groups for v in (*arrays[:-1], copy) if v is not None))


def update_launch(groups: Sequence[Group], planner: Planner) -> Launch:
    """One sweep over one or two groups of (arrays, params) of an optimiser that differ in their decay alone."""
    (arrays, params, copy), second = groups[0], groups[1] if len(groups) > 1 else None
    adam = "beta1" in params
    clip = arrays[-1]
    spans = [part for group in (groups[0], second) for part in _span(group, len(arrays))]
    flags = int(copy is not None), _is_wide([g for g in (groups[0], second) if g])
    first = _blocks(arrays[0])
    grid = max(1, first + (0 if second is None else _blocks(second[0][0]))), 1
    common = (planner.run, clip, int(clip is not None), params["lr_factor"])
    if adam:
        rates = [(b, 1.0 - b, math.log(b) if b else -math.inf) for b in (params["beta1"], params["beta2"])]
        found = (*common, *rates[0], *rates[1], params["eps"], first, *flags, *spans)
    else:
        moving = int(arrays[2] is not None)
        found = (*common, params["momentum"], params["nesterov"], moving, first, *flags, *spans)
    return Launch(adam_step if adam else sgd_step, grid, (THREADS, 1), found, float_type(arrays[0]))


def _span(group: Group | None, pointers: int) -> list[Any]:
    """Pointers, size and decays of a group, or of none."""
    if group is None:
        return [*[None] * pointers, 0, 0.0, 0.0]
    arrays, params, copy = group
    return [*arrays[:-1], copy, arrays[0].rows, params["l2"], params["weight_decay"]]


def launch_update(arrays: Sequence[View | None], params: Mapping[str, Any], planner: Planner) -> list[Launch]:
    return [update_launch([(arrays, params, None)], planner)]


def launch_norm(arrays: Sequence[View | None], params: Mapping[str, Any], planner: Planner) -> list[Launch]:
    g, total = arrays
    blocks = max(1, min(NORM_BLOCKS, _blocks(g)))
    partial, counter = planner.scratch(blocks, dtype="f8"), planner.scratch(1, dtype="u4")
    arguments = (planner.run, g, g.rows, partial, counter, total, int(g.address % 16 == 0))
    return [Launch(squared_norm, (blocks, 1), (THREADS, 1), arguments, float_type(g))]


def launch_clip(arrays: Sequence[View | None], params: Mapping[str, Any], planner: Planner) -> list[Launch]:
    return [Launch(clip_scale, (1, 1), (1, 1), (*arrays, params["max_norm"]))]


register(Impl("adam_step", "cuda", launches=launch_update))
register(Impl("sgd_step", "cuda", launches=launch_update))
register(Impl("squared_norm", "cuda", launches=launch_norm))
register(Impl("clip_scale", "cuda", launches=launch_clip))
