// x (M, K) as e4m3 numbers, transposed, (K, M), under one scale: the largest of the M scales that
// quantize_rows found. A block has kTile x kTile elements.
//
// -D: kInput.
#include "fp8/quantize.cuh"

constexpr int kTile = 64;

extern "C" __global__ void __launch_bounds__(kThreads)
    quantize_transposed(const __grid_constant__ QuantizeParams p) {
  __shared__ float largest[kThreads / 32];
  __shared__ alignas(16) unsigned char tile[kTile][kTile + 16];  // [column][row]
  float most = 0.0f;
  for (Int64 row = threadIdx.x; row < p.rows; row += kThreads) most = larger(most, p.scale[row]);
  UNROLL for (int stage = 16; stage > 0; stage /= 2)
    most = larger(most, __shfl_xor_sync(0xffffffffu, most, stage));
  if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = most;
  __syncthreads();
  UNROLL for (int w = 0; w < kThreads / 32; ++w) most = larger(most, largest[w]);
  const float inverse = 1.0f / most;

  const Int64 first_row = static_cast<Int64>(blockIdx.y) * kTile;
  const Int64 first_column = static_cast<Int64>(blockIdx.x) * kTile;
  constexpr int kAcross = kTile / 8, kRowsAtOnce = kThreads / kAcross;
  const int first_of_thread = threadIdx.x % kAcross * 8;
  UNROLL for (int r = threadIdx.x / kAcross; r < kTile; r += kRowsAtOnce) {
    const Int64 row = first_row + r, column = first_column + first_of_thread;
    if (row >= p.rows || column >= p.columns) continue;
    const kInput* x = static_cast<const kInput*>(p.x.data) + row * p.x.row_stride + column;
    const Vec8 vector = *reinterpret_cast<const Vec8*>(x);
    UNROLL for (int i = 0; i < 8; i += 2) {
      const unsigned short both =
          e4m3x2(to_float(vector.v[i]) * inverse, to_float(vector.v[i + 1]) * inverse);
      tile[first_of_thread + i][r] = static_cast<unsigned char>(both);
      tile[first_of_thread + i + 1][r] = static_cast<unsigned char>(both >> 8);
    }
  }
  __syncthreads();
  // Rows of the result, 16 elements a thread; M is a multiple of 16.
  const int column = threadIdx.x / (kTile / 16), row = threadIdx.x % (kTile / 16) * 16;
  if (first_column + column >= p.columns || first_row + row >= p.rows) return;
  *reinterpret_cast<int4*>(p.out + (first_column + column) * p.rows + first_row + row) =
      *reinterpret_cast<const int4*>(&tile[column][row]);
}
