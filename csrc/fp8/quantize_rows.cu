// Rows of x (M, K) as e4m3 numbers with a scale each: x8 = x / scale, scale = largest |x| of the row
// over the largest e4m3 number. A warp has one row, a lane up to kVectors vectors of 8 elements.
//
// -D: kInput, kVectors (K <= 256 * kVectors).
#include "fp8/quantize.cuh"

extern "C" __global__ void __launch_bounds__(kThreads)
    quantize_rows(const __grid_constant__ QuantizeParams p) {
  const int lane = threadIdx.x % 32;
  const Int64 row = static_cast<Int64>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (row >= p.rows) return;
  const kInput* x = static_cast<const kInput*>(p.x.data) + row * p.x.row_stride;
  Packet packets[kVectors];
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const int first = (k * 32 + lane) * kOwn;
    packets[k] = Packet{};
    if (first < p.columns) packets[k] = *reinterpret_cast<const Packet*>(x + first);
  }
  float most = 0.0f;
#pragma unroll
  for (int k = 0; k < kVectors; ++k)
#pragma unroll
    for (int i = 0; i < kOwn; ++i) most = larger(most, fabsf(to_float(packets[k].v[i])));
#pragma unroll
  for (int stage = 16; stage > 0; stage /= 2)
    most = larger(most, __shfl_xor_sync(0xffffffffu, most, stage));
  const float scale = scale_of(most), inverse = 1.0f / scale;
  if (lane == 0) p.scale[row] = scale;
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const int first = (k * 32 + lane) * kOwn;
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
