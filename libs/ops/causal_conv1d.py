"""The causal depthwise convolution operator: checks its arguments, chooses a backend."""

from libs.ops import backends, checks
from libs.ops.cuda.causal_conv1d import causal_conv1d_cuda
from libs.ops.reference import causal_conv1d_ref

backends.OPERATORS["causal_conv1d"] = backends.Operator(
    {
        "cuda": causal_conv1d_cuda, "cpu": "libs.ops.cpu.autograd:causal_conv1d_cpu",
        "reference": causal_conv1d_ref,
    },
    range(2, 9), "taps",
)  # fmt: skip


def causal_conv1d(x, weight, bias=None, activation=None, order=None, backend=None):
    """Depthwise causal convolution along an order; see `causal_conv1d_ref` for the formula.

    x: (B, L, D). weight: (D, W). bias: (D,). activation: None or 'silu'. order: (L,) int64 or int32
    permutation, or None; step l reads rows order[l - W + 1 .. l] and writes row order[l]. Any
    strides. Any mixture of float32, bfloat16 and float16 (float64 x: reference only); sums are
    float32; each gradient comes in its input's dtype. backend: None (the environment variable
    DIM_BACKEND, else the fastest that can run), 'cuda', 'cpu' or 'reference'.

    Returns (B, L, D) in x's dtype.
    Raises TypeError (dtype), ValueError (shape, device, activation), utils.UserError (a requested
    backend that cannot run).
    """
    checks.check("causal_conv1d", order, x=(x, "BLD"), weight=(weight, "DW"), bias=(bias, "D"))
    if activation not in (None, "silu"):
        raise ValueError(f"causal_conv1d: activation must be None or 'silu', got {activation!r}")
    return backends.run(
        "causal_conv1d", backend, x, weight.shape[1], x, weight, bias, activation, order
    )
