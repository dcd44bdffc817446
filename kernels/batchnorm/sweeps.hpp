// Sweeps over a block's rows once its columns' constants are known: apply forward, sums and gradient backward.
//
// Rows come in small groups, columns in strips of 32; a strip's constants are read once for a group. The template
// parameter S is the distance between rows: 32 for a panel (one strip, its padding computed along: all of its constants
// are 0), 0 where it is known at run time only. A constant makes the addresses of a group one base and offsets; without
// it the addresses of 4 rows of 3 arrays fill the registers, and spilling them cost twice the arithmetic. For the same
// reason whatever a loop needs of the block is copied into locals first: a store through T* may change a struct as far as
// the compiler knows.
//
// Where an element passes (ReLU's and dropout's masks) is one bit, in words of 32 columns [strip][row]. They wait in
// scratch from the sums to the gradient.
#pragma once
#include "batchnorm/statistics.hpp"
#include "philox.hpp"

namespace FD_NS {

constexpr int QUAD = 4;  // rows of a group; sums of a group are a tree in registers
constexpr int DRAW = 8;  // rows whose keep bits are drawn together

// v where its bit is set, +0 elsewhere (also for NaN).
template <class T> FD_INLINE vec<T> keep_(uint32_t bits, vec<T> v) {
#if FD_LEVEL == FD_AVX512
  if constexpr (sizeof(T) == 4) return (vec<T>)_mm512_maskz_mov_ps((__mmask16)bits, (__m512)v);
  else return (vec<T>)_mm512_maskz_mov_pd((__mmask8)bits, (__m512d)v);
#else
  typedef typename int_of<T>::type I;
  ivec<T> bit;
  for (int i = 0; i < lanes<T>; i++) bit[i] = (I)1 << i;
  return (vec<T>)((ivec<T>)v & ((splat<I>((I)bits) & bit) == bit));
#endif
}

// A bit per lane: not (v <= 0), so that NaN passes a ReLU.
template <class T> FD_INLINE uint32_t passes(vec<T> v) {
#if FD_LEVEL == FD_AVX512
  if constexpr (sizeof(T) == 4) return _mm512_cmp_ps_mask((__m512)v, _mm512_setzero_ps(), _CMP_NLE_UQ);
  else return _mm512_cmp_pd_mask((__m512d)v, _mm512_setzero_pd(), _CMP_NLE_UQ);
#else
  uint32_t bits = 0;
  for (int i = 0; i < lanes<T>; i++) bits |= (uint32_t)!(v[i] <= 0) << i;
  return bits;
#endif
}

template <class T> FD_INLINE vec<T> affine(vec<T> centred, vec<T> gain, vec<T> shift) { return centred * gain + shift; }
template <class T> FD_INLINE T dropout_scale(const Block& k) { return k.drop ? (T)(65536.0 / k.threshold) : (T)1; }

// body(first row, rows) over groups of N rows, then the rest one by one. Both numbers are constants to the body: sums in an
// array that is indexed by a run-time row would live in memory.
template <int N, class Body> FD_INLINE void each_group(int64_t r0, int64_t r1, Body body) {
  int64_t r = r0;
  for (; r + N <= r1; r += N) body(r, N);
  for (; r < r1; r++) body(r, 1);
}

// The same from the last rows to the first: the sweep before has left the last ones in the caches. With four rows instead
// of two in finish_rows it takes backward of (256, 512) from 35 to 32.5 us; forward gains nothing (18.9 to 19.6 us).
template <int N, class Body> FD_INLINE void each_group_down(int64_t rows, Body body) {
  int64_t r = rows;
  for (; r >= N; r -= N) body(r - N, N);
  for (; r > 0; r--) body(r - 1, 1);
}

// body(column, lanes in use) over the vectors of a row. A head of `head` columns comes first where no word of bits is read:
// those want vectors that begin at a multiple of their lanes.
template <class T, int S, class Body> FD_INLINE void each_vector(int64_t cols, int64_t head, Body body) {
  constexpr int L = lanes<T>;
  if constexpr (S) {
#pragma GCC unroll 2
    for (int64_t c = 0; c < STRIP; c += L) body(c, L);
  } else {
    int64_t c = head;
    if (head) body((int64_t)0, (int)head);
    for (; c + L <= cols; c += L) body(c, L);
    if (c < cols) body(c, (int)(cols - c));
  }
}

// ------------------------------------------------------------------------------------------------ keep bits
// The word of a column's strip and a row.
FD_INLINE uint32_t* words(uint32_t* bits, int64_t rows, int64_t c, int64_t row) {
  return bits + c / STRIP * (rows + DRAW) + row;
}

// Dropout's bits of rows [r0, r1) into the words of all strips. r0 is a multiple of DRAW.
__attribute__((noinline)) static void draw_bits(const Block& k, uint32_t* bits, int64_t r0, int64_t r1) {
  const uint32_t layer = k.layer, step = k.step, threshold = k.threshold;
  const uint64_t seed = k.seed;
  const int64_t rows = k.rows, cols = k.cols, first_row = k.first_row, first_col = k.first_col;
  for (int64_t p = 0; p < cols; p += STRIP)
    for (int64_t r = r0; r < r1; r += DRAW)
      philox_keep_8x32((uint32_t)(first_row + r), (uint32_t)((first_col + p) / 8), layer, step, seed, threshold,
                       words(bits, rows, p, r));
}

// ------------------------------------------------------------------------------------------------ forward
// y = dropout(relu(u)), either left out, on rows [r0, r1).
template <class T, int S, bool RELU, bool DROP>
static void apply_rows(const Block& k, const Affine<T>& a, int64_t r0, int64_t r1) {
  const int64_t xs = S ? S : k.x_stride, ys = S ? S : k.y_stride, all_rows = k.rows, cols = k.cols;
  const T* const x = (const T*)k.x;
  T* const y = (T*)k.y;
  uint32_t* const bits = k.bits;
  const vec<T> scale = splat(dropout_scale<T>(k));
  const int64_t head = S || DROP ? 0 : head_of(y, ys, cols);
  each_group<QUAD>(r0, r1, [&](int64_t r, int rows) __attribute__((always_inline)) {
    const T* from[QUAD];
    T* to[QUAD];
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++) from[i] = x + (r + i) * xs, to[i] = y + (r + i) * ys;
    each_vector<T, S>(cols, head, [&](int64_t c, int n) __attribute__((always_inline)) {
      const vec<T> mean = load_n(a.mean + c, n), gain = load_n(a.gain + c, n), shift = load_n(a.shift + c, n);
      const uint32_t* word = DROP ? words(bits, all_rows, c, r) : nullptr;
#pragma GCC unroll 4
      for (int i = 0; i < rows; i++) {
        vec<T> u = affine<T>(load_n(from[i] + c, n) - mean, gain, shift);
        if constexpr (RELU) u = max_(vec<T>{}, u);
        if constexpr (DROP) u = keep_<T>(word[i] >> c % STRIP, u * scale);
        store_n(to[i] + c, u, n);
      }
    });
  });
}

// The bits of the lanes from column c on, which may begin in one strip and end in the next.
FD_INLINE uint32_t bits_at(const uint32_t* bits, int64_t rows, int64_t cols, int64_t r, int64_t c) {
  uint64_t both = *words((uint32_t*)bits, rows, c / STRIP * STRIP, r);
  if (c / STRIP * STRIP + STRIP < cols) both |= (uint64_t)*words((uint32_t*)bits, rows, c / STRIP * STRIP + STRIP, r) << 32;
  return (uint32_t)(both >> c % STRIP);
}

// Rows that are written side by side past the caches: their vectors must be aligned together.
template <class T, class Body> FD_INLINE void each_far_group(const T* to, int64_t stride, int64_t r0, int64_t r1, Body body) {
  int64_t r = r0;
  if (stride * (int64_t)sizeof(T) % FD_VECTOR_BYTES == 0)
    for (; r + FAR_ROWS <= r1; r += FAR_ROWS) body(r, FAR_ROWS);
  for (; r < r1; r++) body(r, 1);
}

// The same past the caches: the old lines of y need not be read.
template <class T, bool RELU, bool DROP>
static void apply_stream(const Block& k, const Affine<T>& a, int64_t r0, int64_t r1) {
  const int64_t xs = k.x_stride, ys = k.y_stride, cols = k.cols, all_rows = k.rows;
  const T* const x = (const T*)k.x;
  T* const y = (T*)k.y;
  const vec<T> scale = splat(dropout_scale<T>(k));
  const uint32_t* const bits = k.bits;
  each_far_group(y, ys, r0, r1, [&](int64_t r, int rows) __attribute__((always_inline)) {
    each_aligned(y + r * ys, cols, [&](int64_t c, int n) __attribute__((always_inline)) {
      const vec<T> mean = load_n(a.mean + c, n), gain = load_n(a.gain + c, n), shift = load_n(a.shift + c, n);
#pragma GCC unroll 4
      for (int i = 0; i < rows; i++) {
        const T* from = x + (r + i) * xs + c;
        __builtin_prefetch(from + FAR_AHEAD);
        vec<T> u = affine<T>(load_n(from, n) - mean, gain, shift);
        if constexpr (RELU) u = max_(vec<T>{}, u);
        if constexpr (DROP) u = keep_<T>(bits_at(bits, all_rows, cols, r + i, c), u * scale);
        put(y + (r + i) * ys + c, u, n);
      }
    });
  });
}

// to = dropout(from) on rows [r0, r1); `to` may be `from`.
template <class T>
static void drop_rows(const Block& k, const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t r0, int64_t r1) {
  const vec<T> scale = splat(dropout_scale<T>(k));
  uint32_t* const bits = k.bits;
  const int64_t all_rows = k.rows, cols = k.cols;
  for (int64_t r = r0; r < r1; r++)
    each_vector<T, 0>(cols, 0, [&](int64_t c, int n) __attribute__((always_inline)) {
      const vec<T> v = load_n(from + r * from_stride + c, n) * scale;
      store_n(to + r * to_stride + c, keep_<T>(*words(bits, all_rows, c, r) >> c % STRIP, v), n);
    });
}

// ------------------------------------------------------------------------------------------------ backward
// Which elements the gradient passes: all, those with a bit (drawn before), and where ReLU decides: the sign of the
// output y (dropped elements are +0), or of u and the bits.
enum Gate { OPEN, BITS, OUTPUT, SIGN };

// p1 += sum dz, p2 += sum dz (x - mean) on rows [r0, r1), dz = dy scale where an element passes. A ReLU leaves its bits
// for the gradient.
template <class T, int S, Gate GATE>
static void sum_rows(const Block& k, const Affine<T>& a, const T* dy, int64_t dy_stride, int64_t r0, int64_t r1, T* p1,
                     T* p2) {
  constexpr uint32_t LANES = (uint32_t)((1ull << lanes<T>) - 1);
  const int64_t xs = S ? S : k.x_stride, ys = S ? S : k.y_stride, ds = S ? S : dy_stride;
  const int64_t all_rows = k.rows, cols = k.cols;
  const T *const x = (const T*)k.x, *const y = (const T*)k.y;
  uint32_t* const bits = k.bits;
  const bool drop = k.drop, far = k.far;
  const vec<T> scale = splat(dropout_scale<T>(k));
  const int64_t head = S || GATE != OPEN ? 0 : head_of(x, xs, cols);
  each_group<QUAD>(r0, r1, [&](int64_t r, int rows) __attribute__((always_inline)) {
    const T *xr[QUAD], *dr[QUAD];
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++) xr[i] = x + (r + i) * xs, dr[i] = dy + (r + i) * ds;
    each_vector<T, S>(cols, head, [&](int64_t c, int n) __attribute__((always_inline)) {
      const vec<T> mean = load_n(a.mean + c, n);
      uint32_t* word = GATE == OPEN ? nullptr : words(bits, all_rows, c, r);
      vec<T> s[2] = {}, q[2] = {};
#pragma GCC unroll 4
      for (int i = 0; i < rows; i++) {
        if (!S && far) {
          __builtin_prefetch(xr[i] + c + FAR_AHEAD);
          __builtin_prefetch(dr[i] + c + FAR_AHEAD);
        }
        const vec<T> t = load_n(xr[i] + c, n) - mean;
        vec<T> dz = load_n(dr[i] + c, n);
        uint32_t pass = 0;
        if constexpr (GATE == BITS) pass = word[i] >> c % STRIP;
        if constexpr (GATE == OUTPUT) pass = passes<T>(load_n(y + (r + i) * ys + c, n));
        if constexpr (GATE == SIGN) {
          pass = passes<T>(affine<T>(t, load_n(a.gain + c, n), load_n(a.shift + c, n)));
          if (drop) pass &= word[i] >> c % STRIP;
        }
        if constexpr (GATE >= OUTPUT) word[i] = (word[i] & ~(LANES << c % STRIP)) | pass << c % STRIP;
        if constexpr (GATE != OPEN) dz = keep_<T>(pass, dz * scale);
        s[i & 1] += dz;
        q[i & 1] += dz * t;
      }
      store_n(p1 + c, load_n(p1 + c, n) + (s[0] + s[1]), n);
      store_n(p2 + c, load_n(p2 + c, n) + (q[0] + q[1]), n);
    });
  });
}

// dx = (dz - (x - mean) along - across) gain. S < 0: rows of x, dy and dx are equally far apart, so that one offset serves
// all three; else three pointers a row, of which four rows fill the registers.
template <class T, int S, bool GATED>
static void finish_rows(const Block& k, const Affine<T>& a, const T* dy, int64_t dy_stride, const T* along,
                        const T* across) {
  constexpr int ROWS = S ? QUAD : 2;
  const int64_t xs = S > 0 ? S : k.x_stride, to_stride = S > 0 ? S : S ? xs : k.dx_stride, ds = S > 0 ? S : S ? xs : dy_stride;
  const int64_t cols = k.cols, all_rows = k.rows;
  const T* const x = (const T*)k.x;
  T* const dx = (T*)k.dx;
  uint32_t* const bits = k.bits;
  const vec<T> scale = splat(dropout_scale<T>(k));
  const int64_t head = S > 0 || GATED ? 0 : head_of(dx, to_stride, cols);
  each_group_down<ROWS>(all_rows, [&](int64_t r, int rows) __attribute__((always_inline)) {
    int64_t xo[ROWS], yo[ROWS], to[ROWS];
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++) xo[i] = (r + i) * xs, yo[i] = (r + i) * ds, to[i] = (r + i) * to_stride;
    each_vector<T, (S > 0 ? S : 0)>(cols, head, [&](int64_t c, int n) __attribute__((always_inline)) {
      const vec<T> mean = load_n(a.mean + c, n), gain = load_n(a.gain + c, n);
      const vec<T> e = load_n(along + c, n), f = load_n(across + c, n);
      const uint32_t* word = GATED ? words(bits, all_rows, c, r) : nullptr;
#pragma GCC unroll 4
      for (int i = 0; i < rows; i++) {
        vec<T> dz = load_n(dy + c + yo[i], n);
        if constexpr (GATED) dz = keep_<T>(word[i] >> c % STRIP, dz * scale);
        store_n(dx + c + to[i], (dz - (load_n(x + c + xo[i], n) - mean) * e - f) * gain, n);
      }
    });
  });
}

// The same past the caches.
template <class T, bool GATED>
static void finish_stream(const Block& k, const Affine<T>& a, const T* dy, int64_t stride, const T* along,
                          const T* across) {
  const int64_t xs = k.x_stride, to_stride = k.dx_stride, cols = k.cols, all_rows = k.rows;
  const T* const x = (const T*)k.x;
  T* const dx = (T*)k.dx;
  const vec<T> scale = splat(dropout_scale<T>(k));
  const uint32_t* const bits = k.bits;
  each_far_group(dx, to_stride, 0, all_rows, [&](int64_t r, int rows) __attribute__((always_inline)) {
    each_aligned(dx + r * to_stride, cols, [&](int64_t c, int n) __attribute__((always_inline)) {
      const vec<T> mean = load_n(a.mean + c, n), gain = load_n(a.gain + c, n);
      const vec<T> e = load_n(along + c, n), f = load_n(across + c, n);
#pragma GCC unroll 4
      for (int i = 0; i < rows; i++) {
        const T *xr = x + (r + i) * xs + c, *dr = dy + (r + i) * stride + c;
        __builtin_prefetch(xr + FAR_AHEAD);
        __builtin_prefetch(dr + FAR_AHEAD);
        vec<T> dz = load_n(dr, n);
        if constexpr (GATED) dz = keep_<T>(bits_at(bits, all_rows, cols, r + i, c), dz * scale);
        put(dx + (r + i) * to_stride + c, (dz - (load_n(xr, n) - mean) * e - f) * gain, n);
      }
    });
  });
  stream_end();
}

}  // namespace FD_NS
