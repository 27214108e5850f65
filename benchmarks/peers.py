"""mamba_ssm's scan and causal_conv1d's convolution behind our signature, for comparison.

They know no scan order and want (B, D, L): inputs are gathered, transposed, and put back.
"""

import torch


def _to_theirs(x, order, dtype):
    if x is None:
        return None
    rows = x.to(dtype) if order is None else x.to(dtype).index_select(1, order)
    return rows.transpose(1, 2).contiguous()


def _to_ours(y_BDL, order):
    y = y_BDL.transpose(1, 2)
    return y if order is None else y.index_select(1, torch.argsort(order))


def selective_scan_peer(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, order=None,
    return_last_state=False,
):
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    sequences = (_to_theirs(x, order, u.dtype) for x in (u, delta, B, C, z))
    u_BDL, delta_BDL, B_BNL, C_BNL, z_BDL = sequences
    A, D, delta_bias = (None if x is None else x.float().contiguous() for x in (A, D, delta_bias))
    y = selective_scan_fn(
        u_BDL, delta_BDL, A, B_BNL, C_BNL, D, z_BDL, delta_bias, delta_softplus, return_last_state
    )
    y, *last_state = y if return_last_state else (y,)
    y = _to_ours(y, order)
    return (y, *last_state) if return_last_state else y


def causal_conv1d_peer(x, weight, bias=None, activation=None, order=None):
    from causal_conv1d import causal_conv1d_fn

    bias = None if bias is None else bias.to(weight.dtype)
    x_BDL = _to_theirs(x, order, x.dtype)
    y = causal_conv1d_fn(x_BDL, weight.contiguous(), bias, activation=activation)
    return _to_ours(y, order)
