"""The dense products on the compiled back end: one driver for x w, dy w^T and x^T dy (README.md has the reasons).

Column panels are used in place; plain or transposed matrices are packed block by block into the same form. One thread
owns an output panel for all rows, so that a tail runs on the finished panel; without a tail, rows are shared out where
that balances better. Neither choice touches a sum: an element of the output is one chain of fused multiply-adds per K
block, K blocks are added in order, and their size depends on the shape alone.
"""

include "../common/abi.pxi"

cdef extern from "dense/table.h" nogil:
    int FD_AVX512

    ctypedef struct fd_dense_block:
        const void* a
        const void* b
        void* c
        void* z
        const void* bias
        int64_t rows, cols, k, panels, b_panel, c_panel, z_panel, a_row, a_panel, b_row, c_row, z_row
        int add, padded, relu

    ctypedef struct fd_dense_table:
        void (**product)(const fd_dense_block*) noexcept nogil
        void (**product_t)(const fd_dense_block*) noexcept nogil
        void (**dots)(const fd_dense_block*) noexcept nogil
        void (**pack)(const void*, void*, int64_t, int64_t, int64_t, int64_t) noexcept nogil
        void (**column_sums)(const void*, void*, int64_t, int64_t, int64_t, int) noexcept nogil
        const int* wide

    ctypedef struct fd_dense_pairs:
        void (*product)(const fd_dense_block*) noexcept nogil
        void (*product_t)(const fd_dense_block*) noexcept nogil
        void (*rows)(const float*, uint32_t*, int64_t, int64_t, int64_t) noexcept nogil
        void (*pairs)(const float*, uint32_t*, int64_t, int64_t, int64_t) noexcept nogil
        void (*transposed)(const float*, uint32_t*, int64_t, int64_t, int64_t) noexcept nogil

    const fd_dense_table* fd_dense_at(int level)
    const fd_dense_pairs* fd_dense_bfloat16()

cdef extern from "activations/table.h" nogil:
    ctypedef struct fd_activation:
        void (**forward)(const void*, void*, int64_t, int64_t, int64_t, int64_t, double, const void*) noexcept nogil

    ctypedef struct fd_activation_table:
        const fd_activation* entry

ctypedef void (*block_product)(const fd_dense_block*) noexcept nogil

# A block of A (at most A_BYTES) stays in L2, but for what an L2 of 1 MB loses to the panels of B and C and the prefetch
# brings back: 768 KB was 2 % slower, because fewer rows share a transposed panel of w. A K block is about K_BYTES of a
# row of A: 512 float32 cost C one round trip per 7000 cycles of a tile; half was 3 to 5 % slower, twice the same.
cdef int64_t A_BYTES = 1024 * 1024
cdef int64_t K_BYTES = 2048
# Plain rows are packed when a block is read often enough to pay for the copy: A from 24 output panels on (16 run 4 %
# faster in place; 64 run 25 % slower if rows are 8 KB apart, the same sets of L1, and the same otherwise), B from 128
# rows on unless its rows are at most 1 KB apart.
cdef int64_t PACK_A_PANELS = 24
cdef int64_t PACK_B_ROWS = 128
cdef int64_t PACK_B_STRIDE = 1024
cdef int64_t WIDE_ROWS = 3       # rows up to which a tile may take several panels of B
cdef int64_t THIN = 4            # rows or columns of an output up to which dot products are faster, if they apply
cdef int64_t ACTIVATION_ROWS = 112  # rows of a panel that go through the activation while they are in L1

cdef const fd_dense_table* table = fd_dense_at(0)
cdef const fd_dense_pairs* half = fd_dense_bfloat16()  # NULL where the CPU has no AVX512-BF16
cdef int running_level = 0
cdef const fd_activation_table* const* activations = NULL
cdef int64_t IDENTITY = -1
cdef int64_t RELU = -2


cdef struct Product:
    const fd_array* a     # (m, k), or (k, m) if ta
    const fd_array* b     # (k, n), or (n, k) if tb
    const fd_array* out   # (m, n)
    bint ta, tb
    int64_t m, k, n
    const fd_array* bias
    const fd_array* z
    const fd_array* sums  # column sums of b, for db
    int64_t activation
    double alpha
    bint half             # operands rounded to bfloat16, two of them in a word


cdef inline char* at(const fd_array* a, int64_t row, int64_t col) noexcept nogil:
    """Address of (row, col); col is a multiple of 32."""
    return a.data + (col // 32 * a.panel_stride + row * a.row_stride) * a.itemsize


cdef inline int64_t up32(int64_t n) noexcept nogil:
    return (n + 31) // 32 * 32


cdef inline bint by_dots(const Product* p) noexcept nogil:
    """A thin output of operands that lie contiguous along k: no packing, lanes are k."""
    if p.half or p.ta or (p.m > THIN and p.n > THIN) or p.a.col_stride != 1 or p.a.panel_stride != 32:
        return False
    return (p.b.col_stride == 1 and p.b.panel_stride == 32) if p.tb else p.b.row_stride == 1


cdef inline void blocks(const Product* p, int64_t* mb, int64_t* kb) noexcept nogil:
    """Rows and depth of a block of A, from the shape alone; blocks of nearly equal size."""
    cdef int64_t size = 2 if p.half else p.out.itemsize
    cdef int64_t count = max(1, (p.k * size + K_BYTES // 2) // K_BYTES)
    kb[0] = max(32, up32((p.k + count - 1) // count))
    cdef int64_t most = max(32, A_BYTES // (kb[0] * size) // 32 * 32)
    count = max(1, (p.m + most - 1) // most)
    mb[0] = max(32, up32((p.m + count - 1) // count))
    if by_dots(p):  # nothing is packed, rows stream from memory once
        kb[0] = max(32, up32(p.k))


cdef inline bint a_is_panels(const Product* p) noexcept nogil:
    return not p.half and p.a.col_stride == 1 and p.a.row_stride == 32


cdef int64_t scratch_of(const Product* p) noexcept nogil:
    cdef int64_t mb, kb
    if by_dots(p):
        return 0
    blocks(p, &mb, &kb)
    return ((0 if a_is_panels(p) else mb * kb) + kb * 32) * p.out.itemsize


cdef void pack_panels(const fd_array* a, void* to, int64_t row, int64_t rows, int64_t col, int64_t cols) noexcept nogil:
    """Rows and columns of a matrix as panels [column / 32][rows][32]."""
    cdef int t = a.itemsize == 8
    cdef int64_t c
    for c in range(0, cols, 32):
        table.pack[t](at(a, row, col + c), <char*>to + c * rows * a.itemsize, rows, min(32, cols - c), a.row_stride,
                      a.col_stride)


cdef void pack_transposed(const fd_array* b, void* to, int64_t k, int64_t depth, int64_t row,
                          int64_t cols) noexcept nogil:
    """The panel [depth][32] of b^T: columns k.. of b become rows, rows of b become columns."""
    cdef int t = b.itemsize == 8
    cdef int64_t c
    for c in range(0, depth, 32):
        table.pack[t](at(b, row, k + c), <char*>to + c * 32 * b.itemsize, min(32, depth - c), cols, b.col_stride,
                      b.row_stride)


cdef void pack_half_a(const Product* p, void* to, int64_t row, int64_t rows, int64_t k, int64_t depth) noexcept nogil:
    """A block of A as words of two bfloat16: panels [k / 32][rows][16], or [row / 32][depth / 2][32] of x^T."""
    cdef int64_t c, pairs = (depth + 1) // 2
    if p.ta:
        for c in range(0, rows, 32):
            half.pairs(<const float*>at(p.a, k, row + c), <uint32_t*>to + c * pairs, depth, min(32, rows - c),
                       p.a.row_stride)
    else:
        for c in range(0, depth, 32):
            half.rows(<const float*>at(p.a, row, k + c), <uint32_t*>to + c // 2 * rows, rows, min(32, depth - c),
                      p.a.row_stride)


cdef void pack_half_b(const Product* p, void* to, int64_t k, int64_t depth, int64_t j, int64_t cols) noexcept nogil:
    """Rows k.. of panel j of B as words of two bfloat16, [depth / 2][32]."""
    cdef int64_t c
    if p.tb:
        for c in range(0, depth, 32):
            half.transposed(<const float*>at(p.b, 32 * j, k + c), <uint32_t*>to + c // 2 * 32, min(32, depth - c), cols,
                            p.b.row_stride)
    else:
        half.pairs(<const float*>at(p.b, k, 32 * j), <uint32_t*>to, depth, cols, p.b.row_stride)


cdef void share(const Product* p, const fd_worker* w, bint by_panel, int64_t* rows, int64_t* panels) noexcept nogil:
    """This thread's [rows[0], rows[1]) and [panels[0], panels[1])."""
    cdef int64_t n = fd_panels(p.n), unit = 32 if p.ta else 16, m = (p.m + unit - 1) // unit, threads = w.threads
    rows[0], rows[1], panels[0], panels[1] = 0, p.m, 0, n
    if threads == 1:
        return
    cdef double even_n = <double>n / ((n + threads - 1) // threads * threads)
    cdef double even_m = <double>m / ((m + threads - 1) // threads * threads)
    if by_panel or m == 0 or even_n >= 0.9 * even_m:
        fd_share(n, w.thread, w.threads, &panels[0], &panels[1])
    else:
        fd_share(m, w.thread, w.threads, &rows[0], &rows[1])
        rows[0], rows[1] = min(p.m, rows[0] * unit), min(p.m, rows[1] * unit)


cdef void multiply(const Product* p, const fd_call* call, const fd_run* run, const fd_worker* w) noexcept nogil:
    cdef fd_dense_block block
    cdef int64_t size = p.out.itemsize, mb, kb, r0, k0, depth, items, j, q, r, rows, part, cols
    cdef int64_t row_share[2]
    cdef int64_t panel_share[2]
    cdef int t = size == 8
    cdef bint last, with_z, by_table = p.activation != IDENTITY and p.activation != RELU
    cdef block_product product = table.product_t[t] if p.ta else table.product[t]
    if p.half:
        product = half.product_t if p.ta else half.product
    cdef const fd_array* to
    cdef const char* a_block
    cdef char* b_scratch
    share(p, w, call.tail != NULL, row_share, panel_share)
    if panel_share[0] == panel_share[1] or (row_share[0] == row_share[1] and p.m):
        return
    blocks(p, &mb, &kb)
    cdef bint thin = by_dots(p)
    cdef bint few = panel_share[1] - panel_share[0] < PACK_A_PANELS or p.m <= WIDE_ROWS
    cdef bint pack_a = p.a.col_stride != 1 or not (a_is_panels(p) or thin or few)
    b_scratch = w.scratch + (0 if a_is_panels(p) else mb * kb * size)
    cdef bint own_sums = p.sums != NULL and p.sums.data != NULL and (row_share[0] == 0)
    r0 = row_share[0]
    while True:
        rows = min(mb, row_share[1] - r0)
        k0 = 0
        while True:
            depth = min(kb, p.k - k0)
            items = (depth + 1) // 2 if p.half else depth  # what a step of the product takes
            block.k = items
            last = k0 + kb >= p.k
            # A: a pointer to its panels, in place or packed
            if p.half:
                pack_half_a(p, w.scratch, r0, rows, k0, depth)
                a_block = w.scratch
                block.a_row, block.a_panel = (32, 32 * items) if p.ta else (16, 16 * rows)
            elif pack_a:
                if p.ta:
                    pack_panels(p.a, w.scratch, k0, block.k, r0, rows)
                else:
                    pack_panels(p.a, w.scratch, r0, rows, k0, block.k)
                a_block = w.scratch
                block.a_row, block.a_panel = 32, 32 * (block.k if p.ta else rows)
            else:
                a_block = at(p.a, k0, r0) if p.ta else at(p.a, r0, k0)
                block.a_row, block.a_panel = p.a.row_stride, p.a.panel_stride
            j = panel_share[0]
            while j < panel_share[1]:
                cols = fd_panel_cols(p.n, j)
                block.panels = 1
                if thin:
                    block.b = at(p.b, 32 * j, k0) if p.tb else at(p.b, k0, 32 * j)
                    block.b_row = p.b.row_stride if p.tb else p.b.col_stride
                else:
                    panel_of_b(p, &block, b_scratch, k0, j, cols, rows)
                    if not p.ta and rows <= WIDE_ROWS and block.b != b_scratch:
                        block.panels = wide_of(rows, min(panel_share[1], p.n // 32) - j)
                if own_sums and r0 == row_share[0]:
                    if p.half:  # of the values as they were
                        table.column_sums[t](at(p.b, k0, 32 * j), fd_panel_data(p.sums, j), depth, cols, p.b.row_stride,
                                             k0 > 0)
                    else:
                        table.column_sums[t](block.b, fd_panel_data(p.sums, j), depth, cols, block.b_row, k0 > 0)
                to = p.z if by_table and p.z.data != NULL else p.out
                block.cols, block.c_row, block.c_panel = cols, to.row_stride, to.panel_stride
                block.add = k0 > 0
                with_z = last and not by_table and p.z != NULL and p.z.data != NULL
                block.padded = to.panel_stride != 32 and (not with_z or p.z.panel_stride != 32)
                block.bias = NULL
                if last and p.bias != NULL and p.bias.data != NULL:
                    block.bias = fd_panel_data(p.bias, j)
                block.relu = last and p.activation == RELU
                part = ACTIVATION_ROWS if last and by_table else max(1, rows)
                r = 0
                while r < rows:
                    block.rows = min(part, rows - r)
                    block.a = a_block + r * block.a_row * size
                    block.c = at(to, r0 + r, 32 * j)
                    if with_z:
                        block.z, block.z_row, block.z_panel = at(p.z, r0 + r, 32 * j), p.z.row_stride, p.z.panel_stride
                    else:
                        block.z = NULL
                    if thin:
                        table.dots[t](&block)
                        block.k, block.add = 0, True  # what is left of the product: the epilogue
                    product(&block)
                    block.k, block.add = items, k0 > 0
                    if last and by_table:
                        for q in range(j, j + block.panels):
                            activations[0].entry[p.activation].forward[t](
                                at(to, r0 + r, 32 * q), at(p.out, r0 + r, 32 * q), block.rows, cols, to.row_stride,
                                p.out.row_stride, p.alpha, NULL)
                    r += part
                if last and call.tail != NULL and r0 + rows >= row_share[1]:
                    for q in range(j, j + block.panels):
                        fd_run_tail(call, run, w, q)
                j += block.panels
            k0 += kb
            if k0 >= p.k:
                break
        r0 += mb
        if r0 >= row_share[1]:
            break


cdef inline int64_t wide_of(int64_t rows, int64_t complete) noexcept nogil:
    """Panels that a product of few rows takes at once, of so many complete ones that are left."""
    cdef int64_t panels = table.wide[rows]
    while panels > complete and panels > 1:
        panels //= 2
    return panels


cdef inline bint in_place(int64_t stride, int64_t rows) noexcept nogil:
    """Whether the rows of B are read where they stand."""
    return rows < PACK_B_ROWS or stride <= PACK_B_STRIDE


cdef inline void panel_of_b(const Product* p, fd_dense_block* block, char* scratch, int64_t k0, int64_t j, int64_t cols,
                            int64_t rows) noexcept nogil:
    """Rows k0.. of panel j of B, in place where the micro-kernel can read whole vectors."""
    cdef const fd_array* b = p.b
    if p.half:
        pack_half_b(p, scratch, k0, min(2 * block.k, p.k - k0), j, cols)
    elif p.tb:
        if b.row_stride == 1 and cols == 32 and in_place(b.col_stride * b.itemsize, rows):
            block.b, block.b_row, block.b_panel = at(b, 32 * j, k0), b.col_stride, 32
            return
        pack_transposed(b, scratch, k0, block.k, 32 * j, cols)
    else:
        # The padding of a panel may be read; plain rows end where they end.
        if b.col_stride == 1 and (cols == 32 or b.panel_stride != 32) and in_place(
                b.row_stride * b.itemsize, rows):
            block.b, block.b_row, block.b_panel = at(b, k0, 32 * j), b.row_stride, b.panel_stride
            return
        pack_panels(b, scratch, k0, block.k, 32 * j, cols)
    block.b, block.b_row = scratch, 32


# ---------------------------------------------------------------------------------------------- the three ops
cdef Product forward_of(const fd_call* c, int64_t rows, bint in_half) noexcept nogil:
    cdef Product p
    p.half = in_half
    p.a, p.b, p.bias, p.out, p.z, p.sums = &c.a[0], &c.a[1], &c.a[2], &c.a[3], &c.a[4], NULL
    p.ta, p.tb = False, False
    p.m, p.k, p.n = rows, c.a[1].rows, c.a[1].cols
    p.activation, p.alpha = c.i[0], c.f[0]
    return p


cdef Product backward_input_of(const fd_call* c, int64_t rows, bint in_half) noexcept nogil:
    cdef Product p
    p.half = in_half
    p.a, p.b, p.bias, p.out, p.z, p.sums = &c.a[0], &c.a[1], NULL, &c.a[2], NULL, NULL
    p.ta, p.tb = False, True
    p.m, p.k, p.n = rows, c.a[1].cols, c.a[1].rows
    p.activation, p.alpha = IDENTITY, 0
    return p


cdef Product backward_weights_of(const fd_call* c, int64_t rows, bint in_half) noexcept nogil:
    cdef Product p
    p.half = in_half
    p.a, p.b, p.bias, p.out, p.z, p.sums = &c.a[0], &c.a[1], NULL, &c.a[2], NULL, &c.a[3]
    p.ta, p.tb = True, False
    p.m, p.k, p.n = c.a[2].rows, rows, c.a[2].cols
    p.activation, p.alpha = IDENTITY, 0
    return p


cdef inline int is_half(const fd_call* c) noexcept nogil:
    """The mixed kernels are the float32 ones with a flag in their info."""
    return c.info.data != NULL


cdef void forward(const fd_call* c, const fd_run* run, const fd_worker* w) noexcept nogil:
    cdef Product p = forward_of(c, run.rows, is_half(c))
    multiply(&p, c, run, w)


cdef void backward_input(const fd_call* c, const fd_run* run, const fd_worker* w) noexcept nogil:
    cdef Product p = backward_input_of(c, run.rows, is_half(c))
    multiply(&p, c, run, w)


cdef void backward_weights(const fd_call* c, const fd_run* run, const fd_worker* w) noexcept nogil:
    cdef Product p = backward_weights_of(c, run.rows, is_half(c))
    multiply(&p, c, run, w)


cdef int64_t forward_scratch(const fd_call* c, int64_t rows) noexcept nogil:
    cdef Product p = forward_of(c, rows, is_half(c))
    return scratch_of(&p)


cdef int64_t backward_input_scratch(const fd_call* c, int64_t rows) noexcept nogil:
    cdef Product p = backward_input_of(c, rows, is_half(c))
    return scratch_of(&p)


cdef int64_t backward_weights_scratch(const fd_call* c, int64_t rows) noexcept nogil:
    cdef Product p = backward_weights_of(c, rows, is_half(c))
    return scratch_of(&p)


cdef fd_kernel_info _forward, _backward_input, _backward_weights
_forward.run, _forward.scratch = forward, forward_scratch
_backward_input.run, _backward_input.scratch = backward_input, backward_input_scratch
_backward_weights.run, _backward_weights.scratch = backward_weights, backward_weights_scratch
cdef fd_kernel_info _half_forward = _forward, _half_backward_input = _backward_input
cdef fd_kernel_info _half_backward_weights = _backward_weights
_half_forward.data = _half_backward_input.data = _half_backward_weights.data = half


cdef dict _kinds(fd_kernel_info* info, fd_kernel_info* mixed):
    found = dict.fromkeys(("float32", "float64"), PyCapsule_New(info, FD_KERNEL_CAPSULE, NULL))
    if half != NULL:
        found["mixed_bfloat16"] = PyCapsule_New(mixed, FD_KERNEL_CAPSULE, NULL)
    return found


def no_bfloat16():
    """Why products of bfloat16 cannot run now, or None."""
    if half == NULL:
        return "this CPU has neither AVX512-BF16 nor AMX"
    return None if running_level == FD_AVX512 else "products of bfloat16 need the avx512 level"


def kernels() -> dict:
    """The kernels of this family: {op: {dtype: capsule}}."""
    return {
        "dense_forward": _kinds(&_forward, &_half_forward),
        "dense_backward_input": _kinds(&_backward_input, &_half_backward_input),
        "dense_backward_weights": _kinds(&_backward_weights, &_half_backward_weights),
    }


def select(int level) -> None:
    """Use the block functions of a SIMD level, and the activations' table for epilogues."""
    global table, activations, RELU, running_level
    from fastdl.kernels.activations import _cython as act

    table, running_level = fd_dense_at(level), level
    activations = <const fd_activation_table* const*>PyCapsule_GetPointer(act.table(), "fastdl.activations")
    RELU = act.index("relu")

