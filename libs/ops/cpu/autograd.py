"""Scan and convolution on the CPU: buffers and autograd around the kernels of `kernels.py`."""

import torch

from libs.ops.cpu import kernels
from libs.ops.cpu.threads import run_tasks


def as_kernel_input(x):
    """Contiguous float32; the same memory where x is that already."""
    return x.detach().to(torch.float32).contiguous()


def empty(*shape):
    """Memory for a kernel to write to, whatever torch's default dtype and device are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def own(parameter):
    """A copy: numpy would pin the memory of a parameter, which FSDP2 frees between its uses."""
    return parameter.detach().clone()


def as_kernel_order(order, length):
    """Contiguous int64 (L,), the identity for None."""
    order = torch.arange(length, device="cpu") if order is None else order
    return order.to(torch.int64).contiguous()


def refuse_double_backward(operator):
    """Raises where backward is itself recorded: its result would silently carry no gradient."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{operator}: backend 'cpu' has no second derivative; use backend='reference'"
        )


def total(parts):
    """Sum over the first axis in float64. By numpy, as a large sum of torch's wakes its threads,
    which spin beside ours: both passes 19 ms instead of 15 at B 64, L 126, D 128.
    """
    return torch.from_numpy(parts.numpy().sum(0, dtype="float64").astype("float32"))


def _pack(tensors, order, delta_softplus):
    return kernels.ScanInputs(*(x.numpy() for x in tensors), order.numpy(), delta_softplus)


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, z, delta_bias, delta_softplus, order, save_states):
        batch, length, channels = u.shape
        states = A.shape[1]
        D = u.new_zeros(channels) if D is None else D
        delta_bias = u.new_zeros(channels) if delta_bias is None else delta_bias
        gate = u.new_empty(0, 0, 0) if z is None else z
        tensors = (u, delta, own(A).t(), B, C, own(D), gate, own(delta_bias))
        tensors = [as_kernel_input(x) for x in tensors]
        order = as_kernel_order(order, length)

        y = empty(batch, length, channels)
        last_state = empty(batch, channels, states)
        tiles = kernels.count_tiles(length)
        checkpoints = empty(batch, tiles, states, channels) if save_states else empty(0, 0, 0, 0)
        inputs = _pack(tensors, order, delta_softplus)
        run_tasks(
            kernels.scan_fwd, batch * kernels.count_blocks(channels), inputs, y.numpy(),
            checkpoints.numpy(), last_state.numpy(),
        )  # fmt: skip
        ctx.save_for_backward(*tensors, order, checkpoints)
        ctx.delta_softplus = delta_softplus
        ctx.set_materialize_grads(False)
        return y.to(u.dtype), last_state

    @staticmethod
    def backward(ctx, g_y, g_last_state):
        refuse_double_backward("selective_scan")
        *tensors, order, checkpoints = ctx.saved_tensors
        u, _, A_ND, _, _, _, gate, _ = tensors
        batch, length, channels = u.shape
        states, blocks = A_ND.shape[0], kernels.count_blocks(channels)
        g_y = torch.zeros_like(u) if g_y is None else as_kernel_input(g_y)
        if g_last_state is None:
            # not zeros: a large torch.zeros wakes torch's threads, which spin beside ours for 4 ms
            g_last_state = empty(0, 0, 0)

        g_u, g_delta, g_z = torch.empty_like(u), torch.empty_like(u), torch.empty_like(gate)
        g_A = empty(batch, states, channels)
        g_B = empty(blocks, batch, length, states)
        g_C = torch.empty_like(g_B)
        g_D = empty(batch, channels)
        g_bias = torch.empty_like(g_D)
        grads = [g_u, g_delta, g_A, g_B, g_C, g_D, g_z, g_bias]
        run_tasks(
            kernels.scan_bwd, batch * blocks, _pack(tensors, order, ctx.delta_softplus),
            checkpoints.numpy(), g_y.numpy(), as_kernel_input(g_last_state).numpy(),
            kernels.ScanGrads(*(g.numpy() for g in grads)),
        )
        # autograd casts each gradient to its input's dtype
        results = [
            g_u, g_delta, total(g_A).t(), total(g_B), total(g_C), total(g_D), g_z, total(g_bias),
        ]
        needed = ctx.needs_input_grad[:8]
        return *(g if n else None for g, n in zip(results, needed, strict=True)), None, None, None


def selective_scan_cpu(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, order=None,
    return_last_state=False,
):
    """`reference.selective_scan_ref` for CPU tensors in float32, bfloat16 or float16."""
    tensors = (u, delta, A, B, C, D, z, delta_bias)
    # asked here because autograd is always off inside forward
    save_states = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in tensors
    )
    y, last_state = _SelectiveScan.apply(*tensors, delta_softplus, order, save_states)
    return (y, last_state) if return_last_state else y


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
