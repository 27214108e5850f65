"""Every kernel that the shipped configs can want on a GPU; needs no GPU.

`python -m libs.ops.cuda.prebuild "90;100"` compiles them for sm_90 and sm_100 into the cache ahead
of time. setup.py runs it when DIM_PREBUILD_ARCHS is set.
"""

import re
import sys

from libs.ops.cuda import adaln, compiler, fp8, launch_plan

OLDEST_FUSED = 80  # on earlier GPUs the fused block has not been tried
# (batch, length, channels) that between them want every variant of the scan.
_SHAPES = ((1, 78, 256), (1, 9806, 256), (4, 1230, 3072), (96, 366, 3072))


def streams(dtype):
    """(dtype of x, dtype of out) of the blocks: in training the stream is float32 in the first half
    of the network, and rounded where a long skip is merged."""
    return sorted({("float32", "float32"), ("float32", dtype), (dtype, dtype)})


def _plans(dtype, arch, gpu):
    for shape in _SHAPES:
        yield launch_plan.scan_forward(*shape, 16, dtype, gpu)
        yield launch_plan.scan_backward(*shape, 16, dtype, gpu)
        if arch >= OLDEST_FUSED:
            yield launch_plan.scan_backward_with_output(*shape, 16, dtype, gpu)
        yield launch_plan.conv_forward(*shape, 3, dtype, gpu)
        yield launch_plan.conv_backward(*shape, 3, dtype, gpu)
    for x, out in streams(dtype):
        yield adaln.plan_norm_forward(2, 366, 1536, x, x, dtype, dtype, gpu)
        yield adaln.plan_norm_backward(2, 366, 1536, x, dtype, out, dtype, gpu)
        yield adaln.plan_gate_forward(2, 366, 1536, x, x, out, dtype, gpu)
        yield adaln.plan_gate_backward(2, 366, 1536, dtype, out, out, dtype, gpu)
    # Where the block is not fused, which keeps x as it is.
    yield adaln.plan_norm_backward(2, 366, 1536, "float32", "float32", dtype, dtype, gpu)
    yield adaln.plan_modulation_backward(2, 1536, dtype, gpu)
    if arch >= fp8.OLDEST_ARCH and dtype != "float32":
        yield from (fp8.plan_rows(1, columns, dtype, gpu) for columns in fp8.COLUMNS)
        yield fp8.plan_transposed(64, 64, dtype, gpu)


def kernels_of_configs(dtype, arch, multiprocessors=132):
    """The kernels of networks whose products are in this dtype ('bfloat16'), for an architecture,
    90 for sm_90: of the operators, the fused block and products in fp8; sorted."""
    return sorted({k for plan in _plans(dtype, arch, multiprocessors) for k in plan.kernels()})


def main(text):
    for arch in map(int, re.findall(r"\d+", text)):
        kernels = {k for dtype in launch_plan.CTYPES for k in kernels_of_configs(dtype, arch)}
        compiler.compile_all(kernels, arch)
        print(f"{len(kernels)} CUDA kernels for sm_{arch} are in {compiler.cache_directory()}")


if __name__ == "__main__":
    main(sys.argv[1])
