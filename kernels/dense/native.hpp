// Block functions of the dense products: the micro-kernel C[MR][2 vectors] += A B with its epilogue, dot products,
// packing, column sums.
//
// The micro-kernel is an outer product: per k it loads two vectors of B, broadcasts MR values of A one after the other
// and does 2 MR fused multiply-adds into accumulators that never leave the registers. Registers decide MR: AVX-512 has
// 32 (28 accumulators, 2 of B, 1 of A), AVX2 and SSE have 16 (12 accumulators, 2 of B, 1 of A, 1 for SSE's product).
// The compiler keeps the accumulators in registers only if EVERY loop over them is unrolled: one rolled initialisation
// costs a factor of three.
#pragma once
#include "simd.hpp"
#include "table.h"

namespace FD_NS {

#if FD_LEVEL == FD_AVX512
constexpr int TILE_ROWS = 14, TILE_ROWS_T = 11;  // 32 features of a panel of x^T make tiles of 11 + 11 + 10
#else
constexpr int TILE_ROWS = 6, TILE_ROWS_T = 6;
#endif
constexpr int PANEL = 32;
// One step of the product. pairs.hpp includes this file with operands that are pairs of bfloat16 along k in the place of
// one float: a step is two products then, summed in float32 by the instruction, and a panel row of A is 16 pairs.
#ifdef FD_PAIRS
constexpr int DEPTH = PANEL / 2;
FD_INLINE vec<float> broadcast(float pair) { return (vec<float>)_mm512_set1_ps(pair); }
FD_INLINE vec<float> multiply_add(vec<float> c, vec<float> a, vec<float> b) {
  return (vec<float>)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
}
#else
constexpr int DEPTH = PANEL;
template <class T> FD_INLINE vec<T> broadcast(T a) { return splat(a); }
template <class V> FD_INLINE V multiply_add(V c, V a, V b) { return c + a * b; }
#endif
// Few rows leave most of the registers free: such tiles take more panels of B at once, up to 24 accumulators of AVX-512
// and 8 of the others. Plain rows of B are then read 1 KB at a time instead of 128 bytes.
#if FD_LEVEL == FD_AVX512
constexpr int WIDE[] = {1, 8, 4, 4};  // panels by rows
#else
constexpr int WIDE[] = {1, 4, 1, 1};
#endif
template <class T> constexpr int LINE = 64 / sizeof(T);
template <class T> constexpr int A_LINES = sizeof(T) / 4;  // MR rows of 32 in at most 32 steps
constexpr int AHEAD = 8, AHEAD_T = 24;  // rows of B and of x^T to prefetch; the latter comes from beyond L2
constexpr int AHEAD_WIDE = 16, AHEAD_PLAIN = 4;  // rows of B that a wide tile prefetches, in panels and in plain rows

// ---------------------------------------------------------------- micro-kernel
// The epilogue of a tile that ends within a vector: what earlier K blocks left, bias, z, ReLU, y, in the same order.
template <class T>
__attribute__((noinline)) static void finish_part(const fd_dense_block& p, const T* part, int rows, int width,
                                                  int64_t row, int64_t col, int cols) {
  constexpr int L = lanes<T>;
  for (int i = 0; i < rows; i++, row++, part += width) {
    T *to = (T*)p.c + row * p.c_row + col, *z = p.z ? (T*)p.z + row * p.z_row + col : nullptr;
    for (int j = 0; j < cols; j += L) {
      vec<T> y = load(part + j);
      if (p.add) y += load_n(to + j, cols - j);
      if (p.bias) y += load_n((const T*)p.bias + col + j, cols - j);
      if (z) store_n(z + j, y, cols - j);
      if (p.relu) y = max_(vec<T>{}, y);
      store_n(to + j, y, cols - j);
    }
  }
}

// TA: A comes as rows of k (x^T dy reads x down its rows). STRIDE: elements between rows of A, 0 = p.a_row. A known
// stride (column panels) makes the MR addresses one base and constants. NP: panels of B side by side, complete if more
// than one; NV vectors of each.
template <class T, int MR, int NV, int NP, bool TA, int STRIDE>
__attribute__((noinline)) static void tile(const fd_dense_block& p, const T* a, const T* b, int64_t row, int64_t col,
                                           int cols) {
  constexpr int L = lanes<T>, ALL = NV * NP;
  vec<T> c[MR][ALL];
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 16
    for (int v = 0; v < ALL; v++) c[i][v] = vec<T>{};

  const int64_t stride = STRIDE ? STRIDE : p.a_row, b_row = p.b_row;
  const int64_t b_panel = NP > 1 ? p.b_panel : 0;
  auto step = [&](const T* ak, const T* bk, int64_t between) __attribute__((always_inline)) {
    if constexpr (NP > 1) {  // few rows: all of A's values wait in registers while B passes
      vec<T> av[MR];
#pragma GCC unroll 4
      for (int i = 0; i < MR; i++) av[i] = broadcast(ak[i * between]);
#pragma GCC unroll 16
      for (int v = 0; v < ALL; v++) {
        const vec<T> bv = load(bk + v / NV * b_panel + v % NV * L);
#pragma GCC unroll 4
        for (int i = 0; i < MR; i++) c[i][v] = multiply_add(c[i][v], av[i], bv);
      }
    } else {
      vec<T> bv[NV];
#pragma GCC unroll 2
      for (int v = 0; v < NV; v++) bv[v] = load(bk + L * v);
#pragma GCC unroll 16
      for (int i = 0; i < MR; i++) {
        const vec<T> av = broadcast(ak[i * between]);
#pragma GCC unroll 2
        for (int v = 0; v < NV; v++) c[i][v] = multiply_add(c[i][v], av, bv[v]);
      }
    }
  };
  constexpr int ROWS = TA ? TILE_ROWS_T : TILE_ROWS;  // thin tiles pass over B faster
  const int64_t ahead = b_row * (NP == 1 ? AHEAD * ROWS / MR : b_row == PANEL ? AHEAD_WIDE : AHEAD_PLAIN);
  auto prefetch_b = [&](const T* bk) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int q = 0; q < NP; q++)
#pragma GCC unroll 2
      for (int i = 0; i < NV * L; i += LINE<T>) __builtin_prefetch(bk + ahead + q * b_panel + i);
  };
  if constexpr (TA) {
    for (int64_t k = 0; k < p.k; k++, a += stride, b += b_row) {
      __builtin_prefetch(a + AHEAD_T * stride);
      prefetch_b(b);
      step(a, b, 1);
    }
  } else {
    for (int64_t k0 = 0; k0 < p.k; k0 += DEPTH, a += p.a_panel) {
      const int64_t n = p.k - k0 < DEPTH ? p.k - k0 : DEPTH;
      for (int64_t k = 0; k < n; k++, b += b_row) {
        if constexpr (STRIDE == DEPTH)  // the rows of the next panel of A: 1 to 4 lines a step
#pragma GCC unroll 4
          for (int i = 0; i < A_LINES<T>; i++) __builtin_prefetch(a + p.a_panel + (k * A_LINES<T> + i) * LINE<T>);
        prefetch_b(b);
        step(a + k, b, stride);
      }
    }
  }

  const bool part_only = NP == 1 && cols < L * NV;
  if constexpr (NP == 1)
    if (part_only && !p.padded) {  // the end of plain rows, by way of the stack
      T part[MR * NV * L];
#pragma GCC unroll 16
      for (int i = 0; i < MR; i++)
#pragma GCC unroll 2
        for (int v = 0; v < NV; v++) store(part + (i * NV + v) * L, c[i][v]);
      finish_part(p, part, MR, NV * L, row, col, cols);
      return;
    }
  T* const to = (T*)p.c + row * p.c_row + col;
  const int64_t c_panel = NP > 1 ? p.c_panel : 0, z_panel = NP > 1 ? p.z_panel : 0;
#define FD_EACH(statement)                                \
  _Pragma("GCC unroll 16") for (int i = 0; i < MR; i++)   \
  _Pragma("GCC unroll 16") for (int v = 0; v < ALL; v++) {\
    statement;                                            \
  }
  if (p.add) FD_EACH(c[i][v] += load(to + i * p.c_row + v / NV * c_panel + v % NV * L))
  if (p.bias) {
    vec<T> bias[ALL];
    const T* const from = (const T*)p.bias + col;
#pragma GCC unroll 16
    for (int v = 0; v < ALL; v++)
      bias[v] = NP > 1 ? load(from + v / NV * PANEL + v % NV * L) : load_n(from + L * v, cols - L * v);
    FD_EACH(c[i][v] += bias[v])
  }
  if (part_only) {  // the padding of a panel stays 0, whatever 0 * inf left there
    ivec<T> lane;
    for (int l = 0; l < L; l++) lane[l] = l;
    FD_EACH(c[i][v] = lane < cols - L * v ? c[i][v] : vec<T>{})
  }
  if (p.z) {
    T* const z = (T*)p.z + row * p.z_row + col;
    FD_EACH(store(z + i * p.z_row + v / NV * z_panel + v % NV * L, c[i][v]))
  }
  if (p.relu) FD_EACH(c[i][v] = max_(vec<T>{}, c[i][v]))
  FD_EACH(store(to + i * p.c_row + v / NV * c_panel + v % NV * L, c[i][v]))
#undef FD_EACH
}

template <class T, int NV, bool TA, int STRIDE>
static FD_INLINE void run_tile(int rows, const fd_dense_block& p, const T* a, const T* b, int64_t row, int64_t col,
                               int cols) {
  switch (rows) {
#define FD_CASE(n)                                                                                      \
  case n:                                                                                               \
    if constexpr (n <= (TA ? TILE_ROWS_T : TILE_ROWS)) tile<T, n, NV, 1, TA, STRIDE>(p, a, b, row, col, cols); \
    return;
    FD_CASE(1) FD_CASE(2) FD_CASE(3) FD_CASE(4) FD_CASE(5) FD_CASE(6) FD_CASE(7)
    FD_CASE(8) FD_CASE(9) FD_CASE(10) FD_CASE(11) FD_CASE(12) FD_CASE(13) FD_CASE(14)
#undef FD_CASE
  }
}

// Rows in tiles of nearly equal height (256 = 14 + 13 + ..., never a thin last tile).
template <class T, int NV, bool TA, int STRIDE>
static void run_rows(const fd_dense_block& p, const T* a, const T* b, int64_t row, int64_t rows, int64_t col,
                     int cols) {
  constexpr int MR = TA ? TILE_ROWS_T : TILE_ROWS;
  const int64_t tiles = (rows + MR - 1) / MR, stride = TA ? 1 : STRIDE ? STRIDE : p.a_row;
  for (int64_t t = 0; t < tiles; t++) {
    const int64_t from = rows * t / tiles, to = rows * (t + 1) / tiles;
    run_tile<T, NV, TA, STRIDE>((int)(to - from), p, a + from * stride, b, row + from, col, cols);
  }
}

// One output panel: sub-panels of two vectors (the last one may need one vector only), each for all rows.
template <class T, bool TA, int STRIDE>
static void panel_product(const fd_dense_block& p) {
  constexpr int L = lanes<T>, W = 2 * L;
  const T *a = (const T*)p.a, *b = (const T*)p.b;
  for (int64_t row = 0; row < p.rows; row += TA ? PANEL : p.rows) {
    const int64_t rows = TA && p.rows - row > PANEL ? PANEL : p.rows - row;
    for (int64_t col = 0; col < p.cols; col += W) {
      const int cols = (int)(p.cols - col);
      if (cols > L) run_rows<T, 2, TA, STRIDE>(p, a, b + col, row, rows, col, cols);
      else run_rows<T, 1, TA, STRIDE>(p, a, b + col, row, rows, col, cols);
    }
    if (TA) a += p.a_panel;
  }
}
// NP complete panels side by side.
template <class T, int MR, int NP> static void wide_product(const fd_dense_block& p) {
  if constexpr (NP <= WIDE[MR])
    for (int64_t col = 0; col < PANEL; col += 2 * lanes<T>)
      tile<T, MR, 2, NP, false, 0>(p, (const T*)p.a, (const T*)p.b + col, 0, col, PANEL);
}
template <class T, int NP> static void wide_rows(const fd_dense_block& p) {
  if (p.rows == 1) wide_product<T, 1, NP>(p);
  else if (p.rows == 2) wide_product<T, 2, NP>(p);
  else wide_product<T, 3, NP>(p);
}
template <class T> static void product(const fd_dense_block* p) {
  if (p->panels == 8) wide_rows<T, 8>(*p);
  else if (p->panels == 4) wide_rows<T, 4>(*p);
  else if (p->panels == 2) wide_rows<T, 2>(*p);
  else if (p->a_row == DEPTH) panel_product<T, false, DEPTH>(*p);
  else panel_product<T, false, 0>(*p);
}
template <class T> static void product_t(const fd_dense_block* p) { panel_product<T, true, 0>(*p); }

// ---------------------------------------------------------------- dot products
// C[DOT_ROWS][DOT_COLS] += A B where both lie contiguous along k, for outputs so thin that packing B or broadcasting A
// would cost more than the product. Lanes are k; the lanes' sums are added by halves at the end.
#if FD_LEVEL == FD_AVX512
constexpr int DOT_ROWS = 4, DOT_COLS = 4;
#else
constexpr int DOT_ROWS = 2, DOT_COLS = 4;
#endif

template <class T, int MR, int NC>
__attribute__((noinline)) static void dot_tile(const fd_dense_block& p, int64_t row, int64_t col) {
  constexpr int L = lanes<T>;
  const T *a = (const T*)p.a + row * p.a_row, *b = (const T*)p.b + col * p.b_row;
  vec<T> c[MR][NC];
#pragma GCC unroll 4
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
    for (int j = 0; j < NC; j++) c[i][j] = vec<T>{};
  auto step = [&](auto at) __attribute__((always_inline)) {
    vec<T> av[MR];
#pragma GCC unroll 4
    for (int i = 0; i < MR; i++) av[i] = at(a + i * p.a_row);
#pragma GCC unroll 4
    for (int j = 0; j < NC; j++) {
      const vec<T> bv = at(b + j * p.b_row);
#pragma GCC unroll 4
      for (int i = 0; i < MR; i++) c[i][j] += av[i] * bv;
    }
  };
  int64_t k = 0;
  for (; k + L <= p.k; k += L) step([&](const T* from) __attribute__((always_inline)) { return load(from + k); });
  const int left = (int)(p.k - k);
  if (left) step([&](const T* from) __attribute__((always_inline)) { return load_n(from + k, left); });
#pragma GCC unroll 4
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
    for (int j = 0; j < NC; j++) {
      T* to = (T*)p.c + (row + i) * p.c_row + col + j;
      *to = hsum<T>(c[i][j]) + (p.add ? *to : T(0));
    }
}
template <class T, int MR> static void dot_cols(const fd_dense_block& p, int64_t row) {
  int64_t col = 0;
  for (; col + DOT_COLS <= p.cols; col += DOT_COLS) dot_tile<T, MR, DOT_COLS>(p, row, col);
  for (; col < p.cols; col++) dot_tile<T, MR, 1>(p, row, col);
}
template <class T> static void dots(const fd_dense_block* p) {
  int64_t row = 0;
  for (; row + DOT_ROWS <= p->rows; row += DOT_ROWS) dot_cols<T, DOT_ROWS>(*p, row);
  for (; row < p->rows; row++) dot_cols<T, 1>(*p, row);
}

// ---------------------------------------------------------------- packing
template <int... I> struct indices {};
template <int N, int... I> struct count_to : count_to<N - 1, N - 1, I...> {};
template <int... I> struct count_to<0, I...> { typedef indices<I...> type; };

// a0 b0 a1 b1 ... of the low (HALF 0) or high (HALF 1) halves of two vectors
template <int HALF, class T, int... I> FD_INLINE vec<T> interleave(vec<T> a, vec<T> b, indices<I...>) {
  constexpr int L = lanes<T>;
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (I / 2 + HALF * L / 2 + (I % 2) * L)...);
#else
  return __builtin_shuffle(a, b, ivec<T>{(I / 2 + HALF * L / 2 + (I % 2) * L)...});
#endif
}

// An L x L block: log2 L rounds of interleaving row i with row i + L/2 transpose it. At an edge `rows` x `cols` of it
// exist, and zeros stand for missing columns. Rows of the result lie TO apart.
template <class T, bool EDGE, int TO = PANEL>
static FD_INLINE void transpose(const T* from, T* to, int64_t between, int64_t rows, int64_t cols) {
  constexpr int L = lanes<T>;
  typedef typename count_to<L>::type all;
  vec<T> r[L], s[L];
#pragma GCC unroll 16
  for (int i = 0; i < L; i++) {
    if constexpr (!EDGE) r[i] = load(from + i * between);
    else r[i] = i < cols ? load_n(from + i * between, (int)rows) : vec<T>{};
  }
#pragma GCC unroll 4
  for (int half = 1; half < L; half *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < L / 2; i++) {
      s[2 * i] = interleave<0, T>(r[i], r[i + L / 2], all{});
      s[2 * i + 1] = interleave<1, T>(r[i], r[i + L / 2], all{});
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; i++) r[i] = s[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < L; i++)
    if (!EDGE || i < rows) store(to + i * TO, r[i]);
}

template <class T>
static void pack(const void* from_, void* to_, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride) {
  constexpr int L = lanes<T>;
  const T* from = (const T*)from_;
  T* to = (T*)to_;
  if (col_stride == 1 && cols == PANEL) {
    for (int64_t r = 0; r < rows; r++, from += row_stride, to += PANEL)
#pragma GCC unroll 16
      for (int v = 0; v < PANEL; v += L) store(to + v, load(from + v));
    return;
  }
  if (col_stride == 1) {
    for (int64_t r = 0; r < rows; r++, from += row_stride, to += PANEL)
      for (int v = 0; v < PANEL; v += L) store(to + v, v < cols ? load_n(from + v, (int)(cols - v)) : vec<T>{});
    return;
  }
  for (int64_t r = 0; r < rows; r += L)
    for (int64_t c = 0; c < PANEL; c += L) {
      const T* block = from + r * row_stride + c * col_stride;
      if (row_stride != 1) {
        for (int64_t i = 0; i < L && r + i < rows; i++)
          for (int64_t j = 0; j < L; j++)
            to[(r + i) * PANEL + c + j] = c + j < cols ? block[i * row_stride + j * col_stride] : T(0);
      } else if (rows - r >= L && cols - c >= L) {
        transpose<T, false>(block, to + r * PANEL + c, col_stride, L, L);
      } else {
        transpose<T, true>(block, to + r * PANEL + c, col_stride, rows - r, cols - c);
      }
    }
}

// ---------------------------------------------------------------- column sums
// Four running sums (rows r modulo 4), added as (0 + 1) + (2 + 3): a fixed order, and rounding grows with a quarter of
// the rows.
template <class T>
static void column_sums(const void* from_, void* out_, int64_t rows, int64_t cols, int64_t row_stride, int add) {
  constexpr int L = lanes<T>;
  for (int64_t c = 0; c < cols; c += L) {
    const int left = (int)(cols - c);
    const T* from = (const T*)from_ + c;
    vec<T> s[4] = {};
    for (int64_t r = 0; r < rows; r += 4)
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++)
        if (r + i < rows) s[i] += load_n(from + (r + i) * row_stride, left);
    vec<T> sum = (s[0] + s[1]) + (s[2] + s[3]);
    T* out = (T*)out_ + c;
    if (add) sum += load_n(out, left);
    store_n(out, sum, left);
  }
}

}  // namespace FD_NS

#ifndef FD_PAIRS
const fd_dense_table FD_SYMBOL(fd_dense) = {
    {FD_NS::product<float>, FD_NS::product<double>},
    {FD_NS::product_t<float>, FD_NS::product_t<double>},
    {FD_NS::dots<float>, FD_NS::dots<double>},
    {FD_NS::pack<float>, FD_NS::pack<double>},
    {FD_NS::column_sums<float>, FD_NS::column_sums<double>},
    FD_NS::WIDE,
};
#endif
