// What both passes of the causal convolution share: parameters, and a thread's kVector channels.
//
// A thread owns kVector neighbouring channels of one batch entry and walks one chunk of the steps,
// first to last, the last kWidth rows in registers.
//
// -D: kInput (element type), kWidth, kVector, kThreads.
#pragma once
#include "common/math.cuh"
#include "common/types.cuh"

struct ConvParams {
  Int64 batch, length, channels, silu;
  Int64 chunks, chunk_length;
  Rows x, y, g_y, g_x;
  const float *weight, *bias;
  const Int64* order;
  float* parts_weight;  // (B * chunks, D, kWidth)
  float* parts_bias;    // (B * chunks, D)
};
static_assert(sizeof(ConvParams) == 6 * 8 + 4 * 24 + 5 * 8, "mirrored by launch_plan.py");

// Which part of the problem a thread has.
struct ConvCoord {
  Int64 batch, chunk, channel;
  int first, end;  // steps of the chunk
  int valid;       // channels that exist, of kVector

  __device__ __forceinline__ ConvCoord(const ConvParams& p) {
    constexpr int kChannels = kThreads * kVector;
    const int blocks = static_cast<int>((p.channels + kChannels - 1) / kChannels);
    batch = blockIdx.x / blocks;
    channel = static_cast<Int64>(blockIdx.x % blocks) * kChannels + threadIdx.x * kVector;
    valid = static_cast<int>(max(Int64(0), min(Int64(kVector), p.channels - channel)));
    chunk = blockIdx.y;
    first = static_cast<int>(chunk * p.chunk_length);
    end = static_cast<int>(min(p.length, first + p.chunk_length));
  }
};

__device__ __forceinline__ int row_of(const ConvParams& p, int step) {
  return p.order ? static_cast<int>(p.order[step]) : step;
}

// May rows be read and written kVector elements at a time?
__device__ __forceinline__ bool aligned(const Rows& rows) {
  const Int64 bytes = reinterpret_cast<Int64>(rows.data) |
                      (rows.batch_stride | rows.row_stride) * sizeof(kInput);
  return bytes % (kVector * sizeof(kInput)) == 0;
}

typedef Packed<kInput, kVector> RawVec;
typedef Vec<float, kVector> FloatVec;

template <bool kAligned>
__device__ __forceinline__ RawVec load(const kInput* from, int valid) {
  if (kAligned) return *reinterpret_cast<const RawVec*>(from);
  RawVec raw;
  UNROLL for (int i = 0; i < kVector; ++i)
    raw.v[i] = i < valid ? from[i] : from_float<kInput>(0.0f);
  return raw;
}

template <bool kAligned>
__device__ __forceinline__ void store(kInput* to, const FloatVec& x, int valid) {
  const RawVec raw = narrow<RawVec, kInput>(x);
  if (kAligned) {
    *reinterpret_cast<RawVec*>(to) = raw;
    return;
  }
  UNROLL for (int i = 0; i < kVector; ++i)
    if (i < valid) to[i] = raw.v[i];
}

// Weights and bias of this thread's channels; 0 where there is no channel.
struct Filter {
  float weight[kWidth][kVector];
  FloatVec bias;

  __device__ __forceinline__ Filter(const ConvParams& p, const ConvCoord& at) {
    UNROLL for (int i = 0; i < kVector; ++i) {
      const bool valid = i < at.valid;
      bias.v[i] = valid && p.bias ? p.bias[at.channel + i] : 0.0f;
      UNROLL for (int w = 0; w < kWidth; ++w)
        weight[w][i] = valid ? p.weight[(at.channel + i) * kWidth + w] : 0.0f;
    }
  }
};

// The last kWidth rows of a walk, newest last.
struct Window {
  FloatVec row[kWidth];

  __device__ __forceinline__ void push(const FloatVec& next) {
    UNROLL for (int w = 0; w + 1 < kWidth; ++w) row[w] = row[w + 1];
    row[kWidth - 1] = next;
  }
  // The rows before a chunk; zeros before the first step.
  template <bool kAligned>
  __device__ __forceinline__ void fill(const ConvParams& p, const ConvCoord& at,
                                       const Column<const kInput>& x) {
    UNROLL for (int w = 1; w < kWidth; ++w) {
      const int step = at.first - kWidth + w;
      row[w] = FloatVec{};
      if (step >= 0) row[w] = widen(load<kAligned>(x.at(row_of(p, step)), at.valid));
    }
  }
  // The convolution at the newest row.
  __device__ __forceinline__ FloatVec convolve(const Filter& filter) const {
    FloatVec sum = filter.bias;
    UNROLL for (int w = 0; w < kWidth; ++w)
      UNROLL for (int i = 0; i < kVector; ++i)
        sum.v[i] = fmaf(filter.weight[w][i], row[w].v[i], sum.v[i]);
    return sum;
  }
};
