// Sums over the 32 lanes of a warp of many values at once: value i of the B kind and of the C kind,
// i < kValues <= 16, each lane holding its own summands. The result is spread over the lanes.
#pragma once
#include "common/types.cuh"

// By halving exchange: a stage sends half of the values to the lane across and keeps the other half:
// 31 shuffles for 32 values, in float32 throughout. The stages are templates because a runtime loop
// puts the array into local memory (8.0 instead of 3.8 ms for the whole backward).
// kStride: lanes between neighbours, counted by `lane`.
template <int kStage, int kStride = 1>
__device__ __forceinline__ void exchange(float* v, int lane) {
  const bool upper = lane & kStage;
#pragma unroll
  for (int i = 0; i < kStage; ++i) {
    const float kept = upper ? v[i + kStage] : v[i];
    const float sent = upper ? v[i] : v[i + kStage];
    v[i] = kept + __shfl_xor_sync(0xffffffffu, sent, kStage * kStride);
  }
  if constexpr (kStage > 1) exchange<kStage / 2, kStride>(v, lane);
}

__host__ __device__ constexpr int power_of_two_from(int n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

template <int kValues> struct ShuffleSums {
  static constexpr float kTruncation = 1.0f;
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

#if __CUDA_ARCH__ >= 800
// By the tensor cores: a product of the values, four to a thread, with a matrix of zeros and ones
// adds those of four lanes and puts each sum into a column of its own: 8 products and 7 shuffles
// instead of 31 shuffles, additions and 62 selections. Operands are cut to tf32's 11 significant
// bits, sums are float32: for bfloat16, whose gradients are rounded four times as coarsely. A cut
// makes values smaller by 2^-11.5 on average (of mantissas spread evenly on a log scale), which the
// caller's factor kTruncation undoes.
template <int kValues> struct TensorSums {
  static constexpr float kTruncation = 1.00034f;
  static constexpr int kSets = (kValues + 7) / 8;  // of 8 values of either kind
  float c[kSets][4] = {};
  float held[2] = {};

  // Takes values in the order of i; every second call makes a product.
  __device__ __forceinline__ void add(int i, float b, float c_value) {
    if (i % 2 == 0) {
      held[0] = b, held[1] = c_value;
      return;
    }
    const int group = threadIdx.x % 32 / 4;
    const unsigned even = group == i % 8 - 1 ? 0x3f800000u : 0u;
    const unsigned odd = group == i % 8 ? 0x3f800000u : 0u;
    float* d = c[i / 8];
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(__float_as_uint(held[0])), "r"(__float_as_uint(held[1])), "r"(__float_as_uint(b)),
          "r"(__float_as_uint(c_value)), "r"(even), "r"(odd));
  }
  // c[s][0], c[s][1]: values 8 s + 2 t and 8 s + 2 t + 1 of B, t = lane % 4, summed over the lanes
  // of lane / 4; c[s][2], c[s][3]: of C. What is left is a sum over lane / 4.
  __device__ __forceinline__ void store(float* to, int lane) {
    float v[4 * kSets];  // index: 2 s + (C ? 2 kSets : 0) + odd
#pragma unroll
    for (int s = 0; s < kSets; ++s)
#pragma unroll
      for (int k = 0; k < 4; ++k) v[2 * s + (k / 2) * 2 * kSets + k % 2] = c[s][k];
    exchange<2 * kSets, 4>(v, lane / 4);
    if constexpr (kSets == 1) v[0] += __shfl_xor_sync(0xffffffffu, v[0], 16);
    const int index = lane / 4 % (4 * kSets), kind = index / (2 * kSets);
    const int i = index / 2 % kSets * 8 + lane % 4 * 2 + index % 2;
    if (i < kValues) to[kind * kValues + i] = v[0];
  }
};
#endif

template <class T, int kValues> struct LaneSums : ShuffleSums<kValues> {};
#if __CUDA_ARCH__ >= 800
template <int kValues> struct LaneSums<__nv_bfloat16, kValues> : TensorSums<kValues> {};
#endif
