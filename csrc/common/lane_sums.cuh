// Sums over the 32 lanes of a warp of many values at once: value i of the B kind and of the C kind,
// i < kValues <= 16, each lane holding its own summands. The result is spread over the lanes.
#pragma once
#include "common/types.cuh"

// By halving exchange: a stage sends half of the values to the lane across and keeps the other half:
// 31 shuffles for 32 values, in float32 throughout. The stages are templates because a runtime loop
// puts the array into local memory (8.0 instead of 3.8 ms for the whole backward).
template <int kStage> __device__ __forceinline__ void exchange(float* v, int lane) {
  const bool upper = lane & kStage;
#pragma unroll
  for (int i = 0; i < kStage; ++i) {
    const float kept = upper ? v[i + kStage] : v[i];
    const float sent = upper ? v[i] : v[i + kStage];
    v[i] = kept + __shfl_xor_sync(0xffffffffu, sent, kStage);
  }
  if constexpr (kStage > 1) exchange<kStage / 2>(v, lane);
}

__host__ __device__ constexpr int power_of_two_from(int n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

template <int kValues> struct LaneSums {
  static constexpr int kPadded = power_of_two_from(2 * kValues);
  float v[kPadded] = {};

  __device__ __forceinline__ void add(int i, float b, float c) {
    v[i] = b;
    v[kValues + i] = c;
  }
  // to: 2 * kValues floats, those of B, then those of C
  __device__ __forceinline__ void store(float* to, int lane) {
    exchange<kPadded / 2>(v, lane);
#pragma unroll
    for (int stage = kPadded; stage < 32; stage *= 2)
      v[0] += __shfl_xor_sync(0xffffffffu, v[0], stage);
    if (lane < 2 * kValues) to[lane] = v[0];
  }
};
