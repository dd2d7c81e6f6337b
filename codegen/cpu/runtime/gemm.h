// Register-tiled tile products: C[m,n] (+)= sum over k of A[m,k] * B[k,n], accumulated in float32.
//
// In: pointers with strides in elements; operands are of any element type simd.h can load.
// Out: C, float32, contiguous along n. Every extent is arbitrary: what does not fill a register tile
// goes through an edge kernel with clamped rows and masked columns, so that nothing outside the
// operands is ever touched.
//
//   gemm_nn   B contiguous along n; A is broadcast, its strides are free
//   gemm_dot  A and B contiguous along k: vectors along k, one horizontal sum per output
//   gemm_packed  B contiguous along k, many rows of A: gemm_nn on parts of B, transposed
//   gemm_tall    the same for hundreds of rows of A
//   gemm_swapped  the same for up to 48 rows of A: these are transposed, and the result back
//   pack      copies that make one of the above applicable, or its walk contiguous
//
// The register-tile scheme is that of Goto and van de Geijn, "Anatomy of high-performance matrix
// multiplication" (2008). Register tiles worth trying with 32 vector registers: 6x4, 4x4, 5x4, 8x2
// for gemm_nn, 4x4, 4x6 for gemm_dot; with 16: 4x2, 6x2 and 2x4. MR * NV + NV + 1 registers are live.
#pragma once
#include "simd.h"

namespace so {

#define SO_NOINLINE static __attribute__((noinline))

constexpr long min_of(long a, long b) { return a < b ? a : b; }
constexpr long max_of(long a, long b) { return a > b ? a : b; }

// The elements of a matrix that count: those with first <= row - column <= last. What lies outside is 0
// in an operand, and not looked at in a result.
struct Band {
  long first, last;
  long top(long column) const { return column + first; }        // first row of a column
  long bottom(long columns) const { return columns + last; }    // end of the rows before a column
  long left(long row) const { return row - last; }              // first column of a row
  long right(long rows) const { return rows - first; }          // end of the columns before a row
  Band from_column(long column) const { return {first + column, last + column}; }
};
struct Whole {
  enum : long { FAR = 1L << 40 };
  static constexpr long top(long) { return 0; }
  static constexpr long bottom(long) { return FAR; }
  static constexpr long left(long) { return 0; }
  static constexpr long right(long) { return FAR; }
  static constexpr Whole from_column(long) { return {}; }
};

// While one lives, denormal operands and results count as 0, as they do for matrix tiles: a multiplication
// with one takes the processor over a hundred cycles, and attention that decays with distance has many. (Unless
// a kernel asks for them.)
struct Flush {
#if defined(__SSE__) && !defined(SO_DENORMALS)
  const unsigned before = __builtin_ia32_stmxcsr();
  Flush() { __builtin_ia32_ldmxcsr(before | 0x8040); }
  ~Flush() { __builtin_ia32_ldmxcsr(before); }
#endif
};

// What a register tile fetches besides what it reads: nothing; its own elements of C; the rows of B `ahead` elements
// behind its own; or, a line at each step of k, ROWS <= VL rows of what will be transposed next, contiguous along k (other tiles
// fetch the rest).
struct NoFetch {
  enum : bool { BELOW = false, NEXT = false, RESULT = false };
  NoFetch of_tile(long) const { return {}; }
};
struct FetchResult {
  enum : bool { BELOW = false, NEXT = false, RESULT = true };
  FetchResult of_tile(long) const { return {}; }
};
struct FetchBelow {
  enum : bool { BELOW = true, NEXT = false, RESULT = false };
  long ahead;
  NoFetch of_tile(long) const { return {}; }
};
template <int ROWS, class T> struct FetchNext {
  enum : bool { BELOW = false, NEXT = true, RESULT = false };
  const T* next;
  long stride, all;
  const T* line(long x) const { return next + min_of(x % VL, ROWS - 1) * stride + x / VL * VL; }
  // of tile i; those that find all rows fetched repeat the last ones, which costs nothing
  FetchNext of_tile(long i) const {
    return {next + min_of(i * ROWS, max_of(0, all - ROWS)) * stride, stride, all};
  }
};

// One register tile, MR rows by NV vectors. EDGE: only `rows` rows and `cols` columns exist; the
// rows beyond repeat the last one, so that loads stay inside A, and are not stored. Not inlined, so
// that registers are allocated for this loop alone (inlined into a large kernel, GCC 12 spilled: up
// to 1.6x slower attention on Cascade Lake); a constant stride still arrives as a constant, because
// the compiler clones the function for it.
template <int MR, int NV, bool EDGE, bool ACCUMULATE, class TA, class TB, class FETCH>
SO_NOINLINE void micro_nn(long k, const TA* a, long am, long ak, const TB* b, long bk, float* c,
                          long cm, long rows, long cols, const FETCH fetch) {
  vf sum[MR][NV];
  const TA* row[MR];
  int lanes[NV];
#pragma GCC unroll 32
  for (int j = 0; j < NV; ++j) lanes[j] = (int)min_of(max_of(cols - j * VL, 0), VL);
#pragma GCC unroll 32
  for (int i = 0; i < MR; ++i) row[i] = a + (EDGE ? min_of(i, rows - 1) : i) * am;
#pragma GCC unroll 32
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 32
    for (int j = 0; j < NV; ++j) {
      sum[i][j] = vf{};
      if constexpr (FETCH::RESULT) __builtin_prefetch(c + (EDGE ? min_of(i, rows - 1) : i) * cm + j * VL, 1, 3);
    }
#pragma GCC unroll 1
  for (long x = 0; x < k; ++x) {
    vf right[NV];
#pragma GCC unroll 16
    for (int j = 0; j < NV; ++j) {
      const TB* from = b + x * bk + j * VL;
      right[j] = EDGE ? load_n<vf>(from, lanes[j], 0.0f) : load<vf>(from);
      if constexpr (FETCH::BELOW) __builtin_prefetch(from + fetch.ahead, 0, 2);
    }
    if constexpr (FETCH::NEXT) __builtin_prefetch(fetch.line(x), 0, 3);
#pragma GCC unroll 32
    for (int i = 0; i < MR; ++i) {
      const vf left = splat<vf>(load_scalar<float>(row[i] + x * ak));
#pragma GCC unroll 16
      for (int j = 0; j < NV; ++j) sum[i][j] += left * right[j];
    }
  }
  // added last: sums of stretches of k err less than one long chain
#pragma GCC unroll 32
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 32
    for (int j = 0; j < NV; ++j) {
      float* to = c + i * cm + j * VL;
      if (!EDGE) {
        store(to, ACCUMULATE ? load<vf>(to) + sum[i][j] : sum[i][j]);
      } else if (i < rows) {
        store_n(to, ACCUMULATE ? load_n<vf>(to, lanes[j], 0.0f) + sum[i][j] : sum[i][j], lanes[j]);
      }
    }
}

// A register tile for rows whose elements of A lie in a band: over the k at which one of them is not 0.
template <int MR, int NV, bool EDGE, bool ACCUMULATE, class IN, class TA, class TB,
          class FETCH = NoFetch>
SO_INLINE void banded_nn(long row, const IN& band, long k, const TA* a, long am, long ak, const TB* b,
                         long bk, float* c, long cm, long rows, long cols, FETCH fetch = {}) {
  const long from = max_of(0, band.left(row)), to = max_of(from, min_of(k, band.right(row + rows)));
  if (ACCUMULATE && from == to) return;
  micro_nn<MR, NV, EDGE, ACCUMULATE>(to - from, a + row * am + from * ak, am, ak, b + from * bk, bk,
                                     c + row * cm, cm, rows, cols, fetch);
}

// One panel of NV vectors of B against the rows of A from `top` to `bottom`. REST: m % MR where it is known,
// else -1. Only the first rows fetch what is below: the others find the panel in the first cache. `band`: where
// A counts.
template <int MR, int NV, int REST, bool EDGE, bool ACCUMULATE, class FETCH, class IN, class TA,
          class TB>
SO_INLINE void panel_nn(long m, long cols, long k, const TA* a, long am, long ak, const TB* b,
                        long bk, float* c, long cm, const FETCH& fetch, long top, long bottom,
                        const IN& band) {
  if (top >= min_of(m, bottom)) return;
  long i = top / MR * MR;
  if constexpr (FETCH::BELOW) {
    if (m >= MR) {
      micro_nn<MR, NV, EDGE, ACCUMULATE>(k, a, am, ak, b, bk, c, cm, MR, cols, fetch);
      i = MR;
    }
  }
  for (; i + MR <= m && i < bottom; i += MR)
    banded_nn<MR, NV, EDGE, ACCUMULATE>(i, band, k, a, am, ak, b, bk, c, cm, MR, cols,
                                        fetch.of_tile(i / MR));
  if (i >= bottom) return;
  if constexpr (REST > 0) {
    banded_nn<REST, NV, EDGE, ACCUMULATE>(i, band, k, a, am, ak, b, bk, c, cm, REST, cols);
  } else if constexpr (REST < 0) {
    if (i < m) banded_nn<MR, NV, true, ACCUMULATE>(i, band, k, a, am, ak, b, bk, c, cm, m - i, cols);
  }
}

// C[m,n] (+)= A[m,k] B[k,n] with B contiguous along n. Walks panels of NV vectors of B, each once
// per MR rows of A: a panel of B (k * NV * VL elements) should fit the first or second cache.
//
// M, N: the extents where they are known at compile time, else -1.
// ahead: elements from B to what will be read after it, to be prefetched; PREFETCH says whether.
// in, out: where A and C count (a Band): elsewhere A is taken for 0, and C is not computed.
template <int MR, int NV, bool ACCUMULATE, int M = -1, int N = -1, bool PREFETCH = false, class TA,
          class TB, class IN = Whole, class OUT = Whole>
SO_INLINE void gemm_nn(long m, long n, long k, const TA* a, long am, long ak, const TB* b, long bk,
                       float* c, long cm, long ahead = 0, IN in = {}, OUT out = {}) {
  constexpr int rest = M < 0 ? -1 : M % MR;
  constexpr int columns = N < 0 ? -1 : N % (NV * VL);
  const long panels = n / (NV * VL), left = n - panels * (NV * VL);
  long j = 0;
  for (long p = 0; p < panels; ++p, j += NV * VL, b += NV * VL, c += NV * VL) {
    const long top = max_of(0, out.top(j)), bottom = out.bottom(j + NV * VL);
    if constexpr (PREFETCH)
      panel_nn<MR, NV, rest, false, ACCUMULATE>(m, NV * VL, k, a, am, ak, b, bk, c, cm,
                                                FetchBelow{ahead}, top, bottom, in);
    else
      panel_nn<MR, NV, rest, false, ACCUMULATE>(m, NV * VL, k, a, am, ak, b, bk, c, cm, NoFetch{},
                                                top, bottom, in);
  }
  const long top = max_of(0, out.top(j)), bottom = out.bottom(n);
  if constexpr (columns > 0) {
    constexpr int vectors = (columns + VL - 1) / VL;
    panel_nn<MR, vectors, rest, columns % VL != 0, ACCUMULATE>(m, columns, k, a, am, ak, b, bk, c, cm,
                                                              NoFetch{}, top, bottom, in);
  } else if constexpr (columns < 0) {
    if (left > 0)
      panel_nn<MR, NV, rest, true, ACCUMULATE>(m, left, k, a, am, ak, b, bk, c, cm, NoFetch{}, top,
                                               bottom, in);
  }
}

// The same for B that is read once, from memory: few rows of A, many columns. B's rows are walked
// KB at a time from end to end, so that memory sees a few long streams; C waits in the second cache
// meanwhile. Walking down narrow column strips instead costs a page walk per row (2x slower for
// 16x4096 @ 4096x4096 on Cascade Lake).
template <int MR, int NV, bool ACCUMULATE, int M, int N, int KB, bool PREFETCH, class TA, class TB>
SO_INLINE void gemm_stream(long m, long n, long k, const TA* a, long am, long ak, const TB* b,
                           long bk, float* c, long cm) {
  const long first = min_of(KB, k), ahead = KB * bk;
  gemm_nn<MR, NV, ACCUMULATE, M, N, PREFETCH>(m, n, first, a, am, ak, b, bk, c, cm, ahead);
  for (long x = first; x < k; x += KB)
    gemm_nn<MR, NV, true, M, N, PREFETCH>(m, n, min_of(KB, k - x), a + x * ak, am, ak, b + x * bk,
                                          bk, c, cm, ahead);
}

// Exchange rows and lanes of a square of VL vectors: swap blocks of 1, 2, 4, ... lanes across the
// diagonal, log2(VL) rounds of two-source shuffles.
template <int BLOCK, int... LANE>
SO_INLINE void swap_blocks(vf& low, vf& high, lane_list<LANE...>) {
  const vf first = __builtin_shufflevector(low, high, (LANE & BLOCK ? LANE - BLOCK + VL : LANE)...);
  const vf second = __builtin_shufflevector(low, high, (LANE & BLOCK ? LANE + VL : LANE + BLOCK)...);
  low = first;
  high = second;
}
template <int BLOCK>
SO_INLINE void transpose_square(vf (&row)[VL]) {
  if constexpr (BLOCK < VL) {
#pragma GCC unroll 16
    for (int i = 0; i < VL; ++i)
      if (!(i & BLOCK))
        swap_blocks<BLOCK>(row[i], row[i + BLOCK], typename count_lanes<VL>::type());
    transpose_square<BLOCK * 2>(row);
  }
}

// Combine the lanes of each of COUNT vectors: lane i of v[0] becomes the result of v[i]. Neighbours are
// folded into each other, lanes interleaved: three operations per vector instead of some eight.
template <int COUNT, int BLOCK, class Combine>
SO_INLINE void fold_vectors(vf* v, Combine combine) {
  if constexpr (BLOCK < VL) {
    constexpr int pairs = COUNT > 1 ? COUNT / 2 : 1;
#pragma GCC unroll 16
    for (int i = 0; i < pairs; ++i) {
      vf low = v[COUNT > 1 ? 2 * i : 0], high = v[COUNT > 1 ? 2 * i + 1 : 0];
      swap_blocks<BLOCK>(low, high, typename count_lanes<VL>::type());
      v[i] = combine(low, high);
    }
    fold_vectors<pairs, BLOCK * 2>(v, combine);
  }
}
constexpr int power_below(int count) {
  int power = 1;
  while (power * 2 <= count && power * 2 <= VL) power *= 2;
  return power;
}
// Horizontal sums of COUNT vectors: out[i] = sum of all lanes of v[i]; `out` has room for VL - 1 more. (What a masked store
// leaves cannot be read for dozens of cycles.)
template <int COUNT>
SO_INLINE void horizontal_sums(vf* v, float* out) {
  if constexpr (COUNT > 0) {
    constexpr int part = power_below(COUNT);
    fold_vectors<part, 1>(v, combine_sum{});
    store(out, v[0]);
    horizontal_sums<COUNT - part>(v + part, out + part);
  }
}

// Keep GCC from reading memory once more for every use of what was loaded: of two uses it makes two loads, and
// 14 loads to 12 multiplications take longer than these (16 rows by 4096 x 4096 on Zen 3: 7.4 -> 5.3 ms,
// bfloat16 5.8 -> 4.4).
SO_INLINE void loaded_once(vf& v) {
#if SO_USE_256
  asm("" : "+x"(v));
#endif
}

// MR rows of A against NR rows of B over one stretch of k, both contiguous along it: adds to `sum`.
// EDGE as in micro_nn, for both. PAIRS: B is bfloat16, and A lies as pack_rows<true> leaves it. FETCH lines
// that are needed soon are fetched per 32 elements of k, from `ahead` on, `advance` elements further each time.
template <int MR, int NR, bool EDGE, bool PAIRS, int FETCH, class TA, class TB>
SO_INLINE void micro_dot(long k, const TA* a, long am, const TB* b, long bn, long rows, long cols,
                         vf (&sum)[MR * NR], const TB* ahead, long advance) {
  constexpr int STEP = 2 * VL, LINES = (FETCH * VL + 15) / 16;
  const TA* left[MR];
  const TB* right[NR];
#pragma GCC unroll 32
  for (int i = 0; i < MR; ++i) left[i] = a + (EDGE ? min_of(i, rows - 1) : i) * am;
#pragma GCC unroll 32
  for (int j = 0; j < NR; ++j) right[j] = b + (EDGE ? min_of(j, cols - 1) : j) * bn;
  const long whole = k / STEP * STEP;
#pragma GCC unroll 1  // with more at once GCC 12 spills sums (bfloat16: 1.2x slower)
  for (long x = 0; x < whole; x += STEP) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      vf l[MR];
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) {
        l[i] = load<vf>(left[i] + x + half * VL);
        loaded_once(l[i]);
      }
#pragma GCC unroll 16
      for (int j = 0; j < NR; ++j) {
        const TB* from = right[j] + x;
        vf r = !PAIRS ? load<vf>(from + half * VL)
               : half ? load_half<true>(from)
                      : load_half<false>(from);
        loaded_once(r);
#pragma GCC unroll 16
        for (int i = 0; i < MR; ++i) sum[i * NR + j] += l[i] * r;
      }
    }
#pragma GCC unroll 16
    for (int f = 0; f < LINES; ++f) __builtin_prefetch(ahead + f * (64 / sizeof(TB)), 0, 2);
    ahead += advance;
  }
  for (long x = whole; x < k; x += VL) {
    const int lanes = (int)min_of(VL, k - x);
#pragma GCC unroll 32
    for (int j = 0; j < NR; ++j) {
      const vf r = load_n<vf>(right[j] + x, lanes, 0.0f);
#pragma GCC unroll 32
      for (int i = 0; i < MR; ++i) sum[i * NR + j] += load_n<vf>(left[i] + x, lanes, 0.0f) * r;
    }
  }
}

// NR rows of B against all rows of A, MR at a time. k is walked in stretches over which the rows of both
// stay in the first cache (16 x 4096 times 4096 x 4096 is bound by what comes from the second one
// otherwise), provided that A's rows do not share cache sets; the vectors of partial sums wait in
// `kept`. Meanwhile the NR rows of B that follow, or later ones if rows are short, are fetched in the
// order of their addresses, as many at each step as it takes. A function of its own, for the registers; one per micro_dot costs
// more than it saves (25 % at k = 1024 on Cascade Lake).
template <int MR, int NR, bool EDGE, bool ACCUMULATE, bool PAIRS, int FETCH, class TA, class TB>
SO_NOINLINE void group_dot(long m, long k, const TA* a, long am, const TB* b, long bn, float* c,
                           long cm, long cols) {
  constexpr long STRETCH = PAIRS ? 1024 : 512, PARTS = 8;
  constexpr long NEAR = 8192;  // bytes: too near to come from memory in time
  vf kept[PARTS][MR * NR];
  for (long top = 0; top < m; top += PARTS * MR) {
    const long bottom = min_of(m, top + PARTS * MR), parts = (bottom - top + MR - 1) / MR;
    const long advance = 2 * NR * VL / parts, chunk = NR * STRETCH / parts, line = max_of(k, 1);
    const long further = NR * line * (long)sizeof(TB) < NEAR ? 4 : 1;
    const TB* next = b + further * NR * bn;
    for (long x = 0, ahead = 0; x == 0 || x < k; x += STRETCH) {  // a sum of nothing is written too
      const long length = min_of(STRETCH, k - x);
#pragma GCC unroll 1
      for (long i = top, part = 0; i < bottom; i += MR, ++part) {
        vf sum[MR * NR];
#pragma GCC unroll 32
        for (int e = 0; e < MR * NR; ++e) sum[e] = x == 0 ? vf{} : kept[part][e];
        if (EDGE || i + MR > m)
          micro_dot<MR, NR, true, PAIRS, 0>(length, a + i * am + x, am, b + x, bn, m - i, cols, sum,
                                            next, 0);
        else
          micro_dot<MR, NR, false, PAIRS, FETCH>(length, a + i * am + x, am, b + x, bn, MR, NR, sum,
                                                 next, advance);
        next += chunk;
        for (ahead += chunk; ahead >= line; ahead -= line) next += bn - line;
        if (x + STRETCH < k) {
#pragma GCC unroll 32
          for (int e = 0; e < MR * NR; ++e) kept[part][e] = sum[e];
          continue;
        }
        float total[MR * NR + VL - 1];
        horizontal_sums<MR * NR>(sum, total);
#pragma GCC unroll 32
        for (int r = 0; r < MR; ++r)
#pragma GCC unroll 32
          for (int j = 0; j < NR; ++j)
            if (i + r < m && (!EDGE || j < cols)) {
              float* out = c + (i + r) * cm + j;
              *out = ACCUMULATE ? *out + total[r * NR + j] : total[r * NR + j];
            }
      }
    }
  }
}

// C[m,n] (+)= A[m,k] B[n,k]: NR rows of B at a time, read once from memory. N: n where it is known, else
// -1. FETCH: lines to fetch per 32 elements of k, 0 for none. PAIRS as in micro_dot. A horizontal sum per output
// asks for k of some hundreds.
template <int MR, int NR, bool ACCUMULATE, int FETCH = 0, int N = -1, bool PAIRS = false, class TA,
          class TB>
SO_INLINE void gemm_dot(long m, long n, long k, const TA* a, long am, const TB* b, long bn,
                        float* c, long cm) {
  long j = 0;
  for (; j + NR <= n; j += NR)
    group_dot<MR, NR, false, ACCUMULATE, PAIRS, FETCH>(m, k, a, am, b + j * bn, bn, c + j, cm, NR);
  if constexpr (N < 0) {
    if (j < n)
      group_dot<MR, NR, true, ACCUMULATE, PAIRS, 0>(m, k, a, am, b + j * bn, bn, c + j, cm, n - j);
  } else if constexpr (N % NR > 0) {
    group_dot<MR, N % NR, false, ACCUMULATE, PAIRS, FETCH>(m, k, a, am, b + j * bn, bn, c + j, cm,
                                                           N % NR);
  }
}

// to[x, i] = from[i, x] for i < n, x < k: a row-major [n,k] operand (rows `ld_from` apart) becomes
// contiguous along n, converted to float.
template <class T>
SO_NOINLINE void pack_transposed(const T* from, long ld_from, long n, long k, float* to,
                                 long ld_to) {
  for (long i = 0; i < n; i += VL)
    for (long x = 0; x < k; x += VL) {
      const long rows = min_of(VL, n - i), lanes = min_of(VL, k - x);
      const T* corner = from + i * ld_from + x;
      float* out = to + x * ld_to + i;
      if (rows < VL || lanes < VL) {
        vf square[VL];
#pragma GCC unroll 16
        for (int r = 0; r < VL; ++r)
          square[r] = r < rows ? load_n<vf>(corner + r * ld_from, (int)lanes, 0.0f) : vf{};
        transpose_square<1>(square);
        for (long l = 0; l < lanes; ++l) store_n(out + l * ld_to, square[l], (int)rows);
        continue;
      }
      vf square[VL];
#pragma GCC unroll 16
      for (int r = 0; r < VL; ++r) square[r] = load<vf>(corner + r * ld_from);
      transpose_square<1>(square);
#pragma GCC unroll 16
      for (int r = 0; r < VL; ++r) store(out + r * ld_to, square[r]);
    }
}

// to[x, i] = from[x, i] for i < n, x < k, rows `ld_from` apart, converted to float. PAIRS: of every two
// vectors the even elements come first, then the odd ones; what is left over at the end stays in order.
// Rows some way ahead are fetched: each may start another page, where the processor does not run ahead itself.
template <bool PAIRS = false, class T>
SO_NOINLINE void pack_rows(const T* from, long ld_from, long n, long k, float* to, long ld_to) {
  constexpr long AHEAD = 16;
  for (long x = 0; x < k; ++x, from += ld_from, to += ld_to) {
    long i = 0;
    if constexpr (PAIRS) {
      for (; i + 2 * VL <= n; i += 2 * VL) {
        store(to + i, load_half<false>(from + i));
        store(to + i + VL, load_half<true>(from + i));
      }
    }
    for (; i + VL <= n; i += VL) {
      __builtin_prefetch(from + AHEAD * ld_from + i, 0, 2);
      store(to + i, load<vf>(from + i));
    }
    if (i < n) store_n(to + i, load_n<vf>(from + i, n - i, 0.0f), n - i);
  }
}

// to[x, i] = from[i, x] for i < n, x < k, with any strides: contiguous along n, as gemm_nn wants B.
template <class T>
SO_INLINE void pack(const T* from, long stride_n, long stride_k, long n, long k, float* to,
                    long ld_to) {
  if (stride_n == 1) {
    pack_rows(from, stride_k, n, k, to, ld_to);
  } else if (stride_k == 1) {
    pack_transposed(from, stride_n, n, k, to, ld_to);
  } else {
    for (long x = 0; x < k; ++x)
      for (long i = 0; i < n; ++i)
        to[x * ld_to + i] = load_scalar<float>(from + i * stride_n + x * stride_k);
  }
}

template <bool PREFETCH, int ROWS, class T>
SO_INLINE auto what_is_next(const T* next, long stride, long rows) {
  if constexpr (PREFETCH)
    return FetchNext<ROWS, T>{next, stride, rows};
  else
    return NoFetch{};
}

// One panel of gemm_packed: `columns` <= NV * VL rows of B against all rows of A. REST: columns where
// they are known and fewer, 0 where the panel is whole, else -1. PREFETCH: what is transposed next is fetched
// meanwhile, as if B went on behind its last row (blocks in turn often share it).
template <int MR, int NV, bool ACCUMULATE, int M, int REST, int KC, bool PREFETCH, class IN, class TA,
          class TB>
SO_INLINE void panel_packed(long m, long columns, long k, const TA* a, long am, long ak, const TB* b,
                            long bn, long bk, float* panel, float* c, long cm, long top, long bottom,
                            const IN& in) {
  constexpr int W = NV * VL, rest = M < 0 ? -1 : M % MR, V = REST > 0 ? (REST + VL - 1) / VL : NV;
  constexpr bool edge = REST < 0 || REST % VL != 0;
  constexpr int share = M < MR ? VL : min_of(VL, (W + M / MR - 1) / (M / MR));  // rows of B per tile
  if (top >= min_of(m, bottom)) return;
  for (long x = 0; x == 0 || x < k; x += KC) {  // a sum of nothing is written too
    const long length = min_of(KC, k - x);
    pack(b + x * bk, bn, bk, columns, length, panel, W);
    const TB* next = b + (x + KC < k ? x + KC : columns * bn);
    const auto fetch = what_is_next<PREFETCH, share>(next, bn, columns);
    if (x == 0)
      panel_nn<MR, V, rest, edge, ACCUMULATE>(m, columns, length, a, am, ak, panel, W, c, cm, fetch,
                                              top, bottom, in);
    else
      panel_nn<MR, V, rest, edge, true>(m, columns, length, a + x * ak, am, ak, panel, W, c, cm, fetch,
                                        top, bottom, in.from_column(x));
  }
}

// C[m,n] (+)= A[m,k] B[n,k]: a panel of NV vectors of B's rows is transposed over KC of its columns and
// used for all rows of A while it is in the second cache. `panel` has room for KC * NV * VL floats. Pays
// from some tens of rows of A, and the more the better: 0.22 ns per element of B on Cascade Lake, 1.7
// with 96 rows of A. A whole panel of long rows instead (KC = k) lost 40 % at k = 4096 there.
// M, N: the extents where they are known, else -1. in, out as in gemm_nn.
template <int MR, int NV, bool ACCUMULATE, int M, int N, int KC, bool PREFETCH = false, class TA,
          class TB, class IN = Whole, class OUT = Whole>
SO_INLINE void gemm_packed(long m, long n, long k, const TA* a, long am, long ak, const TB* b,
                           long bn, long bk, float* panel, float* c, long cm, IN in = {},
                           OUT out = {}) {
  constexpr long W = NV * VL;
  constexpr int REST = N < 0 ? -1 : N % W;
  long j = 0;
  for (; j + W <= n; j += W)
    panel_packed<MR, NV, ACCUMULATE, M, 0, KC, PREFETCH>(m, W, k, a, am, ak, b + j * bn, bn, bk, panel,
                                                         c + j, cm, max_of(0, out.top(j)),
                                                         out.bottom(j + W), in);
  if (REST != 0 && j < n)
    panel_packed<MR, NV, ACCUMULATE, M, REST, KC, PREFETCH>(m, n - j, k, a, am, ak, b + j * bn, bn, bk,
                                                            panel, c + j, cm, max_of(0, out.top(j)),
                                                            out.bottom(n), in);
}

// Some rows of A, which the second cache holds, against panels of B that are transposed and lie there too, each
// NV * VL columns wide; the tile of C is fetched while it is computed.
template <int MR, int NV, bool ACCUMULATE, class TA>
SO_INLINE void rows_by_panels(long m, long n, long k, const TA* a, long am, long ak, const float* panels,
                              float* c, long cm) {
  constexpr long W = NV * VL;
  long j = 0;
  for (; j + W <= n; j += W)
    panel_nn<MR, NV, -1, false, ACCUMULATE>(m, W, k, a, am, ak, panels + j * k, W, c + j, cm, FetchResult{},
                                            0, m, Whole{});
  if (j < n)
    panel_nn<MR, NV, -1, true, ACCUMULATE>(m, n - j, k, a, am, ak, panels + j * k, W, c + j, cm,
                                           FetchResult{}, 0, m, Whole{});
}

// The same for hundreds of rows of A: `panels` has room for KC * max(SHARED, NV * VL) floats. One panel after the
// other over all rows reads A from the third cache (2048 x 768 x 3072 in blocks of 1024 x 384 on two threads of Zen
// 3: 127 GFLOP/s, so 137; in blocks of 512 x 384 143 and 147).
constexpr long SHARED = 128, TALL = 72;
template <int MR, int NV, bool ACCUMULATE, int KC, class TA, class TB>
SO_INLINE void gemm_tall(long m, long n, long k, const TA* a, long am, long ak, const TB* b, long bn,
                         long bk, float* panels, float* c, long cm) {
  constexpr long W = NV * VL, COLUMNS = max_of(W, SHARED / W * W), ROWS = TALL / MR * MR;
  for (long j = 0; j < n; j += COLUMNS) {
    const long columns = min_of(COLUMNS, n - j);
    for (long x = 0; x == 0 || x < k; x += KC) {  // a sum of nothing is written too
      const long length = min_of(KC, k - x);
      for (long p = 0; p < columns; p += W)
        pack(b + (j + p) * bn + x * bk, bn, bk, min_of(W, columns - p), length, panels + p * length, W);
      for (long i = 0; i < m; i += ROWS) {
        const TA* from = a + i * am + x * ak;
        float* to = c + i * cm + j;
        if (ACCUMULATE || x > 0)
          rows_by_panels<MR, NV, true>(min_of(ROWS, m - i), columns, length, from, am, ak, panels, to, cm);
        else
          rows_by_panels<MR, NV, false>(min_of(ROWS, m - i), columns, length, from, am, ak, panels, to, cm);
      }
    }
  }
}

// C[m, n] (+)= A[m, k] B[n, k]^T for some tens of rows of A, B contiguous along k: A is transposed, in `turned`
// (room for k rows of m, rounded up to NV * VL), and C^T = B A^T made in strips (room for STRIP such rows), so
// that B is read where it lies. The rows of A, rounded up, are the columns of register tiles.
constexpr long STRIP = 240;
template <int MR, int NV, bool ACCUMULATE, int KC, class TA>
SO_INLINE void gemm_swapped(long m, long n, long k, const TA* a, long am, long ak, const float* b,
                            long bn, float* turned, float* strip, float* c, long cm) {
  const long ld = (m + NV * VL - 1) / (NV * VL) * (NV * VL);
  pack(a, am, ak, m, k, turned, ld);
  if (m < ld)
    for (long x = 0; x < k; ++x)
      for (long i = m; i < ld; ++i) turned[x * ld + i] = 0.0f;
  for (long j = 0; j < n; j += STRIP) {
    const long rows = min_of(STRIP, n - j);
    if (ACCUMULATE) pack(c + j, cm, 1L, m, rows, strip, ld);
    for (long x = 0; x == 0 || x < k; x += KC) {  // a sum of nothing is written too
      const float* from = b + j * bn + x;
      const long depth = min_of(KC, k - x);
      const FetchNext<MR, float> fetch{from + MR * bn, bn, rows - MR};  // by each tile what the next one reads
      for (long p = 0; p < ld; p += NV * VL) {
        const float* with = turned + x * ld + p;
        if (ACCUMULATE || x > 0)
          panel_nn<MR, NV, -1, false, true>(rows, NV * VL, depth, from, bn, 1L, with, ld, strip + p, ld,
                                            fetch, 0, rows, Whole{});
        else
          panel_nn<MR, NV, -1, false, false>(rows, NV * VL, depth, from, bn, 1L, with, ld, strip + p, ld,
                                             fetch, 0, rows, Whole{});
      }
    }
    pack(strip, ld, 1L, rows, m, c + j, cm);
  }
}

}  // namespace so
