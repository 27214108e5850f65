// Backward of n = x / rms(x) * gain + shift, of which it also makes n again. With g = g_n gain and
// xhat = x / rms(x): g_x = g_out + (g - xhat mean(g xhat)) / rms(x), the sums over tokens of g_n xhat
// and g_n are the gradients of gain and shift. g_out is the gradient that goes past the branch, to
// which comes that of x in kInput, g_rounded, where x was wanted so.
#include "adaln/adaln.cuh"

extern "C" __global__ void __launch_bounds__(kThreads, 3)
    norm_backward(const __grid_constant__ AdalnParams p) {
  __shared__ float sums[2][2 * kRows][kWarps];
  const TokenCoord at(p);
  const Sequence<kX> x(p.x, at);
  const Sequence<kInput> g_n(p.g_n, at);
  const Sequence<kOut> g_out(p.g_out, at);
  const Sequence<kStream> g_x(p.g_x, at);
  const Sequence<kInput> n(p.n, at), g_rounded(p.g_rounded, at);
  const Float8 gain = make_gain(p, at), shift = add_modulation(p, at, 0);
  Float8 g_gain = {}, g_shift = {};
  const float mean = 1.0f / static_cast<float>(p.dim);
  int buffer = 0;
  for (int first = at.first; first < at.end; first += kRows, buffer ^= 1) {
    Vec8<kX> of_x[kRows];
    Vec8<kInput> of_n[kRows], of_rounded[kRows] = {};
    Vec8<kOut> of_out[kRows];
    UNROLL for (int r = 0; r < kRows; ++r) {
      const int token = min(first + r, at.end - 1);
      of_x[r] = x.load(token);
      of_n[r] = g_n.load(token);
      of_out[r] = g_out.load(token);
      if (kRounds && p.g_rounded.data) of_rounded[r] = g_rounded.load(token);
    }
    float values[2 * kRows] = {};  // of each row: sum of x^2, of g x
    UNROLL for (int r = 0; r < kRows; ++r)
      UNROLL for (int i = 0; i < 8; ++i) {
        const float value = to_float(of_x[r].v[i]), g = to_float(of_n[r].v[i]) * gain.v[i];
        values[2 * r] = fmaf(value, value, values[2 * r]);
        values[2 * r + 1] = fmaf(g, value, values[2 * r + 1]);
      }
    if (!at.valid)
      UNROLL for (int i = 0; i < 2 * kRows; ++i) values[i] = 0.0f;
    add_threads<2 * kRows>(values, sums[buffer]);
    UNROLL for (int r = 0; r < kRows; ++r) {
      if (first + r >= at.end) break;
      const float scale = rsqrtf(fmaf(values[2 * r], mean, kEpsilon));
      const float along = values[2 * r + 1] * scale * mean;  // mean of g xhat
      Float8 again, gradient;
      UNROLL for (int i = 0; i < 8; ++i) {
        const float xhat = to_float(of_x[r].v[i]) * scale, g = to_float(of_n[r].v[i]);
        again.v[i] = fmaf(xhat, gain.v[i], shift.v[i]);
        g_gain.v[i] = fmaf(g, xhat, g_gain.v[i]);
        g_shift.v[i] += g;
        gradient.v[i] = fmaf(fmaf(-xhat, along, g * gain.v[i]), scale, to_float(of_out[r].v[i]));
        gradient.v[i] += to_float(of_rounded[r].v[i]);
      }
      if (!at.valid) continue;
      n.store(first + r, again);
      g_x.store(first + r, gradient);
    }
  }
  store_part(p.parts_gain, p, at, g_gain);
  store_part(p.parts_shift, p, at, g_shift);
}
