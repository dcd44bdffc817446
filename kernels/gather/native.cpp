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
// Rows that are spread over panels together, so that a panel is written in runs of 1 KiB.
constexpr int64_t GROUP = 16;

FD_INLINE void copy(char* to, const char* from, int64_t bytes) {
  const int64_t words = bytes / 4;  // elements have 4 or 8 bytes
  int64_t i = 0;
  for (; i + lanes<uint32_t> <= words; i += lanes<uint32_t>) store((uint32_t*)to + i, load((const uint32_t*)from + i));
  if (i < words) store_n((uint32_t*)to + i, load_n((const uint32_t*)from + i, (int)(words - i)), (int)(words - i));
}

static void rows(const char* source, int64_t source_row, int64_t source_piece, const int64_t* index, char* out,
                 int64_t out_row, int64_t out_piece, int64_t rows, int64_t pieces, int64_t piece, int64_t last, int64_t pad) {
  const int64_t group = pieces > 1 ? GROUP : 1;
  int64_t ahead = 1 + AHEAD / ((pieces - 1) * piece + last + 1);
  if (ahead < group) ahead = group;
  for (int64_t top = 0; top < rows; top += group) {
    const int64_t end = top + group < rows ? top + group : rows;
    for (int64_t k = 0; k < pieces; k++) {
      const int64_t bytes = k + 1 < pieces ? piece : last;
      for (int64_t i = top; i < end; i++) {
        const char* next = source + index[i + ahead < rows ? i + ahead : i] * source_row + k * source_piece;
        char* to = out + i * out_row + k * out_piece;
        for (int64_t b = 0; b < bytes; b += LINE) __builtin_prefetch(next + b);
        copy(to, source + index[i] * source_row + k * source_piece, bytes);
        if (pad && k + 1 == pieces) __builtin_memset(to + last, 0, pad);
      }
    }
  }
}

}  // namespace FD_NS

extern "C" const fd_gather_table FD_SYMBOL(fd_gather) = {FD_NS::rows};
