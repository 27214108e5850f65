"""Selective scan on the GPU: the operators `dim::selective_scan_fwd` and `dim::selective_scan_bwd`,
which torch.compile and CUDA graphs take as they are, and autograd around them.

The operators want what `selective_scan_cuda` makes of any input: sequences (u, delta, z, B, C) of
one dtype, parameters (A, D, delta_bias) in float32, an int64 order.
"""

import functools

import torch

from libs.ops import cuda, launch_plan
from libs.ops.reference import selective_scan_ref

_library = torch.library.Library("dim", "FRAGMENT")
_INPUTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? delta_bias, Tensor? order, bool delta_softplus"
)
_library.define(f"selective_scan_fwd({_INPUTS}, bool return_last_state) -> (Tensor, Tensor)")
_library.define(
    f"selective_scan_bwd(Tensor? g_y, Tensor? g_last_state, {_INPUTS}) "
    # of u, delta, A, B and C together (2, B, L, N), D, z, delta_bias; absent ones are empty
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


# ---------------------------------------- the operators


def _empty_outputs(u, A, return_last_state):
    shape = (*u.shape[::2], A.shape[1]) if return_last_state else (0,)
    return u.new_empty(u.shape), u.new_empty(shape, dtype=torch.float32)


def _forward(u, delta, A, B, C, D, z, delta_bias, order, delta_softplus, return_last_state):
    y, last_state = _empty_outputs(u, A, return_last_state)
    prepared = _prepare(
        "forward", u.device.index, u.dtype, *u.shape, A.shape[1], z is not None
    )
    rows = dict(u=u, delta=delta, z=z, B=B, C=C)
    rows = {name: cuda.as_rows(x) for name, x in rows.items()} | {"y": y}
    scalars = _scalars(u, A, D, delta_bias, order, delta_softplus)
    if return_last_state:
        scalars["last_state"] = last_state
    cuda.run(prepared, u.device, rows, scalars)
    return y, last_state


def _scalars(u, A, D, delta_bias, order, delta_softplus):
    batch, length, channels = u.shape
    return dict(
        batch=batch, length=length, channels=channels, states=A.shape[1],
        delta_softplus=delta_softplus, A=A, D=D, delta_bias=delta_bias, order=order,
    )  # fmt: skip


def _fake_forward(u, delta, A, B, C, D, z, delta_bias, order, delta_softplus, return_last_state):
    return _empty_outputs(u, A, return_last_state)
