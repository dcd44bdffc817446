/* Initial values: element e of a parameter from its counter, float64, the same bits on every machine.
 *
 * Twin of reference.py, operation by operation. Only + - * / and sqrt, each rounded on its own: contraction into fused
 * multiply-adds is off, and there is one copy of this code, not one per SIMD level (an initial value is drawn once).
 * Coefficients: Wichura, AS 241 (1988), and fdlibm's e_log.c; both highest power first. */
#ifndef FASTDL_INITIAL_H
#define FASTDL_INITIAL_H
#include <math.h>
#include <stdint.h>

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")
#endif

enum fd_distribution { FD_UNIFORM, FD_NORMAL, FD_TRUNCATED_NORMAL };

static const double FD_CENTRE[2][8] = {
    {2.5090809287301226727e3, 3.3430575583588128105e4, 6.7265770927008700853e4, 4.5921953931549871457e4,
     1.3731693765509461125e4, 1.9715909503065514427e3, 1.3314166789178437745e2, 3.3871328727963666080e0},
    {5.2264952788528545610e3, 2.8729085735721942674e4, 3.9307895800092710610e4, 2.1213794301586595867e4,
     5.3941960214247511077e3, 6.8718700749205790830e2, 4.2313330701600911252e1, 1.0}};
static const double FD_TAIL_NEAR[2][8] = {
    {7.74545014278341407640e-4, 2.27238449892691845833e-2, 2.41780725177450611770e-1, 1.27045825245236838258e0,
     3.64784832476320460504e0, 5.76949722146069140550e0, 4.63033784615654529590e0, 1.42343711074968357734e0},
    {1.05075007164441684324e-9, 5.47593808499534494600e-4, 1.51986665636164571966e-2, 1.48103976427480074590e-1,
     6.89767334985100004550e-1, 1.67638483018380384940e0, 2.05319162663775882187e0, 1.0}};
static const double FD_TAIL_FAR[2][8] = {
    {2.01033439929228813265e-7, 2.71155556874348757815e-5, 1.24266094738807843860e-3, 2.65321895265761230930e-2,
     2.96560571828504891230e-1, 1.78482653991729133580e0, 5.46378491116411436990e0, 6.65790464350110377720e0},
    {2.04426310338993978564e-15, 1.42151175831644588870e-7, 1.84631831751005468180e-5, 7.86869131145613259100e-4,
     1.48753612908506148525e-2, 1.36929880922735805310e-1, 5.99832206555887937690e-1, 1.0}};
static const double FD_LOG[7] = {1.479819860511658591e-01, 1.531383769920937332e-01, 1.818357216161805012e-01,
                                 2.222219843214978396e-01, 2.857142874366239149e-01, 3.999999999940941908e-01,
                                 6.666666666666735130e-01};
static const double FD_LN2_HIGH = 6.93147180369123816490e-01, FD_LN2_LOW = 1.90821492927058770002e-10;
static const double FD_ROOT_HALF = 0.7071067811865476;
static const double FD_TAIL = 0.022750131948179207; /* Phi(-2) */

static double fd_horner(const double* c, int count, double x) {
  double total = c[0] * x + c[1];
  for (int i = 2; i < count; i++) total = total * x + c[i];
  return total;
}

/* log of a positive normal number: log(1 + f) = f - f^2/2 + s (f^2/2 + R(s^2)), s = f / (2 + f) */
static double fd_log(double x) {
  int exponent;
  double m = frexp(x, &exponent);
  if (m < FD_ROOT_HALF) {
    m = m + m;
    exponent -= 1;
  }
  const double f = m - 1.0, k = exponent, s = f / (f + 2.0), z = s * s, half = 0.5 * f * f;
  return k * FD_LN2_HIGH - ((half - (s * (half + fd_horner(FD_LOG, 7, z) * z) + k * FD_LN2_LOW)) - f);
}

/* The inverse of the standard normal distribution function on (0, 1). */
static double fd_quantile(double p) {
  const double q = p - 0.5;
  if (fabs(q) <= 0.425) {
    const double r = 0.180625 - q * q;
    return q * fd_horner(FD_CENTRE[0], 8, r) / fd_horner(FD_CENTRE[1], 8, r);
  }
  const double r = sqrt(-fd_log(q < 0.0 ? p : 1.0 - p));
  const double value = r <= 5.0 ? fd_horner(FD_TAIL_NEAR[0], 8, r - 1.6) / fd_horner(FD_TAIL_NEAR[1], 8, r - 1.6)
                                : fd_horner(FD_TAIL_FAR[0], 8, r - 5.0) / fd_horner(FD_TAIL_FAR[1], 8, r - 5.0);
  return q < 0.0 ? -value : value;
}

/* Value of a uniform u in (0, 1); a, b: low and high, or mean and std. */
static double fd_initial_value(double u, int distribution, double a, double b) {
  double z;
  if (distribution == FD_UNIFORM) return (b - a) * u + a;
  if (distribution == FD_NORMAL) return b * fd_quantile(u) + a;
  z = fd_quantile((1.0 - 2.0 * FD_TAIL) * u + FD_TAIL);
  z = z < -2.0 ? -2.0 : z > 2.0 ? 2.0 : z;
  return b * z + a;
}

/* The uniform of two random words: an odd multiple of 2^-53. */
static double fd_uniform(uint32_t low, uint32_t high) {
  return ((double)((uint64_t)high << 20 | low >> 12) + 0.5) * 0x1p-52;
}

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC pop_options
#endif
#endif
