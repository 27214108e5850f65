// Selective scan, the backward's walk from the last step to the first; gradients of every input.
//
// The walk goes kStride steps at a time. A warp takes the states before them, which the pass kSaves
// of forward.cu saved, makes those in between again, with their decays, and walks back:
//   g = C dy + dh;  dC += dy h;  dB += g delta u;  dh = g decay  (dh: gradient of the state after)
//   ddelta = sum_n g decay h_before A + u sum_n g B,  dA += g decay h_before delta
//
// A thread holds 4 states of 4 channels; kLanes threads share those 4 channels' states. A sum over
// channels (dB, dC) is then mostly within a thread, and one over states takes few lanes: 16 shuffles
// a step, where a thread with all states of one channel needs 31. What is known of a channel alone
// (softplus, gate, outputs) is done by the one lane that owns it. With 16 states (kLanes 4):
//
//   lane      states   channel of the warp, c = 0 1 2 3
//   0 ..  7   0 -  3   0 ..  7,  8 .. 15, 16 .. 23, 24 .. 31
//   8 .. 15   4 -  7   8 .. 15,  0 ..  7, 24 .. 31, 16 .. 23
//  16 .. 23   8 - 11  16 .. 23, 24 .. 31,  0 ..  7,  8 .. 15
//  24 .. 31  12 - 15  24 .. 31, 16 .. 23,  8 .. 15,  0 ..  7
//
// A lane's channel c is lane ^ c kGroups. The lane of that number owns it. A warp walks c = 3 2 1 0,
// and a channel's sums over states go from lane to lane with the walk: they end at the owner. Lanes
// with the same states have neighbouring channels for each c, so that a warp reads saved states from
// 4 lines of memory, not 16.
//
// A thread walks two of its states, then the other two: four do not fit into the 128 registers that
// let a multiprocessor of sm_90 hold 4 blocks. Half of the lanes begin with their last two: in the
// first exchange of dB and dC (add_BC) every lane keeps its first two and sends the others.
//
// dB and dC are added over a warp's lanes, then over warps in shared memory, and written as parts,
// one a block; dA, dD and ddelta_bias, sums over steps, are written as parts at the end, one a batch
// entry and segment. sum_parts.cu adds the parts in a fixed order: every run has the same bits.
//
// -D: kInput, kStates (16, 32 or 64), kChannels (a multiple of 32), kTile (steps whose inputs are
// copied together), kMinBlocks (blocks a multiprocessor that registers must allow), kSharedBytes
// (sizeof Shared), kOutput (1: writes the forward's output y once more, so that none is kept).
#include "common/async_copy.cuh"
#include "common/exchange.cuh"
#include "common/math.cuh"
#include "selective_scan/params.cuh"

// Other GPUs have shared memory for half as many blocks, so registers need not make room.
constexpr int kResident =
    __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200 ? kMinBlocks : (kMinBlocks + 1) / 2;
constexpr int kLanes = kStates / 4;
constexpr int kGroups = 32 / kLanes;  // of kLanes lanes, which share 4 channels
constexpr int kWarpChannels = 4 * kGroups;
constexpr int kWarps = kChannels / kWarpChannels;
constexpr int kThreads = 32 * kWarps;
constexpr int kTiles4 = kTile / kStride;
constexpr int kStepsPerLane = 2 * kStride / kGroups;  // whose dB and dC a lane adds and writes
constexpr int kStaged = (kTile * kStates + kThreads - 1) / kThreads;
static_assert(kStates == 16 || kStates == 32 || kStates == 64, "");
static_assert(kChannels % kWarpChannels == 0 && kStride == 4 && kTile % kStride == 0 && kTile <= kThreads, "");

// A warp's inputs of one step, as they are in global memory.
struct alignas(16) RawStep {
  kInput of[4][kWarpChannels];  // u, delta, z, g_y
};

// Of kStride steps. B and C, and dB and dC, of two states each: b b c c.
struct Tile4 {
  float4 BC[kStride][kStates / 2];
  float4 sums[kWarps][kStates / 2][kStride];  // over a warp's channels
};

// Of a warp's channels, what the walk needs of kStride steps; each vector is for all steps.
struct alignas(16) WarpInputs {
  float4 delta[kWarpChannels];
  float4 x[kWarpChannels];       // delta u
  float4 dy[kWarpChannels];      // gradient of y before the gate
  float4 y_to_z[kWarpChannels];  // dz = y_to_z y
  float4 slope[kWarpChannels];   // derivative of delta by its input
  Packed<kInput, kStride> u[kWarpChannels];
  float4 gate[kOutput ? kWarpChannels : 1];
};

// Where sequences are, of a warp's first channel. Kept, as to make it in every tile takes 100
// instructions.
struct Sequences {
  Column<const kInput> inputs[4], B, C;  // of RawStep
  Column<kInput> g_u, g_delta, g_z, y;
  Column<float> parts[2];  // of dB and dC
};

struct Shared {
  // A thread's, of each of its 4 channels. In registers there is room for half of one channel's.
  struct {
    float4 A[kThreads];     // of both halves, times log2 e
    float4 g[2][kThreads];  // of a half, gradients of its states, from later steps, and of its A
  } of[4];
  float2 saved[2][2 * kThreads];  // of two channels, by place: states before kStride steps
  Tile4 tiles4[kTiles4];          // the tile in work
  WarpInputs inputs[kWarps];      // kStride steps of it
  float2 totals[kWarps][kWarpChannels];  // gradients of D and delta_bias, of tiles
  RawStep raw[kWarps][kTile];     // the tile in work; once its first steps are prepared, the next
  Sequences sequences[kWarps];
  int rows[4][kTile];             // the tile in work, two to come, one for slow threads
};

struct BackCoord {
  int batch, segment;
  int block, warp, lane;
  int pair;   // of states, this lane's first half; pair ^ 1 is the other
  int place;  // of that pair in Shared's saved, where a thread's two are neighbours; place ^ 1
              // is the other. Threads' places are in an order in which no two need the same bank.
  int owned;  // channel of the warp that this lane knows all about
  int warp_channel, channels;  // first of the warp; of the whole problem
  int first, count;  // steps of the segment
  bool writes;       // the owned channel exists, and no other lane owns it

  __device__ __forceinline__ BackCoord(const ScanParams& p) {
    channels = static_cast<int>(p.channels);
    const int blocks = (channels + kChannels - 1) / kChannels;
    batch = blockIdx.x / blocks;
    block = blockIdx.x % blocks;
    segment = blockIdx.y;
    warp = threadIdx.x / 32;
    lane = threadIdx.x % 32;
    pair = lane / (kGroups / 2);
    place = 2 * (threadIdx.x ^ (lane / 8 & 1) * (kGroups / 2)) | pair & 1;
    owned = lane % kWarpChannels;
    warp_channel = block * kChannels + warp * kWarpChannels;
    writes = warp_channel + owned < channels && is_owner();
    first = segment * static_cast<int>(p.segment_length);
    count = min(static_cast<int>(p.segment_length), static_cast<int>(p.length) - first);
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
      const unsigned n = i % (kStride * kStates);
      float* to = &tile4.BC[0][n / 2].x + n % 2;
      to[0] = to_float(B[k]);
      to[2] = to_float(C[k]);
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

__device__ __forceinline__ void unpack(float* to, const float2& v) { to[0] = v.x, to[1] = v.y; }

// The owned channel: its parameters, its part of the work, and the sums over a tile of the gradients
// of D and delta_bias, which `totals` adds up: one sum over thousands of steps would lose digits that
// the reference keeps.
struct Channel {
  float skip, bias, no_gate;  // no_gate: 1 without z, whose zeros make the gate 0
  bool use_softplus, has_z;
  float tile_skip = 0.0f, tile_bias = 0.0f;

  __device__ __forceinline__ Channel(const ScanParams& p, const BackCoord& at)
      : skip(p.D[at.channel_of(0)]), bias(p.delta_bias[at.channel_of(0)]),
        no_gate(p.z.data ? 0.0f : 1.0f), use_softplus(p.delta_softplus), has_z(p.z.data) {}

  // What is known of kStride steps before the walk.
  __device__ __forceinline__ void prepare(WarpInputs& to, const BackCoord& at,
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
    to.u[at.owned] = u;
    store4(&to.delta[at.owned], delta);
    store4(&to.x[at.owned], x);
    store4(&to.dy[at.owned], dy);
    store4(&to.y_to_z[at.owned], y_to_z);
    store4(&to.slope[at.owned], slope);
    if (kOutput) store4(&to.gate[kOutput * at.owned], gate);
  }
  // Writes the gradients of u, delta and z for kStride steps. sums: [step][g_B, g_decay or C h], over
  // the channel's states.
  __device__ __forceinline__ void finish(const Sequences& to, const WarpInputs& in,
                                         const BackCoord& at, const int* rows, const float* sums,
                                         int left) {
    float delta[kStride], dy[kStride], y_to_z[kStride], slope[kStride], gate[kStride];
    unpack(delta, in.delta[at.owned]);
    unpack(dy, in.dy[at.owned]);
    unpack(y_to_z, in.y_to_z[at.owned]);
    unpack(slope, in.slope[at.owned]);
    unpack(gate, in.gate[kOutput * at.owned]);
    const Packed<kInput, kStride> u = in.u[at.owned];
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
      if (!at.writes || t >= left) break;
      *to_u.at(rows[t]) = g_u[t];
      *to_delta.at(rows[t]) = g_delta[t];
      if (has_z) *to_z.at(rows[t]) = g_z[t];
      if (kOutput) *to_y.at(rows[t]) = y[t];
    }
  }
  __device__ __forceinline__ void close_tile(float2& totals) {
    totals.x += tile_skip;
    totals.y += tile_bias;
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
            (slot + at.pair / 2) * at.channels;
  }
  // Starts copying those of this thread's channel c, `back` float4 before these, a group of copies
  // of its own.
  __device__ __forceinline__ void copy(Shared& shared, const BackCoord& at, int c, int back) const {
    copy16(&shared.saved[c & 1][at.place & ~1], first + (at.channel_of(c) - back));
    close_copies();
  }
};

// Prepares what this thread has of its channel c.
__device__ __forceinline__ void start(const ScanParams& p, const BackCoord& at, Shared& shared, int c) {
  const Int64 channel = at.channel_of(c);
  UNROLL for (int half = 0; half < 2; ++half) {
    float A[2], g_h[2];
    const int first = 2 * (at.pair ^ half);
    UNROLL for (int i = 0; i < 2; ++i) {
      const int n = first + i;
      const bool real = n < p.states;
      A[i] = real ? p.A[channel * p.states + n] * kLog2e : 0.0f;
      g_h[i] = real && p.g_last_state && at.segment == p.segments - 1
                   ? p.g_last_state[(at.batch * p.channels + channel) * p.states + n] : 0.0f;
    }
    // The gradient that enters this segment at its end, from the segments after it.
    for (Int64 s = p.segments - 2; s >= at.segment; --s) {
      const Int64 row = s * p.batch + at.batch;
      const float delta = p.carry_delta[row * p.channels + channel];
      UNROLL for (int i = 0; i < 2; ++i) {
        const Int64 state = row * kStates + first + i;
        g_h[i] = fmaf(decay_of(delta, A[i]), g_h[i], p.carry_state[state * p.channels + channel]);
      }
    }
    reinterpret_cast<float2*>(&shared.of[c].A[threadIdx.x])[half] = make_float2(A[0], A[1]);
    shared.of[c].g[half][threadIdx.x] = make_float4(g_h[0], g_h[1], 0.0f, 0.0f);
  }
}

// kStride steps of this thread's channel c, forwards and back. To add to: BC, [half][step][B or C]
// [state], parts of dB and dC; sums, [step][g_B, g_decay or C h], the channel's sums over states.
__device__ __forceinline__ void walk(Shared& shared, const Tile4& tile4, const BackCoord& at, int c,
                                     float* BC, float* sums) {
  const WarpInputs& in = shared.inputs[at.warp];
  float delta[4], x[4], dy[4], A4[4];
  unpack(A4, shared.of[c].A[threadIdx.x]);
  unpack(delta, in.delta[at.in_warp(c)]);
  unpack(x, in.x[at.in_warp(c)]);
  unpack(dy, in.dy[at.in_warp(c)]);
  UNROLL for (int half = 0; half < 2; ++half) {
    const float* A = A4 + 2 * half;
    float g[4], h[kStride + 1][2], decay[kStride][2], b_c[kStride][4];
    unpack(h[0], shared.saved[c & 1][at.place ^ half]);
    UNROLL for (int t = 0; t < kStride; ++t) {
      unpack(b_c[t], tile4.BC[t][at.pair ^ half]);
      UNROLL for (int i = 0; i < 2; ++i) {
        decay[t][i] = decay_of(delta[t], A[i]);
        h[t + 1][i] = fmaf(decay[t][i], h[t][i], x[t] * b_c[t][i]);
      }
    }
    unpack(g, shared.of[c].g[half][threadIdx.x]);
    UNROLL for (int t = kStride - 1; t >= 0; --t) {
      float* to = BC + 4 * (kStride * half + t);
      UNROLL for (int i = 0; i < 2; ++i) {
        const float b = b_c[t][i], c_t = b_c[t][2 + i], of_h = fmaf(c_t, dy[t], g[i]);
        to[i] = fmaf(of_h, x[t], to[i]);
        to[2 + i] = fmaf(dy[t], h[t + 1][i], to[2 + i]);
        sums[3 * t] = fmaf(of_h, b, sums[3 * t]);
        g[i] = of_h * decay[t][i];
        const float of_exponent = g[i] * h[t][i];
        g[2 + i] = fmaf(of_exponent, delta[t], g[2 + i]);
        sums[3 * t + 1] = fmaf(of_exponent, A[i], sums[3 * t + 1]);
        sums[3 * t + 2] = fmaf(c_t, h[t + 1][i], sums[3 * t + 2]);
      }
    }
    store4(&shared.of[c].g[half][threadIdx.x], g);
  }
}

// Adds dB and dC of kStride steps over the warp's channels. Of two lanes with the same 4 states, one
// has in its last half what the other has in its first.
__device__ __forceinline__ void add_BC(Tile4& tile4, const BackCoord& at, float* BC) {
  UNROLL for (int i = 0; i < 4 * kStride; ++i)
    BC[i] += __shfl_xor_sync(0xffffffffu, BC[4 * kStride + i], kGroups / 2);
  if constexpr (kGroups > 2) exchange<4 * kStride, kGroups / 4, 1>(BC, at.lane);
  float4* to = &tile4.sums[at.warp][at.pair][at.lane % (kGroups / 2) * kStepsPerLane];
  UNROLL for (int t = 0; t < kStepsPerLane; ++t) store4(to + t, BC + 4 * t);
}

// Adds dB and dC of a tile over the warps and writes the block's part.
__device__ __forceinline__ void store_BC(const ScanParams& p, const BackCoord& at,
                                         const Shared& shared, const int* rows, int left) {
  constexpr int kSums = 2 * kStride * kStates;
  UNROLL for (int q = 0; q < kTiles4; ++q)
    UNROLL for (int first = 0; first < kSums; first += kThreads) {
      const unsigned i = first + threadIdx.x, n = i / kStride / 4 * 2 + i % 2;
      const int t = q * kStride + i / 4 % kStride;
      if (t >= left || n >= static_cast<unsigned>(p.states)) continue;
      const float* found = &shared.tiles4[q].sums[0][0][0].x + i;
      float sum = found[0];
      UNROLL for (int w = 1; w < kWarps; ++w) sum += found[w * kSums];
      *shared.sequences[at.warp].parts[i / 2 % 2].next(n).at(rows[t]) = sum;
    }
}

__device__ __forceinline__ void store_parts(const ScanParams& p, const BackCoord& at,
                                            const Shared& shared) {
  const Int64 part = at.batch * p.segments + at.segment;
  UNROLL for (int c = 0; c < 4; ++c) {
    const Int64 of = at.warp_channel + at.in_warp(c);
    if (of >= p.channels) continue;
    UNROLL for (int i = 0; i < 4; ++i) {
      const int n = 2 * (at.pair ^ i / 2) + i % 2;
      const float g_A = (&shared.of[c].g[i / 2][threadIdx.x].z)[i % 2];
      if (n < p.states) p.parts_A[(part * p.channels + of) * p.states + n] = g_A;
    }
  }
  if (!at.writes) return;
  const float2 totals = shared.totals[at.warp][at.owned];
  p.parts_D[part * p.channels + at.channel_of(0)] = totals.x;
  p.parts_bias[part * p.channels + at.channel_of(0)] = totals.y;
}

extern "C" __global__ void __launch_bounds__(kThreads, kResident)
    scan_backward(const __grid_constant__ ScanParams p) {
  extern __shared__ __align__(16) unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  static_assert(sizeof(Shared) == kSharedBytes, "computed by libs/ops/cuda/launch_plan.py");
  BackCoord at(p);
  Channel channel(p, at);
#pragma unroll 1
  for (int c = 0; c < 4; ++c) start(p, at, shared, c);
  if (at.is_owner()) shared.totals[at.warp][at.owned] = make_float2(0.0f, 0.0f);
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
  saved.copy(shared, at, 3, 0);
  saved.copy(shared, at, 2, 0);

  for (int tile = last; tile >= 0; --tile) {
    const int left = at.count - tile * kTile;
    const int* rows = shared.rows[tile & 3];
    staging.store(shared);
    if (thread < kTile)
      shared.rows[(tile + 2) & 3][thread] = at.row(p, (tile - 2) * kTile + thread);
    wait_for_copies<1>();
    __syncthreads();

#pragma unroll 1
    for (int q = min(left - 1, kTile - 1) / kStride; q >= 0; --q) {
      // Hides that this stays: else all that is made of it is kept in registers.
      asm volatile("" : "+r"(at.warp_channel));
      Tile4& tile4 = shared.tiles4[q];
      WarpInputs& inputs = shared.inputs[at.warp];
      channel.prepare(inputs, at, raw + q * kStride);
      // Steps past the end and channels that do not exist change no state and add to no sum.
#pragma unroll 1
      for (int t = at.writes ? left - q * kStride : 0; t < kStride && at.is_owner(); ++t)
        for (float4* v : {inputs.delta, inputs.x, inputs.dy, inputs.slope})
          reinterpret_cast<float*>(v + at.owned)[t] = 0.0f;
      __syncwarp();
      if (q == 0 && tile > 0) {
        const int* next = shared.rows[(tile + 3) & 3];
        staging.load(p, sequences, next);
        copy_inputs(p, at, whole, sequences, raw, next);
      }
      float BC[8 * kStride] = {}, sums[3 * kStride] = {};
      const int row = tile + q > 0 ? kStates / 4 * at.channels : 0;  // of saved states
      const auto walk_channel = [&](int c) {
        wait_for_copies<1>();
        walk(shared, tile4, at, c, BC, sums);
        saved.copy(shared, at, c ^ 2, c < 2 ? row : 0);  // the channel after the next
      };
      walk_channel(3);  // apart, as its sums begin
#pragma unroll 1
      for (int c = 2; c >= 0; --c) {
        const int across = (1 + 2 * (c & 1)) * kGroups;  // (c ^ c + 1) kGroups: who has the sums
        UNROLL for (int i = 0; i < 3 * kStride; ++i)
          sums[i] = __shfl_xor_sync(0xffffffffu, sums[i], across);
        walk_channel(c);
      }
      saved.first -= row;
      add_lanes<3 * kStride, kWarpChannels, 32>(sums);
      add_BC(tile4, at, BC);
      channel.finish(sequences, inputs, at, rows + q * kStride, sums, left - q * kStride);
      __syncwarp();  // before the next steps are prepared
    }
    __syncthreads();
    store_BC(p, at, shared, rows, left);
    if (at.is_owner()) channel.close_tile(shared.totals[at.warp][at.owned]);
  }
  store_parts(p, at, shared);
}
