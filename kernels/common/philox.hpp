// Philox4x32-10, the counter-based generator of every random stream (Salmon, Moraes, Dror, Shaw: "Parallel random
// numbers: as easy as 1, 2, 3", SC 2011). A counter of four words and a key of two give four random words, without state.
//
//   philox4x32         one counter, plain
//   philox_keep_8x32   dropout's keep bits of 8 (or 4) rows x 32 columns in registers; counter (column / 8, row, layer, step),
//                      the column takes 16-bit lane (column % 8), kept iff lane < T (kernels/dropout/README.md)
#pragma once
#include "simd.hpp"

namespace FD_NS {

constexpr uint32_t PHILOX_M0 = 0xD2511F53u, PHILOX_M1 = 0xCD9E8D57u;  // multipliers
constexpr uint32_t PHILOX_W0 = 0x9E3779B9u, PHILOX_W1 = 0xBB67AE85u;  // Weyl increments of the key
constexpr int PHILOX_ROUNDS = 10;

FD_INLINE void philox4x32(uint32_t c[4], uint32_t k0, uint32_t k1) {
#pragma GCC unroll 10
  for (int r = 0; r < PHILOX_ROUNDS; r++, k0 += PHILOX_W0, k1 += PHILOX_W1) {
    const uint64_t p0 = (uint64_t)PHILOX_M0 * c[0], p1 = (uint64_t)PHILOX_M1 * c[2];
    c[0] = (uint32_t)(p1 >> 32) ^ c[1] ^ k0;
    c[2] = (uint32_t)(p0 >> 32) ^ c[3] ^ k1;
    c[1] = (uint32_t)p1;
    c[3] = (uint32_t)p0;
  }
}

// The vector forms hold one counter word in the low half of a 64-bit lane, so that a 32x32 to 64-bit product is one
// instruction and its two halves need no blend; the high halves carry rubbish that the products ignore. Rows share
// their columns' words in the first three rounds (5 of 20 products), and inside a loop over rows of one panel the
// compiler moves those out.
#if FD_LEVEL == FD_AVX512
// GCC 12 calls the undefined pass-through operand of its own unmasked intrinsics uninitialised (PR 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
// Groups of 16 counters in two vectors: lane 2q + i of vector h is row 2i + h, block q. After the 4x4 transpose of words,
// vector i is row i, its 32 lanes of 16 bits in the order of the columns. Two groups at a time (8 rows) hide more of the
// rounds' latency: 0.12 ns an element with one, 0.10 with two; four run out of registers (0.12).
template <int GROUPS>
FD_INLINE void philox_keep(uint32_t row, uint32_t block, uint32_t layer, uint32_t step, uint64_t seed, uint32_t T,
                           uint32_t* bits) {
  const __m512i m0 = _mm512_set1_epi64(PHILOX_M0), m1 = _mm512_set1_epi64(PHILOX_M1);
  const __m512i blocks = _mm512_add_epi64(_mm512_set_epi64(3, 3, 2, 2, 1, 1, 0, 0), _mm512_set1_epi64(block));
  const __m512i pairs = _mm512_set_epi64(2, 0, 2, 0, 2, 0, 2, 0);
  __m512i c[2 * GROUPS][4];
#pragma GCC unroll 4
  for (int h = 0; h < 2 * GROUPS; h++) {
    c[h][0] = blocks;
    c[h][1] = _mm512_add_epi64(_mm512_set1_epi64((uint64_t)row + 4 * (h / 2) + h % 2), pairs);
    c[h][2] = _mm512_set1_epi64(layer);
    c[h][3] = _mm512_set1_epi64(step);
  }
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
#pragma GCC unroll 10
  for (int r = 0; r < PHILOX_ROUNDS; r++, k0 += PHILOX_W0, k1 += PHILOX_W1)
#pragma GCC unroll 4
    for (int h = 0; h < 2 * GROUPS; h++) {
      const __m512i p0 = _mm512_mul_epu32(c[h][0], m0), p1 = _mm512_mul_epu32(c[h][2], m1);
      c[h][0] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c[h][1], _mm512_set1_epi64(k0), 0x96);  // a ^ b ^ c
      c[h][2] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c[h][3], _mm512_set1_epi64(k1), 0x96);
      c[h][1] = p1;
      c[h][3] = p0;
    }
  const __m512i last = _mm512_set1_epi16((short)(T - 1));  // lane < T as lane <= T - 1: T = 65536 keeps all
#pragma GCC unroll 2
  for (int g = 0; g < GROUPS; g++, bits += 4) {
    __m512i w[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++)
      w[k] = _mm512_mask_blend_epi32(0xAAAA, c[2 * g][k], _mm512_slli_epi64(c[2 * g + 1][k], 32));
    const __m512i a = _mm512_unpacklo_epi32(w[0], w[1]), b = _mm512_unpackhi_epi32(w[0], w[1]);
    const __m512i d = _mm512_unpacklo_epi32(w[2], w[3]), e = _mm512_unpackhi_epi32(w[2], w[3]);
    bits[0] = _mm512_cmple_epu16_mask(_mm512_unpacklo_epi64(a, d), last);
    bits[1] = _mm512_cmple_epu16_mask(_mm512_unpackhi_epi64(a, d), last);
    bits[2] = _mm512_cmple_epu16_mask(_mm512_unpacklo_epi64(b, e), last);
    bits[3] = _mm512_cmple_epu16_mask(_mm512_unpackhi_epi64(b, e), last);
  }
}
FD_INLINE void philox_keep_4x32(uint32_t row, uint32_t block, uint32_t layer, uint32_t step, uint64_t seed, uint32_t T,
                                uint32_t bits[4]) {
  philox_keep<1>(row, block, layer, step, seed, T, bits);
}
FD_INLINE void philox_keep_8x32(uint32_t row, uint32_t block, uint32_t layer, uint32_t step, uint64_t seed, uint32_t T,
                                uint32_t bits[8]) {
  philox_keep<2>(row, block, layer, step, seed, T, bits);
}
#pragma GCC diagnostic pop
#elif FD_LEVEL == FD_AVX2
// A vector is the four blocks of one row.
FD_INLINE void philox_keep_4x32(uint32_t row, uint32_t block, uint32_t layer, uint32_t step, uint64_t seed, uint32_t T,
                                uint32_t bits[4]) {
  const __m256i m0 = _mm256_set1_epi64x(PHILOX_M0), m1 = _mm256_set1_epi64x(PHILOX_M1);
  __m256i c[4][4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    c[i][0] = _mm256_add_epi64(_mm256_set_epi64x(3, 2, 1, 0), _mm256_set1_epi64x(block));
    c[i][1] = _mm256_set1_epi64x((int64_t)row + i);
    c[i][2] = _mm256_set1_epi64x(layer);
    c[i][3] = _mm256_set1_epi64x(step);
  }
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
#pragma GCC unroll 10
  for (int r = 0; r < PHILOX_ROUNDS; r++, k0 += PHILOX_W0, k1 += PHILOX_W1)
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      const __m256i p0 = _mm256_mul_epu32(c[i][0], m0), p1 = _mm256_mul_epu32(c[i][2], m1);
      c[i][0] = _mm256_xor_si256(_mm256_srli_epi64(p1, 32), _mm256_xor_si256(c[i][1], _mm256_set1_epi64x(k0)));
      c[i][2] = _mm256_xor_si256(_mm256_srli_epi64(p0, 32), _mm256_xor_si256(c[i][3], _mm256_set1_epi64x(k1)));
      c[i][1] = p1;
      c[i][3] = p0;
    }
  const __m256i last = _mm256_set1_epi16((short)(T - 1));
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const __m256i a = _mm256_blend_epi32(c[i][0], _mm256_slli_epi64(c[i][1], 32), 0xAA);
    const __m256i b = _mm256_blend_epi32(c[i][2], _mm256_slli_epi64(c[i][3], 32), 0xAA);
    const __m256i even = _mm256_unpacklo_epi64(a, b), odd = _mm256_unpackhi_epi64(a, b);  // blocks 0, 2 and 1, 3
    const __m256i keep_even = _mm256_cmpeq_epi16(_mm256_min_epu16(even, last), even);
    const __m256i keep_odd = _mm256_cmpeq_epi16(_mm256_min_epu16(odd, last), odd);
    bits[i] = (uint32_t)_mm256_movemask_epi8(_mm256_packs_epi16(keep_even, keep_odd));
  }
}
#else
FD_INLINE void philox_keep_4x32(uint32_t row, uint32_t block, uint32_t layer, uint32_t step, uint64_t seed, uint32_t T,
                                uint32_t bits[4]) {
  for (int i = 0; i < 4; i++) {
    uint32_t keep = 0;
    for (int q = 0; q < 4; q++) {
      uint32_t c[4] = {block + q, row + i, layer, step};
      philox4x32(c, (uint32_t)seed, (uint32_t)(seed >> 32));
      for (int k = 0; k < 4; k++) {
        keep |= (uint32_t)((c[k] & 0xffff) < T) << (8 * q + 2 * k);
        keep |= (uint32_t)((c[k] >> 16) < T) << (8 * q + 2 * k + 1);
      }
    }
    bits[i] = keep;
  }
}
#endif
#if FD_LEVEL != FD_AVX512
FD_INLINE void philox_keep_8x32(uint32_t row, uint32_t block, uint32_t layer, uint32_t step, uint64_t seed, uint32_t T,
                                uint32_t bits[8]) {
  philox_keep_4x32(row, block, layer, step, seed, T, bits);
  philox_keep_4x32(row + 4, block, layer, step, seed, T, bits + 4);
}
#endif

}  // namespace FD_NS
