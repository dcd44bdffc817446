"""Compiled dropout: the loops over panels and threads around native.hpp's rows.

Element-wise, so that every share of rows or panels gives the same bits. In panel layout all 32 columns of a panel are
written: the padding is zero before and after.
"""
include "../common/abi.pxi"

cdef extern from "dropout/table.h" nogil:
    ctypedef void (*fd_dropout_apply)(const void*, void*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                                      uint32_t, uint32_t, uint64_t, uint32_t, double) noexcept nogil
    ctypedef struct fd_dropout_table:
        fd_dropout_apply* apply
        void (*mask)(uint8_t*, int64_t, int64_t, int64_t, int64_t, int64_t, uint32_t, uint32_t, uint64_t,
                     uint32_t) noexcept nogil
    const fd_dropout_table* fd_dropout_at(int level)
    uint32_t fd_dropout_threshold(double rate)

cdef const fd_dropout_table* native = fd_dropout_at(0)

# Rows of one share: 64 rows x 32 columns are 1 us of work, and a multiple of the 4 rows that Philox draws at once.
cdef int64_t CHUNK = 64


# ------------------------------------------------------------------------------------------------ kernels
# x or dy "N,C", y or dx "N,C"; rate | seed, layer | step, first_row
cdef void rows_of_panel(const fd_call* c, const fd_run* run, int64_t panel, int64_t first, int64_t last) noexcept nogil:
    """Rows [first, last) of one panel; x and y may differ in layout."""
    cdef const fd_array* x = &c.a[0]
    cdef const fd_array* y = &c.a[1]
    cdef int64_t cols = fd_panel_cols(x.cols, panel), size = x.itemsize, r, k
    cdef bint padded = not fd_is_plain(y)
    cdef uint32_t kept = fd_dropout_threshold(c.f[0])
    cdef char* to = fd_panel_data(y, panel) + first * y.row_stride * size
    if padded and not fd_is_plain(x):
        cols = FD_PANEL
    native.apply[size == 8](fd_panel_data(x, panel) + first * x.row_stride * size, to, last - first, cols, x.row_stride,
                            y.row_stride, run.first_row + first, panel * FD_PANEL, <uint32_t>c.i[1], run.step,
                            <uint64_t>c.i[0], kept, 65536.0 / kept)
    if padded and cols < FD_PANEL:
        for r in range(last - first):
            for k in range(cols * size, FD_PANEL * size):
                to[r * y.row_stride * size + k] = 0


cdef void apply(const fd_call* c, const fd_run* run, const fd_worker* w) noexcept nogil:
    cdef const fd_array* x = &c.a[0]
    cdef const fd_array* y = &c.a[1]
    cdef int64_t chunks = (run.rows + CHUNK - 1) // CHUNK, panels = fd_panels(x.cols), size = x.itemsize, k, last
    cdef int64_t a, b
    cdef uint32_t kept = fd_dropout_threshold(c.f[0])
    if fd_is_plain(x) and fd_is_plain(y):  # whole rows: memory is read in order
        fd_share(chunks, w.thread, w.threads, &a, &b)
        a, b = a * CHUNK, min(b * CHUNK, run.rows)
        if a < b:
            native.apply[size == 8](x.data + a * x.row_stride * size, y.data + a * y.row_stride * size, b - a, x.cols,
                                    x.row_stride, y.row_stride, run.first_row + a, 0, <uint32_t>c.i[1], run.step,
                                    <uint64_t>c.i[0], kept, 65536.0 / kept)
        return
    fd_share(panels * chunks, w.thread, w.threads, &a, &b)
    for k in range(a, b):
        last = min((k % chunks + 1) * CHUNK, run.rows)
        rows_of_panel(c, run, k // chunks, k % chunks * CHUNK, last)


cdef void apply_panel(const fd_call* c, const fd_run* run, const fd_worker* w, int64_t panel) noexcept nogil:
    rows_of_panel(c, run, panel, 0, run.rows)


# mask "N,C" u1; rate | seed, layer | step, first_row
cdef void mask(const fd_call* c, const fd_run* run, const fd_worker* w) noexcept nogil:
    cdef const fd_array* m = &c.a[0]
    cdef int64_t a, b
    fd_share((run.rows + CHUNK - 1) // CHUNK, w.thread, w.threads, &a, &b)
    a, b = a * CHUNK, min(b * CHUNK, run.rows)
    if a < b:
        native.mask(<uint8_t*>m.data + a * m.row_stride, b - a, m.cols, m.row_stride, run.first_row + a, 0,
                    <uint32_t>c.i[1], run.step, <uint64_t>c.i[0], fd_dropout_threshold(c.f[0]))


# ------------------------------------------------------------------------------------------------ exports
cdef fd_kernel_info apply_info, mask_info
apply_info.run, apply_info.panel = apply, apply_panel
mask_info.run = mask


def kernels() -> dict:
    """The compiled kernels: op -> dtype -> capsule."""
    elementwise = PyCapsule_New(&apply_info, FD_KERNEL_CAPSULE, NULL)
    export = PyCapsule_New(&mask_info, FD_KERNEL_CAPSULE, NULL)
    return {
        "dropout_forward": {"float32": elementwise, "float64": elementwise},
        "dropout_backward": {"float32": elementwise, "float64": elementwise},
        "dropout_mask": {"float32": export, "float64": export},
    }


def select(int level):
    """Run at a SIMD level from now on."""
    global native
    native = fd_dropout_at(level)
