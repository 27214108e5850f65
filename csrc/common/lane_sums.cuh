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

template <int kValues> struct ShuffleSums {
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
// By the tensor cores: a product with a matrix of zeros and ones adds four lanes' values into a
// row chosen by the ones, so 16 products, 4 additions and 3 shuffles replace 31 shuffles, additions
// and 62 selections. Operands have tf32's 11 significant bits, rounded here (the hardware would cut
// off), sums are float32: for 2-byte inputs, whose own gradients are rounded as coarsely or more.
template <int kValues> struct TensorSums {
  static constexpr int kSets = (kValues + 7) / 8;
  float c[kSets][4] = {};  // rows 0-7: B, rows 8-15: C

  static __device__ __forceinline__ unsigned round_tf32(float x) {
    return __float_as_uint(x) + 0x1000u;
  }
  __device__ __forceinline__ void add(int i, float b, float c_value) {
    const unsigned one = (threadIdx.x % 32) / 4 == i % 8 ? 0x3f800000u : 0u;
    float* d = c[i / 8];
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %5, %4}, "
        "{%6, %7}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(one), "r"(0u), "r"(round_tf32(b)), "r"(round_tf32(c_value)));
  }
  __device__ __forceinline__ void store(float* to, int lane) {
    const bool odd = lane & 1;
    float sum[kSets];
#pragma unroll
    for (int s = 0; s < kSets; ++s) {
      const float b = c[s][0] + c[s][1], other = c[s][2] + c[s][3];
      sum[s] = (odd ? other : b) + __shfl_xor_sync(0xffffffffu, odd ? b : other, 1);
    }
    const bool upper = lane & 2;
    float result;
    if constexpr (kSets == 2)
      result = (upper ? sum[1] : sum[0]) +
               __shfl_xor_sync(0xffffffffu, upper ? sum[0] : sum[1], 2);
    else
      result = sum[0] + __shfl_xor_sync(0xffffffffu, sum[0], 2);
    const int i = lane / 4 + (kSets == 2 && upper ? 8 : 0);
    if (i < kValues) to[odd * kValues + i] = result;
  }
};
#endif

template <class T, int kValues> struct LaneSums : ShuffleSums<kValues> {};
#if __CUDA_ARCH__ >= 800
template <int kValues> struct LaneSums<__nv_bfloat16, kValues> : TensorSums<kValues> {};
template <int kValues> struct LaneSums<__half, kValues> : TensorSums<kValues> {};
#endif
