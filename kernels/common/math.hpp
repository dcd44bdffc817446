// Vector exp, expm1, log, log1p, tanh, erf, sin, cos and the normal distribution function.
//
// float: argument reduction and one minimax polynomial in plain arithmetic, at most 4 ulp for every bit pattern (measured
// maxima stand at each function), infinities, NaN, signed zeros and subnormals included. double: libm lane by lane; speed is
// promised for float alone. common/numba_math.py holds the same polynomials for Numba.
//
// Polynomials were fitted by Lawson-weighted least squares on Chebyshev nodes; the number beside each is its own largest
// error before rounding, relative to the function. Products and sums may be contracted to FMA by the compiler, so bits differ
// between levels; the bounds hold with and without.
#pragma once
#include "simd.hpp"

namespace FD_NS {

FD_INLINE ivec<float> bits_(vec<float> v) { return (ivec<float>)v; }
FD_INLINE vec<float> from_bits_(ivec<float> i) { return (vec<float>)i; }
FD_INLINE vec<float> abs_(vec<float> v) { return from_bits_(bits_(v) & 0x7fffffff); }
FD_INLINE vec<double> abs_(vec<double> v) { return (vec<double>)((ivec<double>)v & 0x7fffffffffffffffLL); }
// |v| with the sign of s
FD_INLINE vec<float> copysign_(vec<float> v, vec<float> s) {
  return from_bits_((bits_(v) & 0x7fffffff) | (bits_(s) & (int32_t)0x80000000));
}
FD_INLINE vec<double> copysign_(vec<double> v, vec<double> s) {
  return (vec<double>)(((ivec<double>)v & 0x7fffffffffffffffLL) | ((ivec<double>)s & (int64_t)0x8000000000000000LL));
}

// Any lane of a comparison's result (all bits set or none).
FD_INLINE bool any_(ivec<float> mask) {
#if FD_LEVEL == FD_AVX512
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif FD_LEVEL == FD_AVX2
  return _mm256_movemask_ps((__m256)mask) != 0;
#elif defined(__SSE2__)
  return _mm_movemask_ps((__m128)mask) != 0;
#else
  int32_t any = 0;
  for (int i = 0; i < lanes<float>; i++) any |= mask[i];
  return any != 0;
#endif
}

// v * 2^k with one rounding, k an integer in [-252, 254] held as a float; k must be finite.
FD_INLINE vec<float> scale_(vec<float> v, vec<float> k) {
#if FD_LEVEL == FD_AVX512
  return (vec<float>)_mm512_scalef_ps((__m512)v, (__m512)k);
#else
  const ivec<float> n = __builtin_convertvector(k, ivec<float>), half = n >> 1;  // 2^k itself need not be a float
  return v * from_bits_((half + 127) << 23) * from_bits_((n - half + 127) << 23);
#endif
}

// 2^k, k an integer in [-126, 127] held as a float
FD_INLINE vec<float> power_of_2_(vec<float> k) {
#if FD_LEVEL == FD_AVX512
  return (vec<float>)_mm512_scalef_ps(_mm512_set1_ps(1.0f), (__m512)k);
#else
  return from_bits_((__builtin_convertvector(k, ivec<float>) + 127) << 23);
#endif
}

// The integer nearest to x, for |x| <= 2^22
FD_INLINE vec<float> round_(vec<float> x) {
#if FD_LEVEL == FD_AVX512
  return (vec<float>)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#else
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  return (x + magic) - magic;
#endif
}

// x = k ln2 + r with |r| <= ln2 / 2, for |x| <= 2^20; ln2 in two pieces, the first of 9 bits: k times it is exact.
FD_INLINE vec<float> reduce_ln2_(vec<float> x, vec<float>& k) {
  k = round_(x * 1.44269504f);
  return (x - k * 0.693359375f) - k * -2.12194440e-4f;
}
// e^r - 1 on |r| <= ln2 / 2, 3e-9 of e^r
FD_INLINE vec<float> expm1_polynomial_(vec<float> r) {
  const vec<float> s = r * r, low = r * 1.66665182e-1f + 0.5f, high = r * 8.36895406e-3f + 4.1666206e-2f;
  return ((s * 1.3950601e-3f + high) * s + low) * s + r;
}

// e^x for x <= 0, 1.1 ulp
FD_INLINE vec<float> exp_falling_(vec<float> x) {
  x = max_(splat(-104.0f), x);  // e^-104 rounds to 0; a NaN passes
  vec<float> k;
  const vec<float> r = reduce_ln2_(x, k);
  return scale_(expm1_polynomial_(r) + 1.0f, k);
}
// e^x, 1.1 ulp
FD_INLINE vec<float> exp_(vec<float> x) { return exp_falling_(min_(splat(89.0f), x)); }  // e^89 rounds to infinity

// e^x - 1 = 2^k (e^r - 1) + (2^k - 1), a sum without cancellation; near 0 (k = 0) the first term alone, 1.7 ulp
FD_INLINE vec<float> expm1_(vec<float> x) {
  x = max_(splat(-18.0f), min_(splat(89.0f), x));  // e^-18 - 1 rounds to -1
  vec<float> k;
  const vec<float> r = reduce_ln2_(x, k), p = expm1_polynomial_(r);
  const vec<float> half = power_of_2_(k - 1.0f);  // 2^128 is no float
  const vec<float> y = (half * p + (half - 0.5f)) * 2.0f;
  return copysign_(abs_(x) < 0.25f ? p : y, x);  // the sign of -0
}

// (log(1 + f) - f + f^2 / 2) / f^3 on sqrt(1/2) <= 1 + f <= sqrt(2), 6e-9 of log(1 + f)
FD_INLINE vec<float> log_polynomial_(vec<float> f) {
  vec<float> p = -7.84834772e-2f * f + 1.28877223e-1f;
  p = p * f - 1.31351873e-1f;
  p = p * f + 1.41806766e-1f;
  p = p * f - 1.66239068e-1f;
  p = p * f + 2.00022951e-1f;
  p = p * f - 2.50008285e-1f;
  return p * f + 3.33333164e-1f;
}
// k ln2 + log(1 + f)
FD_INLINE vec<float> log_sum_(vec<float> k, vec<float> f) {
  const vec<float> s = f * f;
  const vec<float> tail = (log_polynomial_(f) * f) * s + k * -2.12194440e-4f - 0.5f * s;
  return (tail + f) + k * 0.693359375f;
}

// log(x), 0.9 ulp: x = 2^k (1 + f)
FD_INLINE vec<float> log_(vec<float> x) {
  const ivec<float> tiny = x < 1.17549435e-38f;  // subnormals (and what has no logarithm) are scaled first
  const ivec<float> i = bits_(tiny ? x * 8388608.0f : x) - 0x3f3504f3;  // 0x3f3504f3: sqrt(1/2)
  const ivec<float> k = i >> 23;
  const vec<float> f = from_bits_((i & 0x7fffff) + 0x3f3504f3) - 1.0f;
  vec<float> y = log_sum_(__builtin_convertvector(k, vec<float>) - (tiny ? splat(23.0f) : splat(0.0f)), f);
  y = x < __builtin_inff() ? y : x;                                     // +inf and NaN stay
  y = x == 0.0f ? splat(-__builtin_inff()) : y;
  return x < 0.0f ? splat(__builtin_nanf("")) : y;
}

// log(1 + x), 1.5 ulp: 1 + x = 2^k (1 + f) gives f = x 2^-k + (2^-k - 1), rounded once, and x itself for k = 0
FD_INLINE vec<float> log1p_(vec<float> x) {
  const vec<float> u = x + 1.0f;
  const ivec<float> i = bits_(u) - 0x3f3504f3, k = i >> 23;
  const vec<float> scale = from_bits_((127 - k) << 23);
  const vec<float> mantissa = from_bits_((i & 0x7fffff) + 0x3f3504f3) - 1.0f;
  const vec<float> f = u > 33554432.0f ? mantissa : x * scale + (scale - 1.0f);  // 2^-k may be no float there
  vec<float> y = log_sum_(__builtin_convertvector(k, vec<float>), f);
  y = x < __builtin_inff() ? y : x;
  y = x == 0.0f ? x : y;  // -0
  y = x == -1.0f ? splat(-__builtin_inff()) : y;
  return x < -1.0f ? splat(__builtin_nanf("")) : y;
}
// log(1 + x) for x in [0, 1] (softplus), 1.5 ulp: 2 atanh(t) = t (2 + t^2 P(t^2)) with t = x / (x + 2), 4e-9
FD_INLINE vec<float> log1p_unit_(vec<float> x) {
  const vec<float> t = x / (x + 2.0f), s = t * t;
  vec<float> p = s * 2.80119866e-1f + 2.80018061e-1f;
  p = p * s + 4.00215268e-1f;
  p = p * s + 6.66664183e-1f;
  return t * (p * s + 2.0f);
}

// tanh(x) = u / (u + 2), u = e^(2|x|) - 1, 2.6 ulp
FD_INLINE vec<float> tanh_(vec<float> x) {
  const vec<float> t = min_(splat(40.0f), abs_(x) * 2.0f);  // u + 2 == u long before; a NaN passes
  vec<float> k;
  const vec<float> r = reduce_ln2_(t, k), p = expm1_polynomial_(r);
  const vec<float> power = power_of_2_(k);
  const vec<float> u = power * p + (power - 1.0f);  // k = 0: p
  return copysign_(u / (u + 2.0f), x);
}

// erf(x), 1.2 ulp: x + x P(x^2) below 0.9 (1e-8), 1 - e^(t Q(t)) above (3e-9), t = |x|
FD_INLINE vec<float> erf_(vec<float> x) {
  const vec<float> s = x * x, t = min_(splat(3.95f), abs_(x));  // erf(3.95) rounds to 1
  vec<float> p = -6.09046023e-4f * s + 5.01198508e-3f;
  p = p * s - 2.67789271e-2f;
  p = p * s + 1.12821415e-1f;
  p = p * s - 3.76125246e-1f;
  p = p * s + 1.28379151e-1f;
  vec<float> q = 2.14620697e-4f * t - 3.22018587e-3f;
  q = q * t + 2.29067001e-2f;
  q = q * t - 1.05287895e-1f;
  q = q * t - 6.35698617e-1f;
  q = q * t - 1.12852013f;
  return t < 0.9f ? p * x + x : copysign_(1.0f - exp_(q * t), x);
}

// The normal distribution function below zero: Phi(-u) = e P(u) / Q(u) with u = |x| and e = e^(-u^2/2), which its density
// needs too. The rational function is within (1 + u^2/4) 9e-8 on [0, 14], the rounded exponent adds as much again.
FD_INLINE vec<float> normal_tail_(vec<float> x, vec<float>& u, vec<float>& e) {
  u = min_(splat(14.5f), abs_(x));  // e^-105 rounds to 0; a NaN passes
  const vec<float> s = u * u;
  // e^(-s/2) = 2^k e^(-r/2): reduce_ln2_ and expm1_polynomial_ with -1/2 in their constants
  const vec<float> k = round_(s * -0.72134752f), r = (s + k * 1.38671875f) + k * -4.24388880e-4f, t = r * r;
  const vec<float> low = r * -2.08331478e-2f + 0.125f, high = r * -2.61529814e-4f + 2.60413788e-3f;
  e = scale_(((t * 2.17978141e-5f + high) * t + low) * t + (r * -0.5f + 1.0f), k);
  const vec<float> p = (u * 1.46926548e-2f + 1.09530866e-1f) * s + (u * 3.44479471e-1f + 0.5f);
  const vec<float> q = (s * 3.68396342e-2f + (u * 2.74191588e-1f + 9.05429065e-1f)) * s + (u * 1.48684001f + 1.0f);
  return e * p / q;
}
FD_INLINE vec<double> normal_tail_(vec<double> x, vec<double>& u, vec<double>& e) {
  u = min_(splat(40.0), abs_(x));
  for (int i = 0; i < lanes<double>; i++) {
    e[i] = __builtin_exp(u[i] * u[i] * -0.5);
    x[i] = 0.5 * __builtin_erfc(u[i] * 0.70710678118654752440);
  }
  return x;
}

// x = k pi/2 + r, |r| <= pi/4, for |x| <= 2^16 (k has 16 bits). With FMA three floats of pi/2 do: x - k C1 is exact.
// Without, the same in double. The contraction of r - k C to FMA is part of the argument.
constexpr float trig_limit = 65536.0f;
FD_INLINE vec<float> reduce_half_pi_(vec<float> x, ivec<float>& quadrant) {
  const float magic = 12582912.0f;
  const vec<float> k = (x * 0.636619772f + magic) - magic;
  quadrant = __builtin_convertvector(k, ivec<float>);
#if defined(__FMA__)
  return ((x - k * 1.57079637e+0f) - k * -4.37113883e-8f) - k * -1.71512449e-15f;
#else
  vec<float> r;
  for (int i = 0; i < lanes<float>; i++)  // 33 bits of pi/2: k times them is exact
    r[i] = (float)(((double)x[i] - (double)k[i] * 1.57079632673412561417e+00) - (double)k[i] * 6.07710050650619224932e-11);
  return r;
#endif
}
// sin(r), where `cosine` cos(r): a + a s P(s) with s = r^2 and a = r or 1, within 4e-9 and 4e-8. One polynomial with chosen
// coefficients: half the products of two polynomials of which one is thrown away.
FD_INLINE vec<float> sin_or_cos_(vec<float> r, ivec<float> cosine) {
  const vec<float> s = r * r, a = cosine ? splat(1.0f) : r;
  vec<float> p = cosine ? splat(-1.35912513e-3f) : splat(-1.95146320e-4f);
  p = p * s + (cosine ? splat(4.16557342e-2f) : splat(8.33215564e-3f));
  p = p * s + (cosine ? splat(-4.99998838e-1f) : splat(-1.66666552e-1f));
  return p * s * a + a;
}
// Lanes beyond trig_limit, infinite or NaN: libm, whose reduction has all digits of pi.
FD_INLINE bool far_(vec<float> x) { return __builtin_expect(any_(~(abs_(x) <= trig_limit)), 0); }
template <float function(float)> __attribute__((noinline, cold)) vec<float> far_lanes_(vec<float> x, vec<float> y) {
  for (int i = 0; i < lanes<float>; i++)
    if (!(__builtin_fabsf(x[i]) <= trig_limit)) y[i] = function(x[i]);
  return y;
}
// A builtin is no template argument for clang.
static inline float libm_sin_(float x) { return __builtin_sinf(x); }
static inline float libm_cos_(float x) { return __builtin_cosf(x); }
// sin(x) and cos(x), 2 ulp
FD_INLINE vec<float> sin_(vec<float> x) {
  ivec<float> n;
  const vec<float> r = reduce_half_pi_(x, n), v = sin_or_cos_(r, (n & 1) != 0);
  const vec<float> y = x == 0.0f ? x : from_bits_(bits_(v) ^ (n << 30 & (int32_t)0x80000000));  // -0
  return far_(x) ? far_lanes_<libm_sin_>(x, y) : y;
}
FD_INLINE vec<float> cos_(vec<float> x) {
  ivec<float> n;
  const vec<float> r = reduce_half_pi_(x, n), v = sin_or_cos_(r, (n & 1) == 0);
  const vec<float> y = from_bits_(bits_(v) ^ ((n + 1) << 30 & (int32_t)0x80000000));
  return far_(x) ? far_lanes_<libm_cos_>(x, y) : y;
}

#define FD_LIBM(name, function)                                                   \
  FD_INLINE vec<double> name(vec<double> x) {                                     \
    for (int i = 0; i < lanes<double>; i++) x[i] = __builtin_##function(x[i]);    \
    return x;                                                                     \
  }
FD_LIBM(exp_, exp)
FD_LIBM(exp_falling_, exp)
FD_LIBM(expm1_, expm1)
FD_LIBM(log_, log)
FD_LIBM(log1p_, log1p)
FD_LIBM(log1p_unit_, log1p)
FD_LIBM(tanh_, tanh)
FD_LIBM(erf_, erf)
FD_LIBM(sin_, sin)
FD_LIBM(cos_, cos)
#undef FD_LIBM

}  // namespace FD_NS
