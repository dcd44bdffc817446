// Losses on a block of at most 64 rows: value and gradient while the rows are in cache.
//
// Formulas: reference.py. A row is walked in panels of 32 columns, the order of both layouts, so plain rows and panels
// give the same bits. Lane sums of 32 columns are widened to float64.
#pragma once
#include "../common/math.hpp"
#include "table.h"

namespace FD_NS {

// Lane numbers 0, 1, 2, ...
template <class T> FD_INLINE ivec<T> lane_numbers() {
  ivec<T> v{};
  for (int i = 0; i < lanes<T>; i++) v[i] = i;
  return v;
}
template <class T> FD_INLINE vec<T> keep_n(vec<T> v, int n, T fill) {
  if (n >= lanes<T>) return v;
  return lane_numbers<T>() < (typename int_of<T>::type)n ? v : splat<T>(fill);
}
template <class T> FD_INLINE vec<T> load_fill(const T* p, int n, bool padded, T fill) {
  return keep_n<T>(padded ? load(p) : load_n(p, n), n, fill);
}
// Adds the lanes of v in float64.
FD_INLINE void widen_add(vec<double>& sum, vec<double> v) { sum += v; }
FD_INLINE void widen_add(vec<double>& sum, vec<float> v) {
  typedef float half __attribute__((vector_size(FD_VECTOR_BYTES / 2)));
  half part[2];
  __builtin_memcpy(part, &v, sizeof v);
  sum += __builtin_convertvector(part[0], vec<double>) + __builtin_convertvector(part[1], vec<double>);
}

template <class T> struct row_of {  // one row of an fd_matrix
  static constexpr int WIDTH = 32;  // of a panel
  T* p;
  int64_t panel;
  bool padded;
  FD_INLINE row_of(const fd_matrix& m, int64_t r) : p((T*)m.data + r * m.row), panel(m.panel), padded(m.padded != 0) {}
  FD_INLINE T* at(int64_t c) const { return p + c / WIDTH * panel + c % WIDTH; }
  FD_INLINE vec<T> get(int64_t j, int k, int n, T fill) const {
    return load_fill<T>(p + j * panel + k, n, padded, fill);
  }
  // Writes n lanes; in a padded panel zeros follow to the vector's end.
  FD_INLINE void put(int64_t j, int k, int n, vec<T> v) const {
    if (padded) store(p + j * panel + k, keep_n<T>(v, n, (T)0));
    else store_n(p + j * panel + k, v, n);
  }
  // Zeros in the vectors of the last panel that hold no column.
  FD_INLINE void clear_rest(int64_t cols) const {
    const int used = (int)(cols % WIDTH);
    if (!padded || !used) return;
    for (int k = (used + lanes<T> - 1) / lanes<T> * lanes<T>; k < WIDTH; k += lanes<T>)
      store(p + cols / WIDTH * panel + k, vec<T>{});
  }
};

// f(panel, first column in it, lanes that exist) for each vector of a row; g() after each panel. ONE: the row is at
// most one vector, as with ten classes, and there is no loop.
template <class T, bool ONE, class F, class G> FD_INLINE void walk(int64_t cols, F f, G g) {
  constexpr int L = lanes<T>;
  if constexpr (ONE) {
    f(0, 0, (int)cols);
    g();
    return;
  }
  const int64_t whole = cols / 32;
  for (int64_t j = 0; j < whole; j++) {
#pragma GCC unroll 16
    for (int k = 0; k < 32; k += L) f(j, k, L);
    g();
  }
  const int rest = (int)(cols % 32);
  for (int k = 0; k < rest; k += L) f(whole, k, rest - k < L ? rest - k : L);
  if (rest) g();
}
template <class T, bool ONE, class F> FD_INLINE void walk(int64_t cols, F f) { walk<T, ONE>(cols, f, [] {}); }

// The first column that holds `value`, or -1.
template <class T> static int64_t first_equal(const row_of<T>& x, int64_t cols, T value) {
  for (int64_t c = 0; c < cols; c += 32) {
    const T* p = x.at(c);
    const int n = cols - c < 32 ? (int)(cols - c) : 32;
    int hit = 0;
    for (int k = 0; k < n; k++) hit |= p[k] == value;
    if (hit)
      for (int k = 0;; k++)
        if (p[k] == value) return c + k;
  }
  return -1;
}
// Whether no column before `label` holds `top` (the first maximum wins).
template <class T, bool ONE> FD_INLINE bool comes_first(const row_of<T>& x, int64_t cols, T top, int64_t label) {
  if constexpr (ONE) {
    const vec<T> v = x.get(0, 0, (int)cols, (T)0);
    return !any((ivec<T>)(v == top) & (ivec<T>)(lane_numbers<T>() < (typename int_of<T>::type)label));
  } else {
    return first_equal(x, cols, top) == label;
  }
}
template <class T, bool ONE> FD_INLINE T row_max(const row_of<T>& x, int64_t cols) {
  const T low = -__builtin_inf();
  vec<T> a = splat<T>(low), b = a;
  walk<T, ONE>(cols, [&](int64_t j, int k, int n) __attribute__((always_inline)) {
    vec<T>& top = k / lanes<T> % 2 ? b : a;
    top = max_(x.get(j, k, n, low), top);  // a NaN is passed over here and comes out of the exponentials
  });
  return hmax<T>(max_(a, b));
}

// ------------------------------------------------------------------------------------------- softmax cross-entropy
// Three passes over a few rows at a time (16 KiB of logits and gradients): maximum; exponentials, kept in dz, and their
// sum; scaling. The logarithms and divisions of the rows between them are taken a vector at a time.
template <class T, bool LABELS, bool ONE> static void softmax_rows(const fd_loss_block* b, fd_loss_sum* out) {
  constexpr int L = lanes<T>;
  const T low = -__builtin_inf(), nan = __builtin_nan("");
  const int64_t cols = b->cols;
  const bool gradient = b->dz.data != nullptr;
  int64_t group = 8192 / (cols * (int64_t)sizeof(T));
  group = group < 1 ? 1 : group > FD_LOSS_ROWS ? FD_LOSS_ROWS : group;
  double loss = 0;
  int64_t right = 0;
  for (int64_t first = 0; first < b->rows; first += group) {
    const int rows = (int)(b->rows - first < group ? b->rows - first : group);
    T sum[FD_LOSS_ROWS], picked[FD_LOSS_ROWS], mass[FD_LOSS_ROWS], weight[FD_LOSS_ROWS];
    T gain[FD_LOSS_ROWS], factor[FD_LOSS_ROWS];  // weight * scale, rounded once: p = 1 gives 0; gain * mass / sum
    bool hit[FD_LOSS_ROWS];
    for (int i = 0; i < rows; i++) {
      const int64_t r = first + i;
      const row_of<T> z(b->z, r), t(b->targets, r), e(b->dz, r);
      const T top = row_max<T, ONE>(z, cols);
      int64_t label;
      if constexpr (LABELS) {
        label = b->labels[r];
        const bool known = (uint64_t)label < (uint64_t)cols;
        const T at = known ? *z.at(label) : nan;  // a label out of range gives a NaN loss and no stray access
        picked[i] = at - top;
        hit[i] = at == top && comes_first<T, ONE>(z, cols, top, label);
        mass[i] = 1;
      } else {
        label = first_equal(t, cols, row_max<T, ONE>(t, cols));
        hit[i] = label >= 0 && *z.at(label) == top && comes_first<T, ONE>(z, cols, top, label);
      }
      vec<T> total{}, other{}, dot{}, share{};
      walk<T, ONE>(cols, [&](int64_t j, int k, int n) __attribute__((always_inline)) {
        const vec<T> shifted = z.get(j, k, n, low) - top;
        if constexpr (!LABELS) {
          const vec<T> target = t.get(j, k, n, (T)0);
          dot += keep_n<T>(target * shifted, n, (T)0);
          share += target;
        }
        const vec<T> value = keep_n<T>(exp_falling_(shifted), n, (T)0);
        (k / L % 2 ? other : total) += value;
        if (gradient) e.put(j, k, n, value);
      });
      sum[i] = hsum<T>(total + other);
      if constexpr (!LABELS) picked[i] = hsum<T>(dot), mass[i] = hsum<T>(share);
      weight[i] = b->weight ? ((const T*)b->weight)[r] : (T)1;
    }
    for (int i = rows; i % L; i++) sum[i] = mass[i] = weight[i] = 1, picked[i] = 0;
    for (int i = 0; i < rows; i += L) {
      const vec<T> s = load(sum + i), k = load(weight + i) * (T)b->scale;
      store(gain + i, k);
      store(factor + i, k * load(mass + i) / s);
      store(sum + i, load(mass + i) * log_(s) - load(picked + i));  // from here on the row's loss
    }
    for (int i = 0; i < rows; i++) {
      loss += (double)weight[i] * (double)sum[i];
      right += hit[i] && sum[i] == sum[i];
    }
    if (!gradient) continue;
    for (int i = 0; i < rows; i++) {
      const int64_t r = first + i;
      const row_of<T> t(b->targets, r), e(b->dz, r);
      const T f = factor[i], k = gain[i];
      walk<T, ONE>(cols, [&](int64_t j, int c, int n) __attribute__((always_inline)) {
        vec<T> d = e.get(j, c, n, (T)0) * f;
        if constexpr (!LABELS) d -= t.get(j, c, n, (T)0) * k;
        e.put(j, c, n, d);
      });
      e.clear_rest(cols);
      if constexpr (LABELS)
        if ((uint64_t)b->labels[r] < (uint64_t)cols) *e.at(b->labels[r]) -= k;
    }
  }
  out->loss = loss;
  out->right = (double)right;
}
template <class T, bool LABELS> static void softmax_block(const fd_loss_block* b, fd_loss_sum* out) {
  if (b->cols <= lanes<T>) softmax_rows<T, LABELS, true>(b, out);
  else softmax_rows<T, LABELS, false>(b, out);
}

// ------------------------------------------------------------------------------------- element-wise losses
// point(z, t, loss, gradient); `wrong(z, t)` marks the elements that are predicted wrong.
template <class T> struct binary_point {
  static constexpr double GAIN = 1;
  static constexpr bool COUNTS = true;
  static FD_INLINE void apply(vec<T> z, vec<T> t, vec<T>& loss, vec<T>& gradient) {
    const vec<T> e = exp_falling_(z < 0 ? z : -z);  // exp(-|z|)
    loss = max_(vec<T>{}, z) - z * t + log1p_unit_(e);
    gradient = (z >= 0 ? splat<T>(1) : e) / (e + (T)1) - t;
  }
  static FD_INLINE ivec<T> wrong(vec<T> z, vec<T> t) { return (ivec<T>)(z > 0) ^ (ivec<T>)(t > (T)0.5); }
};
template <class T> struct mse_point {
  static constexpr double GAIN = 2;
  static constexpr bool COUNTS = false;
  static FD_INLINE void apply(vec<T> z, vec<T> t, vec<T>& loss, vec<T>& gradient) {
    gradient = z - t;
    loss = gradient * gradient;
  }
  static FD_INLINE ivec<T> wrong(vec<T>, vec<T>) { return ivec<T>{} - 1; }
};

// One output column: lanes are rows, else 15 of 16 lanes would be idle.
template <class T, template <class> class P> static void column_block(const fd_loss_block* b, fd_loss_sum* out) {
  constexpr int L = lanes<T>;
  T z[FD_LOSS_ROWS] = {}, t[FD_LOSS_ROWS] = {}, k[FD_LOSS_ROWS] = {}, d[FD_LOSS_ROWS];
  const int rows = (int)b->rows;
  for (int r = 0; r < rows; r++) {
    z[r] = *row_of<T>(b->z, r).p;
    t[r] = *row_of<T>(b->targets, r).p;
    k[r] = b->weight ? ((const T*)b->weight)[r] : (T)1;
  }
  const T scale = (T)(b->scale * P<T>::GAIN);
  vec<double> sum{};
  int64_t right = 0;
  for (int i = 0; i < rows; i += L) {
    const int n = rows - i < L ? rows - i : L;
    const vec<T> zz = load(z + i), tt = load(t + i), kk = load(k + i);
    vec<T> loss, gradient;
    P<T>::apply(zz, tt, loss, gradient);
    widen_add(sum, keep_n<T>(loss * kk, n, (T)0));
    store(d + i, gradient * kk * scale);
    const ivec<T> good = (P<T>::wrong(zz, tt) == 0) & (ivec<T>)(loss == loss);
    for (int lane = 0; lane < n; lane++) right -= good[lane];
  }
  out->loss = hsum<double>(sum);
  out->right = (double)right;
  if (!b->dz.data) return;
  for (int r = 0; r < rows; r++) {
    const row_of<T> dz(b->dz, r);
    if (dz.padded)
      for (int c = 0; c < 32; c += L) store(dz.p + c, vec<T>{});
    *dz.p = d[r];
  }
}

template <class T, template <class> class P> static void element_block(const fd_loss_block* b, fd_loss_sum* out) {
  if (b->cols == 1) return column_block<T, P>(b, out);
  const int64_t cols = b->cols;
  const bool gradient = b->dz.data != nullptr;
  double total = 0;
  int64_t right = 0;
  for (int64_t r = 0; r < b->rows; r++) {
    const row_of<T> z(b->z, r), t(b->targets, r), dz(b->dz, r);
    const T weight = b->weight ? ((const T*)b->weight)[r] : (T)1, scale = weight * (T)(b->scale * P<T>::GAIN);
    vec<double> sum{};
    vec<T> part{};
    ivec<T> wrong{};
    walk<T, false>(
        cols,
        [&](int64_t j, int k, int n) __attribute__((always_inline)) {
          const vec<T> zz = z.get(j, k, n, (T)0), tt = t.get(j, k, n, (T)0);
          vec<T> loss, d;
          P<T>::apply(zz, tt, loss, d);
          part += keep_n<T>(loss, n, (T)0);
          if constexpr (P<T>::COUNTS) wrong |= P<T>::wrong(zz, tt);  // equal zeros past the end are right
          if (gradient) dz.put(j, k, n, d * scale);
        },
        [&]() __attribute__((always_inline)) {
          widen_add(sum, part);
          part = vec<T>{};
        });
    const double loss = hsum<double>(sum);
    total += (double)weight * loss;
    if constexpr (P<T>::COUNTS) right += !any(wrong) && loss == loss;
    if (gradient) dz.clear_rest(cols);
  }
  out->loss = total;
  out->right = (double)right;
}

// Sum of weights in float64, four accumulators.
template <class T> static double sum_of(const void* p, int64_t n) {
  const T* x = (const T*)p;
  double part[4] = {};
  int64_t i = 0;
  for (; i + 4 <= n; i += 4)
    for (int k = 0; k < 4; k++) part[k] += (double)x[i + k];
  for (int k = 0; i < n; i++, k++) part[k] += (double)x[i];
  return (part[0] + part[1]) + (part[2] + part[3]);
}

}  // namespace FD_NS
