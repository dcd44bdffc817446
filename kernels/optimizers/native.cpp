// Optimiser sweeps over a block of a flat arena: one read and one write of each array.
// Element-wise, so results do not depend on how blocks are shared out; the tail uses the same vector code, masked.
#include "points.hpp"

namespace FD_NS {

template <class T, bool L2, bool MOMENTUM>
static void sgd_sweep(T* w, const T* g, T* v, int64_t n, const fd_sgd& step) {
  const sgd_point<T, L2, MOMENTUM> point(step);
  for (int64_t i = 0; i < n; i += lanes<T>) {
    const int count = n - i < lanes<T> ? (int)(n - i) : lanes<T>;
    vec<T> ww = load_n(w + i, count), vv{};
    if constexpr (MOMENTUM) vv = load_n(v + i, count);
    point(ww, load_n(g + i, count), vv);
    store_n(w + i, ww, count);
    if constexpr (MOMENTUM) store_n(v + i, vv, count);
  }
}
template <class T> static void sgd(void* w, const void* g, void* v, int64_t n, const fd_sgd* step) {
  const bool l2 = step->l2 != 0;
  if (v && l2) sgd_sweep<T, true, true>((T*)w, (const T*)g, (T*)v, n, *step);
  else if (v) sgd_sweep<T, false, true>((T*)w, (const T*)g, (T*)v, n, *step);
  else if (l2) sgd_sweep<T, true, false>((T*)w, (const T*)g, (T*)v, n, *step);
  else sgd_sweep<T, false, false>((T*)w, (const T*)g, (T*)v, n, *step);
}

template <class T, bool L2> static void adam_sweep(T* w, const T* g, T* m, T* v, int64_t n, const fd_adam& step) {
  const adam_point<T, L2> point(step);
  for (int64_t i = 0; i < n; i += lanes<T>) {
    const int count = n - i < lanes<T> ? (int)(n - i) : lanes<T>;
    vec<T> ww = load_n(w + i, count), mm = load_n(m + i, count), vv = load_n(v + i, count);
    point(ww, load_n(g + i, count), mm, vv);
    store_n(w + i, ww, count);
    store_n(m + i, mm, count);
    store_n(v + i, vv, count);
  }
}
template <class T> static void adam(void* w, const void* g, void* m, void* v, int64_t n, const fd_adam* step) {
  if (step->l2 != 0) adam_sweep<T, true>((T*)w, (const T*)g, (T*)m, (T*)v, n, *step);
  else adam_sweep<T, false>((T*)w, (const T*)g, (T*)m, (T*)v, n, *step);
}

// Squares of float32 are exact in float64, so only the sum rounds. Eight accumulators hide the latency of the addition.
template <class T> static double squared_norm(const void* p, int64_t n) {
  const T* g = (const T*)p;
  constexpr int W = lanes<double>, U = 8;  // unrolled, else sum[] lives in memory
  typedef T part __attribute__((vector_size(W * sizeof(T))));
  vec<double> sum[U] = {};
  int64_t i = 0;
  for (; i + U * W <= n; i += U * W)
#pragma GCC unroll 8
    for (int u = 0; u < U; u++) {
      part x;
      __builtin_memcpy(&x, g + i + u * W, sizeof x);
      const vec<double> d = __builtin_convertvector(x, vec<double>);
      sum[u] += d * d;
    }
  double rest = 0;
  for (; i < n; i++) rest += (double)g[i] * (double)g[i];
  return hsum<double>(((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]))) + rest;
}

}  // namespace FD_NS

extern "C" const fd_optimizer_table FD_SYMBOL(fd_optimizers) = {
    {FD_NS::sgd<float>, FD_NS::sgd<double>},
    {FD_NS::adam<float>, FD_NS::adam<double>},
    {FD_NS::squared_norm<float>, FD_NS::squared_norm<double>},
};
