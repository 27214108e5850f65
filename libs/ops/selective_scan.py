"""The selective scan operator: checks its arguments, chooses a backend."""

from libs.ops import backends
from libs.ops.checks import Arguments
from libs.ops.reference import selective_scan_ref


def _run_cuda(*args, **kwargs):
    # Imported late, with all that it needs, and by a statement: torch.compile follows no importlib.
    from libs.ops.cuda.selective_scan import selective_scan_cuda

    return selective_scan_cuda(*args, **kwargs)


BACKENDS = {
    "cuda": backends.cuda_backend(_run_cuda, (1, 64, "states")),
    "cpu": backends.cpu_backend("libs.ops.cpu.selective_scan", "selective_scan_cpu"),
    "reference": backends.reference_backend(selective_scan_ref),
    "mamba_ssm": backends.peer_backend("mamba_ssm", "selective_scan_peer", (1, 256, "states")),
}


@backends.constant_when_compiled
def _choose(backend, device, dtype, states):
    """`choose` for this operator; torch.compile asks once, while it traces."""
    return backends.choose("selective_scan", BACKENDS, backend, device, dtype, states)[0]


def _check(u, delta, A, B, C, D, z, delta_bias, order):
    check = Arguments("selective_scan", getattr(u, "device", None))
    check.tensor("u", u, "BLD")
    check.tensor("delta", delta, "BLD")
    check.tensor("A", A, "DN")
    check.tensor("B", B, "BLN")
    check.tensor("C", C, "BLN")
    check.optional("D", D, "D")
    check.optional("z", z, "BLD")
    check.optional("delta_bias", delta_bias, "D")
    check.order(order)


def selective_scan(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, order=None,
    return_last_state=False, backend=None,
):
    """Selective scan along an order, the recurrence of Mamba (arXiv 2312.00752); formula:
    `selective_scan_ref`.

    u, delta, z: (B, L, D). A: (D, N). B, C: (B, L, N). D, delta_bias: (D,). order: (L,) int64 or
    int32 permutation, or None; step l reads and writes row order[l], so inputs and output stay in
    row order. Any strides. Any mixture of float32, bfloat16 and float16 (float64 u: reference
    only). State and sums are float32; each gradient comes in its input's dtype. backend: None (the
    environment variable DIM_BACKEND, else the fastest that can run), 'cuda', 'cpu', 'reference' or,
    never chosen automatically, 'mamba_ssm'.

    Returns y (B, L, D) in u's dtype; with return_last_state also the last state (B, D, N), float32.
    Raises TypeError (dtype), ValueError (shape, device), utils.UserError (a requested backend that
    cannot run).
    """
    _check(u, delta, A, B, C, D, z, delta_bias, order)
    name = _choose(backend, u.device, u.dtype, int(A.shape[1]))
    return BACKENDS[name].run(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, order, return_last_state
    )
