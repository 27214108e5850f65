"""Every kernel that the shipped configs can want on a GPU; needs no GPU."""

from libs.ops.cuda import adaln, fp8, launch_plan

OLDEST_FUSED = 80  # earlier GPUs lack the shared memory for the backward of a fused block
# (batch, length, channels) that between them want every variant of the scan.
_SHAPES = ((1, 78, 256), (1, 9806, 256), (4, 1230, 3072), (96, 366, 3072))


def streams(dtype):
    """(dtype of x, dtype of out) of the blocks: the stream is float32 in the first half of the
    network, and rounded where a long skip is merged."""
    return sorted({("float32", "float32"), ("float32", dtype), (dtype, dtype)})


def _plans(dtype, arch, multiprocessors):
    for batch, length, channels in _SHAPES:
        scan = batch, length, channels, 16, dtype, multiprocessors
        conv = batch, length, channels, 3, dtype, multiprocessors
        yield launch_plan.scan_forward(*scan)
        yield launch_plan.scan_backward(*scan)
        if arch >= OLDEST_FUSED:
            yield launch_plan.scan_backward(*scan, output=True)
        yield launch_plan.conv_forward(*conv)
        yield launch_plan.conv_backward(*conv)
    for x, out in streams(dtype):
        for name in ("norm_forward", "norm_backward", "gate_forward", "gate_backward"):
            yield getattr(adaln, f"plan_{name}")(2, 366, 1536, x, out, dtype, multiprocessors)
    yield adaln.plan_modulation_backward(2, 1536, dtype, multiprocessors)
    if arch >= fp8.OLDEST_ARCH and dtype != "float32":
        for columns in fp8.COLUMNS:
            yield fp8.plan_rows(1, columns, dtype, multiprocessors)
        yield fp8.plan_transposed(64, 64, dtype, multiprocessors)


def kernels_of_configs(dtype, arch, multiprocessors=132):
    """The kernels of networks whose products are in this dtype ('bfloat16'), for an architecture,
    90 for sm_90: of the operators, the fused block and products in fp8; sorted."""
    return sorted({k for plan in _plans(dtype, arch, multiprocessors) for k in plan.kernels()})
