// Products of bfloat16 with float32 sums by AVX512-BF16: one vdpbf16ps multiplies the pairs (k, k + 1) of 16 columns and
// adds both products, twice the multiply-adds of float32. The tiles are those of native.hpp.
#include "pairs.hpp"

static void nothing() {}

const fd_dense_pairs fd_dense_avx512_bf16 = {
    FD_NS::product<float>, FD_NS::product_t<float>,    FD_NS::rows_of, FD_NS::pairs_of,
    FD_NS::pairs_of,       FD_NS::pairs_of_transpose, nothing,        nothing,         0,
};
