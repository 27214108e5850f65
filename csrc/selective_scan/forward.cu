// Selective scan, the walk in one direction: outputs, end states of segments, states saved for the
// backward, or the backward's carry across segments. Definition: selective_scan_ref.
//
// A block owns kChannels neighbouring channels of one batch entry and one segment of the steps. Its
// kGroups groups of threads share the kStates states of each channel; a thread has its states and
// its row of A in registers and walks the steps in tiles of kTile. Per tile, B and C are staged in
// shared memory as float32; with several groups, so are the step sizes and inputs, which each group
// computes for every kGroups-th step, and the partial outputs.
//
// -D: kInput (element type), kStates (padded; kGroups * multiple of 4), kGroups, kChannels, kTile,
// kPass (0 .. 3, below), kMinBlocks (blocks a multiprocessor that registers must allow).
#include "common/math.cuh"
#include "selective_scan/params.cuh"

constexpr bool kOutputs = kPass == 0;      // y, and the last state
constexpr bool kEndState = kPass == 1;     // a segment's end state from 0, and its sum of steps
constexpr bool kSaves = kPass == 2;     // the state before every kStride steps
constexpr bool kCarry = kPass == 3;        // the backward's: dh = decay (dh + C dy), last to first

constexpr bool kGated = kOutputs || kCarry;  // reads z
constexpr int kThreads = kChannels * kGroups;
constexpr int kStatesPerThread = kStates / kGroups;
constexpr int kStaged = (kTile * kStates + kThreads - 1) / kThreads;
constexpr int kScalars = kTile / kGroups;  // steps of a tile whose scalars this thread computes
static_assert(kStatesPerThread % 4 == 0 && kTile % kGroups == 0 && kTile <= kThreads, "");
static_assert(kTile % kStride == 0, "");

struct Shared {
  float B[2][kTile][kStates];
  float C[2][kTile][kStates];
  int rows[4][kTile];  // four tiles: the one in work, the next, and one for the slowest thread
  // Only with several groups:
  float delta[2][kGroups > 1 ? kTile : 1][kChannels];
  float x[2][kGroups > 1 ? kTile : 1][kChannels];
  float y[2][kGroups > 1 ? kGroups : 1][kGroups > 1 ? kTile : 1][kChannels];
};

// Which part of the problem this thread has.
struct WalkCoord {
  Int64 batch, segment, channel;
  int column, group;  // in the block
  int first, count;   // steps of the segment
  bool valid;         // channel exists

  __device__ __forceinline__ WalkCoord(const ScanParams& p) {
    const int blocks = static_cast<int>((p.channels + kChannels - 1) / kChannels);
    batch = blockIdx.x / blocks;
    column = threadIdx.x % kChannels;
    group = threadIdx.x / kChannels;
    channel = static_cast<Int64>(blockIdx.x % blocks) * kChannels + column;
    valid = channel < p.channels;
    if (!valid) channel = p.channels - 1;
    segment = blockIdx.y + (kCarry ? 1 : 0);
    first = static_cast<int>(segment * p.segment_length);
    count = static_cast<int>(min(p.segment_length, p.length - first));
  }
  // The row of a step counted along this walk. Steps past the end repeat the last: they find the same
  // inputs, change no state, and so write the same output again. Likewise threads without a channel
  // do the last channel's work again.
  __device__ __forceinline__ int row(const ScanParams& p, int step) const {
    const int inside = min(step, count - 1);
    const int l = kCarry ? first + count - 1 - inside : first + inside;
    return p.order ? static_cast<int>(p.order[l]) : l;
  }
};

// B and C of a tile on their way from global to shared memory.
struct Staging {
  kInput B[kStaged], C[kStaged];

  __device__ __forceinline__ void load(const ScanParams& p, const WalkCoord& at, const int* rows) {
    UNROLL for (int k = 0; k < kStaged; ++k) {
      const int i = threadIdx.x + k * kThreads, n = i % kStates;
      B[k] = C[k] = from_float<kInput>(0.0f);
      if (i >= kTile * kStates || n >= p.states) continue;
      const int row = rows[i / kStates];
      if (!kCarry) B[k] = *Column<const kInput>(p.B, at.batch, n).at(row);
      if (kGated) C[k] = *Column<const kInput>(p.C, at.batch, n).at(row);
    }
  }
  __device__ __forceinline__ void store(Shared& shared, int buffer) const {
    UNROLL for (int k = 0; k < kStaged; ++k) {
      const int i = threadIdx.x + k * kThreads;
      if (i >= kTile * kStates) continue;
      if (!kCarry) shared.B[buffer][0][i] = to_float(B[k]);
      if (kGated) shared.C[buffer][0][i] = to_float(C[k]);
    }
  }
};

// The steps of a tile whose scalars this thread computes, as loaded. u is dy's source, g_y, in the backward's walk.
struct Inputs {
  kInput u[kScalars], delta[kScalars], z[kScalars];
};

// An absent z or g_y is read from delta and not used.
struct Columns {
  Column<const kInput> u, delta, z;
  bool has_u, has_z;

  __device__ __forceinline__ Columns(const ScanParams& p, const WalkCoord& at)
      : u(!kCarry ? p.u : p.g_y.data ? p.g_y : p.delta, at.batch, at.channel),
        delta(p.delta, at.batch, at.channel),
        z(p.z.data ? p.z : p.delta, at.batch, at.channel),
        has_u(!kCarry || p.g_y.data),
        has_z(kGated && p.z.data) {}

  __device__ __forceinline__ void load(Inputs& to, const int* rows, int group) const {
    UNROLL for (int k = 0; k < kScalars; ++k) {
      const int row = rows[group + k * kGroups];
      to.u[k] = *u.at(row);
      to.delta[k] = *delta.at(row);
      if (kGated) to.z[k] = *z.at(row);
    }
  }
};

__device__ __forceinline__ float gate(const Inputs& in, bool has_z, int k) {
  const float z = to_float(in.z[k]);  // the carry stays float32, so its gate is exact
  return select(has_z, kCarry ? silu<float>(z) : silu<kInput>(z), 1.0f);
}

// Step size and input of this thread's step k; steps past the end change no state.
__device__ __forceinline__ void scalars(const Inputs& in, const Columns& columns, int k,
                                        float bias, bool use_softplus, bool inside, float& delta,
                                        float& x) {
  const float raw = to_float(in.delta[k]) + bias;
  delta = select(inside, select(use_softplus, softplus(raw), raw), 0.0f);
  const float u = to_float(in.u[k]);
  x = delta * u;
  if (kCarry) x = select(inside && columns.has_u, u * gate(in, columns.has_z, k), 0.0f);
}

// The states of one thread.
struct States {
  float A[kStatesPerThread];  // times log2 e, 0 in the padding
  float h[kStatesPerThread];

  __device__ __forceinline__ States(const ScanParams& p, const WalkCoord& at) {
    UNROLL for (int n = 0; n < kStatesPerThread; ++n) {
      const int state = at.group * kStatesPerThread + n;
      A[n] = state < p.states ? p.A[at.channel * p.states + state] * kLog2e : 0.0f;
      h[n] = 0.0f;
    }
  }
  // The state at the start of this segment, from the segments before it.
  __device__ __forceinline__ void start(const ScanParams& p, const WalkCoord& at) {
    for (Int64 s = 0; s < at.segment; ++s) {
      const Int64 row = s * p.batch + at.batch;
      const float delta = p.segment_delta[row * p.channels + at.channel];
      UNROLL for (int n = 0; n < kStatesPerThread; ++n) {
        const Int64 state = row * kStates + at.group * kStatesPerThread + n;
        h[n] = fmaf(decay_of(delta, A[n]), h[n], p.segment_state[state * p.channels + at.channel]);
      }
    }
  }
  // The gradient of the last state, where the backward's walk begins.
  __device__ __forceinline__ void start_carry(const ScanParams& p, const WalkCoord& at) {
    if (at.segment != p.segments - 1 || !p.g_last_state) return;
    UNROLL for (int n = 0; n < kStatesPerThread; ++n) {
      const int state = at.group * kStatesPerThread + n;
      if (state < p.states)
        h[n] = p.g_last_state[(at.batch * p.channels + at.channel) * p.states + state];
    }
  }
  // One step; returns this thread's part of C h.
  __device__ __forceinline__ float step(float delta, float x, const float* B, const float* C) {
    float y = 0.0f;
    UNROLL for (int q = 0; q < kStatesPerThread; q += 4) {
      float4 b, c;
      if (!kCarry) b = *reinterpret_cast<const float4*>(B + q);
      if (kGated) c = *reinterpret_cast<const float4*>(C + q);
      const float b4[4] = {b.x, b.y, b.z, b.w}, c4[4] = {c.x, c.y, c.z, c.w};
      UNROLL for (int j = 0; j < 4; ++j) {
        const float decay = decay_of(delta, A[q + j]);
        if (kCarry) {
          h[q + j] = decay * fmaf(x, c4[j], h[q + j]);
        } else {
          h[q + j] = fmaf(decay, h[q + j], x * b4[j]);
          if (kOutputs) y = fmaf(h[q + j], c4[j], y);
        }
      }
    }
    return y;
  }
  __device__ __forceinline__ void store(float* to, Int64 stride) const {
    UNROLL for (int n = 0; n < kStatesPerThread; ++n) to[n * stride] = h[n];
  }
};

// to: of the thread's first states, a row for each 4 of them; moves on by kStride steps. Threads
// without a channel store the last one's once more.
__device__ __forceinline__ void save_state(Column<float4>& to, const States& states, bool real) {
  UNROLL for (int q = 0; q < kStatesPerThread / 4; ++q) {
    const float* h = states.h + 4 * q;
    if (real) *to.at(q) = make_float4(h[0], h[1], h[2], h[3]);
  }
  to.first = __cvta_generic_to_global(to.at(kStates / 4));
}

__device__ __forceinline__ void store_end(const ScanParams& p, const WalkCoord& at,
                                          const States& states, float delta_sum) {
  if (!at.valid || kSaves) return;
  if (kOutputs) {
    if (!p.last_state || at.segment != p.segments - 1) return;
    UNROLL for (int n = 0; n < kStatesPerThread; ++n) {
      const int state = at.group * kStatesPerThread + n;
      if (state < p.states)
        p.last_state[(at.batch * p.channels + at.channel) * p.states + state] = states.h[n];
    }
    return;
  }
  const Int64 row = (at.segment - (kCarry ? 1 : 0)) * p.batch + at.batch;
  float* state = kCarry ? p.carry_state : p.segment_state;
  float* delta = kCarry ? p.carry_delta : p.segment_delta;
  states.store(state + (row * kStates + at.group * kStatesPerThread) * p.channels + at.channel,
               p.channels);
  if (at.group == 0) delta[row * p.channels + at.channel] = delta_sum;
}

// y of this thread's step k of a tile, its states' part being given.
__device__ __forceinline__ void store_output(const Column<kInput>& y, const int* rows,
                                             const Inputs& in, bool has_z, float skip, int group,
                                             int k, float sum) {
  const float value = fmaf(skip, to_float(in.u[k]), sum) * gate(in, has_z, k);
  *y.at(rows[group + k * kGroups]) = from_float<kInput>(value);
}

extern "C" __global__ void __launch_bounds__(kThreads, kMinBlocks)
    scan_forward(const __grid_constant__ ScanParams p) {
  __shared__ Shared shared;
  const WalkCoord at(p);
  const Columns columns(p, at);
  const Column<kInput> y(p.y, at.batch, at.channel);
  const float skip = kOutputs && p.D ? p.D[at.channel] : 0.0f;
  const float bias = p.delta_bias ? p.delta_bias[at.channel] : 0.0f;
  const bool use_softplus = p.delta_softplus;
  States states(p, at);
  if (kOutputs || kSaves) states.start(p, at);
  if (kCarry) states.start_carry(p, at);

  const int tiles = (at.count + kTile - 1) / kTile;
  const int thread = threadIdx.x;
  if (thread < kTile) shared.rows[0][thread] = at.row(p, thread);
  int next_row = at.row(p, kTile + thread % kTile);
  __syncthreads();
  Staging staging;
  staging.load(p, at, shared.rows[0]);
  Inputs next, now, before;
  if (kGroups > 1) columns.load(next, shared.rows[0], at.group);

  // Several groups add up their parts of y; a tile's sum is taken after the next barrier.
  auto store_sums = [&](int tile, const Inputs& in) {
    UNROLL for (int k = 0; k < kScalars; ++k) {
      const int t = at.group + k * kGroups;
      float sum = 0.0f;
      UNROLL for (int g = 0; g < kGroups; ++g)
        sum += shared.y[tile & 1][kGroups > 1 ? g : 0][kGroups > 1 ? t : 0][at.column];
      store_output(y, shared.rows[tile & 3], in, columns.has_z, skip, at.group, k, sum);
    }
  };

  const Int64 slots = (p.length + kStride - 1) / kStride * (kStates / 4);
  const int slot = at.first / kStride * (kStates / 4) + at.group * (kStatesPerThread / 4);
  Column<float4> saved({p.saved_states, slots * p.channels, p.channels}, at.batch,
                       slot * p.channels + at.channel);
  float delta_sum = 0.0f;
  for (int tile = 0; tile < tiles; ++tile) {
    const int buffer = tile & 1, left = at.count - tile * kTile;
    if (kGroups == 1) columns.load(now, shared.rows[tile & 3], 0);
    if (kGroups > 1) {
      now = next;
      UNROLL for (int k = 0; k < kScalars; ++k) {
        const int t = at.group + k * kGroups;
        scalars(now, columns, k, bias, use_softplus, t < left,
                shared.delta[buffer][kGroups > 1 ? t : 0][at.column],
                shared.x[buffer][kGroups > 1 ? t : 0][at.column]);
      }
    }
    staging.store(shared, buffer);
    if (thread < kTile) shared.rows[(tile + 1) & 3][thread] = next_row;
    __syncthreads();
    if (kGroups > 1 && kOutputs && tile > 0) store_sums(tile - 1, before);
    next_row = at.row(p, (tile + 2) * kTile + thread % kTile);
    if (tile + 1 < tiles) {
      staging.load(p, at, shared.rows[(tile + 1) & 3]);
      if (kGroups > 1) columns.load(next, shared.rows[(tile + 1) & 3], at.group);
    }
    UNROLL for (int t = 0; t < kTile; ++t) {
      if (kSaves && t % kStride == 0) save_state(saved, states, t < left);
      float delta, x;
      if (kGroups == 1) {
        scalars(now, columns, t % kScalars, bias, use_softplus, t < left, delta, x);
      } else {
        delta = shared.delta[buffer][t * (kGroups > 1)][at.column];
        x = shared.x[buffer][t * (kGroups > 1)][at.column];
      }
      const int offset = at.group * kStatesPerThread;
      const float sum = states.step(delta, x, shared.B[buffer][t] + offset,
                                    shared.C[buffer][t] + offset);
      if (kEndState || kCarry) delta_sum += delta;
      if (!kOutputs) continue;
      if (kGroups > 1)
        shared.y[buffer][at.group % kGroups][t * (kGroups > 1)][at.column] = sum;
      else
        store_output(y, shared.rows[tile & 3], now, columns.has_z, skip, 0, t % kScalars, sum);
    }
    if (kGroups > 1) before = now;
  }
  if (kGroups > 1 && kOutputs) {
    __syncthreads();
    store_sums(tiles - 1, before);
  }
  store_end(p, at, states, delta_sum);
}
