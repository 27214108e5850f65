// What the quantising kernels share.
#pragma once
#include "common/types.cuh"

struct QuantizeParams {
  Int64 rows, columns, split;  // M; K and x's part of it, multiples of 16
  Rows x, more;                // (1, M, split), (1, M, K - split) if any; rows aligned to 16 bytes
  unsigned char* out;          // (M, K) or, transposed, (K, M); contiguous
  float* scale;                // (M), written; transposed, 1, read
};
static_assert(sizeof(QuantizeParams) == 3 * 8 + 2 * 24 + 2 * 8, "mirrored by libs/ops/cuda/fp8.py");

constexpr int kThreads = 256;
constexpr float kLargest = 448.0f;  // of e4m3

typedef Packed<kInput, 8> Vec8;

// The larger one; a NaN stays one.
__device__ __forceinline__ float larger(float a, float b) { return b > a || isnan(b) ? b : a; }

// Of at least 1e-30, so that its inverse is finite; a NaN stays one.
__device__ __forceinline__ float scale_of(float largest) { return larger(1e-30f, largest) / kLargest; }

// Two floats as two e4m3 numbers, rounded to nearest, b in the upper byte.
__device__ __forceinline__ unsigned short e4m3x2(float a, float b) {
  unsigned short packed;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(b), "f"(a));
  return packed;
}
