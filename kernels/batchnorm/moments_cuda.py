"""Batch normalisation on CUDA: what its kernels share, and the statistics of columns.

Each thread adds up differences from its own first row. Its mean is a sum of two float32, the rounded one and what the
rounding has lost (Knuth's sum of two is exact), and two groups of rows merge by

    sum of squares = both + (difference of means)^2 n_a n_b / n        (Chan, Golub, LeVeque 1983)

where the difference is taken between the rounded means and then between what they have lost: nothing is lost at the
size of the mean, and float32 is enough. A strange row costs digits among its thread's rows alone, 32 or so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastdl.kernels.activations.points import NEAR, POINTS
from fastdl.kernels.activations.reference import ACTIVATIONS
from fastdl.kernels.batchnorm.reference import LOOSE
from fastdl.kernels.common import numba_cuda as gpu
from fastdl.kernels.common.gpu import LEAST_ROWS, ROOM, THREADS, Kernel, View, kernel, strips
from fastdl.kernels.common.sums_cuda import column_place, lay8, pick8
from fastdl.kernels.dropout.numba_cuda import stream

if not gpu.MISSING:
    from numba import cuda

ZERO = gpu.f4(0)
NONE = (ZERO,) * 8
LIMIT = gpu.f4(LOOSE)
PLACES = tuple(range(8))
LINE = 128  # bytes: the width of a strip of sums
STATISTICS_ROOM = 3 * ROOM + THREADS  # floats of shared memory: three of `moments` for eight columns, and the rows
#: Registers of a thread in sums, two blocks to a multiprocessor: three vectors of eight constants, two or three of
#: sums, and elements of two rows (four in the statistics) on their way. In bfloat16 that is 32 KB a multiprocessor,
#: where memory needs some 23 (4.3 TB/s for 0.7 us, shared by 132). Sweeps read half or two thirds as fast, a row at a
#: time.
SUMS = 128
SWEEP = 32  # threads side by side in a sweep: a warp's worth of a row


@gpu.point
def is_loose(mean, inv_std):
    return abs(mean * inv_std) > LIMIT


@gpu.point
def inverse(var, eps):
    return gpu.f4(1) / gpu.f4(math.sqrt(var + eps))


@gpu.point
def rounded_mean(a, m):
    """a + m; an infinite one stays in m."""
    t = a + m
    return t if t - t == ZERO else a


@gpu.point
def lost(a, m, t):
    """a + m - t, exactly, for t = a + m rounded."""
    part = t - a
    return (a - (t - part)) + (m - part)


def activation_points(name: str) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any] | None]:
    """value(u, slope, a), gradient(dy, u, slope, a), and what an element adds to dslope, or None."""
    if name == "identity":
        return lambda u, slope, a: u, lambda dy, u, slope, a: dy, None
    forward, backward, *part = POINTS[name]
    f, b, sloped, from_output = gpu.point(forward), gpu.point(backward), bool(part), ACTIVATIONS[name].saves == "y"

    def value(u, slope, a):
        return f(u, slope if sloped else a)

    def gradient(dy, u, slope, a):
        w = slope if sloped else a
        return b(dy, f(u, w) if from_output else u, w)

    return value, gradient, part[0] if sloped else None


normalise8 = gpu.each(lambda x, mean, gain, shift: (x - mean) * gain + shift, 4)
finite8 = gpu.each(lambda x: x if x - x == ZERO else ZERO, 1)  # an infinity must reach the sums, not the shift
subtract8 = gpu.each(lambda x, y: x - y, 2)
multiply8 = gpu.each(lambda x, y: x * y, 2)
squares8 = gpu.each(lambda s, d: s + d * d, 2)
products8 = gpu.each(lambda s, dz, x, mean: s + dz * (x - mean), 4)
scale8 = gpu.each(lambda s, w: s * w, 2)
about8 = gpu.each(lambda q, s, m: q - s * m, 3)  # squares about the mean m from those about 0, whose sum is s
mean8 = gpu.each(rounded_mean, 2)
lost8 = gpu.each(lost, 3)
gap8 = gpu.each(lambda a, m_a, b, m_b: (b - a) + (m_b - m_a), 4)
merge_mean8 = gpu.each(lambda a, m_a, b, m_b, w: m_a * (gpu.f4(1) - w) + (m_b + (b - a)) * w, 5)
merge_squares8 = gpu.each(lambda q_a, q_b, gap, w: (q_a + q_b) + gap * gap * w, 4)
shift8 = gpu.each(lambda beta, rest, gain: beta - rest * gain, 3)
inverse8 = gpu.each(inverse, 2)
loose8 = gpu.each(lambda mean, inv_std: gpu.i4(1) if is_loose(mean, inv_std) else gpu.i4(0), 2)
rest8 = gpu.each(lambda k, kept, first, loose: kept[first + k] if loose != 0 else ZERO, 4)
finish8 = gpu.each(lambda dz, d, along, across, gain: (dz - across - d * along) * gain, 5)


# ---------------------------------------------------------------------------------------------- statistics
@gpu.point
def moments(x, x_row, rows, c, cols, whole):
    """Of a thread's rows of eight columns: their number, the mean in two parts, squares about the mean."""
    r, step, n = gpu.i8(gpu.row()), gpu.i8(gpu.row_step()), gpu.i4(0)
    first, s, q = NONE, NONE, NONE
    if r < rows:
        first = finite8(gpu.take8(x, r * x_row + c, cols - c, whole, ZERO))
    while whole and r + 3 * step < rows:  # four rows in flight
        i, down = r * x_row + c, step * x_row
        d0, d1, d2, d3 = gpu.load8(x, i), gpu.load8(x, i + down), gpu.load8(x, i + 2 * down), gpu.load8(x, i + 3 * down)
        d0, d1, d2, d3 = subtract8(d0, first), subtract8(d1, first), subtract8(d2, first), subtract8(d3, first)
        s = gpu.add8(s, gpu.add8(gpu.add8(d0, d1), gpu.add8(d2, d3)))
        q = squares8(squares8(squares8(squares8(q, d0), d1), d2), d3)
        r, n = r + 4 * step, gpu.i4(n + 4)
    while r < rows:
        d = subtract8(gpu.take8(x, r * x_row + c, cols - c, whole, ZERO), first)
        s, q = gpu.add8(s, d), squares8(q, d)
        r, n = r + step, gpu.i4(n + 1)
    m = scale8(s, gpu.f4(1) / gpu.f4(max(n, gpu.i4(1))))
    a = mean8(first, m)
    return gpu.f4(n), a, lost8(first, m, a), about8(q, s, m)


@gpu.point
def merge(n_a, a, m_a, q_a, n_b, b, m_b, q_b):
    """`moments` of two groups of rows together."""
    if n_b > ZERO:  # then a has rows too: its rows or blocks come earlier
        n_a += n_b
        share = n_b / n_a
        q_a = merge_squares8(q_a, q_b, gap8(a, m_a, b, m_b), (n_a - n_b) * share)
        m_a = merge_mean8(a, m_a, b, m_b, share)
        mean = mean8(a, m_a)
        a, m_a = mean, lost8(a, m_a, mean)
    return n_a, a, m_a, q_a


@gpu.point
def merge_down(room, n, a, m, q):
    """`moments` of a block's rows, for the column of each thread; as sum_down, in STATISTICS_ROOM."""
    at, half = gpu.place(), gpu.i4(cuda.blockDim.y)
    while half > 0:
        half >>= 1
        if half <= cuda.threadIdx.y < max(1, 2 * half):  # the last time round the first row of threads
            room[3 * ROOM + at] = n
            lay8(room, at, a)
            lay8(room, ROOM + at, m)
            lay8(room, 2 * ROOM + at, q)
        gpu.sync()
        if cuda.threadIdx.y < half:
            k = at + half * cuda.blockDim.x
            b, m_b, q_b = pick8(room, k), pick8(room, ROOM + k), pick8(room, 2 * ROOM + k)
            n, a, m, q = merge(n, a, m, q, room[3 * ROOM + k], b, m_b, q_b)
    k = column_place()
    found = room[3 * ROOM], room[k], room[ROOM + k], room[2 * ROOM + k]
    gpu.sync()
    return found


@gpu.point
def merge_blocks(room, partial, c, columns):
    """`moments` of all of a strip's rows from those of its blocks."""
    n, a, m, q = ZERO, NONE, NONE, NONE
    block, blocks = gpu.i8(cuda.threadIdx.y), gpu.i8(cuda.gridDim.y)
    while block < blocks:
        i, apart = block * columns + c, blocks * columns
        found = gpu.load8(partial, i + apart), gpu.load8(partial, i + 2 * apart), gpu.load8(partial, i + 3 * apart)
        if block == cuda.threadIdx.y:
            n, a, m, q = partial[i], found[0], found[1], found[2]
        else:
            n, a, m, q = merge(n, a, m, q, partial[i], found[0], found[1], found[2])
        block += cuda.blockDim.y
    return merge_down(room, n, a, m, q)


# ---------------------------------------------------------------------------------------------- plans
def declare(name: str, signature: str, registers: int = 64, activation: str = "identity") -> Callable[..., Kernel]:
    # As for the activation alone: functions with a faster form near 0 reduce large arguments by 2 / pi in float64.
    doubles = "reduction of large arguments" if activation in NEAR else ""
    return kernel(signature, f"batchnorm_{name}", doubles, registers)


def activation_of(params: Mapping[str, Any]) -> str:
    return params["activation"] or "identity"


def dropout_of(params: Mapping[str, Any]) -> tuple[Any, ...]:
    kept, words = stream(params)
    return (int(params["rate"] > 0), *kept, *words)


def aligned(matrices: Sequence[View], vectors: Sequence[View | None]) -> int:
    return int(all(m.by_eights for m in matrices) and all(v is None or v.address % 16 == 0 for v in vectors))


def sum_strips(x: View) -> tuple[tuple[int, int], tuple[int, int], int]:
    """Grid and block for sums over rows, and the columns of all strips, those beyond the last one's end included."""
    grid, block = strips(x.rows, x.cols, LINE // (8 * x.itemsize), LEAST_ROWS)
    return grid, block, 8 * grid[0] * block[0]
