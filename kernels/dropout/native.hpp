// Dropout on rows of contiguous columns: 4 rows x 32 columns at a time, the mask drawn in registers and never stored.
//
//   y = keep ? x * scale : +0        (also the backward step, on dy)
//
// A keep bit costs some 0.1 ns (AVX-512), so backward draws the mask again instead of reading it.
#pragma once
#include "abi.h"
#include "philox.hpp"
#include "table.h"

namespace FD_NS {

// Rows of a wide matrix in which 32 columns are finished before the next 32. The columns' share of the first three
// Philox rounds is drawn once for them, so more rows are better in cache (0.19 ns an element with 4, 0.165 with 8,
// 0.145 with 128), but 16 rows of 8 KiB fall on one set of L1 (4096 x 2048: 0.43 ns an element with 8, 0.85 with 16).
constexpr int64_t DROPOUT_TILE = 8;

// A vector of x * scale where bit (lane) is set, +0 elsewhere, whatever x is.
template <class T> FD_INLINE vec<T> keep(vec<T> x, vec<T> scale, uint32_t bits) {
#if FD_LEVEL == FD_AVX512
  if constexpr (sizeof(T) == 4) return (vec<T>)_mm512_maskz_mul_ps((__mmask16)bits, (__m512)x, (__m512)scale);
  else return (vec<T>)_mm512_maskz_mul_pd((__mmask8)bits, (__m512d)x, (__m512d)scale);
#else
  typedef typename int_of<T>::type I;
  ivec<T> lane;
  for (int i = 0; i < lanes<T>; i++) lane[i] = (I)1 << i;
  const ivec<T> on = (splat<I>((I)bits) & lane) == lane;
  return (vec<T>)((ivec<T>)(x * scale) & on);
#endif
}

template <class T> FD_INLINE void keep_row(const T* x, T* y, vec<T> scale, uint32_t bits) {
#pragma GCC unroll 16
  for (int c = 0; c < 32; c += lanes<T>) store(y + c, keep<T>(load(x + c), scale, bits >> c));
}

template <class T> FD_INLINE void keep_part(const T* x, T* y, vec<T> scale, uint32_t bits, int cols) {
  for (int c = 0; c < cols; c += lanes<T>) store_n(y + c, keep<T>(load_n(x + c, cols - c), scale, bits >> c), cols - c);
}

template <class T>
static void dropout_apply(const void* x_, void* y_, int64_t rows, int64_t cols, int64_t x_stride, int64_t y_stride,
                          int64_t first_row, int64_t first_col, uint32_t layer, uint32_t step, uint64_t seed,
                          uint32_t kept, double factor) {
  const T* x = (const T*)x_;
  T* y = (T*)y_;
  const vec<T> scale = splat((T)factor);
  const int64_t tile = cols <= FD_PANEL ? rows : DROPOUT_TILE;
  uint32_t bits[4];
  for (int64_t top = 0; top < rows; top += tile) {
    const int64_t end = top + tile < rows ? top + tile : rows;
    for (int64_t c = 0; c < cols; c += FD_PANEL) {
      const uint32_t block = (uint32_t)((first_col + c) / 8);
      const int width = cols - c < FD_PANEL ? (int)(cols - c) : FD_PANEL;
      int64_t r = top;
      if (width == FD_PANEL)
        for (; r + 4 <= end; r += 4) {
          philox_keep_4x32((uint32_t)(first_row + r), block, layer, step, seed, kept, bits);
#pragma GCC unroll 4
          for (int i = 0; i < 4; i++) keep_row(x + (r + i) * x_stride + c, y + (r + i) * y_stride + c, scale, bits[i]);
        }
      for (; r < end; r += 4) {
        philox_keep_4x32((uint32_t)(first_row + r), block, layer, step, seed, kept, bits);
        for (int i = 0; i < 4 && r + i < end; i++)
          keep_part(x + (r + i) * x_stride + c, y + (r + i) * y_stride + c, scale, bits[i], width);
      }
    }
  }
}

// Eight bits as eight bytes of 0 or 1: byte k of the product keeps bit k alone, and any bit carries into bit 7.
FD_INLINE void spread(uint32_t bits, uint8_t* bytes, int64_t count) {
  uint64_t each = (bits & 0xff) * 0x0101010101010101u & 0x8040201008040201u;
  each = ((each + 0x7f7f7f7f7f7f7f7fu) >> 7) & 0x0101010101010101u;
  if (count >= 8) __builtin_memcpy(bytes, &each, 8);
  else
    for (int64_t k = 0; k < count; k++) bytes[k] = (uint8_t)(each >> 8 * k);
}

static void dropout_mask(uint8_t* mask, int64_t rows, int64_t cols, int64_t stride, int64_t first_row,
                         int64_t first_col, uint32_t layer, uint32_t step, uint64_t seed, uint32_t T) {
  uint32_t bits[4];
  for (int64_t r = 0; r < rows; r += 4)
    for (int64_t c = 0; c < cols; c += FD_PANEL) {
      philox_keep_4x32((uint32_t)(first_row + r), (uint32_t)((first_col + c) / 8), layer, step, seed, T, bits);
      for (int i = 0; i < 4 && r + i < rows; i++)
        for (int64_t k = 0; k < FD_PANEL && c + k < cols; k += 8)
          spread(bits[i] >> k, mask + (r + i) * stride + c + k, cols - c - k);
    }
}

}  // namespace FD_NS

extern "C" const fd_dropout_table FD_SYMBOL(fd_dropout) = {
    {FD_NS::dropout_apply<float>, FD_NS::dropout_apply<double>},
    FD_NS::dropout_mask,
};
