"""mamba_ssm's scan and causal_conv1d's convolution behind our signature, for comparison.

They know no scan order and want (B, D, L): inputs are gathered, transposed, and put back.
"""


def _to_theirs(x, order, dtype):
    return x.to(dtype)[:, order].transpose(1, 2).contiguous()


def _to_ours(y_BDL, order):
    return y_BDL.transpose(1, 2)[:, order.argsort()]


def selective_scan_peer(u, delta, A, B, C, D, z, delta_bias, delta_softplus, order):
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    u, delta, B, C, z = (_to_theirs(x, order, u.dtype) for x in (u, delta, B, C, z))
    y = selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return _to_ours(y, order)


def causal_conv1d_peer(x, weight, bias, activation, order):
    from causal_conv1d import causal_conv1d_fn

    y = causal_conv1d_fn(_to_theirs(x, order, x.dtype), weight, bias, activation=activation)
    return _to_ours(y, order)
