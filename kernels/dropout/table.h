/* The block function of dropout, and the threshold of a rate, which batch norm takes too: it draws its mask itself
 * (common/philox.hpp) on the panel that it has just normalised. */
#ifndef FASTDL_DROPOUT_TABLE_H
#define FASTDL_DROPOUT_TABLE_H
#include <stdint.h>
#include "level.h"

/* [0] float, [1] double; strides in elements; y may be x. first_row is the global row of row 0 (32 bits of it enter the
 * counter), first_col a multiple of 8. T in 1..65536 is the threshold of the 16-bit lanes and scale = 65536 / T. */
typedef struct {
  void (*apply[2])(const void* x, void* y, int64_t rows, int64_t cols, int64_t x_stride, int64_t y_stride,
                   int64_t first_row, int64_t first_col, uint32_t layer, uint32_t step, uint64_t seed, uint32_t T,
                   double scale);
  /* the same mask as bytes, 1 where an element is kept */
  void (*mask)(uint8_t* mask, int64_t rows, int64_t cols, int64_t stride, int64_t first_row, int64_t first_col,
               uint32_t layer, uint32_t step, uint64_t seed, uint32_t T);
} fd_dropout_table;

#ifdef __cplusplus
extern "C" {
#endif
FD_TABLES(fd_dropout_table, fd_dropout)
#ifdef __cplusplus
}
#endif

/* Threshold of a rate, floor((1 - rate) * 65536 + 0.5); 0 (a rate within 2^-17 of 1) is refused above. */
static inline uint32_t fd_dropout_threshold(double rate) { return (uint32_t)((1.0 - rate) * 65536.0 + 0.5); }
#endif
