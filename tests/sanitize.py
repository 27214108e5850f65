"""A small run of every CUDA kernel, for NVIDIA's checkers, on a GPU:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --report-api-errors no \\
        python tests/sanitize.py
    compute-sanitizer --tool racecheck --kernel-name kns=scan python tests/sanitize.py --no-products

Torch's own kernels are checked, too; `--kernel-name kns=WORD` takes those with WORD in their names
(scan, conv, norm, gate, sum_parts, modulation, quantize). racecheck breaks off in cuBLAS's products
in half precision, whatever the word: --no-products leaves blocks out and runs their passes alone.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import ops_cases  # noqa: E402
import torch  # noqa: E402

from libs.model.block import Block  # noqa: E402
from libs.model.mamba import Mamba  # noqa: E402
from libs.ops import causal_conv1d, selective_scan  # noqa: E402
from libs.ops.cuda import adaln, fp8, launch, launch_plan  # noqa: E402
from libs.ops.cuda.launch_plan import Variant  # noqa: E402

PARAMETERS = ("A", "D", "delta_bias", "weight", "bias")  # float32 in a network of any dtype
VARIANTS = [
    launch_plan.EIGHT_LANES, launch_plan.FOUR_LANES, Variant(4, 32, 16, 2, 1),
    launch_plan.ONE_THREAD._replace(segments=3),
]  # fmt: skip


def both_ways(operator, inputs, dtype, **options):
    inputs = {
        k: (x if k in PARAMETERS else x.to(dtype)).cuda().requires_grad_()
        for k, x in inputs.items()
    }
    operator(**inputs, backend="cuda", **options).float().sum().backward()


def operators(dtype):
    for B, L, D in ((2, 61, 70), (1, 1100, 33)):  # the second in segments
        order = torch.randperm(L).cuda()
        scan = {"delta_softplus": True, "order": order}
        both_ways(selective_scan, ops_cases.scan_inputs(B, L, D, 16), dtype, **scan)
        conv = {"activation": "silu", "order": order}
        both_ways(causal_conv1d, ops_cases.conv_inputs(B, L, D, 3), dtype, **conv)


def forward_variants(B=2, L=61, D=70, N=16):
    inputs = {k: x.cuda() for k, x in ops_cases.scan_inputs(B, L, D, N).items()}
    rows = {k: inputs[k] for k in ("u", "delta", "z", "B", "C")}
    rows["y"] = torch.empty_like(inputs["u"])
    scalars = {k: inputs[k] for k in ("A", "D", "delta_bias")} | {
        "batch": B, "length": L, "channels": D, "states": N, "delta_softplus": 1,
        "order": torch.randperm(L).cuda(), "last_state": torch.empty(B, D, N, device="cuda"),
    }  # fmt: skip
    for variant in VARIANTS:
        plan = launch_plan.scan_forward(B, L, D, N, "float32", 132, variant)
        launch.run(launch.prepare(plan, launch_plan.ScanParams, 0), rows["u"].device, rows, scalars)


def block(dtype):
    x, modulation = torch.randn(2, 61, 72).cuda(), torch.randn(2, 3, 72).cuda()
    for rounds in (False, True):
        network = Block(72, lambda: Mamba(72), has_skip=False, half_output=rounds).cuda()
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            out = network(x.requires_grad_(), modulation, torch.randperm(61).cuda())
        out.float().sum().backward()


def passes(dtype):
    """Those around the mixer, both ways, for a residual stream in float32 and in dtype."""
    branch, g_n = (torch.randn(2, 61, 72).cuda().to(dtype) for _ in range(2))
    parameters = (torch.randn(*shape).cuda() for shape in ((2, 3, 72), (3, 72), (72,), (2,)))
    parameters = adaln.Adaln(*parameters)
    for stream in {torch.float32, dtype}:
        x, g_out = (torch.randn(2, 61, 72).cuda().to(stream) for _ in range(2))
        n = adaln.norm(x, parameters, dtype)
        adaln.gate(x, branch, parameters, stream)
        _, g_factor = adaln.gate_backward(g_out, branch, parameters)
        _, g_shift, g_gain = adaln.norm_backward(g_n, g_out, x, parameters, n)
        adaln.modulation_backward(g_shift, g_gain, g_factor, parameters)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--no-products", action="store_true", help="no blocks")
    without = parser.parse_args().no_products
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        operators(dtype)
        passes(dtype)
        if not without:
            block(dtype)
    forward_variants()
    if fp8.unsupported(torch.device("cuda"), (80,)) is None:
        x = torch.randn(48, 80).cuda().bfloat16()
        fp8.quantize_transposed(x, fp8.quantize_rows(x)[1])
    torch.cuda.synchronize()
    print("every kernel has run")


if __name__ == "__main__":
    main()
