"""The operators around a mixer, a modulated norm and a gated residual: each one pass on a GPU."""

from libs.ops import backends
from libs.ops.cuda.adaln import WIDTHS, gated_residual_cuda, modulated_norm_cuda
from libs.ops.reference import gated_residual_ref, modulated_norm_ref

# On the CPU the definition is as fast as any.
for name, cuda, ref in (
    ("modulated_norm", modulated_norm_cuda, modulated_norm_ref),
    ("gated_residual", gated_residual_cuda, gated_residual_ref),
):
    found = {"cuda": cuda, "cpu": ref, "reference": ref}
    backends.OPERATORS[name] = backends.Operator(found, WIDTHS, "channels")


def modulated_norm(x, weight, modulation, table, out_dtype=None):
    """RMSNorm(x) weight (1 + scale) + shift, eps 1e-5, where shift, scale, gate are the rows of
    table + modulation; see `modulated_norm_ref`.

    x: (B, L, dim). weight: (dim,). modulation: (B, 3, dim). table: (3, dim). Any mixture of
    float32, bfloat16 and float16, sums in float32 (all in float64 if x is). Differentiable.

    Returns (B, L, dim) in out_dtype; None: float32.
    """
    args = x, weight, modulation, table, out_dtype
    return backends.run("modulated_norm", None, x, table.shape[-1], *args)


def gated_residual(x, branch, modulation, table, drop_path_scale=None, out_dtype=None):
    """x + drop_path_scale (1 + gate) branch, the gate as in `modulated_norm`; see
    `gated_residual_ref`.

    x, branch: (B, L, dim). modulation: (B, 3, dim). table: (3, dim). drop_path_scale: (B,), None
    for 1; not differentiated. dtypes as in `modulated_norm`.

    Returns (B, L, dim) in out_dtype; None: float32.
    """
    args = x, branch, modulation, table, drop_path_scale, out_dtype
    return backends.run("gated_residual", None, x, table.shape[-1], *args)
