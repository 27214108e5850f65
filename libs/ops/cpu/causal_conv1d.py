"""Causal convolution on the CPU: buffers and autograd around the kernels of `kernels.py`."""

import torch

from libs.ops.cpu import kernels
from libs.ops.cpu.selective_scan import (
    as_kernel_input,
    as_kernel_order,
    empty,
    own,
    refuse_double_backward,
    total,
)
from libs.ops.cpu.threads import run_tasks


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, silu, order):
        batch, length, channels = x.shape
        bias = x.new_zeros(channels) if bias is None else bias
        tensors = [as_kernel_input(x) for x in (x, own(weight).t(), own(bias))]
        order = as_kernel_order(order, length)
        y = empty(batch, length, channels)
        run_tasks(
            kernels.conv_fwd, batch * kernels.count_blocks(channels),
            *(t.numpy() for t in tensors), order.numpy(), silu, y.numpy(),
        )
        ctx.save_for_backward(*tensors, order)
        ctx.silu = silu
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx, g_y):
        refuse_double_backward("causal_conv1d")
        x, weight_WD, bias, order = ctx.saved_tensors
        batch, _, channels = x.shape
        g_x = torch.empty_like(x)
        g_weight = empty(batch, *weight_WD.shape)
        g_bias = empty(batch, channels)
        run_tasks(
            kernels.conv_bwd, batch * kernels.count_blocks(channels),
            x.numpy(), weight_WD.numpy(), bias.numpy(), order.numpy(), ctx.silu,
            as_kernel_input(g_y).numpy(), g_x.numpy(), g_weight.numpy(), g_bias.numpy(),
        )
        results = [g_x, total(g_weight).t(), total(g_bias)]
        needed = ctx.needs_input_grad[:3]
        return *(g if n else None for g, n in zip(results, needed, strict=True)), None, None


def causal_conv1d_cpu(x, weight, bias=None, activation=None, order=None):
    """`reference.causal_conv1d_ref` for CPU tensors in float32, bfloat16 or float16."""
    return _CausalConv1d.apply(x, weight, bias, activation == "silu", order)
