/* The optimisers' block functions, one table per SIMD level. Index [0] is float32, [1] float64. */
#ifndef FASTDL_OPTIMIZERS_TABLE_H
#define FASTDL_OPTIMIZERS_TABLE_H
#include <stdint.h>
#include "level.h"

/* What one step of a sweep needs, worked out once per call in double. */
typedef struct {
  double scale;    /* of the gradient (clipping) */
  double l2;       /* added to the gradient: l2 w */
  double keep;     /* 1 - lr weight_decay, the factor of w */
  double momentum, rate; /* rate = lr lr_factor */
  int nesterov;
} fd_sgd;

typedef struct {
  double scale, l2, keep;
  double beta1, gain1; /* gain1 = 1 - beta1 */
  double beta2, gain2;
  double root;         /* 1 / sqrt(1 - beta2^t) */
  double rate;         /* lr lr_factor / (1 - beta1^t) */
  double eps;
} fd_adam;

typedef struct {
  void (*sgd[2])(void* w, const void* g, void* v, int64_t n, const fd_sgd* step); /* v may be NULL */
  void (*adam[2])(void* w, const void* g, void* m, void* v, int64_t n, const fd_adam* step);
  double (*squared_norm[2])(const void* g, int64_t n);
} fd_optimizer_table;

#ifdef __cplusplus
extern "C" {
#endif
FD_TABLES(fd_optimizer_table, fd_optimizers)
#ifdef __cplusplus
}
#endif
#endif
