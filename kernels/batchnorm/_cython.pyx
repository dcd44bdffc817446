"""Compiled batch normalisation: which thread takes which columns, around the block functions of native.cpp.

A block is some columns of all rows and belongs to one thread, so results do not depend on the thread count. Inside
Programs a block is a panel, which stays in L1/L2 from the statistics to the last store; it may be the tail of a dense
product. Eager calls on plain rows take blocks of up to 2048 columns (FD_BATCHNORM_WIDTH): 32-column strips of 8 KB rows
touch a page per 128 bytes and took 1.5 (forward) and 1.7 times (backward) as long at (4096, 2048).
"""
from libc.string cimport memset, strcmp

include "../common/abi.pxi"

cdef extern from "dropout/table.h" nogil:
    uint32_t fd_dropout_threshold(double rate)

cdef extern from "batchnorm/table.h" nogil:
    int FD_BATCHNORM_WIDTH, FD_BATCHNORM_TILED
    int64_t FD_BATCHNORM_ROOM(int64_t cols, int64_t itemsize)

    ctypedef struct fd_activation:
        const char* name

    ctypedef struct fd_activation_table:
        int count
        const fd_activation* entry

    ctypedef struct fd_batchnorm_block:
        int64_t rows, cols
        const void* x
        const void* dy
        void* y
        void* dx
        int64_t x_stride, dy_stride, y_stride, dx_stride
        const void* gamma
        const void* beta
        const void* slope
        void* mean
        void* inv_std
        void* running_mean
        void* running_var
        void* dgamma
        void* dbeta
        void* dslope
        const void* bias
        void* folded
        double decay, eps, alpha
        const fd_activation* activation
        int relu, training, drop
        uint32_t layer, step, threshold
        uint64_t seed
        int64_t first_row, first_col
        char* room
        uint32_t* bits
        int panels, far

    ctypedef void (*fd_batchnorm_form)(const fd_batchnorm_block*) noexcept nogil
    ctypedef struct fd_batchnorm_table:
        fd_batchnorm_form* forward
        fd_batchnorm_form* inference
        fd_batchnorm_form* backward
        fd_batchnorm_form* fold
    const fd_batchnorm_table* fd_batchnorm_at(int level)

# Bytes of a plain output from which its stores go past the caches, as those of the activations do.
cdef int64_t FAR_BYTES = 16 << 20
cdef const fd_batchnorm_table* native = fd_batchnorm_at(0)
cdef const fd_activation_table* const* activations = NULL  # the activation module's table at the running level


# ------------------------------------------------------------------------------------------------ blocks
cdef void* columns(const fd_array* a, int64_t first) noexcept nogil:
    """Row 0 of an array at a column that is a multiple of 32; NULL for an absent one."""
    return NULL if a.data == NULL else <void*>fd_panel_data(a, first // FD_PANEL)


cdef int64_t most_columns(int64_t activation) noexcept nogil:
    """Columns of a block at most, for the activation of an op (-1 for none)."""
    if activation < 0 or strcmp(activations[0].entry[activation].name, b"relu") == 0:
        return FD_BATCHNORM_WIDTH
    return FD_BATCHNORM_TILED


cdef int64_t block_width(const fd_call* c, int arrays, int64_t most, int threads) noexcept nogil:
    """Columns of a block: a panel where one of the first so many arrays has panels.

    They do not enter any result, so they may depend on the number of threads. At least a panel, of no columns too: the
    blocks are counted by a division.
    """
    cdef int64_t share
    cdef int k
    for k in range(arrays):
        if c.a[k].data != NULL and not fd_is_plain(&c.a[k]):
            return FD_PANEL
    share = (c.a[0].cols + threads - 1) // threads
    return min(most, max(1, (share + FD_PANEL - 1) // FD_PANEL) * FD_PANEL)


cdef void set_activation(fd_batchnorm_block* k, int64_t index, double alpha) noexcept nogil:
    k.alpha = alpha
    if index >= 0:
        k.activation = &activations[0].entry[index]
        k.relu = strcmp(k.activation.name, b"relu") == 0


cdef inline bint is_panels(const fd_array* a) noexcept nogil:
    return a.row_stride == FD_PANEL and a.panel_stride != FD_PANEL


cdef inline int is_far(const fd_array* out, int64_t rows) noexcept nogil:
    return fd_is_plain(out) and rows * out.cols * out.itemsize >= FAR_BYTES


cdef void set_dropout(fd_batchnorm_block* k, const fd_run* run, double rate, int64_t seed, int64_t layer,
                      int64_t first) noexcept nogil:
    k.drop = rate > 0
    k.threshold = fd_dropout_threshold(rate)
    k.seed, k.layer, k.step = <uint64_t>seed, <uint32_t>layer, run.step
    k.first_row, k.first_col = run.first_row, first


# Columns of a block of the call at most: those of a panel unless all matrices are plain.
cdef int64_t widest(const fd_call* c) noexcept nogil:
    cdef int64_t most = FD_BATCHNORM_WIDTH if fd_is_plain(&c.a[0]) else FD_PANEL
    return min(most, (c.a[0].cols + FD_PANEL - 1) // FD_PANEL * FD_PANEL)


cdef int64_t room_of(const fd_call* c, int64_t rows) noexcept nogil:
    return FD_BATCHNORM_ROOM(widest(c), c.a[0].itemsize)


# Words of keep bits behind the room: 8 rows more than there are, because they are drawn for 8 rows at a time.
cdef int64_t room_and_bits(const fd_call* c, int64_t rows) noexcept nogil:
    return room_of(c, rows) + (rows + 8) * (widest(c) // FD_PANEL) * sizeof(uint32_t)


cdef void set_scratch(fd_batchnorm_block* k, const fd_worker* w, const fd_call* c) noexcept nogil:
    k.room, k.bits = w.scratch, <uint32_t*>(w.scratch + room_of(c, k.rows))


cdef void clear_padding(const fd_array* a, int64_t rows, int64_t first, int64_t cols) noexcept nogil:
    """Zero the columns of a panel that do not exist."""
    cdef int64_t r, size = a.itemsize
    cdef char* place
    if cols >= FD_PANEL or fd_is_plain(a):
        return
    place = fd_panel_data(a, first // FD_PANEL) + cols * size
    for r in range(rows):
        memset(place + r * a.row_stride * size, 0, (FD_PANEL - cols) * size)


# ------------------------------------------------------------------------------------------------ the ops on one block
# x, gamma, beta, running_mean, running_var, slope, y, mean, inv_std; decay, eps, alpha, rate | activation, seed, layer
cdef void forward_block(const fd_call* c, const fd_run* run, const fd_worker* w, int64_t first,
                        int64_t cols) noexcept nogil:
    cdef fd_batchnorm_block k
    memset(&k, 0, sizeof(k))
    k.rows, k.cols = run.rows, cols
    k.x, k.x_stride = columns(&c.a[0], first), c.a[0].row_stride
    k.panels = is_panels(&c.a[0]) and is_panels(&c.a[6])
    k.gamma, k.beta = columns(&c.a[1], first), columns(&c.a[2], first)
    k.running_mean, k.running_var = columns(&c.a[3], first), columns(&c.a[4], first)
    k.slope = columns(&c.a[5], first)
    k.y, k.y_stride = columns(&c.a[6], first), c.a[6].row_stride
    k.mean, k.inv_std = columns(&c.a[7], first), columns(&c.a[8], first)
    k.decay, k.eps = c.f[0], c.f[1]
    set_activation(&k, c.i[0], c.f[2])
    set_dropout(&k, run, c.f[3], c.i[1], c.i[2], first)
    set_scratch(&k, w, c)
    k.far = is_far(&c.a[6], run.rows)
    native.forward[c.a[0].itemsize == 8](&k)
    clear_padding(&c.a[6], run.rows, first, cols)


# x, gamma, beta, running_mean, running_var, slope, y; eps, alpha | activation
cdef void inference_block(const fd_call* c, const fd_run* run, const fd_worker* w, int64_t first,
                          int64_t cols) noexcept nogil:
    cdef fd_batchnorm_block k
    memset(&k, 0, sizeof(k))
    k.rows, k.cols = run.rows, cols
    k.x, k.x_stride = columns(&c.a[0], first), c.a[0].row_stride
    k.panels = is_panels(&c.a[0]) and is_panels(&c.a[6])
    k.gamma, k.beta = columns(&c.a[1], first), columns(&c.a[2], first)
    k.running_mean, k.running_var = columns(&c.a[3], first), columns(&c.a[4], first)
    k.slope = columns(&c.a[5], first)
    k.y, k.y_stride = columns(&c.a[6], first), c.a[6].row_stride
    k.eps = c.f[0]
    set_activation(&k, c.i[0], c.f[1])
    set_scratch(&k, w, c)
    k.far = is_far(&c.a[6], run.rows)
    native.inference[c.a[0].itemsize == 8](&k)
    clear_padding(&c.a[6], run.rows, first, cols)


# w, b, gamma, beta, running_mean, running_var, w_folded, b_folded; eps
cdef void fold_block(const fd_call* c, const fd_run* run, const fd_worker* w, int64_t first, int64_t cols) noexcept nogil:
    cdef fd_batchnorm_block k
    memset(&k, 0, sizeof(k))
    k.rows, k.cols = c.a[0].max_rows, cols
    k.x, k.x_stride = columns(&c.a[0], first), c.a[0].row_stride
    k.bias = columns(&c.a[1], first)
    k.gamma, k.beta = columns(&c.a[2], first), columns(&c.a[3], first)
    k.running_mean, k.running_var = columns(&c.a[4], first), columns(&c.a[5], first)
    k.y, k.y_stride = columns(&c.a[6], first), c.a[6].row_stride
    k.folded = columns(&c.a[7], first)
    k.eps = c.f[0]
    set_scratch(&k, w, c)
    native.fold[c.a[0].itemsize == 8](&k)
    clear_padding(&c.a[6], k.rows, first, cols)


# dy, x, gamma, beta, mean, inv_std, slope, y, dx, dgamma, dbeta, dslope; alpha, rate | activation, seed, layer, training
cdef void backward_block(const fd_call* c, const fd_run* run, const fd_worker* w, int64_t first,
                         int64_t cols) noexcept nogil:
    cdef fd_batchnorm_block k
    memset(&k, 0, sizeof(k))
    k.rows, k.cols = run.rows, cols
    k.dy, k.dy_stride = columns(&c.a[0], first), c.a[0].row_stride
    k.x, k.x_stride = columns(&c.a[1], first), c.a[1].row_stride
    k.gamma, k.beta = columns(&c.a[2], first), columns(&c.a[3], first)
    k.mean, k.inv_std = columns(&c.a[4], first), columns(&c.a[5], first)
    k.slope = columns(&c.a[6], first)
    k.y, k.y_stride = columns(&c.a[7], first), c.a[7].row_stride
    k.dx, k.dx_stride = columns(&c.a[8], first), c.a[8].row_stride
    k.panels = is_panels(&c.a[0]) and is_panels(&c.a[1]) and is_panels(&c.a[8]) and (
        c.a[7].data == NULL or is_panels(&c.a[7]))
    k.dgamma, k.dbeta = columns(&c.a[9], first), columns(&c.a[10], first)
    k.dslope = columns(&c.a[11], first)
    k.training = c.i[3] != 0
    set_activation(&k, c.i[0], c.f[0])
    set_dropout(&k, run, c.f[1], c.i[1], c.i[2], first)
    set_scratch(&k, w, c)
    k.far = is_far(&c.a[8], run.rows)
    native.backward[c.a[0].itemsize == 8](&k)
    clear_padding(&c.a[8], run.rows, first, cols)


# ------------------------------------------------------------------------------------------------ whole calls, panels
ctypedef void (*block_form)(const fd_call*, const fd_run*, const fd_worker*, int64_t, int64_t) noexcept nogil

cdef void each_block(const fd_call* c, const fd_run* run, const fd_worker* w, block_form form,
                     int64_t width) noexcept nogil:
    cdef int64_t cols = c.a[0].cols, j, a, b
    fd_share((cols + width - 1) // width, w.thread, w.threads, &a, &b)
    for j in range(a, b):
        form(c, run, w, j * width, min(width, cols - j * width))


cdef void forward(const fd_call* c, const fd_run* run, const fd_worker* w) noexcept nogil:
    each_block(c, run, w, forward_block, block_width(c, 9, most_columns(c.i[0]), w.threads))

cdef void inference(const fd_call* c, const fd_run* run, const fd_worker* w) noexcept nogil:
    each_block(c, run, w, inference_block, block_width(c, 7, most_columns(c.i[0]), w.threads))

cdef void fold(const fd_call* c, const fd_run* run, const fd_worker* w) noexcept nogil:
    each_block(c, run, w, fold_block, block_width(c, 8, FD_BATCHNORM_WIDTH, w.threads))

cdef void backward(const fd_call* c, const fd_run* run, const fd_worker* w) noexcept nogil:
    each_block(c, run, w, backward_block, block_width(c, 12, most_columns(c.i[0]), w.threads))

cdef void forward_panel(const fd_call* c, const fd_run* run, const fd_worker* w, int64_t panel) noexcept nogil:
    forward_block(c, run, w, panel * FD_PANEL, fd_panel_cols(c.a[0].cols, panel))

cdef void inference_panel(const fd_call* c, const fd_run* run, const fd_worker* w, int64_t panel) noexcept nogil:
    inference_block(c, run, w, panel * FD_PANEL, fd_panel_cols(c.a[0].cols, panel))

cdef void backward_panel(const fd_call* c, const fd_run* run, const fd_worker* w, int64_t panel) noexcept nogil:
    backward_block(c, run, w, panel * FD_PANEL, fd_panel_cols(c.a[0].cols, panel))


# ------------------------------------------------------------------------------------------------ exports
cdef fd_kernel_info forward_info, inference_info, fold_info, backward_info
forward_info.run, forward_info.panel, forward_info.scratch = forward, forward_panel, room_and_bits
inference_info.run, inference_info.panel, inference_info.scratch = inference, inference_panel, room_of
fold_info.run, fold_info.scratch = fold, room_of
backward_info.run, backward_info.panel, backward_info.scratch = backward, backward_panel, room_and_bits


cdef dict export(fd_kernel_info* info):
    capsule = PyCapsule_New(info, FD_KERNEL_CAPSULE, NULL)
    return {"float32": capsule, "float64": capsule}


def kernels() -> dict:
    """The compiled kernels: op -> dtype -> capsule."""
    return {
        "batchnorm_forward": export(&forward_info),
        "batchnorm_inference": export(&inference_info),
        "batchnorm_fold": export(&fold_info),
        "batchnorm_backward": export(&backward_info),
    }


def select(int level):
    """Run at a SIMD level from now on."""
    global native, activations
    from fastdl.kernels.activations import _cython as act

    act.select(level)  # this family may be loaded without the dispatcher having met that one
    activations = <const fd_activation_table* const*>PyCapsule_GetPointer(act.table(sizeof(fd_activation)), "fastdl.activations")
    native = fd_batchnorm_at(level)
