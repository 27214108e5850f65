// Rows of x (M, K) as e4m3 numbers with a scale each: x8 = x / scale, scale = largest |x| of the row
// over the largest e4m3 number. A block has one row, a thread up to kVectors vectors of 8 elements.
//
// -D: kInput, kVectors (K <= 8 * 256 * kVectors).
#include "common/types.cuh"

struct QuantizeParams {
  Int64 rows, columns;  // K: a multiple of 16
  Rows x;               // (1, M, K), aligned to 16 bytes
  unsigned char* out;   // (M, K), contiguous
  float* scale;         // (M)
};
static_assert(sizeof(QuantizeParams) == 2 * 8 + 24 + 2 * 8, "mirrored by libs/ops/fp8_plan.py");

constexpr int kThreads = 256, kOwn = 8;
constexpr float kLargest = 448.0f;  // of e4m3

struct alignas(16) Packet {
  kInput v[kOwn];
};

// Two floats as two e4m3 numbers, rounded to nearest, b in the upper byte.
__device__ __forceinline__ unsigned short e4m3x2(float a, float b) {
  unsigned short packed;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(b), "f"(a));
  return packed;
}

extern "C" __global__ void __launch_bounds__(kThreads)
    quantize_rows(const __grid_constant__ QuantizeParams p) {
  __shared__ float largest[kThreads / 32];
  const Int64 row = blockIdx.x;
  const kInput* x = static_cast<const kInput*>(p.x.data) + row * p.x.row_stride;
  Packet packets[kVectors];
  float most = 0.0f;
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const Int64 first = (k * kThreads + threadIdx.x) * kOwn;
    if (first >= p.columns) break;
    packets[k] = *reinterpret_cast<const Packet*>(x + first);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const float size = fabsf(to_float(packets[k].v[i]));
      most = size > most || isnan(size) ? size : most;  // a NaN stays one
    }
  }
#pragma unroll
  for (int stage = 16; stage > 0; stage /= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, most, stage);
    most = other > most || isnan(other) ? other : most;
  }
  if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = most;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w)
    most = largest[w] > most || isnan(largest[w]) ? largest[w] : most;
  const float scale = most == 0.0f ? 1.0f : most / kLargest;
  const float inverse = 1.0f / scale;
  if (threadIdx.x == 0) p.scale[row] = scale;
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const Int64 first = (k * kThreads + threadIdx.x) * kOwn;
    if (first >= p.columns) break;
    alignas(8) unsigned short packed[kOwn / 2];
#pragma unroll
    for (int i = 0; i < kOwn / 2; ++i)
      packed[i] = e4m3x2(to_float(packets[k].v[2 * i]) * inverse,
                         to_float(packets[k].v[2 * i + 1]) * inverse);
    *reinterpret_cast<uint2*>(p.out + row * p.columns + first) =
        *reinterpret_cast<const uint2*>(packed);
  }
}
