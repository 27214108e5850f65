// What both passes of the causal convolution share: parameters, and a thread's kVector channels.
//
// A thread owns kVector neighbouring channels of one batch entry and walks one chunk of the steps,
// first to last, the last kWidth rows in registers.
//
// -D: kInput (element type), kWidth, kVector (divides channels; rows are aligned to it), kThreads.
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
  bool valid;      // channels exist

  __device__ __forceinline__ ConvCoord(const ConvParams& p) {
    constexpr int kChannels = kThreads * kVector;
    const int blocks = static_cast<int>((p.channels + kChannels - 1) / kChannels);
    batch = blockIdx.x / blocks;
    channel = static_cast<Int64>(blockIdx.x % blocks) * kChannels + threadIdx.x * kVector;
    valid = channel < p.channels;
    chunk = blockIdx.y;
    first = static_cast<int>(chunk * p.chunk_length);
    end = static_cast<int>(min(p.length, first + p.chunk_length));
  }
};

__device__ __forceinline__ int row_of(const ConvParams& p, int step) {
  return p.order ? static_cast<int>(p.order[step]) : step;
}

typedef Packed<kInput, kVector> RawVec;
typedef Vec<float, kVector> FloatVec;

__device__ __forceinline__ RawVec load(const kInput* from) {
  return *reinterpret_cast<const RawVec*>(from);
}

__device__ __forceinline__ void store(kInput* to, const FloatVec& x) {
  *reinterpret_cast<RawVec*>(to) = narrow<RawVec, kInput>(x);
}

// Weights and bias of this thread's channels.
struct Filter {
  float weight[kWidth][kVector];
  FloatVec bias;

  __device__ __forceinline__ Filter(const ConvParams& p, const ConvCoord& at) {
    UNROLL for (int i = 0; i < kVector; ++i) {
      bias.v[i] = p.bias[at.channel + i];
      UNROLL for (int w = 0; w < kWidth; ++w) weight[w][i] = p.weight[(at.channel + i) * kWidth + w];
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
  __device__ __forceinline__ void fill(const ConvParams& p, const ConvCoord& at,
                                       const Column<const kInput>& x) {
    UNROLL for (int w = 1; w < kWidth; ++w) {
      const int step = at.first - kWidth + w;
      row[w] = FloatVec{};
      if (step >= 0) row[w] = widen(load(x.at(row_of(p, step))));
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
