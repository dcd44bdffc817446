# The operands of a dense product: how they are cut into blocks, where a block lies, and when it is copied into panels.

# A block of A (at most A_BYTES) stays in L2, but for what an L2 of 1 MB loses to the panels of B and C and the prefetch
# brings back: 768 KB was 2 % slower, because fewer rows share a transposed panel of w. A K block is about K_BYTES of a
# row of A: 512 float32 cost C one round trip per 7000 cycles of a tile; half was 3 to 5 % slower, twice the same.
cdef int64_t A_BYTES = 1024 * 1024
cdef int64_t K_BYTES = 2048
# On tiles a panel of B must stay in L1 (512 values: 32 KB), for A then takes 32 bytes a cycle from L2. Not measured.
cdef int64_t TILE_K_BYTES = 1024
# Plain rows are packed when a block is read often enough to pay for the copy: A from 24 output panels on (16 run 4 %
# faster in place; 64 run 25 % slower if rows are 8 KB apart, the same sets of L1, and the same otherwise), B from 128
# rows on unless its rows are at most 1 KB apart.
cdef int64_t PACK_A_PANELS = 24
cdef int64_t PACK_B_ROWS = 128
cdef int64_t PACK_B_STRIDE = 1024
cdef int64_t WIDE_ROWS = 3       # rows up to which a tile may take several panels of B
cdef int64_t THIN = 4            # rows or columns of an output up to which dot products are faster, if they apply



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
    cdef int64_t size = 2 if p.half else p.out.itemsize, most_bytes = TILE_K_BYTES if p.half and half.tiles else K_BYTES
    cdef int64_t count = max(1, (p.k * size + most_bytes // 2) // most_bytes)
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
    cdef int64_t r, c, pairs = (depth + 1) // 2
    if not p.ta:
        for c in range(0, depth, 32):
            half.rows(<const float*>at(p.a, row, k + c), <uint32_t*>to + c // 2 * rows, rows, min(32, depth - c),
                      p.a.row_stride)
        return
    for r in range(0, rows, 32):
        if not half.tiles:
            half.columns(<const float*>at(p.a, k, row + r), <uint32_t*>to + r * pairs, depth, min(32, rows - r),
                         p.a.row_stride)
            continue
        for c in range(0, depth, 32):
            half.columns(<const float*>at(p.a, k + c, row + r), <uint32_t*>to + c // 2 * rows + 16 * r,
                         min(32, depth - c), min(32, rows - r), p.a.row_stride)


cdef void pack_half_b(const Product* p, void* to, int64_t k, int64_t depth, int64_t j, int64_t cols) noexcept nogil:
    """Rows k.. of panel j of B as words of two bfloat16, [depth / 2][32]."""
    cdef int64_t c
    if p.tb:
        for c in range(0, depth, 32):
            half.transposed(<const float*>at(p.b, 32 * j, k + c), <uint32_t*>to + c // 2 * 32, min(32, depth - c), cols,
                            p.b.row_stride)
    else:
        half.pairs(<const float*>at(p.b, k, 32 * j), <uint32_t*>to, depth, cols, p.b.row_stride)


cdef inline int64_t wide_of(int64_t rows, int64_t complete) noexcept nogil:
    """Panels that a product of few rows takes at once, of so many complete ones that are left."""
    cdef int64_t panels = table.wide[rows]
    while panels > complete and panels > 1:
        panels //= 2
    return panels


cdef inline bint in_place(int64_t stride, int64_t rows) noexcept nogil:
    """Whether the rows of B are read where they stand."""
    return rows < PACK_B_ROWS or stride <= PACK_B_STRIDE


cdef inline const char* block_of_a(const Product* p, fd_dense_block* block, char* scratch, int64_t r0, int64_t rows,
                                   int64_t k0, int64_t depth, bint few) noexcept nogil:
    """Rows r0.. and steps k0.. of A as panels: where they lie, or packed into scratch if `few` panels of B do not forbid."""
    if p.half:
        pack_half_a(p, scratch, r0, rows, k0, depth)
        block.a_row, block.a_panel = (32, 32 * block.k) if p.ta and not half.tiles else (16, 16 * rows)
        return scratch
    if p.a.col_stride == 1 and (a_is_panels(p) or by_dots(p) or few):
        block.a_row, block.a_panel = p.a.row_stride, p.a.panel_stride
        return at(p.a, k0, r0) if p.ta else at(p.a, r0, k0)
    block.a_row = 32
    if p.ta:
        block.a_panel = 32 * depth
        pack_panels(p.a, scratch, k0, depth, r0, rows)
    else:
        block.a_panel = 32 * rows
        pack_panels(p.a, scratch, r0, rows, k0, depth)
    return scratch


cdef inline void panel_of_b(const Product* p, fd_dense_block* block, char* scratch, int64_t k0, int64_t j,
                            int64_t rows) noexcept nogil:
    """Rows k0.. of panel j of B, in place where the micro-kernel can read whole vectors."""
    cdef const fd_array* b = p.b
    cdef int64_t cols = block.cols
    if by_dots(p):
        block.b = at(b, 32 * j, k0) if p.tb else at(b, k0, 32 * j)
        block.b_row = b.row_stride if p.tb else b.col_stride
        return
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


cdef inline void sums_of_b(const Product* p, const fd_dense_block* block, int64_t k0, int64_t depth,
                           int64_t j) noexcept nogil:
    """Add rows k0.. of panel j of B to its column sums; for bfloat16 products the values as they were."""
    cdef int t = p.out.itemsize == 8
    if p.half:
        table.column_sums[t](at(p.b, k0, 32 * j), fd_panel_data(p.sums, j), depth, block.cols, p.b.row_stride, k0 > 0)
    else:
        table.column_sums[t](block.b, fd_panel_data(p.sums, j), depth, block.cols, block.b_row, k0 > 0)
