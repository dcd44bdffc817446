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
        void (*columns)(const float*, uint32_t*, int64_t, int64_t, int64_t) noexcept nogil
        void (*pairs)(const float*, uint32_t*, int64_t, int64_t, int64_t) noexcept nogil
        void (*transposed)(const float*, uint32_t*, int64_t, int64_t, int64_t) noexcept nogil
        void (*begin)() noexcept nogil
        void (*end)() noexcept nogil
        int tiles

    const fd_dense_table* fd_dense_at(int level)
    const fd_dense_pairs* fd_dense_bfloat16(int unit)

cdef extern from "cpu.h" nogil:
    int FD_AVX512_BF16, FD_AMX
    int fd_has_bfloat16(int unit)

cdef extern from "activations/table.h" nogil:
    ctypedef struct fd_activation:
        void (**forward)(const void*, void*, int64_t, int64_t, int64_t, int64_t, double, const void*) noexcept nogil

    ctypedef struct fd_activation_table:
        const fd_activation* entry

ctypedef void (*block_product)(const fd_dense_block*) noexcept nogil

cdef int64_t ACTIVATION_ROWS = 112  # rows of a panel that go through the activation while they are in L1
cdef const fd_dense_table* table = fd_dense_at(0)
cdef const fd_dense_pairs* half = NULL  # what multiplies bfloat16, if anything does
cdef int running_level = 0
cdef const fd_activation_table* const* activations = NULL
cdef int64_t IDENTITY = -1
cdef int64_t RELU = -2


include "operands.pxi"


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


cdef inline void rows_of_panel(const Product* p, fd_dense_block* block, block_product product, const char* a_block,
                               int64_t r0, int64_t rows, int64_t j, bint last, bint by_table) noexcept nogil:
    """Rows r0.. of panel j of the output, or of `block.panels` panels: the product, the epilogue, the activation."""
    cdef const fd_array* to = p.z if by_table and p.z.data != NULL else p.out
    cdef int64_t size = to.itemsize, items = block.k, part = ACTIVATION_ROWS if last and by_table else max(1, rows)
    cdef int64_t r = 0, q
    cdef int t = size == 8
    cdef bint add = block.add, with_z = last and not by_table and p.z != NULL and p.z.data != NULL, thin = by_dots(p)
    block.c_row, block.c_panel = to.row_stride, to.panel_stride
    block.padded = to.panel_stride != 32 and (not with_z or p.z.panel_stride != 32)
    block.bias = fd_panel_data(p.bias, j) if last and p.bias != NULL and p.bias.data != NULL else NULL
    block.relu = last and p.activation == RELU
    while r < rows:
        block.rows = min(part, rows - r)
        block.a = a_block + r * block.a_row * size
        block.c = at(to, r0 + r, 32 * j)
        block.z = NULL
        if with_z:
            block.z, block.z_row, block.z_panel = at(p.z, r0 + r, 32 * j), p.z.row_stride, p.z.panel_stride
        if thin:
            table.dots[t](block)
            block.k, block.add = 0, True  # what is left of the product: the epilogue
        product(block)
        block.k, block.add = items, add
        if last and by_table:
            for q in range(j, j + block.panels):
                activations[0].entry[p.activation].forward[t](
                    at(to, r0 + r, 32 * q), at(p.out, r0 + r, 32 * q), block.rows, block.cols, to.row_stride,
                    p.out.row_stride, p.alpha, NULL)
        r += part


cdef void multiply(const Product* p, const fd_call* call, const fd_run* run, const fd_worker* w) noexcept nogil:
    """This thread's share of the output: blocks of A's rows, of K, and all panels of B past each."""
    cdef fd_dense_block block
    cdef int64_t mb, kb, r0, k0, depth, j, q, rows
    cdef int64_t row_share[2]
    cdef int64_t panel_share[2]
    cdef bint last, by_table = p.activation != IDENTITY and p.activation != RELU
    cdef block_product product = table.product_t[p.out.itemsize == 8] if p.ta else table.product[p.out.itemsize == 8]
    cdef const char* a_block
    if p.half:
        product = half.product_t if p.ta else half.product
    share(p, w, call.tail != NULL, row_share, panel_share)
    if panel_share[0] == panel_share[1] or (row_share[0] == row_share[1] and p.m):
        return
    if p.half:
        half.begin()
    blocks(p, &mb, &kb)
    cdef bint few = panel_share[1] - panel_share[0] < PACK_A_PANELS or p.m <= WIDE_ROWS
    cdef char* b_scratch = w.scratch + (0 if a_is_panels(p) else mb * kb * p.out.itemsize)
    cdef bint own_sums = p.sums != NULL and p.sums.data != NULL and (row_share[0] == 0)
    r0 = row_share[0]
    while True:
        rows = min(mb, row_share[1] - r0)
        k0 = 0
        while True:
            depth = min(kb, p.k - k0)
            last = k0 + kb >= p.k
            block.k = (depth + 1) // 2 if p.half else depth  # steps of the product
            block.add = k0 > 0
            a_block = block_of_a(p, &block, w.scratch, r0, rows, k0, depth, few)
            j = panel_share[0]
            while j < panel_share[1]:
                block.cols = fd_panel_cols(p.n, j)
                panel_of_b(p, &block, b_scratch, k0, j, rows)
                block.panels = 1
                if not p.ta and rows <= WIDE_ROWS and block.b != b_scratch and not by_dots(p):
                    block.panels = wide_of(rows, min(panel_share[1], p.n // 32) - j)
                if own_sums and r0 == row_share[0]:
                    sums_of_b(p, &block, k0, depth, j)
                rows_of_panel(p, &block, product, a_block, r0, rows, j, last, by_table)
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
    if p.half:
        half.end()


# ---------------------------------------------------------------------------------------------- the three ops
cdef Product forward_of(const fd_call* c, int64_t rows, bint in_half) noexcept nogil:
    cdef Product p
    p.half = in_half
    p.a, p.b, p.bias, p.out, p.z, p.sums = &c.a[0], &c.a[1], &c.a[2], &c.a[3], &c.a[4], NULL
    p.ta, p.tb = False, False
    p.m, p.k, p.n = rows, c.a[1].max_rows, c.a[1].cols
    p.activation, p.alpha = c.i[0], c.f[0]
    return p


cdef Product backward_input_of(const fd_call* c, int64_t rows, bint in_half) noexcept nogil:
    cdef Product p
    p.half = in_half
    p.a, p.b, p.bias, p.out, p.z, p.sums = &c.a[0], &c.a[1], NULL, &c.a[2], NULL, NULL
    p.ta, p.tb = False, True
    p.m, p.k, p.n = rows, c.a[1].cols, c.a[1].max_rows
    p.activation, p.alpha = IDENTITY, 0
    return p


cdef Product backward_weights_of(const fd_call* c, int64_t rows, bint in_half) noexcept nogil:
    cdef Product p
    p.half = in_half
    p.a, p.b, p.bias, p.out, p.z, p.sums = &c.a[0], &c.a[1], NULL, &c.a[2], NULL, &c.a[3]
    p.ta, p.tb = True, False
    p.m, p.k, p.n = c.a[2].max_rows, rows, c.a[2].cols
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
_half_forward.data = _half_backward_input.data = _half_backward_weights.data = &half


cdef dict _kinds(fd_kernel_info* info, fd_kernel_info* mixed):
    found = dict.fromkeys(("float32", "float64"), PyCapsule_New(info, FD_KERNEL_CAPSULE, NULL))
    if half != NULL:
        found["mixed_bfloat16"] = PyCapsule_New(mixed, FD_KERNEL_CAPSULE, NULL)
    return found


_UNITS = {"amx": FD_AMX, "avx512_bf16": FD_AVX512_BF16}  # fastest first


def bfloat16_units() -> list:
    """What can multiply bfloat16 on this machine, fastest first."""
    return [name for name, unit in _UNITS.items() if fd_has_bfloat16(unit)]


def bfloat16_unit():
    """What multiplies bfloat16, or None."""
    return next((name for name, unit in _UNITS.items() if half != NULL and half == fd_dense_bfloat16(unit)), None)


def use_bfloat16(str name, *, bint ask=True) -> None:
    """Multiply bfloat16 on a unit from now on; before the first Program, whose scratch depends on it.

    Parameters
    ----------
    name : {"amx", "avx512_bf16"}
    ask : bool
        False takes the unit without asking the CPU: for tests that trap its instructions.
    """
    global half
    if ask and name not in bfloat16_units():
        expected = " or ".join(bfloat16_units()) or "nothing: this CPU has neither"
        raise ValueError(f"FASTDL_BFLOAT16={name!r} cannot run here, expected {expected}")
    half = fd_dense_bfloat16(_UNITS[name])


def _first_choice():
    import os

    name = os.environ.get("FASTDL_BFLOAT16") or next(iter(bfloat16_units()), None)
    if name is not None:
        use_bfloat16(name)


_first_choice()


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
    activations = <const fd_activation_table* const*>PyCapsule_GetPointer(act.table(sizeof(fd_activation)), "fastdl.activations")
    RELU = act.index("relu")

