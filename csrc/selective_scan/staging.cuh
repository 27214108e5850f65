// B and C of a tile on their way from global to shared memory, as float32.
#pragma once
#include "selective_scan/params.cuh"

// kSteps of kPadded states, by a block of kBlock threads. kWithB, kWithC: whether the walk reads them.
template <class T, int kSteps, int kPadded, int kBlock, bool kWithB, bool kWithC> struct Staging {
  static constexpr int kElements = (kSteps * kPadded + kBlock - 1) / kBlock;  // of a thread
  T B[kElements], C[kElements];

  __device__ __forceinline__ void load(const ScanParams& p, Int64 batch, const int* rows) {
    UNROLL for (int k = 0; k < kElements; ++k) {
      const int i = threadIdx.x + k * kBlock, n = i % kPadded;
      B[k] = C[k] = from_float<T>(0.0f);
      if (i >= kSteps * kPadded || n >= p.states) continue;
      if (kWithB) B[k] = *Column<const T>(p.B, batch, n).at(rows[i / kPadded]);
      if (kWithC) C[k] = *Column<const T>(p.C, batch, n).at(rows[i / kPadded]);
    }
  }
  // address(i, 0): where B of step i / kPadded and state i % kPadded goes; address(i, 1): its C.
  template <class Address> __device__ __forceinline__ void store(const Address& address) const {
    UNROLL for (int k = 0; k < kElements; ++k) {
      const int i = threadIdx.x + k * kBlock;
      if (i >= kSteps * kPadded) continue;
      if (kWithB) *address(i, 0) = to_float(B[k]);
      if (kWithC) *address(i, 1) = to_float(C[k]);
    }
  }
};
