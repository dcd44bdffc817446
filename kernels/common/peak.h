/* The meter of a core's multiply-add peak, one per SIMD level. */
#ifndef FASTDL_PEAK_H
#define FASTDL_PEAK_H
#include <stdint.h>
#include "level.h"

typedef struct {
  double (*run[2])(int64_t rounds); /* [0] float, [1] double; returns the operations done */
} fd_peak_table;

#ifdef __cplusplus
extern "C" {
#endif
FD_TABLES(fd_peak_table, fd_peak)
#ifdef __cplusplus
}
#endif
#endif
