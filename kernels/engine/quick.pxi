# The two short ways from Python into a bound Program: one batch to train on, one matrix to predict.
cdef bint has_buffer(array, Py_buffer* view) except -1:
    """Whether the view is filled: NumPy has none for dates and some kinds of text."""
    try:
        PyObject_GetBuffer(array, view, PyBUF_STRIDES | PyBUF_FORMAT)
    except (BufferError, ValueError):
        return False
    return True


cdef class SingleStep:
    """Training steps on batches that need no conversion: check, bind and run in one call from Python.

    A step of a small net takes 5 us; the same checks in Python would take 8 more.

    Parameters
    ----------
    program : NativeProgram
        All of its calls are a step; its loss is ``stats[0]``.
    x, targets : list of (call, position)
        Where the batch comes in.
    width : int
        Features of a row.
    rows : int
        Most rows of a batch.
    double : bool
        Rows are float64, otherwise float32.
    classes : int
        Targets are int64 labels below this.
    """
    cdef NativeProgram program
    cdef list x_places, target_places
    cdef int64_t width, rows, classes
    cdef char kind
    cdef readonly bint done  # of the last call: a signal is raised as soon as it returns

    def __cinit__(self, NativeProgram program, list x, list targets, int64_t width, int64_t rows, bint double,
                  int64_t classes):
        self.program, self.x_places, self.target_places = program, x, targets
        self.width, self.rows, self.classes = width, rows, classes
        self.kind = c"d" if double else c"f"

    def run(self, x, targets, uint32_t step, uint32_t epoch, uint32_t update, double lr):
        """The batch's loss; None where a batch is not of the plain kind and nothing has been done.

        Its arrays live as long as the call; whoever runs the Program next binds others.
        """
        cdef int64_t rows = self.rows_of(x)
        cdef NativeProgram program = self.program
        self.done = False
        if rows < 1 or not self.are_labels(targets, rows):
            return None
        program.rebind(self.x_places, x)
        program.rebind(self.target_places, targets)
        program._go(0, program.count, run_block(rows, step, epoch, 0, rows, 0, update, lr, 1.0), 0, 0, 1)
        self.done = True
        return program.stats_at[0]

    cdef int64_t rows_of(self, array) except -2:
        """Rows of a C-contiguous matrix of the step's type and width, else -1."""
        cdef Py_buffer view
        cdef int64_t rows = -1
        if type(array) is not ndarray or not has_buffer(array, &view):
            return -1
        if (view.ndim == 2 and view.format[0] == self.kind and view.format[1] == 0 and view.shape[1] == self.width
                and view.shape[0] <= self.rows and view.strides[1] == view.itemsize
                and view.strides[0] == self.width * view.itemsize):
            rows = view.shape[0]
        PyBuffer_Release(&view)
        return rows

    cdef bint are_labels(self, array, int64_t rows) except -1:
        cdef Py_buffer view
        cdef int64_t k
        cdef const int64_t* label
        cdef bint good = False
        if type(array) is not ndarray or not has_buffer(array, &view):
            return False
        if (view.ndim == 1 and view.format[0] == c"l" and view.format[1] == 0 and view.itemsize == 8
                and view.shape[0] == rows and view.strides[0] == 8):
            label, good = <const int64_t*>view.buf, True
            for k in range(rows):
                good &= <uint64_t>label[k] < <uint64_t>self.classes
        PyBuffer_Release(&view)
        return good


cdef class Prediction:
    """From one array to a new one through a Program, in one call: 0.3 us beside the kernels, NumPy's array included.

    The Program's slots for the two have been bound to contiguous matrices before; here only their addresses change.

    Parameters
    ----------
    native : NativeProgram
    x_places, y_places : list of (call, position)
        Where the Program reads the input and writes the output.
    first, last : int
        Heads to run.
    rows, width, out_width : int
        Maximum rows, columns of the input and of the output.
    dtype : dtype
    """
    cdef NativeProgram native
    cdef list x_places, y_places
    cdef int first, last
    cdef Py_ssize_t rows, width, out_width
    cdef object dtype

    def __init__(self, NativeProgram native, list x_places, list y_places, int first, int last, Py_ssize_t rows,
                 Py_ssize_t width, Py_ssize_t out_width, dtype):
        self.native, self.x_places, self.y_places, self.first, self.last = native, x_places, y_places, first, last
        self.rows, self.width, self.out_width, self.dtype = rows, width, out_width, dtype

    cdef int point(self, list places, char* data) except -1:
        cdef int call, position
        for call, position in places:
            self.native.memory[call].a[position].data = data
        return 0

    def __call__(self, x):
        """The output (rows, out_width), or None for anything but a contiguous matrix that fits."""
        cdef Py_buffer view, made
        cdef bint fits
        cdef Py_ssize_t rows
        if type(x) is not ndarray or x.dtype is not self.dtype:
            return None
        PyObject_GetBuffer(x, &view, PyBUF_STRIDES)
        try:
            fits = view.ndim == 2 and view.shape[1] == self.width and 0 < view.shape[0] <= self.rows
            fits = fits and view.strides[1] == view.itemsize
            fits = fits and (view.shape[0] == 1 or view.strides[0] == self.width * view.itemsize)
            if not fits:
                return None
            rows = view.shape[0]
            y = empty((rows, self.out_width), self.dtype)
            PyObject_GetBuffer(y, &made, PyBUF_STRIDES)
            PyBuffer_Release(&made)  # y lives on
            self.point(self.x_places, <char*>view.buf)
            self.point(self.y_places, <char*>made.buf)
            self.native._go(self.first, self.last, run_block(rows, 0, 0, 0, rows, 0, 0, 0.0, 1.0), 0, 0, 1)
        finally:
            PyBuffer_Release(&view)
        return y
