// What surrounds the mixer in a block of DiM, one pass over the tokens each:
//   n   = x / rms(x) * gain + shift,   gain = weight (1 + table_1 + modulation_1), shift = table_0 + modulation_0
//   out = x + factor * branch,         factor = drop_path_scale (1 + table_2 + modulation_2)
// with one modulation (3, D) a batch entry. Definition: modulated_norm_ref, gated_residual_ref.
//
// A thread owns 8 neighbouring channels, a block all channels of kRows tokens at a time and a chunk of
// the tokens of one batch entry, so that sums over tokens stay in registers.
//
// -D: kInput (of branch and n), kStream (of g_x), kX (of x, often kStream), kOut (of out), kRows.
#pragma once
#include "common/math.cuh"
#include "common/types.cuh"

struct AdalnParams {
  Int64 batch, length, dim, chunks, chunk_length;     // dim: a multiple of 8
  // (B, L, dim), rows aligned to 16 bytes. rounded: x in kInput; it and g_rounded may be absent.
  Rows x, n, branch, out, g_n, g_out, g_x, g_branch, rounded, g_rounded;
  const float *modulation, *table, *weight, *drop_path_scale;  // (B, 3, dim), (3, dim), (dim), (B) or none
  float *parts_shift, *parts_gain, *parts_factor;     // (chunks, B, dim)
  const float *g_shift, *g_gain, *g_factor;           // (B, dim)
  float *g_modulation, *g_table, *g_weight;
};
static_assert(sizeof(AdalnParams) == 5 * 8 + 10 * 24 + 13 * 8, "mirrored by adaln.py");

constexpr int kThreads = 256, kWarps = kThreads / 32;  // at most; a block has dim / 8 threads
constexpr float kEpsilon = 1e-5f;
constexpr bool kRounds = sizeof(kStream) > sizeof(kInput);

typedef Vec<float, 8> Float8;
template <class T> using Vec8 = Packed<T, 8, 16>;

// Which part of the problem a thread has: a chunk of the tokens of one batch entry, 8 channels.
struct TokenCoord {
  Int64 batch, chunk;
  int channel, first, end;  // first channel; tokens
  bool valid;               // channels exist

  __device__ __forceinline__ TokenCoord(const AdalnParams& p) {
    batch = blockIdx.x / p.chunks;
    chunk = blockIdx.x % p.chunks;
    channel = static_cast<int>(threadIdx.x) * 8;
    valid = channel < p.dim;
    if (!valid) channel = 0;
    first = static_cast<int>(chunk * p.chunk_length);
    end = static_cast<int>(min(p.length, first + p.chunk_length));
  }
};

// One thread's 8 channels of a token.
template <class T> struct Sequence {
  T* first;
  Int64 stride;

  __device__ __forceinline__ Sequence(const Rows& rows, const TokenCoord& at)
      : first(static_cast<T*>(rows.data) + at.batch * rows.batch_stride + at.channel),
        stride(rows.row_stride) {}
  __device__ __forceinline__ Vec8<T> load(int token) const {
    return *reinterpret_cast<const Vec8<T>*>(first + token * stride);
  }
  __device__ __forceinline__ void store(int token, const Float8& x) const {
    *reinterpret_cast<Vec8<T>*>(first + token * stride) = narrow<Vec8<T>, T>(x);
  }
};

// Row `part` of table + modulation: shift, scale or gate.
__device__ __forceinline__ Float8 add_modulation(const AdalnParams& p, const TokenCoord& at, int part) {
  const float* shared = p.modulation + (at.batch * 3 + part) * p.dim + at.channel;
  const float* table = p.table + part * p.dim + at.channel;
  Float8 x;
  UNROLL for (int i = 0; i < 8; ++i) x.v[i] = table[i] + shared[i];
  return x;
}

__device__ __forceinline__ Float8 make_gain(const AdalnParams& p, const TokenCoord& at) {
  Float8 gain = add_modulation(p, at, 1);
  UNROLL for (int i = 0; i < 8; ++i) gain.v[i] = (1.0f + gain.v[i]) * p.weight[at.channel + i];
  return gain;
}

__device__ __forceinline__ Float8 make_factor(const AdalnParams& p, const TokenCoord& at) {
  Float8 factor = add_modulation(p, at, 2);
  const float scale = p.drop_path_scale ? p.drop_path_scale[at.batch] : 1.0f;
  UNROLL for (int i = 0; i < 8; ++i) factor.v[i] = (1.0f + factor.v[i]) * scale;
  return factor;
}

// Adds each of kCount values over the block; every thread gets the sums. buffer: alternates from call
// to call, so that one barrier is enough.
template <int kCount>
__device__ __forceinline__ void add_threads(float* values, float (*buffer)[kWarps]) {
  UNROLL for (int i = 0; i < kCount; ++i)
    UNROLL for (int stage = 16; stage > 0; stage /= 2)
      values[i] += __shfl_xor_sync(0xffffffffu, values[i], stage);
  const int warps = blockDim.x / 32;
  if (warps == 1) return;
  if (threadIdx.x % 32 == 0)
    UNROLL for (int i = 0; i < kCount; ++i) buffer[i][threadIdx.x / 32] = values[i];
  __syncthreads();
  UNROLL for (int i = 0; i < kCount; ++i) {
    values[i] = 0.0f;
    for (int w = 0; w < warps; ++w) values[i] += buffer[i][w];
  }
}

// A part of a sum over tokens.
__device__ __forceinline__ void store_part(float* parts, const AdalnParams& p, const TokenCoord& at,
                                           const Float8& sum) {
  if (!at.valid) return;
  float* to = parts + (at.chunk * p.batch + at.batch) * p.dim + at.channel;
  UNROLL for (int i = 0; i < 8; ++i) to[i] = sum.v[i];
}
