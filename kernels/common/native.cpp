// The peak meter: multiply-adds on independent accumulators that never leave the registers, and nothing else. It is the
// roof that benchmarks divide by; it is measured beside each case because a core's clock moves by 10 %.
#include "peak.h"
#include "simd.hpp"

namespace FD_NS {

// More than latency times ports (4 x 2 multiply-adds in flight), and no more than the registers hold beside x and y.
#if FD_LEVEL == FD_AVX512
#define FD_ACCUMULATORS 24
#else
#define FD_ACCUMULATORS 12
#endif
#if defined(__x86_64__)
#define FD_KEEP(v) __asm__ volatile("" : "+v"(v)) /* the compiler must not drop the loop, nor spill */
#elif defined(__aarch64__)
#define FD_KEEP(v) __asm__ volatile("" : "+w"(v))
#else
#define FD_KEEP(v) __asm__ volatile("" : "+m"(v))
#endif

template <class T> static __attribute__((noinline)) double peak(int64_t rounds) {
  vec<T> c[FD_ACCUMULATORS];
#pragma GCC unroll 24
  for (int k = 0; k < FD_ACCUMULATORS; k++) c[k] = splat((T)k);
  const vec<T> x = splat((T)0.999), y = splat((T)0.001);  // c settles at 1: no denormals, no overflow
  for (int64_t r = 0; r < rounds; r++) {
#pragma GCC unroll 24
    for (int k = 0; k < FD_ACCUMULATORS; k++) {
      c[k] = c[k] * x + y;
      FD_KEEP(c[k]);
    }
  }
  return 2.0 * lanes<T> * FD_ACCUMULATORS * (double)rounds;
}

}  // namespace FD_NS

extern "C" const fd_peak_table FD_SYMBOL(fd_peak) = {{FD_NS::peak<float>, FD_NS::peak<double>}};
