// Rows of x, or of [x, more], (M, K) as e4m3 numbers with a scale each: x8 = x / scale, scale = largest
// |x| of the row over the largest e4m3 number. kWarps warps share a row, a lane has up to kVectors
// vectors of 8.
//
// -D: kInput, kVectors, kWarps (K <= 256 * kVectors * kWarps).
#include "fp8/quantize.cuh"

extern "C" __global__ void __launch_bounds__(kThreads)
    quantize_rows(const __grid_constant__ QuantizeParams p) {
  __shared__ float largest[kThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Int64 wanted = static_cast<Int64>(blockIdx.x) * (kThreads / 32 / kWarps) + warp / kWarps;
  const Int64 row = min(wanted, p.rows - 1);  // those past the end do the last one again
  const int offset = (warp % kWarps * kVectors * 32 + lane) * 8;
  const kInput* x = static_cast<const kInput*>(p.x.data) + row * p.x.row_stride;
  const kInput* more = static_cast<const kInput*>(p.more.data) + row * p.more.row_stride - p.split;
  Vec8 vectors[kVectors];
  UNROLL for (int k = 0; k < kVectors; ++k) {
    const int first = offset + k * 32 * 8;
    vectors[k] = Vec8{};
    if (first < p.columns)
      vectors[k] = *reinterpret_cast<const Vec8*>((first < p.split ? x : more) + first);
  }
  float most = 0.0f;
  UNROLL for (int k = 0; k < kVectors; ++k)
    UNROLL for (int i = 0; i < 8; ++i) most = larger(most, fabsf(to_float(vectors[k].v[i])));
  UNROLL for (int stage = 16; stage > 0; stage /= 2)
    most = larger(most, __shfl_xor_sync(0xffffffffu, most, stage));
  if (kWarps > 1) {
    if (lane == 0) largest[warp] = most;
    __syncthreads();
    UNROLL for (int w = 0; w < kWarps; ++w) most = larger(most, largest[warp / kWarps * kWarps + w]);
  }
  const float scale = scale_of(most), inverse = 1.0f / scale;
  if (lane == 0) p.scale[row] = scale;
  UNROLL for (int k = 0; k < kVectors; ++k) {
    const int first = offset + k * 32 * 8;
    if (first >= p.columns) break;
    alignas(8) unsigned short packed[8 / 2];
    UNROLL for (int i = 0; i < 8 / 2; ++i)
      packed[i] = e4m3x2(to_float(vectors[k].v[2 * i]) * inverse,
                         to_float(vectors[k].v[2 * i + 1]) * inverse);
    *reinterpret_cast<uint2*>(p.out + row * p.columns + first) =
        *reinterpret_cast<const uint2*>(packed);
  }
}
