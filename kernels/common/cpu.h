/* What the CPU offers, as a level of level.h. */
#ifndef FASTDL_CPU_H
#define FASTDL_CPU_H
#include "level.h"

static inline int fd_best_level(void) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("bmi2"))
    return FD_PORTABLE;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl"))
    return FD_AVX512;
  return FD_AVX2;
#else
  return FD_PORTABLE;
#endif
}
#endif
