"""Optimisers on the Cython back end: blocks of a flat arena shared out to the team. Formulas and papers: reference.py.

Updates are element-wise, so any split gives the same bits. The squared norm adds fixed blocks of 4096 values, each to
its own float64, and one thread adds those in order.
"""
include "../common/abi.pxi"

from libc.math cimport pow, sqrt

cdef extern from "optimizers/table.h" nogil:
    ctypedef struct fd_sgd:
        double scale, l2, keep, momentum, rate
        int nesterov

    ctypedef struct fd_adam:
        double scale, l2, keep, beta1, gain1, beta2, gain2, root, rate, eps

    ctypedef struct fd_optimizer_table:
        void (**sgd)(void* w, const void* g, void* v, int64_t n, const fd_sgd* step) noexcept nogil
        void (**adam)(void* w, const void* g, void* m, void* v, int64_t n, const fd_adam* step) noexcept nogil
        double (**squared_norm)(const void* g, int64_t n) noexcept nogil

    const fd_optimizer_table* fd_optimizers_at(int level)

# 4 KiB of float32 per array and block: small enough that two threads share a net of a few thousand weights evenly.
cdef enum:
    SWEEP_BLOCK = 1024
    NORM_BLOCK = 4096

cdef const fd_optimizer_table* table = fd_optimizers_at(0)


cdef inline void share(const fd_worker* w, int64_t n, int64_t* start, int64_t* count) noexcept nogil:
    """This thread's values of n, whole blocks."""
    cdef int64_t a, b
    fd_share((n + SWEEP_BLOCK - 1) // SWEEP_BLOCK, w.thread, w.threads, &a, &b)
    start[0] = a * SWEEP_BLOCK
    count[0] = min(b * SWEEP_BLOCK, n) - start[0]


cdef inline char* at(const fd_array* a, int64_t start) noexcept nogil:
    return a.data + start * a.itemsize if a.data != NULL else NULL


cdef inline double factor(const fd_array* clip, const fd_run* run) noexcept nogil:
    """Of the gradient: clipping, and the run's own."""
    return run.scale * (<double*> clip.data)[0] if clip.data != NULL else run.scale


cdef void sgd_step(const fd_call* c, const fd_run* run, const fd_worker* w) noexcept nogil:
    cdef fd_sgd s  # f: momentum, l2, weight_decay, lr_factor
    cdef int64_t start, count
    s.momentum = c.f[0]
    s.nesterov = c.i[0] != 0
    s.l2 = c.f[1]
    s.rate = run.lr * c.f[3]
    s.keep = 1.0 - s.rate * c.f[2]
    s.scale = factor(&c.a[3], run)
    share(w, c.a[0].cols, &start, &count)
    if count > 0:
        table.sgd[c.a[0].itemsize == 8](at(&c.a[0], start), at(&c.a[1], start), at(&c.a[2], start), count, &s)


cdef void adam_step(const fd_call* c, const fd_run* run, const fd_worker* w) noexcept nogil:
    cdef fd_adam s  # f: beta1, beta2, eps, l2, weight_decay, lr_factor
    cdef double t = run.update + 1.0, lr = run.lr * c.f[5]
    cdef int64_t start, count
    s.beta1 = c.f[0]
    s.gain1 = 1.0 - s.beta1
    s.beta2 = c.f[1]
    s.gain2 = 1.0 - s.beta2
    s.eps = c.f[2]
    s.l2 = c.f[3]
    s.keep = 1.0 - lr * c.f[4]
    s.root = 1.0 / sqrt(1.0 - pow(s.beta2, t))
    s.rate = lr / (1.0 - pow(s.beta1, t))
    s.scale = factor(&c.a[4], run)
    share(w, c.a[0].cols, &start, &count)
    if count > 0:
        table.adam[c.a[0].itemsize == 8](
            at(&c.a[0], start), at(&c.a[1], start), at(&c.a[2], start), at(&c.a[3], start), count, &s
        )


cdef void squared_norm(const fd_call* c, const fd_run* run, const fd_worker* w) noexcept nogil:
    cdef const fd_array* g = &c.a[0]
    cdef int64_t n = g.cols, blocks = (n + NORM_BLOCK - 1) // NORM_BLOCK, a, b, k
    cdef double* partial = <double*> w.shared
    cdef double total = 0.0
    fd_share(blocks, w.thread, w.threads, &a, &b)
    for k in range(a, b):
        partial[k] = table.squared_norm[g.itemsize == 8](
            at(g, k * NORM_BLOCK), min(<int64_t> NORM_BLOCK, n - k * NORM_BLOCK)
        )
    fd_barrier(w)
    if w.thread == 0:
        for k in range(blocks):
            total += partial[k]
        (<double*> c.a[1].data)[0] += total * (run.scale * run.scale)


cdef int64_t norm_shared(const fd_call* c, int64_t rows) noexcept nogil:
    return (c.a[0].cols + NORM_BLOCK - 1) // NORM_BLOCK * 8


cdef void clip_scale(const fd_call* c, const fd_run* run, const fd_worker* w) noexcept nogil:
    cdef double ratio
    cdef double* total = <double*> c.a[0].data
    if w.thread == 0:
        ratio = c.f[0] / sqrt(total[0])
        total[0] = 0.0  # used up: the next step adds from 0
        (<double*> c.a[1].data)[0] = 1.0 if ratio >= 1.0 else ratio  # a NaN ratio stays


cdef fd_kernel_info INFO[4]  # what is not set is NULL
INFO[0].run = sgd_step
INFO[1].run = adam_step
INFO[2].run = squared_norm
INFO[2].shared = norm_shared
INFO[3].run = clip_scale


cdef object both(int k):
    """One kernel for both float types: it reads the item size."""
    capsule = PyCapsule_New(&INFO[k], FD_KERNEL_CAPSULE, NULL)
    return {"float32": capsule, "float64": capsule}


_KERNELS = {"sgd_step": both(0), "adam_step": both(1), "squared_norm": both(2), "clip_scale": both(3)}


def kernels() -> dict:
    """Native kernels: op -> dtype name -> capsule."""
    return _KERNELS


def select(int level):
    """Use the block functions of a SIMD level."""
    global table
    table = fd_optimizers_at(level)
