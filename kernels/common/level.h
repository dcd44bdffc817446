/* SIMD levels. Each family's native.cpp is compiled once per level, with -DFD_LEVEL=<number> and the level's flags (see
 * LEVELS in setup.py). Everything that depends on the level lives in namespace FD_NS, so that no inline function or
 * template is shared between levels: the linker keeps one copy of a shared one, and if that is the AVX-512 copy, older
 * CPUs die. For the same reason native code uses no std:: templates.
 */
#ifndef FASTDL_LEVEL_H
#define FASTDL_LEVEL_H

#define FD_PORTABLE 0
#define FD_AVX2 1
#define FD_AVX512 2
#define FD_LEVELS 3

/* What multiplies bfloat16 at the AVX-512 level. */
#define FD_AVX512_BF16 1
#define FD_AMX 2

#ifdef FD_LEVEL
#if FD_LEVEL == FD_PORTABLE
#define FD_NS fd_portable
#define FD_SYMBOL(name) name##_portable
#define FD_VECTOR_BYTES 16
#elif FD_LEVEL == FD_AVX2
#define FD_NS fd_avx2
#define FD_SYMBOL(name) name##_avx2
#define FD_VECTOR_BYTES 32
#elif FD_LEVEL == FD_AVX512
#define FD_NS fd_avx512
#define FD_SYMBOL(name) name##_avx512
#define FD_VECTOR_BYTES 64
#endif
#endif

/* The table of a family at the running level: FD_TABLES(fd_dense_table, fd_dense) declares the levels' tables and
 * fd_dense_at(level). Levels that this architecture does not compile resolve to the portable one. */
#if defined(__x86_64__)
#define FD_TABLES(type, name)                                                       \
  extern const type name##_portable, name##_avx2, name##_avx512;                    \
  static inline const type* name##_at(int level) {                                  \
    return level == FD_AVX512 ? &name##_avx512 : level == FD_AVX2 ? &name##_avx2 : &name##_portable; \
  }
#else
#define FD_TABLES(type, name)                                                       \
  extern const type name##_portable;                                                \
  static inline const type* name##_at(int level) { (void)level; return &name##_portable; }
#endif
#endif
