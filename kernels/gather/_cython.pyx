"""Compiled gathers: rows of a data set by index into a batch in plain rows or column panels. Threads share the rows."""
include "../common/abi.pxi"

cdef extern from "gather/table.h" nogil:
    ctypedef struct fd_gather_table:
        void (*rows)(const char*, int64_t, int64_t, const int64_t*, char*, int64_t, int64_t, int64_t, int64_t, int64_t,
                     int64_t, int64_t) noexcept nogil
    const fd_gather_table* fd_gather_at(int level)

cdef const fd_gather_table* native = fd_gather_at(0)


# source "S,C", index "N" i8, out "N,C"
cdef void gather_rows(const fd_call* c, const fd_run* run, const fd_worker* w) noexcept nogil:
    cdef const fd_array* source = &c.a[0]
    cdef const fd_array* out = &c.a[2]
    cdef const int64_t* index = <const int64_t*>c.a[1].data
    cdef int64_t size = out.itemsize, pieces = 1, piece = out.cols * size, last = piece, pad = 0, a, b
    fd_share(run.rows, w.thread, w.threads, &a, &b)
    if out.cols == 0 or a == b:
        return
    if not (fd_is_plain(source) and fd_is_plain(out)):
        pieces, piece = fd_panels(out.cols), FD_PANEL * size
        last = fd_panel_cols(out.cols, pieces - 1) * size
        if not fd_is_plain(out):
            pad = piece - last
    native.rows(source.data, source.row_stride * size, source.panel_stride * size, index + a,
                out.data + a * out.row_stride * size, out.row_stride * size, out.panel_stride * size, b - a, pieces,
                piece, last, pad)


# source "S", index "N" i8, out "N": 8 bytes an element, or 4
cdef void gather_elements(const fd_call* c, const fd_run* run, const fd_worker* w) noexcept nogil:
    cdef const int64_t* index = <const int64_t*>c.a[1].data
    cdef int64_t a, b, i
    fd_share(run.rows, w.thread, w.threads, &a, &b)
    if c.a[0].itemsize == 8:
        for i in range(a, b):
            (<int64_t*>c.a[2].data)[i] = (<int64_t*>c.a[0].data)[index[i]]
    else:
        for i in range(a, b):
            (<int32_t*>c.a[2].data)[i] = (<int32_t*>c.a[0].data)[index[i]]


# index "N" i8
cdef void row_range(const fd_call* c, const fd_run* run, const fd_worker* w) noexcept nogil:
    cdef int64_t a, b, i
    fd_share(run.rows, w.thread, w.threads, &a, &b)
    for i in range(a, b):
        (<int64_t*>c.a[0].data)[i] = run.offset + i


cdef fd_kernel_info rows_info, elements_info, range_info
rows_info.run, elements_info.run, range_info.run = gather_rows, gather_elements, row_range


cdef object both(const fd_kernel_info* info):
    capsule = PyCapsule_New(<void*>info, FD_KERNEL_CAPSULE, NULL)
    return {"float32": capsule, "float64": capsule}


def kernels() -> dict:
    """The compiled kernels: op -> dtype -> capsule."""
    return {
        "gather_rows": both(&rows_info),
        "gather_labels": both(&elements_info),
        "gather_values": both(&elements_info),
        "row_range": both(&range_info),
    }


def select(int level):
    """Run at a SIMD level from now on."""
    global native
    native = fd_gather_at(level)
