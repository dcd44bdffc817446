/* The losses' block functions, one table per SIMD level. Index [0] is float32, [1] float64. */
#ifndef FASTDL_LOSSES_TABLE_H
#define FASTDL_LOSSES_TABLE_H
#include <stdint.h>
#include "level.h"

/* Rows of one block are handled by one thread and summed in one order, whatever the number of threads. */
#define FD_LOSS_ROWS 64

enum { FD_SOFTMAX, FD_SOFTMAX_ONEHOT, FD_BINARY, FD_MSE, FD_LOSSES };

/* A matrix seen from the block's first row: element (r, c) at data[(c / 32) * panel + r * row + c % 32]. */
typedef struct {
  void* data; /* NULL: not wanted (dz) */
  int64_t row, panel;
  int padded; /* panels of 32 exist to the end: may be read there, and dz is 0 there */
} fd_matrix;

typedef struct {
  fd_matrix z, targets, dz;
  const int64_t* labels; /* for FD_SOFTMAX, instead of targets */
  const void* weight;    /* one per row, or NULL */
  int64_t rows, cols;    /* rows <= FD_LOSS_ROWS */
  double scale;          /* factor of the gradient of a row of weight 1 */
} fd_loss_block;

typedef struct {
  double loss;  /* sum of weight * row loss (sum over columns) */
  double right; /* rows predicted right */
} fd_loss_sum;

typedef struct {
  void (*block[FD_LOSSES][2])(const fd_loss_block* block, fd_loss_sum* sum);
  double (*sum[2])(const void* x, int64_t n);
} fd_loss_table;

#ifdef __cplusplus
extern "C" {
#endif
FD_TABLES(fd_loss_table, fd_losses)
#ifdef __cplusplus
}
#endif
#endif
