// Packers of the products of bfloat16: float32 operands are rounded to nearest while they are laid out as pairs along k,
// (k, k + 1) in the halves of one 32-bit word; an odd last k is paired with zero. For files compiled with AVX512-BF16.
#pragma once
#define FD_PAIRS
#include "native.hpp"

namespace FD_NS {

// 32 values as 16 words of neighbours; `cols` of them exist.
FD_INLINE __m512i round_row(const float* from, int cols) {
  const vec<float> low = load_n(from, cols), high = cols > 16 ? load_n(from + 16, cols - 16) : vec<float>{};
  return (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
}

// to[r][16]: rows of A, k along the row.
static void rows_of(const float* from, uint32_t* to, int64_t rows, int64_t cols, int64_t stride) {
  for (int64_t r = 0; r < rows; r++) _mm512_storeu_si512(to + r * DEPTH, round_row(from + r * stride, (int)cols));
}

// to[r / 2][32]: rows r and r + 1 in the halves of a word; k runs down the rows.
static void pairs_of(const float* from, uint32_t* to, int64_t rows, int64_t cols, int64_t stride) {
  alignas(64) static const uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i turn = _mm512_load_si512(order);
  for (int64_t r = 0; r < rows; r += 2, from += 2 * stride, to += PANEL)
    for (int c = 0; c < PANEL; c += 16) {
      const int left = (int)cols - c;
      const vec<float> even = left > 0 ? load_n(from + c, left) : vec<float>{};
      const vec<float> odd = left > 0 && r + 1 < rows ? load_n(from + stride + c, left) : vec<float>{};
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
      _mm512_storeu_si512(to + c, _mm512_permutexvar_epi16(turn, both));
    }
}

// to[k / 2][32] of the transpose: rows of `from` become columns, its columns (at most 32) k.
static void pairs_of_transpose(const float* from, uint32_t* to, int64_t depth, int64_t rows, int64_t stride) {
  alignas(64) uint32_t words[PANEL * DEPTH];
  rows_of(from, words, rows, depth, stride);
  const int64_t pairs = (depth + 1) / 2;
  for (int64_t c = 0; c < PANEL; c += 16)
    transpose<float, true>((const float*)words + c * DEPTH, (float*)to + c, DEPTH, pairs, rows - c);
}

}  // namespace FD_NS
