// Selective scan, forward: y and, on request, the last state, for channels too few to give each a
// thread of its own (forward.cu). Definition: selective_scan_ref.
//
// kLanes lanes of a warp share a channel: each has kLaneStates of its 16 states in registers and walks
// all steps, in tiles of kTile. What a step needs besides, its scalars (softplus, delta u) and its
// end (adding up the lanes' parts of y; D, the gate), is dealt out over the block's threads by
// (step, channel), so that nothing is computed twice. Both directions of this exchange go through
// shared memory, and one barrier a tile serves both: between two barriers the block walks tile k,
// ends the steps of tile k - 1 and prepares tile k + 1.
//
// -D: kInput (element type), kLanes (4 or 8), kChannels (neighbours of one batch entry that a block
// has), kTile, kMinBlocks (blocks a multiprocessor that registers must allow).
#include "common/math.cuh"
#include "selective_scan/params.cuh"

constexpr int kStates = 16;  // fewer are padded
constexpr int kLaneStates = kStates / kLanes;  // of a channel in a lane
constexpr int kThreads = kChannels * kLanes;
constexpr int kWarpChannels = 32 / kLanes;
constexpr int kTasks = kTile / kLanes;          // (step, channel) pairs of a tile for a thread
constexpr int kRows = kTile / (kThreads / 32);  // rows of B and C for a warp
constexpr int kAhead = 4;                       // steps whose operands are read at once
// Parts of y of a step, padded so that what threads read at once lies in different banks.
constexpr int kParts = kThreads + (kLanes == 4 ? 16 : 4);
static_assert(kLanes == 4 || kLanes == 8, "");
static_assert(kTile % kLanes == 0 && kTile % kAhead == 0 && 2 * kTile <= kThreads, "");

struct Shared {
  float4 BC[2][kTile * kStates / 2];        // a step: for each lane its B, then its C
  float2 scalars[2][kChannels][kTile + 2];  // delta, delta u
  float y[2][kTile][kParts];                // [channel][lane]
  int rows[2][2][kTile];                    // of two pairs of tiles
};

// Asks for an element's line to be brought into the L2 cache.
__device__ __forceinline__ void prefetch(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(address)));
}

// Steps past the end repeat the last one's row.
__device__ __forceinline__ int row_of(const ScanParams& p, int step) {
  const int l = min(step, static_cast<int>(p.length) - 1);
  return p.order ? static_cast<int>(p.order[l]) : l;
}

// A thread's part of the walk: some states of one channel. With kLanes 4, of a warp's 8 channels:
//
//   thread   0  1  2  3  4  5  6  7   16 17 18 19 ..
//   channel  0  1  0  1  2  3  2  3    0  1  0  1
//   lane     0  0  1  1  0  0  1  1    2  2  3  3      (states 4 lane .. 4 lane + 3)
//
// Reads of 16 bytes then take 2 cycles instead of 4, both where lanes of a channel and where channels
// read the same.
struct Walk {
  int lane, column;  // of the channel; of the block
  float A[kLaneStates];     // times log2 e, 0 in the padding
  float h[kLaneStates] = {};
  float4 BC[kAhead * kLaneStates / 2], scalars[kAhead / 2];

  __device__ __forceinline__ Walk(const ScanParams& p, Int64 first_channel) {
    const int thread = threadIdx.x % 32, high = thread / 4;
    lane = thread / 2 % 2 + high / (kWarpChannels / 2) * 2;
    column = threadIdx.x / 32 * kWarpChannels + thread % 2 + high % (kWarpChannels / 2) * 2;
    const Int64 channel = min(first_channel + column, p.channels - 1);
    UNROLL for (int n = 0; n < kLaneStates; ++n)
      A[n] = state(n) < p.states ? p.A[channel * p.states + state(n)] * kLog2e : 0.0f;
  }
  __device__ __forceinline__ int state(int n) const { return lane * kLaneStates + n; }

  __device__ __forceinline__ void read(const Shared& shared, int buffer, int step) {
    const float2* of_channel = shared.scalars[buffer][column] + step;
    UNROLL for (int i = 0; i < kAhead / 2; ++i) scalars[i] = reinterpret_cast<const float4*>(of_channel)[i];
    const float4* lanes = shared.BC[buffer] + lane * (kLaneStates / 2);
    UNROLL for (int i = 0; i < kAhead * kLaneStates / 2; ++i)
      BC[i] = lanes[(step + i / (kLaneStates / 2)) * (kStates / 2) + i % (kLaneStates / 2)];
  }
  // This lane's part of y after one step.
  __device__ __forceinline__ float step(const float* delta_x, const float* B, const float* C) {
    float y = 0.0f;
    UNROLL for (int n = 0; n < kLaneStates; ++n) {
      h[n] = fmaf(decay_of(delta_x[0], A[n]), h[n], delta_x[1] * B[n]);
      y = n == 0 ? h[n] * C[n] : fmaf(h[n], C[n], y);
    }
    return y;
  }
  // A tile, the operands of its first steps having been read.
  __device__ __forceinline__ void tile(Shared& shared, int buffer) {
    UNROLL for (int first = 0; first < kTile; first += kAhead) {
      float of_steps[kAhead][2 * kLaneStates], of_channel[kAhead][2];
      memcpy(of_steps, BC, sizeof(BC));
      memcpy(of_channel, scalars, sizeof(scalars));
      if (first + kAhead < kTile) read(shared, buffer, first + kAhead);
      UNROLL for (int i = 0; i < kAhead; ++i)
        shared.y[buffer][first + i][column * kLanes + lane] =
            step(of_channel[i], of_steps[i], of_steps[i] + kLaneStates);
    }
  }
  __device__ __forceinline__ void store(const ScanParams& p, Int64 batch,
                                        Int64 first_channel) const {
    const Int64 channel = first_channel + column;
    if (channel >= p.channels) return;
    UNROLL for (int n = 0; n < kLaneStates; ++n)
      if (state(n) < p.states)
        p.last_state[(batch * p.channels + channel) * p.states + state(n)] = h[n];
  }
};

// A thread's part of the scalars and of the ends: steps first_step + k kLanes of one channel; and
// of B and C: kRows rows, one column. So that a warp writes `scalars` and reads `y` without bank
// conflicts, with 32 channels a block:
//
//   thread      0  1  2  3  4  5  6  7   64 65 66 67 ..
//   channel     0  0  1  1  2  2  3  3    0  0  1  1
//   first_step  0  1  0  1  0  1  0  1    2  3  2  3
struct Tasks {
  int column, first_step;
  int steps, stored_steps;  // of the sequence, counted from first_step; 0 stored without a channel
  Column<const kInput> u, delta, z, BC;
  Column<kInput> y;
  float skip, bias;
  bool use_softplus, has_z, has_BC;
  // The tile that is being loaded, and what the ends of two tiles will need.
  int rows[kTasks], rows_BC[kRows];
  kInput raw_u[kTasks], raw_delta[kTasks], raw_z[kTasks], raw_BC[kRows];
  float input_u[2][kTasks], gate[2][kTasks];
  kInput* to[2][kTasks];

  __device__ __forceinline__ Tasks(const ScanParams& p, Int64 batch, Int64 channel, int column,
                                   bool exists)
      : column(column),
        first_step(threadIdx.x / 2 / kChannels * 2 + threadIdx.x % 2),
        steps(static_cast<int>(p.length) - first_step),
        stored_steps(exists ? steps : 0),
        u(p.u, batch, channel),
        delta(p.delta, batch, channel),
        z(p.z.data ? p.z : p.u, batch, channel),  // an absent z is read from u and not used
        BC(threadIdx.x % 32 < kStates ? p.B : p.C, batch,
           min(static_cast<Int64>(threadIdx.x % kStates), p.states - 1)),
        y(p.y, batch, channel),
        skip(p.D ? p.D[channel] : 0.0f),
        bias(p.delta_bias ? p.delta_bias[channel] : 0.0f),
        use_softplus(p.delta_softplus),
        has_z(p.z.data),
        has_BC(threadIdx.x % kStates < p.states) {
    UNROLL for (int k = 0; k < kRows; ++k) raw_BC[k] = from_float<kInput>(0.0f);
  }
  __device__ __forceinline__ void find_rows(const int* of_tile) {
    UNROLL for (int k = 0; k < kTasks; ++k) rows[k] = of_tile[first_step + k * kLanes];
    UNROLL for (int k = 0; k < kRows; ++k) rows_BC[k] = of_tile[threadIdx.x / 32 * kRows + k];
  }
  __device__ __forceinline__ void load() {
    UNROLL for (int k = 0; k < kTasks; ++k) {
      raw_delta[k] = *delta.at(rows[k]);
      raw_u[k] = *u.at(rows[k]);
      raw_z[k] = *z.at(rows[k]);
    }
    UNROLL for (int k = 0; k < kRows; ++k)
      if (has_BC) raw_BC[k] = *BC.at(rows_BC[k]);
  }
  // What was loaded, for the walk. Steps past the end change no state. first: of the tile.
  __device__ __forceinline__ void prepare(Shared& shared, int buffer, int first) {
    UNROLL for (int k = 0; k < kTasks; ++k) {
      const int step = k * kLanes;
      const float raw = to_float(raw_delta[k]) + bias, input = to_float(raw_u[k]);
      const float size = select(first + step < steps,
                                select(use_softplus, softplus(raw), raw), 0.0f);
      shared.scalars[buffer][column][first_step + step] = make_float2(size, size * input);
      input_u[buffer][k] = input;
      gate[buffer][k] = select(has_z, silu<kInput>(to_float(raw_z[k])), 1.0f);
      to[buffer][k] = y.at(rows[k]);
    }
    const int n = threadIdx.x % kStates, is_C = threadIdx.x / kStates % 2;
    float* slot = reinterpret_cast<float*>(shared.BC[buffer]) +
                  threadIdx.x / 32 * kRows * 2 * kStates + (n / kLaneStates * 2 + is_C) * kLaneStates + n % kLaneStates;
    UNROLL for (int k = 0; k < kRows; ++k) slot[k * 2 * kStates] = to_float(raw_BC[k]);
  }
  __device__ __forceinline__ void finish(const Shared& shared, int buffer, int first) const {
    UNROLL for (int k = 0; k < kTasks; ++k) {
      const float4* parts = reinterpret_cast<const float4*>(
          shared.y[buffer][first_step + k * kLanes] + column * kLanes);
      float sum = 0.0f;
      UNROLL for (int q = 0; q < kLanes / 4; ++q) {
        const float quad = (parts[q].x + parts[q].y) + (parts[q].z + parts[q].w);
        sum = q == 0 ? quad : sum + quad;
      }
      const float value = fmaf(skip, input_u[buffer][k], sum) * gate[buffer][k];
      if (first + k * kLanes < stored_steps) *to[buffer][k] = from_float<kInput>(value);
    }
  }
};

// Rows two pairs of tiles ahead, found by the block's first threads: put into shared memory, and
// their inputs brought into the L2 cache, which hides the latency of random rows.
struct RowsAhead {
  int row;

  __device__ __forceinline__ void find(const ScanParams& p, int step) {
    if (threadIdx.x < 2 * kTile) row = row_of(p, step + threadIdx.x);
  }
  __device__ __forceinline__ void store(Shared& shared, int pair, const Tasks& tasks) const {
    if (threadIdx.x >= 2 * kTile) return;
    shared.rows[pair][0][threadIdx.x] = row;
    prefetch(tasks.delta.at(row));
    prefetch(tasks.u.at(row));
    prefetch(tasks.z.at(row));
  }
};

// Walks the tile at step `first` in this buffer; false after the last one.
template <int kBuffer>
__device__ __forceinline__ bool advance(const ScanParams& p, Shared& shared, Walk& walk,
                                        Tasks& tasks, RowsAhead& ahead, int first, int pair) {
  tasks.load();
  walk.read(shared, kBuffer, 0);
  if (kBuffer == 1 || first > 0) tasks.finish(shared, 1 - kBuffer, first - kTile);
  if (kBuffer == 0) {
    ahead.store(shared, 1 - pair, tasks);
    ahead.find(p, first + 6 * kTile);
  }
  walk.tile(shared, kBuffer);
  // Without this branch the compiler moves the wait for what is being loaded up into the walk.
  if (first + kTile >= static_cast<int>(p.length)) {
    __syncthreads();
    tasks.finish(shared, kBuffer, first);
    return false;
  }
  tasks.prepare(shared, 1 - kBuffer, first + kTile);
  tasks.find_rows(shared.rows[pair][kBuffer]);
  __syncthreads();
  return true;
}

extern "C" __global__ void __launch_bounds__(kThreads, kMinBlocks)
    scan_forward_lanes(const __grid_constant__ ScanParams p) {
  __shared__ Shared shared;
  const int blocks = static_cast<int>((p.channels + kChannels - 1) / kChannels);
  const Int64 batch = blockIdx.x / blocks;
  const Int64 first_channel = static_cast<Int64>(blockIdx.x % blocks) * kChannels;
  const int column = threadIdx.x / 2 % kChannels;
  const Int64 channel = first_channel + column;
  Walk walk(p, first_channel);
  // Threads without a channel do the last channel's work again.
  Tasks tasks(p, batch, min(channel, p.channels - 1), column, channel < p.channels);

  RowsAhead ahead;
  for (int pair = 0; pair < 2; ++pair) {
    ahead.find(p, pair * 2 * kTile);
    ahead.store(shared, pair, tasks);
  }
  ahead.find(p, 4 * kTile);
  __syncthreads();
  tasks.find_rows(shared.rows[0][0]);
  tasks.load();
  tasks.prepare(shared, 0, 0);
  tasks.find_rows(shared.rows[0][1]);
  __syncthreads();

  // Tiles in pairs, so that their buffer is known at compile time. pair: where the rows of the next
  // pair are.
  for (int first = 0, pair = 1;; first += 2 * kTile, pair ^= 1) {
    if (!advance<0>(p, shared, walk, tasks, ahead, first, pair)) break;
    if (!advance<1>(p, shared, walk, tasks, ahead, first + kTile, pair)) break;
  }
  if (p.last_state) walk.store(p, batch, first_channel);
}
