// Philox over arrays of counters, and the permutation of an epoch (README.md): a cycle-walking alternating Feistel
// network.
//
// A position is split into a left (high) and a right (low) half; in turn one half is XORed with a hash of the other,
// which is undone by doing it again, so that a pass is a bijection of the power of two that holds n. Values of n or
// more are passed again until they fall below n: less than two passes a value on average (from n = 33 on).
#pragma once
#include "philox.hpp"
#include "random/table.h"

namespace FD_NS {

constexpr uint32_t PERMUTATION_LAYER = 1u << 31;
// Values in flight: enough to fill vectors while the cycle walk thins them out, few enough for L1.
constexpr int WALK = 128;

typedef vec<uint64_t> words;

// Product of the low halves of the lanes. (Zero-masking with all lanes on is the plain instruction; GCC 12 warns of an
// uninitialised operand inside its own header's plain form.)
FD_INLINE words product(words a, words b) {
#if FD_LEVEL == FD_AVX512
  return (words)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b);
#elif FD_LEVEL == FD_AVX2
  return (words)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (words)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// Hash of a word under two key words; its low 32 bits count.
FD_INLINE words mixed(words x, uint32_t k0, uint32_t k1) {
  words p = product(x ^ splat<uint64_t>(k0), splat<uint64_t>(PHILOX_M0));
  p = product((p >> 32) ^ p ^ splat<uint64_t>(k1), splat<uint64_t>(PHILOX_M1));
  return (p >> 32) ^ p;
}

struct Feistel {
  int low, high;                      // bits of the halves
  uint32_t key[FD_FEISTEL_ROUNDS][2];

  Feistel(int64_t n, uint64_t seed, uint32_t epoch) {
    int bits = n > 1 ? 64 - __builtin_clzll((uint64_t)n - 1) : 0;
    if (bits < FD_FEISTEL_LEAST_BITS) bits = FD_FEISTEL_LEAST_BITS;
    low = bits / 2;
    high = bits - low;
    for (int r = 0; r < FD_FEISTEL_ROUNDS; r += 2) {
      uint32_t c[4] = {(uint32_t)r / 2, 0, PERMUTATION_LAYER, epoch};
      philox4x32(c, (uint32_t)seed, (uint32_t)(seed >> 32));
      key[r][0] = c[0], key[r][1] = c[1], key[r + 1][0] = c[2], key[r + 1][1] = c[3];
    }
  }

  FD_INLINE words pass(words x) const {
    const words low_mask = splat<uint64_t>((1ull << low) - 1), high_mask = splat<uint64_t>((1ull << high) - 1);
    words right = x & low_mask, left = x >> low;
    for (int r = 0; r < FD_FEISTEL_ROUNDS; r += 2) {
      left ^= mixed(right, key[r][0], key[r][1]) & high_mask;
      right ^= mixed(left, key[r + 1][0], key[r + 1][1]) & low_mask;
    }
    return left << low | right;
  }
};

static void permute(int64_t* index, int64_t first, int64_t count, int64_t n, uint64_t seed, uint32_t epoch) {
  const Feistel network(n, seed, epoch);
  uint64_t x[WALK];
  uint32_t at[WALK];
  int64_t position = first % n;
  for (int64_t base = 0; base < count; base += WALK) {
    int walking = count - base < WALK ? (int)(count - base) : WALK;
    for (int i = 0; i < WALK; i++) {
      x[i] = (uint64_t)position;
      at[i] = (uint32_t)i;
      if (i < walking && ++position == n) position = 0;
    }
    while (walking) {
      for (int i = 0; i < walking; i += lanes<uint64_t>) store(x + i, network.pass(load(x + i)));
      int left = 0;
      for (int i = 0; i < walking; i++) {  // keeps those that must walk on, without a branch to predict
        const uint64_t value = x[i];
        const uint32_t place = at[i];
        index[base + place] = (int64_t)value;
        x[left] = value;
        at[left] = place;
        left += value >= (uint64_t)n;
      }
      walking = left;
    }
  }
}

static void philox_rows(const uint32_t* counter, int64_t counter_stride, const uint32_t* key, uint32_t* out,
                        int64_t out_stride, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    uint32_t c[4];
    __builtin_memcpy(c, counter + i * counter_stride, sizeof c);
    philox4x32(c, key[0], key[1]);
    __builtin_memcpy(out + i * out_stride, c, sizeof c);
  }
}

}  // namespace FD_NS

extern "C" const fd_random_table FD_SYMBOL(fd_random) = {FD_NS::philox_rows, FD_NS::permute};
