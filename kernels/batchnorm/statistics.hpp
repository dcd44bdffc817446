// Mean and variance of a block's columns in float64, and the affine map that follows from them.
//
// Everything here is per column: the loops run over `padded(cols)` entries of vectors in scratch (zeros above the columns),
// so that they are whole registers for any number of columns.
#pragma once
#include "batchnorm/table.h"
#include "simd.hpp"

namespace FD_NS {

constexpr int WIDTH = FD_BATCHNORM_WIDTH;
constexpr int STRIP = 32;  // columns handled together: those of a panel, and of a word of keep bits
constexpr int GROUP = 8;   // rows whose sum is a tree in registers
constexpr int SPAN = 256;  // rows that add up in T before they go to a float64 total
constexpr int FAR = 2;     // a shift more than 2 deviations from the mean costs over 2 bits: choose it again
constexpr int LOOSE = 16;  // |mean| inv_std from which the rounding of the stored mean is put back (README.md)

using Block = fd_batchnorm_block;

FD_INLINE int64_t padded(int64_t cols) { return (cols + STRIP - 1) / STRIP * STRIP; }
FD_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// u = (x - mean) gain + shift. Centring comes first because x gain + (beta - mean gain) cancels where |mean| is large.
// Constant distances between the four: the sweeps reach them from one register.
template <class T> struct Affine {
  T mean[WIDTH], gain[WIDTH], shift[WIDTH], rest[WIDTH];
};

// Hands out a block's scratch. Passed by value: what a function takes is free again when it returns.
struct Room {
  char* next;
  template <class T> FD_INLINE Affine<T>& affine() { return *take<Affine<T>>(1); }
  template <class T> FD_INLINE T* take(int64_t count) {
    T* const taken = (T*)next;
    next += count * (int64_t)sizeof(T);
    return taken;
  }
};

// body(column) for independent columns: the compiler need not prove that vectors in scratch do not overlap.
template <class Body> FD_INLINE void each_column(int64_t pad, Body body) {
#pragma GCC ivdep
  for (int64_t c = 0; c < pad; c++) body(c);
}

template <class T> FD_INLINE void copy_padded(const void* from, T* to, int64_t cols) {
  __builtin_memcpy(to, from, cols * sizeof(T));
  __builtin_memset(to + cols, 0, (padded(cols) - cols) * sizeof(T));
}

// Columns before the first whole register of a matrix whose rows are aligned alike: NumPy's large arrays begin 16 bytes
// behind a line, and a register across two lines costs two loads (forward of (256, 512): 28.3 us, 26.8 with this).
template <class T> FD_INLINE int64_t head_of(const T* a, int64_t stride, int64_t cols) {
  return stride * (int64_t)sizeof(T) % FD_VECTOR_BYTES ? 0 : before_aligned(a, cols);
}

// p1 += sum (x - shift), p2 += sum (x - shift)^2 over N rows.
template <class T, int N>
FD_INLINE void add_moments(const T* x, int64_t stride, int64_t cols, int64_t head, const T* shift, T* p1, T* p2) {
  constexpr int L = lanes<T>;
  auto vectors = [&](int64_t c, int n) __attribute__((always_inline)) {
    const vec<T> k = load_n(shift + c, n);
    vec<T> s[2] = {}, q[2] = {};
#pragma GCC unroll 8
    for (int i = 0; i < N; i++) {
      const vec<T> d = load_n(x + i * stride + c, n) - k;
      s[i & 1] += d;
      q[i & 1] += d * d;
    }
    store_n(p1 + c, load_n(p1 + c, n) + (s[0] + s[1]), n);
    store_n(p2 + c, load_n(p2 + c, n) + (q[0] + q[1]), n);
  };
  int64_t c = head;
  if (head) vectors((int64_t)0, (int)head);
  for (; c + L <= cols; c += L) vectors(c, L);
  if (c < cols) vectors(c, (int)(cols - c));
}

template <class T>
static void shifted_moments(const Block& k, Room room, const T* shift, double* s1, double* s2) {
  const int64_t cols = k.cols, pad = padded(cols), stride = k.x_stride, rows = k.rows;
  const T* x = (const T*)k.x;
  const int64_t head = head_of(x, stride, cols);
  T *const p1 = room.take<T>(pad), *const p2 = room.take<T>(pad);
  each_column(pad, [&](int64_t c) { s1[c] = s2[c] = 0; });
  for (int64_t r = 0; r < rows;) {
    const int64_t end = least(rows, r + SPAN);
    each_column(pad, [&](int64_t c) { p1[c] = p2[c] = 0; });
    for (; r + GROUP <= end; r += GROUP, x += GROUP * stride) add_moments<T, GROUP>(x, stride, cols, head, shift, p1, p2);
    for (; r < end; r++, x += stride) add_moments<T, 1>(x, stride, cols, head, shift, p1, p2);
    each_column(pad, [&](int64_t c) { s1[c] += p1[c], s2[c] += p2[c]; });
  }
}

// Mean and biased variance. One pass shifted by the mean of the first rows, which is as good as two passes as long as the
// shift lies within FAR deviations of the mean; else (and only then) a second pass, shifted by the mean. Every column's
// result depends on its own values alone: where the shift stays, the second pass repeats the first.
template <class T>
__attribute__((noinline)) static void statistics(const Block& k, Room room, double* mean, double* var) {
  const int64_t pad = padded(k.cols);
  const double m = (double)k.rows;
  const int first = (int)least(GROUP, k.rows);
  const T part = T(1) / (T)first;
  T *const shift = room.take<T>(pad), *const sum = room.take<T>(pad);
  double* const s1 = room.take<double>(pad);
  each_column(pad, [&](int64_t c) { shift[c] = 0; });
  for (int i = 0; i < first; i++) {
    copy_padded((const T*)k.x + i * k.x_stride, sum, k.cols);
    each_column(pad, [&](int64_t c) { shift[c] += sum[c] * part; });
  }
  each_column(pad, [&](int64_t c) { shift[c] = shift[c] - shift[c] == 0 ? shift[c] : 0; });  // an infinity must reach the sums
  for (int pass = 0; pass < 2; pass++) {
    int64_t again = 0;
    shifted_moments<T>(k, room, shift, s1, var);
    each_column(pad, [&](int64_t c) {
      const double d = s1[c] / m, v = var[c] / m - d * d;
      mean[c] = shift[c] + d;
      var[c] = v < 0 ? 0 : v;
      const bool far = d * d > FAR * FAR * var[c];
      shift[c] = far ? (T)mean[c] : shift[c];
      again |= far;
    });
    if (!again) return;
  }
}


// From here on the rounding of the stored mean moves u by more than 16 / 2^24 of a deviation: it is put back.
template <class T> FD_INLINE bool is_loose(T mean, T inv_std) {
  const T ratio = mean * inv_std;
  return (ratio > LOOSE) | (ratio < -LOOSE);
}

// The same arithmetic forward and backward, so that both see the same bits of u and ReLU the same mask. `exact` is the
// float64 mean, or NULL where the stored mean is the mean by definition (running statistics). a.mean is set.
template <class T>
__attribute__((noinline)) static void make_affine(const Block& k, Room room, const T* inv_std, const double* exact, Affine<T>& a) {
  const int64_t pad = padded(k.cols);
  T *const gamma = room.take<T>(pad), *const beta = room.take<T>(pad);
  copy_padded(k.gamma, gamma, k.cols);
  copy_padded(k.beta, beta, k.cols);
  each_column(pad, [&](int64_t c) {
    a.gain[c] = gamma[c] * inv_std[c];
    a.rest[c] = 0;
  });
  if (exact)
    each_column(pad, [&](int64_t c) { a.rest[c] = is_loose(a.mean[c], inv_std[c]) ? (T)(exact[c] - a.mean[c]) : 0; });
  each_column(pad, [&](int64_t c) { a.shift[c] = (T)((double)beta[c] - (double)a.rest[c] * (double)a.gain[c]); });
}

}  // namespace FD_NS
