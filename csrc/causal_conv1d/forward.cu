// Causal depthwise convolution along an order; definition: causal_conv1d_ref.
#include "causal_conv1d/conv.cuh"

constexpr int kTile = 8;  // rows loaded together

template <bool kSilu> struct Forward {
  const ConvParams& p;
  const ConvCoord& at;
  const Column<const kInput> x;
  const Column<kInput> y;
  const Filter filter;
  Window window;

  __device__ __forceinline__ Forward(const ConvParams& p, const ConvCoord& at)
      : p(p), at(at), x(p.x, at.batch, at.channel), y(p.y, at.batch, at.channel), filter(p, at) {
    window.fill(p, at, x);
    int first = at.first;
    for (; first + kTile <= at.end; first += kTile) walk<true>(first);
    if (first < at.end) walk<false>(first);
  }
  // The steps of a tile. kWhole: none of them is beyond the chunk, which saves a branch a step.
  template <bool kWhole> __device__ __forceinline__ void walk(int first) {
    int rows[kTile];
    RawVec raw[kTile];
    UNROLL for (int t = 0; t < kTile; ++t) {
      rows[t] = row_of(p, kWhole ? first + t : min(first + t, at.end - 1));
      raw[t] = load(x.at(rows[t]));
    }
    UNROLL for (int t = 0; t < kTile; ++t) {
      if (!kWhole && first + t >= at.end) break;
      window.push(widen(raw[t]));
      FloatVec value = window.convolve(filter);
      if (kSilu)
        UNROLL for (int i = 0; i < kVector; ++i) value.v[i] = silu<kInput>(value.v[i]);
      store(y.at(rows[t]), value);
    }
  }
};

extern "C" __global__ void __launch_bounds__(kThreads)
    conv_forward(const __grid_constant__ ConvParams p) {
  const ConvCoord at(p);
  if (!at.valid) return;
  if (p.silu)
    Forward<true>(p, at);
  else
    Forward<false>(p, at);
}
