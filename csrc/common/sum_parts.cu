// Sums of partial results in a fixed order, so that gradients are bit-equal in every run; up to kTasks
// of them at once.
// -D: kOutput (type of a result that is not float).
#include "common/types.cuh"

constexpr int kTasks = 4;

struct SumTask {
  const float* parts;  // (count, size)
  void* out;           // (size)
  Int64 count, size;   // size 0: nothing to do
  Int64 is_float;      // out is float, not kOutput
};

struct SumParams {
  SumTask task[kTasks];
};
static_assert(sizeof(SumParams) == 40 * kTasks, "mirrored by libs/ops/cuda/launch_plan.py");

// A block adds 32 or, where rows are vectors of 4, 128 neighbouring columns, each on kLanes threads.
constexpr int kLanes = 8;

template <int kSize>
__device__ __forceinline__ void add(const SumTask& task, Int64 block, float (*shared)[32][kSize]) {
  typedef Packed<float, kSize> Columns;
  const int column = threadIdx.x % 32, lane = threadIdx.x / 32;
  const Int64 first = (block * 32 + column) * kSize;
  Columns sum = {};
  if (first < task.size)
#pragma unroll 4
    for (Int64 k = lane; k < task.count; k += kLanes) {
      const Columns part = *reinterpret_cast<const Columns*>(task.parts + k * task.size + first);
      UNROLL for (int i = 0; i < kSize; ++i) sum.v[i] += part.v[i];
    }
  UNROLL for (int i = 0; i < kSize; ++i) shared[lane][column][i] = sum.v[i];
  UNROLL for (int stride = kLanes / 2; stride > 0; stride /= 2) {
    __syncthreads();
    if (lane < stride)
      UNROLL for (int i = 0; i < kSize; ++i) shared[lane][column][i] += shared[lane + stride][column][i];
  }
  if (lane > 0 || first >= task.size) return;
  UNROLL for (int i = 0; i < kSize; ++i) {
    const float value = shared[0][column][i];
    if (task.is_float)
      static_cast<float*>(task.out)[first + i] = value;
    else
      static_cast<kOutput*>(task.out)[first + i] = from_float<kOutput>(value);
  }
}

extern "C" __global__ void __launch_bounds__(32 * kLanes)
    sum_parts(const __grid_constant__ SumParams p) {
  __shared__ float shared[kLanes * 32 * 4];
  Int64 block = blockIdx.x;
#pragma unroll 1
  for (int t = 0; t < kTasks; ++t) {
    const SumTask& task = p.task[t];
    const int columns = task.size % 4 == 0 ? 4 : 1;
    const Int64 blocks = (task.size + 32 * columns - 1) / (32 * columns);
    if (block < blocks) {
      if (columns == 4)
        add<4>(task, block, reinterpret_cast<float(*)[32][4]>(shared));
      else
        add<1>(task, block, reinterpret_cast<float(*)[32][1]>(shared));
      return;
    }
    block -= blocks;
  }
}
