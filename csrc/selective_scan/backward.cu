// Selective scan, the backward's walk from the last step to the first; gradients of every input.
//
// The walk goes kStride steps at a time. A warp takes the states before them, which the pass kSaves
// of forward.cu saved, makes those in between again, with their decays, and walks back:
//   g = C dy + dh;  dC += dy h;  dB += g delta u;  dh = g decay  (dh: gradient of the state after)
//   ddelta = sum_n g decay h_before A + u sum_n g B,  dA += g decay h_before delta
//
// A thread holds 4 states of 4 channels; kLanes threads share those 4 channels' states. A sum over
// channels (dB, dC) is then mostly within a thread, and one over states takes few lanes: 13 shuffles
// a step, where a thread with all states of one channel needs 31. What is known of a channel alone
// (softplus, gate, outputs) is done by the one lane that owns it. With 16 states (kLanes 4):
//
//   lane   states   slot of its channel c = 0 1 2 3   channel of the warp
//   0      0 - 3    0 1 2 3 (owns 0)                  0  8 16 24
//   1      4 - 7    1 0 3 2 (owns 1)                  8  0 24 16
//   2      8 - 11   2 3 0 1 (owns 2)                 16 24  0  8
//   3     12 - 15   3 2 1 0 (owns 3)                 24 16  8  0
//   4      0 - 3    4 5 6 7 (owns 4)                  1  9 17 25
//   5      4 - 7    5 4 7 6 (owns 5)                  9  1 25 17
//   6      8 - 11   6 7 4 5 (owns 6)                 17 25  1  9
//   7     12 - 15   7 6 5 4 (owns 7)                 25 17  9  1
//
// A slot is a channel's place in shared memory. The lane that owns the slot of this lane's channel c is
// lane ^ c: one shuffle brings sums over states to it. Lanes with the same states have neighbouring
// channels for each c, so that a warp reads saved states from 4 lines of memory, not 16.
//
// dB and dC are added over a warp's lanes, then over warps in shared memory, and written as parts,
// one a block; dA, dD and ddelta_bias, sums over steps, are written as parts at the end, one a batch
// entry and segment. sum_parts.cu adds the parts in a fixed order, so that the gradients
// are bit-equal in every run.
//
// -D: kInput, kStates (16, 32 or 64), kChannels (a multiple of 32), kTile (steps whose inputs are
// staged together), kMinBlocks (blocks a multiprocessor that registers must allow), kSharedBytes
// (sizeof Shared), kOutput (1: writes the forward's output y once more, which costs little here and
// so need not be kept; 0: does not).
#include "common/async_copy.cuh"
#include "common/exchange.cuh"
#include "common/math.cuh"
#include "selective_scan/params.cuh"

// Other GPUs have too little shared memory for more than 4 blocks, so registers need not make room.
constexpr int kResident =
    __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200 || kMinBlocks < 4 ? kMinBlocks : 4;
constexpr int kLanes = kStates / 4;
constexpr int kWarpChannels = 128 / kLanes;
constexpr int kWarps = kChannels / kWarpChannels;
constexpr int kThreads = 32 * kWarps;
constexpr int kTiles4 = kTile / kStride;
constexpr int kSumsPerLane = 32 / (32 / kLanes);  // of kStride steps' dB and dC of 4 states
constexpr int kStaged = (kTile * kStates + kThreads - 1) / kThreads;
static_assert(kStates == 16 || kStates == 32 || kStates == 64, "");
static_assert(kChannels % kWarpChannels == 0 && kStride == 4 && kTile % kStride == 0 && kTile <= kThreads, "");

// A warp's inputs of one step, as they are in global memory.
struct alignas(16) RawStep {
  kInput u[kWarpChannels], delta[kWarpChannels], z[kWarpChannels], g_y[kWarpChannels];
};

// What the walk needs of kStride steps, together, so that one address and constants find it all.
struct alignas(16) Tile4 {
  float B[kStride][kStates], C[kStride][kStates];
  // Of a warp's channels, each vector for all steps.
  float4 delta[kWarps][kWarpChannels];
  float4 dy[kWarps][kWarpChannels];     // gradient of y before the gate
  float4 y_to_z[kWarps][kWarpChannels];  // dz = y_to_z y
  float4 slope[kWarps][kWarpChannels];   // derivative of delta by its input
  kInput u[kWarps][kStride][kWarpChannels];
  float4 gate[kOutput ? kWarps : 1][kOutput ? kWarpChannels : 1];
  union {
    float4 x[kWarpChannels];
    float sums[kStride][2 * kStates];  // of dB and dC over the channels, when x has been read
  } of_warp[kWarps];
};

struct Shared {
  // A thread's, 4 states of each of its 4 channels. In registers there is room for one channel's.
  float4 A[4][kThreads];        // times log2 e
  float4 g_h[4][kThreads];      // gradient of the state, from later steps
  float4 g_A[4][kThreads];
  Tile4 tiles4[kTiles4];        // the tile in work
  RawStep raw[kWarps][kTile];  // the next one
  float4 saved[4][kThreads];    // a thread's: the states before kStride steps, of each channel
  int rows[4][kTile];          // the tile in work, two to come, one for slow threads
};

struct BackCoord {
  Int64 batch, segment;
  int block, warp, lane;
  int group;        // of kLanes lanes, which share 4 channels
  int first_state;  // of the lane's 4 states of each of them
  int owned;        // slot of the channel that this lane knows all about
  int warp_channel, channel, channels;  // first of the warp's; owned; of the whole problem
  int sum;                              // where in Tile4's sums this lane's go (add_BC)
  int first, count;                     // steps of the segment
  bool writes;                          // the owned channel exists, and no other lane owns it

  __device__ __forceinline__ BackCoord(const ScanParams& p) {
    channels = static_cast<int>(p.channels);
    const int blocks = (channels + kChannels - 1) / kChannels;
    batch = blockIdx.x / blocks;
    block = blockIdx.x % blocks;
    warp = threadIdx.x / 32;
    lane = threadIdx.x % 32;
    group = lane / kLanes;
    first_state = lane % kLanes * 4;
    owned = 4 * group + lane % 4;
    warp_channel = block * kChannels + warp * kWarpChannels;
    writes = warp_channel + in_warp(0) < channels && lane % kLanes < 4;
    channel = channel_of(0);
    sum = group * kSumsPerLane / 4 * kStates + first_state;
    segment = blockIdx.y;
    first = static_cast<int>(segment * p.segment_length);
    count = static_cast<int>(min(p.segment_length, p.length - first));
  }
  __device__ __forceinline__ int slot_of(int c) const { return owned ^ c; }
  __device__ __forceinline__ int in_warp(int c) const {
    return slot_of(c) / 4 + 32 / kLanes * (slot_of(c) % 4);
  }
  // Channels that do not exist read the last one.
  __device__ __forceinline__ int channel_of(int c) const {
    return min(warp_channel + in_warp(c), channels - 1);
  }
  // Steps before the first and after the last repeat the nearest.
  __device__ __forceinline__ int row(const ScanParams& p, int step) const {
    const int l = first + max(0, min(step, count - 1));
    return p.order ? static_cast<int>(p.order[l]) : l;
  }
};

// B and C of a tile on their way from global to shared memory.
struct Staging {
  kInput B[kStaged], C[kStaged];

  __device__ __forceinline__ void load(const ScanParams& p, const BackCoord& at, const int* rows) {
    UNROLL for (int k = 0; k < kStaged; ++k) {
      const int i = threadIdx.x + k * kThreads, n = i % kStates;
      B[k] = C[k] = from_float<kInput>(0.0f);
      if (i >= kTile * kStates || n >= p.states) continue;
      B[k] = *Column<const kInput>(p.B, at.batch, n).at(rows[i / kStates]);
      C[k] = *Column<const kInput>(p.C, at.batch, n).at(rows[i / kStates]);
    }
  }
  __device__ __forceinline__ void store(Shared& shared) const {
    UNROLL for (int k = 0; k < kStaged; ++k) {
      const int i = threadIdx.x + k * kThreads;
      if (i >= kTile * kStates) continue;
      Tile4& tile4 = shared.tiles4[i / (kStride * kStates)];
      tile4.B[0][i % (kStride * kStates)] = to_float(B[k]);
      tile4.C[0][i % (kStride * kStates)] = to_float(C[k]);
    }
  }
};

// The four sequences that are read channel by channel. An absent z or g_y is not copied.
struct Inputs {
  Column<const kInput> u, delta, z, g_y;  // of the warp's first channel
  bool has_z, has_g_y, whole;             // whole: 16 bytes at a time, all of them there

  __device__ __forceinline__ Inputs(const ScanParams& p, const BackCoord& at)
      : u(p.u, at.batch, at.warp_channel), delta(p.delta, at.batch, at.warp_channel),
        z(p.z, at.batch, at.warp_channel), g_y(p.g_y, at.batch, at.warp_channel),
        has_z(p.z.data), has_g_y(p.g_y.data) {
    size_t bits = u.first | u.stride | delta.first | delta.stride;
    if (has_z) bits |= z.first | z.stride;
    if (has_g_y) bits |= g_y.first | g_y.stride;
    whole = bits % 16 == 0 && at.warp_channel + kWarpChannels <= at.channels;
  }
  // Starts copying a warp's tile.
  __device__ __forceinline__ void copy(RawStep* to, const BackCoord& at, const int* rows) const {
    if (whole) {
      constexpr int kLoad = 16 / sizeof(kInput), kChunks = kWarpChannels / kLoad;
      UNROLL for (int i = at.lane; i < kTile * kChunks; i += 32) {
        const int t = i / kChunks, c = i % kChunks * kLoad, row = rows[t];
        copy16(&to[t].u[c], u.at(row) + c);
        copy16(&to[t].delta[c], delta.at(row) + c);
        if (has_z) copy16(&to[t].z[c], z.at(row) + c);
        if (has_g_y) copy16(&to[t].g_y[c], g_y.at(row) + c);
      }
    } else if (at.lane % kLanes < 4) {
      const int from = at.channel - at.warp_channel, column = at.in_warp(0);
#pragma unroll 1
      for (int t = 0; t < kTile; ++t) {
        to[t].u[column] = u.at(rows[t])[from];
        to[t].delta[column] = delta.at(rows[t])[from];
        if (has_z) to[t].z[column] = z.at(rows[t])[from];
        if (has_g_y) to[t].g_y[column] = g_y.at(rows[t])[from];
      }
    }
  }
};

struct Outputs {
  Column<kInput> g_u, g_delta, g_z, y;

  __device__ __forceinline__ Outputs(const ScanParams& p, const BackCoord& at)
      : g_u(p.g_u, at.batch, at.channel), g_delta(p.g_delta, at.batch, at.channel),
        g_z(p.g_z, at.batch, at.channel), y(p.y, at.batch, at.channel) {}
};

__device__ __forceinline__ void unpack(float* to, const float4& v) {
  to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}

__device__ __forceinline__ void load4(float* to, const float* from) {
  unpack(to, *reinterpret_cast<const float4*>(from));
}

// The owned channel: its parameters, its part of the work, and the sums over steps of the gradients of
// D and delta_bias, first a tile's, then of tiles: one sum over thousands of steps would lose digits
// that the reference keeps.
struct Channel {
  float skip, bias;
  bool use_softplus, has_z, has_g_y, writes;
  float g_skip = 0.0f, g_bias = 0.0f, tile_skip = 0.0f, tile_bias = 0.0f;

  __device__ __forceinline__ Channel(const ScanParams& p, const BackCoord& at)
      : skip(p.D ? p.D[at.channel] : 0.0f), bias(p.delta_bias ? p.delta_bias[at.channel] : 0.0f),
        use_softplus(p.delta_softplus), has_z(p.z.data), has_g_y(p.g_y.data),
        writes(at.writes) {}

  // What is known of kStride steps before the walk. delta and dy are 0 past the end and for channels
  // that do not exist, so that nothing changes a state or adds to a sum.
  __device__ __forceinline__ void prepare(Tile4& tile4, const BackCoord& at, const RawStep* raw,
                                          int left) const {
    float delta[kStride], x[kStride], dy[kStride], y_to_z[kStride], slope[kStride], gate[kStride];
    const int column = at.in_warp(0);
    UNROLL for (int t = 0; t < kStride; ++t) {
      const bool real = writes && t < left;
      const float sum = to_float(raw[t].delta[column]) + bias, z = to_float(raw[t].z[column]);
      const float g_y = select(real && has_g_y, to_float(raw[t].g_y[column]), 0.0f);
      const float s = sigmoid(z);
      delta[t] = select(real, select(use_softplus, softplus(sum), sum), 0.0f);
      slope[t] = select(use_softplus, softplus_derivative(sum), 1.0f);
      x[t] = delta[t] * to_float(raw[t].u[column]);
      gate[t] = select(has_z, z * s, 1.0f);
      dy[t] = g_y * gate[t];
      y_to_z[t] = g_y * silu_derivative(z, s);
      if (at.lane % kLanes < 4) tile4.u[at.warp][t][at.owned] = raw[t].u[column];
    }
    if (at.lane % kLanes >= 4) return;
    tile4.delta[at.warp][at.owned] = make_float4(delta[0], delta[1], delta[2], delta[3]);
    tile4.of_warp[at.warp].x[at.owned] = make_float4(x[0], x[1], x[2], x[3]);
    tile4.dy[at.warp][at.owned] = make_float4(dy[0], dy[1], dy[2], dy[3]);
    tile4.y_to_z[at.warp][at.owned] = make_float4(y_to_z[0], y_to_z[1], y_to_z[2], y_to_z[3]);
    tile4.slope[at.warp][at.owned] = make_float4(slope[0], slope[1], slope[2], slope[3]);
    if (kOutput)
      tile4.gate[kOutput * at.warp][kOutput * at.owned] = make_float4(gate[0], gate[1], gate[2], gate[3]);
  }
  // Writes the gradients of u, delta and z for kStride steps. sums: [step][g_B, g_decay or C h], over
  // the channel's states.
  __device__ __forceinline__ void finish(const Outputs& outputs, const Tile4& tile4, const BackCoord& at,
                                         const int* rows, const float* sums, int left) {
    float delta[kStride], dy[kStride], y_to_z[kStride], slope[kStride], gate[kStride];
    unpack(delta, tile4.delta[at.warp][at.owned]);
    unpack(dy, tile4.dy[at.warp][at.owned]);
    unpack(y_to_z, tile4.y_to_z[at.warp][at.owned]);
    unpack(slope, tile4.slope[at.warp][at.owned]);
    unpack(gate, tile4.gate[kOutput * at.warp][kOutput * at.owned]);
    UNROLL for (int t = 0; t < kStride; ++t) {
      if (!writes || t >= left) break;
      const float g_B = sums[3 * t], g_decay = sums[3 * t + 1], y = sums[3 * t + 2];
      const float u = to_float(tile4.u[at.warp][t][at.owned]);
      const float g_delta = fmaf(g_decay, kLn2, u * g_B) * slope[t];
      tile_skip = fmaf(dy[t], u, tile_skip);
      tile_bias += g_delta;
      *outputs.g_u.at(rows[t]) = from_float<kInput>(fmaf(delta[t], g_B, dy[t] * skip));
      *outputs.g_delta.at(rows[t]) = from_float<kInput>(g_delta);
      const float output = fmaf(u, skip, y);
      if (has_z) *outputs.g_z.at(rows[t]) = from_float<kInput>(y_to_z[t] * output);
      if (kOutput) *outputs.y.at(rows[t]) = from_float<kInput>(output * gate[t]);
    }
  }
  __device__ __forceinline__ void close_tile() {
    g_skip += tile_skip;
    g_bias += tile_bias;
    tile_skip = tile_bias = 0.0f;
  }
};

// The states saved before a segment's steps kStride number .., on their way to shared memory.
struct SavedStates {
  const float4* first;

  __device__ __forceinline__ SavedStates(const ScanParams& p, const BackCoord& at, int number) {
    const Int64 count = (p.length + kStride - 1) / kStride;
    const Int64 slot = (at.batch * count + at.first / kStride + number) * (kStates / 4);
    first = reinterpret_cast<const float4*>(p.saved_states) +
            (slot + at.first_state / 4) * at.channels;
  }
  // Starts copying those of this thread's channel c, a group of copies of its own.
  __device__ __forceinline__ void copy(Shared& shared, const BackCoord& at, int c) const {
    copy16(&shared.saved[c][threadIdx.x], first + at.channel_of(c));
    close_copies();
  }
  __device__ __forceinline__ void step_back(const BackCoord& at) {
    first -= static_cast<Int64>(kStates / 4) * at.channels;
  }
};

// Prepares what this thread has of its channel c.
__device__ __forceinline__ void start(const ScanParams& p, const BackCoord& at, Shared& shared, int c) {
  const Int64 channel = at.channel_of(c);
  float A[4], g_h[4];
  UNROLL for (int i = 0; i < 4; ++i) {
    const int n = at.first_state + i;
    const bool real = n < p.states;
    A[i] = real ? p.A[channel * p.states + n] * kLog2e : 0.0f;
    g_h[i] = real && p.g_last_state && at.segment == p.segments - 1
                 ? p.g_last_state[(at.batch * p.channels + channel) * p.states + n] : 0.0f;
  }
  // The gradient that enters this segment at its end, from the segments after it.
  for (Int64 s = p.segments - 2; s >= at.segment; --s) {
    const Int64 row = s * p.batch + at.batch;
    const float delta = p.carry_delta[row * p.channels + channel];
    UNROLL for (int i = 0; i < 4; ++i) {
      const Int64 state = row * kStates + at.first_state + i;
      g_h[i] = fmaf(decay_of(delta, A[i]), g_h[i], p.carry_state[state * p.channels + channel]);
    }
  }
  shared.A[c][threadIdx.x] = make_float4(A[0], A[1], A[2], A[3]);
  shared.g_h[c][threadIdx.x] = make_float4(g_h[0], g_h[1], g_h[2], g_h[3]);
  shared.g_A[c][threadIdx.x] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
}

// kStride steps of this thread's channel c, forwards and back. BC: [step][B or C][state], parts of dB
// and dC to add to; sums: [step][g_B, g_decay or C h], parts of the channel's sums over states.
__device__ __forceinline__ void walk(Shared& shared, const Tile4& tile4, const BackCoord& at, int c,
                                     float* BC, float* sums) {
  const int column = at.slot_of(c);
  float A[4], g_h[4], g_A[4], h[kStride + 1][4], decay[kStride][4], delta[4], x[4], dy[4];
  unpack(A, shared.A[c][threadIdx.x]);
  unpack(h[0], shared.saved[c][threadIdx.x]);
  unpack(delta, tile4.delta[at.warp][column]);
  unpack(x, tile4.of_warp[at.warp].x[column]);
  UNROLL for (int t = 0; t < kStride; ++t) {
    float b[4];
    load4(b, &tile4.B[t][at.first_state]);
    UNROLL for (int i = 0; i < 4; ++i) {
      decay[t][i] = decay_of(delta[t], A[i]);
      h[t + 1][i] = fmaf(decay[t][i], h[t][i], x[t] * b[i]);
    }
  }
  unpack(dy, tile4.dy[at.warp][column]);
  unpack(g_h, shared.g_h[c][threadIdx.x]);
  unpack(g_A, shared.g_A[c][threadIdx.x]);
  UNROLL for (int t = kStride - 1; t >= 0; --t) {
    float b[4], c4[4], g_B = 0.0f, g_decay = 0.0f, y = 0.0f;
    load4(b, &tile4.B[t][at.first_state]);
    load4(c4, &tile4.C[t][at.first_state]);
    UNROLL for (int i = 0; i < 4; ++i) {
      const float of_h = fmaf(c4[i], dy[t], g_h[i]);
      BC[8 * t + i] = fmaf(of_h, x[t], BC[8 * t + i]);
      BC[8 * t + 4 + i] = fmaf(dy[t], h[t + 1][i], BC[8 * t + 4 + i]);
      g_B = fmaf(of_h, b[i], g_B);
      g_h[i] = of_h * decay[t][i];
      const float of_exponent = g_h[i] * h[t][i];
      g_A[i] = fmaf(of_exponent, delta[t], g_A[i]);
      g_decay = fmaf(of_exponent, A[i], g_decay);
      y = fmaf(c4[i], h[t + 1][i], y);
    }
    sums[3 * t] = g_B;
    sums[3 * t + 1] = g_decay;
    sums[3 * t + 2] = y;
  }
  shared.g_h[c][threadIdx.x] = make_float4(g_h[0], g_h[1], g_h[2], g_h[3]);
  shared.g_A[c][threadIdx.x] = make_float4(g_A[0], g_A[1], g_A[2], g_A[3]);
}

// Adds dB and dC of kStride steps over the warp's channels.
__device__ __forceinline__ void add_BC(Tile4& tile4, const BackCoord& at, float* BC) {
  exchange<32, 16, kLanes>(BC, at.lane);
  float* to = tile4.of_warp[at.warp].sums[0] + at.sum;
  __syncwarp();  // every lane has read x, which this overwrites
  UNROLL for (int i = 0; i < kSumsPerLane; i += 4)
    *reinterpret_cast<float4*>(to + i / 4 * kStates) =
        make_float4(BC[i], BC[i + 1], BC[i + 2], BC[i + 3]);
}

// Adds dB and dC of a tile over the warps and writes the block's part.
__device__ __forceinline__ void store_BC(const ScanParams& p, const BackCoord& at,
                                         const Shared& shared, const int* rows, int left) {
  constexpr int kColumns = 2 * kStates, kTogether = kThreads / kColumns;
  static_assert(kThreads % kColumns == 0 && kTile % kTogether == 0, "");
  const int column = threadIdx.x % kColumns, kind = column / kStates, n = column % kStates;
  if (n >= p.states) return;
  float* to = p.parts_BC + ((at.block * 2 + kind) * p.batch + at.batch) * p.length * p.states + n;
  UNROLL for (int first = 0; first < kTile; first += kTogether) {
    const int t = first + threadIdx.x / kColumns;
    if (t >= left) break;
    float sum = 0.0f;
    UNROLL for (int w = 0; w < kWarps; ++w) sum += shared.tiles4[t / kStride].of_warp[w].sums[t % kStride][column];
    to[static_cast<Int64>(rows[t]) * static_cast<int>(p.states)] = sum;
  }
}

__device__ __forceinline__ void store_parts(const ScanParams& p, const BackCoord& at,
                                            const Shared& shared, const Channel& channel) {
  const Int64 part = at.batch * p.segments + at.segment;
  UNROLL for (int c = 0; c < 4; ++c) {
    const Int64 of = at.warp_channel + at.in_warp(c);
    if (of >= p.channels) continue;
    float g_A[4];
    unpack(g_A, shared.g_A[c][threadIdx.x]);
    UNROLL for (int i = 0; i < 4; ++i) {
      const int n = at.first_state + i;
      if (n < p.states) p.parts_A[(part * p.channels + of) * p.states + n] = g_A[i];
    }
  }
  if (!at.writes) return;
  p.parts_D[part * p.channels + at.channel] = channel.g_skip;
  p.parts_bias[part * p.channels + at.channel] = channel.g_bias;
}

extern "C" __global__ void __launch_bounds__(kThreads, kResident)
    scan_backward(const __grid_constant__ ScanParams p) {
  extern __shared__ __align__(16) unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  static_assert(sizeof(Shared) == kSharedBytes, "computed by libs/ops/cuda/launch_plan.py");
  const BackCoord at(p);
  const Outputs outputs(p, at);
  Channel channel(p, at);
#pragma unroll 1
  for (int c = 0; c < 4; ++c) start(p, at, shared, c);
  const int thread = threadIdx.x;

  const int tiles = (at.count + kTile - 1) / kTile, last = tiles - 1;
  if (thread < kTile) {
    shared.rows[last & 3][thread] = at.row(p, last * kTile + thread);
    shared.rows[(last - 1) & 3][thread] = at.row(p, (last - 1) * kTile + thread);
  }
  __syncthreads();
  Staging staging;
  staging.load(p, at, shared.rows[last & 3]);
  RawStep* raw = shared.raw[at.warp];
  Inputs(p, at).copy(raw, at, shared.rows[last & 3]);
  SavedStates saved(p, at, (at.count - 1) / kStride);
#pragma unroll 1
  for (int c = 0; c < 4; ++c) saved.copy(shared, at, c);

  for (int tile = last; tile >= 0; --tile) {
    const int left = at.count - tile * kTile;
    const int* rows = shared.rows[tile & 3];
    staging.store(shared);
    if (thread < kTile)
      shared.rows[(tile + 2) & 3][thread] = at.row(p, (tile - 2) * kTile + thread);
    wait_for_copies<3>();
    __syncthreads();
    UNROLL for (int q = 0; q < kTiles4; ++q)
      channel.prepare(shared.tiles4[q], at, raw + q * kStride, left - q * kStride);
    __syncwarp();
    if (tile > 0) {
      const int* next = shared.rows[(tile + 3) & 3];
      staging.load(p, at, next);
      Inputs(p, at).copy(raw, at, next);
    }

#pragma unroll 1
    for (int q = min(left - 1, kTile - 1) / kStride; q >= 0; --q) {
      Tile4& tile4 = shared.tiles4[q];
      float BC[32] = {}, sums[3 * kStride] = {};
      if (tile + q > 0) saved.step_back(at);
#pragma unroll 1
      for (int c = 0; c < 4; ++c) {
        wait_for_copies<3>();
        float part[3 * kStride];
        walk(shared, tile4, at, c, BC, part);
        saved.copy(shared, at, c);  // for the next kStride steps
        if (c > 0) {  // to the owner; c = 0 is at home
          UNROLL for (int i = 0; i < 3 * kStride; ++i)
            part[i] = __shfl_xor_sync(0xffffffffu, part[i], c);
        }
        UNROLL for (int i = 0; i < 3 * kStride; ++i) sums[i] += part[i];
      }
      add_lanes<3 * kStride, 4, kLanes>(sums);
      add_BC(tile4, at, BC);
      channel.finish(outputs, tile4, at, rows + q * kStride, sums, left - q * kStride);
    }
    __syncthreads();
    store_BC(p, at, shared, rows, left);
    channel.close_tile();
  }
  store_parts(p, at, shared, channel);
}
