// Products of bfloat16 matrices, summed in float32: by matrix tiles (AMX), by dot products of pairs
// (AVX-512 BF16), or in floats.
//
// In:  A, rows contiguous along k, as it lies in memory; B of any strides, which is made into pairs:
//      panels of PANEL columns, in each for every two k a row of pairs (B[k, n], B[k + 1, n]), zero
//      where there is no k; columns that B does not have are never looked at.
// Out: C, float32, contiguous along n; or C transposed (`gemm_pairs_transposed`), for few columns:
//      then the matrix with many rows, the weights, is A and is read where it lies.
// Extents are arbitrary; nothing outside of the operands is touched.
// Denormal bfloat16 operands count as 0, and so do denormal sums: the processor's rule for these
// instructions. Source: Intel 64 and IA-32 Architectures Software Developer's Manual, vol. 1, ch. 18.
#pragma once
#include "gemm.h"

#ifndef SO_HAS_TILES
#if defined(__AMX_BF16__) && defined(__linux__) && defined(__x86_64__)
#define SO_HAS_TILES 1
#else
#define SO_HAS_TILES 0
#endif
#endif
#if SO_VECTOR_BYTES == 64 && defined(__AVX512BF16__)
#define SO_HAS_DOTS 1
#else
#define SO_HAS_DOTS 0
#endif
#if SO_HAS_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace so {

constexpr long PANEL = 32;    // columns
constexpr long DEPTH = 32;    // k that one tile holds
constexpr long STRETCH = 12;  // steps of k over which the rows of a panel stay in the first cache
constexpr long FEW = 4;       // columns that are no square worth transposing

constexpr long round_up(long x, long unit) { return (x + unit - 1) / unit * unit; }

// ---- Packing ------------------------------------------------------------------------------------

SO_INLINE vu load_bits(const bf16* p) { return extend(load_raw<vh>(p)); }
SO_INLINE vu load_bits_n(const bf16* p, long count) {
  return bit_cast<vu>(load_n<vf>(p, (int)count, 0.0f)) >> 16;
}

// What only products read, rounded; the instruction, too, takes denormals for 0. (Assembler: names and types
// of its builtin differ between compilers.)
SO_INLINE void store_operand(bf16* p, vf x) {
#if SO_HAS_DOTS
  vh bits;
  __asm__("vcvtneps2bf16 %1, %0" : "=v"(bits) : "v"(x));
  memcpy(p, &bits, sizeof(bits));
#else
  store(p, x);
#endif
}

// B contiguous along n: two rows are interleaved, for several panels at once and with the rows that follow fetched: a
// panel alone is one line of each row, in as many pages as there are rows.
constexpr long PANELS_READ = 8, ROWS_AHEAD = 8;
SO_NOINLINE void pack_pairs_rows(const bf16* from, long stride_k, long n, long k, bf16* to) {
  const long depth = round_up(k, DEPTH);
  for (long g = 0; g < n; g += PANELS_READ * PANEL)
    for (long x = 0; x < depth; x += 2)
      for (long p = g; p < min_of(n, g + PANELS_READ * PANEL); p += PANEL) {
        __builtin_prefetch(from + (x + ROWS_AHEAD) * stride_k + p, 0, 3);
        __builtin_prefetch(from + (x + ROWS_AHEAD + 1) * stride_k + p, 0, 3);
        for (long j = 0; j < PANEL; j += VL) {
          const bf16* low = from + x * stride_k + p + j;
          const long count = min_of(VL, n - p - j);
          vu pair = {};
          if (x + 1 < k && count == VL)
            pair = load_bits(low) | load_bits(low + stride_k) << 16;
          else if (x < k && count > 0)
            pair = load_bits_n(low, count) | (x + 1 < k ? load_bits_n(low + stride_k, count) << 16 : vu{});
          memcpy(to + p * depth + x * PANEL + 2 * j, &pair, sizeof(pair));
        }
      }
}

// B contiguous along k: pairs lie together already, and squares of them are transposed. Columns past n are
// zero up to the end of a vector; the rest of a panel stays as it is, since nobody looks at its products.
SO_NOINLINE void pack_pairs_columns(const bf16* from, long stride_n, long n, long k, bf16* to) {
  const long depth = round_up(k, DEPTH);
  for (long p = 0; p < n; p += PANEL, to += depth * PANEL)
    for (long x = 0; x < depth; x += 2 * VL)
      for (long j = 0; j < min_of(PANEL, n - p); j += VL) {
        vf square[VL];
#pragma GCC unroll 16
        for (int r = 0; r < VL; ++r) {
          const bf16* row = from + (p + j + r) * stride_n + x;
          square[r] = vf{};
          if (p + j + r < n && x + 2 * VL <= k) {
            square[r] = load_raw<vf>(row);
          } else if (p + j + r < n && x < k) {
            uint16_t rest[2 * VL] = {};
            memcpy(rest, row, (k - x) * 2);
            memcpy(&square[r], rest, sizeof(vf));
          }
        }
        transpose_square<1>(square);
        uint32_t* out = reinterpret_cast<uint32_t*>(to + x * PANEL) + j;
#pragma GCC unroll 16
        for (int r = 0; r < VL; ++r)
          if (x + 2 * r < depth) memcpy(out + r * PANEL, &square[r], sizeof(vf));
      }
}

// The same for a few columns: one pair after the other.
SO_NOINLINE void pack_pairs_few(const bf16* from, long stride_n, long n, long k, bf16* to) {
  for (long j = 0; j < n; ++j, from += stride_n) {
    long x = 0;
    for (; x + 1 < k; x += 2) memcpy(to + x * PANEL + 2 * j, from + x, 4);
    for (; x < round_up(k, DEPTH); x += 2) {
      to[x * PANEL + 2 * j] = x < k ? from[x] : bf16{0};
      to[x * PANEL + 2 * j + 1] = bf16{0};
    }
  }
}

// B[k,n] with any strides into pairs: room for round_up(k, DEPTH) * round_up(n, PANEL) elements.
SO_INLINE void pack_pairs(const bf16* from, long stride_n, long stride_k, long n, long k, bf16* to) {
  if (stride_n == 1) return pack_pairs_rows(from, stride_k, n, k, to);
  if (stride_k == 1)
    return n <= FEW ? pack_pairs_few(from, stride_n, n, k, to)
                    : pack_pairs_columns(from, stride_n, n, k, to);
  const long depth = round_up(k, DEPTH);
  for (long p = 0; p < n; p += PANEL, to += depth * PANEL)
    for (long x = 0; x < depth; ++x)
      for (long j = 0; j < min_of(PANEL, n - p); ++j)
        to[x / 2 * 2 * PANEL + 2 * j + x % 2] =
            x < k ? from[(p + j) * stride_n + x * stride_k] : bf16{0};
}

// to[x, i] = from[i, x] for i < n, x < k, rows of `from` contiguous: square by square.
SO_NOINLINE void transpose_bf16(const bf16* from, long ld_from, long n, long k, bf16* to, long ld_to) {
  for (long i = 0; i < n; i += VL)
    for (long x = 0; x < k; x += VL) {
      const long rows = min_of(VL, n - i), lanes = min_of(VL, k - x);
      const bf16* corner = from + i * ld_from + x;
      vf square[VL];
#pragma GCC unroll 16
      for (int r = 0; r < VL; ++r)
        square[r] = r < rows ? load_n<vf>(corner + r * ld_from, (int)lanes, 0.0f) : vf{};
      transpose_square<1>(square);
      for (long l = 0; l < lanes; ++l) store_n(to + (x + l) * ld_to + i, square[l], (int)rows);
    }
}

// to[x, i] = from[x, i], zero for n <= i < round_up(n, DEPTH).
SO_NOINLINE void pack_rows_bf16(const bf16* from, long stride_k, long stride_n, long n, long k, bf16* to,
                                long ld_to) {
  const bool across = stride_k == 1 && stride_n != 1;
  if (across) transpose_bf16(from, stride_n, n, k, to, ld_to);
  for (long x = 0; x < k; ++x, from += stride_k, to += ld_to) {
    if (stride_n == 1)
      memcpy(to, from, n * sizeof(bf16));
    else if (!across)
      for (long i = 0; i < n; ++i) to[i] = from[i * stride_n];
    for (long i = n; i < round_up(n, DEPTH); ++i) to[i] = bf16{0};
  }
}

// ---- Without tiles ------------------------------------------------------------------------------

SO_INLINE vf add_pairs(vf sum, uint32_t a, vu b) {
#if SO_HAS_DOTS
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(broadcast_i((int32_t)a)), "v"(b));
  return sum;
#else
  sum += splat<vf>(bit_cast<float>(a << 16)) * bit_cast<vf>(b << 16);
  return sum + splat<vf>(bit_cast<float>(a & 0xffff0000u)) * bit_cast<vf>(b & 0xffff0000u);
#endif
}

// Rows of C that one call computes, of one panel.
template <int MR>
SO_NOINLINE void micro_pairs(long k, const bf16* a, long am, const bf16* b, float (*out)[PANEL]) {
  constexpr int NV = PANEL / VL;
  vf sum[MR][NV];
#pragma GCC unroll 32
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 32
    for (int j = 0; j < NV; ++j) sum[i][j] = vf{};
#pragma GCC unroll 1
  for (long x = 0; x + 1 < k; x += 2, b += 2 * PANEL) {
    vu right[NV];
#pragma GCC unroll 32
    for (int j = 0; j < NV; ++j) right[j] = load_raw<vu>(b + 2 * j * VL);
#pragma GCC unroll 32
    for (int i = 0; i < MR; ++i) {
      const uint32_t left = load_raw<uint32_t>(a + i * am + x);
#pragma GCC unroll 32
      for (int j = 0; j < NV; ++j) sum[i][j] = add_pairs(sum[i][j], left, right[j]);
    }
  }
  if (k % 2) {
#pragma GCC unroll 32
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 32
      for (int j = 0; j < NV; ++j)
        sum[i][j] = add_pairs(sum[i][j], a[i * am + k - 1].bits, load_raw<vu>(b + 2 * j * VL));
  }
#pragma GCC unroll 32
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 32
    for (int j = 0; j < NV; ++j) store(out[i] + j * VL, sum[i][j]);
}

template <bool ACCUMULATE, bool TRANSPOSED>
SO_NOINLINE void multiply_pairs(long m, long n, long k, const bf16* a, long am, const bf16* b, float* c,
                                long cm) {
  constexpr int MR = VL == 16 ? 12 : 4;
  const Flush flush;
  for (long j = 0; j < n; j += PANEL, b += round_up(k, DEPTH) * PANEL)
    for (long i = 0; i < m; i += MR) {
      float out[MR][PANEL];
      const long rows = min_of(MR, m - i), columns = min_of(PANEL, n - j);
      if (rows == MR)
        micro_pairs<MR>(k, a + i * am, am, b, out);
      else
        for (long r = 0; r < rows; ++r) micro_pairs<1>(k, a + (i + r) * am, am, b, out + r);
      for (long r = 0; r < rows; ++r)
        for (long s = 0; s < columns; ++s) {
          float* to = TRANSPOSED ? c + (j + s) * cm + i + r : c + (i + r) * cm + j + s;
          *to = ACCUMULATE ? *to + out[r][s] : out[r][s];
        }
    }
}

// ---- With tiles ---------------------------------------------------------------------------------

#if SO_HAS_TILES
// Ask the system, once per process, for the state of tiles; without it the first use would be a fault.
SO_INLINE bool tiles_allowed() {
  static const bool allowed = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18) == 0;
  return allowed;
}

struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 to 3 are results (two by two), 4 and 5 rows of A, 6 and 7 columns of B. rows, columns: of C, up
// to 32 each.
SO_INLINE void shape_tiles(long rows, long columns) {
  TileShapes shapes;
  for (int i = 0; i < 2; ++i) {
    const int height = (int)min_of(16, max_of(1, rows - 16 * i));
    for (int j = 0; j < 2; ++j) {
      shapes.rows[2 * i + j] = height;
      shapes.bytes[2 * i + j] = 4 * min_of(16, max_of(1, columns - 16 * j));
    }
    shapes.rows[4 + i] = height;
    shapes.bytes[4 + i] = 64;
    shapes.rows[6 + i] = 16;
    shapes.bytes[6 + i] = 4 * min_of(16, max_of(1, columns - 16 * i));
  }
  __asm__ volatile("ldtilecfg %0" : : "m"(shapes) : "memory");
}

// The shape that tiles have. Setting it takes as long as 8 products of tiles: it is kept from product to product.
struct Tiles {
  long rows = 0, columns = 0;
  Tiles() = default;
  Tiles(const Tiles&) = delete;
  inline void shape(long new_rows, long new_columns) {
    // of one tile where there may be two, the other stays as it was
    if (new_rows == 16) new_rows = 32;
    if (new_columns == 16) new_columns = 32;
    if (rows != new_rows || columns != new_columns) shape_tiles(rows = new_rows, columns = new_columns);
  }
  ~Tiles() {
    if (rows) __asm__ volatile("tilerelease" ::);
  }
};
#define SO_TILE_ZERO(t) __asm__ volatile("tilezero %%tmm" #t ::)
#define SO_TILE_LOAD(t, p, stride) \
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #t : : "r"(p), "r"((long)(stride)) : "memory")
#define SO_TILE_STORE(t, p, stride) \
  __asm__ volatile("tilestored %%tmm" #t ", (%0,%1,1)" : : "r"(p), "r"((long)(stride)) : "memory")
#define SO_TILE_DOT(c, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::)

// One block of C of R by S tiles. FETCH: lines of what is read next that are fetched per step of k.
template <int R, int S, int FETCH>
SO_INLINE void tile_block(long steps, const bf16* a, long am, const bf16* b, float* c, long cm,
                          bool accumulate, const char* next) {
  if (accumulate) {
    SO_TILE_LOAD(0, c, 4 * cm);
    if (S > 1) SO_TILE_LOAD(1, c + 16, 4 * cm);
    if (R > 1) SO_TILE_LOAD(2, c + 16 * cm, 4 * cm);
    if (R > 1 && S > 1) SO_TILE_LOAD(3, c + 16 * cm + 16, 4 * cm);
  } else {
    SO_TILE_ZERO(0);
    SO_TILE_ZERO(1);
    SO_TILE_ZERO(2);
    SO_TILE_ZERO(3);
  }
  for (long t = 0; t < steps; ++t, a += DEPTH, b += DEPTH * PANEL) {
    SO_TILE_LOAD(4, a, 2 * am);
    SO_TILE_LOAD(6, b, 4 * PANEL);
    SO_TILE_DOT(0, 4, 6);
    if (S > 1) {
      SO_TILE_LOAD(7, b + 2 * 16, 4 * PANEL);
      SO_TILE_DOT(1, 4, 7);
    }
    if (R > 1) {
      SO_TILE_LOAD(5, a + 16 * am, 2 * am);
      SO_TILE_DOT(2, 5, 6);
      if (S > 1) SO_TILE_DOT(3, 5, 7);
    }
#pragma GCC unroll 64
    for (int f = 0; f < FETCH; ++f) __builtin_prefetch(next + 64 * f, 0, 2);
    next += 64 * FETCH;
  }
  SO_TILE_STORE(0, c, 4 * cm);
  if (S > 1) SO_TILE_STORE(1, c + 16, 4 * cm);
  if (R > 1) SO_TILE_STORE(2, c + 16 * cm, 4 * cm);
  if (R > 1 && S > 1) SO_TILE_STORE(3, c + 16 * cm + 16, 4 * cm);
}

template <int FETCH>
SO_NOINLINE void tile_block_of(long rows, long columns, long steps, const bf16* a, long am,
                               const bf16* b, float* c, long cm, bool accumulate, const char* next) {
  if (rows > 16) {
    if (columns > 16)
      tile_block<2, 2, 2 * FETCH>(steps, a, am, b, c, cm, accumulate, next);
    else
      tile_block<2, 1, 2 * FETCH>(steps, a, am, b, c, cm, accumulate, next);
  } else if (columns > 16) {
    tile_block<1, 2, FETCH>(steps, a, am, b, c, cm, accumulate, next);
  } else {
    tile_block<1, 1, FETCH>(steps, a, am, b, c, cm, accumulate, next);
  }
}
#else
struct Tiles {};
#endif

// One panel of B, `n` columns in pairs, against all rows of A.
template <bool ACCUMULATE, class IN>
SO_NOINLINE void panel_pairs(Tiles& tiles, long m, long n, long k, const bf16* a, long am, const bf16* b, float* c,
                             long cm, long top, long bottom, IN in) {
#if SO_HAS_TILES
  if (tiles_allowed()) {
    const long steps = round_up(k, DEPTH) / DEPTH;
    const long parts = max_of(1, (steps + STRETCH / 2) / STRETCH), stretch = (steps + parts - 1) / parts;
    for (long t = 0; t == 0 || t < steps; t += stretch)  // a sum of nothing is written too
      for (long i = top / 32 * 32; i < min_of(m, bottom); i += 32) {
        const long rows = min_of(32, m - i);
        const bool add = ACCUMULATE || t > 0;
        const long from = max_of(t, in.left(i) / DEPTH);
        const long to = min_of(min_of(steps, t + stretch), (in.right(i + rows) + DEPTH - 1) / DEPTH);
        if (add && from >= to) continue;
        tiles.shape(rows, n);
        tile_block_of<0>(rows, n, to - from, a + i * am + from * DEPTH, am, b + from * DEPTH * PANEL,
                         c + i * cm, cm, add, nullptr);
      }
    return;
  }
#endif
  multiply_pairs<ACCUMULATE, false>(m, n, k, a, am, b, c, cm);
}

// C[m,n] (+)= A[m,k] B[k,n] for B of any strides, made into pairs by so many panels at a time, for which `panels` has
// room. A's rows have round_up(k, DEPTH) elements, those past k finite. in, out: where A and C count, as in gemm_nn.
template <bool ACCUMULATE, int GROUP = 1, class IN = Whole, class OUT = Whole>
SO_INLINE void gemm_pairs(Tiles& tiles, long m, long n, long k, const bf16* a, long am, const bf16* b, long bn,
                          long bk, bf16* panels, float* c, long cm, IN in = {}, OUT out = {}) {
  for (long g = 0; g < n; g += GROUP * PANEL) {
    const long end = min_of(g + GROUP * PANEL, n);
    if (max_of(0, out.top(g)) >= min_of(m, out.bottom(end))) continue;
    pack_pairs(b + g * bn, bn, bk, end - g, k, panels);
    const bf16* panel = panels;
    for (long j = g; j < end; j += PANEL, panel += round_up(k, DEPTH) * PANEL) {
      const long columns = min_of(PANEL, n - j), top = max_of(0, out.top(j)), bottom = out.bottom(j + columns);
      if (top >= min_of(m, bottom)) continue;
      panel_pairs<ACCUMULATE>(tiles, m, columns, k, a, am, panel, c + j, cm, top, bottom, in);
    }
  }
}

// The same for B that has been made into pairs as a whole; rows `first` to `last` of the result, first a multiple of 32.
template <bool ACCUMULATE, class IN, class OUT>
SO_INLINE void rows_of_pairs(Tiles& tiles, long first, long last, long n, long k, const bf16* a, long am,
                             const bf16* b, float* c, long cm, IN in, OUT out) {
  for (long j = 0; j < n; j += PANEL, b += round_up(k, DEPTH) * PANEL) {
    const long columns = min_of(PANEL, n - j), top = max_of(first, out.top(j)), bottom = out.bottom(j + columns);
    if (top < min_of(last, bottom))
      panel_pairs<ACCUMULATE>(tiles, last, columns, k, a, am, b, c + j, cm, top, bottom, in);
  }
}

template <bool ACCUMULATE, class IN = Whole, class OUT = Whole>
SO_INLINE void gemm_pairs_made(Tiles& tiles, long m, long n, long k, const bf16* a, long am, const bf16* b, float* c,
                               long cm, IN in = {}, OUT out = {}) {
  // rows that fill no tiles come after all others: tiles get their shape once
  long whole = 0;
#if SO_HAS_TILES
  if (tiles_allowed() && n > PANEL && m % 32 % 16) whole = m / 32 * 32;
#endif
  if (whole > 0) rows_of_pairs<ACCUMULATE>(tiles, 0, whole, n, k, a, am, b, c, cm, in, out);
  rows_of_pairs<ACCUMULATE>(tiles, whole, m, n, k, a, am, b, c, cm, in, out);
}

// The same with C[n,m] = transposed: few columns n (rows of the result), many rows of A, read once as
// they lie in memory; those that follow are fetched meanwhile, in the order of their addresses.
template <bool ACCUMULATE, int FETCH>
SO_NOINLINE void gemm_pairs_transposed(Tiles& tiles, long m, long n, long k, const bf16* a, long am,
                                       const bf16* b, float* c, long cm) {
#if SO_HAS_TILES
  if (tiles_allowed()) {
    const long steps = round_up(k, DEPTH) / DEPTH;
    alignas(64) float block[32][32];
    for (long i = 0; i < m; i += 32)
      for (long j = 0; j < n; j += 32) {
        const long rows = min_of(32, m - i), columns = min_of(32, n - j);
        tiles.shape(rows, columns);
        const bf16* panel = b + j * steps * DEPTH;
        const char* next = reinterpret_cast<const char*>(a + (i + 32) * am);
        if (FETCH && j == 0)
          tile_block_of<16>(rows, columns, steps, a + i * am, am, panel, block[0], 32, false, next);
        else
          tile_block_of<0>(rows, columns, steps, a + i * am, am, panel, block[0], 32, false, next);
        for (long p = 0; p < rows; p += VL)
          for (long q = 0; q < columns; q += VL) {
            vf square[VL];
#pragma GCC unroll 16
            for (int r = 0; r < VL; ++r) square[r] = load<vf>(&block[p + r][q]);
            transpose_square<1>(square);
            const int lanes = (int)min_of(VL, rows - p);
#pragma GCC unroll 16
            for (int r = 0; r < VL; ++r) {
              if (q + r >= columns) continue;
              float* to = c + (j + q + r) * cm + i + p;
              if (lanes == VL)
                store(to, ACCUMULATE ? load<vf>(to) + square[r] : square[r]);
              else
                store_n(to, ACCUMULATE ? load_n<vf>(to, lanes, 0.0f) + square[r] : square[r], lanes);
            }
          }
      }
    return;
  }
#endif
  multiply_pairs<ACCUMULATE, true>(m, n, k, a, am, b, c, cm);
}

}  // namespace so
