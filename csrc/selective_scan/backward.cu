// Selective scan, the backward's walk from the last step to the first; gradients of every input.
//
// For each tile of kTile steps, last to first, a thread takes the state before it (from the pass
// kCheckpoints of forward.cu), replays the tile, keeping every step's state in shared memory and
// writing dz, then walks back:
//   g = C dy + dh;  dC += dy h;  dB += g delta u;  dh = g decay  (dh: gradient of the state after)
//   ddelta = sum_n g decay h_before A + u sum_n g B,  dA += g decay h_before delta
// dB and dC, sums over channels, are added over a warp's lanes, then over warps in shared memory, and
// written as parts, one a block; dA, dD and ddelta_bias, sums over steps, stay in registers and are
// written as parts, one a batch entry and segment. sum_parts.cu adds the parts in a fixed order, so
// that the gradients are bit-equal in every run.
//
// -D: kInput, kStates, kGroups, kChannels (a multiple of 32), kTile, as in forward.cu; kMinBlocks
// (blocks a multiprocessor that registers must allow), kSharedBytes (sizeof Shared).
#include "common/lane_sums.cuh"
#include "common/math.cuh"
#include "selective_scan/params.cuh"

// Other GPUs have too little shared memory for more than 4 blocks, so registers need not make room.
constexpr int kResident =
    __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200 || kMinBlocks < 4 ? kMinBlocks : 4;
constexpr int kThreads = kChannels * kGroups;
constexpr int kStatesPerThread = kStates / kGroups;
constexpr int kQuads = kStatesPerThread / 4;
constexpr int kStaged = (kTile * kStates + kThreads - 1) / kThreads;
constexpr int kWarps = kThreads / 32, kWarpsPerGroup = kChannels / 32;
constexpr bool kSplit = kGroups > 1;
static_assert(kStatesPerThread % 4 == 0 && kStatesPerThread <= 16 && kChannels % 32 == 0, "");
static_assert(kTile % kGroups == 0 && kTile <= kThreads && 2 * kStates <= kThreads, "");

// The inputs of one step. They wait in shared memory: in registers a tile of them needs more than
// 255, and reading them there again lets the loops over steps stay rolled.
struct Gate {
  kInput z, g_y;
};

struct alignas(4 * sizeof(kInput)) Step {
  kInput u, delta;
  union {
    Gate gate;
    float dy;  // gradient of y before the gate, put here by the replay, which z and g_y end in
  };
};

struct Shared {
  float4 history[kTile - 1][kQuads][kThreads];  // the state after each step but the last
  Step in[kTile][kThreads];                     // a thread reads its own only
  float B[kTile][kStates];
  float C[kTile][kStates];
  float sums[kWarps][kTile][2 * kStatesPerThread];  // of dB and dC over a warp's channels
  int rows[4][kTile];
  // Only with several groups: their parts of y, sum_n g B and sum_n g decay h A.
  float parts[kSplit ? 3 : 1][kSplit ? kGroups : 1][kSplit ? kTile : 1][kSplit ? kChannels : 1];
};

struct Place {
  Int64 batch, segment, channel, block;
  int column, group;
  int first, count;  // steps of the segment
  bool valid;

  __device__ __forceinline__ Place(const ScanParams& p) {
    const int blocks = static_cast<int>((p.channels + kChannels - 1) / kChannels);
    batch = blockIdx.x / blocks;
    block = blockIdx.x % blocks;
    column = threadIdx.x % kChannels;
    group = threadIdx.x / kChannels;
    channel = block * kChannels + column;
    valid = channel < p.channels;
    if (!valid) channel = p.channels - 1;
    segment = blockIdx.y;
    first = static_cast<int>(segment * p.segment_length);
    count = static_cast<int>(min(p.segment_length, p.length - first));
  }
  // Steps before the first (of the tile before it) and after the last repeat the nearest. Those past
  // the end are walked first, change nothing, and what they write is overwritten by the last step.
  // Threads without a channel do the last channel's work again, but add nothing to dB and dC.
  __device__ __forceinline__ int row(const ScanParams& p, int step) const {
    const int l = first + max(0, min(step, count - 1));
    return p.order ? static_cast<int>(p.order[l]) : l;
  }
};

struct Staging {
  kInput B[kStaged], C[kStaged];

  __device__ __forceinline__ void load(const ScanParams& p, const Place& at, const int* rows) {
#pragma unroll
    for (int k = 0; k < kStaged; ++k) {
      const int i = threadIdx.x + k * kThreads, n = i % kStates;
      B[k] = C[k] = from_float<kInput>(0.0f);
      if (i >= kTile * kStates || n >= p.states) continue;
      B[k] = *Column<const kInput>(p.B, at.batch, n).at(rows[i / kStates]);
      C[k] = *Column<const kInput>(p.C, at.batch, n).at(rows[i / kStates]);
    }
  }
  __device__ __forceinline__ void store(Shared& shared) const {
#pragma unroll
    for (int k = 0; k < kStaged; ++k) {
      const int i = threadIdx.x + k * kThreads;
      if (i >= kTile * kStates) continue;
      shared.B[0][i] = to_float(B[k]);
      shared.C[0][i] = to_float(C[k]);
    }
  }
};

// An absent z or g_y is read from u and not used.
struct Columns {
  Column<const kInput> u, delta, z, g_y;
  bool has_z, has_g_y;

  __device__ __forceinline__ Columns(const ScanParams& p, const Place& at)
      : u(p.u, at.batch, at.channel), delta(p.delta, at.batch, at.channel),
        z(p.z.data ? p.z : p.u, at.batch, at.channel),
        g_y(p.g_y.data ? p.g_y : p.u, at.batch, at.channel),
        has_z(p.z.data), has_g_y(p.g_y.data) {}

  __device__ __forceinline__ Step load(int row) const {
    Step in;
    in.u = *u.at(row);
    in.delta = *delta.at(row);
    in.gate.z = *z.at(row);
    const kInput g = *g_y.at(row);
    in.gate.g_y = has_g_y ? g : from_float<kInput>(0.0f);
    return in;
  }
};

struct Outputs {
  Column<kInput> g_u, g_delta, g_z;
  bool has_z;

  __device__ __forceinline__ Outputs(const ScanParams& p, const Place& at)
      : g_u(p.g_u, at.batch, at.channel), g_delta(p.g_delta, at.batch, at.channel),
        g_z(p.g_z, at.batch, at.channel), has_z(p.z.data) {}
};

// What every thread of a channel knows.
struct Channel {
  float skip, bias;
  bool use_softplus;

  __device__ __forceinline__ Channel(const ScanParams& p, const Place& at)
      : skip(p.D ? p.D[at.channel] : 0.0f), bias(p.delta_bias ? p.delta_bias[at.channel] : 0.0f),
        use_softplus(p.delta_softplus) {}
  // The step size and its derivative by the input, both 0 past the end.
  __device__ __forceinline__ float delta(const Step& in, bool inside, float& derivative) const {
    const float raw = to_float(in.delta) + bias;
    derivative = select(inside, select(use_softplus, softplus_derivative(raw), 1.0f), 0.0f);
    return select(inside, select(use_softplus, softplus(raw), raw), 0.0f);
  }
};

// Sums over steps of the gradients of D and of delta_bias, first a tile's, then of tiles: one sum
// over thousands of steps would lose digits that the reference keeps.
struct StepSums {
  float skip = 0.0f, bias = 0.0f, tile_skip = 0.0f, tile_bias = 0.0f;

  __device__ __forceinline__ void close_tile() {
    skip += tile_skip;
    bias += tile_bias;
    tile_skip = tile_bias = 0.0f;
  }
};

__device__ __forceinline__ float gradient_of_sum(const Step& in, bool has_z) {
  return to_float(in.gate.g_y) * select(has_z, silu(to_float(in.gate.z)), 1.0f);
}

// Writes dz of a step and returns dy. y: C h, without the skip.
__device__ __forceinline__ float gate_backward(const Channel& channel, const Outputs& outputs,
                                               const Step& in, int row, float y, bool inside) {
  const float g_y = to_float(in.gate.g_y), z = to_float(in.gate.z), s = sigmoid(z);
  const float g_z = g_y * fmaf(to_float(in.u), channel.skip, y) * silu_derivative(z, s);
  if (outputs.has_z) *outputs.g_z.at(row) = from_float<kInput>(g_z);
  return select(inside, g_y * select(outputs.has_z, z * s, 1.0f), 0.0f);
}

// Writes the gradients of one step's u and delta, the sums over states being given.
__device__ __forceinline__ void store_step(const Channel& channel, const Outputs& outputs, float u,
                                           int row, float delta, float derivative, float dy,
                                           float g_B, float g_decay, StepSums& sums) {
  const float g_u = fmaf(delta, g_B, dy * channel.skip);
  const float g_delta = fmaf(g_decay, kLn2, u * g_B) * derivative;
  sums.tile_skip = fmaf(dy, u, sums.tile_skip);
  sums.tile_bias += g_delta;
  *outputs.g_u.at(row) = from_float<kInput>(g_u);
  *outputs.g_delta.at(row) = from_float<kInput>(g_delta);
}

// The states kept before each tile; quad(q) is 4 of this thread's.
struct Checkpoint {
  const float4* first;
  Int64 stride;

  __device__ __forceinline__ Checkpoint(const ScanParams& p, const Place& at, int tile)
      : stride(p.channels) {
    const Int64 tiles = (p.length + kTile - 1) / kTile;
    const Int64 slot = (at.batch * tiles + at.first / kTile + tile) * (kStates / 4);
    first = reinterpret_cast<const float4*>(p.checkpoints) +
            (slot + at.group * kQuads) * stride + at.channel;
  }
  __device__ __forceinline__ float4 quad(int q) const { return first[q * stride]; }
};

struct States {
  float A[kStatesPerThread];    // times log2 e
  float h[kStatesPerThread];    // state after the step in work
  float g_h[kStatesPerThread];  // its gradient from later steps
  float g_A[kStatesPerThread];

  __device__ __forceinline__ States(const ScanParams& p, const Place& at) {
#pragma unroll
    for (int n = 0; n < kStatesPerThread; ++n) {
      const int state = at.group * kStatesPerThread + n;
      const bool real = state < p.states;
      A[n] = real ? p.A[at.channel * p.states + state] * kLog2e : 0.0f;
      h[n] = g_h[n] = g_A[n] = 0.0f;
      if (real && p.g_last_state && at.segment == p.segments - 1)
        g_h[n] = p.g_last_state[(at.batch * p.channels + at.channel) * p.states + state];
    }
    carry(p, at);
  }
  // The gradient that enters this segment at its end, from the segments after it.
  __device__ __forceinline__ void carry(const ScanParams& p, const Place& at) {
    for (Int64 s = p.segments - 2; s >= at.segment; --s) {
      const Int64 row = s * p.batch + at.batch;
      const float delta = p.carry_delta[row * p.channels + at.channel];
#pragma unroll
      for (int n = 0; n < kStatesPerThread; ++n) {
        const Int64 state = row * kStates + at.group * kStatesPerThread + n;
        g_h[n] = fmaf(decay_of(delta, A[n]), g_h[n], p.carry_state[state * p.channels + at.channel]);
      }
    }
  }
  __device__ __forceinline__ void load(const Checkpoint& from) {
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      const float4 v = from.quad(q);
      h[4 * q] = v.x, h[4 * q + 1] = v.y, h[4 * q + 2] = v.z, h[4 * q + 3] = v.w;
    }
  }
  // One step forwards, keeping the state after it; returns this thread's part of C h.
  __device__ __forceinline__ float replay(Shared& shared, int t, int offset, float delta,
                                          float x) {
    float y = 0.0f;
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      const float4 b = *reinterpret_cast<const float4*>(&shared.B[t][offset + 4 * q]);
      const float4 c = *reinterpret_cast<const float4*>(&shared.C[t][offset + 4 * q]);
      const float b4[4] = {b.x, b.y, b.z, b.w}, c4[4] = {c.x, c.y, c.z, c.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int n = 4 * q + j;
        h[n] = fmaf(decay_of(delta, A[n]), h[n], x * b4[j]);
        y = fmaf(h[n], c4[j], y);
      }
      if (t < kTile - 1)
        shared.history[t][q][threadIdx.x] =
            make_float4(h[4 * q], h[4 * q + 1], h[4 * q + 2], h[4 * q + 3]);
    }
    return y;
  }
  // One step backwards. summed: factor of what is added to dB and dC. g_B and g_decay: this thread's
  // parts of the sums over states.
  __device__ __forceinline__ void back(const Shared& shared, const Checkpoint& checkpoint,
                                       int t, int offset, float delta, float x, float dy,
                                       float summed, float& g_B, float& g_decay,
                                       LaneSums<kStatesPerThread>& lane_sums) {
    g_B = g_decay = 0.0f;
    const float x_summed = x * summed, dy_summed = dy * summed;
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      const float4 before = t > 0 ? shared.history[t - 1][q][threadIdx.x] : checkpoint.quad(q);
      const float4 b = *reinterpret_cast<const float4*>(&shared.B[t][offset + 4 * q]);
      const float4 c = *reinterpret_cast<const float4*>(&shared.C[t][offset + 4 * q]);
      const float h4[4] = {before.x, before.y, before.z, before.w};
      const float b4[4] = {b.x, b.y, b.z, b.w}, c4[4] = {c.x, c.y, c.z, c.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int n = 4 * q + j;
        const float g = fmaf(c4[j], dy, g_h[n]);
        lane_sums.add(n, g * x_summed, dy_summed * h[n]);
        g_B = fmaf(g, b4[j], g_B);
        g_h[n] = g * decay_of(delta, A[n]);
        const float g_exponent = g_h[n] * h4[j];
        g_A[n] = fmaf(g_exponent, delta, g_A[n]);
        g_decay = fmaf(g_exponent, A[n], g_decay);
        h[n] = h4[j];
      }
    }
  }
};

// Adds dB and dC of a tile over the warps of a group and writes the block's part.
__device__ __forceinline__ void store_BC(const ScanParams& p, const Place& at,
                                         const Shared& shared, const int* rows, int left) {
  constexpr int kColumns = 2 * kStates, kTogether = kThreads / kColumns;
  const int column = threadIdx.x % kColumns, kind = column / kStates, n = column % kStates;
  if (n >= p.states || threadIdx.x >= kTogether * kColumns) return;
  const int group = n / kStatesPerThread, value = kind * kStatesPerThread + n % kStatesPerThread;
  float* to = p.parts_BC + ((at.block * 2 + kind) * p.batch + at.batch) * p.length * p.states + n;
#pragma unroll
  for (int first = 0; first < kTile; first += kTogether) {
    const int t = first + threadIdx.x / kColumns;
    if (t >= min(left, kTile)) break;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarpsPerGroup; ++w)
      sum += shared.sums[group * kWarpsPerGroup + w][t][value];
    to[static_cast<Int64>(rows[t]) * static_cast<int>(p.states)] = sum;
  }
}

// With several groups: the gradients of this thread's own steps of a tile, all parts being there.
__device__ __forceinline__ void store_own_steps(const Channel& channel, const Outputs& outputs,
                                                const Place& at, const Shared& shared,
                                                const int* rows, int left, StepSums& sums) {
  for (int t = at.group; t < kTile; t += kGroups) {
    if (t >= left) break;
    const Step in = shared.in[t][threadIdx.x];
    float total[3] = {};
#pragma unroll
    for (int i = 0; i < 3; ++i)
#pragma unroll
      for (int g = 0; g < kGroups; ++g)
        total[i] += shared.parts[i * kSplit][g * kSplit][t * kSplit][at.column * kSplit];
    float derivative;
    const float delta = channel.delta(in, true, derivative);
    const float dy = gate_backward(channel, outputs, in, rows[t], total[0], true);
    store_step(channel, outputs, to_float(in.u), rows[t], delta, derivative, dy, total[1],
               total[2], sums);
  }
}

__device__ __forceinline__ void store_parts(const ScanParams& p, const Place& at,
                                            const States& states, const StepSums& sums) {
  if (!at.valid) return;
  const Int64 part = at.batch * p.segments + at.segment;
  float* g_A = p.parts_A + (part * p.channels + at.channel) * p.states;
#pragma unroll
  for (int n = 0; n < kStatesPerThread; ++n) {
    const int state = at.group * kStatesPerThread + n;
    if (state < p.states) g_A[state] = states.g_A[n];
  }
  const Int64 slot = (part * kGroups + at.group) * p.channels + at.channel;
  p.parts_D[slot] = sums.skip;
  p.parts_bias[slot] = sums.bias;
}

extern "C" __global__ void __launch_bounds__(kThreads, kResident)
    scan_backward(const __grid_constant__ ScanParams p) {
  extern __shared__ __align__(16) unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  static_assert(sizeof(Shared) <= kSharedBytes, "computed by libs/ops/launch_plan.py");
  const Place at(p);
  const Columns columns(p, at);
  const Outputs outputs(p, at);
  const Channel channel(p, at);
  States states(p, at);
  StepSums step_sums;
  const int thread = threadIdx.x, offset = at.group * kStatesPerThread;
  const float summed = at.valid ? 1.0f : 0.0f;

  const int tiles = (at.count + kTile - 1) / kTile;
  if (thread < kTile) shared.rows[(tiles - 1) & 3][thread] = at.row(p, (tiles - 1) * kTile + thread);
  int next_row = at.row(p, (tiles - 2) * kTile + thread % kTile);
  __syncthreads();
  Staging staging;
  staging.load(p, at, shared.rows[(tiles - 1) & 3]);

  for (int tile = tiles - 1; tile >= 0; --tile) {
    const int left = at.count - tile * kTile;
    const int* rows = shared.rows[tile & 3];
    staging.store(shared);
    if (thread < kTile) shared.rows[(tile + 3) & 3][thread] = next_row;
    Step loaded[kTile];
#pragma unroll
    for (int t = 0; t < kTile; ++t) loaded[t] = columns.load(rows[t]);
    const Checkpoint checkpoint(p, at, tile);
    states.load(checkpoint);
#pragma unroll
    for (int t = 0; t < kTile; ++t) shared.in[t][thread] = loaded[t];
    __syncthreads();
    // Rolled: unrolling twice saves 2% of the instructions, needs more than 168 registers and is not
    // faster.
#pragma unroll 1
    for (int t = 0; t < kTile; ++t) {
      const Step in = shared.in[t][thread];
      float derivative;
      const float delta = channel.delta(in, t < left, derivative);
      const float y = states.replay(shared, t, offset, delta, delta * to_float(in.u));
      if constexpr (kSplit)
        shared.parts[0][at.group][t][at.column] = y;
      else
        shared.in[t][thread].dy =
            gate_backward(channel, outputs, in, rows[t], y, t < left);
    }
#pragma unroll 1
    for (int t = kTile - 1; t >= 0; --t) {
      const Step in = shared.in[t][thread];
      const float dy =
          kSplit ? select(t < left, gradient_of_sum(in, columns.has_z), 0.0f) : in.dy;
      float g_B, g_decay, derivative;
      const float delta = channel.delta(in, t < left, derivative);
      const float u = to_float(in.u), x = delta * u;
      LaneSums<kStatesPerThread> lane_sums;
      states.back(shared, checkpoint, t, offset, delta, x, dy, summed, g_B, g_decay, lane_sums);
      lane_sums.store(shared.sums[thread / 32][t], thread % 32);
      if constexpr (kSplit) {
        shared.parts[1][at.group][t][at.column] = g_B;
        shared.parts[2][at.group][t][at.column] = g_decay;
      } else {
        store_step(channel, outputs, u, rows[t], delta, derivative, dy, g_B, g_decay, step_sums);
      }
    }
    // Here, not before the walks: 168 registers have no room for them there.
    next_row = at.row(p, (tile - 2) * kTile + thread % kTile);
    if (tile > 0) staging.load(p, at, shared.rows[(tile + 3) & 3]);
    __syncthreads();
    store_BC(p, at, shared, rows, left);
    if constexpr (kSplit)
      store_own_steps(channel, outputs, at, shared, rows, left, step_sums);
    step_sums.close_tile();
  }
  store_parts(p, at, states, step_sums);
}
