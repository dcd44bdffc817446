/* The SIMD-level functions of the gather family. Strides and sizes in bytes. */
#ifndef FASTDL_GATHER_TABLE_H
#define FASTDL_GATHER_TABLE_H
#include <stdint.h>
#include "level.h"

typedef struct {
  /* out[i] = source[index[i]]: `pieces` pieces of a row of `piece` bytes, the last of `last`, then `pad` zeros */
  void (*rows)(const char* source, int64_t source_row, int64_t source_piece, const int64_t* index, char* out,
               int64_t out_row, int64_t out_piece, int64_t rows, int64_t pieces, int64_t piece, int64_t last, int64_t pad);
} fd_gather_table;

#ifdef __cplusplus
extern "C" {
#endif
FD_TABLES(fd_gather_table, fd_gather)
#ifdef __cplusplus
}
#endif
#endif
