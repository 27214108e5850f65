"""What to launch for norm, gate and modulation (csrc/adaln), as launch_plan.py has it for scan and
convolution: pure functions, no GPU needed.
"""

import ctypes

from libs.ops.cuda.launch_plan import CTYPES, Kernel, Launch, Plan, Rows, Scratch, Sum

WIDTHS = range(8, 2049, 8)  # a thread has 8 channels, a block 256 threads at most
_ROWS, _BACKWARD_ROWS = 4, 2  # tokens that a block has in flight
_CHUNK, _SMALL_CHUNK = 16, 4  # tokens of a block; the latter where they would not fill the GPU


class AdalnParams(ctypes.Structure):
    """Parameters of every kernel in csrc/adaln; a kernel reads the fields it needs. modulation
    (B, 3, dim), table (3, dim), weight (dim), drop_path_scale (B) or 0: float32, contiguous."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in (
            "batch", "length", "dim",
            "chunks", "chunk_length",  # plan.integers
        )),
        *((name, Rows) for name in (
            "x", "n", "branch", "out", "g_n", "g_out", "g_x", "g_branch"
        )),
        *((name, ctypes.c_void_p) for name in (
            "modulation", "table", "weight", "drop_path_scale",
            "parts_shift", "parts_gain", "parts_factor",  # plan.scratch
            "g_shift", "g_gain", "g_factor", "g_modulation", "g_table", "g_weight",
        )),
    ]  # fmt: skip


def _plan(name, rows, sums, batch, length, dim, x, out, dtype, multiprocessors):
    """x, out, dtype: names of the dtypes of x, of out, and of branch and n."""
    defines = (("kInput", CTYPES[dtype]), ("kOut", CTYPES[out]), ("kRows", str(rows)))
    kernel = Kernel(f"adaln/{name}.cu", name, (*defines, ("kX", CTYPES[x])))
    full = batch * length >= 8 * multiprocessors * _CHUNK
    chunk_length = _CHUNK if full else _SMALL_CHUNK
    chunks = -(-length // chunk_length)
    threads = -(-dim // (32 * WIDTHS.step)) * 32
    launch = Launch(kernel, (batch * chunks, 1, 1), (threads, 1, 1), 0)
    scratch = tuple(Scratch(f"parts_{s}", (chunks, batch, dim), "float32") for s in sums)
    added = tuple(Sum(f"parts_{s}", f"g_{s}", (batch, dim)) for s in sums)
    return Plan((launch,), scratch, {"chunks": chunks, "chunk_length": chunk_length}, added)


def norm_forward(batch, length, dim, x, out, dtype, *gpu):
    return _plan("norm_forward", _ROWS, (), batch, length, dim, x, dtype, dtype, *gpu)


def norm_backward(batch, length, dim, x, out, dtype, *gpu):
    """Gradients of x, shift and gain; n again."""
    sums = ("shift", "gain")
    return _plan("norm_backward", _BACKWARD_ROWS, sums, batch, length, dim, x, out, dtype, *gpu)


def gate_forward(batch, length, dim, x, out, dtype, *gpu):
    return _plan("gate_forward", _ROWS, (), batch, length, dim, x, out, dtype, *gpu)


def gate_backward(batch, length, dim, x, out, dtype, *gpu):
    """Gradients of branch and factor."""
    sums = ("factor",)
    return _plan("gate_backward", _ROWS, sums, batch, length, dim, dtype, out, dtype, *gpu)


def modulation_backward(batch, dim, dtype, multiprocessors):
    """Gradients of modulation, table and weight from those of shift, gain and factor; all float32,
    whichever dtype the network has."""
    defines = (("kInput", "float"), ("kOut", "float"), ("kRows", "1"), ("kX", "float"))
    kernel = Kernel("adaln/modulation_backward.cu", "modulation_backward", defines)
    return Plan((Launch(kernel, (-(-dim // 32), 1, 1), (256, 1, 1), 0),), (), {})
