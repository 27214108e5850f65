"""The passes around the mixer on the GPU, each over all tokens once (csrc/adaln):

    n   = x / rms(x) * weight (1 + scale) + shift        norm
    out = x + keep (1 + gate) branch                     gate

shift, scale, gate: rows of table + modulation. x and out have the residual stream's dtype, float32
or that of branch and n. Used by cuda_block.py, which holds the autograd.
"""

import functools
from typing import NamedTuple

import torch

from libs.ops.cuda import adaln_plan, launch, self_check


class Adaln(NamedTuple):
    """Parameters: modulation (B, 3, dim), table (3, dim), weight (dim), keep (B) or None; float32,
    contiguous."""

    modulation: torch.Tensor
    table: torch.Tensor
    weight: torch.Tensor
    keep: torch.Tensor | None = None

    def parts(self):
        """shift, scale, gate: (B, dim) each."""
        return (self.table + self.modulation).unbind(1)


def _run(plan_of, of, x_dtype, out_dtype, rows, outputs=None, prepared=None):
    """Launches a plan over `rows` (field -> (B, L, dim))."""
    first = next(iter(rows.values()))
    batch, length, dim = first.shape
    dtype = rows.get("n", rows.get("branch")).dtype
    if prepared is None:
        shape = (batch, length, dim, launch.name_of(x_dtype), launch.name_of(out_dtype))
        prepared = launch.prepared(
            first.device.index, plan_of, adaln_plan.AdalnParams, shape, dtype, _CHECKS[plan_of]
        )
    scalars = {"batch": batch, "length": length, "dim": dim, **of._asdict()}
    launch.run(prepared, first.device, rows, scalars, outputs)


def norm(x, of, dtype, prepared=None):
    """x (B, L, dim) -> n in `dtype`."""
    n = x.new_empty(x.shape, dtype=dtype)
    _run(adaln_plan.norm_forward, of, x.dtype, dtype, {"x": x, "n": n}, prepared=prepared)
    return n


def norm_backward(g_n, g_out, x, of, prepared=None):
    """(g_x, n, g_shift, g_gain): g_out is the gradient that reaches x past the branch; g_shift and
    g_gain (B, dim), gain being weight (1 + scale)."""
    g_x, n = torch.empty_like(x), torch.empty_like(g_n)
    g_shift, g_gain = (x.new_empty(x.shape[0], x.shape[2], dtype=torch.float32) for _ in range(2))
    rows = {"x": x, "g_n": g_n, "g_out": g_out, "g_x": g_x, "n": n}
    outputs = {"g_shift": g_shift, "g_gain": g_gain}
    _run(adaln_plan.norm_backward, of, x.dtype, g_out.dtype, rows, outputs, prepared)
    return g_x, n, g_shift, g_gain


def gate(x, branch, of, dtype, prepared=None):
    """x, branch (B, L, dim) -> out in `dtype`."""
    out = x.new_empty(x.shape, dtype=dtype)
    rows = {"x": x, "branch": branch, "out": out}
    _run(adaln_plan.gate_forward, of, x.dtype, dtype, rows, prepared=prepared)
    return out


def gate_backward(g_out, branch, of, prepared=None):
    """(g_branch, g_factor): g_factor (B, dim), the factor being keep (1 + gate)."""
    g_branch = torch.empty_like(branch)
    g_factor = branch.new_empty(branch.shape[0], branch.shape[2], dtype=torch.float32)
    rows = {"g_out": g_out, "branch": branch, "g_branch": g_branch}
    outputs = {"g_factor": g_factor}
    _run(adaln_plan.gate_backward, of, branch.dtype, g_out.dtype, rows, outputs, prepared)
    return g_branch, g_factor


def modulation_backward(g_shift, g_gain, g_factor, of, prepared=None):
    """(g_modulation (B, 3, dim), g_table (3, dim), g_weight (dim)) from the gradients (B, dim)."""
    batch, dim = g_shift.shape
    g_modulation = torch.empty_like(of.modulation)
    g_table, g_weight = torch.empty_like(of.table), torch.empty_like(of.weight)
    if prepared is None:
        prepared = launch.prepared(
            g_shift.device.index, adaln_plan.modulation_backward, adaln_plan.AdalnParams,
            (batch, dim), torch.float32, _check_modulation_backward,
        )  # fmt: skip
    scalars = {
        "batch": batch, "dim": dim, "g_shift": g_shift, "g_gain": g_gain, "g_factor": g_factor,
        "g_modulation": g_modulation, "g_table": g_table, "g_weight": g_weight, **of._asdict(),
    }  # fmt: skip
    launch.run(prepared, g_shift.device, {}, scalars)
    return g_modulation, g_table, g_weight


# ---------------------------------------- the definition, and self-checks against it


def block_ref(x, branch, of):
    """(n, out) of x, branch (B, L, dim): what the passes compute, in plain PyTorch."""
    shift, scale, gate_ = (part[:, None] for part in of.parts())
    xhat = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
    keep = 1 if of.keep is None else of.keep[:, None, None]
    return xhat * of.weight * (1 + scale) + shift, x + keep * (1 + gate_) * branch


def _problem(dtypes, dim=72):
    """CPU inputs by name: tensors in `dtypes` (x, out, other), an Adaln in float32."""
    x, out, other = dtypes
    sequence = (2, self_check.LENGTH, dim)
    shapes = {"modulation": (2, 3, dim), "table": (3, dim), "weight": dim, "keep": 2}
    of = Adaln(**self_check.random_inputs(shapes, (), other))
    shapes = dict.fromkeys(("x", "branch", "g_n", "g_out"), sequence)
    inputs = self_check.random_inputs(shapes, (), other, 1)
    kinds = {"x": x, "branch": other, "g_n": other, "g_out": out}
    return {k: v.to(kinds[k]) for k, v in inputs.items()}, of


def _expected(inputs, of):
    """What the passes make of a problem in float64: name -> tensor."""
    x, branch = (inputs[k].double().requires_grad_() for k in ("x", "branch"))
    of = Adaln(*(v.double().requires_grad_() for v in of))
    n, out = block_ref(x, branch, of)
    g_n, g_out = inputs["g_n"].double(), inputs["g_out"].double()
    g_x, g_shift, g_weight = torch.autograd.grad(n, (x, of.modulation, of.weight), g_n)
    g_branch, g_gate = torch.autograd.grad(out, (branch, of.modulation), g_out)
    return {
        "n": n.detach(), "out": out.detach(), "g_x": g_x + g_out, "g_shift": g_shift[:, 0],
        "g_gain": g_shift[:, 1] / of.weight.detach(), "g_branch": g_branch,
        "g_factor": g_gate[:, 2] / of.keep.detach()[:, None],
    }  # fmt: skip


def _check(plan_of, names, gpu, plan, shape, dtype):
    """Runs the plan's kernel on a small problem; the results called `names` must be right."""
    x_dtype, out_dtype = (getattr(torch, name) for name in shape[3:])
    inputs, of = _problem((x_dtype, out_dtype, dtype))
    expected = _expected(inputs, of)
    small = plan_of(2, self_check.LENGTH, 72, *shape[3:], launch.name_of(dtype),
    gpu.multiprocessors)
    prepared = launch.prepare(small, adaln_plan.AdalnParams, gpu.index)
    at = {k: v.to(gpu.device) for k, v in inputs.items()}
    of = Adaln(*(v.to(gpu.device) for v in of))
    run = {
        adaln_plan.norm_forward: lambda: (norm(at["x"], of, dtype, prepared),),
        adaln_plan.norm_backward: lambda: norm_backward(
            at["g_n"], at["g_out"], at["x"], of, prepared
        ),
        adaln_plan.gate_forward: lambda: (gate(at["x"], at["branch"], of, out_dtype, prepared),),
        adaln_plan.gate_backward: lambda: gate_backward(at["g_out"], at["branch"], of, prepared),
    }[plan_of]
    actual = dict(zip(names, run(), strict=True))
    for name, value in actual.items():
        self_check.require_agreement(
            f"the block ({name})", gpu, {name: value}, {name: expected[name]}, value.dtype
        )
    return plan.kernels()


def _check_modulation_backward(gpu, plan, shape, dtype):
    batch, dim = 19, 72
    shapes = {"modulation": (batch, 3, dim), "table": (3, dim), "weight": dim, "keep": batch}
    of = Adaln(**self_check.random_inputs(shapes, (), dtype))
    shapes = dict.fromkeys(("shift", "gain", "factor"), (batch, dim))
    g = self_check.random_inputs(shapes, (), dtype, 1)
    exact = Adaln(*(v.double().requires_grad_() for v in of))
    shift, scale, gate_ = exact.parts()
    outputs = shift, exact.weight * (1 + scale), exact.keep[:, None] * (1 + gate_)
    names = ("modulation", "table", "weight")
    expected = torch.autograd.grad(
        outputs, [getattr(exact, name) for name in names], [v.double() for v in g.values()]
    )
    small = adaln_plan.modulation_backward(batch, dim, "float32", gpu.multiprocessors)
    prepared = launch.prepare(small, adaln_plan.AdalnParams, gpu.index)
    actual = modulation_backward(
        *(v.to(gpu.device) for v in g.values()), Adaln(*(v.to(gpu.device) for v in of)), prepared
    )
    self_check.require_agreement(
        "the block's modulation", gpu, dict(zip(names, actual, strict=True)),
        dict(zip(names, expected, strict=True)), dtype,
    )  # fmt: skip
    return plan.kernels()


_CHECKS = {
    plan_of: functools.partial(_check, plan_of, names)
    for plan_of, names in {
        adaln_plan.norm_forward: ("n",),
        adaln_plan.norm_backward: ("g_x", "n", "g_shift", "g_gain"),
        adaln_plan.gate_forward: ("out",),
        adaln_plan.gate_backward: ("g_branch", "g_factor"),
    }.items()
}
