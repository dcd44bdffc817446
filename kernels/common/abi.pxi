# The declarations of abi.h and team.h for Cython; included by every family's _cython.pyx.
from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_IsValid, PyCapsule_New
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t

cdef extern from "abi.h" nogil:
    int FD_PANEL
    int FD_MAX_ARRAYS
    int FD_MAX_SCALARS
    const char* FD_KERNEL_CAPSULE  # a call: the same address each time

    ctypedef struct fd_array:
        char* data
        int64_t max_rows, cols, row_stride, col_stride, panel_stride, itemsize

    ctypedef struct fd_run:
        int64_t rows, first_row, total_rows, offset
        uint32_t step, epoch, update
        double lr, scale

    ctypedef struct fd_team

    ctypedef struct fd_worker:
        int thread, threads
        fd_team* team
        char* scratch
        char* shared

    ctypedef struct fd_call
    ctypedef void (*fd_kernel)(const fd_call*, const fd_run*, const fd_worker*) noexcept nogil
    ctypedef void (*fd_panel_kernel)(const fd_call*, const fd_run*, const fd_worker*, int64_t) noexcept nogil
    ctypedef int64_t (*fd_bytes)(const fd_call*, int64_t) noexcept nogil

    ctypedef struct fd_kernel_info:
        fd_kernel run
        fd_panel_kernel panel
        fd_bytes scratch
        fd_bytes shared
        const void* data

    ctypedef struct fd_call:
        const fd_kernel_info* info
        const fd_call* tail
        fd_array* a
        int64_t* i
        double* f
        int barrier
        int64_t behind

    void fd_share(int64_t count, int thread, int threads, int64_t* a, int64_t* b)
    int64_t fd_panels(int64_t cols)
    int64_t fd_panel_cols(int64_t cols, int64_t panel)
    char* fd_panel_data(const fd_array* a, int64_t panel)
    int fd_is_plain(const fd_array* a)
    void fd_run_tail(const fd_call* call, const fd_run* run, const fd_worker* w, int64_t panel)

cdef extern from "team.h" nogil:
    void fd_barrier(const fd_worker* w)
    int FD_MAX_THREADS
    unsigned fd_flush_denormals(int on)
    void fd_restore_denormals(unsigned before)
