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
      if (i >= at.valid) break;
      p.parts_bias[first + i] = bias[i];
      UNROLL for (int w = 0; w < kWidth; ++w) p.parts_weight[(first + i) * kWidth + w] = weight[w][i];
    }
  }
};

__device__ __forceinline__ FloatVec before_activation(const FloatVec& g_y, const Window& x,
                                                   const Filter& filter, bool use_silu) {
  if (!use_silu) return g_y;
  const FloatVec value = x.convolve(filter);
  FloatVec g;
  UNROLL for (int i = 0; i < kVector; ++i)
    g.v[i] = g_y.v[i] * silu_derivative(value.v[i], sigmoid(value.v[i]));
  return g;
}

// dx of the step kWidth - 1 before the newest of g
__device__ __forceinline__ FloatVec transposed(const Window& g, const Filter& filter) {
  FloatVec sum = {};
  UNROLL for (int w = 0; w < kWidth; ++w)
    UNROLL for (int i = 0; i < kVector; ++i)
      sum.v[i] = fmaf(filter.weight[kWidth - 1 - w][i], g.row[w].v[i], sum.v[i]);
  return sum;
}

template <bool kAligned> __device__ __forceinline__ void walk(const ConvParams& p, const ConvCoord& at) {
  const Column<const kInput> x(p.x, at.batch, at.channel), g_y(p.g_y, at.batch, at.channel);
  const Column<kInput> g_x(p.g_x, at.batch, at.channel);
  const Filter filter(p, at);
  const int length = static_cast<int>(p.length), last = at.end + kWidth - 1;
  Gradients gradients;
  Window window, g_window = {};
  window.fill<kAligned>(p, at, x);
  for (int first = at.first; first < last; first += kTile) {
    RawVec x_raw[kTile], g_raw[kTile];
    UNROLL for (int t = 0; t < kTile; ++t) {
      const int row = row_of(p, min(first + t, length - 1));
      x_raw[t] = load<kAligned>(x.at(row), at.valid);
      g_raw[t] = load<kAligned>(g_y.at(row), at.valid);
    }
    UNROLL for (int t = 0; t < kTile; ++t) {
      const int step = first + t;
      if (step >= last) break;
      window.push(widen(x_raw[t]));
      FloatVec g = {};
      if (step < length)
        g = before_activation(widen(g_raw[t]), window, filter, p.silu);
      g_window.push(g);
      if (step < at.end) gradients.add(g, window);
      const int done = step - kWidth + 1;
      if (done >= at.first)
        store<kAligned>(g_x.at(row_of(p, done)), transposed(g_window, filter), at.valid);
    }
  }
  gradients.store(p, at);
}

extern "C" __global__ void __launch_bounds__(kThreads)
    conv_backward(const __grid_constant__ ConvParams p) {
  const ConvCoord at(p);
  if (at.valid == 0) return;
  if (p.channels % kVector == 0 && aligned(p.x) && aligned(p.g_y) && aligned(p.g_x))
    walk<true>(p, at);
  else
    walk<false>(p, at);
}
