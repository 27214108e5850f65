// Sums over lanes of many values at once, by halving exchange: at each stage a lane sends half of its
// values to the lane across and has the sums of the other half.
#pragma once
#include "common/types.cuh"

// One stage: of two sets of values the lower lane takes the first, the upper the second, in `first`.
template <int kValues, int kStage>
__device__ __forceinline__ void fold(float* first, const float* second, int lane) {
  const bool upper = lane & kStage;
  UNROLL for (int i = 0; i < kValues; ++i) {
    const float mine = upper ? second[i] : first[i];
    const float sent = upper ? first[i] : second[i];
    first[i] = mine + __shfl_xor_sync(0xffffffffu, sent, kStage);
  }
}

// Adds v[0 .. kValues) over the lanes that differ in the bits kStage, kStage / 2, .. kLast. A lane
// has then those values whose index begins with the lane's bits, in v[0 ..). In float32 throughout.
// Stages are templates because a runtime loop puts the array into local memory (8.0 instead of 3.8
// ms for the whole backward).
template <int kValues, int kStage, int kLast>
__device__ __forceinline__ void exchange(float* v, int lane) {
  fold<kValues / 2, kStage>(v, v + kValues / 2, lane);
  if constexpr (kStage > kLast) exchange<kValues / 2, kStage / 2, kLast>(v, lane);
}

// Adds each of v[0 .. kValues) over the lanes that differ in the bits kStage, 2 kStage, .. < kEnd.
template <int kValues, int kStage, int kEnd> __device__ __forceinline__ void add_lanes(float* v) {
  if constexpr (kStage < kEnd) {
    UNROLL for (int i = 0; i < kValues; ++i) v[i] += __shfl_xor_sync(0xffffffffu, v[i], kStage);
    add_lanes<kValues, 2 * kStage, kEnd>(v);
  }
}
