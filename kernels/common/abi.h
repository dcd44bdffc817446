/* The call ABI: a kernel is a C address plus one flat argument struct.
 *
 * The same kernel serves an eager call (`fd.ops`) and a call inside a Program: the eager path fills one `fd_call`
 * and runs it, the engine keeps a list of them. Cython, C++ and `numba.cfunc` can all supply a kernel.
 *
 * Matrices are addressed by column panels of FD_PANEL columns. Element (r, c) of an array stands at
 *     data + (c / 32) * panel_stride + r * row_stride + (c % 32) * col_stride          (in elements, not bytes)
 * which covers both layouts with one formula:
 *     plain rows     row_stride = leading dimension,  panel_stride = 32 * col_stride
 *     column panels  row_stride = 32,                 panel_stride = 32 * maximum rows   (width padded to 32, pad = 0)
 * A vector of C values is one row, cols = C; a missing optional array has data = NULL.
 *
 * What a kernel may count on, and what it must keep to:
 * - run: every thread of the team calls it once, with its own worker; it may call fd_barrier if all threads do so equally
 *   often. It takes the rows of a batch from fd_run: an array's max_rows is what there is room for.
 * - panel: some threads call it, each for other panels and all at once, so it never calls fd_barrier, writes its panel's
 *   columns alone, and finds no shared scratch. Its private scratch begins behind that of its head (fd_call.behind).
 * - scratch: bytes(call, rows) is asked once with the most rows of a Program. What lies there before a call is undefined.
 * - shared: as scratch, for the team. Whoever has some is met before and after: no other call works in it meanwhile.
 * - No allocation, no Python, no exception, no write outside the outputs' rows in use; padding of panels is left zero.
 */
#ifndef FASTDL_ABI_H
#define FASTDL_ABI_H
#include <stdint.h>
#include <stdio.h>

#define FD_PANEL 32
#define FD_MAX_ARRAYS 14
#define FD_MAX_SCALARS 14

typedef struct {
  char* data;
  int64_t max_rows, cols;
  int64_t row_stride, col_stride, panel_stride;
  int64_t itemsize;
} fd_array;

/* What changes from step to step and is never baked into a call. */
typedef struct {
  int64_t rows;        /* rows of this call's batch */
  int64_t first_row;   /* global row of row 0 in the step's full batch (dropout counters) */
  int64_t total_rows;  /* rows of the step's full batch (the loss is a mean over these) */
  int64_t offset;      /* position of row 0 in the epoch's permutation */
  uint32_t step, epoch; /* positions in the random streams, both from 0 */
  uint32_t update;      /* updates that the optimiser's moments have seen: bias corrections use update + 1 */
  double lr;
  double scale;         /* factor of the gradient in the update (1.0 changes no bit) */
} fd_run;

typedef struct fd_team fd_team; /* team.h */

/* One thread of the team that runs a call. */
typedef struct {
  int thread, threads;
  fd_team* team;
  char* scratch; /* private to the thread, 64-byte aligned */
  char* shared;  /* one for the team, 64-byte aligned */
} fd_worker;

typedef struct fd_call fd_call;
typedef void (*fd_kernel)(const fd_call*, const fd_run*, const fd_worker*);
/* The column-local form of a kernel: all rows of one panel. A call that has one can be the tail of a dense product. */
typedef void (*fd_panel_kernel)(const fd_call*, const fd_run*, const fd_worker*, int64_t panel);

/* What a back end exports for one (op, dtype), by capsule named FD_KERNEL_CAPSULE. */
typedef struct {
  fd_kernel run;
  fd_panel_kernel panel;                              /* NULL: not column-local */
  int64_t (*scratch)(const fd_call*, int64_t rows);   /* private bytes a thread needs; NULL: none */
  int64_t (*shared)(const fd_call*, int64_t rows);    /* shared bytes the team needs; NULL: none */
  const void* data;                                   /* the kernel's own constant, e.g. a table row */
} fd_kernel_info;
#define FD_KERNEL_CAPSULE fd_kernel_capsule()

struct fd_call {
  const fd_kernel_info* info;
  const fd_call* tail;        /* column-local call to run on each finished output panel (a chain), or NULL */
  fd_array a[FD_MAX_ARRAYS];  /* in the order of OpSpec.arrays */
  int64_t i[FD_MAX_SCALARS];  /* integer parameters, in the order of OpSpec.params */
  double f[FD_MAX_SCALARS];   /* floating parameters, in the order of OpSpec.params */
  int barrier;                /* the team meets after this call */
  int64_t behind;             /* a tail's scratch begins so many bytes behind its head's, whose packed blocks must stay */
};

/* Raised by hand when a field gets another meaning and no size changes. */
#define FD_ABI_VERSION 1
/* The capsule's name carries the layout: a module that was built against another one is refused (common/simd.py). */
static inline const char* fd_kernel_capsule(void) {
  static char name[64];
  if (!name[0])
    snprintf(name, sizeof name, "fastdl.kernel %d/%d/%d/%d", FD_ABI_VERSION, (int)sizeof(fd_call), (int)sizeof(fd_run),
             (int)sizeof(fd_kernel_info));
  return name;
}

/* Thread t of n takes a contiguous share [a, b) of `count` blocks; shares never change a sum. */
static inline void fd_share(int64_t count, int thread, int threads, int64_t* a, int64_t* b) {
  *a = count * thread / threads;
  *b = count * (thread + 1) / threads;
}
static inline int64_t fd_panels(int64_t cols) { return (cols + FD_PANEL - 1) / FD_PANEL; }
/* Columns that exist in a panel. */
static inline int64_t fd_panel_cols(int64_t cols, int64_t panel) {
  int64_t left = cols - panel * FD_PANEL;
  return left < FD_PANEL ? left : FD_PANEL;
}
static inline char* fd_panel_data(const fd_array* a, int64_t panel) {
  return a->data + panel * a->panel_stride * a->itemsize;
}
/* Rows are contiguous over the whole width: an element-wise loop may ignore panels. */
static inline int fd_is_plain(const fd_array* a) {
  return a->col_stride == 1 && a->panel_stride == FD_PANEL;
}
/* Run the tail chain of `call` on a finished panel. */
static inline void fd_run_tail(const fd_call* call, const fd_run* run, const fd_worker* w, int64_t panel) {
  for (const fd_call* t = call->tail; t; t = t->tail) {
    fd_worker own = *w;
    own.scratch += t->behind;
    t->info->panel(t, run, &own, panel);
  }
}
#endif
