/* What the levels of native.cpp offer to _cython.pyx: block functions, [0] float and [1] double.
 *
 * A block is one output panel (at most 32 columns; a few complete ones for few rows) times some rows times one K block.
 * Strides are in elements.
 */
#ifndef FASTDL_DENSE_TABLE_H
#define FASTDL_DENSE_TABLE_H
#include <stdint.h>
#include "level.h"

typedef struct {
  const void* a;    /* product: A(i, k) = a[(k / 32) * a_panel + i * a_row + k % 32] */
                    /* product_t: A(i, k) = a[(i / 32) * a_panel + k * a_row + i % 32], rows of memory are k */
  const void* b;    /* B(k, j) = b[k * b_row + j]; readable up to the next full pair of vectors */
  void* c;          /* C(i, j) = c[i * c_row + j] */
  void* z;          /* where the value before the activation goes too, or NULL */
  const void* bias; /* cols values, or NULL */
  int64_t rows, cols, k;
  int64_t panels;                    /* product: 1, or complete ones, a power of two up to wide[rows] */
  int64_t b_panel, c_panel, z_panel; /* between panels of B, C and z, if there are more than one */
  int64_t a_row, a_panel, b_row, c_row, z_row;
  int add;     /* add to what C holds (the K blocks before this one) */
  int padded;  /* C and z are column panels: whole vectors may be written, with zeros beyond cols */
  int relu;    /* y = max(0, z) in registers */
} fd_dense_block;

typedef struct {
  void (*product[2])(const fd_dense_block*);
  void (*product_t[2])(const fd_dense_block*);
  /* C(i, j) = sum over k of a[i * a_row + k] * b[j * b_row + k], added to C if add; no epilogue */
  void (*dots[2])(const fd_dense_block*);
  /* to[r][32] = from(r, c) for c < cols, 0 above: one column panel from rows of any strides */
  void (*pack[2])(const void* from, void* to, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride);
  /* out[c] (+)= sum over rows of from[r * row_stride + c] */
  void (*column_sums[2])(const void* from, void* out, int64_t rows, int64_t cols, int64_t row_stride, int add);
  const int* wide; /* panels that a product of 0 to 3 rows takes at once */
} fd_dense_table;
/* The same products of pairs of bfloat16 (bfloat16.cpp, amx.cpp): a and b of a block are 32-bit words of two values along
 * k, k and strides count words, a panel row of A is 16 of them. The packers round rows of float32 with adjacent columns.
 * With `tiles` x^T is packed like x, and B ends in whole tiles of 16 words of k. */
typedef struct {
  void (*product)(const fd_dense_block*);
  void (*product_t)(const fd_dense_block*);
  void (*rows)(const float* from, uint32_t* to, int64_t rows, int64_t cols, int64_t stride);  /* A, [row][16] */
  /* A from x^T: [row / 2][32] of up to 32 columns; with tiles [column][16] of up to 32 rows */
  void (*columns)(const float* from, uint32_t* to, int64_t rows, int64_t cols, int64_t stride);
  void (*pairs)(const float* from, uint32_t* to, int64_t rows, int64_t cols, int64_t stride);  /* B, [row / 2][32] */
  void (*transposed)(const float* from, uint32_t* to, int64_t depth, int64_t rows, int64_t stride); /* [depth / 2][32] */
  void (*begin)(void); /* a thread's first and last act around products */
  void (*end)(void);
  int tiles;
} fd_dense_pairs;

#ifdef __cplusplus
extern "C" {
#endif
FD_TABLES(fd_dense_table, fd_dense)
#if defined(__x86_64__)
extern const fd_dense_pairs fd_dense_avx512_bf16, fd_dense_amx;
#endif
/* By the units of level.h; NULL where this build has none. Whether this CPU has one: fd_has_bfloat16 in cpu.h. */
static inline const fd_dense_pairs* fd_dense_bfloat16(int unit) {
#if defined(__x86_64__) && defined(__linux__)
  if (unit == FD_AMX) return &fd_dense_amx;
#endif
#if defined(__x86_64__)
  if (unit == FD_AVX512_BF16) return &fd_dense_avx512_bf16;
#endif
  (void)unit;
  return (const fd_dense_pairs*)0;
}
#ifdef __cplusplus
}
#endif
#endif
