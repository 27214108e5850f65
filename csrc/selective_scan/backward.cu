// Selective scan, the backward's walk from the last step to the first; gradients of every input.
//
// The walk goes kKept steps at a time. A warp takes the states before them, which the pass
// kCheckpoints of forward.cu kept, makes those in between again, with their decays, and walks back:
//   g = C dy + dh;  dC += dy h;  dB += g delta u;  dh = g decay  (dh: gradient of the state after)
//   ddelta = sum_n g decay h_before A + u sum_n g B,  dA += g decay h_before delta
//
// A thread holds 4 states of 4 channels; kLanes threads share those 4 channels' states. A sum over
// channels (dB, dC) is then mostly within a thread, and one over states takes few lanes: 13 shuffles
// a step, where a thread with all states of one channel needs 31. What is known of a channel alone
// (softplus, gate, outputs) is done by the one lane that owns it.
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
constexpr int kQuads = kTile / kKept;
constexpr int kSumsPerLane = 32 / (32 / kLanes);  // of kKept steps' dB and dC of 4 states
constexpr int kStaged = (kTile * kStates + kThreads - 1) / kThreads;
static_assert(kStates == 16 || kStates == 32 || kStates == 64, "");
static_assert(kChannels % kWarpChannels == 0 && kKept == 4 && kTile % kKept == 0 && kTile <= kThreads, "");

// A warp's inputs of one step, as they are in global memory.
struct alignas(16) RawStep {
  kInput u[kWarpChannels], delta[kWarpChannels], z[kWarpChannels], g_y[kWarpChannels];
};

// What the walk needs of kKept steps, together, so that one address and constants find it all.
struct alignas(16) Quad {
  float B[kKept][kStates], C[kKept][kStates];
  // Of a warp's channels, each vector for all steps.
  float4 delta[kWarps][kWarpChannels];
  float4 dy[kWarps][kWarpChannels];     // gradient of y before the gate
  float4 y_to_z[kWarps][kWarpChannels];  // dz = y_to_z y
  float4 slope[kWarps][kWarpChannels];   // derivative of delta by its input
  kInput u[kWarps][kKept][kWarpChannels];
  float4 gate[kOutput ? kWarps : 1][kOutput ? kWarpChannels : 1];
  union {
    float4 x[kWarpChannels];
    float sums[kKept][2 * kStates];  // of dB and dC over the channels, when x has been read
  } of_warp[kWarps];
};

struct Shared {
  // A thread's own, 4 states of each of its 4 channels. In registers there is room for one channel's.
  float4 A[4][kThreads];        // times log2 e
  float4 g_h[4][kThreads];      // gradient of the state, from later steps
  float4 g_A[4][kThreads];
  Quad quads[kQuads];          // the tile in work
  RawStep raw[kWarps][kTile];  // the next one
  float4 kept[4][kThreads];    // a thread's own: the states before kKept steps, of each channel
  int rows[4][kTile];          // the tile in work, two to come, one for slow threads
};

struct Place {
  Int64 batch, segment;
  int block, warp, lane;
  int quad;         // the thread's 4 channels are at 4 quad .. of the warp's
  int first_state;  // and 4 states of each
  int own;          // where the channel is that this lane knows all about
  int warp_channel, channel, channels;  // first of the warp's; own; of the whole problem
  int sum;                              // where in Quad's sums this lane's go (add_BC)
  int first, count;                     // steps of the segment
  bool writes;                          // own channel exists, and no other lane owns it

  __device__ __forceinline__ Place(const ScanParams& p) {
    channels = static_cast<int>(p.channels);
    const int blocks = (channels + kChannels - 1) / kChannels;
    batch = blockIdx.x / blocks;
    block = blockIdx.x % blocks;
    warp = threadIdx.x / 32;
    lane = threadIdx.x % 32;
    quad = lane / kLanes;
    first_state = lane % kLanes * 4;
    own = 4 * quad + lane % 4;
    warp_channel = block * kChannels + warp * kWarpChannels;
    writes = warp_channel + in_warp(0) < channels && lane % kLanes < 4;
    channel = channel_of(0);
    const int value = quad * kSumsPerLane;
    sum = value / 4 * kStates + first_state;
    segment = blockIdx.y;
    first = static_cast<int>(segment * p.segment_length);
    count = static_cast<int>(min(p.segment_length, p.length - first));
  }
  // Where a thread's channel number c is in shared memory. It is another for each of its neighbours,
  // the own one if c is 0: so what they have for one owner reaches it by one shuffle.
  __device__ __forceinline__ int place(int c) const { return own ^ c; }
  // Which of the warp's channels that is: lanes with the same states then have neighbouring channels,
  // and a warp reads kept states from 4 lines of memory, not 16.
  __device__ __forceinline__ int in_warp(int c) const {
    return place(c) / 4 + 32 / kLanes * (place(c) % 4);
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
      Quad& quad = shared.quads[i / (kKept * kStates)];
      quad.B[0][i % (kKept * kStates)] = to_float(B[k]);
      quad.C[0][i % (kKept * kStates)] = to_float(C[k]);
    }
  }
};

// The four sequences that are read channel by channel. An absent z or g_y is not copied.
struct Inputs {
  Column<const kInput> u, delta, z, g_y;  // of the warp's first channel
  bool has_z, has_g_y, whole;             // whole: 16 bytes at a time, all of them there

  __device__ __forceinline__ Inputs(const ScanParams& p, const Place& at)
      : u(p.u, at.batch, at.warp_channel), delta(p.delta, at.batch, at.warp_channel),
        z(p.z, at.batch, at.warp_channel), g_y(p.g_y, at.batch, at.warp_channel),
        has_z(p.z.data), has_g_y(p.g_y.data) {
    size_t bits = u.first | u.stride | delta.first | delta.stride;
    if (has_z) bits |= z.first | z.stride;
    if (has_g_y) bits |= g_y.first | g_y.stride;
    whole = bits % 16 == 0 && at.warp_channel + kWarpChannels <= at.channels;
  }
  // Starts copying a warp's tile.
  __device__ __forceinline__ void copy(RawStep* to, const Place& at, const int* rows) const {
    if (whole) {
      constexpr int kLoad = 16 / sizeof(kInput), kChunks = kWarpChannels / kLoad;
#pragma unroll
      for (int i = at.lane; i < kTile * kChunks; i += 32) {
        const int t = i / kChunks, c = i % kChunks * kLoad, row = rows[t];
        copy16(&to[t].u[c], u.at(row) + c);
        copy16(&to[t].delta[c], delta.at(row) + c);
        if (has_z) copy16(&to[t].z[c], z.at(row) + c);
        if (has_g_y) copy16(&to[t].g_y[c], g_y.at(row) + c);
      }
    } else if (at.lane % kLanes < 4) {
      const int from = at.channel - at.warp_channel, own = at.in_warp(0);
#pragma unroll 1
      for (int t = 0; t < kTile; ++t) {
        to[t].u[own] = u.at(rows[t])[from];
        to[t].delta[own] = delta.at(rows[t])[from];
        if (has_z) to[t].z[own] = z.at(rows[t])[from];
        if (has_g_y) to[t].g_y[own] = g_y.at(rows[t])[from];
      }
    }
  }
};

struct Outputs {
  Column<kInput> g_u, g_delta, g_z, y;

  __device__ __forceinline__ Outputs(const ScanParams& p, const Place& at)
      : g_u(p.g_u, at.batch, at.channel), g_delta(p.g_delta, at.batch, at.channel),
        g_z(p.g_z, at.batch, at.channel), y(p.y, at.batch, at.channel) {}
};

__device__ __forceinline__ void unpack(float* to, const float4& v) {
  to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}

__device__ __forceinline__ void load4(float* to, const float* from) {
  unpack(to, *reinterpret_cast<const float4*>(from));
}

// The own channel: its parameters, its part of the work, and the sums over steps of the gradients of
// D and delta_bias, first a tile's, then of tiles: one sum over thousands of steps would lose digits
// that the reference keeps.
struct Channel {
  float skip, bias;
  bool use_softplus, has_z, has_g_y, writes;
  float g_skip = 0.0f, g_bias = 0.0f, tile_skip = 0.0f, tile_bias = 0.0f;

  __device__ __forceinline__ Channel(const ScanParams& p, const Place& at)
      : skip(p.D ? p.D[at.channel] : 0.0f), bias(p.delta_bias ? p.delta_bias[at.channel] : 0.0f),
        use_softplus(p.delta_softplus), has_z(p.z.data), has_g_y(p.g_y.data),
        writes(at.writes) {}

  // What is known of kKept steps before the walk. delta and dy are 0 past the end and for channels
  // that do not exist, so that nothing changes a state or adds to a sum.
  __device__ __forceinline__ void prepare(Quad& quad, const Place& at, const RawStep* raw,
                                          int left) const {
    float delta[kKept], x[kKept], dy[kKept], y_to_z[kKept], slope[kKept], gate[kKept];
    const int own = at.in_warp(0);
#pragma unroll
    for (int t = 0; t < kKept; ++t) {
      const bool real = writes && t < left;
      const float sum = to_float(raw[t].delta[own]) + bias, z = to_float(raw[t].z[own]);
      const float g_y = select(real && has_g_y, to_float(raw[t].g_y[own]), 0.0f);
      const float s = sigmoid(z);
      delta[t] = select(real, select(use_softplus, softplus(sum), sum), 0.0f);
      slope[t] = select(use_softplus, softplus_derivative(sum), 1.0f);
      x[t] = delta[t] * to_float(raw[t].u[own]);
      gate[t] = select(has_z, z * s, 1.0f);
      dy[t] = g_y * gate[t];
      y_to_z[t] = g_y * silu_derivative(z, s);
      if (at.lane % kLanes < 4) quad.u[at.warp][t][at.own] = raw[t].u[own];
    }
    if (at.lane % kLanes >= 4) return;
    quad.delta[at.warp][at.own] = make_float4(delta[0], delta[1], delta[2], delta[3]);
    quad.of_warp[at.warp].x[at.own] = make_float4(x[0], x[1], x[2], x[3]);
    quad.dy[at.warp][at.own] = make_float4(dy[0], dy[1], dy[2], dy[3]);
    quad.y_to_z[at.warp][at.own] = make_float4(y_to_z[0], y_to_z[1], y_to_z[2], y_to_z[3]);
    quad.slope[at.warp][at.own] = make_float4(slope[0], slope[1], slope[2], slope[3]);
    if (kOutput)
      quad.gate[kOutput * at.warp][kOutput * at.own] = make_float4(gate[0], gate[1], gate[2], gate[3]);
  }
  // Writes the gradients of u, delta and z for kKept steps. sums: [step][g_B, g_decay or C h], over
  // the channel's states.
  __device__ __forceinline__ void finish(const Outputs& outputs, const Quad& quad, const Place& at,
                                         const int* rows, const float* sums, int left) {
    float delta[kKept], dy[kKept], y_to_z[kKept], slope[kKept], gate[kKept];
    unpack(delta, quad.delta[at.warp][at.own]);
    unpack(dy, quad.dy[at.warp][at.own]);
    unpack(y_to_z, quad.y_to_z[at.warp][at.own]);
    unpack(slope, quad.slope[at.warp][at.own]);
    unpack(gate, quad.gate[kOutput * at.warp][kOutput * at.own]);
#pragma unroll
    for (int t = 0; t < kKept; ++t) {
      if (!writes || t >= left) break;
      const float g_B = sums[3 * t], g_decay = sums[3 * t + 1], y = sums[3 * t + 2];
      const float u = to_float(quad.u[at.warp][t][at.own]);
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

// The states kept before a segment's steps kKept number .., on their way to shared memory.
struct Kept {
  const float4* first;

  __device__ __forceinline__ Kept(const ScanParams& p, const Place& at, int number) {
    const Int64 kept = (p.length + kKept - 1) / kKept;
    const Int64 slot = (at.batch * kept + at.first / kKept + number) * (kStates / 4);
    first = reinterpret_cast<const float4*>(p.checkpoints) +
            (slot + at.first_state / 4) * at.channels;
  }
  // Starts copying those of this thread's channel c, a group of copies of its own.
  __device__ __forceinline__ void copy(Shared& shared, const Place& at, int c) const {
    copy16(&shared.kept[c][threadIdx.x], first + at.channel_of(c));
    close_copies();
  }
  __device__ __forceinline__ void step_back(const Place& at) {
    first -= static_cast<Int64>(kStates / 4) * at.channels;
  }
};

// Prepares what this thread keeps of its channel c.
__device__ __forceinline__ void start(const ScanParams& p, const Place& at, Shared& shared, int c) {
  const Int64 channel = at.channel_of(c);
  float A[4], g_h[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
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
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Int64 state = row * kStates + at.first_state + i;
      g_h[i] = fmaf(decay_of(delta, A[i]), g_h[i], p.carry_state[state * p.channels + channel]);
    }
  }
  shared.A[c][threadIdx.x] = make_float4(A[0], A[1], A[2], A[3]);
  shared.g_h[c][threadIdx.x] = make_float4(g_h[0], g_h[1], g_h[2], g_h[3]);
  shared.g_A[c][threadIdx.x] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
}

// kKept steps of this thread's channel c, forwards and back. BC: [step][B or C][state], parts of dB
// and dC to add to; sums: [step][g_B, g_decay or C h], parts of the channel's sums over states.
__device__ __forceinline__ void walk(Shared& shared, const Quad& quad, const Place& at, int c,
                                     float* BC, float* sums) {
  const int column = at.place(c);
  float A[4], g_h[4], g_A[4], h[kKept + 1][4], decay[kKept][4], delta[4], x[4], dy[4];
  unpack(A, shared.A[c][threadIdx.x]);
  unpack(h[0], shared.kept[c][threadIdx.x]);
  unpack(delta, quad.delta[at.warp][column]);
  unpack(x, quad.of_warp[at.warp].x[column]);
#pragma unroll
  for (int t = 0; t < kKept; ++t) {
    float b[4];
    load4(b, &quad.B[t][at.first_state]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      decay[t][i] = decay_of(delta[t], A[i]);
      h[t + 1][i] = fmaf(decay[t][i], h[t][i], x[t] * b[i]);
    }
  }
  unpack(dy, quad.dy[at.warp][column]);
  unpack(g_h, shared.g_h[c][threadIdx.x]);
  unpack(g_A, shared.g_A[c][threadIdx.x]);
#pragma unroll
  for (int t = kKept - 1; t >= 0; --t) {
    float b[4], c4[4], g_B = 0.0f, g_decay = 0.0f, y = 0.0f;
    load4(b, &quad.B[t][at.first_state]);
    load4(c4, &quad.C[t][at.first_state]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
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

// Adds dB and dC of kKept steps over the warp's channels.
__device__ __forceinline__ void add_BC(Quad& quad, const Place& at, float* BC) {
  exchange<32, 16, kLanes>(BC, at.lane);
  float* to = quad.of_warp[at.warp].sums[0] + at.sum;
  __syncwarp();  // every lane has read x, which this overwrites
#pragma unroll
  for (int i = 0; i < kSumsPerLane; i += 4)
    *reinterpret_cast<float4*>(to + i / 4 * kStates) =
        make_float4(BC[i], BC[i + 1], BC[i + 2], BC[i + 3]);
}

// Adds dB and dC of a tile over the warps and writes the block's part.
__device__ __forceinline__ void store_BC(const ScanParams& p, const Place& at,
                                         const Shared& shared, const int* rows, int left) {
  constexpr int kColumns = 2 * kStates, kTogether = kThreads / kColumns;
  static_assert(kThreads % kColumns == 0 && kTile % kTogether == 0, "");
  const int column = threadIdx.x % kColumns, kind = column / kStates, n = column % kStates;
  if (n >= p.states) return;
  float* to = p.parts_BC + ((at.block * 2 + kind) * p.batch + at.batch) * p.length * p.states + n;
#pragma unroll
  for (int first = 0; first < kTile; first += kTogether) {
    const int t = first + threadIdx.x / kColumns;
    if (t >= left) break;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += shared.quads[t / kKept].of_warp[w].sums[t % kKept][column];
    to[static_cast<Int64>(rows[t]) * static_cast<int>(p.states)] = sum;
  }
}

__device__ __forceinline__ void store_parts(const ScanParams& p, const Place& at,
                                            const Shared& shared, const Channel& channel) {
  const Int64 part = at.batch * p.segments + at.segment;
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const Int64 of = at.warp_channel + at.in_warp(c);
    if (of >= p.channels) continue;
    float g_A[4];
    unpack(g_A, shared.g_A[c][threadIdx.x]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
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
  const Place at(p);
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
  Kept kept(p, at, (at.count - 1) / kKept);
#pragma unroll 1
  for (int c = 0; c < 4; ++c) kept.copy(shared, at, c);

  for (int tile = last; tile >= 0; --tile) {
    const int left = at.count - tile * kTile;
    const int* rows = shared.rows[tile & 3];
    staging.store(shared);
    if (thread < kTile)
      shared.rows[(tile + 2) & 3][thread] = at.row(p, (tile - 2) * kTile + thread);
    wait_for_copies<3>();
    __syncthreads();
#pragma unroll
    for (int q = 0; q < kQuads; ++q)
      channel.prepare(shared.quads[q], at, raw + q * kKept, left - q * kKept);
    __syncwarp();
    if (tile > 0) {
      const int* next = shared.rows[(tile + 3) & 3];
      staging.load(p, at, next);
      Inputs(p, at).copy(raw, at, next);
    }

#pragma unroll 1
    for (int q = min(left - 1, kTile - 1) / kKept; q >= 0; --q) {
      Quad& quad = shared.quads[q];
      float BC[32] = {}, sums[3 * kKept] = {};
      if (tile + q > 0) kept.step_back(at);
#pragma unroll 1
      for (int c = 0; c < 4; ++c) {
        wait_for_copies<3>();
        float part[3 * kKept];
        walk(shared, quad, at, c, BC, part);
        kept.copy(shared, at, c);  // for the next kKept steps
        if (c > 0) {  // to the owner; c = 0 is at home
#pragma unroll
          for (int i = 0; i < 3 * kKept; ++i)
            part[i] = __shfl_xor_sync(0xffffffffu, part[i], c);
        }
#pragma unroll
        for (int i = 0; i < 3 * kKept; ++i) sums[i] += part[i];
      }
      add_lanes<3 * kKept, 4, kLanes>(sums);
      add_BC(quad, at, BC);
      channel.finish(outputs, quad, at, rows + q * kKept, sums, left - q * kKept);
    }
    __syncthreads();
    store_BC(p, at, shared, rows, left);
    channel.close_tile();
  }
  store_parts(p, at, shared, channel);
}
