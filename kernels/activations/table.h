/* The activation table: block functions that the element-wise kernels, the dense epilogue and batch norm share.
 *
 * A block is rows x cols elements, `stride` elements from row to row, columns adjacent. Entry k of every function pair is
 * [0] float, [1] double. `alpha` is the op's one scalar parameter (leaky_relu, elu); `slope` holds one value per column
 * (prelu) or is NULL. The order of the entries is FD_ACTIVATIONS in points.hpp.
 */
#ifndef FASTDL_ACTIVATIONS_TABLE_H
#define FASTDL_ACTIVATIONS_TABLE_H
#include <stdint.h>
#include "level.h"

/* y = f(x); y may be x. */
typedef void (*fd_forward_block)(const void* x, void* y, int64_t rows, int64_t cols, int64_t x_stride, int64_t y_stride,
                                 double alpha, const void* slope);
/* dx = dy f'(s); dx may be dy. dslope, if given, is added to: dslope[c] += sum over rows of dy dy/dslope. */
typedef void (*fd_backward_block)(const void* dy, const void* s, void* dx, int64_t rows, int64_t cols, int64_t dy_stride,
                                  int64_t s_stride, int64_t dx_stride, double alpha, const void* slope, void* dslope);

typedef struct {
  const char* name;
  int saves_output; /* 1: backward reads y, 0: backward reads x */
  fd_forward_block forward[2];
  fd_backward_block backward[2];
  int per_column; /* 1: takes slope and dslope */
} fd_activation;

typedef struct {
  int count;
  const fd_activation* entry;
} fd_activation_table;

/* Row operations and the functions of common/math.hpp on arrays; no other family needs these. A row of a matrix is cut
 * into segments of `width` columns that stand `panel_stride` elements apart (width = cols for plain rows). */
typedef void (*fd_copy_block)(const void* x, void* y, int64_t rows, int64_t cols, int64_t x_stride, int64_t y_stride);
typedef void (*fd_softmax_forward_block)(const void* x, void* y, int64_t rows, int64_t cols, int64_t width,
                                         const int64_t* row_stride, const int64_t* panel_stride);
typedef void (*fd_softmax_backward_block)(const void* dy, const void* y, void* dx, int64_t rows, int64_t cols, int64_t width,
                                          const int64_t* row_stride, const int64_t* panel_stride);
typedef void (*fd_array_function)(const void* x, void* y, int64_t n);

typedef struct {
  const char* name;
  fd_array_function run[2];
} fd_function;

typedef struct {
  fd_copy_block copy[2];
  fd_softmax_forward_block softmax_forward[2];
  fd_softmax_backward_block softmax_backward[2];
  int functions;
  const fd_function* function;
} fd_row_table;

#ifdef __cplusplus
extern "C" {
#endif
FD_TABLES(fd_activation_table, fd_activations)
FD_TABLES(fd_row_table, fd_row_ops)
#ifdef __cplusplus
}
#endif
#endif
