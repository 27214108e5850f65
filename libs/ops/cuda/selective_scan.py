"""Selective scan on the GPU: the operators `dim::selective_scan_fwd` and `dim::selective_scan_bwd`,
which torch.compile and CUDA graphs take as they are, and autograd around them.

The operators want what `selective_scan_cuda` makes of any input: sequences (u, delta, z, B, C) of
one dtype, parameters (A, D, delta_bias) in float32, an int64 order. The backward keeps nothing but
these inputs.
"""

import functools

import torch

from libs.ops.cuda import launch, launch_plan, self_check
from libs.ops.reference import selective_scan_ref

_library = torch.library.Library("dim", "FRAGMENT")
_INPUTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? delta_bias, Tensor? order, bool delta_softplus"
)
# -> y, the last state (empty unless asked for)
_library.define(f"selective_scan_fwd({_INPUTS}, bool return_last_state) -> (Tensor, Tensor)")
# -> gradients of u, delta, A, B and C in one (2, B, L, N), D, z, delta_bias; empty ones of absent
_library.define(
    f"selective_scan_bwd(Tensor? g_y, Tensor? g_last_state, {_INPUTS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


# ---------------------------------------- forward


def _empty_outputs(u, A, return_last_state):
    state = (u.shape[0], u.shape[2], A.shape[1]) if return_last_state else (0,)
    return u.new_empty(u.shape), u.new_empty(state, dtype=torch.float32)


def _forward(u, delta, A, *rest):
    return run_forward(forward_plan(u, A), u, delta, A, *rest)


def forward_plan(u, A):
    return _prepared(launch_plan.scan_forward, _check_forward, u, A)


def run_forward(
    prepared, u, delta, A, B, C, D, z, delta_bias, order, delta_softplus, return_last_state
):
    y, last_state = _empty_outputs(u, A, return_last_state)
    rows = {"u": u, "delta": delta, "z": z, "B": B, "C": C}
    rows = {name: launch.as_rows(x) for name, x in rows.items()} | {"y": y}
    scalars = _scalars(u, A, D, delta_bias, order, delta_softplus)
    scalars["last_state"] = last_state if return_last_state else None
    launch.run(prepared, u.device, rows, scalars)
    return y, last_state


def _scalars(u, A, D, delta_bias, order, delta_softplus):
    batch, length, channels = u.shape
    return {
        "batch": batch, "length": length, "channels": channels, "states": A.shape[1],
        "delta_softplus": delta_softplus, "A": A, "D": D, "delta_bias": delta_bias, "order": order,
    }  # fmt: skip


def _prepared(plan_of, check, u, A):
    """What to launch for tensors of these shapes."""
    shape = (*u.shape, A.shape[1])
    return launch.prepared(
        u.device.index, plan_of, launch_plan.ScanParams, shape, u.dtype, check
    )


# ---------------------------------------- backward


def _backward(g_y, g_last_state, u, delta, A, *rest):
    prepared = _prepared(launch_plan.scan_backward, _check_backward, u, A)
    return run_backward(prepared, g_y, g_last_state, u, delta, A, *rest)


def backward_plan_with_output(u, A):
    return _prepared(launch_plan.scan_backward_with_output, _check_backward_with_output, u, A)


def run_backward(
    prepared, g_y, g_last_state, u, delta, A, B, C, D, z, delta_bias, order, delta_softplus,
    g_z=None, y=None,
):  # fmt: skip
    """Gradients as the operator returns them. g_z (B, L, D): where the gradient of z is to be
    written; y (B, L, D): where, by a plan with output, the forward's output."""
    g_u, g_delta, g_A, g_BC, g_D, own_g_z, g_bias = _empty_gradients(
        g_y, g_last_state, u, delta, A, B, C, D, z if g_z is None else None, delta_bias, order,
        delta_softplus,
    )  # fmt: skip
    g_z = own_g_z if g_z is None else g_z
    gradients = g_u, g_delta, g_A, g_BC, g_D, g_z, g_bias
    rows = {"u": u, "delta": delta, "z": z, "B": B, "C": C, "g_y": g_y}
    rows = {name: launch.as_rows(x) for name, x in rows.items()}
    rows |= {"g_u": g_u, "g_delta": g_delta, "g_z": None if z is None else g_z, "y": y}
    scalars = _scalars(u, A, D, delta_bias, order, delta_softplus)
    if g_last_state is not None:
        scalars["g_last_state"] = g_last_state = g_last_state.float().contiguous()
    outputs = {"g_A": g_A, "g_BC": g_BC, "g_D": g_D, "g_delta_bias": g_bias}
    launch.run(prepared, u.device, rows, scalars, outputs)
    return gradients


def _empty_gradients(
    g_y, g_last_state, u, delta, A, B, C, D, z, delta_bias, order, delta_softplus
):
    return (
        u.new_empty(u.shape), u.new_empty(u.shape), A.new_empty(A.shape),
        B.new_empty((2, *B.shape)), A.new_empty(0 if D is None else A.shape[0]),
        u.new_empty(0 if z is None else u.shape),
        A.new_empty(0 if delta_bias is None else A.shape[0]),
    )  # fmt: skip


_library.impl("selective_scan_fwd", _forward, "CUDA")
_library.impl("selective_scan_bwd", _backward, "CUDA")
torch.library.register_fake(
    "dim::selective_scan_fwd",
    lambda u, delta, A, *rest: _empty_outputs(u, A, rest[-1]),
    lib=_library,
)
torch.library.register_fake("dim::selective_scan_bwd", _empty_gradients, lib=_library)


# ---------------------------------------- self-check


def _small_problem(gpu, plan_of, plan, variant, states, dtype):
    """The plan's kernels on a small problem: (prepared, CPU inputs in the operators' order,
    kernels)."""
    channels = variant.channels + 5
    shape = (2, self_check.LENGTH, channels, states)
    small = variant._replace(segments=min(2, plan.integers["segments"]))
    small = plan_of(
        *shape, launch.name_of(dtype), gpu.multiprocessors, variant=small
    )
    sequence, outer = (2, self_check.LENGTH, channels), (2, self_check.LENGTH, states)
    shapes = {
        "u": sequence, "delta": sequence, "A": (channels, states), "B": outer, "C": outer,
        "D": channels, "z": sequence, "delta_bias": channels,
    }  # fmt: skip
    inputs = self_check.random_inputs(shapes, ("u", "delta", "B", "C", "z"), dtype)
    inputs["A"] = -inputs["A"].exp()
    inputs["order"] = self_check.random_order()
    prepared = launch.prepare(small, launch_plan.ScanParams, gpu.index)
    return prepared, inputs, small.kernels()


def _reference(inputs):
    """Inputs in float64 that want gradients, and what the reference makes of them."""
    exact = {k: x.double().requires_grad_() for k, x in inputs.items() if k != "order"}
    return exact, selective_scan_ref(
        **exact, delta_softplus=True, order=inputs["order"], return_last_state=True
    )


def _check_forward(gpu, plan, shape, dtype):
    variant = launch_plan.forward_variant(*shape, gpu.multiprocessors)
    prepared, inputs, kernels = _small_problem(
        gpu, launch_plan.scan_forward, plan, variant, shape[3], dtype
    )
    actual = run_forward(prepared, *(x.to(gpu.device) for x in inputs.values()), True, True)
    _, expected = _reference(inputs)
    names = ("y", "the last state")
    self_check.require_agreement(
        "selective_scan", gpu, dict(zip(names, actual, strict=True)),
        dict(zip(names, expected, strict=True)), dtype,
    )  # fmt: skip
    return kernels


def _check_backward(gpu, plan, shape, dtype, plan_of=launch_plan.scan_backward):
    variant = launch_plan.backward_variant(
        *shape, launch.name_of(dtype), gpu.multiprocessors
    )
    prepared, inputs, kernels = _small_problem(
        gpu, plan_of, plan, variant, shape[3], dtype
    )
    exact, outputs = _reference(inputs)
    g = self_check.random_inputs({"y": outputs[0].shape, "h": outputs[1].shape}, "y", dtype, 1)
    expected = dict(zip(exact, torch.autograd.grad(
        outputs, list(exact.values()), [x.double() for x in g.values()]
    ), strict=True))  # fmt: skip
    on_gpu = [x.to(gpu.device) for x in (*g.values(), *inputs.values())]
    y = torch.empty_like(on_gpu[2])
    g_u, g_delta, g_A, g_BC, g_D, g_z, g_bias = run_backward(prepared, *on_gpu, True, y=y)
    actual = (g_u, g_delta, g_A, g_BC[0], g_BC[1], g_D, g_z, g_bias)
    actual = dict(zip(exact, actual, strict=True))
    if plan_of is launch_plan.scan_backward_with_output:
        actual["y"], expected["y"] = y, outputs[0].detach()
    self_check.require_agreement("selective_scan's gradients", gpu, actual, expected, dtype)
    return kernels


_check_backward_with_output = functools.partial(
    _check_backward, plan_of=launch_plan.scan_backward_with_output
)


# ---------------------------------------- autograd


def _save(ctx, inputs, output):
    *tensors, ctx.delta_softplus, ctx.has_last_state = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _gradients(ctx, g_y, g_last_state):
    launch.refuse_double_backward("selective_scan")
    saved = ctx.saved_tensors  # once: activation checkpointing allows no second look
    *_, D, z, delta_bias, _ = saved
    if not ctx.has_last_state:
        g_last_state = None  # torch.compile makes one for the empty output
    if g_y is None and g_last_state is None:
        return (None,) * 11
    g_u, g_delta, g_A, g_BC, g_D, g_z, g_bias = torch.ops.dim.selective_scan_bwd(
        g_y, g_last_state, *saved, ctx.delta_softplus
    )
    g_B, g_C = g_BC.unbind(0)
    optional = (g if x is not None else None for g, x in ((g_D, D), (g_z, z), (g_bias, delta_bias)))
    return g_u, g_delta, g_A, g_B, g_C, *optional, None, None, None


torch.library.register_autograd(
    "dim::selective_scan_fwd", _gradients, setup_context=_save, lib=_library
)


def selective_scan_cuda(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, order=None,
    return_last_state=False,
):
    """`reference.selective_scan_ref` for CUDA tensors in float32, bfloat16 or float16."""
    sequences = launch.one_dtype(u, delta, B, C, z)
    u_BLD, delta_BLD, B_BLN, C_BLN, z_BLD = (launch.as_rows(x) for x in sequences)
    A, D, delta_bias = (launch.as_parameter(x) for x in (A, D, delta_bias))
    y, last_state = torch.ops.dim.selective_scan_fwd(
        u_BLD, delta_BLD, A, B_BLN, C_BLN, D, z_BLD, delta_bias, launch.as_order(order),
        delta_softplus, return_last_state,
    )
    y = y.to(u.dtype)
    return (y, last_state) if return_last_state else y
