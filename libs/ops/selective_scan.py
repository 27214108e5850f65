"""The selective scan operator: checks its arguments, chooses a backend."""

from libs.ops import backends, checks
from libs.ops.cuda.selective_scan import selective_scan_cuda
from libs.ops.reference import selective_scan_ref

backends.OPERATORS["selective_scan"] = backends.Operator(
    {
        "cuda": selective_scan_cuda, "cpu": "libs.ops.cpu.autograd:selective_scan_cpu",
        "reference": selective_scan_ref,
    },
    range(1, 65), "states",
)  # fmt: skip


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
    environment variable DIM_BACKEND, else the fastest that can run), 'cuda', 'cpu' or 'reference'.

    Returns y (B, L, D) in u's dtype; with return_last_state also the last state (B, D, N), float32.
    Raises TypeError (dtype), ValueError (shape, device), utils.UserError (a requested backend that
    cannot run).
    """
    checks.check(
        "selective_scan", order, u=(u, "BLD"), delta=(delta, "BLD"), A=(A, "DN"), B=(B, "BLN"),
        C=(C, "BLN"), D=(D, "D"), z=(z, "BLD"), delta_bias=(delta_bias, "D"),
    )  # fmt: skip
    return backends.run(
        "selective_scan", backend, u, A.shape[1],
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, order, return_last_state,
    )  # fmt: skip
