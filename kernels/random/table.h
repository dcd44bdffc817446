/* The SIMD-level functions of the random family. */
#ifndef FASTDL_RANDOM_TABLE_H
#define FASTDL_RANDOM_TABLE_H
#include <stdint.h>
#include "level.h"

#define FD_FEISTEL_ROUNDS 12
#define FD_FEISTEL_LEAST_BITS 6

typedef struct {
  /* `count` counters of four words, rows `counter_stride` and `out_stride` words apart */
  void (*philox)(const uint32_t* counter, int64_t counter_stride, const uint32_t* key, uint32_t* out,
                 int64_t out_stride, int64_t count);
  /* positions [first, first + count) of the permutation of n of an epoch; positions count modulo n */
  void (*permute)(int64_t* index, int64_t first, int64_t count, int64_t n, uint64_t seed, uint32_t epoch);
} fd_random_table;

#ifdef __cplusplus
extern "C" {
#endif
FD_TABLES(fd_random_table, fd_random)
#ifdef __cplusplus
}
#endif
#endif
