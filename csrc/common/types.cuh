// Element types, rows of strided tensors, conversions. No torch, no host headers: NVRTC compiles this.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define UNROLL _Pragma("unroll")
typedef long long Int64;

// A (B, L, X) tensor with X contiguous, strides in elements; `Rows` of libs/ops/cuda/launch_plan.py.
struct Rows {
  void* data;
  Int64 batch_stride;
  Int64 row_stride;
};
static_assert(sizeof(Rows) == 24, "mirrored by libs/ops/cuda/launch_plan.py");

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <> __device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// kSize neighbouring elements, in registers. Packed: as they are in memory, for one load or store.
template <class T, int kSize> struct Vec {
  T v[kSize];
};
template <class T, int kSize, int kBytes = kSize * sizeof(T)> struct alignas(kBytes) Packed {
  T v[kSize];
};

template <class T, int kSize, int kBytes>
__device__ __forceinline__ Vec<float, kSize> widen(const Packed<T, kSize, kBytes>& packed) {
  Vec<float, kSize> x;
  UNROLL for (int i = 0; i < kSize; ++i) x.v[i] = to_float(packed.v[i]);
  return x;
}

template <class P, class T, int kSize>
__device__ __forceinline__ P narrow(const Vec<float, kSize>& x) {
  P packed;
  UNROLL for (int i = 0; i < kSize; ++i) packed.v[i] = from_float<T>(x.v[i]);
  return packed;
}

// One column of one batch entry: at(row) is its element in that row. A row's stride in bytes has 31
// bits (the operator checks), so that an address is one 32 x 32 + 64 bit multiply-add.
template <class T> struct alignas(16) Column {
  size_t first;  // address in global memory
  unsigned stride;

  __device__ __forceinline__ Column(const Rows& rows, Int64 batch, Int64 column)
      : first(__cvta_generic_to_global(rows.data) +
              (batch * rows.batch_stride + column) * static_cast<Int64>(sizeof(T))),
        stride(static_cast<unsigned>(rows.row_stride) * static_cast<unsigned>(sizeof(T))) {
    // Hides how the address was made: else it is added up again, in two parts, at every access.
    asm("" : "+l"(first));
  }
  __device__ __forceinline__ T* at(int row) const {
    Int64 offset;  // as a product in C++ it takes up to four instructions
    asm("mul.wide.s32 %0, %1, %2;" : "=l"(offset) : "r"(row), "r"(stride));
    return reinterpret_cast<T*>(__cvta_global_to_generic(first + offset));
  }
  // The column so many further on.
  __device__ __forceinline__ Column next(int columns) const {
    Column found = *this;
    found.first += columns * static_cast<Int64>(sizeof(T));
    return found;
  }
};
