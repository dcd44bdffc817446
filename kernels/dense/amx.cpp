// Products of bfloat16 with float32 sums by AMX (Intel Architecture Instruction Set Extensions, chapter 3): eight tile
// registers of 16 rows of 64 bytes; tdpbf16ps adds the product of 16 rows of 16 pairs of A and 16 pairs of 16 columns of B
// to 16 x 16 sums, 8192 multiply-adds in 16 cycles, where 16 vdpbf16ps do as many in 256.
//
// Both operands come packed: A as [k / 16][row][16 words], so that a tile is 1 KB in a row, B as [k][32 words], k a
// multiple of 16 (zeros beyond the product's). Four sums of 16 x 16 share two tiles of A and two of B: 4 KB are loaded in
// the 64 cycles of four products. A's tiles may read up to 15 rows past the last: scratch is twice what pairs need, and
// a row of A touches no other row of C.
#include "pairs.hpp"

#if defined(__linux__) && defined(__x86_64__)
namespace FD_NS {

enum { C00, C01, C10, C11, A0, A1, B0, B1 };  // tile registers; the intrinsics want literals and get 0 to 7
constexpr int64_t A_TILE = 16 * DEPTH, A_BYTES = 4 * DEPTH, B_BYTES = 4 * PANEL;

// A thread sets up its tiles before its first product and gives them up after the last, so that the kernel has no 8 KB to
// save for it in between.
static void begin() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } const shape;
  static_assert(sizeof shape == 64, "the layout that ldtilecfg reads");
  asm volatile("ldtilecfg %0" ::"m"(shape));
}

static void end() { _tile_release(); }

// C's 32 x 32 sums (16 rows or columns of them if no more exist) += A B over `steps` words of k.
template <bool LOWER, bool RIGHT>
static FD_INLINE void sums(const uint32_t* a, int64_t a_panel, const uint32_t* b, int64_t steps) {
  for (; steps > 0; steps -= DEPTH, a += a_panel, b += DEPTH * PANEL) {
    _tile_loadd(6, b, B_BYTES);
    _tile_loadd(4, a, A_BYTES);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (RIGHT) {
      _tile_loadd(7, b + DEPTH, B_BYTES);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (LOWER) {
      _tile_loadd(5, a + A_TILE, A_BYTES);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (RIGHT) _tile_dpbf16ps(3, 5, 7);
    }
  }
}

static FD_INLINE void load_sums(const float* c, int64_t row) {
  _tile_loadd(0, c, 4 * row);
  _tile_loadd(1, c + 16, 4 * row);
  _tile_loadd(2, c + 16 * row, 4 * row);
  _tile_loadd(3, c + 16 * row + 16, 4 * row);
}

static FD_INLINE void store_sums(float* c, int64_t row) {
  _tile_stored(0, c, 4 * row);
  _tile_stored(1, c + 16, 4 * row);
  _tile_stored(2, c + 16 * row, 4 * row);
  _tile_stored(3, c + 16 * row + 16, 4 * row);
}

// What earlier K blocks left, bias, z, ReLU, y: the epilogue of native.hpp on sums that lie on the stack.
static void finish(const fd_dense_block& p, const float* part, int64_t row, int64_t rows) {
  const int cols = (int)p.cols;
  for (int64_t i = 0; i < rows; i++, part += PANEL) {
    float *to = (float*)p.c + (row + i) * p.c_row, *z = p.z ? (float*)p.z + (row + i) * p.z_row : nullptr;
    for (int j = 0; j < cols; j += 16) {
      const int left = cols - j, written = p.padded ? 16 : left;
      vec<float> y = load_n(part + j, left);  // the padding of a panel stays 0
      if (p.add) y += load_n(to + j, left);
      if (p.bias) y += load_n((const float*)p.bias + j, left);
      if (z) store_n(z + j, y, written);
      if (p.relu) y = max_(vec<float>{}, y);
      store_n(to + j, y, written);
    }
  }
}

static void product_tiles(const fd_dense_block* block) {
  const fd_dense_block& p = *block;
  const uint32_t *a = (const uint32_t*)p.a, *b = (const uint32_t*)p.b;
  const bool plain = p.cols == PANEL && !p.bias && !p.z && !p.relu;
  asm volatile("" ::: "memory");  // gcc's tile loads do not say that they read memory
  for (int64_t row = 0; row < p.rows; row += 32, a += 2 * A_TILE) {
    alignas(64) float part[32 * PANEL];
    float* c = (float*)p.c + row * p.c_row;
    const int64_t rows = p.rows - row < 32 ? p.rows - row : 32;
    const bool in_place = plain && rows == 32;
    if (in_place && p.add) {
      load_sums(c, p.c_row);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    if (rows > 16 && p.cols > 16) sums<true, true>(a, p.a_panel, b, p.k);
    else if (rows > 16) sums<true, false>(a, p.a_panel, b, p.k);
    else if (p.cols > 16) sums<false, true>(a, p.a_panel, b, p.k);
    else sums<false, false>(a, p.a_panel, b, p.k);
    store_sums(in_place ? c : part, in_place ? p.c_row : PANEL);
    if (!in_place) finish(p, part, row, rows);
  }
}

// to[r / 2][32] with zeros up to a whole tile of 16 pairs.
static void whole_tiles(uint32_t* to, int64_t pairs) {
  for (; pairs % DEPTH; pairs++)
    for (int c = 0; c < PANEL; c += 16) _mm512_storeu_si512(to + pairs * PANEL + c, _mm512_setzero_si512());
}

static void tiles_of(const float* from, uint32_t* to, int64_t rows, int64_t cols, int64_t stride) {
  pairs_of(from, to, rows, cols, stride);
  whole_tiles(to, (rows + 1) / 2);
}

static void tiles_of_transpose(const float* from, uint32_t* to, int64_t depth, int64_t rows, int64_t stride) {
  pairs_of_transpose(from, to, depth, rows, stride);
  whole_tiles(to, (depth + 1) / 2);
}

// to[c][16]: columns of `from` as rows of A, its rows (at most 32) k.
static void rows_of_transpose(const float* from, uint32_t* to, int64_t depth, int64_t cols, int64_t stride) {
  alignas(64) uint32_t words[DEPTH * PANEL];
  tiles_of(from, words, depth, cols, stride);
  for (int64_t c = 0; c < cols; c += 16)
    transpose<float, true, DEPTH>((const float*)words + c, (float*)to + c * DEPTH, PANEL, cols - c, 16);
}

}  // namespace FD_NS

const fd_dense_pairs fd_dense_amx = {
    FD_NS::product_tiles, FD_NS::product_tiles,      FD_NS::rows_of, FD_NS::rows_of_transpose,
    FD_NS::tiles_of,      FD_NS::tiles_of_transpose, FD_NS::begin,   FD_NS::end,               1,
};
#endif
