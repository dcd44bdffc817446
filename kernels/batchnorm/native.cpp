// Batch normalisation on one block of columns: statistics, application and gradients, at one SIMD level.
//
//   forward    u = (x - mean) gain + shift,  gain = gamma inv_std,  y = dropout(act(u))
//   backward   dz = act'(u) dropout'(dy),  dbeta = sum dz,  dgamma = sum dz xhat,
//              dx = gain (dz - dbeta / m - xhat dgamma / m)
//
// x is read twice forward and twice backward; everything else of a block's width stays in L1. The derivation and the
// choice of statistics stand in README.md.
#include "batchnorm/sweeps.hpp"

namespace FD_NS {

constexpr int TILE = 32;  // rows that an activation of the table takes at a time: 32 x 32 floats of a panel are 4 KB

// ------------------------------------------------------------------------------------------------ forward
template <class T, int S, bool RELU, bool DROP>
static void apply_drawn(const Block& k, const Affine<T>& a) {
  for (int64_t r = 0; r < k.rows; r += TILE) {  // the bits of some rows are drawn just before their use
    const int64_t r1 = least(k.rows, r + TILE);
    if constexpr (DROP) draw_bits(k, k.bits, r, r1);
    if (k.far) apply_stream<T, RELU, DROP>(k, a, r, r1);
    else apply_rows<T, S, RELU, DROP>(k, a, r, r1);
  }
  if (k.far) stream_end();
}

template <class T, int S> static void apply(const Block& k, const Affine<T>& a) {
  if (k.relu) return k.drop ? apply_drawn<T, S, true, true>(k, a) : apply_drawn<T, S, true, false>(k, a);
  if (!k.activation) return k.drop ? apply_drawn<T, S, false, true>(k, a) : apply_drawn<T, S, false, false>(k, a);
  for (int64_t r = 0; r < k.rows; r += TILE) {  // u, the activation and the mask pass over y while it is in L1
    const int64_t r1 = least(k.rows, r + TILE);
    apply_rows<T, S, false, false>(k, a, r, r1);
    T* y = (T*)k.y + r * k.y_stride;
    k.activation->forward[sizeof(T) == 8](y, y, r1 - r, k.cols, k.y_stride, k.y_stride, k.alpha, k.slope);
    if (!k.drop) continue;
    draw_bits(k, k.bits, r, r1);
    drop_rows<T>(k, (const T*)k.y, k.y_stride, (T*)k.y, k.y_stride, r, r1);
  }
}

template <class T> static void forward(const Block* block) {
  const Block& k = *block;
  const int64_t pad = padded(k.cols), bytes = k.cols * (int64_t)sizeof(T);
  Room room = {k.room};
  Affine<T>& a = room.affine<T>();
  double *const exact = room.take<double>(pad), *const var = room.take<double>(pad);
  T* const inv_std = room.take<T>(pad);
  const double eps = k.eps;
  statistics<T>(k, room, exact, var);
  each_column(pad, [&](int64_t c) {
    a.mean[c] = (T)exact[c];
    inv_std[c] = (T)(1 / __builtin_sqrt(var[c] + eps));
  });
  __builtin_memcpy(k.mean, a.mean, bytes);
  __builtin_memcpy(k.inv_std, inv_std, bytes);
  if (k.rows > 1) {  // one row says nothing about the spread
    const double unbiased = (double)k.rows / (double)(k.rows - 1), decay = k.decay;
    T *const mean = room.take<T>(pad), *const spread = room.take<T>(pad);
    copy_padded(k.running_mean, mean, k.cols);
    copy_padded(k.running_var, spread, k.cols);
    each_column(pad, [&](int64_t c) {
      mean[c] = (T)(decay * mean[c] + (1 - decay) * exact[c]);
      spread[c] = (T)(decay * spread[c] + (1 - decay) * unbiased * var[c]);
    });
    __builtin_memcpy(k.running_mean, mean, bytes);
    __builtin_memcpy(k.running_var, spread, bytes);
  }
  make_affine<T>(k, room, inv_std, exact, a);
  if (k.panels) apply<T, STRIP>(k, a);
  else apply<T, 0>(k, a);
}

template <class T> static void inference(const Block* block) {
  const Block& k = *block;
  const int64_t pad = padded(k.cols);
  const double eps = k.eps;
  Room room = {k.room};
  Affine<T>& a = room.affine<T>();
  T* const inv_std = room.take<T>(pad);
  copy_padded(k.running_mean, a.mean, k.cols);
  copy_padded(k.running_var, inv_std, k.cols);
  each_column(pad, [&](int64_t c) { inv_std[c] = (T)(1 / __builtin_sqrt(inv_std[c] + eps)); });
  make_affine<T>(k, room, inv_std, nullptr, a);
  if (k.panels) apply<T, STRIP>(k, a);
  else apply<T, 0>(k, a);
}

// The weights and the bias of a dense layer with the normalisation behind it in them; gains are rounded once.
template <class T> static void fold(const Block* block) {
  const Block& k = *block;
  const T *gamma = (const T*)k.gamma, *beta = (const T*)k.beta, *bias = (const T*)k.bias;
  T* const gain = (T*)k.room;
  for (int64_t c = 0; c < k.cols; c++) {
    const double g = gamma[c] / __builtin_sqrt(((const T*)k.running_var)[c] + k.eps);
    const double shift = (bias ? bias[c] : 0) - (double)((const T*)k.running_mean)[c];
    gain[c] = (T)g;
    ((T*)k.folded)[c] = (T)(shift * g + beta[c]);
  }
  for (int64_t row = 0; row < k.rows; row++) {
    const T* w = (const T*)k.x + row * k.x_stride;
    T* to = (T*)k.y + row * k.y_stride;
    each_vector<T, 0>(k.cols, 0, [&](int64_t c, int n) __attribute__((always_inline)) {
      store_n(to + c, load_n(w + c, n) * load_n(gain + c, n), n);
    });
  }
}

// ------------------------------------------------------------------------------------------------ backward
// dz = act'(u) dropout'(dy) into dx for an activation of the table: u again (and act(u) where the derivative is made from
// it), tile by tile.
template <class T>
static void backward_tiles(const Block& k, Room room, const Affine<T>& a, int64_t r0, int64_t r1, T* p1, T* p2) {
  T* const saved = room.take<T>(TILE * padded(k.cols));
  Block u = k;
  u.y = saved;
  u.y_stride = padded(k.cols);
  u.drop = 0;
  const int wide = sizeof(T) == 8;
  for (int64_t r = r0; r < r1; r += TILE) {
    const int64_t n = least(TILE, r1 - r);
    u.x = (const T*)k.x + r * k.x_stride;
    apply_rows<T, 0, false, false>(u, a, 0, n);
    if (k.activation->saves_output)
      k.activation->forward[wide](saved, saved, n, k.cols, u.y_stride, u.y_stride, k.alpha, k.slope);
    T* dx = (T*)k.dx + r * k.dx_stride;
    const T* dy = (const T*)k.dy + r * k.dy_stride;
    if (k.drop) drop_rows<T>(k, (const T*)k.dy, k.dy_stride, (T*)k.dx, k.dx_stride, r, r + n);
    k.activation->backward[wide](k.drop ? dx : dy, saved, dx, n, k.cols, k.drop ? k.dx_stride : k.dy_stride, u.y_stride,
                                 k.dx_stride, k.alpha, k.slope, k.dslope);
    sum_rows<T, 0, OPEN>(k, a, (const T*)k.dx, k.dx_stride, r, r + n, p1, p2);
  }
}

template <class T, int S>
static void sums(const Block& k, Room room, const Affine<T>& a, double* s1, double* s2) {
  const int64_t pad = padded(k.cols), stride = k.dy_stride;
  const T* const dy = (const T*)k.dy;
  const bool by_output = k.relu && k.y;
  T *const p1 = room.take<T>(pad), *const p2 = room.take<T>(pad);
  each_column(pad, [&](int64_t c) { s1[c] = s2[c] = 0; });
  for (int64_t r = 0; r < k.rows; r += SPAN) {
    const int64_t r1 = least(k.rows, r + SPAN);
    each_column(pad, [&](int64_t c) { p1[c] = p2[c] = 0; });
    if (k.drop && !by_output) draw_bits(k, k.bits, r, r1);
    if (by_output) sum_rows<T, S, OUTPUT>(k, a, dy, stride, r, r1, p1, p2);
    else if (k.relu) sum_rows<T, S, SIGN>(k, a, dy, stride, r, r1, p1, p2);
    else if (k.activation) backward_tiles<T>(k, room, a, r, r1, p1, p2);
    else if (k.drop) sum_rows<T, S, BITS>(k, a, dy, stride, r, r1, p1, p2);
    else sum_rows<T, S, OPEN>(k, a, dy, stride, r, r1, p1, p2);
    each_column(pad, [&](int64_t c) { s1[c] += p1[c], s2[c] += p2[c]; });
  }
}

template <class T, int S>
static void finish(const Block& k, const Affine<T>& a, const T* along, const T* across) {
  const bool gated = k.relu || (k.drop && !k.activation), tiled = k.activation && !k.relu;
  const T* const dz = (const T*)(tiled ? k.dx : k.dy);
  const int64_t stride = tiled ? k.dx_stride : k.dy_stride;
  if (k.far && !S) {
    if (gated) finish_stream<T, true>(k, a, dz, stride, along, across);
    else finish_stream<T, false>(k, a, dz, stride, along, across);
  } else {
    constexpr int ALIKE = S ? S : -1;
    const bool alike = k.x_stride == stride && k.dx_stride == stride;
    if (gated && alike) finish_rows<T, ALIKE, true>(k, a, dz, stride, along, across);
    else if (gated) finish_rows<T, S, true>(k, a, dz, stride, along, across);
    else if (alike) finish_rows<T, ALIKE, false>(k, a, dz, stride, along, across);
    else finish_rows<T, S, false>(k, a, dz, stride, along, across);
  }
}

template <class T> static void backward(const Block* block) {
  const Block& k = *block;
  const int64_t pad = padded(k.cols), bytes = k.cols * (int64_t)sizeof(T);
  const bool panel = k.panels;
  Room room = {k.room};
  Affine<T>& a = room.affine<T>();
  T* const inv_std = room.take<T>(pad);
  double *const s1 = room.take<double>(pad), *const s2 = room.take<double>(pad);
  copy_padded(k.mean, a.mean, k.cols);
  copy_padded(k.inv_std, inv_std, k.cols);
  int loose = 0;
  if (k.training)
    for (int64_t c = 0; c < pad; c++) loose |= is_loose(a.mean[c], inv_std[c]);
  if (loose) statistics<T>(k, room, s1, s2);  // the float64 mean again, bit for bit
  make_affine<T>(k, room, inv_std, loose ? s1 : nullptr, a);
  if (k.dslope) __builtin_memset(k.dslope, 0, bytes);
  if (panel) sums<T, STRIP>(k, room, a, s1, s2);
  else sums<T, 0>(k, room, a, s1, s2);

  T *const along = room.take<T>(pad), *const across = room.take<T>(pad);
  T *const dgamma = room.take<T>(pad), *const dbeta = room.take<T>(pad);
  const double share = k.training ? 1.0 / (double)k.rows : 0;
  each_column(pad, [&](int64_t c) {
    const double total = (s2[c] - a.rest[c] * s1[c]) * inv_std[c];  // xhat = (x - mean - rest) inv_std
    const double e = total * inv_std[c] * share;
    dbeta[c] = (T)s1[c];
    dgamma[c] = (T)total;
    along[c] = (T)e;
    across[c] = (T)(s1[c] * share - e * a.rest[c]);
  });
  if (!k.training) each_column(pad, [&](int64_t c) { along[c] = across[c] = 0; });  // an infinite sum times 0 is no number
  __builtin_memcpy(k.dbeta, dbeta, bytes);
  __builtin_memcpy(k.dgamma, dgamma, bytes);
  if (panel) finish<T, STRIP>(k, a, along, across);
  else finish<T, 0>(k, a, along, across);
}

}  // namespace FD_NS

extern "C" const fd_batchnorm_table FD_SYMBOL(fd_batchnorm) = {
    {FD_NS::forward<float>, FD_NS::forward<double>},
    {FD_NS::inference<float>, FD_NS::inference<double>},
    {FD_NS::backward<float>, FD_NS::backward<double>},
    {FD_NS::fold<float>, FD_NS::fold<double>},
};
