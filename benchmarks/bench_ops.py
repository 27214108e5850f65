"""Times the operators and the Mamba block on a GPU: `python benchmarks/bench_ops.py`.

Prints a table and writes it to benchmarks/results/ops_<gpu>.md, with every figure in
ops_<gpu>.json. A figure is the median of calls with a flushed L2 cache between them, its spread the
10th and 90th percentile, timed by events on the device; limit_ms is what bytes moved and
exponentials, or the block's matrix products, need at the speeds measured at the start; peer_ms is
mamba_ssm's and causal_conv1d's time, where they can be imported. Scan orders are random
permutations.
"""

import argparse
import importlib.util
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from libs.model.mamba import Mamba  # noqa: E402
from libs.ops import causal_conv1d, selective_scan  # noqa: E402

D, N, WIDTH = 3072, 16, 3  # DiM-H
# (B, L, dtypes): training at 256 and 512 pixels, sampling at 1024, 1536 and 256
SHAPES = [
    (96, 366, ("bf16", "fp16", "fp32")), (32, 1230, ("bf16",)), (2, 4494, ("bf16",)),
    (2, 9806, ("bf16",)), (2, 366, ("bf16",)),
]  # fmt: skip
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PEERS = {"selective_scan": "mamba_ssm", "causal_conv1d": "causal_conv1d", "mixer": None}


def time_ms(call, repeats, flush):
    """Milliseconds of each call, sorted."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        for _ in range(16):  # 1 ms in which the host gets ahead: its gaps are not timed
            flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)


def measured_speeds(flush):
    """Bytes a second of a copy (read and written), bf16 multiply-adds a second times 2,
    exponentials a second (16 a clock and multiprocessor) at the highest clock."""
    source = torch.empty(2**30, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    copy_ms = statistics.median(time_ms(lambda: target.copy_(source), 10, flush))
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    product_ms = statistics.median(time_ms(lambda: a @ a, 10, flush))
    query = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"]
    clock = 1e6 * float(subprocess.check_output(query, text=True).split()[0])
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    return {
        "bytes": 2 * 4 * source.numel() / copy_ms * 1e3,
        "flops": 2 * 8192**3 / product_ms * 1e3,
        "exponentials": 16 * multiprocessors * clock,
    }


def limit_ms(op, direction, B, L, dtype, speeds):
    """The larger of bytes and exponentials (the walk back needs the states again, which nobody
    keeps: twice as many); for the block its operators' limits and its products one after another.
    """
    tokens, size = B * L, DTYPES[dtype].itemsize
    backward = direction == "bwd"
    if op == "mixer":
        half = D // 2
        rank = half // 16
        weights = half * 2 * D + D * (rank + 2 * N) + rank * D + D * half
        products = (4 if backward else 2) * weights * tokens / speeds["flops"] * 1e3
        operators = ("selective_scan", "causal_conv1d")
        return products + sum(limit_ms(o, direction, B, L, dtype, speeds) for o in operators)
    rows = {"selective_scan": (4, 7), "causal_conv1d": (2, 3)}[op][backward]
    bytes_moved = rows * tokens * D * size
    exponentials = {"selective_scan": N, "causal_conv1d": 1}[op] * tokens * D * (1 + backward)
    return 1e3 * max(bytes_moved / speeds["bytes"], exponentials / speeds["exponentials"])


def scan_inputs(B, L, dtype):
    def normal(*shape):
        return torch.randn(*shape, device="cuda", dtype=DTYPES[dtype])

    z = normal(B, L, 2 * D)[..., D:]
    projected = normal(B, L, D // 32 + 2 * N)
    B_BLN, C_BLN = projected[..., -2 * N : -N], projected[..., -N:]
    A = -torch.arange(1, N + 1, device="cuda").float().repeat(D, 1)
    skip, bias = torch.ones(D, device="cuda"), torch.full((D,), -4.0, device="cuda")
    return normal(B, L, D), normal(B, L, D), A, B_BLN, C_BLN, skip, z, bias


def conv_inputs(B, L, dtype):
    x = torch.randn(B, L, 2 * D, device="cuda", dtype=DTYPES[dtype])[..., :D]
    return x, torch.randn(D, WIDTH, device="cuda"), torch.randn(D, device="cuda")


def calls(op, B, L, dtype, backend):
    """(forward, inputs): what is timed, and what it is differentiated by."""
    order = torch.randperm(L, device="cuda")
    if op == "mixer":
        torch.manual_seed(0)
        mixer = Mamba(D // 2).cuda()
        x = torch.randn(B, L, D // 2, device="cuda", dtype=DTYPES[dtype], requires_grad=True)

        def forward():
            with torch.autocast("cuda", dtype=DTYPES[dtype], enabled=dtype != "fp32"):
                return mixer(x, order)

        return forward, [x, *mixer.parameters()]
    inputs = (scan_inputs if op == "selective_scan" else conv_inputs)(B, L, dtype)
    inputs = [x.detach().requires_grad_() for x in inputs]
    if op == "selective_scan":
        options = {"delta_softplus": True, "order": order, "backend": backend}
        return lambda: selective_scan(*inputs, **options), inputs
    options = {"activation": "silu", "order": order, "backend": backend}
    return lambda: causal_conv1d(*inputs, **options), inputs


def measure(op, B, L, dtype, backend, repeats, flush):
    """{'fwd': sorted ms, 'bwd': sorted ms}; forward as in training, with a graph recorded."""
    forward, inputs = calls(op, B, L, dtype, backend)
    forward_ms = time_ms(forward, repeats, flush)
    y = forward()
    g = torch.randn_like(y)

    def backward():
        torch.autograd.grad(y, inputs, g, retain_graph=True)

    return {"fwd": forward_ms, "bwd": time_ms(backward, repeats, flush)}


def run_all(repeats, commit):
    flush = torch.empty(2**26, dtype=torch.float32, device="cuda")  # 256 MiB: any L2
    speeds = measured_speeds(flush)
    rows = []
    for B, L, dtypes in SHAPES:
        for op, peer in PEERS.items():
            for dtype in dtypes if op != "mixer" else dtypes[:1]:
                ours = measure(op, B, L, dtype, "cuda", repeats, flush)
                theirs = None
                if peer and importlib.util.find_spec(peer):
                    theirs = measure(op, B, L, dtype, "mamba_ssm", repeats, flush)
                for direction, ms in ours.items():
                    rows.append({
                        "op": op, "pass": direction, "dtype": dtype, "B": B, "L": L, "D": D,
                        "N": WIDTH if op == "causal_conv1d" else N,
                        "ms": round(statistics.median(ms), 4),
                        "spread": [round(ms[len(ms) // 10], 4), round(ms[-1 - len(ms) // 10], 4)],
                        "limit_ms": round(limit_ms(op, direction, B, L, dtype, speeds), 4),
                        "peer_ms": theirs and round(statistics.median(theirs[direction]), 4),
                        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
                        "commit": commit,
                    })  # fmt: skip
                torch.cuda.empty_cache()
    return rows, speeds


def table(rows, speeds):
    first = rows[0]
    lines = [
        f"`bench_ops.py`: {first['gpu']}, torch {first['torch']}, commit {first['commit']}. Copy "
        f"{speeds['bytes'] / 1e12:.2f} TB/s, bf16 products {speeds['flops'] / 1e12:.0f} TFLOP/s. N "
        "is the filter width for causal_conv1d; limit: see `bench_ops.py`.", "",
        "| op | pass | dtype | B | L | D | N | median ms | 10-90% | limit ms | peer ms |",
        "|---" * 11 + "|",
    ]  # fmt: skip
    for r in rows:
        cells = [r[k] for k in ("op", "pass", "dtype", "B", "L", "D", "N")]
        cells += [f"{r['ms']:.3f}", "{:.3f} - {:.3f}".format(*r["spread"])]
        cells += [f"{r['limit_ms']:.3f}", f"{r['peer_ms']:.3f}" if r["peer_ms"] else "-"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def current_commit():
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout.strip() or "unknown"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--commit", default=None, help="what was measured; default: git's HEAD")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU here")

    torch.manual_seed(0)
    rows, speeds = run_all(args.repeats, args.commit or current_commit())
    args.out.mkdir(parents=True, exist_ok=True)
    gpu = re.sub(r"[^a-z0-9]+", "_", rows[0]["gpu"].lower()).strip("_")
    (args.out / f"ops_{gpu}.json").write_text(json.dumps(rows, indent=1) + "\n")
    (args.out / f"ops_{gpu}.md").write_text(table(rows, speeds))
    print(table(rows, speeds))


if __name__ == "__main__":
    main()
