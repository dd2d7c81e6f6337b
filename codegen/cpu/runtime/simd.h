// Vectors for generated C++ kernels: types, loads, stores, masks, conversions, reductions.
//
// In:  SO_VECTOR_BYTES (64, 32 or 16; by default the widest the compiler was told it may use).
// Out: so::vf, a vector of SO_VL floats, and functions on it. Every function also exists for
//      scalar float and double, so one template body serves all three: write it over V with
//      load<V>(p), splat<V>(x), fma, select, min, max, hsum, store(p, v).
// Invariant: NaN, infinities, denormals and signed zeros behave as in PyTorch, whatever the width
//      and the compiler flags (short of -ffast-math, which must not be used). A memory operation
//      with a count touches exactly that many elements.
// Source: GCC and clang vector extensions, which are portable; __builtin_ia32_* fast paths are for
//      GCC only and stand beside a portable form. <immintrin.h> is avoided: it costs every kernel
//      0.3 s or more of compile time.
#pragma once

#include <stdint.h>
#include <string.h>

#ifndef SO_VECTOR_BYTES
#if defined(__AVX512F__)
#define SO_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define SO_VECTOR_BYTES 32
#else
#define SO_VECTOR_BYTES 16
#endif
#endif
static_assert(SO_VECTOR_BYTES == 16 || SO_VECTOR_BYTES == 32 || SO_VECTOR_BYTES == 64,
              "SO_VECTOR_BYTES must be 16, 32 or 64");
#define SO_VL (SO_VECTOR_BYTES / 4)
#define SO_FORCED inline __attribute__((always_inline))
#define SO_INLINE static inline __attribute__((always_inline))
#define SO_COLD static __attribute__((noinline, cold, unused))
#define SO_VECTOR(bytes) __attribute__((vector_size(bytes)))

// GCC's machine builtins: their names and signatures are not clang's.
#define SO_USE_512 0
#define SO_USE_256 0
#define SO_USE_128 0
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__)
#if SO_VECTOR_BYTES == 64 && defined(__AVX512F__)
#undef SO_USE_512
#define SO_USE_512 1
#elif SO_VECTOR_BYTES == 32 && defined(__AVX__)
#undef SO_USE_256
#define SO_USE_256 1
#elif SO_VECTOR_BYTES == 16
#undef SO_USE_128
#define SO_USE_128 1
#endif
#endif
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || SO_USE_512
#define SO_HAS_FMA 1
#else
#define SO_HAS_FMA 0
#endif

// Everything here is inlined, so the calling convention of wide vectors never matters.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi"

namespace so {

typedef float vf SO_VECTOR(SO_VECTOR_BYTES);        // SO_VL floats
typedef int32_t vi SO_VECTOR(SO_VECTOR_BYTES);      // SO_VL integers, or a mask of 0 / -1
typedef uint32_t vu SO_VECTOR(SO_VECTOR_BYTES);     // SO_VL unsigned integers (bit patterns)
typedef double vd SO_VECTOR(SO_VECTOR_BYTES);       // SO_VL / 2 doubles
typedef int64_t vl SO_VECTOR(SO_VECTOR_BYTES);      // SO_VL / 2 long integers, or a mask of vd
typedef uint16_t vh SO_VECTOR(SO_VECTOR_BYTES / 2); // SO_VL 16-bit patterns
typedef int16_t vs SO_VECTOR(SO_VECTOR_BYTES / 2);
typedef int8_t vb SO_VECTOR(SO_VECTOR_BYTES / 4);   // SO_VL bytes
typedef uint8_t vub SO_VECTOR(SO_VECTOR_BYTES / 4);
typedef int64_t vll SO_VECTOR(SO_VECTOR_BYTES * 2); // SO_VL long integers
typedef double vdd SO_VECTOR(SO_VECTOR_BYTES * 2);  // SO_VL doubles

constexpr int VL = SO_VL;
constexpr unsigned short every_lane = 0xffff;  // the mask operand of AVX-512 builtins
constexpr int32_t sign_bit = INT32_MIN;

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

// What a value type of a kernel template is: how many lanes, of what, and its mask type.
template <class V> struct value;
template <> struct value<vf> { typedef float scalar; typedef vi mask; enum { lanes = SO_VL }; };
template <> struct value<vd> {
  typedef double scalar;
  typedef vl mask;
  enum { lanes = SO_VL / 2 };
};
template <> struct value<float> { typedef float scalar; typedef bool mask; enum { lanes = 1 }; };
template <> struct value<double> { typedef double scalar; typedef bool mask; enum { lanes = 1 }; };
template <> struct value<int32_t> {
  typedef int32_t scalar;
  typedef bool mask;
  enum { lanes = 1 };
};
template <> struct value<int64_t> {
  typedef int64_t scalar;
  typedef bool mask;
  enum { lanes = 1 };
};

// 0, 1, ..., N - 1 as template arguments, for shuffles.
template <int... LANE> struct lane_list {};
template <int N, int... LANE> struct count_lanes : count_lanes<N - 1, N - 1, LANE...> {};
template <int... LANE> struct count_lanes<0, LANE...> { typedef lane_list<LANE...> type; };

template <class To, class From> SO_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// ---- Broadcast ----------------------------------------------------------------------------------

// x - 0 is x for every x, -0.0 included, and compilers know it: this becomes one broadcast. Setting
// the lanes in a loop does not (GCC 12 builds half vectors; tile products ran 1.8x slower on a
// Cascade Lake, 2026-11).
template <class V> SO_INLINE V splat(typename value<V>::scalar x) {
  if constexpr (value<V>::lanes == 1) {
    return x;
  } else {
    return x - V{};
  }
}
// Keep a product apart from the addition that reads it. Merged into one FMA, x * c - max(x * c) is
// the product's rounding error and not 0, which exp turns into inf where scores are large.
template <class V> SO_INLINE V rounded(V x) {
#if defined(__x86_64__)
  __asm__("" : "+v"(x));
#elif defined(__aarch64__)
  __asm__("" : "+w"(x));
#else
  __asm__("" : "+m"(x));
#endif
  return x;
}
SO_INLINE vf broadcast(float x) { return splat<vf>(x); }
SO_INLINE vi broadcast_i(int32_t x) { return x - vi{}; }
SO_INLINE vi iota() {
  vi v;
  for (int i = 0; i < SO_VL; ++i) v[i] = i;
  return v;
}

// ---- Masks and selection ------------------------------------------------------------------------
// A comparison gives vi (0 or -1 per lane) for vf, vl for vd, and bool for a scalar.

SO_INLINE vf select(vi mask, vf yes, vf no) { return mask ? yes : no; }
SO_INLINE vi select(vi mask, vi yes, vi no) { return mask ? yes : no; }
SO_INLINE vd select(vl mask, vd yes, vd no) { return mask ? yes : no; }
SO_INLINE float select(bool mask, float yes, float no) { return mask ? yes : no; }
SO_INLINE double select(bool mask, double yes, double no) { return mask ? yes : no; }
SO_INLINE int32_t select(bool mask, int32_t yes, int32_t no) { return mask ? yes : no; }
SO_INLINE int64_t select(bool mask, int64_t yes, int64_t no) { return mask ? yes : no; }
SO_INLINE vi mask_not(vi mask) { return ~mask; }
SO_INLINE vl mask_not(vl mask) { return ~mask; }
SO_INLINE bool mask_not(bool mask) { return !mask; }
SO_INLINE vi mask_and(vi a, vi b) { return a & b; }
SO_INLINE vl mask_and(vl a, vl b) { return a & b; }
SO_INLINE bool mask_and(bool a, bool b) { return a && b; }
SO_INLINE vi mask_or(vi a, vi b) { return a | b; }
SO_INLINE vl mask_or(vl a, vl b) { return a | b; }
SO_INLINE bool mask_or(bool a, bool b) { return a || b; }
// 1.0 where the mask holds, 0.0 elsewhere: a comparison used as a number.
SO_INLINE vf mask_value(vi mask) { return bit_cast<vf>(mask & bit_cast<vi>(splat<vf>(1.0f))); }
SO_INLINE float mask_value(bool mask) { return mask ? 1.0f : 0.0f; }
// The first n lanes.
SO_INLINE vi first_lanes(int64_t n) {
  return iota() < broadcast_i(n > SO_VL ? SO_VL : static_cast<int32_t>(n));
}

SO_INLINE bool any(bool mask) { return mask; }
SO_INLINE bool any(vi mask) {
#if SO_USE_512
  return __builtin_ia32_ptestmd512(mask, mask, every_lane) != 0;
#elif SO_USE_256
  return __builtin_ia32_movmskps256(bit_cast<vf>(mask)) != 0;
#elif SO_USE_128
  return __builtin_ia32_movmskps(bit_cast<vf>(mask)) != 0;
#else
  int32_t bits = 0;
  for (int i = 0; i < SO_VL; ++i) bits |= mask[i];
  return bits != 0;
#endif
}
template <class M> SO_INLINE bool all(M mask) { return !any(mask_not(mask)); }
// Whether all lanes are below `bound`; NaN is not.
SO_INLINE bool all_less(vf x, float bound) {
#if SO_USE_512
  return __builtin_ia32_cmpps512_mask(x, splat<vf>(bound), 21, every_lane, 4) == 0;
#else
  return all(x < splat<vf>(bound));
#endif
}

// ---- Arithmetic ---------------------------------------------------------------------------------

// a * b + c, fused where the device can (and contracted by the compiler's default otherwise).
SO_INLINE vf fma(vf a, vf b, vf c) {
#if SO_USE_512
  return __builtin_ia32_vfmaddps512_mask(a, b, c, every_lane, 4);
#elif SO_USE_256 && defined(__FMA__)
  return __builtin_ia32_vfmaddps256(a, b, c);
#elif SO_USE_128 && defined(__FMA__)
  return __builtin_ia32_vfmaddps(a, b, c);
#else
  return a * b + c;
#endif
}
SO_INLINE vd fma(vd a, vd b, vd c) { return a * b + c; }
SO_INLINE float fma(float a, float b, float c) {
#if SO_HAS_FMA
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
SO_INLINE double fma(double a, double b, double c) {
#if SO_HAS_FMA
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}
SO_INLINE int32_t fma(int32_t a, int32_t b, int32_t c) { return a * b + c; }
SO_INLINE int64_t fma(int64_t a, int64_t b, int64_t c) { return a * b + c; }

// The larger (smaller) one; of two values that do not compare, the second. One instruction.
// For operands known not to be NaN, or where a NaN may stand only in `b`.
SO_INLINE vf max_fast(vf a, vf b) {
#if SO_USE_512
  return __builtin_ia32_maxps512_mask(a, b, a, every_lane, 4);
#elif SO_USE_256
  return __builtin_ia32_maxps256(a, b);
#elif SO_USE_128
  return __builtin_ia32_maxps(a, b);
#else
  return a > b ? a : b;
#endif
}
SO_INLINE vf min_fast(vf a, vf b) {
#if SO_USE_512
  return __builtin_ia32_minps512_mask(a, b, a, every_lane, 4);
#elif SO_USE_256
  return __builtin_ia32_minps256(a, b);
#elif SO_USE_128
  return __builtin_ia32_minps(a, b);
#else
  return a < b ? a : b;
#endif
}
template <class V> SO_INLINE V max_fast(V a, V b) { return a > b ? a : b; }
template <class V> SO_INLINE V min_fast(V a, V b) { return a < b ? a : b; }

// torch.maximum and torch.minimum: NaN if either operand is. A running extreme is the first one: it does
// not wait for the comparison.
template <class V> SO_INLINE V max(V a, V b) { return b != b ? b : max_fast(b, a); }
template <class V> SO_INLINE V min(V a, V b) { return b != b ? b : min_fast(b, a); }
#if SO_USE_512
SO_INLINE vf max(vf a, vf b) {
  const auto ordered = __builtin_ia32_cmpps512_mask(b, b, 7, every_lane, 4);
  return __builtin_ia32_maxps512_mask(b, a, b, ordered, 4);
}
SO_INLINE vf min(vf a, vf b) {
  const auto ordered = __builtin_ia32_cmpps512_mask(b, b, 7, every_lane, 4);
  return __builtin_ia32_minps512_mask(b, a, b, ordered, 4);
}
#endif

SO_INLINE vf abs(vf x) { return bit_cast<vf>(bit_cast<vi>(x) & 0x7fffffff); }
SO_INLINE vd abs(vd x) { return bit_cast<vd>(bit_cast<vl>(x) & 0x7fffffffffffffff); }
SO_INLINE float abs(float x) { return __builtin_fabsf(x); }
SO_INLINE double abs(double x) { return __builtin_fabs(x); }
// The most negative integer wraps to itself, as torch.abs has it.
SO_INLINE int32_t abs(int32_t x) {
  return x < 0 ? static_cast<int32_t>(0u - static_cast<uint32_t>(x)) : x;
}
SO_INLINE int64_t abs(int64_t x) {
  return x < 0 ? static_cast<int64_t>(0ull - static_cast<uint64_t>(x)) : x;
}

// Only for non-negative x of the same type: attaches the sign of y.
SO_INLINE vf with_sign(vf magnitude, vf y) {
  return bit_cast<vf>(bit_cast<vi>(magnitude) | (bit_cast<vi>(y) & sign_bit));
}

// ---- float16 and bfloat16 -----------------------------------------------------------------------

// Integers of 16 and 8 bits to 32 and back. GCC 12 extends results of 32 and 64 bytes in halves or by lanes.
#if SO_USE_512
typedef char vc SO_VECTOR(16);
SO_INLINE vu extend(vh x) {
  return bit_cast<vu>(__builtin_ia32_pmovzxwd512_mask(bit_cast<vs>(x), vi{}, every_lane));
}
SO_INLINE vi extend(vs x) { return __builtin_ia32_pmovsxwd512_mask(x, vi{}, every_lane); }
SO_INLINE vi extend(vb x) {
  return __builtin_ia32_pmovsxbd512_mask(bit_cast<vc>(x), vi{}, every_lane);
}
SO_INLINE vi extend(vub x) {
  return __builtin_ia32_pmovzxbd512_mask(bit_cast<vc>(x), vi{}, every_lane);
}
SO_INLINE vh low_halves(vu x) {
  return bit_cast<vh>(__builtin_ia32_pmovdw512_mask(bit_cast<vi>(x), vs{}, every_lane));
}
#else
#if SO_USE_256 && defined(__AVX2__)
typedef char vc SO_VECTOR(16);
typedef int64_t v2l SO_VECTOR(16);
typedef int64_t v4l SO_VECTOR(32);
SO_INLINE vu extend(vh x) { return bit_cast<vu>(__builtin_ia32_pmovzxwd256(bit_cast<vs>(x))); }
SO_INLINE vi extend(vs x) { return __builtin_ia32_pmovsxwd256(x); }
SO_INLINE vi extend(vb x) {
  return __builtin_ia32_pmovsxbd256(bit_cast<vc>(v2l{bit_cast<int64_t>(x), 0}));
}
SO_INLINE vi extend(vub x) {
  return __builtin_ia32_pmovzxbd256(bit_cast<vc>(v2l{bit_cast<int64_t>(x), 0}));
}
#else
SO_INLINE vu extend(vh x) { return __builtin_convertvector(x, vu); }
SO_INLINE vi extend(vs x) { return __builtin_convertvector(x, vi); }
SO_INLINE vi extend(vb x) { return __builtin_convertvector(x, vi); }
SO_INLINE vi extend(vub x) { return __builtin_convertvector(x, vi); }
#endif
SO_INLINE vh low_halves(vu x) { return __builtin_convertvector(x, vh); }
#endif

#if SO_USE_256 && defined(__AVX2__)
// Bytes of each lane of 16 that move by one operation instead of two: numbers of 16 bits into the upper halves of
// elements, those of its first or second half; and upper halves together, the first four elements and the others.
typedef char vbytes SO_VECTOR(32);
constexpr char GONE = -128;
SO_INLINE vf widen(vh bits, bf16) {
  const v2l half = bit_cast<v2l>(bits);
  const vbytes up = {GONE, GONE, 0, 1, GONE, GONE, 2, 3, GONE, GONE, 4, 5, GONE, GONE, 6, 7,
                     GONE, GONE, 8, 9, GONE, GONE, 10, 11, GONE, GONE, 12, 13, GONE, GONE, 14, 15};
  const v4l both = {half[0], half[1], half[0], half[1]};
  return bit_cast<vf>(__builtin_ia32_pshufb256(bit_cast<vbytes>(both), up));
}
SO_INLINE vh high_halves(vu x) {
  const vbytes down = {2, 3, 6, 7, 10, 11, 14, 15, GONE, GONE, GONE, GONE, GONE, GONE, GONE, GONE,
                       2, 3, 6, 7, 10, 11, 14, 15, GONE, GONE, GONE, GONE, GONE, GONE, GONE, GONE};
  const v4l packed = bit_cast<v4l>(__builtin_ia32_pshufb256(bit_cast<vbytes>(x), down));
  return bit_cast<vh>(v2l{packed[0], packed[2]});
}
#else
SO_INLINE vf widen(vh bits, bf16) { return bit_cast<vf>(extend(bits) << 16); }
SO_INLINE vh high_halves(vu x) { return low_halves(x >> 16); }
#endif
// A float rounded to bfloat16 in the upper half of its bits, to nearest even; NaN stays NaN (quiet),
// overflow becomes infinity. The lower half is undefined.
SO_INLINE vu round_bf16(vf x) {
  vu bits = bit_cast<vu>(x);
#if SO_USE_512
  vi even = bit_cast<vi>(bits + 0x7fffu);
  auto is_odd = __builtin_ia32_ptestmd512(bit_cast<vi>(bits), broadcast_i(0x10000), every_lane);
  vi up = __builtin_ia32_paddd512_mask(even, broadcast_i(1), even, is_odd);
  // the table of responses: a quiet NaN for either NaN, what is there for everything else
  return bit_cast<vu>(__builtin_ia32_fixupimmps512_mask(bit_cast<vf>(up), x, broadcast_i(0x22), 0,
                                                        every_lane, 4));
#else
  // all bits of a NaN are set: what a comparison gives
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) | bit_cast<vu>(x != x);
#endif
}
SO_INLINE vh narrow(vf x, bf16) { return high_halves(round_bf16(x)); }
SO_INLINE float widen(uint16_t bits, bf16) {
  return bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}
SO_INLINE uint16_t narrow(float x, bf16) {
  uint32_t bits = bit_cast<uint32_t>(x);
  if (x != x) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Portable float16, written once for vectors (U, F, M) and scalars.
// Widening: place the 15 bits as a float with exponent bias 15, then multiply by 2^112, which
// renormalizes denormals exactly; infinities and NaN get their exponent filled in.
template <class F, class U> SO_INLINE F widen_f16_portable(U h) {
  U magnitude = (h & 0x7fffu) << 13;
  F scaled = bit_cast<F>(magnitude) * 0x1p112f;
  U special = bit_cast<U>(scaled) | 0x7f800000u;
  U bits = (magnitude >= 0x0f800000u) ? special : bit_cast<U>(scaled);
  return bit_cast<F>(bits | ((h & 0x8000u) << 16));
}
// Narrowing: normals round in integers; denormal results round by adding a float whose last bit is
// the last bit of the denormal (the hardware then rounds to nearest even).
template <class F, class U> SO_INLINE U narrow_f16_portable(F x) {
  U bits = bit_cast<U>(x);
  U sign = (bits >> 16) & 0x8000u;
  U magnitude = bits & 0x7fffffffu;
  U normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  U denormal = bit_cast<U>(bit_cast<F>(magnitude) + 0.5f) - 0x3f000000u;
  U result = (magnitude < 0x38800000u) ? denormal : normal;
  U infinity = result * 0u + 0x7c00u;
  result = (magnitude >= 0x477ff000u) ? infinity : result;
  U quiet = ((magnitude >> 13) & 0x3ffu) | 0x7e00u;
  result = (magnitude > 0x7f800000u) ? quiet : result;
  return result | sign;
}

SO_INLINE vf widen(vh bits, f16) {
#if SO_USE_512
  return __builtin_ia32_vcvtph2ps512_mask(bit_cast<vs>(bits), vf{}, every_lane, 4);
#elif SO_USE_256 && defined(__F16C__)
  return __builtin_ia32_vcvtph2ps256(bit_cast<vs>(bits));
#else
  return widen_f16_portable<vf>(extend(bits));
#endif
}
SO_INLINE vh narrow(vf x, f16) {
#if SO_USE_512
  return bit_cast<vh>(__builtin_ia32_vcvtps2ph512_mask(x, 0, vs{}, every_lane));
#elif SO_USE_256 && defined(__F16C__)
  return bit_cast<vh>(__builtin_ia32_vcvtps2ph256(x, 0));
#else
  return low_halves(narrow_f16_portable<vf, vu>(x));
#endif
}
SO_INLINE float widen(uint16_t bits, f16) {
  return widen_f16_portable<float>(static_cast<uint32_t>(bits));
}
SO_INLINE uint16_t narrow(float x, f16) {
  return static_cast<uint16_t>(narrow_f16_portable<float, uint32_t>(x));
}

// ---- Loads and stores ---------------------------------------------------------------------------
// No alignment is needed. Element types: float, double, bf16, f16, int8_t, uint8_t, bool, int16_t,
// int32_t, int64_t. A load converts to the value type; a store converts back (float to integer by
// truncation, to bool by != 0, as Tensor.to does).

template <class Raw> SO_INLINE Raw load_raw(const void* p) {
  Raw raw;
  memcpy(&raw, p, sizeof(Raw));
  return raw;
}

SO_INLINE vf load_vf(const float* p) { return load_raw<vf>(p); }
SO_INLINE vf load_vf(const double* p) { return __builtin_convertvector(load_raw<vdd>(p), vf); }
SO_INLINE vf load_vf(const bf16* p) { return widen(load_raw<vh>(p), bf16{}); }
SO_INLINE vf load_vf(const f16* p) { return widen(load_raw<vh>(p), f16{}); }
SO_INLINE vf load_vf(const int8_t* p) {
  return __builtin_convertvector(extend(load_raw<vb>(p)), vf);
}
SO_INLINE vf load_vf(const uint8_t* p) {
  return __builtin_convertvector(extend(load_raw<vub>(p)), vf);
}
SO_INLINE vf load_vf(const bool* p) { return load_vf(reinterpret_cast<const uint8_t*>(p)); }
SO_INLINE vf load_vf(const int16_t* p) {
  return __builtin_convertvector(extend(load_raw<vs>(p)), vf);
}
SO_INLINE vf load_vf(const int32_t* p) { return __builtin_convertvector(load_raw<vi>(p), vf); }
SO_INLINE vf load_vf(const int64_t* p) { return __builtin_convertvector(load_raw<vll>(p), vf); }

template <class S, class T> SO_INLINE S load_scalar(const T* p) { return static_cast<S>(*p); }
template <class S> SO_INLINE S load_scalar(const bf16* p) {
  return static_cast<S>(widen(p->bits, bf16{}));
}
template <class S> SO_INLINE S load_scalar(const f16* p) {
  return static_cast<S>(widen(p->bits, f16{}));
}

// Load one value: `lanes` consecutive elements.
template <class V, class T> SO_INLINE V load(const T* p) {
  if constexpr (value<V>::lanes == 1) {
    return load_scalar<V>(p);
  } else if constexpr (sizeof(typename value<V>::scalar) == 4) {
    return load_vf(p);
  } else {
    V v;
    for (int i = 0; i < value<V>::lanes; ++i) v[i] = load_scalar<double>(p + i);
    return v;
  }
}

SO_INLINE void store(float* p, vf v) { memcpy(p, &v, sizeof(v)); }
SO_INLINE void store(double* p, vf v) {
  vdd wide = __builtin_convertvector(v, vdd);
  memcpy(p, &wide, sizeof(wide));
}
SO_INLINE void store(bf16* p, vf v) {
  vh bits = narrow(v, bf16{});
  memcpy(p, &bits, sizeof(bits));
}
SO_INLINE void store(f16* p, vf v) {
  vh bits = narrow(v, f16{});
  memcpy(p, &bits, sizeof(bits));
}
SO_INLINE void store(int8_t* p, vf v) {
  vb bytes = __builtin_convertvector(__builtin_convertvector(v, vi), vb);
  memcpy(p, &bytes, sizeof(bytes));
}
SO_INLINE void store(uint8_t* p, vf v) { store(reinterpret_cast<int8_t*>(p), v); }
SO_INLINE void store(bool* p, vf v) {
  vb bytes = __builtin_convertvector((v != 0.0f) & 1, vb);
  memcpy(p, &bytes, sizeof(bytes));
}
SO_INLINE void store(int16_t* p, vf v) {
  vs halves = __builtin_convertvector(__builtin_convertvector(v, vi), vs);
  memcpy(p, &halves, sizeof(halves));
}
SO_INLINE void store(int32_t* p, vf v) {
  vi whole = __builtin_convertvector(v, vi);
  memcpy(p, &whole, sizeof(whole));
}
SO_INLINE void store(int64_t* p, vf v) {
  vll whole = __builtin_convertvector(v, vll);
  memcpy(p, &whole, sizeof(whole));
}
SO_INLINE void store(double* p, vd v) { memcpy(p, &v, sizeof(v)); }
// An integer of which the compiler does not know where it comes from. Told that nothing traps, GCC takes
// float(int(x)) for trunc(x), which is -0.0 of -0.3 and keeps what fits no integer.
template <class T> SO_INLINE T unrelated(T x) {
  __asm__("" : "+r"(x));
  return x;
}
// Through int64: a float beyond the target's range wraps instead of being undefined.
template <class T> SO_INLINE void store_scalar(T* p, double v) {
  if constexpr (T(0.5) == T(0)) *p = static_cast<T>(static_cast<int64_t>(v));
  else *p = static_cast<T>(v);
}
template <class T> SO_INLINE void store_scalar(T* p, int64_t v) { *p = static_cast<T>(v); }
SO_INLINE void store_scalar(bool* p, double v) { *p = v != 0.0; }
SO_INLINE void store_scalar(bf16* p, double v) { p->bits = narrow(static_cast<float>(v), bf16{}); }
SO_INLINE void store_scalar(f16* p, double v) { p->bits = narrow(static_cast<float>(v), f16{}); }
SO_INLINE void store_scalar(bf16* p, int64_t v) { store_scalar(p, static_cast<double>(v)); }
SO_INLINE void store_scalar(f16* p, int64_t v) { store_scalar(p, static_cast<double>(v)); }
template <class T> SO_INLINE void store(T* p, float v) { store_scalar(p, static_cast<double>(v)); }
template <class T> SO_INLINE void store(T* p, double v) { store_scalar(p, v); }
template <class T> SO_INLINE void store(T* p, int32_t v) {
  store_scalar(p, static_cast<int64_t>(v));
}
template <class T> SO_INLINE void store(T* p, int64_t v) { store_scalar(p, v); }

// ---- Partial loads and stores: the first n elements, 0 <= n <= lanes ----------------------------

SO_INLINE vf load_vf_n(const float* p, int64_t n, float fill) {
#if SO_USE_512
  auto lanes = static_cast<unsigned short>((1u << n) - 1u);
  return __builtin_ia32_loadups512_mask(p, splat<vf>(fill), lanes);
#elif SO_USE_256
  vi mask = first_lanes(n);
  vf loaded = __builtin_ia32_maskloadps256(reinterpret_cast<const vf*>(p), mask);
  return select(mask, loaded, splat<vf>(fill));
#else
  vf v = splat<vf>(fill);
  for (int i = 0; i < n; ++i) v[i] = p[i];
  return v;
#endif
}
#if SO_USE_512 && defined(__AVX512BW__) && defined(__AVX512VL__)
// Not through a buffer, element by element: a vector that is read where shorter stores were just made waits.
#define SO_HALF_LANES 1
typedef short halves SO_VECTOR(32);
SO_INLINE vh load_raw_n(const void* p, int64_t n) {
  auto lanes = static_cast<unsigned short>((1u << n) - 1u);
  return bit_cast<vh>(
      __builtin_ia32_loaddquhi256_mask(static_cast<const short*>(p), halves{}, lanes));
}
SO_INLINE void store_raw_n(void* p, vh bits, int64_t n) {
  auto lanes = static_cast<unsigned short>((1u << n) - 1u);
  __builtin_ia32_storedquhi256_mask(static_cast<short*>(p), bit_cast<halves>(bits), lanes);
}
SO_INLINE vf load_vf_n(const uint8_t* p, int64_t n, float fill) {
  auto lanes = static_cast<unsigned short>((1u << n) - 1u);
  const vc bytes = __builtin_ia32_loaddquqi128_mask(reinterpret_cast<const char*>(p), vc{}, lanes);
  return select(first_lanes(n), __builtin_convertvector(extend(bit_cast<vub>(bytes)), vf), splat<vf>(fill));
}
SO_INLINE vf load_vf_n(const bool* p, int64_t n, float fill) {
  return load_vf_n(reinterpret_cast<const uint8_t*>(p), n, fill);
}
SO_INLINE vf load_vf_n(const bf16* p, int64_t n, float fill) {
  return select(first_lanes(n), widen(load_raw_n(p, n), bf16{}), splat<vf>(fill));
}
SO_INLINE vf load_vf_n(const f16* p, int64_t n, float fill) {
  return select(first_lanes(n), widen(load_raw_n(p, n), f16{}), splat<vf>(fill));
}
#endif
template <class T> SO_INLINE vf load_vf_n(const T* p, int64_t n, float fill) {
  T buffer[SO_VL] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
  return select(first_lanes(n), load_vf(buffer), splat<vf>(fill));
}
// The lanes at and beyond n hold `fill`.
template <class V, class T>
SO_INLINE V load_n(const T* p, int64_t n, typename value<V>::scalar fill = 0) {
  if constexpr (value<V>::lanes == 1) {
    return n > 0 ? load_scalar<V>(p) : fill;
  } else if constexpr (sizeof(typename value<V>::scalar) == 4) {
    return load_vf_n(p, n, fill);
  } else {
    V v = splat<V>(fill);
    for (int64_t i = 0; i < n; ++i) v[i] = load_scalar<double>(p + i);
    return v;
  }
}

SO_INLINE void store_n(float* p, vf v, int64_t n) {
#if SO_USE_512
  __builtin_ia32_storeups512_mask(p, v, static_cast<unsigned short>((1u << n) - 1u));
#elif SO_USE_256
  __builtin_ia32_maskstoreps256(reinterpret_cast<vf*>(p), first_lanes(n), v);
#else
  for (int i = 0; i < n; ++i) p[i] = v[i];
#endif
}
#ifdef SO_HALF_LANES
SO_INLINE void store_n(bf16* p, vf v, int64_t n) { store_raw_n(p, narrow(v, bf16{}), n); }
SO_INLINE void store_n(f16* p, vf v, int64_t n) { store_raw_n(p, narrow(v, f16{}), n); }
#endif
template <class T> SO_INLINE void store_n(T* p, vf v, int64_t n) {
  T buffer[SO_VL];
  store(buffer, v);
  for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
}
template <class T> SO_INLINE void store_n(T* p, vd v, int64_t n) {
  for (int64_t i = 0; i < n; ++i) store_scalar(p + i, static_cast<double>(v[i]));
}
template <class T> SO_INLINE void store_n(T* p, float v, int64_t n) { if (n > 0) store(p, v); }
template <class T> SO_INLINE void store_n(T* p, double v, int64_t n) { if (n > 0) store(p, v); }
template <class T> SO_INLINE void store_n(T* p, int32_t v, int64_t n) { if (n > 0) store(p, v); }
template <class T> SO_INLINE void store_n(T* p, int64_t v, int64_t n) { if (n > 0) store(p, v); }

// ---- Pairs of vectors ---------------------------------------------------------------------------
// 2 * SO_VL consecutive elements: the even ones in one vector, the odd ones in the other. A bfloat16 is
// the upper half of a float, so nothing moves between lanes: half the operations of two vectors in order.
// ODD says which of the two a load returns.

constexpr uint32_t upper_half = 0xffff0000u;

template <bool ODD> SO_INLINE vf load_half(const bf16* p) {
  const vu both = load_raw<vu>(p);
  return bit_cast<vf>(ODD ? both & upper_half : both << 16);
}
template <bool ODD, int... LANE>
SO_INLINE vf every_second(vf low, vf high, lane_list<LANE...>) {
  return __builtin_shufflevector(low, high, (2 * LANE + ODD)...);
}
template <bool ODD, class T> SO_INLINE vf load_half(const T* p) {
  return every_second<ODD>(load_vf(p), load_vf(p + SO_VL), typename count_lanes<SO_VL>::type());
}
SO_INLINE vu pair_bf16(vf even, vf odd) {
#if SO_USE_512
  return bit_cast<vu>(__builtin_ia32_pternlogd512_mask(
      broadcast_i(static_cast<int32_t>(upper_half)), bit_cast<vi>(round_bf16(odd)),
      bit_cast<vi>(round_bf16(even) >> 16), 0xca, every_lane));
#else
  return (round_bf16(odd) & upper_half) | (round_bf16(even) >> 16);
#endif
}
SO_INLINE void store_pair(bf16* p, vf even, vf odd) {
  const vu both = pair_bf16(even, odd);
  memcpy(p, &both, sizeof(both));
}
template <bool HIGH, int... LANE>
SO_INLINE vf zipped(vf even, vf odd, lane_list<LANE...>) {
  constexpr int start = HIGH ? SO_VL / 2 : 0;
  return __builtin_shufflevector(even, odd, (start + LANE / 2 + (LANE % 2) * SO_VL)...);
}
template <class T> SO_INLINE void store_pair(T* p, vf even, vf odd) {
  typedef typename count_lanes<SO_VL>::type lanes;
  store(p, zipped<false>(even, odd, lanes()));
  store(p + SO_VL, zipped<true>(even, odd, lanes()));
}

// ---- Horizontal reductions ----------------------------------------------------------------------

// Fold the lanes in halves with `combine`: a fixed tree, so results do not depend on flags.
template <class Combine> SO_INLINE float fold_lanes(vf v, Combine combine) {
#if SO_VECTOR_BYTES == 64
  v = combine(
      v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  v = combine(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7));
  v = combine(v, __builtin_shufflevector(v, v, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3));
  v = combine(v, __builtin_shufflevector(v, v, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1));
#elif SO_VECTOR_BYTES == 32
  v = combine(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 4, 5, 6, 7));
  v = combine(v, __builtin_shufflevector(v, v, 2, 3, 2, 3, 2, 3, 2, 3));
  v = combine(v, __builtin_shufflevector(v, v, 1, 1, 1, 1, 1, 1, 1, 1));
#else
  v = combine(v, __builtin_shufflevector(v, v, 2, 3, 2, 3));
  v = combine(v, __builtin_shufflevector(v, v, 1, 1, 1, 1));
#endif
  return v[0];
}
struct combine_sum { SO_FORCED vf operator()(vf a, vf b) const { return a + b; } };
struct combine_product { SO_FORCED vf operator()(vf a, vf b) const { return a * b; } };
struct combine_max { SO_FORCED vf operator()(vf a, vf b) const { return max(a, b); } };
struct combine_min { SO_FORCED vf operator()(vf a, vf b) const { return min(a, b); } };
SO_INLINE float hsum(vf v) { return fold_lanes(v, combine_sum{}); }
SO_INLINE float hprod(vf v) { return fold_lanes(v, combine_product{}); }
SO_INLINE float hmax(vf v) { return fold_lanes(v, combine_max{}); }
SO_INLINE float hmin(vf v) { return fold_lanes(v, combine_min{}); }
SO_INLINE float hsum(float v) { return v; }
SO_INLINE float hprod(float v) { return v; }
SO_INLINE float hmax(float v) { return v; }
SO_INLINE float hmin(float v) { return v; }
SO_INLINE double hsum(double v) { return v; }
SO_INLINE double hprod(double v) { return v; }
SO_INLINE double hmax(double v) { return v; }
SO_INLINE double hmin(double v) { return v; }
SO_INLINE int32_t hsum(int32_t v) { return v; }
SO_INLINE int32_t hmax(int32_t v) { return v; }
SO_INLINE int32_t hmin(int32_t v) { return v; }
SO_INLINE int64_t hsum(int64_t v) { return v; }
SO_INLINE int64_t hmax(int64_t v) { return v; }
SO_INLINE int64_t hmin(int64_t v) { return v; }

}  // namespace so

#pragma GCC diagnostic pop
