"""A tile of a product in a block's registers: the main loop of the three dense products on CUDA.

    c[m, n] = sum over k of a[m, k] b[k, n]

A block makes W x W sums with 2 W threads, W / 16 rows times 8 columns each. While they multiply 16 steps of k, its
threads fetch the next strip of each operand (16 x W, eight elements a thread) into registers, and then lay it down in
the other half of shared memory: one barrier every 16 steps. Operands are float32 or bfloat16 in device memory, float32
in shared memory.

| W | threads | sums a thread | accesses to shared memory | shared memory | registers | blocks on an SM |
|---|---|---|---|---|---|---|
| 128 | 256 | 8 x 8 | 4 of 16 bytes for 64 multiply-adds | 36 KB | 128 | 2 |
| 64 | 128 | 4 x 8 | 3 of 16 bytes for 32 | 20 KB | 100 | 4 |
| 32 | 64 | 2 x 8 | 2 of 16 bytes, 1 of 8 for 16 | 12 KB | 92 | 10 |

**A strip in shared memory** has a row for each k, so that a thread reads neighbours among its rows and columns at once.
An operand whose rows run *across* the strip (along W) arrives like that. One whose rows run *along* k is turned: a
thread fetches eight k of one row and stores them one by one.

**No bank conflicts.** A row of a strip is cut into groups of four floats: even groups lie in its first half, odd ones
in its second, 16 banks on (`_place`), so that eight threads side by side read and store 128 bytes side by side. Rows
are W + 16 floats apart, for W = 32, where eight threads store into two of them. In an *along* strip the groups of k = 8
to 15 change places two by two (exclusive or with 8): the 16 elements of two k that a warp stores at a time lie in 32
banks. Lanes are numbered such that lane ^ 1 has the same rows of the output and lane ^ 2 the same columns: quarters of
a warp that read the same 128 bytes are then served together.

**Order of a sum**: k = 0, 1, 2, ... in one chain of fused multiply-adds, whatever the tile or the grid. What lies past
an edge counts as 0 on both sides, so that 0 * inf comes from the operands alone.

**Order of tiles**: up to eight tiles below each other, then the next column of tiles: the 264 blocks that an H200 runs
at a time read 8 + 33 strips of the operands instead of 264 + 1.
"""

from __future__ import annotations

import functools
from typing import Any

from fastdl.kernels.common import numba_cuda as gpu

#: Steps of k between barriers: at W = 128 two blocks take 4096 cycles for them, many times the latency of memory. All
#: threads fetch eight elements of each operand then, whatever the W.
DEPTH = 16
WIDTHS = (128, 64, 32)
#: Tiles that fill an H200: the widest tile of which there are so many, or the narrowest.
FILL = 132
COLUMNS = 8  # of a thread: what one Philox counter draws
ZERO = gpu.f4(0)


def width(rows: int, cols: int) -> int:
    """The tile for an output of this shape."""
    return next((w for w in WIDTHS if -(-rows // w) * -(-cols // w) >= FILL), WIDTHS[-1])


def grid(rows: int, cols: int, w: int) -> tuple[tuple[int, int], int]:
    """The grid for an output of this shape, and how often to halve blockIdx.x for the column of tiles."""
    tall, wide = max(1, -(-rows // w)), max(1, -(-cols // w))
    shift = min(3, (tall - 1).bit_length())
    return (wide << shift, -(-tall >> shift)), shift


def _layout(w: int) -> tuple[int, int]:
    """Floats from the first half of a strip's row to the second, and from a row to the next: 16 banks on both times."""
    return w // 2 + (16 if w >= 64 else 0), w + 16


if gpu.MISSING is None:
    from llvmlite import ir
    from numba import cuda, types
    from numba.core.extending import intrinsic

    _F4, _EIGHT = types.CPointer(types.float32), types.UniTuple(types.float32, COLUMNS)
    _FLOAT, _WORD = ir.FloatType(), ir.IntType(32)

    @intrinsic
    def _pointer(typing, array):
        """Address of an array's first float."""

        def generate(context, builder, signature, arguments):
            return context.make_array(array)(context, builder, arguments[0]).data

        return _F4(array), generate

    @intrinsic
    def _advance(typing, p, n):
        """The pointer so many elements further."""
        return p(p, n), lambda context, builder, signature, arguments: builder.gep(arguments[0], [arguments[1]])

    def _reader(register: str) -> Any:
        """A special register, read anew where it is asked for: what hangs on it need not wait in a register."""

        def generate(context, builder, signature, arguments):
            kind = ir.FunctionType(_WORD, [])
            return builder.call(ir.InlineAsm(kind, f"mov.u32 $0, %{register};", "=r", side_effect=True), [])

        return intrinsic(lambda typing: (types.int32(), generate))

    _thread, _block_x, _block_y = (_reader(name) for name in ("tid.x", "ctaid.x", "ctaid.y"))

    @gpu.point
    def _kept_thread():
        return cuda.threadIdx.x

    @gpu.point
    def origin(shift, w):
        """The first row and column of this block's tile."""
        x, y = _block_x(), _block_y()
        return gpu.i4(((y << shift) + (x & ((1 << shift) - 1))) * w), gpu.i4((x >> shift) * w)

    @functools.cache
    def thread_place(w: int) -> Any:
        """This thread's first row and column in the tile.

        A warp is 4 threads high and 8 wide, at W = 32 8 high and 4 wide. Bit 0 of the lane goes to the column, bit 1 to
        the row, the others to columns first.
        """
        cols, rows, shift = (6, 2, 3) if w >= 64 else (2, 6, 2)
        across = max(1, w // 64)

        def function():
            thread = _thread()
            lane, warp = thread & 31, thread >> 5
            x = (warp % across) * (cols + 2) + (lane & 1) + (lane >> 1 & cols)
            y = (warp // across) * (rows + 2) + (lane >> 1 & 1) + (lane >> shift & rows)
            return gpu.i4(y * (w // 16)), gpu.i4(x * COLUMNS)

        return gpu.point(function)

    @functools.cache
    def _place(w: int) -> Any:
        """Where element i of a strip's row lies."""
        half, _ = _layout(w)

        def function(i):
            return gpu.i4((i >> 3) * 4 + (i & 3) + (i >> 2 & 1) * half)

        return gpu.point(function)

    def _put_one(k, v, strips, at, step):
        gpu.store(strips, at + k * step, v)
        return k

    _put_each, _PLACES = gpu.each(_put_one, 5), tuple(range(8))

    @gpu.point
    def load8(p, i, n, wide):
        """Eight floats from index i on, zeros from the n-th on."""
        if wide != 0 and n >= 8:
            return gpu.load8(p, i)
        return gpu.load_some(p, i, n, ZERO)

    @gpu.point
    def store8(p, i, t, n, wide):
        """The first n of eight floats."""
        if wide != 0 and n >= 8:
            gpu.store8(p, i, t)
        else:
            gpu.store_some(p, i, t, n)

    @gpu.point
    def store_total(p, m0, n0, cols, total, w):
        """The column sums of the tiles at row 0."""
        n = n0 + cuda.threadIdx.x
        if m0 == 0 and cuda.threadIdx.x < w and n < cols:
            gpu.store(p, n, total)

    def _words(p: Any) -> Any:
        """Eight elements as they lie in memory."""
        return types.UniTuple(types.uint32, 8 if p == _F4 else 4)

    @intrinsic
    def _fetch8(typing, p, i):
        """Words of eight elements, aligned to 16 bytes. To widen bfloat16 here would be to wait for the memory here."""
        words = _words(p)

        def generate(context, builder, signature, arguments):
            four = ir.VectorType(_WORD, 4)
            at = builder.bitcast(builder.gep(arguments[0], [arguments[1]]), four.as_pointer())
            found = []
            for k in range(words.count // 4):
                loaded = builder.load(builder.gep(at, [ir.Constant(_WORD, k)]))
                loaded.align = 16
                found += [builder.extract_element(loaded, ir.Constant(_WORD, m)) for m in range(4)]
            return context.make_tuple(builder, words, found)

        return words(p, i), generate

    @intrinsic
    def _words_of(typing, p, t):
        """Words of eight floats, which ``p``'s type can hold."""
        words = _words(p)

        def generate(context, builder, signature, arguments):
            bits = [builder.bitcast(builder.extract_value(arguments[1], k), _WORD) for k in range(8)]
            if words.count == 4:
                low = [builder.lshr(v, ir.Constant(_WORD, 16)) for v in bits[::2]]
                bits = [builder.or_(a, b) for a, b in zip(low, bits[1::2], strict=True)]
            return context.make_tuple(builder, words, bits)

        return words(p, t), generate

    @intrinsic
    def _floats_of(typing, words):
        """And back."""

        def generate(context, builder, signature, arguments):
            bits = [builder.extract_value(arguments[0], k) for k in range(words.count)]
            if words.count == 4:
                sixteen, high = ir.Constant(_WORD, 16), ir.Constant(_WORD, 0xFFFF0000)
                bits = [half for v in bits for half in (builder.shl(v, sixteen), builder.and_(v, high))]
            return context.make_tuple(builder, _EIGHT, [builder.bitcast(v, _FLOAT) for v in bits])

        return _EIGHT(words), generate

    @gpu.point
    def fetch8(p, n, wide):
        """Words of eight elements, zeros from the n-th on."""
        if wide != 0 and n >= 8:
            return _fetch8(p, 0)
        return _words_of(p, gpu.load_some(p, 0, n, ZERO))

    @functools.cache
    def _strip(w: int, along: bool) -> tuple[Any, Any, Any, Any]:
        """What a thread does for an operand: where its first element is, how far it moves on in DEPTH steps, to fetch
        eight elements into registers, to put them into shared memory."""
        place, (half, step) = _place(w), _layout(w)
        threads, shift = w // 8, (w // 8).bit_length() - 1
        thread = _thread if w == WIDTHS[0] else _kept_thread
        if along:  # two threads take the 16 k of a row

            def start(stride, first):
                return (first + (thread() >> 1)) * stride + (thread() & 1) * 8

            def ahead(stride):
                return gpu.i8(DEPTH)

            def fetch(p, first, last, left, wide):
                n = left - (thread() & 1) * 8
                return fetch8(p, gpu.i4(n if first + (thread() >> 1) < last else 0), wide)

            def put(strips, at, words):
                k = gpu.i4(thread() & 1) * 8
                at += k * step + (place(thread() >> 1) ^ k)
                _put_each(_PLACES, _floats_of(words), strips, at, step)

        else:  # W / 8 threads take the elements of one k

            def start(stride, first):
                return (thread() >> shift) * stride + first + (thread() & (threads - 1)) * 8

            def ahead(stride):
                return DEPTH * stride

            def fetch(p, first, last, left, wide):
                n = last - first - (thread() & (threads - 1)) * 8
                return fetch8(p, gpu.i4(n if (thread() >> shift) < left else 0), wide)

            def put(strips, at, words):
                t = _floats_of(words)
                at += (thread() >> shift) * step + place((thread() & (threads - 1)) * 8)
                gpu.store4(strips, at, t[:4])
                gpu.store4(strips, at + half, t[4:])

        return gpu.point(start), gpu.point(ahead), gpu.point(fetch), gpu.point(put)

    @functools.cache
    def _multiply(w: int, a_along: bool, b_along: bool) -> Any:
        """``multiply(sums, strips, a, b)``: DEPTH outer products onto a thread's sums, written out so that they stay in
        registers. ``a`` and ``b`` are where the thread's first row and column lie."""
        down, (half, step) = w // 16, _layout(w)
        firsts = (0, half)[: -(-down // 4)]
        # Round squares of 2 x 2. In most of 18 orders ptxas spills in one kernel or the other at W = 128.
        square = ((0, 0), (0, 1), (1, 1), (1, 0))
        order = [(m + y, n + x) for m in range(0, down, 2) for n in range(0, COLUMNS, 2) for y, x in square]
        kind = types.UniTuple(_EIGHT, down)

        def read(builder: Any, strips: Any, at: Any, offset: int, count: int) -> list[Any]:
            at = builder.add(at, ir.Constant(_WORD, offset))
            vector = ir.VectorType(_FLOAT, count)
            found = builder.load(builder.bitcast(builder.gep(strips, [at]), vector.as_pointer()))
            found.align = 4 * count
            return [builder.extract_element(found, ir.Constant(_WORD, k)) for k in range(count)]

        def generate(context, builder, signature, arguments):
            given, strips, a, b = arguments
            sums = [[builder.extract_value(given, (m, n)) for n in range(8)] for m in range(down)]
            for k in range(DEPTH):
                swap = ir.Constant(_WORD, k // 8 * 8)
                at_a = builder.xor(a, swap) if a_along else a
                at_b = builder.xor(b, swap) if b_along else b
                of_a = [v for first in firsts for v in read(builder, strips, at_a, k * step + first, min(4, down))]
                of_b = [v for first in (0, half) for v in read(builder, strips, at_b, k * step + first, 4)]
                for m, n in order:
                    sums[m][n] = builder.fma(of_a[m], of_b[n], sums[m][n])
            rows = [context.make_tuple(builder, _EIGHT, of_row) for of_row in sums]
            return context.make_tuple(builder, kind, rows)

        def multiply(typing, sums, strips, a, b):
            return kind(kind, _F4, types.int32, types.int32), generate

        return intrinsic(multiply)

    @functools.cache
    def product(w: int, a_along: bool, b_along: bool, column_sums: bool = False) -> Any:
        """A device function that makes this block's tile: a thread's W / 16 rows of eight sums, and a column's sum.

        Its arguments: pointer, row stride and alignment (``wide``) of a and b, the tile's first row and column, the
        output's rows and columns, and the length of the sums. With ``column_sums`` thread n < W of the tiles at row 0
        adds up b's column n, in order of k.
        """
        start_a, ahead_a, fetch_a, put_a = _strip(w, a_along)
        start_b, ahead_b, fetch_b, put_b = _strip(w, b_along)
        multiply, place, at_thread = _multiply(w, a_along, b_along), _place(w), thread_place(w)
        _, step = _layout(w)
        strip = DEPTH * step
        none, room = ((ZERO,) * COLUMNS,) * (w // 16), 4 * strip

        def function(a, a_row, a_wide, b, b_row, b_wide, m0, n0, rows, cols, inner):
            strips = _pointer(cuda.shared.array(room, gpu.f4))
            m, n = at_thread()
            m_place, n_place = place(m), strip + place(n)
            sums, total = none, ZERO
            left, stage = inner, gpu.i4(0)
            a, b = _advance(a, start_a(a_row, m0)), _advance(b, start_b(b_row, n0))
            put_a(strips, stage, fetch_a(a, m0, rows, left, a_wide))
            put_b(strips, stage + strip, fetch_b(b, n0, cols, left, b_wide))
            gpu.sync()
            while left > 0:
                left = gpu.i4(left - DEPTH)
                a, b = _advance(a, ahead_a(a_row)), _advance(b, ahead_b(b_row))
                at_a, at_b, other = gpu.i4(stage + m_place), gpu.i4(stage + n_place), gpu.i4(2 * strip - stage)
                next_a = fetch_a(a, m0, rows, left, a_wide)
                next_b = fetch_b(b, n0, cols, left, b_wide)
                sums = multiply(sums, strips, at_a, at_b)
                put_a(strips, other, next_a)
                put_b(strips, other + strip, next_b)
                if column_sums and m0 == 0 and cuda.threadIdx.x < w:
                    at = stage + strip + place(cuda.threadIdx.x)
                    for c in range(DEPTH):
                        total += gpu.load(strips, at + c * step)
                stage = other
                gpu.sync()
            return sums, total

        return gpu.point(function)

else:

    def product(*given: Any) -> None:
        """Without a compiler there are plans alone."""

    load8 = store8 = store_total = origin = thread_place = product
