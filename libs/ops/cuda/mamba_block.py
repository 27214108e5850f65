"""A whole block of DiM on the GPU: `dim::mamba_block` and `dim::mamba_block_bwd`.

    n   = x / rms(x) weight (1 + scale) + shift
    out = x + drop_path_scale (1 + gate) out_proj(scan(conv(in_proj(n))))

The forward saves x (in the products' dtype, as a long skip wants it), in_proj's and x_proj's
outputs and the branch; the backward makes n, the convolution, the step sizes and the scan's output
again, the last inside the scan's own walk. No activation is transposed or copied in between; of the
gradients only that of x_proj's output is put together from its parts, 128 channels of 6,144 in
DiM-H.
"""

from collections import namedtuple

import torch

from libs.ops.cuda import adaln, causal_conv1d, fp8, launch, launch_plan, selective_scan
from libs.ops.cuda.adaln import Adaln

# Products of half precision with a float32 result, which torch has since 2.8.
_SUMS_IN_FLOAT32 = hasattr(torch.ops.aten.mm, "dtype")

# D channels, N states, W taps, R the rank of the step sizes. Matrices have the network's dtype, the
# others float32: table (3, dim), weight of the norm (dim), in_proj (2 D, dim), conv_weight (D, W),
# conv_bias (D), x_proj (R + 2 N, D), dt_proj (D, R), dt_bias (D), A (D, N), D (D), out_proj
# (dim, D).
Parameters = namedtuple(
    "Parameters", "table weight in_proj conv_weight conv_bias x_proj dt_proj dt_bias A D out_proj"
)
# The parameters that go into matrix products, in the dtype of those.
Matrices = namedtuple("Matrices", "in_proj x_proj dt_proj out_proj")
# What the forward saves, besides its inputs: in_proj's output xz (B, L, 2 D), x_proj's output dtBC
# (B, L, R + 2 N), branch (B, L, dim), scales (B L, 1) of in_proj's and out_proj's inputs in fp8,
# and Matrices, empty where they had the products' dtype.
Saved = namedtuple("Saved", ("xz", "dtBC", "branch", "n_scale", "y_scale", *Matrices._fields))
# The operator's inputs. dtype: of the products; x_dtype: of x where the backward has it rounded.
Inputs = namedtuple("Inputs", "x adaln parameters order dtype fp8 x_dtype out_dtype")


def _pack(x, modulation, drop_path_scale, *rest):
    count = len(Parameters._fields)
    p = Parameters(*rest[:count])
    return Inputs(x, Adaln(modulation, p.table, p.weight, drop_path_scale), p, *rest[count:])


def _product(x, weight):
    """x (B, L, K) times the transpose of weight (M, K)."""
    return torch.mm(x.flatten(0, 1), weight.t()).view(*x.shape[:2], -1)


def _empty_scale(x, in_fp8):
    """For the scales of x (B, L, K) in fp8, without entries elsewhere."""
    return x.new_empty((x.shape[0] * x.shape[1] if in_fp8 else 0, 1), dtype=torch.float32)


def _large_product(x, weight, in_fp8):
    """`_product`, perhaps in fp8; and x's scales there."""
    if in_fp8:
        return fp8.product(x, weight)
    return _product(x, weight), _empty_scale(x, in_fp8)


def _through(g, weight, in_fp8):
    """Gradient of a product's x: g (B, L, M) times weight (M, K); and g's scales, or None."""
    return fp8.product_back(g, weight) if in_fp8 else (g @ weight, None)


def _weight_gradient(g, x, weight, g_scale=None, x_scale=None):
    """Gradient of a product's weight: the sum over tokens of g (B, L, M) x (B, L, K)."""
    if g_scale is not None:
        return fp8.weight_gradient(g, g_scale, x, x_scale).to(weight.dtype)
    g, x = g.flatten(0, 1).T, x.flatten(0, 1)
    if weight.dtype == torch.float32 != g.dtype and _SUMS_IN_FLOAT32:
        return torch.mm(g, x, out_dtype=torch.float32)
    return (g @ x).to(weight.dtype)


def _cast(parameters, dtype):
    """(Matrices in dtype; the same, but empty ones where nothing was cast)."""
    matrices = Matrices(*(getattr(parameters, name) for name in Matrices._fields))
    if all(weight.dtype == dtype for weight in matrices):
        return matrices, [weight.new_empty(0) for weight in matrices]
    cast = [torch.empty_like(weight, dtype=dtype) for weight in matrices]
    torch._foreach_copy_(cast, matrices)
    return Matrices(*cast), cast


def _convolve(xz, p, order):
    return causal_conv1d.forward(xz[..., : p.D.shape[0]], p.conv_weight, p.conv_bias, order, True)


def _scan_inputs(u, xz, dtBC, dt_proj, p, order):
    rank, states = dt_proj.shape[1], p.A.shape[1]
    dt, B, C = dtBC.split([rank, states, states], dim=-1)
    delta, z = _product(dt, dt_proj), xz[..., p.D.shape[0] :]
    return selective_scan.Inputs(u, delta, p.A, B, C, p.D, z, p.dt_bias, order, True)


def _empty_rounded(i):
    """For x in the products' dtype (B, L, dim), without entries where that is its own."""
    return torch.empty_like(i.x[:0] if i.x.dtype == i.dtype else i.x, dtype=i.dtype)


def _forward(*inputs):
    i = _pack(*inputs)
    p, (weights, cast) = i.parameters, _cast(i.parameters, i.dtype)
    rounded = _empty_rounded(i)
    n = adaln.norm(i.x, i.adaln, i.dtype, rounded)
    xz, n_scale = _large_product(n, weights.in_proj, i.fp8)
    u = _convolve(xz, p, i.order)
    dtBC = _product(u, weights.x_proj)
    scan = _scan_inputs(u, xz, dtBC, weights.dt_proj, p, i.order)
    prepared = selective_scan.plan(launch_plan.scan_forward, u, p.A)
    y, _ = selective_scan.run_forward(prepared, scan)
    branch, y_scale = _large_product(y, weights.out_proj, i.fp8)
    out = adaln.gate(i.x, branch, i.adaln, i.out_dtype)
    return out, rounded, xz, dtBC, branch, n_scale, y_scale, *cast


def _scan_backward(g_branch, saved, weights, u, i, g_z):
    """(gradients of the scan's inputs but z, whose gradient goes to g_z; of out_proj)."""
    p = i.parameters
    scan = _scan_inputs(u, saved.xz, saved.dtBC, weights.dt_proj, p, i.order)
    y, (g_y, g_scale) = torch.empty_like(u), _through(g_branch, weights.out_proj, i.fp8)
    prepared = selective_scan.plan(launch_plan.scan_backward_with_output, u, p.A)
    g = selective_scan.run_backward(prepared, g_y, None, scan, g_z=g_z, y=y)
    return g, _weight_gradient(g_branch, y, p.out_proj, g_scale, saved.y_scale)


def _mixer_backward(g_branch, saved, weights, i):
    """(gradient of xz, {name: gradient} of the mixer's parameters but in_proj)."""
    p, channels = i.parameters, i.parameters.D.shape[0]
    g_xz = torch.empty_like(saved.xz)
    x, g_x, g_z = saved.xz[..., :channels], g_xz[..., :channels], g_xz[..., channels:]
    u = _convolve(saved.xz, p, i.order)
    g, g_out_proj = _scan_backward(g_branch, saved, weights, u, i, g_z)
    dt = saved.dtBC[..., : p.dt_proj.shape[1]]
    g_dt_proj = _weight_gradient(g.delta, dt, p.dt_proj)
    g_dtBC = torch.cat([g.delta @ weights.dt_proj, g.BC[0], g.BC[1]], dim=-1)
    g_x_proj = _weight_gradient(g_dtBC, u, p.x_proj)
    g.u.flatten(0, 1).addmm_(g_dtBC.flatten(0, 1), weights.x_proj)
    _, g_conv_weight, g_conv_bias = causal_conv1d.backward(
        g.u, x, p.conv_weight, p.conv_bias, i.order, True, g_x=g_x
    )
    return g_xz, {
        "conv_weight": g_conv_weight, "conv_bias": g_conv_bias, "x_proj": g_x_proj,
        "dt_proj": g_dt_proj, "dt_bias": g.delta_bias, "A": g.A, "D": g.D, "out_proj": g_out_proj,
    }  # fmt: skip


@torch.autocast("cuda", enabled=False)  # which may be another than the forward's
def _backward(g_out, g_rounded, *rest):
    saved, i = Saved(*rest[: len(Saved._fields)]), _pack(*rest[len(Saved._fields) :])
    weights = Matrices(*(
        cast if (cast := getattr(saved, name)).numel() else getattr(i.parameters, name)
        for name in Matrices._fields
    ))  # fmt: skip
    g_out = g_out.contiguous()
    g_branch, g_factor = adaln.gate_backward(g_out, saved.branch, i.adaln)
    g_xz, g = _mixer_backward(g_branch, saved, weights, i)
    g_n, g_scale = _through(g_xz, weights.in_proj, i.fp8)
    n = torch.empty_like(g_n)
    g_rounded = None if g_rounded is None else g_rounded.contiguous()
    g_x, g_shift, g_gain = adaln.norm_backward(g_n, g_out, i.x, i.adaln, n, i.x_dtype, g_rounded)
    g_in_proj = _weight_gradient(g_xz, n, i.parameters.in_proj, g_scale, saved.n_scale)
    g_modulation, g_table, g_weight = adaln.modulation_backward(g_shift, g_gain, g_factor, i.adaln)
    return g_x, g_modulation, *Parameters(table=g_table, weight=g_weight, in_proj=g_in_proj, **g)


def _empty_gradients(g_out, g_rounded, *rest):
    i = _pack(*rest[len(Saved._fields) :])
    g_x, *others = launch.like(i.x, i.adaln.modulation, *i.parameters)
    return g_x.to(i.x_dtype), *others


def _keep(output, inputs):
    """What the backward wants: x rounded where the forward rounded it."""
    _, rounded, *saved = output
    return *saved, rounded if rounded.numel() else inputs[0], *inputs[1:]


def _empty_outputs(*inputs):
    i = _pack(*inputs)
    rows, p = i.x.shape[:2], i.parameters
    return (
        i.x.new_empty(i.x.shape, dtype=i.out_dtype),
        _empty_rounded(i),
        i.x.new_empty((*rows, p.in_proj.shape[0]), dtype=i.dtype),
        i.x.new_empty((*rows, p.x_proj.shape[0]), dtype=i.dtype),
        i.x.new_empty(i.x.shape, dtype=i.dtype),
        *(_empty_scale(i.x, i.fp8) for _ in range(2)),
        *_cast(p, i.dtype)[1],
    )


launch.operator(
    "mamba_block",
    "Tensor x, Tensor modulation, Tensor? drop_path_scale, "
    f"{', '.join(f'Tensor {name}' for name in Parameters._fields)}, Tensor? order, "
    "ScalarType dtype, bool fp8, ScalarType x_dtype, ScalarType out_dtype",
    (2 + len(Saved._fields), 2 + len(Parameters._fields)),
    _forward, _empty_outputs,
    _backward, _empty_gradients,
    lambda g, found: (*found[:2], None, *found[2:]),
    saved=len(Saved._fields), keep=_keep,
)  # fmt: skip


def mamba_block_cuda(x, modulation, drop_path_scale, parameters, order, dtype, in_fp8, out_dtype):
    """The block above as one operator, where libs.ops.is_fused: out (B, L, dim) in out_dtype, which
    is float32 or `dtype`, that of the products; and x in `dtype`, as a long skip wants it, whose
    gradient costs no pass of its own. Differentiable in every tensor but drop_path_scale.

    x (B, L, dim); modulation (B, 3, dim): shift, scale, gate; drop_path_scale (B,) or None;
    parameters: by the names of Parameters; order (L,) or None; in_fp8: in_proj's and out_proj's
    products."""
    x = (x if x.dtype in (out_dtype, torch.float32) else x.to(out_dtype)).contiguous()
    parameters = [
        parameters[name] if name in Matrices._fields else launch.as_parameter(parameters[name])
        for name in Parameters._fields
    ]
    out, rounded, *_ = torch.ops.dim.mamba_block(
        x, launch.as_parameter(modulation), launch.as_parameter(drop_path_scale), *parameters,
        launch.as_order(order), dtype, in_fp8, x.dtype, out_dtype,
    )  # fmt: skip
    return out, x if x.dtype == dtype else rounded
