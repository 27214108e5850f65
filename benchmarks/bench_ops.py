"""Times the operators and the Mamba mixer: `python benchmarks/bench_ops.py`, on a quiet machine.

Prints a table and adds the records to benchmarks/results/ops_<gpu>.json, the table beside them. On
a GPU a figure is the median of calls with a flushed L2 cache between them, timed by events;
limit_ms is the time that bytes and exponentials (for the mixer also its matrix products) need at
the speeds measured at the start. Scan orders are random. `--device=cpu` times the numba operators,
ops_cpu.json.
"""

import functools
import os
import statistics
import subprocess
import sys

import harness
import torch

from libs.model import MIXERS
from libs.ops import causal_conv1d, selective_scan

D, N, WIDTH = 3072, 16, 3  # DiM-H
# (B, L, dtypes): training at 256 and 512 pixels, sampling at 1024, 1536 and 256
SHAPES = [
    (96, 366, ("bf16", "fp16", "fp32")), (32, 1230, ("bf16",)), (2, 4494, ("bf16",)),
    (2, 9806, ("bf16",)), (2, 366, ("bf16",)),
]  # fmt: skip
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
OPERATORS = ("selective_scan", "causal_conv1d", "mixer")
HOLD = {f"{op} bf16 {B} {L}" for op in OPERATORS for B, L in ((96, 366), (32, 1230), (2, 9806))}
# (op, backend, B, L, D, order), float32: training, one image at DiM-L's width, the definition
CPU_CASES = [
    ("selective_scan", "cpu", 64, 126, 128, "raster"),
    ("selective_scan", "cpu", 64, 126, 128, "random"),
    ("selective_scan", "cpu", 1, 366, 2048, "raster"),
    ("causal_conv1d", "cpu", 64, 126, 128, "raster"),
    ("selective_scan", "reference", 64, 126, 128, "raster"),
]
CASE = ("op", "backend", "dtype", "B", "L", "D", "N", "order", "pass")
COLUMNS = ("op", "pass", "dtype", "B", "L", "D", "N", "median ms", "10-90%", "limit ms",
           "commit")  # fmt: skip


def make_scan(device, dtype, B, L, channels, order):
    """(f(backend), its differentiable inputs): softplus, bias, D and gate, as in the network."""
    normal = functools.partial(torch.randn, B, L, device=device, dtype=dtype)
    projected, z = normal(channels // 32 + 2 * N), normal(2 * channels)[..., channels:]
    A = -torch.arange(1, N + 1, device=device).float().repeat(channels, 1)
    skip, bias = torch.ones(channels, device=device), torch.full((channels,), -4.0, device=device)
    B_BLN, C_BLN = projected[..., -2 * N : -N], projected[..., -N:]
    inputs = [normal(channels), normal(channels), A, B_BLN, C_BLN, skip, z, bias]
    inputs = [x.detach().requires_grad_() for x in inputs]
    given = dict(delta_softplus=True, order=order)
    return lambda backend: selective_scan(*inputs, **given, backend=backend), inputs


def make_conv(device, dtype, B, L, channels, order):
    x = torch.randn(B, L, 2 * channels, device=device, dtype=dtype)[..., :channels]
    weight, bias = torch.randn(channels, WIDTH, device=device), torch.randn(channels, device=device)
    inputs = [x.detach().requires_grad_() for x in (x, weight, bias)]
    given = dict(activation="silu", order=order)
    return lambda backend: causal_conv1d(*inputs, **given, backend=backend), inputs


def make_mixer(device, dtype, B, L, channels, order):
    torch.manual_seed(0)
    mixer = MIXERS["mamba"](channels // 2).to(device)
    x = torch.randn(B, L, channels // 2, device=device, dtype=dtype, requires_grad=True)

    def forward(_):
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            return mixer(x, order)

    return forward, [x, *mixer.parameters()]


MAKE = {"selective_scan": make_scan, "causal_conv1d": make_conv, "mixer": make_mixer}


def measure(op, backend, dtype, B, L, channels, order, timing):
    """For each pass, fwd and bwd, (its name, sorted ms, what a record says). The forward records
    its graph, as in training. timing: device, repeats... as harness.time_apart takes them.
    """
    device = timing[0]
    indices = torch.randperm(L, device=device) if order == "random" else None
    call, inputs = MAKE[op](device, dtype, B, L, channels, indices)
    y = call(backend)
    g = torch.randn_like(y)
    passes = {
        "fwd": lambda: call(backend),
        "bwd": lambda: torch.autograd.grad(y, inputs, g, retain_graph=True),
    }
    size = {"B": B, "L": L, "D": channels, "N": WIDTH if op == "causal_conv1d" else N}
    for name, run in passes.items():
        times = harness.time_apart(run, *timing)
        yield name, times, {"op": op, **size, **harness.summarize(times)}


def measure_speeds(flush):
    """Bytes a second of a copy (read and written), bf16 multiply-adds a second times 2,
    exponentials a second (16 a clock and multiprocessor) at the highest clock."""
    source = torch.empty(2**30, dtype=torch.float32, device="cuda")
    target, a = torch.empty_like(source), torch.randn(8192, 8192, device="cuda").bfloat16()
    calls = (lambda: target.copy_(source), lambda: a @ a)
    copy_ms, product_ms = (
        statistics.median(harness.time_apart(call, "cuda", 10, flush)) for call in calls
    )
    query = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"]
    clock = 1e6 * float(subprocess.check_output(query, text=True).split()[0])
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    return {
        "bytes": 2 * 4 * source.numel() / copy_ms * 1e3,
        "flops": 2 * 8192**3 / product_ms * 1e3,
        "exponentials": 16 * multiprocessors * clock,
    }


def compute_limit_ms(op, backward, tokens, size, speeds):
    """The larger of bytes and exponentials; the backward computes the states again, so that it has
    twice the exponentials. The mixer: its operators' limits and its products, added.

    tokens: B L; size: bytes of an element.
    """
    if op == "mixer":
        half = D // 2
        rank = half // 16
        weights = half * 2 * D + D * (rank + 2 * N) + rank * D + D * half
        products = 1e3 * (4 if backward else 2) * weights * tokens / speeds["flops"]
        given = backward, tokens, size, speeds
        return products + sum(compute_limit_ms(single, *given) for single in OPERATORS[:2])
    rows = {"selective_scan": (4, 7), "causal_conv1d": (2, 3)}[op][backward]
    exponentials = {"selective_scan": N, "causal_conv1d": 1}[op] * tokens * D * (1 + backward)
    bytes_s = rows * tokens * D * size / speeds["bytes"]
    return 1e3 * max(bytes_s, exponentials / speeds["exponentials"])


def run_cuda(only, repeats, setting):
    """(records, head of the table)."""
    cache = torch.empty(2**26, dtype=torch.float32, device="cuda")  # 256 MiB: any L2

    def flush():
        for _ in range(16):  # 1 ms in which the host gets ahead: its gaps are not timed
            cache.zero_()

    speeds, records = measure_speeds(flush), []
    for B, L, dtypes in SHAPES:
        for op in OPERATORS:
            for dtype in dtypes if op != "mixer" else dtypes[:1]:
                if harness.is_selected(f"{op} {dtype} {B} {L}", only, HOLD):
                    case = op, "cuda", DTYPES[dtype], B, L, D, "random", ("cuda", repeats, flush)
                    for name, _, record in measure(*case):
                        limit = compute_limit_ms(op, name == "bwd", B * L, case[2].itemsize, speeds)
                        own = {"pass": name, "dtype": dtype, "limit_ms": round(limit, 4)}
                        records.append({**record, **own, **setting})
                    torch.cuda.empty_cache()
    speed = f"Copy {speeds['bytes'] / 1e12:.2f} TB/s, products {speeds['flops'] / 1e12:.0f} TFLOP/s"
    return records, f"{speed} in bf16; limit: see `bench_ops.py`."


def make_cells(r):
    """The columns; ops_cpu.json names backend and order, and has no limit."""
    where = f" ({r['backend']}, {r['order']})" if "backend" in r else ""
    spread = "{:.3f} - {:.3f}".format(*r["spread"])
    limit = f"{r['limit_ms']:.3f}" if "limit_ms" in r else "-"
    cells = [*(r[k] for k in COLUMNS[1:7]), f"{r['ms']:.3f}", spread, limit]
    return [r["op"] + where, *cells, r.get("commit", "-")]


def run_cpu(only, repeats, setting):
    """(records, head of the table)."""
    import numba

    machine = {"threads": torch.get_num_threads(), "cpu": setting["gpu"],
               "torch": setting["torch"], "numba": numba.__version__}  # fmt: skip
    head = f"{machine['threads']} threads, load average at the start {os.getloadavg()[0]:.1f}."
    records, names = [], {"fwd": "forward", "bwd": "backward"}
    for op, backend, *sizes, order in CPU_CASES:
        if harness.is_selected(" ".join(map(str, (op, backend, "float32", *sizes))), only, ()):
            case = op, backend, torch.float32, *sizes, order, ("cpu", repeats)
            for name, times, record in measure(*case):
                own = {"pass": names[name], "backend": backend, "dtype": "float32", "order": order}
                records.append({**record, **own, "ms_min": round(times[0], 3), **machine})
    return records, head


def main(argv=None):
    parser = harness.make_parser(__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--repeats", type=int, default=30, help="calls a figure")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; --device=cpu times the CPU operators")

    torch.manual_seed(0)
    setting = harness.describe_setting(args.device, args.commit)
    run = run_cuda if args.device == "cuda" else run_cpu
    records, speed = run(args.only, args.repeats, setting)
    head = "`bench_ops.py`: {gpu}, torch {torch}. ".format(**setting) + speed
    head += " N is the filter width for causal_conv1d.\n\n"
    print(head + harness.make_table(COLUMNS, map(make_cells, records)))
    path = harness.result_path(args.out, "ops", args.device)
    records = harness.merge(harness.load(path), records, CASE)
    harness.write(path, records, head + harness.make_table(COLUMNS, map(make_cells, records)))


if __name__ == "__main__":
    sys.exit(main())
