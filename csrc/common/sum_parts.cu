// Sums of partial results in a fixed order, so that gradients are bit-equal in every run.
// -D: kOutput (type of the result).
#include "common/types.cuh"

struct SumParams {
  const float* parts;  // (count, size)
  kOutput* out;        // (size)
  Int64 count, size;
};
static_assert(sizeof(SumParams) == 32, "mirrored by libs/ops/launch_plan.py");

// Loads in flight together, and partial sums, which also keep the rounding error of long sums low.
constexpr int kLanes = 8;

extern "C" __global__ void __launch_bounds__(256) sum_parts(const __grid_constant__ SumParams p) {
  const Int64 i = static_cast<Int64>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= p.size) return;
  float lane[kLanes] = {};
  for (Int64 first = 0; first < p.count; first += kLanes) {
#pragma unroll
    for (int k = 0; k < kLanes; ++k)
      if (first + k < p.count) lane[k] += p.parts[(first + k) * p.size + i];
  }
#pragma unroll
  for (int stride = kLanes / 2; stride > 0; stride /= 2)
#pragma unroll
    for (int k = 0; k < stride; ++k) lane[k] += lane[k + stride];
  p.out[i] = from_float<kOutput>(lane[0]);
}
