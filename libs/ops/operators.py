"""The operators: each checks its arguments, once, before any work, and chooses a backend."""

import torch

from libs.ops import backends, reference
from libs.ops.backends import Operator
from libs.ops.cuda.adaln import WIDTHS, gated_residual_cuda, modulated_norm_cuda
from libs.ops.cuda.causal_conv1d import causal_conv1d_cuda
from libs.ops.cuda.selective_scan import selective_scan_cuda


def _list_backends(cuda, ref, cpu=None):
    """cpu: where numba's is; without it the definition, which is as fast as any there."""
    return {"cuda": cuda, "cpu": cpu or ref, "reference": ref}


_NUMBA = "libs.ops.cpu.autograd:"
_SCAN = selective_scan_cuda, reference.selective_scan_ref, _NUMBA + "selective_scan_cpu"
_CONV = causal_conv1d_cuda, reference.causal_conv1d_ref, _NUMBA + "causal_conv1d_cpu"
_NORM = modulated_norm_cuda, reference.modulated_norm_ref
_GATE = gated_residual_cuda, reference.gated_residual_ref
backends.OPERATORS.update(
    selective_scan=Operator(_list_backends(*_SCAN), range(1, 65), "states"),
    causal_conv1d=Operator(_list_backends(*_CONV), range(2, 9), "taps"),
    modulated_norm=Operator(_list_backends(*_NORM), WIDTHS, "channels"),
    gated_residual=Operator(_list_backends(*_GATE), WIDTHS, "channels"),
)

_REAL = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGER = (torch.int64, torch.int32)


def _check(operator, order, **tensors):
    """tensors: name=(tensor or None, its axes: 'BLD' for three of them); the first one fixes the
    device, and an axis's size is the same everywhere. order: (L,) integers or None.

    Raises TypeError for a wrong dtype, ValueError for a wrong shape or device.
    """
    sizes, device = {}, next(iter(tensors.values()))[0].device
    for name, (x, axes) in (*tensors.items(), ("order", (order, "L"))):
        if x is None:
            continue
        if x.dtype not in (dtypes := _INTEGER if name == "order" else _REAL):
            raise TypeError(f"{operator}: {name} must be one of {dtypes}, got {x.dtype}")
        fits = x.dim() == len(axes)
        for axis, size in zip(axes, x.shape, strict=False):
            fits = fits and size > 0 and sizes.setdefault(axis, size) == size
        if not fits:
            raise ValueError(
                f"{operator}: {name} must have shape {tuple(axes)} with {sizes}, no axis empty, "
                f"got {tuple(x.shape)}"
            )
        if x.device != device:
            raise ValueError(f"{operator}: {name} must be on {device}, got {x.device}")


def selective_scan(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, order=None,
    return_last_state=False, backend=None,
):
    """Selective scan along an order, the recurrence of Mamba (arXiv 2312.00752); formula:
    `reference.selective_scan_ref`.

    u, delta, z: (B, L, D). A: (D, N). B, C: (B, L, N). D, delta_bias: (D,). order: (L,) int64 or
    int32 permutation, or None; step l reads and writes row order[l], so inputs and output stay in
    row order. Any strides. Any mixture of float32, bfloat16 and float16 (float64 u: reference
    only). State and sums are float32; each gradient comes in its input's dtype. backend: None (the
    environment variable DIM_BACKEND, else the fastest that can run), 'cuda', 'cpu' or 'reference'.

    Returns y (B, L, D) in u's dtype; with return_last_state also the last state (B, D, N), float32.
    Raises TypeError (dtype), ValueError (shape, device), utils.UserError (a requested backend that
    cannot run).
    """
    _check(
        "selective_scan", order, u=(u, "BLD"), delta=(delta, "BLD"), A=(A, "DN"), B=(B, "BLN"),
        C=(C, "BLN"), D=(D, "D"), z=(z, "BLD"), delta_bias=(delta_bias, "D"),
    )  # fmt: skip
    return backends.run(
        "selective_scan", backend, u, A.shape[1],
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, order, return_last_state,
    )  # fmt: skip


def causal_conv1d(x, weight, bias=None, activation=None, order=None, backend=None):
    """Depthwise causal convolution along an order; formula: `reference.causal_conv1d_ref`.

    x: (B, L, D). weight: (D, W). bias: (D,). activation: None or 'silu'. order, strides, dtypes,
    `backend` and errors as in `selective_scan`; step l reads rows order[l - W + 1 .. l] and writes
    row order[l]. Returns (B, L, D) in x's dtype.
    """
    _check("causal_conv1d", order, x=(x, "BLD"), weight=(weight, "DW"), bias=(bias, "D"))
    if activation not in (None, "silu"):
        raise ValueError(f"causal_conv1d: activation must be None or 'silu', got {activation!r}")
    return backends.run(
        "causal_conv1d", backend, x, weight.shape[1], x, weight, bias, activation, order
    )


def modulated_norm(x, weight, modulation, table, out_dtype=None):
    """RMSNorm(x), scaled and shifted; formula: `reference.modulated_norm_ref`.

    x: (B, L, dim). weight: (dim,). modulation: (B, 3, dim). table: (3, dim). Any mixture of
    float32, bfloat16 and float16, sums in float32 (all in float64 if x is). Differentiable. Returns
    (B, L, dim) in out_dtype; None: float32.
    """
    args = x, weight, modulation, table, out_dtype
    return backends.run("modulated_norm", None, x, table.shape[-1], *args)


def gated_residual(x, branch, modulation, table, drop_path_scale=None, out_dtype=None):
    """x plus a gated branch; formula: `reference.gated_residual_ref`.

    x, branch: (B, L, dim). drop_path_scale: (B,), None for 1; not differentiated. The rest and the
    result as in `modulated_norm`.
    """
    args = x, branch, modulation, table, drop_path_scale, out_dtype
    return backends.run("gated_residual", None, x, table.shape[-1], *args)
