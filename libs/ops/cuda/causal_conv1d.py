"""Causal convolution on the GPU: `dim::causal_conv1d` and `dim::causal_conv1d_bwd`. They want
weight and bias in float32 and an int64 order.
"""

import torch

from libs.ops.cuda import launch, launch_plan


def plan(plan_of, x, weight):
    """What to launch for tensors of these shapes. plan_of: of launch_plan.py."""
    shape = (*x.shape, weight.shape[1])
    return launch.prepared(x.device.index, plan_of, launch_plan.ConvParams, shape, x.dtype)


def _rows(x):
    """x (B, L, D), or a copy: where 4 divides D, the kernels take rows 4 elements at a time."""
    x = launch.as_rows(x)
    places = x.data_ptr() // x.element_size(), *x.stride()[:2]
    return launch.as_vectors(x) if x.shape[2] % 4 == 0 and any(n % 4 for n in places) else x


def _scalars(x, weight, bias, order, silu):
    batch, length, channels = x.shape
    return {
        "batch": batch, "length": length, "channels": channels, "silu": silu,
        "weight": weight, "bias": bias, "order": order,
    }  # fmt: skip


def forward(x, weight, *rest):
    """y (B, L, D) of the operator's arguments."""
    y = x.new_empty(x.shape)
    prepared = plan(launch_plan.conv_forward, x, weight)
    scalars = _scalars(x, weight, *rest)
    launch.run(prepared, x.device, {"x": _rows(x), "y": y}, scalars)
    return y


def backward(g_y, x, weight, bias, order, silu, g_x=None):
    """Gradients of x, weight and bias. g_x (B, L, D): where x's is to be written."""
    g_x = x.new_empty(x.shape) if g_x is None else g_x
    g_weight, g_bias = weight.new_empty(weight.shape), bias.new_empty(bias.shape)
    prepared = plan(launch_plan.conv_backward, x, weight)
    rows = {"x": _rows(x), "g_y": _rows(g_y), "g_x": g_x}
    scalars = _scalars(x, weight, bias, order, silu)
    launch.run(prepared, x.device, rows, scalars, {"g_weight": g_weight, "g_bias": g_bias})
    return g_x, g_weight, g_bias


launch.operator(
    "causal_conv1d", "Tensor x, Tensor weight, Tensor bias, Tensor? order, bool silu", (1, 3),
    forward, lambda x, *rest: x.new_empty(x.shape),
    backward, lambda g_y, *inputs: launch.like(*inputs[:3]),
)  # fmt: skip


def causal_conv1d_cuda(x, weight, bias=None, activation=None, order=None):
    """`reference.causal_conv1d_ref` for CUDA tensors in float32, bfloat16 or float16."""
    weight, bias = launch.as_parameter(weight), launch.as_parameter(bias)
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    return torch.ops.dim.causal_conv1d(
        launch.as_rows(x), weight, bias, launch.as_order(order), activation == "silu"
    )
