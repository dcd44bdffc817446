"""Compiled random streams: Philox on arrays, the epoch's permutation, initial values. See README.md for the streams.

Each value depends on its own position alone, so that every share gives the same bits.
"""
include "../common/abi.pxi"

cdef extern from "random/table.h" nogil:
    ctypedef struct fd_random_table:
        void (*philox)(const uint32_t*, int64_t, const uint32_t*, uint32_t*, int64_t, int64_t) noexcept nogil
        void (*permute)(int64_t*, int64_t, int64_t, int64_t, uint64_t, uint32_t) noexcept nogil
    const fd_random_table* fd_random_at(int level)

cdef extern from "random/initial.h" nogil:
    int FD_UNIFORM, FD_NORMAL, FD_TRUNCATED_NORMAL
    double fd_uniform(uint32_t low, uint32_t high)
    double fd_initial_value(double u, int distribution, double a, double b)

cdef const fd_random_table* native = fd_random_at(0)

cdef int64_t PAIRS = 64  # counters drawn at once for initial values


# ------------------------------------------------------------------------------------------------ kernels
# counter "N,4" u4, key "2" u4, out "N,4" u4
cdef void philox4x32(const fd_call* c, const fd_run* run, const fd_worker* w) noexcept nogil:
    cdef int64_t a, b
    cdef const fd_array* counter = &c.a[0]
    cdef const fd_array* out = &c.a[2]
    fd_share(run.rows, w.thread, w.threads, &a, &b)
    native.philox(<const uint32_t*>counter.data + a * counter.row_stride, counter.row_stride,
                  <const uint32_t*>c.a[1].data, <uint32_t*>out.data + a * out.row_stride, out.row_stride, b - a)


# index "N" i8; n, seed | epoch, offset
cdef void epoch_indices(const fd_call* c, const fd_run* run, const fd_worker* w) noexcept nogil:
    cdef int64_t a, b
    fd_share(run.rows, w.thread, w.threads, &a, &b)
    native.permute(<int64_t*>c.a[0].data + a, run.offset + a, b - a, c.i[0], <uint64_t>c.i[1], run.epoch)


# out "P"; low, high or mean, std | seed, layer
cdef void fill(const fd_call* c, const fd_worker* w, int distribution) noexcept nogil:
    cdef int64_t total = (c.a[0].cols + 1) // 2, a, b, pair, k, e
    cdef uint32_t counter[64 * 4]
    cdef uint32_t key[2]
    cdef double value
    key[0], key[1] = <uint32_t>c.i[0], <uint32_t>(<uint64_t>c.i[0] >> 32)
    fd_share(total, w.thread, w.threads, &a, &b)
    while a < b:
        for k in range(min(PAIRS, b - a)):
            pair = a + k
            counter[4 * k], counter[4 * k + 1] = <uint32_t>pair, <uint32_t>(<uint64_t>pair >> 32)
            counter[4 * k + 2], counter[4 * k + 3] = <uint32_t>c.i[1], 0
        native.philox(counter, 4, key, counter, 4, min(PAIRS, b - a))
        for k in range(2 * min(PAIRS, b - a)):
            e = 2 * a + k
            if e < c.a[0].cols:
                value = fd_initial_value(fd_uniform(counter[2 * k], counter[2 * k + 1]), distribution, c.f[0], c.f[1])
                if c.a[0].itemsize == 4:
                    (<float*>c.a[0].data)[e] = <float>value
                else:
                    (<double*>c.a[0].data)[e] = value
        a += PAIRS


cdef void uniform(const fd_call* c, const fd_run* run, const fd_worker* w) noexcept nogil:
    fill(c, w, FD_UNIFORM)


cdef void normal(const fd_call* c, const fd_run* run, const fd_worker* w) noexcept nogil:
    fill(c, w, FD_NORMAL)


cdef void truncated_normal(const fd_call* c, const fd_run* run, const fd_worker* w) noexcept nogil:
    fill(c, w, FD_TRUNCATED_NORMAL)


# ------------------------------------------------------------------------------------------------ exports
cdef fd_kernel_info philox_info, epoch_info, uniform_info, normal_info, truncated_info
philox_info.run, epoch_info.run = philox4x32, epoch_indices
uniform_info.run, normal_info.run, truncated_info.run = uniform, normal, truncated_normal


cdef object both(const fd_kernel_info* info):
    capsule = PyCapsule_New(<void*>info, FD_KERNEL_CAPSULE, NULL)
    return {"float32": capsule, "float64": capsule}


def kernels() -> dict:
    """The compiled kernels: op -> dtype -> capsule."""
    return {
        "philox4x32": both(&philox_info),
        "epoch_indices": both(&epoch_info),
        "uniform": both(&uniform_info),
        "normal": both(&normal_info),
        "truncated_normal": both(&truncated_info),
    }


def select(int level):
    """Run at a SIMD level from now on."""
    global native
    native = fd_random_at(level)
