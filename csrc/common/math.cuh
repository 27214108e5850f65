// Elementary functions in float32: hardware approximations where their error is one or two units in
// the last place, series where it is not.
#pragma once

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
// network (delta 1e-3: 1e-4 off); log1p(e) = 2 atanh(s), s = e / (2 + e), keeps it (2e-7).
__device__ __forceinline__ float softplus(float x) {
  const float e = ex2(-fabsf(x) * kLog2e);
  const float s = e * reciprocal(2.0f + e);
  const float w = s * s;
  float p = fmaf(w, 0.13433805f, 0.14116972f);
  p = fmaf(w, p, 0.20003836f);
  p = fmaf(w, p, 0.33333320f);
  return fmaxf(x, 0.0f) + fmaf(s, fmaf(2.0f * w, p, -e), e);
}

__device__ __forceinline__ float sigmoid(float x) {
  return reciprocal(1.0f + ex2(-x * kLog2e));
}

// d softplus / dx: the sigmoid, without overflow of the exponential for x << 0.
__device__ __forceinline__ float softplus_derivative(float x) {
  const float e = ex2(-fabsf(x) * kLog2e);
  return (x >= 0.0f ? 1.0f : e) * reciprocal(1.0f + e);
}

__device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }

// d silu(x) / dx, given sigmoid(x)
__device__ __forceinline__ float silu_derivative(float x, float sigmoid_x) {
  return sigmoid_x * fmaf(x, 1.0f - sigmoid_x, 1.0f);
}
