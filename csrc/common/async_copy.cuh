// Copies from global to shared memory that the thread does not wait for, where the GPU has them
// (sm_80 and later); elsewhere they are done at once.
#pragma once

// 16 bytes, both addresses multiples of 16; zeros where nothing is `present`.
__device__ __forceinline__ void copy16(void* to, const void* from, bool present = true) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::
               "r"(static_cast<unsigned>(__cvta_generic_to_shared(to))),
               "l"(__cvta_generic_to_global(from)), "r"(present ? 16 : 0) : "memory");
#else
  *reinterpret_cast<int4*>(to) = present ? *reinterpret_cast<const int4*>(from) : int4{};
#endif
}

// Makes a group of this thread's copies since the last one.
__device__ __forceinline__ void close_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for this thread's copies but for the kLater newest groups.
template <int kLater> __device__ __forceinline__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kLater) : "memory");
#endif
}
