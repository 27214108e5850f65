// out = x + factor * branch; see adaln.cuh.
#include "adaln/adaln.cuh"

extern "C" __global__ void __launch_bounds__(kThreads)
    gate_forward(const __grid_constant__ AdalnParams p) {
  const TokenCoord at(p);
  if (!at.valid) return;
  const Sequence<kX> x(p.x, at);
  const Sequence<kInput> branch(p.branch, at);
  const Sequence<kOut> out(p.out, at);
  const Float8 factor = make_factor(p, at);
  for (int first = at.first; first < at.end; first += kRows) {
    Vec8<kX> of_x[kRows];
    Vec8<kInput> of_branch[kRows];
    UNROLL for (int r = 0; r < kRows; ++r) {
      of_x[r] = x.load(min(first + r, at.end - 1));
      of_branch[r] = branch.load(min(first + r, at.end - 1));
    }
    UNROLL for (int r = 0; r < kRows; ++r) {
      if (first + r >= at.end) break;
      Float8 sum = widen(of_x[r]);
      UNROLL for (int i = 0; i < 8; ++i)
        sum.v[i] = fmaf(factor.v[i], to_float(of_branch[r].v[i]), sum.v[i]);
      out.store(first + r, sum);
    }
  }
}
