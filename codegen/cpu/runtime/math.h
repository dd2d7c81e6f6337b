// Elementwise functions for generated C++ kernels, on so::vf and on scalar float and double.
//
// In:  values of any kind: finite, denormal, infinite, NaN, signed zero.
// Out: the function's value as PyTorch defines it, within 2 ulp in float32 over the whole range
//      (the error measured for each function stands beside it). Scalars go to the C library.
// Invariant: NaN in, NaN out; overflow is infinity and underflow a correctly rounded denormal; the
//      sign of zero is kept. No -ffast-math is needed or allowed.
// Source: argument reduction after Cody & Waite, "Software Manual for the Elementary Functions"
//      (1980), table lookup after Tang (ACM TOMS 15(2), 1989), accurate table points after Gal &
//      Bachelis (ACM TOMS 17(1), 1991). The coefficients are minimax fits made for these intervals
//      and rounded one after the other, each time refitting the rest.
//
// "Measured" comments: greatest error in ulp against float64 over 1.5 million values of all
// exponents, for 64 / 32 / 16 byte vectors (AVX-512 / AVX2+FMA / SSE2 without FMA); then CPU cycles
// (at 3.1 GHz) per element on values in L1, 64 / 32 byte vectors; Xeon (Cascade Lake), GCC 12.2,
// 2026-11. In the same run torch took 0.8 cycles for exp, tanh 1.2, sigmoid 2.0, erf 2.9, log 1.1.
#pragma once

#include "simd.h"

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi"

namespace so {

// ---- Lane-wise calls of the C library, and the scalar versions ----------------------------------

// Apply a scalar function to every lane: for functions that are rare, and for rare arguments.
template <class Function> SO_COLD void map_memory(const float* x, float* y) {
  for (int i = 0; i < SO_VL; ++i) y[i] = Function::call(x[i]);
}
template <class Function> SO_INLINE vf map_lanes(vf x) {
  float in[SO_VL], out[SO_VL];
  memcpy(in, &x, sizeof(in));
  map_memory<Function>(in, out);
  return load_raw<vf>(out);
}
template <class Function> SO_COLD void map_memory(const float* x, const float* y, float* z) {
  for (int i = 0; i < SO_VL; ++i) z[i] = Function::call(x[i], y[i]);
}
template <class Function> SO_INLINE vf map_lanes(vf x, vf y) {
  float left[SO_VL], right[SO_VL], out[SO_VL];
  memcpy(left, &x, sizeof(left));
  memcpy(right, &y, sizeof(right));
  map_memory<Function>(left, right, out);
  return load_raw<vf>(out);
}

#define SO_SCALAR(name)                                                \
  SO_INLINE float name(float x) { return __builtin_##name##f(x); }     \
  SO_INLINE double name(double x) { return __builtin_##name(x); }
#define SO_SCALAR_AND_LANES(name)                                      \
  SO_SCALAR(name)                                                      \
  struct name##_function {                                             \
    static float call(float x) { return __builtin_##name##f(x); }      \
  };
#define SO_BY_LANES(name)                                              \
  SO_SCALAR_AND_LANES(name)                                            \
  SO_INLINE vf name(vf x) { return map_lanes<name##_function>(x); }

SO_SCALAR(exp) SO_SCALAR(exp2) SO_SCALAR(expm1) SO_SCALAR(log) SO_SCALAR(log1p) SO_SCALAR(log2)
SO_SCALAR(log10) SO_SCALAR(tanh) SO_SCALAR(erf) SO_SCALAR(sqrt) SO_SCALAR(floor) SO_SCALAR(ceil) SO_SCALAR(trunc)
SO_SCALAR(asin) SO_SCALAR(acos) SO_SCALAR(atan) SO_SCALAR(asinh) SO_SCALAR(acosh) SO_SCALAR(atanh)
SO_SCALAR_AND_LANES(sin) SO_SCALAR_AND_LANES(cos)
// Rare in practice: one C library call per lane.
SO_BY_LANES(tan) SO_BY_LANES(sinh) SO_BY_LANES(cosh) SO_BY_LANES(lgamma)

SO_INLINE float round(float x) { return __builtin_rintf(x); }
SO_INLINE double round(double x) { return __builtin_rint(x); }
SO_INLINE float rsqrt(float x) { return 1.0f / __builtin_sqrtf(x); }
SO_INLINE double rsqrt(double x) { return 1.0 / __builtin_sqrt(x); }
SO_INLINE double sigmoid(double x) { return 1.0 / (1.0 + __builtin_exp(-x)); }
SO_INLINE float sigmoid(float x) {
  return static_cast<float>(sigmoid(static_cast<double>(x)));
}
SO_INLINE float exp_nonpositive(float x) { return __builtin_expf(x); }
SO_INLINE double exp_nonpositive(double x) { return __builtin_exp(x); }
SO_INLINE float log1p_unit(float x) { return __builtin_log1pf(x); }
SO_INLINE double log1p_unit(double x) { return __builtin_log1p(x); }
SO_INLINE float exp_rough(float x) { return __builtin_expf(x); }
SO_INLINE float exp_rough8(float x) { return __builtin_expf(x); }
SO_INLINE float sigmoid_rough(float x) { return sigmoid(x); }
SO_INLINE float sigmoid_rough8(float x) { return sigmoid(x); }
SO_INLINE float pow(float x, float y) { return __builtin_powf(x, y); }
SO_INLINE double pow(double x, double y) { return __builtin_pow(x, y); }
SO_INLINE float fmod(float x, float y) { return __builtin_fmodf(x, y); }
SO_INLINE double fmod(double x, double y) { return __builtin_fmod(x, y); }
SO_INLINE float atan2(float y, float x) { return __builtin_atan2f(y, x); }
SO_INLINE double atan2(double y, double x) { return __builtin_atan2(y, x); }
SO_INLINE float copysign(float x, float y) { return __builtin_copysignf(x, y); }
SO_INLINE double copysign(double x, double y) { return __builtin_copysign(x, y); }
SO_INLINE vf copysign(vf x, vf y) {
  return bit_cast<vf>((bit_cast<vi>(x) & ~sign_bit) | (bit_cast<vi>(y) & sign_bit));
}
struct fmod_function {
  static float call(float x, float y) { return __builtin_fmodf(x, y); }
};
struct atan2_function {
  static float call(float y, float x) { return __builtin_atan2f(y, x); }
};
SO_INLINE vf fmod(vf x, vf y) { return map_lanes<fmod_function>(x, y); }
SO_INLINE vf atan2(vf y, vf x) { return map_lanes<atan2_function>(y, x); }

// The inverse of erf, in float64: Winitzki's approximation ("A handy approximation for the error
// function and its inverse", 2008) to start, then Halley steps on erf, or on erfc near the ends.
SO_INLINE double erfinv(double y) {
  double size = __builtin_fabs(y);
  if (!(size < 1.0)) return size == 1.0 ? y * __builtin_inf() : __builtin_nan("");
  double w = -__builtin_log1p(-size * size);
  double a = 0.147, b = 2.0 / (3.14159265358979323846 * a) - 0.5 * w;
  double x = __builtin_sqrt(__builtin_fmax(__builtin_sqrt(b * b + w / a) - b, 0.0));
  for (int step = 0; step < 3; ++step) {
    double excess = size < 0.5 ? __builtin_erf(x) - size : (1.0 - size) - __builtin_erfc(x);
    double delta = excess / (1.1283791670955126 * __builtin_exp(-x * x));
    x -= delta / (1.0 + x * delta);
  }
  return __builtin_copysign(x, y);
}
SO_INLINE float erfinv(float y) { return static_cast<float>(erfinv(static_cast<double>(y))); }
struct erfinv_function {
  static float call(float y) { return erfinv(y); }
};
SO_INLINE vf erfinv(vf y) { return map_lanes<erfinv_function>(y); }

// ---- Rounding, roots, sign ----------------------------------------------------------------------

// For sizes below 2^23, the rounding of an addition at 2^23 leaves the nearest (even) integer;
// larger floats are integers already. The comparison lets NaN through unchanged.
SO_INLINE vf round_portable(vf x) {
  vf size = abs(x);
  vf rounded = (size + 0x1p23f) - 0x1p23f;
  return select(size < 0x1p23f, with_sign(rounded, x), x);
}
#if SO_USE_512
#define SO_ROUND(x, mode) __builtin_ia32_rndscaleps_mask(x, mode, x, every_lane, 4)
#elif SO_USE_256
#define SO_ROUND(x, mode) __builtin_ia32_roundps256(x, mode)
#elif SO_USE_128 && defined(__SSE4_1__)
#define SO_ROUND(x, mode) __builtin_ia32_roundps(x, mode)
#endif
#ifdef SO_ROUND
SO_INLINE vf round(vf x) { return SO_ROUND(x, 8); }
SO_INLINE vf floor(vf x) { return SO_ROUND(x, 9); }
SO_INLINE vf ceil(vf x) { return SO_ROUND(x, 10); }
SO_INLINE vf trunc(vf x) { return SO_ROUND(x, 11); }
#else
SO_INLINE vf round(vf x) { return round_portable(x); }
SO_INLINE vf floor(vf x) {
  vf nearest = round_portable(x);
  return with_sign(abs(nearest - mask_value(nearest > x)), x);
}
SO_INLINE vf ceil(vf x) {
  vf nearest = round_portable(x);
  return with_sign(abs(nearest + mask_value(nearest < x)), x);
}
SO_INLINE vf trunc(vf x) {
  vf size = abs(x);
  vf nearest = round_portable(size);
  return with_sign(nearest - mask_value(nearest > size), x);
}
#endif

// Measured: 0.50 / 0.50 / 0.50 ulp; 0.86 / 0.75 cycles.
SO_INLINE vf sqrt(vf x) {
#if SO_USE_512
  return __builtin_ia32_sqrtps512_mask(x, x, every_lane, 4);
#elif SO_USE_256
  return __builtin_ia32_sqrtps256(x);
#elif SO_USE_128
  return __builtin_ia32_sqrtps(x);
#else
  for (int i = 0; i < SO_VL; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}
// Measured: 1.48 ulp (two roundings, as PyTorch's); 1.6 / 1.4 cycles.
SO_INLINE vf rsqrt(vf x) { return splat<vf>(1.0f) / sqrt(x); }

// torch.sign: 0 for both zeros and (as PyTorch's CPU kernel) for NaN.
SO_INLINE vf sign(vf x) { return mask_value(x > 0.0f) - mask_value(x < 0.0f); }
SO_INLINE float sign(float x) { return static_cast<float>((x > 0.0f) - (x < 0.0f)); }
SO_INLINE double sign(double x) { return static_cast<double>((x > 0.0) - (x < 0.0)); }

// torch.remainder: the result takes the divisor's sign.
template <class V> SO_INLINE V remainder(V x, V y) {
  V r = fmod(x, y);
  return select(mask_and(r != 0.0f, mask_not((r < 0.0f) == (y < 0.0f))), r + y, r);
}

// ---- exp ----------------------------------------------------------------------------------------

// x = n ln 2 + r with |r| <= ln(2) / 2; exp(x) - 1 follows from e = exp(r) - 1 and 2^n.
struct exp_parts {
  vf e;  // exp(r) - 1, relative error below 2^-24 also near 0
  vf n;
  vi whole;  // n as integers
};

// Needs -150 <= n <= 150. Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
// ln 2 is split as 0.693359375 (10 bits, so that n times it is exact) and the rest.
SO_INLINE exp_parts exp_reduce(vf x) {
  const vf shift = splat<vf>(0x1.8p23f);
  vf t = fma(x, splat<vf>(0x1.715476p+0f), shift);
  exp_parts parts;
  parts.n = t - shift;
  parts.whole = bit_cast<vi>(t) - bit_cast<vi>(shift);
  vf r = fma(parts.n, splat<vf>(-0.693359375f), x);
  r = fma(parts.n, splat<vf>(0x1.bd0106p-13f), r);
  // Minimax on the interval, relative to r: error 1.4e-8.
  vf p = fma(splat<vf>(0x1.6d51b6p-10f), r, splat<vf>(0x1.12279ap-7f));
  p = fma(p, r, splat<vf>(0x1.5554e4p-5f));
  p = fma(p, r, splat<vf>(0x1.5554b0p-3f));
  p = fma(p, r, splat<vf>(0.5f));
  parts.e = fma(r * r, p, r);
  return parts;
}

// 2^n for -126 <= n <= 127.
SO_INLINE vf power_of_two(vi n) { return bit_cast<vf>((n + 127) << 23); }

// exp for x <= 89 or NaN, in two steps of 2^n so that denormal results round once. Below -104, where masks
// put scores, it is 0 without a product that underflows: that takes the processor a hundred cycles.
SO_INLINE vf exp_bounded(vf x) {
  const vi gone = x < splat<vf>(-104.0f);
  exp_parts parts = exp_reduce(select(gone, splat<vf>(0.0f), x));
  vi half = parts.whole >> 1;
  vf result = ((parts.e + 1.0f) * power_of_two(half)) * power_of_two(parts.whole - half);
  return select(gone, splat<vf>(0.0f), result);
}

#if SO_USE_512
// x * 2^floor(n), rounded once, denormals included; 0 for the other lanes, which raise no underflow.
template <typename Lanes> SO_INLINE vf scale_by_power(vf x, vf n, Lanes lanes) {
  return __builtin_ia32_scalefps512_mask(x, n, vf{}, lanes, 4);
}
SO_INLINE vf lookup(const float (&table)[16], vi index) {  // by the low four bits of each index
  return __builtin_ia32_permvarsf512_mask(load_raw<vf>(table), index, vf{}, every_lane);
}
alignas(64) static const float exp2_sixteenths[16] = {  // 2^(j/16)
    1.0f, 1.04427373f, 1.09050775f, 1.13878858f, 1.18920708f, 1.24185777f, 1.29683959f, 1.35425556f,
    1.41421354f, 1.47682619f, 1.54221082f, 1.61049032f, 1.68179286f, 1.75625217f, 1.8340081f,
    1.91520655f};
alignas(64) static const float exp2_sixteenths_rest[16] = {  // what rounding took from them
    0.0f, 4.83347016e-08f, -1.30775399e-08f, 5.38622231e-08f, 3.79763527e-08f, 4.4968381e-08f,
    -4.01899953e-08f, -1.01233493e-08f, 2.4203235e-08f, -4.50089885e-08f, 8.07090483e-09f,
    9.83621717e-09f, -2.47553267e-08f, -9.23577037e-09f, -1.1239278e-08f, 9.84532811e-09f};
// As exp_bounded, with r reduced to |r| <= ln(2) / 32 by a table in one register: the sum at
// 1.5 * 2^19 leaves x / ln 2 rounded to sixteenths, whose low four bits index the table, and
// scalef drops the fraction of n. `Refined` halves the error for two more instructions.
template <bool Refined> SO_INLINE vf exp_bounded_512(vf x) {
  const vf shift = splat<vf>(0x1.8p19f);
  const auto lanes = __builtin_ia32_cmpps512_mask(x, splat<vf>(-104.0f), 21, every_lane, 4);  // !(x < y)
  vf t = fma(x, splat<vf>(0x1.715476p+0f), shift);
  vf n = t - shift;
  vf r = fma(n, splat<vf>(-0.693359375f), x);
  r = fma(n, splat<vf>(0x1.bd0106p-13f), r);
  vf e = fma(r * r, fma(r, splat<vf>(0x1.555722p-3f), splat<vf>(0x1.000222p-1f)), r);
  vf root = lookup(exp2_sixteenths, bit_cast<vi>(t));
  if constexpr (!Refined) return scale_by_power(fma(root, e, root), n, lanes);
  vf rest = lookup(exp2_sixteenths_rest, bit_cast<vi>(t));
  return scale_by_power(root + fma(root, e, rest), n, lanes);
}
SO_INLINE vf exp_refined(vf x) { return exp_bounded_512<true>(x); }
#define SO_EXP_BOUNDED exp_bounded_512<false>
#else
#define SO_EXP_BOUNDED exp_bounded
SO_INLINE vf exp_refined(vf x) { return exp_bounded(x); }
#endif

// exp: beyond the clamp the result is infinity all the same, and NaN passes through it.
// Measured: 0.98 / 1.01 / 1.00 ulp; 0.70 / 2.1 cycles.
SO_INLINE vf exp(vf x) {
  return SO_EXP_BOUNDED(min_fast(splat<vf>(89.0f), x));
}

// exp for x <= 0 (or NaN), as in a softmax after the maximum is taken off: one clamp less.
// Measured: 0.98 / 1.02 / 1.00 ulp; 0.58 / 1.9 cycles.
SO_INLINE vf exp_nonpositive(vf x) { return SO_EXP_BOUNDED(x); }

// 2^t and exp where only 16 bits of it count: relative error below 2^-18 and |x| 2^-23, exp(0) = 1, and 0 for what is
// no normal number (a result that is denormal takes the processor a hundred cycles). t = n + f, where f is in
// [0, 1), takes one instruction, and scalef drops the fraction of n again. (Assembler: arguments of its builtin
// differ between compilers.) Of bfloat16, which has 8 significant bits, `_rough8`: relative error below 2^-13.5.
// Measured: 0.37 cycles (2.9 GHz Xeon with AMX; exp_nonpositive 0.46 there).
#if SO_USE_512 && defined(__AVX512DQ__)
template <bool EIGHT> SO_INLINE vf exp2_rough_512(vf t) {
  const auto lanes = __builtin_ia32_cmpps512_mask(t, splat<vf>(-126.0f), 21, every_lane, 4);  // !(x < y)
  vf f, p;
  __asm__("vreduceps $1, %1, %0" : "=v"(f) : "v"(t));
  if constexpr (EIGHT) {
    p = fma(splat<vf>(0x1.3baaa6p-4f), f, splat<vf>(0x1.d2378ap-3f));
    p = fma(p, f, splat<vf>(0x1.63e658p-1f));
  } else {
    p = fma(splat<vf>(0x1.b7f73cp-7f), f, splat<vf>(0x1.abf864p-5f));
    p = fma(p, f, splat<vf>(0x1.ee2452p-3f));
    p = fma(p, f, splat<vf>(0x1.62d6c6p-1f));
  }
  return scale_by_power(fma(p, f, splat<vf>(1.0f)), t, lanes);
}
SO_INLINE vf exp2_rough(vf t) { return exp2_rough_512<false>(t); }
SO_INLINE vf exp2_rough8(vf t) { return exp2_rough_512<true>(t); }
SO_INLINE vf exp_rough(vf x) { return exp2_rough(x * splat<vf>(0x1.715476p+0f)); }
SO_INLINE vf exp_rough8(vf x) { return exp2_rough8(x * splat<vf>(0x1.715476p+0f)); }
#else
SO_INLINE vf exp2_rough(vf t) { return exp(t * splat<vf>(0x1.62e43p-1f)); }
SO_INLINE vf exp2_rough8(vf t) { return exp2_rough(t); }
SO_INLINE vf exp_rough(vf x) { return exp(x); }
SO_INLINE vf exp_rough8(vf x) { return exp(x); }
#endif

// Measured: 1.52 / 1.52 / 1.65 ulp; 1.0 / 2.2 cycles.
SO_INLINE vf expm1(vf x) {
  exp_parts parts = exp_reduce(min_fast(splat<vf>(89.0f), max_fast(splat<vf>(-20.0f), x)));
  // Half of 2^n, because 2^128 is a factor near overflow; tiny x would lose bits to the halving.
  vf half = power_of_two(parts.whole - 1);
  vf result = 2.0f * fma(half, parts.e, half - 0.5f);
  return select(abs(x) < 0x1p-25f, x, result);
}

// ---- tanh, sigmoid, erf -------------------------------------------------------------------------

#if SO_USE_512
// An odd function by one polynomial per interval of |x|: index by exponent and first mantissa bit,
// coefficients by register lookups. Row 0 is the expansion point, row 1 the value there (chosen
// where the value is close to a float), then the coefficients upward. Below 1/4 the polynomial
// gives f(x) - x instead, so that x itself enters without a rounding. At `last` the polynomial must
// give 1 and not the float below it: gelu multiplies what is left of 1 + f(x) by x.
SO_INLINE vf odd_by_pieces(vf x, const float (&pieces)[8][16], float last) {
  vf size = min_fast(splat<vf>(last), abs(x));  // NaN stays
  vi index = bit_cast<vi>(size) >> 22;
  index = index > 249 ? index : broadcast_i(249);
  vf r = size - lookup(pieces[0], index);
  vf p = lookup(pieces[7], index);
  for (int i = 6; i >= 2; --i) p = fma(p, r, lookup(pieces[i], index));
  return with_sign(fma(p, r, select(index == 249, size, lookup(pieces[1], index))), x);
}
alignas(64) static const float tanh_pieces[8][16] = {
    {2.50000405f, 3.50002956f, 5.00009537f, 7.0f, 8.51019096f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f,
     0.312504888f, 0.43750307f, 0.62500006f, 0.875001848f, 1.25002086f, 1.75000799f},
    {0.986614406f, 0.998178005f, 0.999909222f, 0.999998331f, 0.99999994f, 0.0f, 0.0f, 0.0f, 0.0f,
     0.0f, 0.302714169f, 0.411572605f, 0.554599762f, 0.703906536f, 0.84828949f, 0.941376448f},
    {0.0265921075f, 0.00364073785f, 0.000181803553f, 3.32610739e-06f, 1.62163232e-07f, 0.0f, 0.0f,
     0.0f, 0.0f, 5.68794478e-09f, 0.908364117f, 0.83060801f, 0.692419112f, 0.504515588f,
     0.280404836f, 0.113810338f},
    {-0.026235871f, -0.00363408006f, -0.00018172829f, -3.23555378e-06f, -1.61067339e-06f, 0.0f,
     0.0f, 0.0f, 0.0f, -1.58563819e-06f, -0.274974674f, -0.341855556f, -0.384013802f,
     -0.355131805f, -0.237864554f, -0.107138351f},
    {0.0170175042f, 0.00241162442f, 0.000118871838f, 2.20664333e-06f, 1.12337304e-07f, 0.0f, 0.0f,
     0.0f, 0.0f, -0.333258927f, -0.219534218f, -0.136191428f, -0.017835822f, 0.0818064287f,
     0.108324364f, 0.0629271567f},
    {-0.00805161055f, -0.0011972686f, -5.95420788e-05f, -1.31758907e-06f, 1.45052227e-05f, 0.0f,
     0.0f, 0.0f, 0.0f, -0.00128845812f, 0.158128083f, 0.170011759f, 0.137638435f, 0.0607932657f,
     -0.0125882998f, -0.0235247295f},
    {0.00288683781f, 0.000490233593f, 2.84248927e-05f, 4.94588221e-07f, 1.09586318e-09f, 0.0f,
     0.0f, 0.0f, 0.0f, 0.143507719f, 0.0424162f, -0.00183517416f, -0.054490868f, -0.0585973747f,
     -0.0196808465f, 0.00348608126f},
    {-0.000696502451f, -0.000157668444f, -9.38115045e-06f, -3.33901795e-08f, -3.68812434e-05f,
     0.0f, 0.0f, 0.0f, 0.0f, -0.0375976041f, -0.0764108598f, -0.0616387464f, -0.0140298679f,
     0.0129951918f, 0.0151086114f, 0.00210300204f},
};
alignas(64) static const float erf_pieces[8][16] = {
    {2.50001431f, 3.4650476f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.312501222f,
     0.437501073f, 0.625003755f, 0.875003219f, 1.25000131f, 1.75001609f},
    {0.999593079f, 0.999999046f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.341469884f,
     0.463899136f, 0.623243749f, 0.78407675f, 0.922900438f, 0.986672521f},
    {0.00217874511f, 6.95732206e-06f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.128379166f,
     1.0233947f, 0.931811273f, 0.763495982f, 0.524742067f, 0.236520424f, 0.05277187f},
    {-0.00544399908f, -2.40646041e-05f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, -5.05122102e-07f,
     -0.319811821f, -0.407668889f, -0.477187753f, -0.459151208f, -0.295651197f, -0.0923518315f},
    {0.00832722615f, 4.99778471e-05f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, -0.37609449f,
     -0.27452305f, -0.191670999f, -0.0556786247f, 0.0929283872f, 0.167524233f, 0.0901742876f},
    {-0.00864875969f, -8.02288123e-05f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, -0.000612318341f,
     0.149319887f, 0.17809841f, 0.176442191f, 0.112422965f, -0.00612485083f, -0.0481063053f},
    {0.00631505018f, 0.000127041698f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.117899314f,
     0.0675664321f, 0.0203943606f, -0.0266942363f, -0.067070514f, -0.0467904992f, 0.00597361056f},
    {-0.00264294399f, -0.000113521193f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, -0.0189920384f,
     -0.0172463078f, -0.0950620696f, -0.0404468179f, -0.0114564057f, 0.0205057207f, 0.00906523783f},
};
#endif

SO_INLINE vf tanh_any(vf x) {
#if SO_USE_512
  return odd_by_pieces(x, tanh_pieces, 8.95f);
#else
  // Below 0.55 an odd polynomial, above it 1 - 2 z / (1 + z) with z = exp(-2 |x|).
  vf size = abs(x);
  vf s = size * size;
  vf p = fma(splat<vf>(0x1.0db0e6p-6f), s, splat<vf>(-0x1.af991cp-5f));
  p = fma(p, s, splat<vf>(0x1.10d038p-3f));
  p = fma(p, s, splat<vf>(-0x1.55545ap-2f));
  vf low = fma(p * s, size, size);
  exp_parts parts = exp_reduce(max_fast(splat<vf>(-20.0f), size * -2.0f));
  vf power = power_of_two(parts.whole);
  vf z = fma(power, parts.e, power);
  vf high = 1.0f - (z + z) / (z + 1.0f);
  return with_sign(select(size < 0.55f, low, high), x);
#endif
}
// Where all lanes are below 0.7 in size one odd polynomial is enough, at a third of the cost: capped
// scores mostly are. Arguments that mix both sizes pay for branches that are mispredicted.
// Measured: 1.31 / 1.40 / 1.47 ulp; 1.2 / 3.6 cycles, below 0.7 in size 0.5.
SO_INLINE vf tanh(vf x) {
  const vf s = x * x;
  if (!all_less(s, 0.49f)) return tanh_any(x);
  vf p = fma(splat<vf>(-0x1.50e2aap-8f), s, splat<vf>(0x1.4939c0p-6f));
  p = fma(p, s, splat<vf>(-0x1.b6c362p-5f));
  p = fma(p, s, splat<vf>(0x1.10fb0ap-3f));
  p = fma(p, s, splat<vf>(-0x1.5554f6p-2f));
  return x * fma(p, s, splat<vf>(1.0f));
}

// With z = exp(-|x|) <= 1: 1 / (1 + z) above zero, z / (1 + z) below, so neither end cancels.
// What the sum 1 + z lost to rounding is put back into the quotient.
// Measured: 1.50 / 1.96 / 1.96 ulp (three million values more, where z nears a power of two);
// 1.7 / 3.8 cycles.
SO_INLINE vf sigmoid(vf x) {
  vf z = exp_refined(bit_cast<vf>(bit_cast<vi>(x) | sign_bit));
  vf denominator = z + 1.0f;
  vf lost = z - (denominator - 1.0f);
  vf numerator = select(x < 0.0f, z, splat<vf>(1.0f));
#if SO_USE_512
  // A quotient good to 14 bits and one correction by its exact remainder.
  vf inverse = __builtin_ia32_rcp14ps512_mask(denominator, denominator, every_lane);
  vf quotient = numerator * inverse;
  vf remainder = fma(-quotient, lost, fma(-quotient, denominator, numerator));
  return fma(remainder, inverse, quotient);
#else
  vf quotient = numerator / denominator;
  vf rough = 1.457f - 0.5f * denominator;  // 1 / denominator within 5 percent
  return fma(-quotient * lost, rough, quotient);
#endif
}

// 1 / (1 + 2^-t) and sigmoid where only 16 bits count, to the error of exp2_rough: an inverse good to 14 bits and one
// Newton step, which would make NaN of the inverse of infinity. `_rough8` needs no such step: error below 2^-12.7.
// Measured: 0.7 cycles (2.9 GHz Xeon with AMX; sigmoid 1.1 there).
#if SO_USE_512 && defined(__AVX512DQ__)
SO_INLINE vf sigmoid2_rough(vf t) {
  vf denominator = exp2_rough(-t) + 1.0f;
  vf inverse = __builtin_ia32_rcp14ps512_mask(denominator, denominator, every_lane);
  vf rest = max_fast(fma(-denominator, inverse, splat<vf>(1.0f)), splat<vf>(-1.0f));
  return fma(rest, inverse, inverse);
}
SO_INLINE vf sigmoid2_rough8(vf t) {
  vf denominator = exp2_rough8(-t) + 1.0f;
  return __builtin_ia32_rcp14ps512_mask(denominator, denominator, every_lane);
}
SO_INLINE vf sigmoid_rough(vf x) { return sigmoid2_rough(x * splat<vf>(0x1.715476p+0f)); }
SO_INLINE vf sigmoid_rough8(vf x) { return sigmoid2_rough8(x * splat<vf>(0x1.715476p+0f)); }
#else
SO_INLINE vf sigmoid2_rough(vf t) { return sigmoid(t * splat<vf>(0x1.62e43p-1f)); }
SO_INLINE vf sigmoid2_rough8(vf t) { return sigmoid2_rough(t); }
SO_INLINE vf sigmoid_rough(vf x) { return sigmoid(x); }
SO_INLINE vf sigmoid_rough8(vf x) { return sigmoid(x); }
#endif

// Measured: 1.41 / 0.94 / 1.13 ulp; 1.1 / 3.7 cycles.
SO_INLINE vf erf(vf x) {
#if SO_USE_512
  return odd_by_pieces(x, erf_pieces, 3.908f);
#else
  // Below 0.875 an odd polynomial, above it 1 - exp(a polynomial fitted to log(erfc)).
  vf size = abs(x);
  vf s = size * size;
  vf p = fma(splat<vf>(-0x1.413412p-11f), s, splat<vf>(0x1.48c4c2p-8f));
  p = fma(p, s, splat<vf>(-0x1.b6c456p-6f));
  p = fma(p, s, splat<vf>(0x1.ce1d8ap-4f));
  p = fma(p, s, splat<vf>(-0x1.8126f2p-2f));
  p = fma(p, s, splat<vf>(0x1.06eba6p-3f));
  vf low = fma(p, size, size);
  vf a = min_fast(splat<vf>(3.95f), size);
  vf g = fma(splat<vf>(0x1.a34020p-13f), a, splat<vf>(-0x1.93f9cep-9f));
  g = fma(g, a, splat<vf>(0x1.6eb206p-6f));
  g = fma(g, a, splat<vf>(-0x1.ab02b4p-4f));
  g = fma(g, a, splat<vf>(-0x1.460d50p-1f));
  g = fma(g, a, splat<vf>(-0x1.20bd5ep+0f));
  g = fma(g, a, splat<vf>(-0x1.2e6580p-13f));
  exp_parts parts = exp_reduce(g);
  vf power = power_of_two(parts.whole);
  vf high = (1.0f - power) - power * parts.e;
  return with_sign(select(size < 0.875f, low, high), x);
#endif
}

// ---- log ----------------------------------------------------------------------------------------

// log(1 + f) + n ln 2 for f in [sqrt(1/2) - 1, sqrt(2) - 1].
SO_INLINE vf log_assemble(vf f, vf n) {
  vf p = fma(splat<vf>(0x1.1b3e84p-4f), f, splat<vf>(-0x1.e2e1dcp-4f));
  p = fma(p, f, splat<vf>(0x1.e64e0ap-4f));
  p = fma(p, f, splat<vf>(-0x1.fb4446p-4f));
  p = fma(p, f, splat<vf>(0x1.233304p-3f));
  p = fma(p, f, splat<vf>(-0x1.5562dep-3f));
  p = fma(p, f, splat<vf>(0x1.99a542p-3f));
  p = fma(p, f, splat<vf>(-0x1.ffffeep-3f));
  p = fma(p, f, splat<vf>(0x1.555546p-2f));
  vf s = f * f;
  vf small = fma(p * f, s, n * -0x1.bd0106p-13f);
  small = fma(s, splat<vf>(-0.5f), small);
  return fma(n, splat<vf>(0.693359375f), f + small);
}
// Where x is not a positive finite number: log 0 = -inf, log inf = inf, NaN otherwise.
SO_INLINE vf log_edges(vf x, vf result) {
  const vf infinity = splat<vf>(__builtin_inff());
  vf edge = select(x == 0.0f, -infinity, select(x == infinity, x, splat<vf>(__builtin_nanf(""))));
  return select((x > 0.0f) & (x < infinity), result, edge);
}

#if SO_USE_512
SO_INLINE vf exponent(vf x) { return __builtin_ia32_getexpps512_mask(x, x, every_lane, 4); }
#endif

// x = m 2^n: return m - 1, and n in `whole`. With AVX-512 m is in [0.75, 1.5), negative x gives NaN, and n is
// infinite where x is 0 or infinite, so that nothing is left to repair.
SO_INLINE vf log_split(vf x, vf& whole) {
#if SO_USE_512
  vf m = __builtin_ia32_getmantps512_mask(x, 3 | (2 << 2), x, every_lane, 4);
  whole = exponent(x) - exponent(m);
  return m - 1.0f;
#else
  vi tiny = x < 0x1p-126f;
  vi bits = bit_cast<vi>(select(tiny, x * 0x1p23f, x));
  vi n = (bits - 0x3f3504f3) >> 23;
  whole = __builtin_convertvector(n + (tiny & -23), vf);
  return bit_cast<vf>(bits - (n << 23)) - 1.0f;
#endif
}
// log(1 + f) for what log_split returns.
SO_INLINE vf log_rest(vf f) {
#if SO_USE_512
  vf p = fma(splat<vf>(0x1.3d2614p-5f), f, splat<vf>(-0x1.7a908cp-4f));
  p = fma(p, f, splat<vf>(0x1.e09ff0p-4f));
  p = fma(p, f, splat<vf>(-0x1.046d00p-3f));
  p = fma(p, f, splat<vf>(0x1.2444b2p-3f));
  p = fma(p, f, splat<vf>(-0x1.551ad6p-3f));
  p = fma(p, f, splat<vf>(0x1.9998b0p-3f));
  p = fma(p, f, splat<vf>(-0x1.000070p-2f));
  p = fma(p, f, splat<vf>(0x1.555558p-2f));
  return fma(f * f, fma(p, f, splat<vf>(-0.5f)), f);
#else
  return log_assemble(f, splat<vf>(0.0f));
#endif
}

// Measured: 0.88 / 0.77 / 0.77 ulp; 1.1 / 4.0 cycles.
SO_INLINE vf log(vf x) {
  vf n, f = log_split(x, n);
#if SO_USE_512
  return fma(n, splat<vf>(0x1.62e430p-1f), log_rest(f));
#else
  return log_edges(x, log_assemble(f, n));
#endif
}

// Powers of 2 and 10 give whole numbers: floor(log2(x)) relies on it. Each factor is a float and what that
// lacks; the float by which n is multiplied is short, so that the product is exact, and below log10(2),
// since n may be infinite.
// Measured: 1.64 / 1.47 / 1.56 ulp for base 2, 1.44 / 1.49 / 1.87 for base 10.
SO_INLINE vf log2(vf x) {
  vf n, rest = log_rest(log_split(x, n));
  vf result = fma(rest, splat<vf>(0x1.715476p+0f), fma(rest, splat<vf>(0x1.4ae0c0p-26f), n));
  return log_edges(x, result);
}
SO_INLINE vf log10(vf x) {
  vf n, rest = log_rest(log_split(x, n));
  vf low = fma(n, splat<vf>(0x1.3509f8p-18f), rest * -0x1.5b235ep-27f);
  low = fma(rest, splat<vf>(0x1.bcb7b2p-2f), low);
  return log_edges(x, fma(n, splat<vf>(0x1.344p-2f), low));
}

// log of u + lost, where u = fl(1 + x) and lost is the rounding error of that sum: u scales into
// m 2^n, and lost 2^-n joins m - 1.
// Measured: 0.88 / 1.33 / 1.33 ulp; 1.2 (2.9 GHz Xeon with AMX; log 0.9 there) / 5.8 cycles.
SO_INLINE vf log1p(vf x) {
  vf u = x + 1.0f;
  vf back = u - 1.0f;
  vf lost = (1.0f - (u - back)) + (x - back);
#if SO_USE_512
  vf n, f = log_split(u, n);
  // where something is lost, and x is finite; log_split's n is infinite where u is 0
  const auto lanes = __builtin_ia32_cmpps512_mask(lost, vf{}, 12, every_lane, 4);
  f += scale_by_power(lost, -n, lanes);
  vf result = fma(n, splat<vf>(0x1.62e430p-1f), log_rest(f));
#else
  vi bits = bit_cast<vi>(u);
  vi n = (bits - 0x3f3504f3) >> 23;
  vf m = bit_cast<vf>(bits - (n << 23));
  vf scale = bit_cast<vf>((127 - n) << 23);
  vf f = (m - 1.0f) + select(x < 0x1p26f, lost * scale, splat<vf>(0.0f));
  vf result = log_edges(u, log_assemble(f, __builtin_convertvector(n, vf)));
#endif
  return select(abs(x) < 0x1p-25f, x, result);
}

#if SO_USE_512
// 1 / (1 + j / 15) nearly, where its logarithm is close to a float, and that logarithm with its sign changed (the
// first is -0: adding it keeps the sign of a zero).
alignas(64) static const float inverse_fifteenths[16] = {
    1.0f, 0.937500298f, 0.882352591f, 0.833357096f, 0.789496958f, 0.750023842f, 0.71426338f, 0.681818008f,
    0.652164042f, 0.62499994f, 0.599976182f, 0.576922774f, 0.555555582f, 0.535728931f, 0.517218113f, 0.500023842f};
alignas(64) static const float log_fifteenths[16] = {
    -0.0f, 0.0645382032f, 0.12516354f, 0.182293043f, 0.236359298f, 0.287650287f, 0.336503506f, 0.382992506f,
    0.427459151f, 0.470003724f, 0.510865331f, 0.550046861f, 0.587786615f, 0.624126971f, 0.659290612f, 0.693099499f};
#endif

// log1p for 0 <= x <= 1 (or NaN), as in softplus: (1 + x) c = 1 + f with |f| <= 1 / 30 and c from a table in one
// register, so that f is rounded once.
// Measured: 1.02 / 1.36 / 1.37 ulp; 0.7 (2.9 GHz Xeon with AMX; log1p 1.2 there) / 5.8 cycles.
SO_INLINE vf log1p_unit(vf x) {
#if SO_USE_512
  vi index = bit_cast<vi>(fma(x, splat<vf>(15.0f), splat<vf>(0x1.8p23f)));
  vf c = lookup(inverse_fifteenths, index);
  vf f = fma(x, c, -(1.0f - c));  // -0 stays -0
  vf p = fma(splat<vf>(0x1.9a1cb0p-3f), f, splat<vf>(-0x1.002baap-2f));
  p = fma(p, f, splat<vf>(0x1.55554ep-2f));
  p = fma(p, f, splat<vf>(-0.5f));
  return lookup(log_fifteenths, index) + fma(f * f, p, f);
#else
  return log1p(x);
#endif
}

// ---- sin, cos -----------------------------------------------------------------------------------

constexpr float trig_bound = 65536.0f;  // beyond it the reduction below would need more parts

#if !SO_HAS_FMA
SO_INLINE vf trig_reduce(vf size, vf n) {
  vdd wide = __builtin_convertvector(n, vdd);
  vdd r = __builtin_convertvector(size, vdd) - wide * 0x1.921fb544p+0;
  return __builtin_convertvector(r - wide * 0x1.0b4611a626331p-34, vf);
}
#else
// pi / 2 in three floats: the first product cancels exactly, the others restore what it lacks.
SO_INLINE vf trig_reduce(vf size, vf n) {
  vf r = fma(n, splat<vf>(-0x1.921fb6p+0f), size);
  r = fma(n, splat<vf>(0x1.777a5cp-25f), r);
  return fma(n, splat<vf>(0x1.ee59dap-50f), r);
}
#endif

// sin(|x| + quarter * pi / 2) for |x| <= trig_bound.
SO_INLINE vf trig(vf size, int32_t quarter) {
  const vf shift = splat<vf>(0x1.8p23f);
  vf t = fma(size, splat<vf>(0x1.45f306p-1f), shift);
  vi quadrant = bit_cast<vi>(t) - bit_cast<vi>(shift) + quarter;
  vf r = trig_reduce(size, t - shift);
  vf s = r * r;
  vf sine = fma(splat<vf>(0x1.7b13f0p-19f), s, splat<vf>(-0x1.a0561cp-13f));
  sine = fma(sine, s, splat<vf>(0x1.111172p-7f));
  sine = fma(sine, s, splat<vf>(-0x1.555556p-3f));
  sine = fma(sine, s * r, r);
  vf cosine = fma(splat<vf>(0x1.99d65cp-16f), s, splat<vf>(-0x1.6c0c04p-10f));
  cosine = fma(cosine, s, splat<vf>(0x1.55554ap-5f));
  cosine = fma(cosine, s, splat<vf>(-0.5f));
  cosine = fma(cosine, s, splat<vf>(1.0f));
  vf value = select((quadrant & 1) != 0, cosine, sine);
  return bit_cast<vf>(bit_cast<vi>(value) ^ (quadrant << 30 & sign_bit));
}

// Measured: 1.45 / 1.45 / 1.40 ulp; 1.4 / 3.4 cycles.
SO_INLINE vf sin(vf x) {
  vf size = abs(x);
  if (__builtin_expect(any(mask_not(size <= trig_bound)), 0)) return map_lanes<sin_function>(x);
  vf value = trig(size, 0);
  return bit_cast<vf>(bit_cast<vi>(value) ^ (bit_cast<vi>(x) & sign_bit));
}
// Measured: 1.49 / 1.49 / 1.41 ulp; 1.4 / 3.5 cycles.
SO_INLINE vf cos(vf x) {
  vf size = abs(x);
  if (__builtin_expect(any(mask_not(size <= trig_bound)), 0)) return map_lanes<cos_function>(x);
  return trig(size, 1);
}

// ---- asin, acos, atan, and their hyperbolic kin -------------------------------------------------

// asin(x) / x - 1 over x^2, from s = x^2 <= (9/16)^2: relative error of x + x s p below 2^-28.
SO_INLINE vf asin_series(vf s) {
  vf p = fma(splat<vf>(0x1.84fbf6p-5f), s, splat<vf>(0x1.b9e72ep-8f));
  p = fma(p, s, splat<vf>(0x1.169d94p-5f));
  p = fma(p, s, splat<vf>(0x1.6a59a6p-5f));
  p = fma(p, s, splat<vf>(0x1.334932p-4f));
  return fma(p, s, splat<vf>(0x1.555526p-3f));
}
// What |x| above 9/16 is taken from: asin(x) = pi / 2 - 2 asin(sqrt((1 - x) / 2)), where that is below 1/2.
struct arc_parts {
  vi large;
  vf angle;  // asin of |x|, or of that root
};
SO_INLINE arc_parts arc_reduce(vf size) {
  arc_parts parts;
  parts.large = size > 0.5625f;
  vf half = fma(splat<vf>(-0.5f), size, splat<vf>(0.5f));  // exact, and negative beyond 1: its root is NaN
  vf s = select(parts.large, half, size * size);
  vf root = select(parts.large, sqrt(half), size);
  parts.angle = fma(root * s, asin_series(s), root);
  return parts;
}
constexpr float half_pi = 0x1.921fb6p+0f, half_pi_rest = -0x1.777a5cp-25f;

// Measured: 1.33 / 1.33 / 1.37 ulp.
SO_INLINE vf asin(vf x) {
  arc_parts parts = arc_reduce(abs(x));
  vf large = half_pi - fma(splat<vf>(2.0f), parts.angle, splat<vf>(-half_pi_rest));
  return copysign(select(parts.large, large, parts.angle), x);
}
// Measured: 1.06 / 1.06 / 1.07 ulp.
SO_INLINE vf acos(vf x) {
  arc_parts parts = arc_reduce(abs(x));
  vf angle = copysign(parts.angle, x);
  vf twice = parts.angle + parts.angle;
  vf large = select(x < 0.0f, 2 * half_pi - (twice - 2 * half_pi_rest), twice);
  return select(parts.large, large, half_pi - (angle - half_pi_rest));
}
// From |x| or 1 / |x|, whichever is below 1: pi / 2 less the latter's.
// Measured: 1.31 / 1.31 / 1.45 ulp.
SO_INLINE vf atan(vf x) {
  vf size = abs(x);
  vi large = size > 1.0f;
  vf z = select(large, 1.0f / size, size);
  vf s = z * z;
  vf p = fma(splat<vf>(-0x1.d32dacp-10f), s, splat<vf>(0x1.6410e4p-7f));
  p = fma(p, s, splat<vf>(-0x1.fd6fbcp-6f));
  p = fma(p, s, splat<vf>(0x1.da24cap-5f));
  p = fma(p, s, splat<vf>(-0x1.580814p-4f));
  p = fma(p, s, splat<vf>(0x1.c08c1ap-4f));
  p = fma(p, s, splat<vf>(-0x1.242084p-3f));
  p = fma(p, s, splat<vf>(0x1.9991e4p-3f));
  p = fma(p, s, splat<vf>(-0x1.55553ep-2f));
  vf angle = fma(z * s, p, z);
  return copysign(select(large, half_pi - (angle - half_pi_rest), angle), x);
}
constexpr float log_two = 0x1.62e430p-1f;
// log(x + sqrt(x^2 + 1)) as log1p of what is added to 1; past 2^30 that is log(2 x).
// Measured: 1.73 / 1.73 / 1.73 ulp.
SO_INLINE vf asinh(vf x) {
  vf size = abs(x);
  vi large = size > 0x1p30f;
  vf s = select(large, splat<vf>(0.0f), size * size);
  vf near = log1p(size + s / (sqrt(s + 1.0f) + 1.0f));
  if (__builtin_expect(any(large), 0)) near = select(large, log(size) + log_two, near);
  return copysign(near, x);
}
// With t = x - 1, which is exact below 2 and rounds little above: log1p(t + sqrt(2 t + t^2)).
// Measured: 2.00 / 2.00 / 2.00 ulp.
SO_INLINE vf acosh(vf x) {
  vi large = x > 0x1p30f;
  vf t = x - 1.0f;
  vf near = log1p(t + sqrt(fma(t, select(large, splat<vf>(0.0f), t), t + t)));
  if (__builtin_expect(any(large), 0)) near = select(large, log(x) + log_two, near);
  return select(x < 1.0f, splat<vf>(__builtin_nanf("")), near);
}
// Measured: 1.66 / 1.66 / 1.66 ulp.
SO_INLINE vf atanh(vf x) {
  vf size = abs(x);
  vf twice = size + size;  // what the division loses counts less, the smaller x is
  vf inside = 0.5f * log1p(twice + twice * size / (1.0f - size));
  return copysign(select(size > 1.0f, splat<vf>(__builtin_nanf("")), inside), x);
}

// ---- pow ----------------------------------------------------------------------------------------

typedef float vf_half SO_VECTOR(SO_VECTOR_BYTES / 2);  // as many floats as vd has doubles

// 2^(y (n + log2 m)) for m in [sqrt(1/2), sqrt(2)], through float64, whose conversion to float32
// rounds, overflows and underflows as it should.
SO_INLINE vf_half pow_half(vf_half mantissa, vf_half exponent, vf_half y) {
  vd m = __builtin_convertvector(mantissa, vd);
  vd s = (m - 1.0) / (m + 1.0);
  vd s2 = s * s;
  vd p = s2 * 0x1.21b29368793fap-2 + 0x1.4795378472c15p-2;
  p = p * s2 + 0x1.a61a2f8d8c5dcp-2;
  p = p * s2 + 0x1.2776c29247fb1p-1;
  p = p * s2 + 0x1.ec709dc53d29dp-1;
  p = p * s2 + 0x1.71547652b8251p+1;
  vd z = (p * s + __builtin_convertvector(exponent, vd)) * __builtin_convertvector(y, vd);
  const vd bound = splat<vd>(200.0);
  z = select(z < -bound, -bound, select(z > bound, bound, z));
  vd t = z + 0x1.8p52;
  vd r = z - (t - 0x1.8p52);
  vd q = r * 0x1.449901f6f5258p-13 + 0x1.5f48f462509f6p-10;
  q = q * r + 0x1.3b2995e9148f4p-7;
  q = q * r + 0x1.c6aecbfb702b5p-5;
  q = q * r + 0x1.ebfbe10e4c8d9p-3;
  q = q * r + 0x1.62e430d088945p-1;
  q = q * r + 0x1.ffffffff4ddb0p-1;
  vl power = (bit_cast<vl>(t) + 1023) << 52;  // of t only the low bits, an integer, are left
  return __builtin_convertvector(q * bit_cast<vd>(power), vf_half);
}

// |x|^y for finite |x| > 0 and finite y.
SO_INLINE vf pow_magnitude(vf size, vf y) {
  vi tiny = size < 0x1p-126f;
  vi bits = bit_cast<vi>(select(tiny, size * 0x1p23f, size));
  vi n = (bits - 0x3f3504f3) >> 23;
  struct pair { vf_half low, high; };
  pair m = bit_cast<pair>(bits - (n << 23));
  pair e = bit_cast<pair>(__builtin_convertvector(n + (tiny & -23), vf));
  pair power = bit_cast<pair>(y);
  pair result = {pow_half(m.low, e.low, power.low), pow_half(m.high, e.high, power.high)};
  return bit_cast<vf>(result);
}

// Measured: 0.54 / 0.54 / 0.54 ulp; 9.3 / 18 cycles.
SO_INLINE vf pow(vf x, vf y) {
  const vf one = splat<vf>(1.0f), zero = splat<vf>(0.0f), infinity = splat<vf>(__builtin_inff());
  vf size = abs(x);
  vi whole = round(y) == y;  // infinities are whole and even, so are floats from 2^24 on
  vi odd = whole & (round(y * 0.5f) != y * 0.5f);
  vf result = pow_magnitude(size, y);
  // 0 and infinity to the y, and anything to an infinite y.
  vi grows = ((size > one) & (y > zero)) | ((size < one) & (y < zero));
  vi extreme = (size == zero) | (size == infinity) | (abs(y) == infinity);
  result = select(extreme, select(size == one, one, select(grows, infinity, zero)), result);
  result = bit_cast<vf>(bit_cast<vi>(result) ^ (odd & bit_cast<vi>(x) & sign_bit));
  vi undefined = (x < zero) & mask_not(whole) & (size != infinity);
  result = select(undefined | (x != x) | (y != y), splat<vf>(__builtin_nanf("")), result);
  return select((y == zero) | (x == one), one, result);
}

}  // namespace so

#pragma GCC diagnostic pop
