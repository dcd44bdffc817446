// Loops over blocks for the point functions of points.hpp, softmax over rows, and the tables of table.h.
//
// Every lane is computed by the same operations wherever it stands, so that a block may be cut anywhere without changing a
// bit; sums (softmax, the slopes' gradient) run in an order that the shape alone decides.
#include "activations/points.hpp"
#include "activations/table.h"

namespace FD_NS {

// Bytes of an output from which its stores go past the caches: the old line need not be read first. abs of (4096, 2048) runs
// at 1.19 of NumPy's speed with it and 0.99 without, hard tanh at 1.30 and 1.03. Half of a 32 MB L3: what fits stays there.
constexpr int64_t STREAM_BYTES = 16 << 20;
constexpr int unroll = 4;  // registers per turn: relu in L1 runs 1.3 times as fast as with one

// One row of n elements. With STREAM, y begins at a multiple of the register's size.
template <class F, class T, bool STREAM>
FD_INLINE void forward_row(const T* x, T* y, int64_t n, const T* slope, vec<T> a) {
  constexpr int L = lanes<T>;
  int64_t c = 0;
  for (; c + unroll * L <= n; c += unroll * L) {
    vec<T> v[unroll];
#pragma GCC unroll 4
    for (int u = 0; u < unroll; u++) {
      if (STREAM) __builtin_prefetch(x + c + u * L + LONG_AHEAD);
      v[u] = F::value(load(x + c + u * L), F::per_column ? load(slope + c + u * L) : a);
    }
#pragma GCC unroll 4
    for (int u = 0; u < unroll; u++) {
      if constexpr (STREAM) stream(y + c + u * L, v[u]);
      else store(y + c + u * L, v[u]);
    }
  }
  for (; c < n; c += L) {
    const int left = n - c < L ? (int)(n - c) : L;
    store_n(y + c, F::value(load_n(x + c, left), F::per_column ? load_n(slope + c, left) : a), left);
  }
}

template <class F, class T>
void forward(const void* x_, void* y_, int64_t rows, int64_t cols, int64_t xs, int64_t ys, double alpha, const void* slope_) {
  const T *x = (const T*)x_, *slope = (const T*)slope_;
  T* y = (T*)y_;
  const vec<T> a = splat((T)alpha);
  if (!F::per_column && xs == cols && ys == cols) cols *= rows, rows = rows > 0;
  if (!F::per_column && rows == 1 && cols * (int64_t)sizeof(T) >= STREAM_BYTES) {
    const int head = (int)(-(uintptr_t)y % FD_VECTOR_BYTES / sizeof(T));
    if (head) store_n(y, F::value(load_n(x, head), a), head);
    forward_row<F, T, true>(x + head, y + head, cols - head, slope, a);
    stream_end();
    return;
  }
  for (int64_t r = 0; r < rows; r++, x += xs, y += ys) forward_row<F, T, false>(x, y, cols, slope, a);
}

template <class F, class T>
void backward(const void* dy_, const void* s_, void* dx_, int64_t rows, int64_t cols, int64_t dys, int64_t ss, int64_t dxs,
              double alpha, const void* slope_, void* dslope_) {
  constexpr int L = lanes<T>;
  const T *dy = (const T*)dy_, *s = (const T*)s_, *slope = (const T*)slope_;
  T *dx = (T*)dx_, *dslope = (T*)dslope_;
  if constexpr (F::per_column) {
    // Four rows at a time, their sum in a register: the rounding of the column sum grows with rows / 4, and memory is
    // walked along rows, prefetched where it is far (eight rows of three matrices 8 KB apart outnumber the ways of L1). The
    // order depends on the number of rows alone.
    const bool far = rows * cols * (int64_t)sizeof(T) >= STREAM_BYTES && dxs * sizeof(T) % FD_VECTOR_BYTES == 0;
    const int head = far ? (int)before_aligned(dx, cols) : 0;
    auto group = [&](int64_t r, int64_t c, int count, int n) __attribute__((always_inline)) {
      const vec<T> a = load_n(slope + c, n);
      vec<T> sum{};
#pragma GCC unroll 4
      for (int i = 0; i < count; i++) {
        const T *gr = dy + (r + i) * dys + c, *vr = s + (r + i) * ss + c;
        __builtin_prefetch(gr + FAR_AHEAD);
        __builtin_prefetch(vr + FAR_AHEAD);
        const vec<T> g = load_n(gr, n), v = load_n(vr, n);
        sum += F::dslope(g, v);
        T* to = dx + (r + i) * dxs + c;
        if (far) put(to, F::backward(g, v, a), n);
        else store_n(to, F::backward(g, v, a), n);
      }
      if (dslope) store_n(dslope + c, load_n(dslope + c, n) + sum, n);
    };
    for (int64_t r = 0; r < rows; r += 4) {
      const int count = rows - r < 4 ? (int)(rows - r) : 4;
      int64_t c = head;
      if (head) group(r, 0, count, head);
      if (count == 4)
        for (; c + L <= cols; c += L) group(r, c, 4, L);
      for (; c < cols; c += L) group(r, c, count, cols - c < L ? (int)(cols - c) : L);
    }
    if (far) stream_end();
  } else {
    const vec<T> a = splat((T)alpha);
    if (dys == cols && ss == cols && dxs == cols) cols *= rows, rows = rows > 0;
    for (int64_t r = 0; r < rows; r++, dy += dys, s += ss, dx += dxs) {
      int64_t c = 0;
      for (; c + unroll * L <= cols; c += unroll * L) {
        vec<T> v[unroll];
#pragma GCC unroll 4
        for (int u = 0; u < unroll; u++) v[u] = F::backward(load(dy + c + u * L), load(s + c + u * L), a);
#pragma GCC unroll 4
        for (int u = 0; u < unroll; u++) store(dx + c + u * L, v[u]);
      }
      for (; c < cols; c += L) {
        const int n = cols - c < L ? (int)(cols - c) : L;
        store_n(dx + c, F::backward(load_n(dy + c, n), load_n(s + c, n), a), n);
      }
    }
  }
}

template <class T> void copy(const void* x_, void* y_, int64_t rows, int64_t cols, int64_t xs, int64_t ys) {
  const T* x = (const T*)x_;
  T* y = (T*)y_;
  if (x == y) return;
  if (xs == cols && ys == cols) cols *= rows, rows = rows > 0;
  for (int64_t r = 0; r < rows; r++, x += xs, y += ys) {
    if (cols == 32) __builtin_memcpy(y, x, 32 * sizeof(T));  // a full panel: in line
    else __builtin_memcpy(y, x, cols * sizeof(T));
  }
}

// Walks one row register by register: visit(offset of each array, lanes that exist).
template <class T, int A, class Visit>
FD_INLINE void along_row(int64_t row, int64_t cols, int64_t width, const int64_t* row_stride, const int64_t* panel_stride,
                         Visit visit) {
  int64_t at[A];
  for (int64_t first = 0, panel = 0; first < cols; first += width, panel++) {
    const int64_t here = cols - first < width ? cols - first : width;
    for (int k = 0; k < A; k++) at[k] = row * row_stride[k] + panel * panel_stride[k];
    int64_t c = 0;
    for (; c + lanes<T> <= here; c += lanes<T>) {  // a constant: whole registers need no mask
      visit(at, lanes<T>);
      for (int k = 0; k < A; k++) at[k] += lanes<T>;
    }
    if (c < here) visit(at, (int)(here - c));
  }
}
// The lanes from n on replaced by `fill`.
template <class T> FD_INLINE vec<T> fill_above(vec<T> v, int n, T fill) {
  if (n < lanes<T>)
    for (int i = 0; i < lanes<T>; i++) v[i] = i < n ? v[i] : fill;
  return v;
}

// A matrix of whole rows that leaves past the caches: a finished row waits in L1 for its sum.
constexpr int ROW_BYTES = 16 << 10;
template <class T> FD_INLINE bool leaves(int64_t rows, int64_t cols, int64_t width) {
  const int64_t bytes = cols * (int64_t)sizeof(T);
  return width >= cols && bytes <= ROW_BYTES && rows * bytes >= STREAM_BYTES;
}

// y = e^(x - max) / sum of these: the largest exponent is 0, nothing overflows. A NaN makes its row NaN.
template <class T>
void softmax_forward(const void* x_, void* y_, int64_t rows, int64_t cols, int64_t width, const int64_t* row_stride,
                     const int64_t* panel_stride) {
  const T* x = (const T*)x_;
  T* y = (T*)y_;
  const T lowest = -__builtin_inf();
  const bool far = leaves<T>(rows, cols, width);
  T waiting[ROW_BYTES / sizeof(T)];
  for (int64_t r = 0; r < rows; r++) {
    vec<T> high = splat(lowest), sum{};
    along_row<T, 2>(r, cols, width, row_stride, panel_stride, [&](const int64_t* at, int n) __attribute__((always_inline)) {
      high = max_(fill_above(load_n(x + at[0], n), n, lowest), high);
    });
    const T top = hmax<T>(high);
    along_row<T, 2>(r, cols, width, row_stride, panel_stride, [&](const int64_t* at, int n) __attribute__((always_inline)) {
      if (far) __builtin_prefetch(x + at[0] + row_stride[0]);  // the next row comes while exponentials are taken
      const vec<T> e = exp_falling_(load_n(x + at[0], n) - top);
      store_n(far ? waiting + at[0] - r * row_stride[0] : y + at[1], e, n);
      sum += fill_above(e, n, T(0));
    });
    const T scale = T(1) / hsum<T>(sum);
    if (far) {
      T* to = y + r * row_stride[1];
      each_aligned(to, cols, [&](int64_t c, int n) __attribute__((always_inline)) {
        put(to + c, load_n(waiting + c, n) * scale, n);
      });
      continue;
    }
    along_row<T, 2>(r, cols, width, row_stride, panel_stride, [&](const int64_t* at, int n) __attribute__((always_inline)) {
      store_n(y + at[1], load_n(y + at[1], n) * scale, n);
    });
  }
  if (far) stream_end();
}

// dx = y (dy - sum over the row of dy y)
template <class T>
void softmax_backward(const void* dy_, const void* y_, void* dx_, int64_t rows, int64_t cols, int64_t width,
                      const int64_t* row_stride, const int64_t* panel_stride) {
  const T *dy = (const T*)dy_, *y = (const T*)y_;
  T* dx = (T*)dx_;
  const bool far = leaves<T>(rows, cols, width);
  for (int64_t r = 0; r < rows; r++) {
    vec<T> sum{};
    along_row<T, 3>(r, cols, width, row_stride, panel_stride, [&](const int64_t* at, int n) __attribute__((always_inline)) {
      sum += load_n(dy + at[0], n) * load_n(y + at[1], n);  // zeros above n
    });
    const T dot = hsum<T>(sum);
    if (far) {
      const T *g = dy + r * row_stride[0], *v = y + r * row_stride[1];
      T* to = dx + r * row_stride[2];
      each_aligned(to, cols, [&](int64_t c, int n) __attribute__((always_inline)) {
        put(to + c, load_n(v + c, n) * (load_n(g + c, n) - dot), n);
      });
      continue;
    }
    along_row<T, 3>(r, cols, width, row_stride, panel_stride, [&](const int64_t* at, int n) __attribute__((always_inline)) {
      store_n(dx + at[2], load_n(y + at[1], n) * (load_n(dy + at[0], n) - dot), n);
    });
  }
  if (far) stream_end();
}

// The functions of common/math.hpp on arrays, for tests and other callers.
#define FD_FUNCTIONS(X) X(exp) X(expm1) X(log) X(log1p) X(tanh) X(erf) X(sin) X(cos)
#define FD_FUNCTION(name)                                                                  \
  template <class T> void name##_array(const void* x_, void* y_, int64_t n) {              \
    const T* x = (const T*)x_;                                                             \
    T* y = (T*)y_;                                                                         \
    for (int64_t i = 0; i < n; i += lanes<T>) {                                            \
      const int m = n - i < lanes<T> ? (int)(n - i) : lanes<T>;                            \
      store_n(y + i, name##_(load_n(x + i, m)), m);                                        \
    }                                                                                      \
  }
FD_FUNCTIONS(FD_FUNCTION)

#define FD_ENTRY(name)                                                                                            \
  {#name, name##_point<float>::saves_output,                                                                      \
   {forward<name##_point<float>, float>, forward<name##_point<double>, double>},                                  \
   {backward<name##_point<float>, float>, backward<name##_point<double>, double>}, name##_point<float>::per_column},
static const fd_activation entries[] = {FD_ACTIVATIONS(FD_ENTRY)};

#define FD_PAIR(name) {#name, {name##_array<float>, name##_array<double>}},
static const fd_function functions[] = {FD_FUNCTIONS(FD_PAIR)};

}  // namespace FD_NS

extern "C" const fd_activation_table FD_SYMBOL(fd_activations) = {
    sizeof(FD_NS::entries) / sizeof(FD_NS::entries[0]), FD_NS::entries};
extern "C" const fd_row_table FD_SYMBOL(fd_row_ops) = {
    {FD_NS::copy<float>, FD_NS::copy<double>},
    {FD_NS::softmax_forward<float>, FD_NS::softmax_forward<double>},
    {FD_NS::softmax_backward<float>, FD_NS::softmax_backward<double>},
    sizeof(FD_NS::functions) / sizeof(FD_NS::functions[0]),
    FD_NS::functions};
