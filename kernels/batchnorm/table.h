/* Block functions of the batchnorm family: one block is some columns of all rows, which one thread works on alone, so
 * that no thread count can change a sum. Strides count elements. A vector starts at the block's first column.
 */
#ifndef FASTDL_BATCHNORM_TABLE_H
#define FASTDL_BATCHNORM_TABLE_H
#include <stdint.h>
#include "activations/table.h"
#include "level.h"

/* Columns of a block at most. A multiple of 32. */
#define FD_BATCHNORM_WIDTH 2048
#define FD_BATCHNORM_TILED 128 /* with an activation of the table, whose tiles of 32 rows stand in scratch */
/* Bytes of scratch of a block of so many columns, a multiple of 32: the affine map, the at most 8 vectors that live at a
 * time, and a tile. Nothing large stands on the stack, which may be as small as 128 KB: these took 230 KB of it. */
#define FD_BATCHNORM_ROOM(cols, itemsize)                     \
  (4 * FD_BATCHNORM_WIDTH * (itemsize) + 8 * 8 * (cols) +     \
   32 * (itemsize) * ((cols) < FD_BATCHNORM_TILED ? (cols) : FD_BATCHNORM_TILED))

typedef struct {
  int64_t rows, cols;
  const void *x, *dy;
  void *y, *dx;
  int64_t x_stride, dy_stride, y_stride, dx_stride;
  const void *gamma, *beta, *slope;       /* slope: NULL unless PReLU */
  void *mean, *inv_std;                   /* written by forward, read by the others */
  void *running_mean, *running_var;       /* forward: updated in place */
  void *dgamma, *dbeta, *dslope;          /* backward; dslope may be NULL */
  const void* bias;                       /* fold: of the dense layer, or NULL */
  void* folded;                           /* fold: the bias that does the normalisation, too */
  double decay, eps, alpha;
  const fd_activation* activation;        /* NULL: identity */
  int relu;                               /* the activation is ReLU: applied in registers, `activation` unused */
  int training;                           /* backward: mean and inv_std depend on x */
  int drop;                               /* the dropout fields below are used */
  uint32_t layer, step, threshold;
  uint64_t seed;
  char* room;                             /* scratch of FD_BATCHNORM_ROOM bytes, 64-byte aligned */
  uint32_t* bits;                         /* scratch: words of 32 keep bits, [strip][rows + 8] */
  int panels;                             /* matrices lie in panels, padded with zeros to 32 columns */
  int far;                                /* the output is large: store past the caches */
  int64_t first_row, first_col;           /* of the block's first element in the step's batch */
} fd_batchnorm_block;

typedef struct {                          /* [0] float, [1] double */
  void (*forward[2])(const fd_batchnorm_block*);
  void (*inference[2])(const fd_batchnorm_block*);
  void (*backward[2])(const fd_batchnorm_block*);
  void (*fold[2])(const fd_batchnorm_block*); /* rows are inputs of the dense layer, x its weights, y the folded ones */
} fd_batchnorm_table;

#ifdef __cplusplus
extern "C" {
#endif
FD_TABLES(fd_batchnorm_table, fd_batchnorm)
#ifdef __cplusplus
}
#endif
#endif
