// Causal depthwise convolution along an order; definition: causal_conv1d_ref.
#include "causal_conv1d/conv.cuh"

constexpr int kTile = 4;  // rows loaded together

template <bool kAligned> __device__ __forceinline__ void walk(const ConvParams& p, const ConvCoord& at) {
  const Column<const kInput> x(p.x, at.batch, at.channel);
  const Column<kInput> y(p.y, at.batch, at.channel);
  const Filter filter(p, at);
  Window window;
  window.fill<kAligned>(p, at, x);
  for (int first = at.first; first < at.end; first += kTile) {
    int rows[kTile];
    RawVec raw[kTile];
    UNROLL for (int t = 0; t < kTile; ++t) {
      rows[t] = row_of(p, min(first + t, at.end - 1));
      raw[t] = load<kAligned>(x.at(rows[t]), at.valid);
    }
    UNROLL for (int t = 0; t < kTile; ++t) {
      if (first + t >= at.end) break;
      window.push(widen(raw[t]));
      FloatVec value = window.convolve(filter);
      if (p.silu)
        UNROLL for (int i = 0; i < kVector; ++i) value.v[i] = silu(value.v[i]);
      store<kAligned>(y.at(rows[t]), value, at.valid);
    }
  }
}

extern "C" __global__ void __launch_bounds__(kThreads)
    conv_forward(const __grid_constant__ ConvParams p) {
  const ConvCoord at(p);
  if (at.valid == 0) return;
  if (p.channels % kVector == 0 && aligned(p.x) && aligned(p.y))
    walk<true>(p, at);
  else
    walk<false>(p, at);
}
