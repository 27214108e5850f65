"""Times the operators on the CPU: `python benchmarks/bench_ops_cpu.py`, on a quiet machine.

Prints a table and writes it to benchmarks/results/ops_cpu.md, with every figure in ops_cpu.json. A
figure is the median of many short calls, its spread the 10th and 90th percentile; the load average
at the start is recorded, because other work on the same cores lengthens everything.
"""

import argparse
import functools
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numba  # noqa: E402
import torch  # noqa: E402

from libs.ops import causal_conv1d, selective_scan  # noqa: E402

# (op, backend, dtype, B, L, D, N or filter width, order): the training shape of the target, one
# image of the same, one image at the width of the large models
SHAPES = [
    ("selective_scan", "cpu", torch.float32, 64, 126, 128, 16, None),
    ("selective_scan", "cpu", torch.float32, 64, 126, 128, 16, "random"),
    ("selective_scan", "cpu", torch.bfloat16, 64, 126, 128, 16, None),
    ("selective_scan", "cpu", torch.float32, 1, 126, 128, 16, None),
    ("selective_scan", "cpu", torch.float32, 1, 366, 2048, 16, None),
    ("causal_conv1d", "cpu", torch.float32, 64, 126, 128, 3, None),
    ("causal_conv1d", "cpu", torch.float32, 1, 126, 128, 3, None),
    ("causal_conv1d", "reference", torch.float32, 64, 126, 128, 3, None),
    ("selective_scan", "reference", torch.float32, 64, 126, 128, 16, None),
]


def make_order(order, length):
    return torch.randperm(length) if order == "random" else None


def scan_call(backend, dtype, B, L, D, N, order):
    """Softplus, bias, D and gate, as in the network."""
    activations = [torch.randn(B, L, size).to(dtype) for size in (D, D, N, N, D)]
    u, delta, B_BLN, C_BLN, z = (x.requires_grad_() for x in activations)
    A = (-torch.arange(1, N + 1).float().repeat(D, 1)).requires_grad_()
    skip, bias = torch.ones(D, requires_grad=True), torch.full((D,), -4.0, requires_grad=True)
    inputs = (u, delta, A, B_BLN, C_BLN, skip, z, bias)
    options = {"delta_softplus": True, "order": make_order(order, L), "backend": backend}
    return functools.partial(selective_scan, *inputs, **options), inputs


def conv_call(backend, dtype, B, L, D, W, order):
    x, weight, bias = torch.randn(B, L, D).to(dtype), torch.randn(D, W), torch.randn(D)
    inputs = tuple(t.requires_grad_() for t in (x, weight, bias))
    options = {"activation": "silu", "order": make_order(order, L), "backend": backend}
    return functools.partial(causal_conv1d, *inputs, **options), inputs


def measure(forward, inputs, repeats):
    """Seconds of each call: {'forward': [...], 'backward': [...], 'forward+backward': [...]}."""
    times = {"forward": [], "backward": [], "forward+backward": []}
    grad = torch.ones_like(forward())
    for i in range(repeats + 1):
        start = time.perf_counter()
        y = forward()
        middle = time.perf_counter()
        torch.autograd.grad(y, inputs, grad)
        end = time.perf_counter()
        if i > 0:  # the first call compiles
            times["forward"].append(middle - start)
            times["backward"].append(end - middle)
            times["forward+backward"].append(end - start)
    return times


def summarise(seconds):
    ms = sorted(1e3 * s for s in seconds)
    return {
        "ms": round(ms[len(ms) // 2], 3),
        "ms_min": round(ms[0], 3),
        "spread": [round(ms[len(ms) // 10], 3), round(ms[-1 - len(ms) // 10], 3)],
    }


def cpu_name():
    """As /proc/cpuinfo says, with the widest vector unit; platform.processor() where there is no
    such file.
    """
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor()
    lines = path.read_text().splitlines()
    name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    flags = next(line for line in lines if line.startswith("flags"))
    return name + (" (AVX-512)" if " avx512f" in flags else " (AVX2)" if " avx2" in flags else "")


def first_call_seconds(cache):
    """Import, compilation or cache, and one small forward and backward pass, in a fresh process."""
    code = (
        "import torch, time; t = time.time(); from libs.ops import selective_scan as s;"
        "x = torch.ones(1, 2, 3, requires_grad=True); b = torch.ones(1, 2, 4);"
        "s(x, x, -torch.ones(3, 4), b, b).sum().backward(); print(time.time() - t)"
    )
    env = os.environ | {"NUMBA_CACHE_DIR": cache}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, check=True, capture_output=True, text=True
    )
    return round(float(result.stdout), 1)


def run_all(repeats):
    machine = {
        "threads": torch.get_num_threads(),
        "cpu": cpu_name(),
        "torch": torch.__version__,
        "numba": numba.__version__,
    }
    rows = []
    for op, backend, dtype, B, L, D, N, order in SHAPES:
        make = scan_call if op == "selective_scan" else conv_call
        slow = op == "selective_scan" and backend == "reference"
        times = measure(*make(backend, dtype, B, L, D, N, order), repeats=10 if slow else repeats)
        for name, seconds in times.items():
            row = {"op": op, "pass": name, "backend": backend}
            row |= {"dtype": str(dtype).removeprefix("torch."), "B": B, "L": L, "D": D, "N": N}
            row["order"] = order or "raster"
            rows.append(row | summarise(seconds) | machine)
    return rows


def table(rows, header):
    lines = [
        header + " N is the filter width for causal_conv1d.", "",
        "| op | backend | dtype | B | L | D | N | order | pass | median ms | 10-90% | least |",
        "|---" * 12 + "|",
    ]
    for r in rows:
        low, high = r["spread"]
        keys = ("op", "backend", "dtype", "B", "L", "D", "N", "order", "pass", "ms")
        cells = [r[k] for k in keys]
        lines.append("| " + " | ".join(map(str, [*cells, f"{low} - {high}", r["ms_min"]])) + " |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()

    torch.manual_seed(0)
    load = os.getloadavg()[0]
    rows = run_all(args.repeats)
    args.out.mkdir(parents=True, exist_ok=True)
    cache = args.out / "numba_cache"
    cold, warm = (first_call_seconds(str(cache)) for _ in range(2))
    for path in sorted(cache.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    cache.rmdir()
    header = (
        f"`bench_ops_cpu.py`: {rows[0]['cpu']}, {rows[0]['threads']} threads, "
        f"torch {rows[0]['torch']}, numba {rows[0]['numba']}; load average at the start "
        f"{load:.1f}. First scan, forward and backward, in a fresh process: {cold} s with "
        f"compilation, {warm} s from the cache."
    )
    (args.out / "ops_cpu.json").write_text(json.dumps(rows, indent=1) + "\n")
    (args.out / "ops_cpu.md").write_text(table(rows, header))
    print(table(rows, header))


if __name__ == "__main__":
    main()
