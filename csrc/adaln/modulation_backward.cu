// Gradients of what shift, gain and factor are made of, from theirs: of the modulation itself, and of
// table and weight, which are sums over the batch. See adaln.cuh.
#include "adaln/adaln.cuh"

constexpr int kColumns = 32, kLanes = 8;  // of a block; the lanes share the batch

__device__ __forceinline__ float add_lanes(float value, float (*shared)[kColumns], int column,
                                           int lane) {
  shared[lane][column] = value;
  __syncthreads();
  float sum = 0.0f;
  UNROLL for (int k = 0; k < kLanes; ++k) sum += shared[k][column];
  __syncthreads();
  return sum;
}

extern "C" __global__ void __launch_bounds__(kColumns * kLanes)
    modulation_backward(const __grid_constant__ AdalnParams p) {
  __shared__ float shared[kLanes][kColumns];
  const int column = threadIdx.x % kColumns, lane = threadIdx.x / kColumns;
  const Int64 wanted = static_cast<Int64>(blockIdx.x) * kColumns + column, dim = p.dim;
  const Int64 channel = min(wanted, dim - 1);
  const float weight = p.weight[channel], table_scale = p.table[dim + channel];
  float of_shift = 0.0f, of_scale = 0.0f, of_gate = 0.0f, of_weight = 0.0f;
#pragma unroll 4
  for (Int64 b = lane; b < p.batch; b += kLanes) {
    const Int64 row = b * dim + channel, first = 3 * b * dim + channel;
    const float g_gain = p.g_gain[row], g_shift = p.g_shift[row];
    const float g_gate = p.g_factor[row] * (p.drop_path_scale ? p.drop_path_scale[b] : 1.0f);
    const float scale = table_scale + p.modulation[first + dim];
    p.g_modulation[first] = g_shift;
    p.g_modulation[first + dim] = g_gain * weight;
    p.g_modulation[first + 2 * dim] = g_gate;
    of_shift += g_shift;
    of_scale = fmaf(g_gain, weight, of_scale);
    of_gate += g_gate;
    of_weight = fmaf(g_gain, 1.0f + scale, of_weight);
  }
  of_shift = add_lanes(of_shift, shared, column, lane);
  of_scale = add_lanes(of_scale, shared, column, lane);
  of_gate = add_lanes(of_gate, shared, column, lane);
  of_weight = add_lanes(of_weight, shared, column, lane);
  if (lane > 0 || wanted >= dim) return;
  p.g_table[channel] = of_shift;
  p.g_table[dim + channel] = of_scale;
  p.g_table[2 * dim + channel] = of_gate;
  p.g_weight[channel] = of_weight;
}
