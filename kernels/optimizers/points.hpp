// The updates on one SIMD register, shared by the sweep and by whoever fuses an update into another loop.
// Formulas and papers: reference.py. Plain divisions and square roots: on arrays beyond L2 the sweep waits for memory,
// so estimates with a Newton step buy nothing there and would cost the float64 form and the last bits.
#pragma once
#include "../common/simd.hpp"
#include "table.h"

namespace FD_NS {

// w, v <- SGD with momentum; `MOMENTUM` false: v is not used. L2 is a template argument because 0 * inf would be NaN.
template <class T, bool L2, bool MOMENTUM> struct sgd_point {
  T scale, l2, keep, momentum, rate;
  bool nesterov;
  explicit FD_INLINE sgd_point(const fd_sgd& s)
      : scale((T)s.scale), l2((T)s.l2), keep((T)s.keep), momentum((T)s.momentum), rate((T)s.rate),
        nesterov(s.nesterov != 0) {}
  FD_INLINE void operator()(vec<T>& w, vec<T> g, vec<T>& v) const {
    g = g * scale;
    if constexpr (L2) g = g + l2 * w;
    vec<T> direction = g;
    if constexpr (MOMENTUM) {
      v = momentum * v + g;
      direction = nesterov ? g + momentum * v : v;
    }
    w = w * keep - rate * direction;
  }
};

template <class T, bool L2> struct adam_point {
  T scale, l2, keep, beta1, gain1, beta2, gain2, root, rate, eps;
  explicit FD_INLINE adam_point(const fd_adam& s)
      : scale((T)s.scale), l2((T)s.l2), keep((T)s.keep), beta1((T)s.beta1), gain1((T)s.gain1), beta2((T)s.beta2),
        gain2((T)s.gain2), root((T)s.root), rate((T)s.rate), eps((T)s.eps) {}
  FD_INLINE void operator()(vec<T>& w, vec<T> g, vec<T>& m, vec<T>& v) const {
    g = g * scale;
    if constexpr (L2) g = g + l2 * w;
    m = beta1 * m + gain1 * g;
    v = beta2 * v + gain2 * (g * g);
    w = w * keep - rate * m / (sqrt_(v) * root + eps);
  }
};

}  // namespace FD_NS
