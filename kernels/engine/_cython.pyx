"""Runs compiled kernels: one eager call, or the call list of a Program for many steps, without the GIL.

A Program's calls stand in one array of `fd_call`. All threads of the team walk the same list, each with its own copy of
the run-time block (it evolves the same way on all of them), and meet after each call that asks for it. Nothing is
allocated after binding.
"""

from cpython.buffer cimport PyBUF_FORMAT, PyBUF_STRIDES, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from numpy import empty, ndarray

from fastdl.kernels.engine.panels import Panels

include "../common/abi.pxi"

cdef extern from "Python.h":
    unsigned long long PyLong_AsUnsignedLongLongMask(object) except? <unsigned long long>-1

cdef extern from "stdlib.h" nogil:
    int posix_memalign(void** place, size_t alignment, size_t size)

cdef extern from "engine/crew.h" nogil:
    ctypedef void (*fd_body)(void* context, const fd_worker* worker) noexcept nogil
    void fd_parallel(fd_body body, void* context, int threads, char* scratch, int64_t scratch_bytes, char* shared,
                     fd_team* team)

cdef extern from *:
    """
    static const size_t fd_team_bytes = sizeof(fd_team);
    static const size_t fd_call_bytes = sizeof(fd_call);
    """
    size_t fd_team_bytes
    size_t fd_call_bytes

cdef size_t ALIGN = 64


# ---------------------------------------------------------------------------------------------- arguments
cdef int fill_array(fd_array* to, object array) except -1:
    """Describe a NumPy array (0 to 2 dimensions) or Panels; None becomes data = NULL."""
    cdef Py_buffer view
    cdef bint is_panels
    if array is None:
        memset(to, 0, sizeof(fd_array))
        return 0
    is_panels = type(array) is Panels
    PyObject_GetBuffer(array.data if is_panels else array, &view, PyBUF_STRIDES)
    try:
        to.data = <char*>view.buf
        to.itemsize = view.itemsize
        if is_panels:
            to.max_rows, to.cols = array.rows, array.cols
            to.row_stride, to.col_stride, to.panel_stride = 32, 1, view.shape[1] * 32
            return 0
        if view.ndim == 2:
            to.max_rows, to.cols = view.shape[0], view.shape[1]
            to.row_stride = view.strides[0] // view.itemsize
            to.col_stride = view.strides[1] // view.itemsize
        elif view.ndim <= 1:
            to.max_rows, to.cols = 1, view.shape[0] if view.ndim else 1
            to.row_stride = to.cols
            to.col_stride = view.strides[0] // view.itemsize if view.ndim else 1
        else:
            raise ValueError(f"expected an array of at most 2 dimensions, found {view.ndim}")
        to.panel_stride = FD_PANEL * to.col_stride
    finally:
        PyBuffer_Release(&view)
    return 0


cdef int fill_call(fd_call* call, object capsule, object arrays, object ints, object floats) except -1:
    cdef Py_ssize_t k
    call.info = <const fd_kernel_info*>PyCapsule_GetPointer(capsule, FD_KERNEL_CAPSULE)
    call.tail = NULL
    call.barrier = 1
    call.behind = 0
    if len(arrays) > FD_MAX_ARRAYS or len(ints) > FD_MAX_SCALARS or len(floats) > FD_MAX_SCALARS:
        raise ValueError(f"a call takes at most {FD_MAX_ARRAYS} arrays and {FD_MAX_SCALARS} scalars of a kind")
    for k in range(len(arrays)):
        fill_array(&call.a[k], arrays[k])
    for k in range(len(ints)):
        call.i[k] = <int64_t>PyLong_AsUnsignedLongLongMask(ints[k])  # seeds have all 64 bits
    for k in range(len(floats)):
        call.f[k] = floats[k]
    return 0


def fits(capsule) -> bool:
    """Whether a kernel was built against the ABI that this module was built against."""
    return PyCapsule_IsValid(capsule, FD_KERNEL_CAPSULE)


def uses_shared(capsule) -> bool:
    """Whether a kernel works in the team's shared scratch: two such calls may not overlap."""
    return (<const fd_kernel_info*>PyCapsule_GetPointer(capsule, FD_KERNEL_CAPSULE)).shared != NULL


cdef class Workspace:
    """Grow-only aligned memory of a team: private blocks, one shared block, the barrier flags."""
    cdef char* memory
    cdef char* shared
    cdef fd_team* team
    cdef int64_t private_bytes, total

    def __cinit__(self):
        cdef void* place = NULL
        if posix_memalign(&place, ALIGN, fd_team_bytes):
            raise MemoryError("no memory for a thread team")
        self.team = <fd_team*>place
        memset(place, 0, fd_team_bytes)

    def __dealloc__(self):
        free(self.memory)
        free(self.team)

    cdef int reserve(self, int64_t private_bytes, int64_t shared_bytes, int threads) except -1:
        cdef void* place = NULL
        # Odd multiples of a line apart: equal offsets of two threads' blocks must not fall on the same cache sets.
        self.private_bytes = (private_bytes + 63) // 64 * 64 + 832 if private_bytes else 0
        cdef int64_t total = self.private_bytes * threads + shared_bytes
        if total > self.total:
            free(self.memory)
            self.memory, self.total = NULL, 0
            if posix_memalign(&place, ALIGN, total):
                raise MemoryError(f"no memory for {total} bytes of kernel scratch")
            self.memory, self.total = <char*>place, total
        self.shared = self.memory + self.private_bytes * threads
        return 0


cdef list _idle = []  # workspaces of eager calls


cdef int64_t scratch_bytes(const fd_call* call, int64_t rows) noexcept:
    return 0 if call.info.scratch == NULL else (call.info.scratch(call, rows) + 63) // 64 * 64


cdef int needs(const fd_call* call, int64_t rows, int64_t* private_bytes, int64_t* shared_bytes) except -1:
    cdef int64_t bytes
    private_bytes[0] = max(private_bytes[0], call.behind + scratch_bytes(call, rows))
    if call.info.shared != NULL:
        bytes = call.info.shared(call, rows)
        shared_bytes[0] = max(shared_bytes[0], bytes)
    return 0


# ---------------------------------------------------------------------------------------------- one eager call
cdef struct Eager:
    const fd_call* call
    fd_run run


cdef void run_eager(void* context, const fd_worker* worker) noexcept nogil:
    cdef Eager* e = <Eager*>context
    e.call.info.run(e.call, &e.run, worker)


cdef fd_run run_block(int64_t rows, uint32_t step, uint32_t epoch, int64_t first_row, int64_t total_rows,
                      int64_t offset, uint32_t update, double lr, double scale) noexcept:
    cdef fd_run run
    run.rows, run.first_row, run.offset = rows, first_row, offset
    run.total_rows = total_rows if total_rows else rows
    run.step, run.epoch, run.update = step, epoch, update
    run.lr, run.scale = lr, scale
    return run


def invoke(capsule, tuple arrays, tuple ints, tuple floats, int64_t rows, int threads=1, uint32_t step=0,
           uint32_t epoch=0, int64_t first_row=0, int64_t total_rows=0, int64_t offset=0, uint32_t update=0,
           double lr=0.0, double scale=1.0):
    """Run one kernel once. The arguments have been checked above (`fastdl.ops`)."""
    cdef fd_call call
    cdef Eager eager
    cdef int64_t private_bytes = 0, shared_bytes = 0
    cdef Workspace space
    fill_call(&call, capsule, arrays, ints, floats)
    eager.call = &call
    eager.run = run_block(rows, step, epoch, first_row, total_rows, offset, update, lr, scale)
    threads = max(1, min(threads, FD_MAX_THREADS))
    needs(&call, rows, &private_bytes, &shared_bytes)
    try:
        space = <Workspace>_idle.pop()  # one step: without the GIL another thread may take the last one
    except IndexError:
        space = Workspace()
    try:
        space.reserve(private_bytes, shared_bytes, threads)
        with nogil:
            fd_parallel(run_eager, &eager, threads, space.memory, space.private_bytes, space.shared, space.team)
    finally:
        _idle.append(space)


# ---------------------------------------------------------------------------------------------- a Program
cdef struct Steps:
    fd_call** calls    # heads of chains; tails run inside them
    int first, last    # calls [first, last) of the list
    fd_run run
    int64_t count      # rows of the data set; 0: every step has run.rows rows
    int64_t batch
    int64_t steps
    const double* stats   # written by the loss call: loss, rows or sum of weights, correct
    double* totals        # loss * mass, mass, correct, rows: added up over the steps


cdef void run_steps(void* context, const fd_worker* worker) noexcept nogil:
    cdef Steps* s = <Steps*>context
    cdef fd_run run = s.run
    cdef int64_t step
    cdef int k
    cdef const fd_call* call
    cdef unsigned mode = fd_flush_denormals(1)
    for step in range(s.steps):
        if s.count:
            run.rows = min(s.batch, s.count - run.offset)
            run.total_rows = run.rows
        for k in range(s.first, s.last):
            call = s.calls[k]
            call.info.run(call, &run, worker)
            if call.barrier:
                fd_barrier(worker)
        if worker.thread == 0 and s.totals != NULL:
            if s.stats[1] != 0.0:  # a batch of zero weights has no mean
                s.totals[0] += s.stats[0] * s.stats[1]
                s.totals[1] += s.stats[1]
            s.totals[2] += s.stats[2]
            s.totals[3] += run.rows
        if s.count:
            run.offset += run.rows
            run.step += 1
            if run.update != <uint32_t>0xffffffff:  # moments that old age no more
                run.update += 1
    fd_restore_denormals(mode)


cdef class NativeProgram:
    """The bound calls of a Program.

    Parameters
    ----------
    calls : list of (capsule, arrays, ints, floats, is_tail, barrier)
        A tail belongs to the nearest head before it and runs on each of its finished output panels. The caller keeps
        the arrays.
    rows : int
        Maximum rows of a batch (scratch is sized for it).
    threads : int
    stats, totals : float64 arrays of 3 and 4 values, or None
    version : int64 array of one value
        Counts the changes of the model's parameters.
    folds : int
        So many heads stand first that make tensors from the parameters; they run before the others whenever the
        version has changed.
    changes : bool
        A run changes the parameters.
    """
    cdef fd_call* memory
    cdef fd_call** heads
    cdef readonly int count
    cdef readonly list head_of   # index of the head that runs call k
    cdef object stats, totals, version
    cdef double* stats_at
    cdef double* totals_at
    cdef int64_t* version_at
    cdef int64_t folded          # the version that the folded tensors were made from
    cdef int folds
    cdef bint changes
    cdef Workspace space
    cdef int threads
    cdef readonly int64_t runs   # that are done

    def __cinit__(self, list calls, int64_t rows, int threads, stats, totals, version, int folds, bint changes):
        cdef int k, n = len(calls)
        cdef fd_call* head = NULL
        cdef fd_call* last = NULL
        cdef int64_t private_bytes = 0, shared_bytes = 0
        self.memory = <fd_call*>calloc(max(1, n), fd_call_bytes)
        self.heads = <fd_call**>calloc(max(1, n), sizeof(fd_call*))
        if self.memory == NULL or self.heads == NULL:
            raise MemoryError("no memory for the call list")
        self.count, self.head_of, self.version = 0, [], version
        self.version_at = <int64_t*><uintptr_t>version.ctypes.data
        self.folded, self.folds, self.changes = -1, folds, changes
        self.threads = max(1, min(threads, FD_MAX_THREADS))
        self.stats, self.totals = stats, totals
        self.stats_at = <double*><uintptr_t>(0 if stats is None else stats.ctypes.data)
        self.totals_at = <double*><uintptr_t>(0 if totals is None else totals.ctypes.data)
        for k in range(n):
            capsule, arrays, ints, floats, is_tail, barrier = calls[k]
            fill_call(&self.memory[k], capsule, arrays, ints, floats)
            self.memory[k].barrier = 1 if barrier else 0
            if is_tail:
                if head == NULL or self.memory[k].info.panel == NULL:
                    raise ValueError(f"call {k} cannot be a tail: no head before it or no column-local kernel")
                last.tail = &self.memory[k]
                self.memory[k].behind = scratch_bytes(head, rows)
            else:
                head = &self.memory[k]
                self.heads[self.count] = head
                self.count += 1
            needs(&self.memory[k], rows, &private_bytes, &shared_bytes)
            last = &self.memory[k]
            self.head_of.append(self.count - 1)
        self.space = Workspace()
        self.space.reserve(private_bytes, shared_bytes, self.threads)

    def __dealloc__(self):
        free(self.memory)
        free(self.heads)

    def rebind(self, list places, array):
        """Point the arrays at ``places`` ((call, position), ...) to another array of the same shape and layout."""
        cdef int call, position
        for call, position in places:
            fill_array(&self.memory[call].a[position], array)

    def run(self, int first, int last, int64_t rows, uint32_t step=0, uint32_t epoch=0, int64_t first_row=0,
            int64_t total_rows=0, int64_t offset=0, uint32_t update=0, double lr=0.0, double scale=1.0):
        """Run the heads [first, last) once."""
        self._go(first, last, run_block(rows, step, epoch, first_row, total_rows, offset, update, lr, scale), 0, 0, 1)

    def steps(self, int first, int last, int64_t count, int64_t batch, int64_t steps, uint32_t step, uint32_t epoch,
              int64_t offset, uint32_t update, double lr, double scale):
        """Run ``steps`` batches of a data set of ``count`` rows, from row ``offset`` of the epoch on."""
        self._go(first, last, run_block(0, step, epoch, 0, 0, offset, update, lr, scale), count, batch, steps)

    cdef int _go(self, int first, int last, fd_run run, int64_t count, int64_t batch, int64_t steps) except -1:
        """One run (count 0), or steps over a data set, whose losses are added up."""
        cdef Steps s
        if self.changes:
            self.version_at[0] += 1
        if 0 < self.folds <= first and self.folded != self.version_at[0]:
            self._go(0, self.folds, run_block(0, 0, 0, 0, 0, 0, 0, 0.0, 1.0), 0, 0, 1)
            self.folded = self.version_at[0]
        s.calls, s.first, s.last = self.heads, first, last
        s.run, s.count, s.batch, s.steps = run, count, batch, steps
        s.stats = self.stats_at
        s.totals = self.totals_at if count and self.stats_at != NULL else NULL
        with nogil:
            fd_parallel(run_steps, &s, self.threads, self.space.memory, self.space.private_bytes, self.space.shared,
                        self.space.team)
        self.runs += 1
        return 0


include "quick.pxi"
