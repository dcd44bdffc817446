// Vectors of the level's width on the compiler's vector extensions: plain operators (+ - * / < ?: & | ^ << >>) work on them.
// Intrinsics stand here alone, where they win over what the compiler makes of the plain form.
//
//   vec<T>   a register of T: float, double, int32_t, uint32_t, int64_t, uint64_t
//   lanes<T> how many T it holds
#pragma once
#include <stdint.h>
#include <stddef.h>
#include "level.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define FD_INLINE inline __attribute__((always_inline))

namespace FD_NS {

template <class T> struct vec_of;
#define FD_VEC(T) template <> struct vec_of<T> { typedef T type __attribute__((vector_size(FD_VECTOR_BYTES))); };
FD_VEC(float) FD_VEC(double) FD_VEC(int32_t) FD_VEC(uint32_t) FD_VEC(int64_t) FD_VEC(uint64_t)
#undef FD_VEC
template <class T> using vec = typename vec_of<T>::type;
template <class T> constexpr int lanes = FD_VECTOR_BYTES / (int)sizeof(T);

// The integer of a float's size: what comparisons give and what bits are made of.
template <class T> struct int_of;
template <> struct int_of<float> { typedef int32_t type; typedef uint32_t utype; };
template <> struct int_of<double> { typedef int64_t type; typedef uint64_t utype; };
template <class T> using ivec = vec<typename int_of<T>::type>;

template <class T> FD_INLINE vec<T> load(const T* p) { vec<T> v; __builtin_memcpy(&v, p, sizeof v); return v; }
template <class T> FD_INLINE void store(T* p, vec<T> v) { __builtin_memcpy(p, &v, sizeof v); }
template <class T> FD_INLINE vec<T> splat(T a) { return a - vec<T>{}; }

// The first n lanes of memory, zeros above; nothing past n is touched.
template <class T> FD_INLINE vec<T> load_n(const T* p, int n) {
  if (n >= lanes<T>) return load(p);
#if FD_LEVEL == FD_AVX512
  if constexpr (sizeof(T) == 4) return (vec<T>)_mm512_maskz_loadu_epi32((__mmask16)((1u << n) - 1), p);
  else return (vec<T>)_mm512_maskz_loadu_epi64((__mmask8)((1u << n) - 1), p);
#else
  vec<T> v{};
  for (int i = 0; i < n; i++) v[i] = p[i];
  return v;
#endif
}
template <class T> FD_INLINE void store_n(T* p, vec<T> v, int n) {
  if (n >= lanes<T>) { store(p, v); return; }
#if FD_LEVEL == FD_AVX512
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_epi32(p, (__mmask16)((1u << n) - 1), (__m512i)v);
  else _mm512_mask_storeu_epi64(p, (__mmask8)((1u << n) - 1), (__m512i)v);
#else
  for (int i = 0; i < n; i++) p[i] = v[i];
#endif
}

// A store past the caches to an address that is a multiple of the register's size; `stream_end` orders them before what
// follows.
template <class T> FD_INLINE void stream(T* p, vec<T> v) {
#if FD_LEVEL == FD_AVX512
  _mm512_stream_si512((__m512i*)p, (__m512i)v);
#elif FD_LEVEL == FD_AVX2
  _mm256_stream_si256((__m256i*)p, (__m256i)v);
#else
  store(p, v);
#endif
}
// How matrices that leave past the caches are walked, (4096, 2048) floats. One input: row after row, fetched LONG_AHEAD
// elements ahead (a copy in 0.65 ms; 0.87 at 512, 1.02 without, memcpy 1.47). Where constants of columns or a second input
// are read too: FAR_ROWS rows side by side, fetched FAR_AHEAD ahead (batch norm's gradient in 2.5 ms, 2.9 row after row).
// Loads and stores must alternate: a row made in L1 first and streamed in one go took twice as long as both together.
constexpr int LONG_AHEAD = 4096, FAR_AHEAD = 256, FAR_ROWS = 4;
// body(c, n) over the vectors of a row of `count` elements at `to`: a head up to the first aligned address, whole registers
// (put() streams them), the rest.
template <class T> FD_INLINE int64_t before_aligned(const T* p, int64_t count) {
  const int64_t head = (int64_t)(-(uintptr_t)p % FD_VECTOR_BYTES / sizeof(T));
  return head < count ? head : count;
}
template <class T, class Body> FD_INLINE void each_aligned(const T* to, int64_t count, Body body) {
  constexpr int L = lanes<T>;
  int64_t c = before_aligned(to, count);
  if (c) body((int64_t)0, (int)c);
  for (; c + L <= count; c += L) body(c, L);
  if (c < count) body(c, (int)(count - c));
}
template <class T> FD_INLINE void put(T* p, vec<T> v, int n) {
  if (n == lanes<T>) stream(p, v);
  else store_n(p, v, n);
}
FD_INLINE void stream_end() {
#if FD_LEVEL == FD_AVX512 || FD_LEVEL == FD_AVX2
  _mm_sfence();
#endif
}

// f over the lanes by halves: a fixed tree, the same bits every time. The halves stay in registers; a loop over an array of
// the lanes stays a loop, through memory (softmax of 10 columns: 12.9 against 10.3 us for 256 rows).
template <class T, int BYTES> struct piece { typedef T type __attribute__((vector_size(BYTES))); };
template <class T, int BYTES, class F> FD_INLINE T fold(typename piece<T, BYTES>::type v, F f) {
  if constexpr (BYTES == sizeof(T)) {
    return v[0];
  } else {
    typename piece<T, BYTES / 2>::type half[2];
    __builtin_memcpy(half, &v, sizeof v);
    return fold<T, BYTES / 2>(f(half[0], half[1]), f);
  }
}
template <class T> FD_INLINE T hsum(vec<T> v) {
  return fold<T, FD_VECTOR_BYTES>(v, [](auto a, auto b) __attribute__((always_inline)) { return a + b; });
}
template <class T> FD_INLINE T hmax(vec<T> v) {
  return fold<T, FD_VECTOR_BYTES>(v, [](auto a, auto b) __attribute__((always_inline)) { return a > b ? a : b; });
}
// True where any lane of a comparison holds.
template <class I> FD_INLINE bool any(I mask) {
  const vec<int64_t> words = (vec<int64_t>)mask;
  auto either = [](auto a, auto b) __attribute__((always_inline)) { return a | b; };
  return fold<int64_t, FD_VECTOR_BYTES>(words, either) != 0;
}

// IEEE-ordered: where a lane is NaN, b comes out (write max_(0, x) so that a NaN in x stays a NaN).
FD_INLINE vec<float> max_(vec<float> a, vec<float> b) {
#if FD_LEVEL == FD_AVX512
  return (vec<float>)_mm512_max_ps((__m512)a, (__m512)b);
#elif FD_LEVEL == FD_AVX2
  return (vec<float>)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (vec<float>)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}
FD_INLINE vec<float> min_(vec<float> a, vec<float> b) {
#if FD_LEVEL == FD_AVX512
  return (vec<float>)_mm512_min_ps((__m512)a, (__m512)b);
#elif FD_LEVEL == FD_AVX2
  return (vec<float>)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (vec<float>)_mm_min_ps((__m128)a, (__m128)b);
#else
  return a < b ? a : b;
#endif
}
FD_INLINE vec<double> max_(vec<double> a, vec<double> b) {
#if FD_LEVEL == FD_AVX512
  return (vec<double>)_mm512_max_pd((__m512d)a, (__m512d)b);
#elif FD_LEVEL == FD_AVX2
  return (vec<double>)_mm256_max_pd((__m256d)a, (__m256d)b);
#elif defined(__SSE2__)
  return (vec<double>)_mm_max_pd((__m128d)a, (__m128d)b);
#else
  return a > b ? a : b;
#endif
}
FD_INLINE vec<double> min_(vec<double> a, vec<double> b) {
#if FD_LEVEL == FD_AVX512
  return (vec<double>)_mm512_min_pd((__m512d)a, (__m512d)b);
#elif FD_LEVEL == FD_AVX2
  return (vec<double>)_mm256_min_pd((__m256d)a, (__m256d)b);
#elif defined(__SSE2__)
  return (vec<double>)_mm_min_pd((__m128d)a, (__m128d)b);
#else
  return a < b ? a : b;
#endif
}
FD_INLINE vec<float> sqrt_(vec<float> a) {
#if FD_LEVEL == FD_AVX512
  return (vec<float>)_mm512_sqrt_ps((__m512)a);
#elif FD_LEVEL == FD_AVX2
  return (vec<float>)_mm256_sqrt_ps((__m256)a);
#else
  for (int i = 0; i < lanes<float>; i++) a[i] = __builtin_sqrtf(a[i]);
  return a;
#endif
}
FD_INLINE vec<double> sqrt_(vec<double> a) {
#if FD_LEVEL == FD_AVX512
  return (vec<double>)_mm512_sqrt_pd((__m512d)a);
#elif FD_LEVEL == FD_AVX2
  return (vec<double>)_mm256_sqrt_pd((__m256d)a);
#else
  for (int i = 0; i < lanes<double>; i++) a[i] = __builtin_sqrt(a[i]);
  return a;
#endif
}

}  // namespace FD_NS
