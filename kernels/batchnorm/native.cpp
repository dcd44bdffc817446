// Batch normalisation on one block of columns: statistics, application and gradients, at one SIMD level.
//
//   forward    u = (x - mean) gain + shift,  gain = gamma inv_std,  y = dropout(act(u))
//   backward   dz = act'(u) dropout'(dy),  dbeta = sum dz,  dgamma = sum dz xhat,
//              dx = gain (dz - dbeta / m - xhat dgamma / m)
//
// x is read twice forward and twice backward; everything else of a block's width stays in L1. The derivation and the
// choice of statistics stand in README.md.
#include "batchnorm/table.h"
#include "philox.hpp"
#include "simd.hpp"

namespace FD_NS {

constexpr int WIDTH = FD_BATCHNORM_WIDTH;
constexpr int QUAD = 4;    // rows handled together: one Philox call gives the bits of 4 rows x 32 columns
constexpr int AHEAD = 8;   // rows between a prefetch and its use: 4 to 32 are alike, none costs backward 20 to 200 %
constexpr int GROUP = 8;   // rows whose sum is a tree in registers
constexpr int SPAN = 256;  // rows that add up in T before they go to a float64 total
constexpr int TILE = 32;   // rows that an activation of the table takes at a time: 32 x 128 floats are 16 KB
constexpr int BITS = 8192; // words of 32 keep bits that wait on the stack from the sums to dx
constexpr int FAR = 2;     // a shift more than 2 deviations from the mean costs over 2 bits: choose it again
constexpr int LOOSE = 16;  // |mean| inv_std from which the rounding of the stored mean is put back (README.md)

using Block = fd_batchnorm_block;

FD_INLINE int64_t padded(int64_t cols) { return (cols + 31) / 32 * 32; }
FD_INLINE int least(int64_t a, int64_t b) { return (int)(a < b ? a : b); }

// body(column, lanes in use, column within its panel) over the vectors of one panel's columns [p, p + 32) below cols.
template <class T, class Body> FD_INLINE void each_vector(int64_t p, int64_t cols, Body body) {
  const int end = least(32, cols - p);
  int c = 0;
  for (; c + lanes<T> <= end; c += lanes<T>) body(p + c, lanes<T>, c);
  if (c < end) body(p + c, end - c, c);
}

// body(row, rows in use, panel's first column) over 4 rows x 32 columns.
template <class Body> FD_INLINE void each_quad(const Block& k, int64_t r0, int64_t r1, Body body) {
  for (int64_t r = r0; r < r1; r += QUAD)
    if (r + QUAD <= r1)
      for (int64_t p = 0; p < k.cols; p += 32) body(r, QUAD, p);
    else
      for (int64_t p = 0; p < k.cols; p += 32) body(r, (int)(r1 - r), p);
}

// The rows AHEAD of these at panel p: rows on pages of their own are streams that no hardware prefetcher follows.
template <class T> FD_INLINE void prefetch(const void* a, int64_t stride, int64_t row, int64_t p) {
  if (stride * (int64_t)sizeof(T) < 4096) return;
  const T* next = (const T*)a + (row + AHEAD) * stride + p;
#pragma GCC unroll 4
  for (int i = 0; i < QUAD; i++)
#pragma GCC unroll 4
    for (int c = 0; c < 32; c += 64 / (int)sizeof(T)) __builtin_prefetch(next + i * stride + c);
}

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

// ------------------------------------------------------------------------------------------------ statistics
// p1 += sum (x - shift), p2 += sum (x - shift)^2 over N rows.
template <class T, int N>
FD_INLINE void add_moments(const T* x, int64_t stride, int64_t cols, const T* shift, T* p1, T* p2) {
  for (int64_t p = 0; p < cols; p += 32)
    each_vector<T>(p, cols, [&](int64_t c, int n, int) __attribute__((always_inline)) {
      const vec<T> k = load(shift + c);
      vec<T> s[2] = {}, q[2] = {};
#pragma GCC unroll 8
      for (int i = 0; i < N; i++) {
        const vec<T> d = load_n(x + i * stride + c, n) - k;
        s[i & 1] += d;
        q[i & 1] += d * d;
      }
      store(p1 + c, load(p1 + c) + (s[0] + s[1]));
      store(p2 + c, load(p2 + c) + (q[0] + q[1]));
    });
}

template <class T>
static void shifted_moments(const Block& k, const T* shift, double* s1, double* s2) {
  const int64_t pad = padded(k.cols);
  for (int64_t c = 0; c < pad; c++) s1[c] = s2[c] = 0;
  T p1[WIDTH], p2[WIDTH];
  for (int64_t r0 = 0; r0 < k.rows; r0 += SPAN) {
    const int64_t r1 = r0 + SPAN < k.rows ? r0 + SPAN : k.rows;
    for (int64_t c = 0; c < pad; c++) p1[c] = p2[c] = 0;
    const T* x = (const T*)k.x + r0 * k.x_stride;
    int64_t r = r0;
    for (; r + GROUP <= r1; r += GROUP, x += GROUP * k.x_stride)
      add_moments<T, GROUP>(x, k.x_stride, k.cols, shift, p1, p2);
    for (; r < r1; r++, x += k.x_stride) add_moments<T, 1>(x, k.x_stride, k.cols, shift, p1, p2);
    for (int64_t c = 0; c < pad; c++) s1[c] += p1[c], s2[c] += p2[c];
  }
}

// Mean and biased variance in float64. One pass shifted by the mean of the first rows, which is as good as two passes
// as long as the shift lies within FAR deviations of the mean; else (and only then) a second pass, shifted by the mean.
// Every column's result depends on its own values alone: where the shift stays, the second pass repeats the first.
template <class T>
__attribute__((noinline)) static void statistics(const Block& k, double* mean, double* var) {
  const int64_t pad = padded(k.cols);
  const double m = (double)k.rows;
  const int first = least(GROUP, k.rows);
  T shift[WIDTH];
  double s1[WIDTH];
  for (int64_t c = 0; c < pad; c++) {
    T s = 0;
    if (c < k.cols)
      for (int i = 0; i < first; i++) s += ((const T*)k.x)[i * k.x_stride + c] / (T)first;
    shift[c] = s - s == 0 ? s : 0;  // an infinity must reach the sums as itself
  }
  for (int pass = 0; pass < 2; pass++) {
    int again = 0;
    shifted_moments<T>(k, shift, s1, var);
    for (int64_t c = 0; c < pad; c++) {
      const double d = s1[c] / m, v = var[c] / m - d * d;
      mean[c] = shift[c] + d;
      var[c] = v < 0 ? 0 : v;
      const int far = d * d > FAR * FAR * var[c];
      shift[c] = far ? (T)mean[c] : shift[c];
      again |= far;
    }
    if (!again) return;
  }
}

// ------------------------------------------------------------------------------------------------ the affine map
// u = (x - mean) gain + shift. Centring comes first because x gain + (beta - mean gain) cancels where |mean| is large.
template <class T> struct Affine {
  T mean[WIDTH], gain[WIDTH], shift[WIDTH], rest[WIDTH];
};

// From here on the rounding of the stored mean moves u by more than 16 / 2^24 of a deviation: it is put back.
template <class T> FD_INLINE bool is_loose(T mean, T inv_std) {
  const T ratio = mean * inv_std;
  return ratio > LOOSE || ratio < -LOOSE;
}

// The same arithmetic forward and backward, so that both see the same bits of u and ReLU the same mask. `exact` is the
// float64 mean, or NULL where the stored mean is the mean by definition (running statistics).
template <class T>
__attribute__((noinline)) static void make_affine(const Block& k, const T* mean, const T* inv_std, const double* exact,
                                                  Affine<T>& a) {
  const T *gamma = (const T*)k.gamma, *beta = (const T*)k.beta;
  for (int64_t c = 0; c < k.cols; c++) {
    a.mean[c] = mean[c];
    a.gain[c] = gamma[c] * inv_std[c];
    a.rest[c] = exact && is_loose(mean[c], inv_std[c]) ? (T)(exact[c] - mean[c]) : 0;
    a.shift[c] = (T)((double)beta[c] - (double)a.rest[c] * (double)a.gain[c]);
  }
  for (int64_t c = k.cols; c < padded(k.cols); c++) a.mean[c] = a.gain[c] = a.shift[c] = a.rest[c] = 0;
}

template <class T> FD_INLINE vec<T> affine(vec<T> centred, vec<T> gain, vec<T> shift) { return centred * gain + shift; }

// ------------------------------------------------------------------------------------------------ forward
FD_INLINE void keep_bits(const Block& k, int64_t row, int64_t p, uint32_t bits[QUAD]) {
  philox_keep_4x32((uint32_t)(k.first_row + row), (uint32_t)((k.first_col + p) / 8), k.layer, k.step, k.seed,
                   k.threshold, bits);
}
template <class T> FD_INLINE T dropout_scale(const Block& k) { return k.drop ? (T)(65536.0 / k.threshold) : (T)1; }

// y = dropout(relu(u)) on rows [r0, r1), either left out.
template <class T, bool RELU, bool DROP>
static void forward_span(const Block& k, const Affine<T>& a, int64_t r0, int64_t r1) {
  const T scale = dropout_scale<T>(k);
  each_quad(k, r0, r1, [&](int64_t row, int rows, int64_t p) __attribute__((always_inline)) {
    const T* x = (const T*)k.x + row * k.x_stride;
    T* y = (T*)k.y + row * k.y_stride;
    uint32_t bits[QUAD] = {};
    if constexpr (DROP) keep_bits(k, row, p, bits);
    prefetch<T>(k.x, k.x_stride, row, p);
    each_vector<T>(p, k.cols, [&](int64_t c, int used, int at) __attribute__((always_inline)) {
      const vec<T> mean = load(a.mean + c), gain = load(a.gain + c), shift = load(a.shift + c);
#pragma GCC unroll 4
      for (int i = 0; i < rows; i++) {
        vec<T> u = affine<T>(load_n(x + i * k.x_stride + c, used) - mean, gain, shift);
        if constexpr (RELU) u = max_(vec<T>{}, u);
        if constexpr (DROP) u = keep_<T>(bits[i] >> at, u * scale);
        store_n(y + i * k.y_stride + c, u, used);
      }
    });
  });
}

// to = dropout(from) on rows [r0, r1); `to` may be `from`.
template <class T>
static void drop_span(const Block& k, const void* from, int64_t from_stride, void* to, int64_t to_stride, int64_t r0,
                      int64_t r1) {
  const T scale = dropout_scale<T>(k);
  each_quad(k, r0, r1, [&](int64_t row, int rows, int64_t p) __attribute__((always_inline)) {
    const T* x = (const T*)from + row * from_stride;
    T* y = (T*)to + row * to_stride;
    uint32_t bits[QUAD];
    keep_bits(k, row, p, bits);
    each_vector<T>(p, k.cols, [&](int64_t c, int used, int at) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int i = 0; i < rows; i++)
        store_n(y + i * to_stride + c, keep_<T>(bits[i] >> at, load_n(x + i * from_stride + c, used) * scale), used);
    });
  });
}

template <class T> static void apply(const Block& k, const Affine<T>& a) {
  if (k.relu)
    return k.drop ? forward_span<T, true, true>(k, a, 0, k.rows) : forward_span<T, true, false>(k, a, 0, k.rows);
  if (!k.activation)
    return k.drop ? forward_span<T, false, true>(k, a, 0, k.rows) : forward_span<T, false, false>(k, a, 0, k.rows);
  for (int64_t r = 0; r < k.rows; r += TILE) {  // u, the activation and the mask pass over y while it is in L1
    const int64_t r1 = r + least(TILE, k.rows - r);
    forward_span<T, false, false>(k, a, r, r1);
    T* y = (T*)k.y + r * k.y_stride;
    k.activation->forward[sizeof(T) == 8](y, y, r1 - r, k.cols, k.y_stride, k.y_stride, k.alpha, k.slope);
    if (k.drop) drop_span<T>(k, k.y, k.y_stride, k.y, k.y_stride, r, r1);
  }
}

template <class T> static void forward(const Block* block) {
  const Block& k = *block;
  double exact[WIDTH], var[WIDTH];
  statistics<T>(k, exact, var);
  T *mean = (T*)k.mean, *inv_std = (T*)k.inv_std;
  for (int64_t c = 0; c < k.cols; c++) {
    mean[c] = (T)exact[c];
    inv_std[c] = (T)(1 / __builtin_sqrt(var[c] + k.eps));
  }
  if (k.rows > 1) {  // one row says nothing about the spread
    T *running_mean = (T*)k.running_mean, *running_var = (T*)k.running_var;
    const double unbiased = (double)k.rows / (double)(k.rows - 1);
    for (int64_t c = 0; c < k.cols; c++) {
      running_mean[c] = (T)(k.decay * running_mean[c] + (1 - k.decay) * exact[c]);
      running_var[c] = (T)(k.decay * running_var[c] + (1 - k.decay) * unbiased * var[c]);
    }
  }
  Affine<T> a;
  make_affine<T>(k, mean, inv_std, exact, a);
  apply<T>(k, a);
}

template <class T> static void inference(const Block* block) {
  const Block& k = *block;
  T inv_std[WIDTH];
  for (int64_t c = 0; c < k.cols; c++) inv_std[c] = (T)(1 / __builtin_sqrt(((const T*)k.running_var)[c] + k.eps));
  Affine<T> a;
  make_affine<T>(k, (const T*)k.running_mean, inv_std, nullptr, a);
  apply<T>(k, a);
}

// The weights and the bias of a dense layer with the normalisation behind it in them; gains are rounded once.
template <class T> static void fold(const Block* block) {
  const Block& k = *block;
  const T *gamma = (const T*)k.gamma, *beta = (const T*)k.beta, *bias = (const T*)k.bias;
  T gain[WIDTH];
  for (int64_t c = 0; c < k.cols; c++) {
    const double g = gamma[c] / __builtin_sqrt(((const T*)k.running_var)[c] + k.eps);
    const double shift = (bias ? bias[c] : 0) - (double)((const T*)k.running_mean)[c];
    gain[c] = (T)g;
    ((T*)k.folded)[c] = (T)(shift * g + beta[c]);
  }
  for (int64_t row = 0; row < k.rows; row++)
    for (int64_t p = 0; p < k.cols; p += 32)
      each_vector<T>(p, k.cols, [&](int64_t c, int used, int) __attribute__((always_inline)) {
        const vec<T> w = load_n((const T*)k.x + row * k.x_stride + c, used);
        store_n((T*)k.y + row * k.y_stride + c, w * load_n(gain + c, used), used);
      });
}

// ------------------------------------------------------------------------------------------------ backward
// Dropout's keep bits, drawn for the sums and used again for dx as far as they fit; beyond, they are drawn again.
struct Bits {
  uint32_t word[BITS];
  FD_INLINE uint32_t* at(const Block& k, int64_t row, int64_t p) {
    const int64_t place = row * (padded(k.cols) / 32) + p / 32 * QUAD;  // row is a multiple of 4
    return place + QUAD <= BITS ? word + place : nullptr;
  }
};

// dz = relu'(u) dropout'(dy), either left out.
template <class T, bool RELU, bool DROP>
FD_INLINE vec<T> through(vec<T> dy, vec<T> centred, vec<T> gain, vec<T> shift, T scale, uint32_t bits) {
  if constexpr (DROP) dy = keep_<T>(bits, dy * scale);
  if constexpr (RELU) dy = affine<T>(centred, gain, shift) <= 0 ? vec<T>{} : dy;
  return dy;
}

// p1 += sum dz, p2 += sum dz (x - mean) on rows [r0, r1).
template <class T, bool RELU, bool DROP>
static void sum_span(const Block& k, const Affine<T>& a, const void* from, int64_t stride, int64_t r0, int64_t r1,
                     T* p1, T* p2, Bits* kept) {
  const T scale = dropout_scale<T>(k);
  each_quad(k, r0, r1, [&](int64_t row, int rows, int64_t p) __attribute__((always_inline)) {
    const T *x = (const T*)k.x + row * k.x_stride, *dy = (const T*)from + row * stride;
    uint32_t bits[QUAD] = {};
    if constexpr (DROP) {
      keep_bits(k, row, p, bits);
      if (uint32_t* place = kept->at(k, row, p)) __builtin_memcpy(place, bits, sizeof bits);
    }
    prefetch<T>(k.x, k.x_stride, row, p);
    prefetch<T>(from, stride, row, p);
    each_vector<T>(p, k.cols, [&](int64_t c, int used, int at) __attribute__((always_inline)) {
      const vec<T> mean = load(a.mean + c), gain = load(a.gain + c), shift = load(a.shift + c);
      vec<T> s[2] = {}, q[2] = {};
#pragma GCC unroll 4
      for (int i = 0; i < rows; i++) {
        const vec<T> t = load_n(x + i * k.x_stride + c, used) - mean;
        const vec<T> d = load_n(dy + i * stride + c, used);
        const vec<T> dz = through<T, RELU, DROP>(d, t, gain, shift, scale, bits[i] >> at);
        s[i & 1] += dz;
        q[i & 1] += dz * t;
      }
      store(p1 + c, load(p1 + c) + (s[0] + s[1]));
      store(p2 + c, load(p2 + c) + (q[0] + q[1]));
    });
  });
}

// dx = (dz - (x - mean) along - across) gain.
template <class T, bool RELU, bool DROP>
static void finish(const Block& k, const Affine<T>& a, const void* from, int64_t stride, const T* along,
                   const T* across, Bits* kept) {
  const T scale = dropout_scale<T>(k);
  each_quad(k, 0, k.rows, [&](int64_t row, int rows, int64_t p) __attribute__((always_inline)) {
    const T *x = (const T*)k.x + row * k.x_stride, *dy = (const T*)from + row * stride;
    T* dx = (T*)k.dx + row * k.dx_stride;
    uint32_t bits[QUAD] = {};
    if constexpr (DROP) {
      if (const uint32_t* place = kept->at(k, row, p)) __builtin_memcpy(bits, place, sizeof bits);
      else keep_bits(k, row, p, bits);
    }
    prefetch<T>(k.x, k.x_stride, row, p);
    prefetch<T>(from, stride, row, p);
    each_vector<T>(p, k.cols, [&](int64_t c, int used, int at) __attribute__((always_inline)) {
      const vec<T> mean = load(a.mean + c), gain = load(a.gain + c), shift = load(a.shift + c);
      const vec<T> e = load(along + c), f = load(across + c);
#pragma GCC unroll 4
      for (int i = 0; i < rows; i++) {
        const vec<T> t = load_n(x + i * k.x_stride + c, used) - mean;
        const vec<T> d = load_n(dy + i * stride + c, used);
        const vec<T> dz = through<T, RELU, DROP>(d, t, gain, shift, scale, bits[i] >> at);
        store_n(dx + i * k.dx_stride + c, (dz - t * e - f) * gain, used);
      }
    });
  });
}

// The same with an activation of the table: u again (and act(u) where the derivative is made from it), tile by tile.
template <class T>
static void backward_tiles(const Block& k, const Affine<T>& a, int64_t r0, int64_t r1, T* p1, T* p2) {
  T saved[TILE * WIDTH];
  Block u = k;
  u.y = saved;
  u.y_stride = padded(k.cols);
  const int wide = sizeof(T) == 8;
  for (int64_t r = r0; r < r1; r += TILE) {
    const int64_t n = least(TILE, r1 - r);
    u.x = (const T*)k.x + r * k.x_stride;
    forward_span<T, false, false>(u, a, 0, n);
    if (k.activation->saves_output)
      k.activation->forward[wide](saved, saved, n, k.cols, u.y_stride, u.y_stride, k.alpha, k.slope);
    T* dx = (T*)k.dx + r * k.dx_stride;
    const T* dy = (const T*)k.dy + r * k.dy_stride;
    if (k.drop) drop_span<T>(k, k.dy, k.dy_stride, k.dx, k.dx_stride, r, r + n);
    k.activation->backward[wide](k.drop ? dx : dy, saved, dx, n, k.cols, k.drop ? k.dx_stride : k.dy_stride, u.y_stride,
                                 k.dx_stride, k.alpha, k.slope, k.dslope);
    sum_span<T, false, false>(k, a, k.dx, k.dx_stride, r, r + n, p1, p2, nullptr);
  }
}

template <class T> static void backward(const Block* block) {
  const Block& k = *block;
  const int64_t pad = padded(k.cols);
  const T *mean = (const T*)k.mean, *inv_std = (const T*)k.inv_std;
  Affine<T> a;
  double s1[WIDTH], s2[WIDTH];
  int loose = 0;
  if (k.training)
    for (int64_t c = 0; c < k.cols; c++) loose |= is_loose(mean[c], inv_std[c]);
  if (loose) statistics<T>(k, s1, s2);  // the float64 mean again, bit for bit
  make_affine<T>(k, mean, inv_std, loose ? s1 : nullptr, a);

  if (k.dslope)
    for (int64_t c = 0; c < k.cols; c++) ((T*)k.dslope)[c] = 0;
  Bits kept;
  T p1[WIDTH], p2[WIDTH];
  for (int64_t c = 0; c < pad; c++) s1[c] = s2[c] = 0;
  for (int64_t r = 0; r < k.rows; r += SPAN) {
    const int64_t r1 = r + least(SPAN, k.rows - r);
    for (int64_t c = 0; c < pad; c++) p1[c] = p2[c] = 0;
    if (k.relu && k.drop) sum_span<T, true, true>(k, a, k.dy, k.dy_stride, r, r1, p1, p2, &kept);
    else if (k.relu) sum_span<T, true, false>(k, a, k.dy, k.dy_stride, r, r1, p1, p2, &kept);
    else if (k.activation) backward_tiles<T>(k, a, r, r1, p1, p2);
    else if (k.drop) sum_span<T, false, true>(k, a, k.dy, k.dy_stride, r, r1, p1, p2, &kept);
    else sum_span<T, false, false>(k, a, k.dy, k.dy_stride, r, r1, p1, p2, &kept);
    for (int64_t c = 0; c < pad; c++) s1[c] += p1[c], s2[c] += p2[c];
  }

  T along[WIDTH], across[WIDTH];
  const double share = k.training ? 1.0 / (double)k.rows : 0;
  for (int64_t c = 0; c < pad; c++) along[c] = across[c] = 0;
  for (int64_t c = 0; c < k.cols; c++) {
    const double dgamma = (s2[c] - a.rest[c] * s1[c]) * inv_std[c];  // xhat = (x - mean - rest) inv_std
    ((T*)k.dbeta)[c] = (T)s1[c];
    ((T*)k.dgamma)[c] = (T)dgamma;
    if (!k.training) continue;
    const double e = dgamma * inv_std[c] * share;
    along[c] = (T)e;
    across[c] = (T)(s1[c] * share - e * a.rest[c]);
  }
  if (k.relu && k.drop) finish<T, true, true>(k, a, k.dy, k.dy_stride, along, across, &kept);
  else if (k.relu) finish<T, true, false>(k, a, k.dy, k.dy_stride, along, across, &kept);
  else if (k.activation) finish<T, false, false>(k, a, k.dx, k.dx_stride, along, across, &kept);
  else if (k.drop) finish<T, false, true>(k, a, k.dy, k.dy_stride, along, across, &kept);
  else finish<T, false, false>(k, a, k.dy, k.dy_stride, along, across, &kept);
}

}  // namespace FD_NS

extern "C" const fd_batchnorm_table FD_SYMBOL(fd_batchnorm) = {
    {FD_NS::forward<float>, FD_NS::forward<double>},
    {FD_NS::inference<float>, FD_NS::inference<double>},
    {FD_NS::backward<float>, FD_NS::backward<double>},
    {FD_NS::fold<float>, FD_NS::fold<double>},
};
