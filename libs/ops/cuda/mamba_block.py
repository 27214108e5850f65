"""A whole block of DiM on the GPU: `dim::mamba_block_fwd` and `dim::mamba_block_bwd`, and autograd.

    n   = x / rms(x) weight (1 + scale) + shift
    out = x + keep (1 + gate) out_proj(scan(conv(in_proj(n))))

The forward keeps x, in_proj's and x_proj's outputs and the branch; the backward makes n, the
convolution, the step sizes and the scan's output again, the last inside the scan's own walk. No
activation is transposed or copied in between; of the gradients only that of x_proj's output is
put together from its parts, 128 channels of 6,144 in DiM-H.
"""

import torch

from libs.ops.cuda import adaln, causal_conv1d, fp8, launch, selective_scan
from libs.ops.cuda.adaln import Adaln

# Products of half precision with a float32 result, which torch has since 2.8.
_SUMS_IN_FLOAT32 = hasattr(torch.ops.aten.mm, "dtype")
_library = torch.library.Library("dim", "FRAGMENT")
PARAMETERS = (
    "table", "weight", "in_proj", "conv_weight", "conv_bias", "x_proj", "dt_proj", "dt_bias",
    "A_log", "D", "out_proj",
)  # fmt: skip
MATRICES = ("in_proj", "x_proj", "dt_proj", "out_proj")
_WEIGHTS = ", ".join(f"Tensor {name}" for name in PARAMETERS)
_INPUTS = (
    f"Tensor x, Tensor modulation, Tensor? keep, {_WEIGHTS}, Tensor? order, ScalarType dtype, "
    "bool in_fp8"
)
# -> out; in_proj's output (B, L, 2 D), x_proj's output (B, L, rank + 2 N), the branch (B, L, dim);
# the matrices in `dtype`, empty where they are so already
_library.define(
    f"mamba_block_fwd({_INPUTS}, ScalarType out_dtype) -> "
    f"({', '.join(['Tensor'] * (4 + len(MATRICES)))})"
)
# -> gradients of x, modulation and the parameters, in their order
_library.define(
    "mamba_block_bwd(Tensor g_out, Tensor xz, Tensor dtBC, Tensor branch, "
    f"{', '.join(f'Tensor cast_{name}' for name in MATRICES)}, {_INPUTS}) -> "
    f"({', '.join(['Tensor'] * (2 + len(PARAMETERS)))})"
)


def _product(x, weight, in_fp8=False):
    """x (B, L, K) times the transpose of weight (M, K)."""
    if in_fp8:
        return fp8.product(x, weight)
    return torch.mm(x.flatten(0, 1), weight.t()).view(*x.shape[:2], -1)


def _through(g, weight, in_fp8=False):
    """Gradient of a product's x: g (B, L, M) times weight (M, K)."""
    return fp8.product_back(g, weight) if in_fp8 else g @ weight


def _weight_gradient(g, x, weight):
    """Gradient of a product's weight: the sum over tokens of g (B, L, M) x (B, L, K)."""
    g, x = g.flatten(0, 1).T, x.flatten(0, 1)
    if weight.dtype == torch.float32 != g.dtype and _SUMS_IN_FLOAT32:
        return torch.mm(g, x, out_dtype=torch.float32)
    return (g @ x).to(weight.dtype)


def _cast(matrices, dtype):
    """(the matrices in dtype; the same, but an empty one where nothing was cast)."""
    if all(weight.dtype == dtype for weight in matrices):
        return matrices, [weight.new_empty(0) for weight in matrices]
    cast = [torch.empty_like(weight, dtype=dtype) for weight in matrices]
    torch._foreach_copy_(cast, matrices)
    return cast, cast


def _convolved(xz, conv_weight, conv_bias, order):
    x = xz[..., : conv_weight.shape[0]]
    plan = causal_conv1d.forward_plan(x, conv_weight)
    return causal_conv1d.run_forward(plan, x, conv_weight, conv_bias, order, True)


def _scan_inputs(u, xz, dtBC, dt_proj, dt_bias, A_log, D, order):
    """What the scan's plans take, from u on."""
    rank, states = dt_proj.shape[1], A_log.shape[1]
    dt, B, C = dtBC.split([rank, states, states], dim=-1)
    delta = _product(dt, dt_proj)
    A = -torch.exp(A_log)
    return u, delta, A, B, C, D, xz[..., D.shape[0] :], dt_bias, order, True


def _forward(
    x, modulation, keep, table, weight, in_proj, conv_weight, conv_bias, x_proj, dt_proj, dt_bias,
    A_log, D, out_proj, order, dtype, in_fp8, out_dtype,
):  # fmt: skip
    of = Adaln(modulation, table, weight, keep)
    matrices, kept = _cast([in_proj, x_proj, dt_proj, out_proj], dtype)
    in_proj, x_proj, dt_proj, out_proj = matrices
    xz = _product(adaln.norm(x, of, dtype), in_proj, in_fp8)
    u = _convolved(xz, conv_weight, conv_bias, order)
    dtBC = _product(u, x_proj)
    inputs = _scan_inputs(u, xz, dtBC, dt_proj, dt_bias, A_log, D, order)
    y, _ = selective_scan.run_forward(selective_scan.forward_plan(u, A_log), *inputs, False)
    branch = _product(y, out_proj, in_fp8)
    return adaln.gate(x, branch, of, out_dtype), xz, dtBC, branch, *kept


def _mixer_backward(
    g_branch, xz, dtBC, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, out_proj, order,
    in_fp8,
):  # fmt: skip
    """Gradients of xz and of the mixer's parameters but in_proj, from conv_weight on. x_proj,
    dt_proj, out_proj: pairs of the parameter and what the products use."""
    (x_weight, x_proj), (dt_weight, dt_proj), (out_weight, out_proj) = x_proj, dt_proj, out_proj
    u = _convolved(xz, conv_weight, conv_bias, order)
    inputs = _scan_inputs(u, xz, dtBC, dt_proj, dt_bias, A_log, D, order)
    y, g_xz = torch.empty_like(u), torch.empty_like(xz)
    channels = D.shape[0]
    g_y = _through(g_branch, out_proj, in_fp8)
    g_u, g_delta, g_A, g_BC, g_D, _, g_bias = selective_scan.run_backward(
        selective_scan.backward_plan_with_output(u, A_log), g_y, None, *inputs,
        g_z=g_xz[..., channels:], y=y,
    )  # fmt: skip
    g_out_proj = _weight_gradient(g_branch, y, out_weight)
    del g_y, y
    g_dt_proj = _weight_gradient(g_delta, dtBC[..., : dt_proj.shape[1]], dt_weight)
    g_dtBC = torch.cat([_through(g_delta, dt_proj), g_BC[0], g_BC[1]], dim=-1)
    g_x_proj = _weight_gradient(g_dtBC, u, x_weight)
    g_u.flatten(0, 1).addmm_(g_dtBC.flatten(0, 1), x_proj)
    x = xz[..., :channels]
    _, g_conv_weight, g_conv_bias = causal_conv1d.run_backward(
        causal_conv1d.backward_plan(x, conv_weight), g_u, x, conv_weight, conv_bias, order, True,
        g_x=g_xz[..., :channels],
    )  # fmt: skip
    g_A_log = g_A * inputs[2]  # A = -exp(A_log)
    return (
        g_xz, g_conv_weight, g_conv_bias, g_x_proj, g_dt_proj, g_bias, g_A_log, g_D, g_out_proj
    )  # fmt: skip


def _backward(
    g_out, xz, dtBC, branch, cast_in_proj, cast_x_proj, cast_dt_proj, cast_out_proj, x, modulation,
    keep, table, weight, in_proj, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D,
    out_proj, order, dtype, in_fp8,
):  # fmt: skip
    of = Adaln(modulation, table, weight, keep)
    (in_weight, in_proj), *others = (
        (weight_, cast if cast.numel() else weight_)
        for weight_, cast in (
            (in_proj, cast_in_proj), (x_proj, cast_x_proj), (dt_proj, cast_dt_proj),
            (out_proj, cast_out_proj),
        )
    )  # fmt: skip
    g_out = g_out.contiguous()
    g_branch, g_factor = adaln.gate_backward(g_out, branch, of)
    g_xz, *of_mixer = _mixer_backward(
        g_branch, xz, dtBC, conv_weight, conv_bias, *others[:2], dt_bias, A_log, D, others[2],
        order, in_fp8,
    )  # fmt: skip
    g_n = _through(g_xz, in_proj, in_fp8)
    g_x, n, g_shift, g_gain = adaln.norm_backward(g_n, g_out, x, of)
    g_in_proj = _weight_gradient(g_xz, n, in_weight)
    of_modulation = adaln.modulation_backward(g_shift, g_gain, g_factor, of)
    return g_x, *of_modulation, g_in_proj, *of_mixer


# ---------------------------------------- for torch.compile


def _empty_outputs(x, modulation, keep, *rest):
    *weights, _, dtype, _, out_dtype = rest
    of = dict(zip(PARAMETERS, weights, strict=True))
    rows = x.shape[:2]
    return (
        x.new_empty(x.shape, dtype=out_dtype),
        x.new_empty((*rows, of["in_proj"].shape[0]), dtype=dtype),
        x.new_empty((*rows, of["x_proj"].shape[0]), dtype=dtype),
        x.new_empty(x.shape, dtype=dtype),
        *_cast([of[name] for name in MATRICES], dtype)[1],
    )


def _empty_gradients(g_out, xz, dtBC, branch, *rest):
    x, modulation, _, *rest = rest[len(MATRICES) :]
    return tuple(t.new_empty(t.shape) for t in (x, modulation, *rest[:-3]))


_library.impl("mamba_block_fwd", _forward, "CUDA")
_library.impl("mamba_block_bwd", _backward, "CUDA")
torch.library.register_fake("dim::mamba_block_fwd", _empty_outputs, lib=_library)
torch.library.register_fake("dim::mamba_block_bwd", _empty_gradients, lib=_library)


# ---------------------------------------- autograd


def _save(ctx, inputs, output):
    *tensors, ctx.dtype, ctx.in_fp8, _ = inputs
    out, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*kept, *tensors)


def _gradients(ctx, g_out, *_):
    launch.refuse_double_backward("mamba_block")
    saved = ctx.saved_tensors  # once: activation checkpointing allows no second look
    g_x, g_modulation, *of_parameters = torch.ops.dim.mamba_block_bwd(
        g_out, *saved, ctx.dtype, ctx.in_fp8
    )
    return g_x, g_modulation, None, *of_parameters, None, None, None, None


torch.library.register_autograd(
    "dim::mamba_block_fwd", _gradients, setup_context=_save, lib=_library
)


def mamba_block_cuda(x, modulation, keep, parameters, order, dtype, in_fp8, out_dtype):
    """out (B, L, dim) in out_dtype, float32 or `dtype`, that of the products.

    x (B, L, dim); modulation (B, 3, dim); keep (B,) or None; parameters: by the names PARAMETERS;
    order (L,) or None; in_fp8: in_proj's and out_proj's products."""
    x = (x if x.dtype in (out_dtype, torch.float32) else x.to(out_dtype)).contiguous()
    parameters = [
        parameters[name] if name in MATRICES else launch.as_parameter(parameters[name])
        for name in PARAMETERS
    ]
    keep = launch.as_parameter(keep)
    out, *_ = torch.ops.dim.mamba_block_fwd(
        x, launch.as_parameter(modulation), keep, *parameters, launch.as_order(order), dtype,
        in_fp8,
        out_dtype,
    )  # fmt: skip
    return out
