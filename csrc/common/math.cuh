// Elementary functions in float32: hardware approximations where their error is one or two units in
// the last place, series where it is not; but see silu in bfloat16.
#pragma once
#include "common/types.cuh"

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

__device__ __forceinline__ float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Over arguments in [-0.5, 0] ex2.approx comes out 2.2e-8 too small on average (measured, H200), a
// third of a unit in the last place: over the hundreds of steps that a slow state remembers, six
// times the reference's error. Raising the argument by this, which a multiply-add does for nothing,
// leaves 2e-9; further down it is rounded away, where states forget too fast to matter.
constexpr float kExponentShift = 3e-8f;

// 2^(delta A), a step's decay.
__device__ __forceinline__ float decay_of(float delta, float A) {
  return ex2(fmaf(delta, A, kExponentShift));
}

__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// condition ? a : b without a branch, which the compiler makes where a or b is costly: the condition
// is the same for a whole launch, and a branch in every step costs more than what it saves.
__device__ __forceinline__ float select(bool condition, float a, float b) {
  float y;
  asm("{\n\t.reg .pred p;\n\tsetp.ne.u32 p, %3, 0;\n\tselp.f32 %0, %1, %2, p;\n\t}"
      : "=f"(y) : "f"(a), "f"(b), "r"(static_cast<unsigned>(condition)));
  return y;
}

// log(1 + e^x). lg2(1 + e) would lose e's relative precision for the small steps of a trained
// network (delta 1e-3: 1e-4 off); e + e e q(e), minimax over [0, 1], keeps it (1.4e-7) and needs no
// reciprocal, as special functions bound the passes over the states.
__device__ __forceinline__ float softplus(float x) {
  const float e = ex2(-fabsf(x) * kLog2e);
  constexpr float kFactors[8] = {0.0053648185f, -0.030065769f, 0.0792045f, -0.13753799f,
                                 0.19153653f, -0.24857163f, 0.33321324f, -0.49999648f};
  float q = kFactors[0];
  UNROLL for (int i = 1; i < 8; ++i) q = fmaf(e, q, kFactors[i]);
  return fmaxf(x, 0.0f) + fmaf(e * e, q, e);
}

__device__ __forceinline__ float sigmoid(float x) {
  return reciprocal(1.0f + ex2(-x * kLog2e));
}

// d softplus / dx: the sigmoid, without overflow of the exponential for x << 0.
__device__ __forceinline__ float softplus_derivative(float x) {
  const float e = ex2(-fabsf(x) * kLog2e);
  return (x >= 0.0f ? 1.0f : e) * reciprocal(1.0f + e);
}

template <class T> __device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }

// Of an output in bfloat16: by tanh, one special function instead of two; off by 2^-12 |x| at most.
template <> __device__ __forceinline__ float silu<__nv_bfloat16>(float x) {
  float tanh;
  asm("tanh.approx.f32 %0, %1;" : "=f"(tanh) : "f"(0.5f * x));
  return fmaf(0.5f * x, tanh, 0.5f * x);
}

// d silu(x) / dx, given sigmoid(x)
__device__ __forceinline__ float silu_derivative(float x, float sigmoid_x) {
  return sigmoid_x * fmaf(x, 1.0f - sigmoid_x, 1.0f);
}
