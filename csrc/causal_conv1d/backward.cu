// Gradients of the causal convolution. With g_l the gradient before the activation,
//   dx_m = sum_w weight[w] g_{m + W - 1 - w},  dweight[w] = sum_l g_l x_{l - W + 1 + w},  dbias = sum_l g_l.
// A thread recomputes g along its chunk and kWidth - 1 steps beyond it, and writes dx kWidth - 1 steps
// behind. Sums over a chunk are written as parts, which sum_parts.cu adds in a fixed order.
#include "causal_conv1d/conv.cuh"

constexpr int kTile = 4;  // rows loaded together

struct Gradients {
  float weight[kWidth][kVector] = {};
  float bias[kVector] = {};

  __device__ __forceinline__ void add(const FloatVec& g, const Window& x) {
    UNROLL for (int i = 0; i < kVector; ++i) {
      bias[i] += g.v[i];
      UNROLL for (int w = 0; w < kWidth; ++w) weight[w][i] = fmaf(g.v[i], x.row[w].v[i], weight[w][i]);
    }
  }
  __device__ __forceinline__ void store(const ConvParams& p, const ConvCoord& at) const {
    const Int64 first = (at.batch * p.chunks + at.chunk) * p.channels + at.channel;
    UNROLL for (int i = 0; i < kVector; ++i) {
      p.parts_bias[first + i] = bias[i];
      UNROLL for (int w = 0; w < kWidth; ++w) p.parts_weight[(first + i) * kWidth + w] = weight[w][i];
    }
  }
};

// dx of the step kWidth - 1 before the newest of g
__device__ __forceinline__ FloatVec transposed(const Window& g, const Filter& filter) {
  FloatVec sum = {};
  UNROLL for (int w = 0; w < kWidth; ++w)
    UNROLL for (int i = 0; i < kVector; ++i)
      sum.v[i] = fmaf(filter.weight[kWidth - 1 - w][i], g.row[w].v[i], sum.v[i]);
  return sum;
}

template <bool kSilu> struct Backward {
  const ConvParams& p;
  const ConvCoord& at;
  const Column<const kInput> x, g_y;
  const Column<kInput> g_x;
  const Filter filter;
  Gradients gradients;
  Window window, g_window = {};
  int rows[kTile + kWidth - 1];  // of the steps before a tile and of the tile

  __device__ __forceinline__ Backward(const ConvParams& p, const ConvCoord& at)
      : p(p), at(at), x(p.x, at.batch, at.channel), g_y(p.g_y, at.batch, at.channel),
        g_x(p.g_x, at.batch, at.channel), filter(p, at) {
    window.fill(p, at, x);
    int first = at.first;
    for (; first + kTile <= at.end; first += kTile) walk<true>(first);
    for (; first < at.end + kWidth - 1; first += kTile) walk<false>(first);
    gradients.store(p, at);
  }
  // The steps of a tile. kWhole: none of them is beyond the chunk, which saves branches a step.
  template <bool kWhole> __device__ __forceinline__ void walk(int first) {
    const int length = static_cast<int>(p.length);
    RawVec x_raw[kTile], g_raw[kTile];
    UNROLL for (int t = 0; t < kTile; ++t) {
      const int row = row_of(p, kWhole ? first + t : min(first + t, length - 1));
      x_raw[t] = load(x.at(row));
      g_raw[t] = load(g_y.at(row));
      rows[kWidth - 1 + t] = row;
    }
    UNROLL for (int t = 0; t < kTile; ++t) {
      const int step = first + t;
      if (!kWhole && step >= at.end + kWidth - 1) break;
      window.push(widen(x_raw[t]));
      FloatVec g = {};
      if (kWhole || step < length) g = before_activation(widen(g_raw[t]));
      g_window.push(g);
      if (kWhole || step < at.end) gradients.add(g, window);
      if (t >= kWidth - 1 || step - kWidth + 1 >= at.first)
        store(g_x.at(rows[t]), transposed(g_window, filter));
    }
    UNROLL for (int w = 0; w < kWidth - 1; ++w) rows[w] = rows[kTile + w];
  }
  __device__ __forceinline__ FloatVec before_activation(const FloatVec& g_y) const {
    if (!kSilu) return g_y;
    const FloatVec value = window.convolve(filter);
    FloatVec g;
    UNROLL for (int i = 0; i < kVector; ++i)
      g.v[i] = g_y.v[i] * silu_derivative(value.v[i], sigmoid(value.v[i]));
    return g;
  }
};

extern "C" __global__ void __launch_bounds__(kThreads)
    conv_backward(const __grid_constant__ ConvParams p) {
  const ConvCoord at(p);
  if (!at.valid) return;
  if (p.silu)
    Backward<true>(p, at);
  else
    Backward<false>(p, at);
}
