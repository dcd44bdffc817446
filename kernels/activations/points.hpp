// Point functions of the activations on a register of T: the mathematics alone, no loops. The element-wise loop, the dense
// epilogue and batch norm share them through the table (table.h).
//
//   value(x, a)         y = f(x)
//   backward(dy, s, a)  dx = dy f'(x), from s = y where saves_output, else s = x
//   dslope(dy, s)       what one element adds to the gradient of its column's slope (per_column only)
//
// `a` is the scalar parameter alpha in every lane, or the columns' slopes. Formulas, sources, NaN rules and values at the
// kinks: README.md. max_(c, x) and min_(c, x) with x second let a NaN in x through.
//
// A new activation is one struct here and one entry in FD_ACTIVATIONS, in the order of ACTIVATIONS in reference.py.
#pragma once
#include "common/math.hpp"

#define FD_ACTIVATIONS(X) \
  X(relu) X(abs) X(leaky_relu) X(prelu) X(elu) X(sigmoid) X(tanh) X(hard_tanh) X(softplus) X(gelu) X(gelu_tanh) X(cos)

namespace FD_NS {

template <class T> struct point {
  using V = vec<T>;
  static constexpr bool saves_output = false, per_column = false;
};
// What every struct below opens with: V is a register of T, s comes from the output (or not).
#define FD_POINT(name) template <class T> struct name##_point : point<T>
#define FD_SAVES_OUTPUT using V = vec<T>; static constexpr bool saves_output = true;
#define FD_SAVES_INPUT using V = vec<T>;

FD_POINT(relu) {
  FD_SAVES_OUTPUT
  static FD_INLINE V value(V x, V) { return max_(V{}, x); }
  static FD_INLINE V backward(V dy, V y, V) { return y <= V{} ? V{} : dy; }
};

FD_POINT(abs) {
  FD_SAVES_INPUT
  static FD_INLINE V value(V x, V) { return abs_(x); }
  static FD_INLINE V backward(V dy, V x, V) {
    const V sign = x == V{} ? V{} : copysign_(splat(T(1)), x);
    return dy * (x == x ? sign : x);
  }
};

FD_POINT(leaky_relu) {
  FD_SAVES_INPUT
  static FD_INLINE V value(V x, V a) { return x > V{} ? x : a * x; }
  static FD_INLINE V backward(V dy, V x, V a) { return x > V{} ? dy : a * dy; }
};

FD_POINT(prelu) {
  FD_SAVES_INPUT
  static constexpr bool per_column = true;
  static FD_INLINE V value(V x, V a) { return x > V{} ? x : a * x; }
  static FD_INLINE V backward(V dy, V x, V a) { return x > V{} ? dy : a * dy; }
  static FD_INLINE V dslope(V dy, V x) { return x > V{} ? V{} : dy * x; }
};

FD_POINT(elu) {
  FD_SAVES_OUTPUT
  static FD_INLINE V value(V x, V a) { return x > V{} ? x : a * expm1_(x); }
  static FD_INLINE V backward(V dy, V y, V a) { return y > V{} ? dy : dy * (y + a); }
};

FD_POINT(sigmoid) {
  FD_SAVES_OUTPUT
  // e^-|x| never overflows, and the small side keeps its relative accuracy
  static FD_INLINE V value(V x, V) {
    const V e = exp_falling_(-abs_(x));
    return (x < V{} ? e : splat(T(1))) / (e + T(1));
  }
  static FD_INLINE V backward(V dy, V y, V) { return dy * (y * (T(1) - y)); }
};

FD_POINT(tanh) {
  FD_SAVES_OUTPUT
  static FD_INLINE V value(V x, V) { return tanh_(x); }
  static FD_INLINE V backward(V dy, V y, V) { return dy * ((T(1) - y) * (T(1) + y)); }
};

FD_POINT(hard_tanh) {
  FD_SAVES_OUTPUT
  static FD_INLINE V value(V x, V) { return min_(splat(T(1)), max_(splat(T(-1)), x)); }
  static FD_INLINE V backward(V dy, V y, V) { return abs_(y) >= T(1) ? V{} : dy; }
};

FD_POINT(softplus) {
  FD_SAVES_OUTPUT
  static FD_INLINE V value(V x, V) { return max_(V{}, x) + log1p_unit_(exp_falling_(-abs_(x))); }
  static FD_INLINE V backward(V dy, V y, V) { return dy * -expm1_(-y); }  // sigmoid(x) = 1 - e^-y
};

FD_POINT(gelu) {
  FD_SAVES_INPUT
  // x Phi(x) = max(0, x) - |x| Phi(-|x|), and Phi(-u) = 0 from u = 40 on (float: 14.5); max(-0, x) keeps the
  // sign of a zero
  static FD_INLINE V value(V x, V) {
    V u, e;
    const V tail = normal_tail_(x, u, e);
    return max_(splat(T(-0.0)), x) - u * tail;
  }
  static FD_INLINE V backward(V dy, V x, V) {
    V u, e;
    const V tail = normal_tail_(x, u, e), p = x > V{} ? T(1) - tail : tail;
    return dy * (p + copysign_(u, x) * (e * T(0.39894228040143267794)));
  }
};

// Beyond |x| = 40 it is x or -0 in float and double: the bound makes infinities give their limits.
constexpr double gelu_bound = 40.0;

FD_POINT(gelu_tanh) {
  FD_SAVES_INPUT
  // (1 + tanh u) / 2 = 1 / (1 + e^-2u) with u = sqrt(2/pi) (z + 0.044715 z^3): one division, exact tail
  static constexpr T c1 = T(1.59576912160573071176), c3 = T(0.07135481627260025); // 2 sqrt(2/pi), 0.044715 times that
  static FD_INLINE V value(V x, V) {
    const V z = max_(splat(T(-gelu_bound)), x);
    return z / (exp_(z * -(c3 * (z * z) + c1)) + T(1));
  }
  static FD_INLINE V backward(V dy, V x, V) {
    const V z = min_(splat(T(gelu_bound)), max_(splat(T(-gelu_bound)), x)), s = z * z;
    const V p = T(1) / (exp_(z * -(c3 * s + c1)) + T(1));
    return dy * (p + z * (p * (T(1) - p)) * (T(3) * c3 * s + c1));
  }
};

FD_POINT(cos) {
  FD_SAVES_INPUT
  static FD_INLINE V value(V x, V) { return cos_(x); }
  static FD_INLINE V backward(V dy, V x, V) { return -(dy * sin_(x)); }
};

#undef FD_POINT
#undef FD_SAVES_OUTPUT
#undef FD_SAVES_INPUT

}  // namespace FD_NS
