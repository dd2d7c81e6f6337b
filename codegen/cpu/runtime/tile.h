// What generated kernels need beside vectors, functions and tile products: scratch memory, strided
// and integer lanes, rounding to 16-bit types, integer division as PyTorch defines it.
//
// In: addresses and counts from the generated loops. Out: values of the kinds in simd.h.
// Invariant: a masked access touches exactly the elements that it names.
#pragma once

#include "gemm.h"
#include "math.h"

#include <math.h>
#include <stdlib.h>

#define SO_KERNEL extern "C" __attribute__((visibility("default"))) void

namespace so {

// A number that a function which takes anything knows when it is compiled.
template <int N> struct number { enum : int { value = N }; };

// ---- Scratch ------------------------------------------------------------------------------------

// One buffer per thread, kept between calls: page faults of fresh memory cost more than small
// kernels do. Visible, so that all kernels of a process share it where the linker can.
struct __attribute__((visibility("default"))) scratch_memory {
  char* start = nullptr;
  size_t size = 0;
};
__attribute__((visibility("default"))) inline scratch_memory& thread_scratch() {
  static thread_local scratch_memory memory;
  return memory;
}
SO_INLINE char* scratch(size_t bytes) {
  scratch_memory& memory = thread_scratch();
  if (memory.size < bytes) {
    free(memory.start);
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    memory.start = static_cast<char*>(aligned_alloc(4096, rounded));
    if (!memory.start) abort();
    memory.size = rounded;
  }
  return memory.start;
}

template <class T>
SO_NOINLINE void fill(T* to, long count, T value) {
  for (long i = 0; i < count; ++i) to[i] = value;
}
template <class T>
SO_NOINLINE void add(T* to, const T* from, long count) {
  for (long i = 0; i < count; ++i) to[i] += from[i];
}

// ---- Stores past the caches -----------------------------------------------------------------------

// For outputs larger than the caches: the line is not read before it is overwritten. Needs
// finish_stores before another thread may look.
template <class T>
SO_INLINE void store_past(T* p, vf v) { store(p, v); }
SO_INLINE void store_past(float* p, vf v) {
#if SO_USE_512
  if ((reinterpret_cast<uintptr_t>(p) & 63) == 0) return __builtin_ia32_movntps512(p, v);
#elif SO_USE_256
  if ((reinterpret_cast<uintptr_t>(p) & 31) == 0) return __builtin_ia32_movntps256(p, v);
#endif
  store(p, v);
}
template <class T>
SO_INLINE void store_pair_past(T* p, vf even, vf odd) { store_pair(p, even, odd); }
SO_INLINE void store_pair_past(bf16* p, vf even, vf odd) {
  const vu both = pair_bf16(even, odd);
  store_past(reinterpret_cast<float*>(p), bit_cast<vf>(both));
}
SO_INLINE void finish_stores() {
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#endif
}

// ---- Lanes that are not consecutive, and integer lanes -------------------------------------------

template <class H, int... LANE>
SO_INLINE vi join(H first, H second, lane_list<LANE...>) {
  return __builtin_shufflevector(first, second, LANE...);
}
#if SO_USE_512
typedef int32_t half_lanes SO_VECTOR(32);
typedef long long long_lanes SO_VECTOR(64);
template <class T> constexpr bool is_gathered = false;
template <> constexpr bool is_gathered<float> = true;
template <> constexpr bool is_gathered<bf16> = true;
SO_INLINE vl first_half(vi x) {
  return __builtin_convertvector(__builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7), vl);
}
SO_INLINE vl second_half(vi x) {
  return __builtin_convertvector(__builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15), vl);
}
// Words at byte offsets, of the first n lanes.
SO_INLINE vi gather_words(uintptr_t from, vl low, vl high, long n) {
  const unsigned lanes = (1u << n) - 1u;
  const void* p = reinterpret_cast<const void*>(from);
  const half_lanes first =
      __builtin_ia32_gatherdiv16si(half_lanes{}, p, bit_cast<long_lanes>(low), lanes & 0xff, 1);
  const half_lanes second =
      __builtin_ia32_gatherdiv16si(half_lanes{}, p, bit_cast<long_lanes>(high), lanes >> 8, 1);
  return join(first, second, count_lanes<VL>::type());
}
SO_INLINE vf gather(const float* p, vl low, vl high, long n) {
  return bit_cast<vf>(gather_words(reinterpret_cast<uintptr_t>(p), low * 4, high * 4, n));
}
// Words that are aligned: none lies partly beyond the tensor's memory.
SO_INLINE vf gather(const bf16* p, vl low, vl high, long n) {
  const auto from = reinterpret_cast<uintptr_t>(p);
  low = low * 2 + static_cast<int64_t>(from & 2);
  high = high * 2 + static_cast<int64_t>(from & 2);
  const vi words = gather_words(from & ~uintptr_t{3}, low & ~int64_t{3}, high & ~int64_t{3}, n);
  const half_lanes first = __builtin_convertvector(low & 2, half_lanes);
  const half_lanes second = __builtin_convertvector(high & 2, half_lanes);
  const vi upper = join(first, second, count_lanes<VL>::type()) != 0;
  return bit_cast<vf>(upper ? words & static_cast<int32_t>(upper_half) : words << 16);
}
#endif
// One element per lane: where its place says, and `step` from lane to lane.
template <class T>
SO_INLINE vf load_scattered(const T* p, vi places, long stride, long step, long n = VL) {
#if SO_USE_512
  if constexpr (is_gathered<T>) {
    const vi lane = iota();
    const vl low = first_half(places) * stride + first_half(lane) * step;
    const vl high = second_half(places) * stride + second_half(lane) * step;
    return gather(p, low, high, n);
  }
#endif
  vf v = {};
  for (long i = 0; i < n; ++i) v[i] = load_scalar<float>(p + places[i] * stride + i * step);
  return v;
}
template <int... LANE>
SO_INLINE vf every_second_of(vf low, vf high, lane_list<LANE...>) {
  return __builtin_shufflevector(low, high, (2 * LANE + (LANE >= VL / 2))...);
}
// The first n of the elements that lie STEP, a power of 2, apart: from whole vectors, of which the second begins with
// the last element of the first, so that nothing is read past the last one.
template <long STEP, class T>
SO_INLINE vf load_apart(const T* p, long n) {
  if constexpr (STEP == 1) {
    return n >= VL ? load<vf>(p) : load_n<vf>(p, n);
  } else {
    const vf low = load_apart<STEP / 2>(p, 2 * n - 1);
    const long rest = 2 * n - VL;
    const vf high = rest > 0 ? load_apart<STEP / 2>(p + (VL - 1) * (STEP / 2), rest) : vf{};
    return every_second_of(low, high, count_lanes<VL>::type());
  }
}
template <class T, int... LANE>
SO_INLINE vf load_each(const T* p, long stride, lane_list<LANE...>) {
  return vf{load_scalar<float>(p + LANE * stride)...};
}
template <class T>
SO_INLINE vf load_strided(const T* p, long stride, long n = VL) {
  if (n > 0 && stride == 2) return load_apart<2>(p, n);
  if (n > 0 && stride == 4) return load_apart<4>(p, n);
#if !SO_USE_512
  if (n == VL) return load_each(p, stride, count_lanes<VL>::type());
#endif
  return load_scattered(p, vi{}, 0, stride, n);
}
template <class T, int... LANE>
SO_INLINE void store_each(T* p, long stride, vf v, lane_list<LANE...>) {
  (store(p + LANE * stride, static_cast<float>(v[LANE])), ...);
}
template <class T>
SO_INLINE void store_strided(T* p, long stride, vf v, long n = VL) {
#if SO_USE_512
  if constexpr (is_gathered<T> && sizeof(T) == 4) {
    typedef float half SO_VECTOR(32);
    const unsigned lanes = (1u << n) - 1u;
    const half below = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7);
    const vl low = first_half(iota()) * (4 * stride), high = second_half(iota()) * (4 * stride);
    __builtin_ia32_scatterdiv16sf(p, lanes & 0xff, bit_cast<long_lanes>(low), below, 1);
    const half above = __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
    __builtin_ia32_scatterdiv16sf(p, lanes >> 8, bit_cast<long_lanes>(high), above, 1);
    return;
  }
#endif
  if (n == VL) return store_each(p, stride, v, count_lanes<VL>::type());
  for (long i = 0; i < n; ++i) store(p + i * stride, static_cast<float>(v[i]));
}

// 64-bit integers as 32-bit lanes, saturated: a comparison with a number well inside the 32-bit
// range has the same answer. Generated code uses them for nothing else.
template <class T>
SO_INLINE int32_t saturate(T x) {
  const int64_t wide = static_cast<int64_t>(x);
  return static_cast<int32_t>(wide < INT32_MIN ? INT32_MIN : wide > INT32_MAX ? INT32_MAX : wide);
}
SO_INLINE vi saturate(vl low, vl high) {
  typedef int32_t half SO_VECTOR(SO_VECTOR_BYTES / 2);
#if SO_USE_512
  typedef long long wide SO_VECTOR(64);
  const half first = __builtin_ia32_pmovsqd512_mask(bit_cast<wide>(low), half{}, 0xff);
  const half second = __builtin_ia32_pmovsqd512_mask(bit_cast<wide>(high), half{}, 0xff);
#else
  const vl least = vl{} + INT32_MIN, greatest = vl{} + INT32_MAX;
  low = low < least ? least : low > greatest ? greatest : low;
  high = high < least ? least : high > greatest ? greatest : high;
  const half first = __builtin_convertvector(low, half);
  const half second = __builtin_convertvector(high, half);
#endif
  return join(first, second, count_lanes<VL>::type());
}
SO_INLINE vi add_saturated(vi a, vi b) {
  const vi sum = a + b, least = vi{} + INT32_MIN, greatest = vi{} + INT32_MAX;
  return ((a ^ sum) & (b ^ sum)) < 0 ? (a < 0 ? least : greatest) : sum;
}
SO_INLINE vi load_integers(const int8_t* p) { return extend(load_raw<vb>(p)); }
SO_INLINE vi load_integers(const uint8_t* p) { return extend(load_raw<vub>(p)); }
SO_INLINE vi load_integers(const int16_t* p) { return extend(load_raw<vs>(p)); }
SO_INLINE vi load_integers(const int32_t* p) { return load_raw<vi>(p); }
SO_INLINE vi load_integers(const int64_t* p) {
  return saturate(load_raw<vl>(p), load_raw<vl>(p + VL / 2));
}
// The lanes at and beyond n hold 0.
template <class T>
SO_INLINE vi load_first_integers(const T* p, long n) {
  T buffer[VL] = {};
  for (long i = 0; i < n; ++i) buffer[i] = p[i];
  return load_integers(buffer);
}
#if SO_USE_512
SO_INLINE vi load_first_integers(const int64_t* p, long n) {
  typedef long long wide SO_VECTOR(64);
  const auto from = reinterpret_cast<const long long*>(p);
  const unsigned lanes = (1u << n) - 1u;
  const wide low = __builtin_ia32_loaddqudi512_mask(from, wide{}, lanes & 0xff);
  const wide high = __builtin_ia32_loaddqudi512_mask(from + 8, wide{}, lanes >> 8);
  return saturate(bit_cast<vl>(low), bit_cast<vl>(high));
}
#endif
template <class T>
SO_INLINE vi load_integers(const T* p, long stride, long n = VL) {
  if (stride == 1) return load_first_integers(p, n);
  vi v = {};
  for (long i = 0; i < n; ++i) v[i] = saturate(p[i * stride]);
  return v;
}
template <class T>
SO_INLINE void store_integers(T* p, vi v, long stride = 1, long n = VL) {
  for (long i = 0; i < n; ++i) p[i * stride] = static_cast<T>(v[i]);
}
SO_INLINE vi splat_integer(int64_t x) { return broadcast_i(saturate(x)); }
SO_INLINE vi splat_mask(bool x) { return broadcast_i(x ? -1 : 0); }
SO_INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }
SO_INLINE vi abs(vi x) { return x < 0 ? -x : x; }
SO_INLINE vi min_integers(vi a, vi b) { return a < b ? a : b; }
SO_INLINE vi max_integers(vi a, vi b) { return a > b ? a : b; }

// A place that an index tensor gives, inside its dim whatever the tensor holds.
template <class T>
SO_INLINE int64_t within(T place, long extent) {
  return min_of(max_of(place, 0), extent - 1);
}

SO_INLINE vi within_lanes(vi places, long extent) {
  return min_integers(max_integers(places, vi{}), splat_integer(extent - 1));
}
// What argmax and argmin prefer to what they have: NaN to anything else, and the first of equals.
template <class T>
SO_INLINE bool above(T a, T b) { return a > b || (a != a && b == b); }
template <class T>
SO_INLINE bool below(T a, T b) { return a < b || (a != a && b == b); }

// ---- Meanings that C++ has no operator for -------------------------------------------------------

// Round to a 16-bit type and back: the value an operation on that type has.
template <class H>
SO_INLINE vf round_to(vf x) { return widen(narrow(x, H{}), H{}); }
template <>
SO_FORCED vf round_to<bf16>(vf x) { return bit_cast<vf>(round_bf16(x) & upper_half); }
template <class H>
SO_INLINE float round_to(float x) { return widen(narrow(x, H{}), H{}); }

// The shift of a running maximum `peak` (Milakov & Gimelshein, 2018): it stays until it is `lag` below, so that
// what is accumulated is rarely rescaled (Zadouri et al., FlashAttention-4, 2026).
SO_INLINE vf lagging(vf shift, vf peak, float lag) { return select(peak > shift + lag, peak, shift); }
SO_INLINE float lagging(float shift, float peak, float lag) { return peak > shift + lag ? peak : shift; }
SO_INLINE double lagging(double shift, double peak, float lag) { return peak > shift + lag ? peak : shift; }
// exp(m - shift) is meant to be free of NaN where m never was finite.
SO_INLINE vf finite_or_zero(vf m) { return select(m > -__builtin_inff(), m, vf{}); }
SO_INLINE float finite_or_zero(float m) { return m > -__builtin_inff() ? m : 0.0f; }
SO_INLINE double finite_or_zero(double m) { return m > -__builtin_inf() ? m : 0.0; }

template <class T>
SO_INLINE T floor_divide(T a, T b) {
  const T q = a / b;
  return (a % b != 0 && ((a < 0) != (b < 0))) ? q - 1 : q;
}
template <class T>
SO_INLINE T floor_modulo(T a, T b) {
  const T r = a % b;
  return (r != 0 && ((r < 0) != (b < 0))) ? r + b : r;
}
// torch.floor_divide on floats: exact multiples are not rounded past (as CPython's floor division).
template <class V>
SO_INLINE V floor_divide_real(V a, V b) {
  const V modulo = fmod(a, b);
  V q = (a - modulo) / b;
  q = select(mask_and(modulo != 0.0f, mask_not((b < 0.0f) == (modulo < 0.0f))), q - 1.0f, q);
  const V whole = floor(q);
  const V rounded = select(q - whole > 0.5f, whole + 1.0f, whole);
  const V zero = a / b * 0.0f;
  return select(b == 0.0f, a / b, select(q != 0.0f, rounded, zero));
}
template <class T>
SO_INLINE T power_integer(T base, T exponent) {
  if (exponent < 0) return base == 1 ? 1 : base == -1 ? (exponent & 1 ? -1 : 1) : 0;
  T result = 1;
  for (; exponent; exponent >>= 1, base *= base)
    if (exponent & 1) result *= base;
  return result;
}

// One lane of a vector function: a scalar inside a loop over rows, without a library call.
#define SO_ONE_LANE(name) \
  SO_INLINE float name##_one(float x) { return name(splat<vf>(x))[0]; } \
  SO_INLINE double name##_one(double x) { return name(x); }
SO_ONE_LANE(exp) SO_ONE_LANE(log) SO_ONE_LANE(tanh) SO_ONE_LANE(sigmoid) SO_ONE_LANE(erf)
SO_ONE_LANE(expm1) SO_ONE_LANE(log1p) SO_ONE_LANE(log2) SO_ONE_LANE(log10)
#undef SO_ONE_LANE

// What a group of rows has left of a reduction, a vector each, to one value each: the first `rows` of
// `to`. What the vectors of missing rows hold does not matter.
template <class Combine>
SO_INLINE void fold_rows(const float* partial, float* to, long rows) {
  vf v[VL];
#pragma GCC unroll 16
  for (int i = 0; i < VL; ++i) v[i] = load<vf>(partial + i * VL);
  fold_vectors<VL, 1>(v, Combine{});
  store_n(to, v[0], rows);
}

// Whether a row of a group has left a maximum that is above its shift by more than `lag`.
SO_INLINE bool above(const float* partial, const float* shifts, float lag, long rows) {
  vi found = {};
#pragma GCC unroll 4
  for (long i = 0; i < rows; ++i) found |= load<vf>(partial + i * VL) > splat<vf>(shifts[i] + lag);
  return any(found);
}

// Whether a row of a group has no maximum yet.
SO_INLINE bool without(const float* shifts, long rows) {
  return any((load_n<vf>(shifts, rows) == -__builtin_inff()) & first_lanes(rows));
}
// Whether partial sums of a row of a group are above `most`, or NaN.
SO_INLINE bool over(const float* partial, float most, long rows) {
  vi found = {};
#pragma GCC unroll 4
  for (long i = 0; i < rows; ++i) found |= ~(load<vf>(partial + i * VL) <= splat<vf>(most));
  return any(found);
}
// Whether all sums of a group's rows are between `least` and `most`; NaN is not.
SO_INLINE bool between(const float* sums, float least, float most, long rows) {
  const vf sum = load_n<vf>(sums, rows);
  return all((sum >= splat<vf>(least)) & (sum <= splat<vf>(most)) | ~first_lanes(rows));
}

// exp(power * (shift - peak)); 0 where the maximum stayed -inf: what was added counts nothing.
SO_INLINE vf settled(vf shift, vf peak, float power) {
  const vf factor = select(shift == peak, splat<vf>(1.0f), so::exp((shift - peak) * power));
  return select(peak == -__builtin_inff(), vf{}, factor);
}
template <class T>
SO_INLINE T settled(T shift, T peak, float power) {
  if (shift == peak) return peak == -__builtin_inff() ? T(0) : T(1);
  return so::exp_one((shift - peak) * power);
}
// Whether a group of rows is to be scaled: not all of their factors are 1.
SO_INLINE bool scales(const float* factors, long rows) {
  return any(load_n<vf>(factors, (int)rows, 1.0f) != 1.0f);
}
SO_INLINE bool scales(const double* factors, long rows) {
  bool found = false;
  for (long i = 0; i < rows; ++i) found |= factors[i] != 1.0;
  return found;
}

// C[m,n] (+)= A[m,k] B[k,n] for element types without a vector form, any strides.
template <bool ACCUMULATE, class V, class TA, class TB>
SO_NOINLINE void gemm_plain(long m, long n, long k, const TA* a, long am, long ak, const TB* b,
                            long bk, long bn, V* c, long cm, long cn) {
  for (long i = 0; i < m; ++i)
    for (long j = 0; j < n; ++j) {
      V sum = ACCUMULATE ? c[i * cm + j * cn] : V(0);
      for (long x = 0; x < k; ++x)
        sum += load_scalar<V>(a + i * am + x * ak) * load_scalar<V>(b + x * bk + j * bn);
      c[i * cm + j * cn] = sum;
    }
}

}  // namespace so
