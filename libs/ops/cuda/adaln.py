"""Norm and gate around a mixer on the GPU, each one pass over all tokens (csrc/adaln):

    n   = x / rms(x) * gain + shift,   gain = weight (1 + scale)
    out = x + factor * branch,         factor = drop_path_scale (1 + gate)

shift, scale, gate: rows of table + modulation. x and out have the residual stream's dtype, branch
and n that of matrix products. Pieces of mamba_block.py, and operators of their own.
"""

import functools
from collections import namedtuple

import torch

from libs.ops.cuda import launch
from libs.ops.cuda.launch import as_vectors
from libs.ops.cuda.launch_plan import CTYPES, Launch, Plan, cut, find_slots, make_kernel

WIDTHS = range(8, 2049, 8)  # a thread has 8 channels, a block 256 threads at most
_LEAST = 4  # tokens of a chunk
_RESIDENT = 768  # threads of any of these kernels that a multiprocessor holds at least


# Of every kernel in csrc/adaln; a kernel reads the fields it needs. All but rows are float32.
AdalnParams = find_slots(
    "batch length dim chunks chunk_length",
    "x n branch out g_n g_out g_x g_branch rounded g_rounded",
    "modulation table weight drop_path_scale parts_shift parts_gain parts_factor g_shift g_gain "
    "g_factor g_modulation g_table g_weight",
)  # fmt: skip


def _plan(name, rows, sums, waves, batch, length, dim, stream, x, out, dtype, multiprocessors):
    """rows: tokens that a block has in flight. waves: whether chunks of tokens are as long as whole
    waves of blocks allow, or as short as can be. stream, x, out, dtype: names of the dtypes of g_x,
    of x, of out, and of branch and n."""
    kernel = make_kernel(
        f"adaln/{name}.cu", name, kInput=CTYPES[dtype], kStream=CTYPES[stream], kX=CTYPES[x],
        kOut=CTYPES[out], kRows=rows,
    )  # fmt: skip
    threads = -(-dim // (32 * WIDTHS.step)) * 32
    resident = _RESIDENT // threads * multiprocessors if waves else batch * length  # all at once
    integers = cut(length, _LEAST, batch, resident)
    launch = Launch(kernel, (batch * integers["chunks"], 1, 1), (threads, 1, 1))
    scratch = {f"parts_{s}": (integers["chunks"], batch, dim) for s in sums}
    added = {f"parts_{s}": (f"g_{s}", "float32") for s in sums}
    return Plan((launch,), integers, scratch, added)


# Of (batch, length, dim, stream, x, out, dtype, multiprocessors). A backward adds up what it names.
plan_norm_forward = functools.partial(_plan, "norm_forward", 2, (), True)
plan_norm_backward = functools.partial(_plan, "norm_backward", 1, ("shift", "gain"), True)
plan_gate_forward = functools.partial(_plan, "gate_forward", 4, (), False)
plan_gate_backward = functools.partial(_plan, "gate_backward", 4, ("factor",), True)


def plan_modulation_backward(batch, dim, dtype, multiprocessors):
    """Gradients of modulation, table and weight from those of shift, gain and factor; all float32,
    whichever dtype the network has."""
    kernel = make_kernel(
        "adaln/modulation_backward.cu", "modulation_backward", kInput="float",
        kStream="float", kX="float", kOut="float", kRows=1,
    )  # fmt: skip
    return Plan((Launch(kernel, (-(-dim // 32), 1, 1), (256, 1, 1)),))


# Parameters in float32, contiguous: modulation (B, 3, dim), table (3, dim), weight of the norm
# (dim), drop_path_scale of the gate (B); None where it is not wanted.
Adaln = namedtuple("Adaln", "modulation table weight drop_path_scale", defaults=(None,))


def _run(plan_of, adaln, stream_dtype, out_dtype, rows, outputs=None):
    """Launches a plan over `rows` (field -> (B, L, dim)), x first where there is one."""
    first = next(iter(rows.values()))
    batch, length, dim = first.shape
    dtype = rows["n" if "n" in rows else "branch"].dtype
    dtypes = map(launch.spell_dtype, (stream_dtype, first.dtype, out_dtype))
    shape = (batch, length, dim, *dtypes)
    prepared = launch.prepared(first.device.index, plan_of, AdalnParams, shape, dtype)
    scalars = {"batch": batch, "length": length, "dim": dim, **adaln._asdict()}
    launch.run(prepared, first.device, rows, scalars, outputs)


def norm(x, adaln, dtype, rounded=None):
    """x (B, L, dim) -> n in `dtype`. rounded: where x is to be written in `dtype` too."""
    n = x.new_empty(x.shape, dtype=dtype)
    _run(plan_norm_forward, adaln, x.dtype, dtype, {"x": x, "n": n, "rounded": rounded})
    return n


def norm_backward(g_n, g_out, x, adaln, n, dtype, g_rounded=None):
    """(g_x in `dtype`, g_shift and g_gain (B, dim)). x: as the forward had it or `rounded`; g_out,
    g_rounded: the gradients that reach it past the branch and through `rounded`; n (B, L, dim): is
    written again."""
    g_x = torch.empty_like(x, dtype=dtype)
    g_shift, g_gain = (x.new_empty(x.shape[0], x.shape[2], dtype=torch.float32) for _ in range(2))
    rows = {"x": x, "g_n": g_n, "g_out": g_out, "g_x": g_x, "n": n, "g_rounded": g_rounded}
    outputs = {"g_shift": g_shift, "g_gain": g_gain}
    _run(plan_norm_backward, adaln, dtype, g_out.dtype, rows, outputs)
    return g_x, g_shift, g_gain


def gate(x, branch, adaln, dtype):
    """x, branch (B, L, dim) -> out in `dtype`."""
    out = x.new_empty(x.shape, dtype=dtype)
    _run(plan_gate_forward, adaln, x.dtype, dtype, {"x": x, "branch": branch, "out": out})
    return out


def gate_backward(g_out, branch, adaln):
    """(g_branch, g_factor), g_factor (B, dim)."""
    g_branch = torch.empty_like(branch)
    g_factor = branch.new_empty(branch.shape[0], branch.shape[2], dtype=torch.float32)
    rows = {"g_out": g_out, "branch": branch, "g_branch": g_branch}
    outputs = {"g_factor": g_factor}
    _run(plan_gate_backward, adaln, branch.dtype, g_out.dtype, rows, outputs)
    return g_branch, g_factor


def modulation_backward(g_shift, g_gain, g_factor, adaln):
    """(g_modulation (B, 3, dim), g_table (3, dim), g_weight (dim)) from gradients (B, dim)."""
    batch, dim = g_shift.shape
    g_modulation, g_table = torch.empty_like(adaln.modulation), torch.empty_like(adaln.table)
    g_weight = torch.empty_like(adaln.weight)
    prepared = launch.prepared(
        g_shift.device.index, plan_modulation_backward, AdalnParams,
        (batch, dim), torch.float32, check=False,
    )  # fmt: skip
    scalars = {
        "batch": batch, "dim": dim, "g_shift": g_shift, "g_gain": g_gain, "g_factor": g_factor,
        "g_modulation": g_modulation, "g_table": g_table, "g_weight": g_weight, **adaln._asdict(),
    }  # fmt: skip
    launch.run(prepared, g_shift.device, {}, scalars)
    return g_modulation, g_table, g_weight


def _norm_operator(x, weight, modulation, table, dtype):
    return norm(as_vectors(x), Adaln(modulation, table, weight), dtype)


def _norm_backward_operator(g_n, x, weight, modulation, table, dtype):
    """Past the branch comes nothing here: one row of zeros for all tokens; and n, which nobody
    wants, is written to one row over and over."""
    zeros, n = g_n.new_zeros(g_n.shape[2]), g_n.new_empty(g_n.shape[2])
    zeros, n = zeros.expand(g_n.shape), n.expand(g_n.shape)
    adaln = Adaln(modulation, table, weight)
    g_x, g_shift, g_gain = norm_backward(as_vectors(g_n), zeros, as_vectors(x), adaln, n, x.dtype)
    g = modulation_backward(g_shift, g_gain, torch.zeros_like(g_shift), adaln)
    g_modulation, g_table, g_weight = g
    return g_x, g_weight, g_modulation, g_table


def _gate_operator(x, branch, modulation, table, drop_path_scale, dtype):
    adaln = Adaln(modulation, table, None, drop_path_scale)
    return gate(as_vectors(x), as_vectors(branch), adaln, dtype)


def _gate_backward_operator(g_out, x, branch, modulation, table, drop_path_scale, dtype):
    adaln = Adaln(modulation, table, None, drop_path_scale)
    g_branch, g_factor = gate_backward(as_vectors(g_out), as_vectors(branch), adaln)
    zeros, adaln = torch.zeros_like(g_factor), adaln._replace(weight=table[0])
    g_modulation, g_table, _ = modulation_backward(zeros, zeros, g_factor, adaln)
    return g_branch, g_modulation, g_table


def _fake(x, *rest):
    return x.new_empty(x.shape, dtype=rest[-1])


launch.operator(
    "modulated_norm",
    "Tensor x, Tensor weight, Tensor modulation, Tensor table, ScalarType dtype", (1, 4),
    _norm_operator, _fake, _norm_backward_operator, lambda g, *inputs: launch.like(*inputs[:4]),
)  # fmt: skip
launch.operator(
    "gated_residual",
    "Tensor x, Tensor branch, Tensor modulation, Tensor table, Tensor? drop_path_scale, "
    "ScalarType dtype", (1, 3),
    _gate_operator, _fake, _gate_backward_operator, lambda g, *inputs: launch.like(*inputs[1:4]),
    lambda g, found: (*g, *found),
)  # fmt: skip


def modulated_norm_cuda(x, weight, modulation, table, out_dtype=None):
    """`reference.modulated_norm_ref` for CUDA tensors in float32, bfloat16 or float16."""
    parameters = map(launch.as_parameter, (weight, modulation, table))
    return torch.ops.dim.modulated_norm(x, *parameters, out_dtype or torch.float32)


def gated_residual_cuda(x, branch, modulation, table, drop_path_scale=None, out_dtype=None):
    """`reference.gated_residual_ref` for CUDA tensors in float32, bfloat16 or float16."""
    parameters = map(launch.as_parameter, (modulation, table, drop_path_scale))
    return torch.ops.dim.gated_residual(x, branch, *parameters, out_dtype or torch.float32)
