// Backward of out = x + factor * branch: g_branch = factor g_out; the gradient of the factor is the
// sum over tokens of g_out branch. (g_out itself goes to norm_backward.cu.)
#include "adaln/adaln.cuh"

extern "C" __global__ void __launch_bounds__(kThreads)
    gate_backward(const __grid_constant__ AdalnParams p) {
  const TokenCoord at(p);
  if (!at.valid) return;
  const Sequence<kOut> g_out(p.g_out, at);
  const Sequence<kInput> branch(p.branch, at);
  const Sequence<kInput> g_branch(p.g_branch, at);
  const Float8 factor = make_factor(p, at);
  Float8 g_factor = {};
  for (int first = at.first; first < at.end; first += kRows) {
    Vec8<kOut> of_out[kRows];
    Vec8<kInput> of_branch[kRows];
    UNROLL for (int r = 0; r < kRows; ++r) {
      of_out[r] = g_out.load(min(first + r, at.end - 1));
      of_branch[r] = branch.load(min(first + r, at.end - 1));
    }
    UNROLL for (int r = 0; r < kRows; ++r) {
      if (first + r >= at.end) break;
      Float8 gradient;
      UNROLL for (int i = 0; i < 8; ++i) {
        const float g = to_float(of_out[r].v[i]);
        gradient.v[i] = factor.v[i] * g;
        g_factor.v[i] = fmaf(g, to_float(of_branch[r].v[i]), g_factor.v[i]);
      }
      g_branch.store(first + r, gradient);
    }
  }
  store_part(p.parts_factor, p, at, g_factor);
}
