"""Causal convolution on the GPU: `dim::causal_conv1d_fwd`, `dim::causal_conv1d_bwd` and autograd,
as in cuda_scan.py. The operators want weight and bias in float32 and an int64 order.
"""

import torch

from libs.ops.cuda import launch, launch_plan, self_check
from libs.ops.reference import causal_conv1d_ref

_library = torch.library.Library("dim", "FRAGMENT")
_INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? order, bool silu"
_library.define(f"causal_conv1d_fwd({_INPUTS}) -> Tensor")
# -> gradients of x, weight and bias; an absent bias's is empty
_library.define(f"causal_conv1d_bwd(Tensor g_y, {_INPUTS}) -> (Tensor, Tensor, Tensor)")


def _forward(x, weight, *rest):
    return run_forward(forward_plan(x, weight), x, weight, *rest)


def forward_plan(x, weight):
    return _prepared(launch_plan.conv_forward, _check_forward, x, weight)


def run_forward(prepared, x, weight, bias, order, silu):
    y = x.new_empty(x.shape)
    rows = {"x": launch.as_rows(x), "y": y}
    launch.run(prepared, x.device, rows, _scalars(x, weight, bias, order, silu))
    return y


def _backward(g_y, x, weight, *rest):
    return run_backward(backward_plan(x, weight), g_y, x, weight, *rest)


def backward_plan(x, weight):
    return _prepared(launch_plan.conv_backward, _check_backward, x, weight)


def run_backward(prepared, g_y, x, weight, bias, order, silu, g_x=None):
    """Gradients as the operator returns them. g_x (B, L, D): where x's is to be written."""
    own_g_x, g_weight, g_bias = _empty_gradients(
        g_y, x if g_x is None else x[:0], weight, bias, order, silu
    )
    g_x = own_g_x if g_x is None else g_x
    rows = {"x": launch.as_rows(x), "g_y": launch.as_rows(g_y), "g_x": g_x}
    outputs = {"g_weight": g_weight, "g_bias": g_bias}
    launch.run(prepared, x.device, rows, _scalars(x, weight, bias, order, silu), outputs)
    return g_x, g_weight, g_bias


def _scalars(x, weight, bias, order, silu):
    batch, length, channels = x.shape
    return {
        "batch": batch, "length": length, "channels": channels, "silu": silu,
        "weight": weight, "bias": bias, "order": order,
    }  # fmt: skip


def _empty_gradients(g_y, x, weight, bias, order, silu):
    shape = 0 if bias is None else bias.shape
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(shape)


def _prepared(plan_of, check, x, weight):
    """What to launch for tensors of these shapes."""
    shape = (*x.shape, weight.shape[1])
    return launch.prepared(
        x.device.index, plan_of, launch_plan.ConvParams, shape, x.dtype, check
    )


_library.impl("causal_conv1d_fwd", _forward, "CUDA")
_library.impl("causal_conv1d_bwd", _backward, "CUDA")
torch.library.register_fake(
    "dim::causal_conv1d_fwd", lambda x, *rest: x.new_empty(x.shape), lib=_library
)
torch.library.register_fake("dim::causal_conv1d_bwd", _empty_gradients, lib=_library)


# ---------------------------------------- self-check


def _small_problems(gpu, plan_of, width, dtype):
    """Small problems for the kernels, one with rows of whole vectors and one without: (prepared,
    CPU inputs in the operators' order)."""
    for channels in (40, 37):
        shape = (2, self_check.LENGTH, channels, width)
        plan = plan_of(*shape, launch.name_of(dtype), gpu.multiprocessors)
        shapes = {"x": shape[:3], "weight": (channels, width), "bias": channels}
        inputs = self_check.random_inputs(shapes, "x", dtype)
        inputs["order"] = self_check.random_order()
        prepared = launch.prepare(plan, launch_plan.ConvParams, gpu.index)
        yield prepared, inputs


def _reference(inputs):
    """Inputs in float64 that want gradients, and what the reference makes of them."""
    exact = {k: x.double().requires_grad_() for k, x in inputs.items() if k != "order"}
    return exact, causal_conv1d_ref(**exact, activation="silu", order=inputs["order"])


def _check_forward(gpu, plan, shape, dtype):
    for prepared, inputs in _small_problems(gpu, launch_plan.conv_forward, shape[3], dtype):
        actual = run_forward(prepared, *(x.to(gpu.device) for x in inputs.values()), True)
        self_check.require_agreement(
            "causal_conv1d", gpu, {"y": actual}, {"y": _reference(inputs)[1].detach()}, dtype
        )
    return plan.kernels()  # which no shape changes


def _check_backward(gpu, plan, shape, dtype):
    for prepared, inputs in _small_problems(gpu, launch_plan.conv_backward, shape[3], dtype):
        exact, y = _reference(inputs)
        g = self_check.random_inputs({"y": y.shape}, "y", dtype, 1)["y"]
        expected = torch.autograd.grad(y, list(exact.values()), g.double())
        actual = run_backward(prepared, *(x.to(gpu.device) for x in (g, *inputs.values())), True)
        self_check.require_agreement(
            "causal_conv1d's gradients", gpu, dict(zip(exact, actual, strict=True)),
            dict(zip(exact, expected, strict=True)), dtype,
        )  # fmt: skip
    return plan.kernels()  # which no shape changes


# ---------------------------------------- autograd


def _save(ctx, inputs, output):
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, g_y):
    launch.refuse_double_backward("causal_conv1d")
    saved = ctx.saved_tensors  # once: activation checkpointing allows no second look
    g_x, g_weight, g_bias = torch.ops.dim.causal_conv1d_bwd(g_y, *saved, ctx.silu)
    return g_x, g_weight, g_bias if saved[2] is not None else None, None, None


torch.library.register_autograd(
    "dim::causal_conv1d_fwd", _gradients, setup_context=_save, lib=_library
)


def causal_conv1d_cuda(x, weight, bias=None, activation=None, order=None):
    """`reference.causal_conv1d_ref` for CUDA tensors in float32, bfloat16 or float16."""
    weight, bias = launch.as_parameter(weight), launch.as_parameter(bias)
    return torch.ops.dim.causal_conv1d_fwd(
        launch.as_rows(x), weight, bias, launch.as_order(order), activation == "silu"
    )
