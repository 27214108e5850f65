// The scan's parameter struct, one for all its kernels; meaning: ScanParams of
// libs/ops/cuda/launch_plan.py, which mirrors it.
#pragma once
#include "common/types.cuh"

// Steps between two states that the first walk of the backward saves; the second works on so many at
// once.
constexpr int kStride = 4;

struct ScanParams {
  Int64 batch, length, channels, states, delta_softplus;
  Int64 segments, segment_length;
  Rows u, delta, z, B, C, y, g_y, g_u, g_delta, g_z;
  const float *A, *D, *delta_bias;
  const Int64* order;
  float* last_state;
  const float* g_last_state;
  // Scratch, float32. kStates is the padded number of states.
  float* segment_state;  // (segments - 1, B, kStates, D): end state of a segment that starts at 0
  float* segment_delta;  // (segments - 1, B, D): its sum of step sizes
  float* carry_state;    // the same for the walk back, of segments 1 ..
  float* carry_delta;
  float* saved_states;   // (B, L / kStride, kStates / 4, D, 4): the state before every kStride steps
  float* parts_BC;     // (blocks of channels, 2, B, L, N)
  float* parts_A;      // (B * segments, D, N)
  float* parts_D;      // (B * segments, D)
  float* parts_bias;   // (B * segments, D)
};
static_assert(sizeof(ScanParams) == 7 * 8 + 10 * 24 + 15 * 8, "mirrored by launch_plan.py");
