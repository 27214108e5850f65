// n = x / rms(x) * gain + shift, and where it is wanted x in the type of n; see adaln.cuh.
#include "adaln/adaln.cuh"

extern "C" __global__ void __launch_bounds__(kThreads)
    norm_forward(const __grid_constant__ AdalnParams p) {
  __shared__ float sums[2][kRows][kWarps];
  const TokenCoord at(p);
  const Sequence<kX> x(p.x, at);
  const Sequence<kInput> n(p.n, at), rounded(p.rounded, at);
  Vec8<kX> next[kRows];  // on their way while the block adds up squares
  UNROLL for (int r = 0; r < kRows; ++r) next[r] = x.load(min(at.first + r, at.end - 1));
  const Float8 gain = make_gain(p, at), shift = add_modulation(p, at, 0);
  const float mean = 1.0f / static_cast<float>(p.dim);
  int buffer = 0;
  for (int first = at.first; first < at.end; first += kRows, buffer ^= 1) {
    Vec8<kX> vectors[kRows];
    UNROLL for (int r = 0; r < kRows; ++r) {
      vectors[r] = next[r];
      next[r] = x.load(min(first + kRows + r, at.end - 1));
    }
    float squares[kRows] = {};
    UNROLL for (int r = 0; r < kRows; ++r)
      UNROLL for (int i = 0; i < 8; ++i) {
        const float value = to_float(vectors[r].v[i]);
        squares[r] = fmaf(value, value, squares[r]);
      }
    if (!at.valid)
      UNROLL for (int r = 0; r < kRows; ++r) squares[r] = 0.0f;
    add_threads<kRows>(squares, sums[buffer]);
    UNROLL for (int r = 0; r < kRows; ++r) {
      const float scale = rsqrtf(fmaf(squares[r], mean, kEpsilon));
      Float8 value = widen(vectors[r]);
      const bool exists = at.valid && first + r < at.end;
      if (kRounds && p.rounded.data && exists) rounded.store(first + r, value);
      UNROLL for (int i = 0; i < 8; ++i)
        value.v[i] = fmaf(value.v[i] * scale, gain.v[i], shift.v[i]);
      if (exists) n.store(first + r, value);
    }
  }
}
