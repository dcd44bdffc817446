/* What the CPU and the kernel offer, by the names of level.h. */
#ifndef FASTDL_CPU_H
#define FASTDL_CPU_H
#include "level.h"
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

/* Whether products of bfloat16 can run on a unit. Linux hands out the 8 KB of tile registers on request only, for all
 * threads of the process: the first call for FD_AMX asks (Linux, Documentation/arch/x86/xstate.rst). */
static inline int fd_has_bfloat16(int unit) {
#if defined(__x86_64__)
  if (fd_best_level() != FD_AVX512 || !__builtin_cpu_supports("avx512bf16")) return 0;
  if (unit == FD_AVX512_BF16) return 1;
#ifdef __linux__
  enum { TILE = 1 << 24, TILE_BF16 = 1 << 22, ASK_FOR_STATE = 0x1023, TILE_DATA = 18 };
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (unit == FD_AMX && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & TILE) && (d & TILE_BF16))
    return syscall(SYS_arch_prctl, ASK_FOR_STATE, TILE_DATA) == 0;
#endif
#endif
  (void)unit;
  return 0;
}
#endif
