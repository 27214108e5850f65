// x (M, K) as e4m3 numbers under one scale, transposed and padded with zeros, (K, M rounded up to a
// multiple of 16). A warp has 128 rows and 32 columns, a lane 16 rows and 8 columns, which it packs
// by itself: an access takes 64 bytes of a row of x or 128 of the result, and no warp waits for
// another.
//
// -D: kInput.
#include "fp8/quantize.cuh"

constexpr int kWarps = 4;                // of a block
constexpr int kRows = 16, kColumns = 8;  // of a lane
constexpr int kAcross = 4;               // lanes of a warp

extern "C" __global__ void __launch_bounds__(32 * kWarps)
    quantize_transposed(const __grid_constant__ QuantizeParams p) {
  const int lane = threadIdx.x % 32, warp = blockIdx.x * kWarps + threadIdx.x / 32;
  const Int64 column = (warp * kAcross + lane % kAcross) * kColumns;
  const Int64 row = blockIdx.y * 128 + lane / kAcross * kRows;
  if (column >= p.columns || row >= p.rows) return;
  const kInput* x = static_cast<const kInput*>(p.x.data) + row * p.x.row_stride + column;
  Vec8 vectors[kRows] = {};
  UNROLL for (int r = 0; r < kRows; ++r)
    if (row + r < p.rows) vectors[r] = *reinterpret_cast<const Vec8*>(x + r * p.x.row_stride);
  UNROLL for (int r = 0; r < kRows; ++r)  // else their halves are taken apart at once: 168 registers
    UNROLL for (int i = 0; i < kColumns / 2; ++i)
      asm volatile("" : "+r"(reinterpret_cast<unsigned*>(&vectors[r])[i]));
  const Int64 out_rows = (p.rows + 15) / 16 * 16;
  const float inverse = 1.0f / *p.scale;
  UNROLL for (int c = 0; c < kColumns; ++c) {
    alignas(16) unsigned short packed[kRows / 2];
    UNROLL for (int r = 0; r < kRows; r += 2)
      packed[r / 2] =
          e4m3x2(to_float(vectors[r].v[c]) * inverse, to_float(vectors[r + 1].v[c]) * inverse);
    *reinterpret_cast<int4*>(p.out + (column + c) * out_rows + row) =
        *reinterpret_cast<const int4*>(packed);
  }
}
