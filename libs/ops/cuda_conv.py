"""Causal convolution on the GPU: `dim::causal_conv1d_fwd`, `dim::causal_conv1d_bwd` and autograd,
as in cuda_scan.py. The operators want weight and bias in float32 and an int64 order.
"""

import torch

from libs.ops import cuda, launch_plan

_library = torch.library.Library("dim", "FRAGMENT")
_INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? order, bool silu"
_library.define(f"causal_conv1d_fwd({_INPUTS}) -> Tensor")
# -> gradients of x, weight and bias; an absent bias's is empty
_library.define(f"causal_conv1d_bwd(Tensor g_y, {_INPUTS}) -> (Tensor, Tensor, Tensor)")


def _forward(x, weight, bias, order, silu):
    y = x.new_empty(x.shape)
    prepared = _prepared("conv_forward", x, weight)
    rows = {"x": cuda.as_rows(x), "y": y}
    cuda.run(prepared, x.device, rows, _scalars(x, weight, bias, order, silu))
    return y


def _backward(g_y, x, weight, bias, order, silu):
    g_x, g_weight, g_bias = _empty_gradients(g_y, x, weight, bias, order, silu)
    prepared = _prepared("conv_backward", x, weight)
    rows = {"x": cuda.as_rows(x), "g_y": cuda.as_rows(g_y), "g_x": g_x}
    outputs = {"g_weight": g_weight, "g_bias": g_bias}
    cuda.run(prepared, x.device, rows, _scalars(x, weight, bias, order, silu), outputs)
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


def _prepared(plan_name, x, weight):
    """What to launch for tensors of these shapes."""
    return cuda.prepared(
        x.device.index, plan_name, launch_plan.ConvParams, *x.shape, weight.shape[1],
        cuda.name_of(x.dtype),
    )


_library.impl("causal_conv1d_fwd", _forward, "CUDA")
_library.impl("causal_conv1d_bwd", _backward, "CUDA")
torch.library.register_fake(
    "dim::causal_conv1d_fwd", lambda x, *rest: x.new_empty(x.shape), lib=_library
)
torch.library.register_fake("dim::causal_conv1d_bwd", _empty_gradients, lib=_library)


def _save(ctx, inputs, output):
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, g_y):
    cuda.refuse_double_backward("causal_conv1d")
    bias = ctx.saved_tensors[2]
    g_x, g_weight, g_bias = torch.ops.dim.causal_conv1d_bwd(g_y, *ctx.saved_tensors, ctx.silu)
    return g_x, g_weight, g_bias if bias is not None else None, None, None


torch.library.register_autograd(
    "dim::causal_conv1d_fwd", _gradients, setup_context=_save, lib=_library
)


def causal_conv1d_cuda(x, weight, bias=None, activation=None, order=None):
    """`reference.causal_conv1d_ref` for CUDA tensors in float32, bfloat16 or float16."""
    weight, bias = cuda.as_parameter(weight), cuda.as_parameter(bias)
    return torch.ops.dim.causal_conv1d_fwd(
        cuda.as_rows(x), weight, bias, cuda.as_order(order), activation == "silu"
    )
