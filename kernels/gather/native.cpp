// Gathers rows of a data set into a batch, compiled once per SIMD level.
//
// Rows in random order: the hardware prefetcher sees a new stream with each of them and is of no help before its third
// line. The next rows' addresses are known, so their lines are asked for while this row is copied.
#include "gather/table.h"
#include "simd.hpp"

namespace FD_NS {

// Bytes asked for ahead of the copy: a memory latency (100 ns) at 10 to 20 GB/s, in whole rows.
constexpr int64_t AHEAD = 2048;
constexpr int64_t LINE = 64;
// Rows that are spread over panels together, so that a panel is written in runs of four lines or more: 784
// columns in 45 us, row by row 70 us, eight rows 53 us.
constexpr int64_t GROUP = 4;

// Copies `bytes` and asks for as many of `next`.
FD_INLINE void copy(char* to, const char* from, const char* next, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += LINE) __builtin_prefetch(next + b);
  const int64_t words = bytes / 4;  // elements have 4 or 8 bytes
  int64_t i = 0;
  for (; i + lanes<uint32_t> <= words; i += lanes<uint32_t>) store((uint32_t*)to + i, load((const uint32_t*)from + i));
  if (i < words) store_n((uint32_t*)to + i, load_n((const uint32_t*)from + i, (int)(words - i)), (int)(words - i));
}

static void rows(const char* source, int64_t source_row, int64_t source_piece, const int64_t* index, char* out,
                 int64_t out_row, int64_t out_piece, int64_t rows, int64_t pieces, int64_t piece, int64_t last, int64_t pad) {
  int64_t ahead = 1 + AHEAD / ((pieces - 1) * piece + last + 1);
  if (pieces == 1 && !pad) {
    for (int64_t i = 0; i < rows; i++)
      copy(out + i * out_row, source + index[i] * source_row, source + index[i + ahead < rows ? i + ahead : i] * source_row, last);
    return;
  }
  if (ahead < GROUP) ahead = GROUP;
  for (int64_t top = 0; top < rows; top += GROUP) {
    const int64_t end = top + GROUP < rows ? top + GROUP : rows;
    for (int64_t k = 0; k < pieces; k++) {
      const char* column = source + k * source_piece;
      for (int64_t i = top; i < end; i++) {
        char* to = out + i * out_row + k * out_piece;
        const char* next = column + index[i + ahead < rows ? i + ahead : i] * source_row;
        if (k + 1 < pieces) copy(to, column + index[i] * source_row, next, piece);
        else copy(to, column + index[i] * source_row, next, last);
        if (k + 1 == pieces && pad) __builtin_memset(to + last, 0, pad);
      }
    }
  }
}

}  // namespace FD_NS

extern "C" const fd_gather_table FD_SYMBOL(fd_gather) = {FD_NS::rows};
