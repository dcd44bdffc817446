"""Losses on the Cython back end: blocks of 64 rows shared out to the team. Formulas: reference.py.

Each block leaves its sums in float64 in shared memory; when all are there, one thread adds them in order, so ``stats``
has the same bits for every number of threads. Gradients are row by row.
"""
include "../common/abi.pxi"

cdef extern from "losses/table.h" nogil:
    int FD_LOSS_ROWS
    int FD_SOFTMAX, FD_SOFTMAX_ONEHOT, FD_BINARY, FD_MSE

    ctypedef struct fd_matrix:
        void* data
        int64_t row, panel
        int padded

    ctypedef struct fd_loss_block:
        fd_matrix z, targets, dz
        const int64_t* labels
        const void* weight
        int64_t rows, cols
        double scale

    ctypedef struct fd_loss_sum:
        double loss, right

    ctypedef void (*fd_loss_function)(const fd_loss_block*, fd_loss_sum*) noexcept nogil

    ctypedef struct fd_loss_table:
        fd_loss_function block[4][2]
        double (**sum)(const void* x, int64_t n) noexcept nogil

    const fd_loss_table* fd_losses_at(int level)

cdef const fd_loss_table* table = fd_losses_at(0)


cdef inline fd_matrix matrix(const fd_array* a, int64_t row) noexcept nogil:
    """The array from a row on."""
    cdef fd_matrix m
    m.data = a.data + row * a.row_stride * a.itemsize if a.data != NULL else NULL
    m.row = a.row_stride
    m.panel = a.panel_stride
    m.padded = not fd_is_plain(a)
    return m


cdef inline void loss(const fd_call* c, const fd_run* run, const fd_worker* w, int kind) noexcept nogil:
    # arrays: z, targets, weight, stats, dz
    cdef const fd_array* z = &c.a[0]
    cdef const fd_array* weight = &c.a[2]
    cdef double* stats = <double*> c.a[3].data
    cdef fd_loss_sum* partial = <fd_loss_sum*> w.shared
    cdef int64_t rows = run.rows, blocks = (rows + FD_LOSS_ROWS - 1) // FD_LOSS_ROWS
    cdef int64_t columns = z.cols if kind == FD_BINARY or kind == FD_MSE else 1  # of the mean
    cdef int wide = z.itemsize == 8
    cdef fd_loss_block block
    cdef fd_loss_sum total
    cdef double count = rows, over, scale
    cdef int64_t a, b, k, row
    if weight.data != NULL:
        count = table.sum[wide](weight.data, rows)  # by every thread: cheaper than meeting for it
    over = count if run.total_rows == 0 or run.total_rows == rows else <double> run.total_rows
    scale = 1.0 / over if over != 0.0 else 0.0
    block.cols = z.cols
    block.scale = scale / columns
    block.labels = NULL
    fd_share(blocks, w.thread, w.threads, &a, &b)
    for k in range(a, b):
        row = k * FD_LOSS_ROWS
        block.rows = min(<int64_t> FD_LOSS_ROWS, rows - row)
        block.z = matrix(z, row)
        block.dz = matrix(&c.a[4], row)
        block.targets = matrix(&c.a[1], row)
        if kind == FD_SOFTMAX:
            block.labels = <const int64_t*> c.a[1].data + row
        block.weight = weight.data + row * weight.itemsize if weight.data != NULL else NULL
        table.block[kind][wide](&block, &partial[k])
    fd_barrier(w)
    if w.thread == 0:
        total.loss = total.right = 0.0
        for k in range(blocks):
            total.loss += partial[k].loss
            total.right += partial[k].right
        stats[0] = total.loss * scale / columns
        stats[1] = count
        stats[2] = total.right


cdef int64_t shared(const fd_call* c, int64_t rows) noexcept nogil:
    return (rows + FD_LOSS_ROWS - 1) // FD_LOSS_ROWS * <int64_t> sizeof(fd_loss_sum)


cdef void softmax_cross_entropy(const fd_call* c, const fd_run* run, const fd_worker* w) noexcept nogil:
    loss(c, run, w, FD_SOFTMAX)


cdef void softmax_cross_entropy_onehot(const fd_call* c, const fd_run* run, const fd_worker* w) noexcept nogil:
    loss(c, run, w, FD_SOFTMAX_ONEHOT)


cdef void binary_cross_entropy(const fd_call* c, const fd_run* run, const fd_worker* w) noexcept nogil:
    loss(c, run, w, FD_BINARY)


cdef void mse(const fd_call* c, const fd_run* run, const fd_worker* w) noexcept nogil:
    loss(c, run, w, FD_MSE)


cdef fd_kernel_info INFO[4]  # what is not set is NULL
INFO[0].run = softmax_cross_entropy
INFO[1].run = softmax_cross_entropy_onehot
INFO[2].run = binary_cross_entropy
INFO[3].run = mse


cdef object both(int k):
    """One kernel for both float types: it reads the item size."""
    INFO[k].shared = shared
    capsule = PyCapsule_New(&INFO[k], FD_KERNEL_CAPSULE, NULL)
    return {"float32": capsule, "float64": capsule}


_KERNELS = {
    "softmax_cross_entropy": both(0),
    "softmax_cross_entropy_onehot": both(1),
    "binary_cross_entropy": both(2),
    "mse": both(3),
}


def kernels() -> dict:
    """Native kernels: op -> dtype name -> capsule."""
    return _KERNELS


def select(int level):
    """Use the block functions of a SIMD level."""
    global table
    table = fd_losses_at(level)
