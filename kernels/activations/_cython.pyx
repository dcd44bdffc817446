"""The element-wise kernels of the activation table, softmax over rows, and the table itself for other families.

Nothing here knows an activation by name: ``kernels()`` makes a forward and a backward kernel of every entry of the table
(``FD_ACTIVATIONS`` in points.hpp). How the work is cut:

    plain arrays      blocks of rows; one run of elements where rows are adjacent
    a panel layout    panels of 32 columns (also where x is plain and y is not: identity is the layout conversion)
    per-column slope  panels always, so that one thread sums a column, in the order of the rows

Every element is computed by the same operations wherever a cut falls and every sum has one order, so the bits are the same
for every number of threads.
"""

include "../common/abi.pxi"

cdef extern from "activations/table.h" nogil:
    ctypedef void (*fd_forward_block)(const void*, void*, int64_t, int64_t, int64_t, int64_t, double,
                                      const void*) noexcept
    ctypedef void (*fd_backward_block)(const void*, const void*, void*, int64_t, int64_t, int64_t, int64_t, int64_t, double,
                                       const void*, void*) noexcept
    ctypedef struct fd_activation:
        const char* name
        int saves_output
        fd_forward_block* forward
        fd_backward_block* backward
        int per_column
    ctypedef struct fd_activation_table:
        int count
        const fd_activation* entry

    ctypedef void (*fd_copy_block)(const void*, void*, int64_t, int64_t, int64_t, int64_t) noexcept
    ctypedef void (*fd_softmax_forward_block)(const void*, void*, int64_t, int64_t, int64_t, const int64_t*,
                                              const int64_t*) noexcept
    ctypedef void (*fd_softmax_backward_block)(const void*, const void*, void*, int64_t, int64_t, int64_t, const int64_t*,
                                               const int64_t*) noexcept
    ctypedef void (*fd_array_function)(const void*, void*, int64_t) noexcept
    ctypedef struct fd_function:
        const char* name
        fd_array_function* run
    ctypedef struct fd_row_table:
        fd_copy_block* copy
        fd_softmax_forward_block* softmax_forward
        fd_softmax_backward_block* softmax_backward
        int functions
        const fd_function* function

    const fd_activation_table* fd_activations_at(int level)
    const fd_row_table* fd_row_ops_at(int level)

cdef enum:
    MOST = 64         # entries of the table
    BLOCK = 2048      # elements of a thread's share are multiples of this where rows are adjacent: 8 or 16 KiB

cdef const fd_activation_table* activations = fd_activations_at(0)
cdef const fd_row_table* row_ops = fd_row_ops_at(0)
cdef fd_kernel_info forward_info[MOST]
cdef fd_kernel_info backward_info[MOST]
cdef int64_t entry_index[MOST]


def select(int level):
    """Use the functions of a SIMD level (0 portable, 1 AVX2, 2 AVX-512)."""
    global activations, row_ops
    activations = fd_activations_at(level)
    row_ops = fd_row_ops_at(level)


def table(size_t entry):
    """Capsule "fastdl.activations": address of the pointer to the running level's ``fd_activation_table``.

    ``entry`` is the caller's sizeof(fd_activation): it reads entries where its own table.h has them.
    """
    if entry != sizeof(fd_activation):
        raise ImportError(
            "the activations were built against another activations/table.h than their user; rebuild everything: "
            "pip install -e ."
        )
    return PyCapsule_New(<void*>&activations, "fastdl.activations", NULL)


def names():
    """Names in the order of the table."""
    return tuple((<bytes>activations.entry[i].name).decode() for i in range(activations.count))


def index(name):
    """Position of an activation in the table; -1 for "identity" and None."""
    if name is None or name == "identity":
        return -1
    known = names()
    if name not in known:
        raise ValueError(f"unknown activation {name!r}, known: identity, {', '.join(known)}")
    return known.index(name)


def saves_output(name):
    """Whether the backward kernel of an activation reads y (else x)."""
    return bool(activations.entry[index(name)].saves_output)


# ------------------------------------------------------------------------------------------------ how arrays are cut
cdef inline bint is_run(const fd_array* a) noexcept nogil:
    """All elements stand in one run."""
    return fd_is_plain(a) and a.row_stride == a.cols


cdef inline void* element(const fd_array* a, int64_t at) noexcept nogil:
    return a.data + at * a.itemsize


cdef inline void share_run(int64_t count, const fd_worker* w, int64_t* first, int64_t* n) noexcept nogil:
    """The thread's elements of a run of `count`."""
    cdef int64_t a, b
    fd_share((count + BLOCK - 1) // BLOCK, w.thread, w.threads, &a, &b)
    a *= BLOCK
    b *= BLOCK
    if b > count:
        b = count
    first[0] = a
    n[0] = b - a if b > a else 0


# ------------------------------------------------------------------------------------------------ element-wise kernels
cdef inline const fd_activation* entry_of(const fd_call* c) noexcept nogil:
    return &activations.entry[(<const int64_t*>c.info.data)[0]]


cdef void forward_panel(const fd_call* c, const fd_run* run, const fd_worker* w, int64_t panel) noexcept nogil:
    cdef const fd_activation* f = entry_of(c)
    cdef const fd_array *x = &c.a[0]
    cdef const fd_array *y = &c.a[1 + f.per_column]
    cdef const void* slope = fd_panel_data(&c.a[1], panel) if f.per_column else NULL
    f.forward[x.itemsize == 8](fd_panel_data(x, panel), fd_panel_data(y, panel), run.rows, fd_panel_cols(x.cols, panel),
                               x.row_stride, y.row_stride, c.f[0], slope)


cdef void forward_run(const fd_call* c, const fd_run* run, const fd_worker* w) noexcept nogil:
    cdef const fd_activation* f = entry_of(c)
    cdef const fd_array *x = &c.a[0]
    cdef const fd_array *y = &c.a[1 + f.per_column]
    cdef const void* slope = c.a[1].data if f.per_column else NULL
    cdef fd_forward_block block = f.forward[x.itemsize == 8]
    cdef int64_t a, b, n
    if is_run(x) and is_run(y) and not f.per_column:
        share_run(run.rows * x.cols, w, &a, &n)
        block(element(x, a), element(y, a), 1, n, n, n, c.f[0], NULL)
    elif fd_is_plain(x) and fd_is_plain(y):
        fd_share(run.rows, w.thread, w.threads, &a, &b)
        block(element(x, a * x.row_stride), element(y, a * y.row_stride), b - a, x.cols, x.row_stride, y.row_stride, c.f[0],
              slope)
    else:
        fd_share(fd_panels(x.cols), w.thread, w.threads, &a, &b)
        for n in range(a, b):
            forward_panel(c, run, w, n)


# dy, s, dx; with a slope: dy, x, slope, dx, dslope
cdef void backward_panel(const fd_call* c, const fd_run* run, const fd_worker* w, int64_t panel) noexcept nogil:
    cdef const fd_activation* f = entry_of(c)
    cdef const fd_array *dy = &c.a[0]
    cdef const fd_array *s = &c.a[1]
    cdef const fd_array *dx = &c.a[2 + f.per_column]
    cdef const void* slope = NULL
    cdef char* dslope = NULL
    cdef int64_t k, cols = fd_panel_cols(dy.cols, panel)
    if f.per_column:
        slope = fd_panel_data(&c.a[2], panel)
        dslope = fd_panel_data(&c.a[4], panel)
        for k in range(cols * dy.itemsize):
            dslope[k] = 0
    f.backward[dy.itemsize == 8](fd_panel_data(dy, panel), fd_panel_data(s, panel), fd_panel_data(dx, panel), run.rows, cols,
                                 dy.row_stride, s.row_stride, dx.row_stride, c.f[0], slope, dslope)


cdef void backward_run(const fd_call* c, const fd_run* run, const fd_worker* w) noexcept nogil:
    cdef const fd_activation* f = entry_of(c)
    cdef const fd_array *dy = &c.a[0]
    cdef const fd_array *s = &c.a[1]
    cdef const fd_array *dx = &c.a[2 + f.per_column]
    cdef fd_backward_block block = f.backward[dy.itemsize == 8]
    cdef bint plain = fd_is_plain(dy) and fd_is_plain(s) and fd_is_plain(dx)
    cdef int64_t a, b, n, cols
    cdef char* dslope
    if f.per_column and plain:
        # a stripe of panels a thread, all of them in one call, so that memory is walked along rows
        fd_share(fd_panels(dy.cols), w.thread, w.threads, &a, &b)
        a *= FD_PANEL
        cols = (b * FD_PANEL if b * FD_PANEL < dy.cols else dy.cols) - a
        if cols > 0:
            dslope = <char*>element(&c.a[4], a)
            for n in range(cols * dy.itemsize):
                dslope[n] = 0
            block(element(dy, a), element(s, a), element(dx, a), run.rows, cols, dy.row_stride, s.row_stride, dx.row_stride,
                  c.f[0], element(&c.a[2], a), dslope)
    elif is_run(dy) and is_run(s) and is_run(dx) and not f.per_column:
        share_run(run.rows * dy.cols, w, &a, &n)
        block(element(dy, a), element(s, a), element(dx, a), 1, n, n, n, n, c.f[0], NULL, NULL)
    elif plain:
        fd_share(run.rows, w.thread, w.threads, &a, &b)
        block(element(dy, a * dy.row_stride), element(s, a * s.row_stride), element(dx, a * dx.row_stride), b - a, dy.cols,
              dy.row_stride, s.row_stride, dx.row_stride, c.f[0], NULL, NULL)
    else:
        fd_share(fd_panels(dy.cols), w.thread, w.threads, &a, &b)
        for n in range(a, b):
            backward_panel(c, run, w, n)


# identity_forward(x, y) and identity_backward(dy, y, dx): a copy between any two layouts, to the array at info.data
cdef inline const fd_array* target_of(const fd_call* c) noexcept nogil:
    return &c.a[(<const int64_t*>c.info.data)[0]]


cdef void copy_panel(const fd_call* c, const fd_run* run, const fd_worker* w, int64_t panel) noexcept nogil:
    cdef const fd_array *x = &c.a[0]
    cdef const fd_array *y = target_of(c)
    row_ops.copy[x.itemsize == 8](fd_panel_data(x, panel), fd_panel_data(y, panel), run.rows, fd_panel_cols(x.cols, panel),
                                  x.row_stride, y.row_stride)


cdef void copy_run(const fd_call* c, const fd_run* run, const fd_worker* w) noexcept nogil:
    cdef const fd_array *x = &c.a[0]
    cdef const fd_array *y = target_of(c)
    cdef int64_t a, b, n
    if is_run(x) and is_run(y):
        share_run(run.rows * x.cols, w, &a, &n)
        row_ops.copy[x.itemsize == 8](element(x, a), element(y, a), 1, n, n, n)
    elif fd_is_plain(x) and fd_is_plain(y):
        fd_share(run.rows, w.thread, w.threads, &a, &b)
        row_ops.copy[x.itemsize == 8](element(x, a * x.row_stride), element(y, a * y.row_stride), b - a, x.cols,
                                      x.row_stride, y.row_stride)
    else:
        fd_share(fd_panels(x.cols), w.thread, w.threads, &a, &b)
        for n in range(a, b):
            copy_panel(c, run, w, n)


# ------------------------------------------------------------------------------------------------ softmax
cdef inline int64_t segment(const fd_array* a, int64_t width) noexcept nogil:
    return width if fd_is_plain(a) else FD_PANEL


cdef void softmax_forward_run(const fd_call* c, const fd_run* run, const fd_worker* w) noexcept nogil:
    cdef int64_t a, b, k, width = c.a[0].cols
    cdef int64_t row_stride[2]
    cdef int64_t panel_stride[2]
    for k in range(2):
        width = segment(&c.a[k], width)
        row_stride[k] = c.a[k].row_stride
        panel_stride[k] = c.a[k].panel_stride
    fd_share(run.rows, w.thread, w.threads, &a, &b)
    row_ops.softmax_forward[c.a[0].itemsize == 8](element(&c.a[0], a * row_stride[0]), element(&c.a[1], a * row_stride[1]),
                                                  b - a, c.a[0].cols, width, row_stride, panel_stride)


cdef void softmax_backward_run(const fd_call* c, const fd_run* run, const fd_worker* w) noexcept nogil:
    cdef int64_t a, b, k, width = c.a[0].cols
    cdef int64_t row_stride[3]
    cdef int64_t panel_stride[3]
    for k in range(3):
        width = segment(&c.a[k], width)
        row_stride[k] = c.a[k].row_stride
        panel_stride[k] = c.a[k].panel_stride
    fd_share(run.rows, w.thread, w.threads, &a, &b)
    row_ops.softmax_backward[c.a[0].itemsize == 8](element(&c.a[0], a * row_stride[0]), element(&c.a[1], a * row_stride[1]),
                                                   element(&c.a[2], a * row_stride[2]), b - a, c.a[0].cols, width,
                                                   row_stride, panel_stride)


# ------------------------------------------------------------------------------------------------ registration
cdef fd_kernel_info softmax_forward_info, softmax_backward_info
cdef fd_kernel_info copy_info[2]
cdef int64_t copy_target[2]  # position of y and of dx
softmax_forward_info.run, softmax_backward_info.run = softmax_forward_run, softmax_backward_run
copy_target[0], copy_target[1] = 1, 2
copy_info[0].run, copy_info[0].panel, copy_info[0].data = copy_run, copy_panel, &copy_target[0]
copy_info[1].run, copy_info[1].panel, copy_info[1].data = copy_run, copy_panel, &copy_target[1]


cdef dict both(fd_kernel_info* info):
    capsule = PyCapsule_New(<void*>info, FD_KERNEL_CAPSULE, NULL)
    return {"float32": capsule, "float64": capsule}  # a kernel reads the item size from its arrays


def kernels():
    """Kernels by op name and dtype: forward and backward of every table entry, identity and softmax."""
    cdef int i
    if activations.count > MOST:
        raise RuntimeError(f"{activations.count} activations, but MOST = {MOST} in activations/_cython.pyx")
    found = {
        "identity_forward": both(&copy_info[0]),
        "identity_backward": both(&copy_info[1]),
        "softmax_forward": both(&softmax_forward_info),
        "softmax_backward": both(&softmax_backward_info),
    }
    for i in range(activations.count):
        entry_index[i] = i
        forward_info[i].run, forward_info[i].panel, forward_info[i].data = forward_run, forward_panel, &entry_index[i]
        backward_info[i].run, backward_info[i].panel, backward_info[i].data = backward_run, backward_panel, &entry_index[i]
        name = (<bytes>activations.entry[i].name).decode()
        found[f"{name}_forward"] = both(&forward_info[i])
        found[f"{name}_backward"] = both(&backward_info[i])
    return found


# ------------------------------------------------------------------------------------------------ functions on arrays
cdef dict function_index():
    return {(<bytes>row_ops.function[i].name).decode(): i for i in range(row_ops.functions)}


def functions():
    """Names that ``evaluate`` takes: the vector functions of common/math.hpp."""
    return tuple(function_index())


def evaluate(str name, x, y):
    """y = name(x) for contiguous arrays of one float dtype, by the vector functions of common/math.hpp."""
    known = function_index()
    if name not in known:
        raise ValueError(f"unknown function {name!r}, known: {', '.join(known)}")
    if x.dtype != y.dtype or x.dtype.name not in ("float32", "float64"):
        raise TypeError(f"expected two float32 or two float64 arrays, found {x.dtype} and {y.dtype}")
    if x.shape != y.shape or not x.flags.c_contiguous or not y.flags.c_contiguous:
        raise ValueError(f"expected two contiguous arrays of one shape, found {x.shape} and {y.shape}")
    cdef int which = known[name], wide = x.dtype.itemsize == 8
    cdef const unsigned char[::1] source
    cdef unsigned char[::1] target
    if x.size:
        source, target = x.reshape(-1).view("u1"), y.reshape(-1).view("u1")
        row_ops.function[which].run[wide](&source[0], &target[0], x.size)
