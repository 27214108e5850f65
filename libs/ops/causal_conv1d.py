"""The causal depthwise convolution operator: checks its arguments, chooses a backend."""

from libs.ops import backends
from libs.ops.checks import Arguments
from libs.ops.reference import causal_conv1d_ref


def _run_cuda(*args, **kwargs):
    # Imported late, with all that it needs, and by a statement: torch.compile follows no importlib.
    from libs.ops.cuda.causal_conv1d import causal_conv1d_cuda

    return causal_conv1d_cuda(*args, **kwargs)


BACKENDS = {
    "cuda": backends.cuda_backend(_run_cuda, (2, 8, "taps")),
    "cpu": backends.cpu_backend("libs.ops.cpu.causal_conv1d", "causal_conv1d_cpu"),
    "reference": backends.reference_backend(causal_conv1d_ref),
    "mamba_ssm": backends.peer_backend("causal_conv1d", "causal_conv1d_peer", (2, 4, "taps")),
}


@backends.constant_when_compiled
def _choose(backend, device, dtype, taps):
    """`choose` for this operator; torch.compile asks once, while it traces."""
    return backends.choose("causal_conv1d", BACKENDS, backend, device, dtype, taps)[0]


def _check(x, weight, bias, activation, order):
    check = Arguments("causal_conv1d", getattr(x, "device", None))
    check.tensor("x", x, "BLD")
    check.tensor("weight", weight, "DW")
    check.optional("bias", bias, "D")
    check.order(order)
    if activation not in (None, "silu"):
        raise ValueError(f"causal_conv1d: activation must be None or 'silu', got {activation!r}")


def causal_conv1d(x, weight, bias=None, activation=None, order=None, backend=None):
    """Depthwise causal convolution along an order; see `causal_conv1d_ref` for the formula.

    x: (B, L, D). weight: (D, W). bias: (D,). activation: None or 'silu'. order: (L,) int64 or int32
    permutation, or None; step l reads rows order[l - W + 1 .. l] and writes row order[l]. Any
    strides. Any mixture of float32, bfloat16 and float16 (float64 x: reference only); sums are
    float32; each gradient comes in its input's dtype. backend: None (the environment variable
    DIM_BACKEND, else the fastest that can run), 'cuda', 'cpu', 'reference' or, never chosen
    automatically, 'mamba_ssm' (which then means the package causal_conv1d).

    Returns (B, L, D) in x's dtype.
    Raises TypeError (dtype), ValueError (shape, device, activation), utils.UserError (a requested
    backend that cannot run).
    """
    _check(x, weight, bias, activation, order)
    name = _choose(backend, x.device, x.dtype, int(weight.shape[1]))
    return BACKENDS[name].run(x, weight, bias, activation, order)
