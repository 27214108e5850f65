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
//   lane      states   channel of the warp, c = 0 1 2 3
//   0 ..  7   0 -  3   0 ..  7,  8 .. 15, 16 .. 23, 24 .. 31
//   8 .. 15   4 -  7   8 .. 15,  0 ..  7, 24 .. 31, 16 .. 23
//  16 .. 23   8 - 11  16 .. 23, 24 .. 31,  0 ..  7,  8 .. 15
//  24 .. 31  12 - 15  24 .. 31, 16 .. 23,  8 .. 15,  0 ..  7
//
// A lane's channel c is lane ^ c kGroups. The lane of that number owns it: one shuffle brings sums
// over states to it. Lanes with the same states have neighbouring channels for each c, so that a
// warp reads saved states from 4 lines of memory, not 16.
//
// dB and dC are added over a warp's lanes, then over warps in shared memory, and written as parts,
// one a block; dA, dD and ddelta_bias, sums over steps, are written as parts at the end, one a batch
// entry and segment. sum_parts.cu adds the parts in a fixed order, so that the gradients are bit-equal
// in every run.
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
constexpr int kGroups = 32 / kLanes;  // of kLanes lanes, which share 4 channels
constexpr int kWarpChannels = 4 * kGroups;
constexpr int kWarps = kChannels / kWarpChannels;
constexpr int kThreads = 32 * kWarps;
constexpr int kTiles4 = kTile / kStride;
constexpr int kSumsPerLane = 32 / kGroups;  // of kStride steps' dB and dC of 4 states
constexpr int kStaged = (kTile * kStates + kThreads - 1) / kThreads;
static_assert(kStates == 16 || kStates == 32 || kStates == 64, "");
static_assert(kChannels % kWarpChannels == 0 && kStride == 4 && kTile % kStride == 0 && kTile <= kThreads, "");

// A warp's inputs of one step, as they are in global memory.
struct alignas(16) RawStep {
  kInput of[4][kWarpChannels];  // u, delta, z, g_y
};

// What the walk needs of kStride steps, together, so that one address and constants find it all.
struct alignas(16) Tile4 {
  float B[kStride][kStates], C[kStride][kStates];
  // Of a warp's channels, each vector for all steps.
  float4 delta[kWarps][kWarpChannels];
  float4 dy[kWarps][kWarpChannels];     // gradient of y before the gate
  float4 y_to_z[kWarps][kWarpChannels];  // dz = y_to_z y
  float4 slope[kWarps][kWarpChannels];   // derivative of delta by its input
  Packed<kInput, kStride> u[kWarps][kWarpChannels];
  float4 gate[kOutput ? kWarps : 1][kOutput ? kWarpChannels : 1];
  union {
    float4 x[kWarpChannels];
    float sums[kStride][2 * kStates];  // of dB and dC over the channels, when x has been read
  } of_warp[kWarps];
};

// Where sequences are, of a warp's first channel. Kept, as to make it in every tile takes 100
// instructions.
struct Sequences {
  Column<const kInput> inputs[4], B, C;  // of RawStep
  Column<kInput> g_u, g_delta, g_z, y;
  Column<float> parts[2];  // of dB and dC
};

struct Shared {
  // A thread's, 4 states of each of its 4 channels. In registers there is room for one channel's.
  float4 A[4][kThreads];        // times log2 e
  float4 g_h[4][kThreads];      // gradient of the state, from later steps
  float4 g_A[4][kThreads];
  Tile4 tiles4[kTiles4];        // the tile in work
  RawStep raw[kWarps][kTile];  // the next one
  float4 saved[4][kThreads];    // a thread's: the states before kStride steps, of each channel
  Sequences sequences[kWarps];
  int rows[4][kTile];           // the tile in work, two to come, one for slow threads
};

struct BackCoord {
  int batch, segment;
  int block, warp, lane;
  int first_state;  // of the lane's 4 states of each of its channels
  int owned;        // channel of the warp that this lane knows all about
  int warp_channel, channels;  // first of the warp; of the whole problem
  int sum;           // where in Tile4's sums this lane's go (add_BC)
  int first, count;  // steps of the segment
  bool writes;       // the owned channel exists, and no other lane owns it

  __device__ __forceinline__ BackCoord(const ScanParams& p) {
    channels = static_cast<int>(p.channels);
    const int blocks = (channels + kChannels - 1) / kChannels;
    batch = blockIdx.x / blocks;
    block = blockIdx.x % blocks;
    warp = threadIdx.x / 32;
    lane = threadIdx.x % 32;
    first_state = lane / kGroups * 4;
    owned = lane % kWarpChannels;
    warp_channel = block * kChannels + warp * kWarpChannels;
    writes = warp_channel + owned < channels && is_owner();
    sum = lane % kGroups * kSumsPerLane / 4 * kStates + first_state;
    segment = blockIdx.y;
    first = static_cast<int>(segment * p.segment_length);
    count = static_cast<int>(min(p.segment_length, p.length - first));
  }
  __device__ __forceinline__ bool is_owner() const { return lane < kWarpChannels; }
  __device__ __forceinline__ int in_warp(int c) const { return owned ^ c * kGroups; }
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

  __device__ __forceinline__ void load(const ScanParams& p, const Sequences& from, const int* rows) {
    UNROLL for (int k = 0; k < kStaged; ++k) {
      const unsigned i = threadIdx.x + k * kThreads, n = i % kStates;
      B[k] = C[k] = from_float<kInput>(0.0f);
      if (i >= kTile * kStates || n >= static_cast<unsigned>(p.states)) continue;
      B[k] = from.B.at(rows[i / kStates])[n];
      C[k] = from.C.at(rows[i / kStates])[n];
    }
  }
  __device__ __forceinline__ void store(Shared& shared) const {
    UNROLL for (int k = 0; k < kStaged; ++k) {
      const unsigned i = threadIdx.x + k * kThreads;
      if (i >= kTile * kStates) continue;
      Tile4& tile4 = shared.tiles4[i / (kStride * kStates)];
      tile4.B[0][i % (kStride * kStates)] = to_float(B[k]);
      tile4.C[0][i % (kStride * kStates)] = to_float(C[k]);
    }
  }
};

__device__ __forceinline__ Sequences find_sequences(const ScanParams& p, const BackCoord& at) {
  const Int64 b = at.batch, c = at.warp_channel, part = 2 * at.block * p.batch + b;
  const Rows parts = {p.parts_BC, p.length * p.states, p.states};
  const Rows &z = p.z.data ? p.z : p.u, &g_y = p.g_y.data ? p.g_y : p.u;
  return {{{p.u, b, c}, {p.delta, b, c}, {z, b, c}, {g_y, b, c}}, {p.B, b, 0}, {p.C, b, 0},
          {p.g_u, b, c}, {p.g_delta, b, c}, {p.g_z, b, c}, {p.y, b, c},
          {{parts, part, 0}, {parts, part + p.batch, 0}}};
}

// Whether a warp's inputs can be copied 16 bytes at a time.
__device__ __forceinline__ bool are_whole(const BackCoord& at, const Sequences& from) {
  size_t bits = 0;
  UNROLL for (int k = 0; k < 4; ++k) bits |= from.inputs[k].first | from.inputs[k].stride;
  return bits % 16 == 0 && at.warp_channel + kWarpChannels <= at.channels;
}

// Starts copying a warp's tile; zeros for z or g_y if absent.
__device__ __forceinline__ void copy_inputs(const ScanParams& p, const BackCoord& at, bool whole,
                                            const Sequences& from, RawStep* to, const int* rows) {
  const bool present[4] = {true, true, p.z.data != nullptr, p.g_y.data != nullptr};
  if (whole) {
    constexpr int kLoad = 16 / sizeof(kInput), kChunks = kWarpChannels / kLoad;
    UNROLL for (int i = at.lane; i < kTile * kChunks; i += 32) {
      const int t = i / kChunks, c = i % kChunks * kLoad;
      const kInput* found[4];
      UNROLL for (int k = 0; k < 4; ++k) found[k] = from.inputs[k].at(rows[t]) + c;
      UNROLL for (int k = 0; k < 4; ++k) copy16(&to[t].of[k][c], found[k], present[k]);
    }
  } else if (at.is_owner()) {
    const int c = at.channel_of(0) - at.warp_channel;
#pragma unroll 1
    for (int t = 0; t < kTile; ++t)
      UNROLL for (int k = 0; k < 4; ++k) {
        const kInput found = from.inputs[k].at(rows[t])[c];
        to[t].of[k][at.owned] = present[k] ? found : from_float<kInput>(0.0f);
      }
  }
}

__device__ __forceinline__ void unpack(float* to, const float4& v) {
  to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}

__device__ __forceinline__ void store4(float4* to, const float* v) {
  *to = make_float4(v[0], v[1], v[2], v[3]);
}

__device__ __forceinline__ void load4(float* to, const float* from) {
  unpack(to, *reinterpret_cast<const float4*>(from));
}

// The owned channel: its parameters, its part of the work, and the sums over steps of the gradients of
// D and delta_bias, first a tile's, then of tiles: one sum over thousands of steps would lose digits
// that the reference keeps.
struct Channel {
  float skip, bias, no_gate;  // no_gate: 1 without z, whose zeros make the gate 0
  bool use_softplus, has_z, writes;
  float g_skip = 0.0f, g_bias = 0.0f, tile_skip = 0.0f, tile_bias = 0.0f;

  __device__ __forceinline__ Channel(const ScanParams& p, const BackCoord& at)
      : skip(p.D[at.channel_of(0)]), bias(p.delta_bias[at.channel_of(0)]),
        no_gate(p.z.data ? 0.0f : 1.0f), use_softplus(p.delta_softplus), has_z(p.z.data),
        writes(at.writes) {}

  // What is known of kStride steps before the walk.
  __device__ __forceinline__ void prepare(Tile4& tile4, const BackCoord& at,
                                          const RawStep* raw) const {
    float delta[kStride], x[kStride], dy[kStride], y_to_z[kStride], slope[kStride], gate[kStride];
    Packed<kInput, kStride> u;
    UNROLL for (int t = 0; t < kStride; ++t) {
      const float sum = to_float(raw[t].of[1][at.owned]) + bias;
      delta[t] = select(use_softplus, softplus(sum), sum);
      slope[t] = select(use_softplus, softplus_derivative(sum), 1.0f);
      const float z = to_float(raw[t].of[2][at.owned]), g_y = to_float(raw[t].of[3][at.owned]);
      const float s = sigmoid(z);
      u.v[t] = raw[t].of[0][at.owned];
      x[t] = delta[t] * to_float(u.v[t]);
      gate[t] = fmaf(z, s, no_gate);
      dy[t] = g_y * gate[t];
      y_to_z[t] = g_y * fmaf(gate[t], 1.0f - s, s);
    }
    if (!at.is_owner()) return;
    tile4.u[at.warp][at.owned] = u;
    store4(&tile4.delta[at.warp][at.owned], delta);
    store4(&tile4.of_warp[at.warp].x[at.owned], x);
    store4(&tile4.dy[at.warp][at.owned], dy);
    store4(&tile4.y_to_z[at.warp][at.owned], y_to_z);
    store4(&tile4.slope[at.warp][at.owned], slope);
    if (kOutput) store4(&tile4.gate[kOutput * at.warp][kOutput * at.owned], gate);
  }
  // Writes the gradients of u, delta and z for kStride steps. sums: [step][g_B, g_decay or C h], over
  // the channel's states.
  __device__ __forceinline__ void finish(const Sequences& to, const Tile4& tile4, const BackCoord& at,
                                         const int* rows, const float* sums, int left) {
    float delta[kStride], dy[kStride], y_to_z[kStride], slope[kStride], gate[kStride];
    unpack(delta, tile4.delta[at.warp][at.owned]);
    unpack(dy, tile4.dy[at.warp][at.owned]);
    unpack(y_to_z, tile4.y_to_z[at.warp][at.owned]);
    unpack(slope, tile4.slope[at.warp][at.owned]);
    unpack(gate, tile4.gate[kOutput * at.warp][kOutput * at.owned]);
    const Packed<kInput, kStride> u = tile4.u[at.warp][at.owned];
    kInput g_u[kStride], g_delta[kStride], g_z[kStride], y[kStride];
    UNROLL for (int t = 0; t < kStride; ++t) {
      const float g_B = sums[3 * t], g_decay = sums[3 * t + 1], u_t = to_float(u.v[t]);
      const float output = fmaf(u_t, skip, sums[3 * t + 2]);
      const float of_delta = fmaf(g_decay, kLn2, u_t * g_B) * slope[t];
      tile_skip = fmaf(dy[t], u_t, tile_skip);
      tile_bias += of_delta;
      g_u[t] = from_float<kInput>(fmaf(delta[t], g_B, dy[t] * skip));
      g_delta[t] = from_float<kInput>(of_delta);
      g_z[t] = from_float<kInput>(y_to_z[t] * output);
      y[t] = from_float<kInput>(output * gate[t]);
    }
    const Column<kInput> to_u = to.g_u.next(at.owned), to_delta = to.g_delta.next(at.owned);
    const Column<kInput> to_z = to.g_z.next(at.owned), to_y = to.y.next(at.owned);
    UNROLL for (int t = 0; t < kStride; ++t) {
      if (!writes || t >= left) break;
      *to_u.at(rows[t]) = g_u[t];
      *to_delta.at(rows[t]) = g_delta[t];
      if (has_z) *to_z.at(rows[t]) = g_z[t];
      if (kOutput) *to_y.at(rows[t]) = y[t];
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
  store4(&shared.A[c][threadIdx.x], A);
  store4(&shared.g_h[c][threadIdx.x], g_h);
  shared.g_A[c][threadIdx.x] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
}

// kStride steps of this thread's channel c, forwards and back. BC: [step][B or C][state], parts of dB
// and dC to add to; sums: [step][g_B, g_decay or C h], parts of the channel's sums over states.
__device__ __forceinline__ void walk(Shared& shared, const Tile4& tile4, const BackCoord& at, int c,
                                     float* BC, float* sums) {
  const int column = at.in_warp(c);
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
  store4(&shared.g_h[c][threadIdx.x], g_h);
  store4(&shared.g_A[c][threadIdx.x], g_A);
}

// Adds dB and dC of kStride steps over the warp's channels.
__device__ __forceinline__ void add_BC(Tile4& tile4, const BackCoord& at, float* BC) {
  float* to = tile4.of_warp[at.warp].sums[0] + at.sum;
  exchange<32, kGroups / 2, 1>(BC, at.lane);
  __syncwarp();  // every lane has read x, which this overwrites
  UNROLL for (int i = 0; i < kSumsPerLane; i += 4)
    store4(reinterpret_cast<float4*>(to + i / 4 * kStates), BC + i);
}

// Adds dB and dC of a tile over the warps and writes the block's part.
__device__ __forceinline__ void store_BC(const ScanParams& p, const BackCoord& at,
                                         const Shared& shared, const int* rows, int left) {
  constexpr int kColumns = 2 * kStates, kTogether = kThreads / kColumns;
  static_assert(kThreads % kColumns == 0 && kTile % kTogether == 0, "");
  const unsigned column = threadIdx.x % kColumns, n = column % kStates;
  if (n >= static_cast<unsigned>(p.states)) return;
  const Column<float> to = shared.sequences[at.warp].parts[column / kStates].next(n);
  UNROLL for (int first = 0; first < kTile; first += kTogether) {
    const int t = first + threadIdx.x / kColumns;
    if (t >= left) break;
    const Tile4& tile4 = shared.tiles4[t / kStride];
    float sum = tile4.of_warp[0].sums[t % kStride][column];
    UNROLL for (int w = 1; w < kWarps; ++w) sum += tile4.of_warp[w].sums[t % kStride][column];
    *to.at(rows[t]) = sum;
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
  p.parts_D[part * p.channels + at.channel_of(0)] = channel.g_skip;
  p.parts_bias[part * p.channels + at.channel_of(0)] = channel.g_bias;
}

extern "C" __global__ void __launch_bounds__(kThreads, kResident)
    scan_backward(const __grid_constant__ ScanParams p) {
  extern __shared__ __align__(16) unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  static_assert(sizeof(Shared) == kSharedBytes, "computed by libs/ops/cuda/launch_plan.py");
  const BackCoord at(p);
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
  RawStep* raw = shared.raw[at.warp];
  Sequences& sequences = shared.sequences[at.warp];
  if (at.lane == 0) sequences = find_sequences(p, at);
  __syncwarp();
  staging.load(p, sequences, shared.rows[last & 3]);
  const bool whole = are_whole(at, sequences);
  copy_inputs(p, at, whole, sequences, raw, shared.rows[last & 3]);
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
      channel.prepare(shared.tiles4[q], at, raw + q * kStride);
    // Steps past the end and channels that do not exist change no state and add to no sum.
#pragma unroll 1
    for (int t = at.writes ? left : 0; t < kTile && at.is_owner(); ++t) {
      Tile4& to = shared.tiles4[t / kStride];
      for (float4* v : {to.delta[at.warp], to.of_warp[at.warp].x, to.dy[at.warp], to.slope[at.warp]})
        reinterpret_cast<float*>(v + at.owned)[t % kStride] = 0.0f;
    }
    __syncwarp();
    if (tile > 0) {
      const int* next = shared.rows[(tile + 3) & 3];
      staging.load(p, sequences, next);
      copy_inputs(p, at, whole, sequences, raw, next);
    }

#pragma unroll 1
    for (int q = min(left - 1, kTile - 1) / kStride; q >= 0; --q) {
      Tile4& tile4 = shared.tiles4[q];
      float BC[32] = {}, sums[3 * kStride] = {};
      if (tile + q > 0) saved.step_back(at);
      const auto walk_channel = [&](int c) {
        wait_for_copies<3>();
        float part[3 * kStride];
        walk(shared, tile4, at, c, BC, part);
        saved.copy(shared, at, c);  // for the next kStride steps
        if (c > 0) {  // to the owner; c = 0 is at home
          UNROLL for (int i = 0; i < 3 * kStride; ++i)
            part[i] = __shfl_xor_sync(0xffffffffu, part[i], c * kGroups);
        }
        UNROLL for (int i = 0; i < 3 * kStride; ++i) sums[i] += part[i];
      };
      walk_channel(0);  // of its own: without sums to begin with and shuffles
#pragma unroll 1
      for (int c = 1; c < 4; ++c) walk_channel(c);
      add_lanes<3 * kStride, kWarpChannels, 32>(sums);
      add_BC(tile4, at, BC);
      channel.finish(sequences, tile4, at, rows + q * kStride, sums, left - q * kStride);
    }
    __syncthreads();
    store_BC(p, at, shared, rows, left);
    channel.close_tile();
  }
  store_parts(p, at, shared, channel);
}
