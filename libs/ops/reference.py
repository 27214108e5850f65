"""The operators' definition: clear PyTorch that autograd differentiates, for any device and dtype.

Every backend is measured against these functions. They use only elementwise operations and sums, so
autocast, which lowers matrix products, leaves their precision alone.
"""

import torch
import torch.nn.functional as F


def _compute_dtype(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def visit(x, order):
    """Rows of x (B, L, ...) in the order in which they are visited."""
    return x if order is None else x.index_select(1, order)


def put_back(y, order):
    """Undo `visit`: step l goes to row order[l]."""
    return y if order is None else y.index_select(1, torch.argsort(order))


def selective_scan_ref(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, order=None,
    return_last_state=False,
):
    """Selective scan (Mamba, arXiv 2312.00752, algorithm 2, with mamba_ssm's discretisation of B).

    delta' = softplus(delta + delta_bias)
    h_l = exp(delta'_l A) h_{l-1} + delta'_l B_l u_l,  h_{-1} = 0
    y_l = <C_l, h_l> + D u_l,  then y_l silu(z_l)

    Shapes and results as of libs.ops.selective_scan. Softplus only with delta_softplus. Computes
    in float32, in float64 when u is float64; that is the last state's dtype, too.
    """
    dtype = _compute_dtype(u)
    u_BLD, delta_BLD, B_BLN, C_BLN = (visit(x.to(dtype), order) for x in (u, delta, B, C))
    A = A.to(dtype)
    if delta_bias is not None:
        delta_BLD = delta_BLD + delta_bias.to(dtype)
    if delta_softplus:
        delta_BLD = F.softplus(delta_BLD)

    h = u_BLD.new_zeros(u.shape[0], *A.shape)
    ys = []
    # unbind, not an index a step: the backward of an index fills a whole (B, L, D) tensor each time
    steps = zip(*(x.unbind(1) for x in (delta_BLD, delta_BLD * u_BLD, B_BLN, C_BLN)), strict=True)
    for delta_BD, delta_u_BD, B_BN, C_BN in steps:
        decay = torch.exp(delta_BD[:, :, None] * A)                          # (B, D, N)
        h = decay * h + delta_u_BD[:, :, None] * B_BN[:, None, :]            # (B, D, N)
        ys.append((h * C_BN[:, None, :]).sum(-1))                            # (B, D)
    y = torch.stack(ys, dim=1)                                               # (B, L, D)

    if D is not None:
        y = y + D.to(dtype) * u_BLD
    y = put_back(y, order)
    if z is not None:
        y = y * F.silu(z.to(dtype))
    y = y.to(u.dtype)
    return (y, h) if return_last_state else y


def causal_conv1d_ref(x, weight, bias=None, activation=None, order=None):
    """Depthwise causal convolution along an order, the short filter in front of Mamba's scan.

    y_l = bias + sum_w weight[:, w] x_{l - W + 1 + w}, rows before the first step being zero; then
    silu if asked.

    Shapes as of libs.ops.causal_conv1d. Computes in float32, in float64 when x is float64.
    """
    dtype = _compute_dtype(x)
    length, width = x.shape[1], weight.shape[1]
    padded = F.pad(visit(x.to(dtype), order), (0, 0, width - 1, 0))         # (B, W - 1 + L, D)
    y = sum(weight[:, w].to(dtype) * padded[:, w : w + length] for w in range(width))
    if bias is not None:
        y = y + bias.to(dtype)
    if activation == "silu":
        y = F.silu(y)
    return put_back(y, order).to(x.dtype)


def modulated_norm_ref(x, weight, modulation, table, out_dtype=None):
    """RMSNorm(x) weight (1 + scale) + shift, eps 1e-5, where shift, scale, gate are the rows of
    table + modulation (adaLN-single, PixArt-alpha, arXiv 2310.00426, section 2.3).

    Shapes as of libs.ops.modulated_norm. Computes in float32, in float64 when x is float64, which
    is the result's dtype where out_dtype is None.
    """
    shift, scale, _ = (table + modulation)[:, :, None].unbind(1)              # (B, 1, dim) each
    x = x.to(_compute_dtype(x))
    n = F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), 1e-5) * (1 + scale) + shift
    return n if out_dtype is None else n.to(out_dtype)


def gated_residual_ref(x, branch, modulation, table, drop_path_scale=None, out_dtype=None):
    """x + drop_path_scale (1 + gate) branch, gate and dtypes as in `modulated_norm_ref`."""
    gate = (table + modulation)[:, :, None].unbind(1)[2]                      # (B, 1, dim)
    branch = (1 + gate) * branch
    if drop_path_scale is not None:
        branch = branch * drop_path_scale.to(branch.dtype).view(-1, 1, 1)
    return (x + branch).to(out_dtype or _compute_dtype(x))
