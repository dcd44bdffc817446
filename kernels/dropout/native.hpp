// Dropout on rows of contiguous columns: 8 rows x 32 columns at a time, the mask drawn in registers.
//
//   y = keep ? x * scale : +0        (also the backward step, on dy)
//
// A keep bit costs some 0.1 ns (AVX-512), so backward draws the mask again instead of reading it.
#pragma once
#include "abi.h"
#include "philox.hpp"
#include "table.h"

namespace FD_NS {

constexpr int DRAW = 8;  // rows whose bits are drawn together
// Bytes of an output from which its stores go past the caches, as those of the activations do; columns whose bits wait on
// the stack then.
constexpr int64_t FAR_BYTES = 16 << 20, FAR_COLS = 2048;

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

// Where a stretch of the output lies in the random stream.
struct Stream {
  int64_t first_row, first_col;
  uint32_t layer, step, kept;
  uint64_t seed;
  FD_INLINE void draw(int64_t row, int64_t col, uint32_t bits[DRAW]) const {
    philox_keep_8x32((uint32_t)(first_row + row), (uint32_t)((first_col + col) / 8), layer, step, seed, kept, bits);
  }
};

// DRAW rows of up to FAR_COLS columns past the caches: while their bits are drawn (0.1 ns an element), the rows come from
// memory, one after the other; then they leave in whole lines. 3.2 ms without, see README.md.
template <class T>
static void apply_far(const T* x, T* y, int64_t xs, int64_t ys, int rows, int64_t row, int64_t col, int64_t cols,
                      vec<T> scale, const Stream& stream_of) {
  uint32_t bits[FAR_COLS / FD_PANEL + 1][DRAW];
  const Stream at = stream_of;
  const T* coming = x;
  for (int64_t c = 0, place = 0; c < cols; c += FD_PANEL) {
    for (int i = 0; i < rows * FD_PANEL; i += lanes<T>) {
      __builtin_prefetch(coming + place);
      place += lanes<T>;
      if (place >= cols) coming += xs, place = 0;
    }
    at.draw(row, col + c, bits[c / FD_PANEL]);
  }
  for (int i = 0; i < rows; i++) {
    const T* from = x + i * xs;
    T* to = y + i * ys;
    each_aligned(to, cols, [&](int64_t c, int n) __attribute__((always_inline)) {
      const uint64_t both = (uint64_t)bits[c / FD_PANEL + 1][i] << 32 | bits[c / FD_PANEL][i];
      put(to + c, keep<T>(load_n(from + c, n), scale, (uint32_t)(both >> c % 32)), n);
    });
  }
}

template <class T>
static void dropout_apply(const void* x_, void* y_, int64_t rows, int64_t cols, int64_t x_stride, int64_t y_stride,
                          int64_t first_row, int64_t first_col, uint32_t layer, uint32_t step, uint64_t seed,
                          uint32_t kept, double factor) {
  const T* x = (const T*)x_;
  T* y = (T*)y_;
  const vec<T> scale = splat((T)factor);
  const Stream at{first_row, first_col, layer, step, kept, seed};
  const bool far = cols > FD_PANEL && rows * cols * (int64_t)sizeof(T) >= FAR_BYTES;
  for (int64_t r = 0; r < rows; r += DRAW, x += DRAW * x_stride, y += DRAW * y_stride) {
    const int count = rows - r < DRAW ? (int)(rows - r) : DRAW;
    for (int64_t c = 0; far && c < cols; c += FAR_COLS)
      apply_far(x + c, y + c, x_stride, y_stride, count, r, c, cols - c < FAR_COLS ? cols - c : FAR_COLS, scale, at);
    for (int64_t c = 0; !far && c < cols; c += FD_PANEL) {
      const int width = cols - c < FD_PANEL ? (int)(cols - c) : FD_PANEL;
      uint32_t bits[DRAW];
      at.draw(r, c, bits);
      if (width == FD_PANEL && count == DRAW) {
#pragma GCC unroll 8
        for (int i = 0; i < DRAW; i++) keep_row(x + i * x_stride + c, y + i * y_stride + c, scale, bits[i]);
      } else {
        for (int i = 0; i < count; i++) keep_part(x + i * x_stride + c, y + i * y_stride + c, scale, bits[i], width);
      }
    }
  }
  if (far) stream_end();
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
