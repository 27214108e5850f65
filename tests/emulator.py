"""The CUDA kernels' work by the operators' definition, on the CPU: for tests of all that stands
above launch.run, without a GPU.
"""

import concurrent.futures
import types

import torch

from libs.ops.cuda import adaln, causal_conv1d, fp8, launch, mamba_block, selective_scan
from libs.ops.reference import (
    causal_conv1d_ref,
    gated_residual_ref,
    modulated_norm_ref,
    selective_scan_ref,
)


def leaves(*tensors):
    return [None if x is None else x.detach().clone().requires_grad_() for x in tensors]


def gradients(outputs, inputs, g):
    """In a thread of its own: below the dispatcher, the one that called records no gradients."""
    wanted = [x for x in inputs if x is not None]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        found = iter(pool.submit(lambda: torch.autograd.grad(outputs(), wanted, g)).result())
    return [None if x is None else next(found) for x in inputs]


def put(places):
    for place, value in places:
        if place is not None and place.numel() and 0 not in place.stride():  # else nobody reads it
            place.copy_(value)


def scan(rows, x, outputs, backward):
    sequences = [rows.get(name) for name in ("u", "delta", "B", "C", "z")]
    assert len({t.dtype for t in sequences if t is not None}) == 1, "sequences of one dtype"
    assert all(x[k].dtype == torch.float32 for k in ("A", "D", "delta_bias"))
    u, delta, B, C, z = sequences
    inputs = leaves(u, delta, x["A"], B, C, x["D"], z, x["delta_bias"])

    def forward():
        return selective_scan_ref(*inputs, bool(x["delta_softplus"]), x["order"], True)

    y, state = (t.detach() for t in forward())
    put([(rows["y"], y), (x.get("last_state"), state)])
    if not backward:
        return
    g_state = torch.zeros_like(state) if x["g_last_state"] is None else x["g_last_state"]
    g = gradients(forward, inputs, (rows["g_y"], g_state))
    g_u, g_delta, g_A, g_B, g_C, g_D, g_z, g_bias = g
    put([
        (rows["g_u"], g_u), (rows["g_delta"], g_delta), (rows["g_z"], g_z), (outputs["g_A"], g_A),
        (outputs["g_BC"], torch.stack([g_B, g_C])), (outputs["g_D"], g_D),
        (outputs["g_delta_bias"], g_bias),
    ])  # fmt: skip


def convolution(rows, x, outputs, backward):
    inputs = leaves(rows["x"], x["weight"], x["bias"])

    def forward():
        return causal_conv1d_ref(*inputs, "silu" if x["silu"] else None, x["order"])

    if not backward:
        return put([(rows["y"], forward().detach())])
    g = gradients(forward, inputs, rows["g_y"])
    put(zip((rows["g_x"], outputs["g_weight"], outputs["g_bias"]), g, strict=True))


def norm(rows, x, outputs, backward):
    weight, modulation, table = x["weight"], x["modulation"], x["table"]
    put([(rows["n"], modulated_norm_ref(rows["x"], weight, modulation, table))])
    put([(rows.get("rounded"), rows["x"])])
    if not backward:
        return
    shift, scale, _ = (table + modulation).unbind(1)
    inputs = leaves(rows["x"].float(), weight * (1 + scale), shift)

    def forward():
        x, gain, shift = inputs
        xhat = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
        return xhat * gain[:, None] + shift[:, None]

    g_x, g_gain, g_shift = gradients(forward, inputs, rows["g_n"].float())
    g_rounded = 0 if rows["g_rounded"] is None else rows["g_rounded"]
    put([(rows["g_x"], g_x + rows["g_out"] + g_rounded), (outputs["g_gain"], g_gain)])
    put([(outputs["g_shift"], g_shift)])


def gate(rows, x, outputs, backward):
    parameters = x["modulation"], x["table"], x["drop_path_scale"]
    if not backward:
        return put([(rows["out"], gated_residual_ref(rows["x"], rows["branch"], *parameters))])
    g_out, branch = rows["g_out"].float(), rows["branch"].float()
    put([(rows["g_branch"], gated_residual_ref(torch.zeros_like(g_out), g_out, *parameters))])
    put([(outputs["g_factor"], (g_out * branch).sum(1))])


def modulation(x):
    inputs = leaves(x["modulation"], x["table"], x["weight"])
    drop_path_scale = 1 if x["drop_path_scale"] is None else x["drop_path_scale"][:, None]

    def forward():
        shift, scale, gate = (inputs[0] + inputs[1]).unbind(1)
        return shift, inputs[2] * (1 + scale), drop_path_scale * (1 + gate)

    g = gradients(forward, inputs, (x["g_shift"], x["g_gain"], x["g_factor"]))
    put(zip((x["g_modulation"], x["g_table"], x["g_weight"]), g, strict=True))


def quantize_rows(rows, x, outputs, backward):
    x8, scale = fp8.quantize_rows_ref(torch.cat([part[0] for part in rows.values()], 1))
    x["out"].copy_(x8)
    x["scale"].copy_(scale)


def quantize_transposed(rows, x, outputs, backward):
    out = x["out"].zero_()
    out[:, : x["rows"]] = (rows["x"][0].float() / x["scale"]).to(fp8.E4M3).T


KERNELS = {
    "scan_forward": scan, "scan_forward_lanes": scan, "scan_backward": scan,
    "conv_forward": convolution, "conv_backward": convolution,
    "norm_forward": norm, "norm_backward": norm, "gate_forward": gate, "gate_backward": gate,
    "quantize_rows": quantize_rows, "quantize_transposed": quantize_transposed,
}  # fmt: skip


def run(plan, device, rows, scalars, outputs=None):
    """In place of launch.run, on a plan that was not prepared."""
    name = plan.launches[-1].kernel.name
    with torch.no_grad():
        if name == "modulation_backward":
            modulation(scalars)
        else:
            KERNELS[name](rows, scalars, outputs, name.endswith("backward"))


def install(monkeypatch):
    """From now on plans are run by the emulator; returns the GPU that they are made for, whose
    `kernels` collects what they want."""
    gpu = types.SimpleNamespace(
        index=-1, device=torch.device("cpu"), arch=90, multiprocessors=132, name="a GPU",
        prepared={}, checked={torch.float32, torch.bfloat16, torch.float16}, kernels=set(),
    )  # fmt: skip

    def prepare(plan, struct, index):
        gpu.kernels.update(plan.kernels())
        return plan

    monkeypatch.setattr(launch.Gpu, "of", staticmethod(lambda index: gpu))
    monkeypatch.setattr(launch, "prepare", prepare)
    monkeypatch.setattr(launch, "run", run)
    return gpu


def register():
    """The operators on CPU tensors, until the library that is returned is destroyed."""
    library = torch.library.Library("dim", "IMPL")
    for name, function in {
        "selective_scan": selective_scan._forward,
        "selective_scan_bwd": selective_scan._backward,
        "causal_conv1d": causal_conv1d.forward,
        "causal_conv1d_bwd": causal_conv1d.backward,
        "modulated_norm": adaln._norm_operator,
        "modulated_norm_bwd": adaln._norm_backward_operator,
        "gated_residual": adaln._gate_operator,
        "gated_residual_bwd": adaln._gate_backward_operator,
        "mamba_block": mamba_block._forward,
        "mamba_block_bwd": mamba_block._backward,
        "fp8_merge": fp8._merge,
        "fp8_merge_bwd": fp8._merge_backward,
    }.items():
        library.impl(name, function, "CPU")
    return library
