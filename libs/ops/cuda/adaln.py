"""Norm and gate around a mixer on the GPU, each one pass over all tokens (csrc/adaln):

    n   = x / rms(x) * gain + shift,   gain = weight (1 + scale)
    out = x + factor * branch,         factor = drop_path_scale (1 + gate)

shift, scale, gate: rows of table + modulation. x and out have the residual stream's dtype, branch
and n that of matrix products. Pieces of mamba_block.py, and operators of their own.
"""

from typing import NamedTuple

import torch

from libs.ops.cuda import adaln_plan, launch


class Adaln(NamedTuple):
    """Parameters in float32, contiguous."""

    modulation: torch.Tensor  # (B, 3, dim)
    table: torch.Tensor  # (3, dim)
    weight: torch.Tensor | None  # (dim), of the norm
    drop_path_scale: torch.Tensor | None = None  # (B), of the gate


def _run(plan_of, adaln, x_dtype, out_dtype, rows, outputs=None):
    """Launches a plan over `rows` (field -> (B, L, dim))."""
    first = next(iter(rows.values()))
    batch, length, dim = first.shape
    dtype = rows["n" if "n" in rows else "branch"].dtype
    shape = (batch, length, dim, launch.name_of(x_dtype), launch.name_of(out_dtype))
    prepared = launch.prepared(first.device.index, plan_of, adaln_plan.AdalnParams, shape, dtype)
    scalars = {"batch": batch, "length": length, "dim": dim, **adaln._asdict()}
    launch.run(prepared, first.device, rows, scalars, outputs)


def norm(x, adaln, dtype):
    """x (B, L, dim) -> n in `dtype`."""
    n = x.new_empty(x.shape, dtype=dtype)
    _run(adaln_plan.norm_forward, adaln, x.dtype, dtype, {"x": x, "n": n})
    return n


def norm_backward(g_n, g_out, x, adaln, n):
    """(g_x, g_shift, g_gain): g_out is the gradient that reaches x past the branch; g_shift and
    g_gain are (B, dim). n (B, L, dim) is written again."""
    g_x = torch.empty_like(x)
    g_shift, g_gain = (x.new_empty(x.shape[0], x.shape[2], dtype=torch.float32) for _ in range(2))
    rows = {"x": x, "g_n": g_n, "g_out": g_out, "g_x": g_x, "n": n}
    outputs = {"g_shift": g_shift, "g_gain": g_gain}
    _run(adaln_plan.norm_backward, adaln, x.dtype, g_out.dtype, rows, outputs)
    return g_x, g_shift, g_gain


def gate(x, branch, adaln, dtype):
    """x, branch (B, L, dim) -> out in `dtype`."""
    out = x.new_empty(x.shape, dtype=dtype)
    _run(adaln_plan.gate_forward, adaln, x.dtype, dtype, {"x": x, "branch": branch, "out": out})
    return out


def gate_backward(g_out, branch, adaln):
    """(g_branch, g_factor), g_factor (B, dim)."""
    g_branch = torch.empty_like(branch)
    g_factor = branch.new_empty(branch.shape[0], branch.shape[2], dtype=torch.float32)
    rows = {"g_out": g_out, "branch": branch, "g_branch": g_branch}
    outputs = {"g_factor": g_factor}
    _run(adaln_plan.gate_backward, adaln, branch.dtype, g_out.dtype, rows, outputs)
    return g_branch, g_factor


def modulation_backward(g_shift, g_gain, g_factor, adaln):
    """(g_modulation (B, 3, dim), g_table (3, dim), g_weight (dim)) from gradients (B, dim)."""
    batch, dim = g_shift.shape
    g_modulation, g_table = torch.empty_like(adaln.modulation), torch.empty_like(adaln.table)
    g_weight = torch.empty_like(adaln.weight)
    prepared = launch.prepared(
        g_shift.device.index, adaln_plan.modulation_backward, adaln_plan.AdalnParams,
        (batch, dim), torch.float32, check=False,
    )  # fmt: skip
    scalars = {
        "batch": batch, "dim": dim, "g_shift": g_shift, "g_gain": g_gain, "g_factor": g_factor,
        "g_modulation": g_modulation, "g_table": g_table, "g_weight": g_weight, **adaln._asdict(),
    }  # fmt: skip
    launch.run(prepared, g_shift.device, {}, scalars)
    return g_modulation, g_table, g_weight


# ---------------------------------------- operators of their own


def _norm_operator(x, weight, modulation, table, dtype):
    return norm(as_vectors(x), Adaln(modulation, table, weight), dtype)


def _norm_backward_operator(g_n, x, weight, modulation, table):
    """Past the branch comes nothing here: one row of zeros for all tokens; and n, which nobody
    wants, is written to one row over and over."""
    zeros, n = g_n.new_zeros(g_n.shape[2]), g_n.new_empty(g_n.shape[2])
    zeros, n = zeros.expand(g_n.shape), n.expand(g_n.shape)
    adaln = Adaln(modulation, table, weight)
    g_x, g_shift, g_gain = norm_backward(as_vectors(g_n), zeros, as_vectors(x), adaln, n)
    g = modulation_backward(g_shift, g_gain, torch.zeros_like(g_shift), adaln)
    g_modulation, g_table, g_weight = g
    return g_x, g_weight, g_modulation, g_table


def _gate_operator(x, branch, modulation, table, drop_path_scale, dtype):
    adaln = Adaln(modulation, table, None, drop_path_scale)
    return gate(as_vectors(x), as_vectors(branch), adaln, dtype)


def _gate_backward_operator(g_out, branch, modulation, table, drop_path_scale):
    adaln = Adaln(modulation, table, None, drop_path_scale)
    g_branch, g_factor = gate_backward(as_vectors(g_out), as_vectors(branch), adaln)
    zeros, adaln = torch.zeros_like(g_factor), adaln._replace(weight=table[0])
    g_modulation, g_table, _ = modulation_backward(zeros, zeros, g_factor, adaln)
    return g_branch, g_modulation, g_table


def as_vectors(x):
    """x, or a copy, contiguous and at an address that is a multiple of 16 bytes."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _like(*tensors):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors)


launch.define(
    "modulated_norm(Tensor x, Tensor weight, Tensor modulation, Tensor table, ScalarType dtype) -> "
    "Tensor",
    _norm_operator,
    lambda x, weight, modulation, table, dtype: x.new_empty(x.shape, dtype=dtype),
)
launch.define(
    "modulated_norm_bwd(Tensor g_n, Tensor x, Tensor weight, Tensor modulation, Tensor table) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    _norm_backward_operator,
    lambda g_n, *inputs: _like(*inputs),
)
launch.define(
    "gated_residual(Tensor x, Tensor branch, Tensor modulation, Tensor table, "
    "Tensor? drop_path_scale, ScalarType dtype) -> Tensor",
    _gate_operator,
    lambda x, branch, modulation, table, scale, dtype: x.new_empty(x.shape, dtype=dtype),
)
launch.define(
    "gated_residual_bwd(Tensor g_out, Tensor branch, Tensor modulation, Tensor table, "
    "Tensor? drop_path_scale) -> (Tensor, Tensor, Tensor)",
    _gate_backward_operator,
    lambda g_out, branch, modulation, table, scale: _like(branch, modulation, table),
)


def _save_norm(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])


def _norm_gradients(ctx, g_n):
    return *torch.ops.dim.modulated_norm_bwd(g_n, *ctx.saved_tensors), None


def _save_gate(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:5])


def _gate_gradients(ctx, g_out):
    return g_out, *torch.ops.dim.gated_residual_bwd(g_out, *ctx.saved_tensors), None, None


launch.differentiate("modulated_norm", _save_norm, _norm_gradients)
launch.differentiate("gated_residual", _save_gate, _gate_gradients)


def modulated_norm_cuda(x, weight, modulation, table, out_dtype=None):
    """`reference.modulated_norm_ref` for CUDA tensors in float32, bfloat16 or float16."""
    parameters = map(launch.as_parameter, (weight, modulation, table))
    return torch.ops.dim.modulated_norm(x, *parameters, out_dtype or torch.float32)


def gated_residual_cuda(x, branch, modulation, table, drop_path_scale=None, out_dtype=None):
    """`reference.gated_residual_ref` for CUDA tensors in float32, bfloat16 or float16."""
    parameters = map(launch.as_parameter, (modulation, table, drop_path_scale))
    return torch.ops.dim.gated_residual(x, branch, *parameters, out_dtype or torch.float32)
