"""Selective scan on the GPU: the operators `dim::selective_scan` and `dim::selective_scan_bwd`,
which torch.compile and CUDA graphs take as they are.
"""

from collections import namedtuple

import torch

from libs.ops.cuda import launch, launch_plan

# What the kernels want: sequences of one dtype, parameters in float32, an int64 order; shapes as in
# selective_scan_ref. Only z and order may be None.
Inputs = namedtuple("Inputs", "u delta A B C D z delta_bias order delta_softplus")
# Theirs; those of B and C in one (2, B, L, N), that of z empty without z.
Gradients = namedtuple("Gradients", "u delta A BC D z delta_bias")


def _rows(x):
    return {name: launch.as_rows(getattr(x, name)) for name in ("u", "delta", "z", "B", "C")}


def _scalars(x):
    batch, length, channels = x.u.shape
    return {
        "batch": batch, "length": length, "channels": channels, "states": x.A.shape[1],
        "delta_softplus": x.delta_softplus, "A": x.A, "D": x.D, "delta_bias": x.delta_bias,
        "order": x.order,
    }  # fmt: skip


def plan(plan_of, u, A):
    """What to launch for tensors of these shapes. plan_of: of launch_plan.py."""
    shape = (*u.shape, A.shape[1])
    return launch.prepared(u.device.index, plan_of, launch_plan.ScanParams, shape, u.dtype)


def _empty_outputs(u, A, return_last_state):
    state = (u.shape[0], u.shape[2], A.shape[1]) if return_last_state else (0,)
    return u.new_empty(u.shape), u.new_empty(state, dtype=torch.float32)


def run_forward(prepared, x, return_last_state=False):
    """(y, the last state, empty unless asked for) of Inputs."""
    y, last_state = _empty_outputs(x.u, x.A, return_last_state)
    scalars = _scalars(x) | {"last_state": last_state if return_last_state else None}
    launch.run(prepared, x.u.device, _rows(x) | {"y": y}, scalars)
    return y, last_state


def _empty_gradients(x, z):
    """z: as in Inputs, or None where another place takes its gradient."""
    g_u, g_delta, g_A, g_D, g_bias = launch.like(x.u, x.u, x.A, x.D, x.delta_bias)
    g_z = x.u.new_empty(0 if z is None else z.shape)
    return Gradients(g_u, g_delta, g_A, x.B.new_empty((2, *x.B.shape)), g_D, g_z, g_bias)


def run_backward(prepared, g_y, g_last_state, x, g_z=None, y=None):
    """Gradients of Inputs. g_last_state: None for zero. g_z (B, L, D): where the gradient of z is
    to be written; y (B, L, D): where, by a plan with output, the forward's output."""
    g = _empty_gradients(x, x.z if g_z is None else None)
    g_z = g.z if g_z is None else g_z
    rows = _rows(x) | {"g_y": launch.as_rows(g_y), "g_u": g.u, "g_delta": g.delta, "y": y}
    rows["g_z"] = None if x.z is None else g_z
    outputs = {"g_A": g.A, "g_BC": g.BC, "g_D": g.D, "g_delta_bias": g.delta_bias}
    scalars = _scalars(x) | {"g_last_state": g_last_state}
    launch.run(prepared, x.u.device, rows, scalars, outputs)
    return g


def _forward(*inputs):
    *inputs, return_last_state = inputs
    x = Inputs(*inputs)
    return run_forward(plan(launch_plan.scan_forward, x.u, x.A), x, return_last_state)


def _backward(g_y, g_last_state, *inputs):
    x = Inputs(*inputs[:-1])
    g_last_state = g_last_state.float().contiguous() if g_last_state.numel() else None
    prepared = plan(launch_plan.scan_backward, x.u, x.A)
    return tuple(run_backward(prepared, g_y, g_last_state, x))


def _fake_backward(g_y, g_last_state, *inputs):
    x = Inputs(*inputs[:-1])
    return tuple(_empty_gradients(x, x.z))


def _collect(g, found):
    g = Gradients(*found)
    return g.u, g.delta, g.A, *g.BC.unbind(0), g.D, g.z, g.delta_bias


launch.operator(
    "selective_scan",
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor D, Tensor? z, Tensor delta_bias, "
    "Tensor? order, bool delta_softplus, bool return_last_state",
    (2, len(Gradients._fields)),
    _forward, lambda u, delta, A, *rest: _empty_outputs(u, A, rest[-1]),
    _backward, _fake_backward, _collect,
)  # fmt: skip


def selective_scan_cuda(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, order=None,
    return_last_state=False,
):
    """`reference.selective_scan_ref` for CUDA tensors in float32, bfloat16 or float16."""
    sequences = launch.one_dtype(u, delta, B, C, z)
    u_BLD, delta_BLD, B_BLN, C_BLN, z_BLD = (launch.as_rows(x) for x in sequences)
    A, D, delta_bias = (launch.as_parameter(x) for x in (A, D, delta_bias))
    D, delta_bias = (A.new_zeros(A.shape[0]) if x is None else x for x in (D, delta_bias))
    y, last_state = torch.ops.dim.selective_scan(
        u_BLD, delta_BLD, A, B_BLN, C_BLN, D, z_BLD, delta_bias, launch.as_order(order),
        delta_softplus, return_last_state,
    )
    y = y.to(u.dtype)
    return (y, last_state) if return_last_state else y
