// What surrounds the mixer in a block of DiM, one pass over the tokens each:
//   n   = x / rms(x) * gain + shift,   gain = weight (1 + table_1 + modulation_1), shift = table_0 + modulation_0
//   out = x + factor * branch,         factor = keep (1 + table_2 + modulation_2)
// with one modulation (3, D) a batch entry. Definition: Block.composed of libs/model/dim.py.
//
// A thread owns 8 neighbouring channels, a block all channels of kRows tokens at a time and a chunk of
// the tokens of one batch entry, so that sums over tokens stay in registers.
//
// -D: kInput (of branch and n), kX (of x), kOut (of out), kRows.
#pragma once
#include "common/math.cuh"
#include "common/types.cuh"

struct AdalnParams {
  Int64 batch, length, dim, chunks, chunk_length;     // dim: a multiple of 8
  Rows x, n, branch, out, g_n, g_out, g_x, g_branch;  // (B, L, dim), rows aligned to 16 bytes
  const float *modulation, *table, *weight, *keep;    // (B, 3, dim), (3, dim), (dim), (B) or none
  float *parts_shift, *parts_gain, *parts_factor;     // (chunks, B, dim)
  const float *g_shift, *g_gain, *g_factor;           // (B, dim)
  float *g_modulation, *g_table, *g_weight;
};
static_assert(sizeof(AdalnParams) == 5 * 8 + 8 * 24 + 13 * 8, "mirrored by libs/ops/cuda/adaln_plan.py");

constexpr int kOwn = 8;
constexpr int kThreads = 256, kWarps = kThreads / 32;  // at most; a block has dim / 8 threads
constexpr float kEpsilon = 1e-5f;                      // RMSNorm of libs/model/layers.py

struct Eight {
  float v[kOwn];
};

template <class T> struct alignas(16) Packet {
  T v[kOwn];
};

struct Place {
  Int64 batch, chunk;
  int channel, first, end;  // first channel; tokens
  bool valid;               // channels exist

  __device__ __forceinline__ Place(const AdalnParams& p) {
    batch = blockIdx.x / p.chunks;
    chunk = blockIdx.x % p.chunks;
    channel = static_cast<int>(threadIdx.x) * kOwn;
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

  __device__ __forceinline__ Sequence(const Rows& rows, const Place& at)
      : first(static_cast<T*>(rows.data) + at.batch * rows.batch_stride + at.channel),
        stride(rows.row_stride) {}
  __device__ __forceinline__ Packet<T> load(int token) const {
    return *reinterpret_cast<const Packet<T>*>(first + token * stride);
  }
  __device__ __forceinline__ void store(int token, const Eight& x) const {
    Packet<T> packet;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) packet.v[i] = from_float<T>(x.v[i]);
    *reinterpret_cast<Packet<T>*>(first + token * stride) = packet;
  }
};

template <class T> __device__ __forceinline__ Eight widen(const Packet<T>& packet) {
  Eight x;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) x.v[i] = to_float(packet.v[i]);
  return x;
}

// Row `part` of the modulation, without the one that is added to scale and gate.
__device__ __forceinline__ Eight modulation_of(const AdalnParams& p, const Place& at, int part) {
  const float* own = p.modulation + (at.batch * 3 + part) * p.dim + at.channel;
  const float* shared = p.table + part * p.dim + at.channel;
  Eight x;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) x.v[i] = shared[i] + own[i];
  return x;
}

__device__ __forceinline__ Eight gain_of(const AdalnParams& p, const Place& at) {
  Eight gain = modulation_of(p, at, 1);
#pragma unroll
  for (int i = 0; i < kOwn; ++i) gain.v[i] = (1.0f + gain.v[i]) * p.weight[at.channel + i];
  return gain;
}

__device__ __forceinline__ Eight factor_of(const AdalnParams& p, const Place& at) {
  Eight factor = modulation_of(p, at, 2);
  const float keep = p.keep ? p.keep[at.batch] : 1.0f;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) factor.v[i] = (1.0f + factor.v[i]) * keep;
  return factor;
}

// Adds each of kCount values over the block; every thread gets the sums. buffer: alternates from call
// to call, so that one barrier is enough.
template <int kCount>
__device__ __forceinline__ void add_threads(float* values, float (*buffer)[kWarps]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i)
#pragma unroll
    for (int stage = 16; stage > 0; stage /= 2)
      values[i] += __shfl_xor_sync(0xffffffffu, values[i], stage);
  const int warps = blockDim.x / 32;
  if (warps == 1) return;
  if (threadIdx.x % 32 == 0)
#pragma unroll
    for (int i = 0; i < kCount; ++i) buffer[i][threadIdx.x / 32] = values[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    values[i] = 0.0f;
    for (int w = 0; w < warps; ++w) values[i] += buffer[i][w];
  }
}

// A part of a sum over tokens.
__device__ __forceinline__ void store_part(float* parts, const AdalnParams& p, const Place& at,
                                           const Eight& sum) {
  if (!at.valid) return;
  float* to = parts + (at.chunk * p.batch + at.batch) * p.dim + at.channel;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) to[i] = sum.v[i];
}
