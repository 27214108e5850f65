"""Times whole networks on a GPU: `python benchmarks/bench_model.py`, ours and two transformers.

Training steps (forward, loss, backward, clipping, fused AdamW, float32 weights under autocast, no
EMA, random data on the device), forward passes and sampling (a few steps of DPM-Solver++(2M), both
halves of guidance in one batch) of DiM-S, -L, -H, -XL, U-ViT-H and diffusers' DiT-XL/2, without
activation checkpointing. Forward passes and sampling hold matrix weights in bf16; 'graph' is the
replay of CUDA graphs, 'compile' torch.compile. A figure is the median of steps that follow one
another without the host waiting. Records are added to benchmarks/results/model_<gpu>.json after
every case, the table beside them. `--draw=JSON` draws docs/throughput.png from records, without a
GPU (pip install -e ".[bench]").
"""

import contextlib
import gc
import itertools
import sys
from statistics import median
from typing import NamedTuple

import harness
import torch
from networks import NETWORKS, count_flops, make_inputs
from torch import nn

from configs.common import d
from libs.diffusion import make_guided, sample
from libs.runtime import GraphedTraining, SamplingNetwork
from sde import make_process

SHAPES = {  # task: (pixels, batch)
    "train": [(256, 64), (512, 16)],
    "forward": [(256, 64), (256, 2), (512, 2), (1024, 2), (1536, 2), (2048, 2)],
    "sample": [(256, 1), (256, 32)],
}
TRAIN_S = [(32, 128), (256, 64)]
SMALL = [("forward", pixels, 2) for pixels in (256, 1024, 1536, 2048)]
COMPILED = {  # torch.compile takes minutes, so it runs where it is compared
    "DiM-H": [("train", 256, 64)],
    "U-ViT-H": SMALL,
    "DiT-XL/2": [("train", 256, 64), ("forward", 256, 64), *SMALL],
}
HOLD = {  # what a change of structure must not slow down
    *(f"DiM-H forward {pixels} 2 bf16 graph" for pixels in (256, 1024, 1536, 2048)),
    "DiM-S train 32 128 bf16 graph", "DiM-L train 256 64 bf16 eager",
    "DiM-H train 256 64 bf16 eager", "DiM-H train 256 64 fp8 eager",
    "DiM-H sample 256 32 bf16 graph",
}  # fmt: skip
DTYPE = torch.bfloat16  # of autocast, around fp8 products too
SECONDS = 0.7  # of each measurement, about
SOLVER_STEPS = 5  # timed at once
IMAGE_STEPS = 50  # of an image, for images a second
PROCESS = {False: "vpsde", True: "discrete"}  # by whether the network sees latents


class Case(NamedTuple):
    model: str
    task: str
    pixels: int
    batch: int
    precision: str = "bf16"
    compiled: bool = False
    graph: bool = False

    def __str__(self):
        return " ".join(map(str, self[:5])) + " " + describe_way(self._asdict())


def describe_way(record):
    """'eager', 'graph', 'compile' or 'compile, graph'."""
    words = ["compile"] * record["compiled"] + ["graph"] * record["graph"]
    return ", ".join(words) or "eager"


def list_cases():
    """Every case, the compiled ones last."""
    for task, model in itertools.product(SHAPES, NETWORKS):
        shapes = TRAIN_S if (task, model) == ("train", "DiM-S") else SHAPES[task]
        precisions = ("bf16", "fp8") if model in ("DiM-L", "DiM-XL", "DiM-H") else ("bf16",)
        for precision, (pixels, batch) in itertools.product(precisions, shapes):
            by_graph = task != "train" or model in ("DiM-S", "DiM-L")
            for graph in (False, True) if by_graph else (False,):
                yield Case(model, task, pixels, batch, precision, graph=graph)
    for model, shapes in COMPILED.items():
        for shape in shapes:
            for graph in (False, True) if shape in SMALL else (False,):
                yield Case(model, *shape, compiled=True, graph=graph)


def make_network(case, device):
    """The network of a case on the device, its random weights drawn there."""
    with torch.device(device):
        network = NETWORKS[case.model](case.pixels)
    if case.precision == "fp8":
        network.use_fp8(device)
    return network


def make_training_step(case, network, device, stack):
    """(a function that makes one optimizer step on random data that lie on the device, 1)."""
    process = make_process(PROCESS[case.pixels > 32])
    x, _, y = make_inputs(network.train(), case.pixels, case.batch, device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-4, weight_decay=0.03, fused=True)
    call = torch.compile(network) if case.compiled else network
    if case.graph:
        call = GraphedTraining(network)

    def step():
        optimizer.zero_grad(set_to_none=True)
        t, eps = process.train_time(torch.rand(case.batch, device=device)), torch.randn_like(x)
        with torch.autocast(device, DTYPE):
            out = call(process.mix(x, eps, t), process.model_time(t), y)
        loss = (out.float() - eps).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        return loss

    return step, 1


def prepare_for_sampling(case, network, device, stack):
    """f(x, t, y) as samplers call it, until `stack` ends: no gradients, matrices in bf16."""
    network = network.eval().requires_grad_(False)
    network = torch.compile(network) if case.compiled else network
    stack.enter_context(torch.no_grad())
    stack.enter_context(torch.autocast(device, DTYPE))
    return stack.enter_context(SamplingNetwork(network, DTYPE, graphs=case.graph).ready())


def make_forward(case, network, device, stack):
    """(a function that makes one forward pass, 1)."""
    call = prepare_for_sampling(case, network, device, stack)
    inputs = make_inputs(network, case.pixels, case.batch, device)
    return lambda: call(*inputs), 1


def make_sampling(case, network, device, stack):
    """(a function that makes solver steps on `case.batch` images, their number)."""
    call, process = prepare_for_sampling(case, network, device, stack), make_process(PROCESS[True])
    z, _, y = make_inputs(network, case.pixels, case.batch, device)
    settings = d(cfg=True, scale=0.4, guidance_interval=None)
    output = make_guided(
        call, process, y, pred="noise_pred", null_label=network.num_classes, settings=settings
    )
    options = dict(pred="noise_pred", algorithm="dpm_solver_pp_2m", steps=SOLVER_STEPS)
    return lambda: sample(output, process, z, **options), SOLVER_STEPS


MAKE = {"train": make_training_step, "forward": make_forward, "sample": make_sampling}
FLOPS = {"train": 3, "forward": 1, "sample": 2}  # forward passes in a step, by FLOPs


def time_steps(call, device):
    """(sorted milliseconds of 5 to 50 calls, about SECONDS in all; seconds of the first call)."""
    (first,) = harness.time_in_a_row(call, device, 1)
    typical = median(harness.time_in_a_row(call, device, 3))
    repeats = min(max(int(1e3 * SECONDS / typical), 5), 50)
    return sorted(harness.time_in_a_row(call, device, repeats)), first / 1e3


def measure_peak(device, size=8192):
    """FLOP/s of a product of two size x size matrices in bf16, random data."""
    a = torch.randn(size, size, device=device).bfloat16()
    return 2e3 * size**3 / median(time_steps(lambda: a @ a, device)[0])


def measure(case, device, peak):
    """The record of a case. peak: FLOP/s of the device."""
    with torch.device("meta"):
        flops = FLOPS[case.task] * count_flops(NETWORKS[case.model](case.pixels), case.pixels)
    network, on_gpu = make_network(case, device), device == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with contextlib.ExitStack() as stack:
        call, steps = MAKE[case.task](case, network, device, stack)
        times, first = time_steps(call, device)
    times = [t / steps for t in times]
    ms, limit_ms = median(times), 1e3 * case.batch * flops / peak
    img_s = 1e3 * case.batch / ms / (IMAGE_STEPS if case.task == "sample" else 1)
    return {
        **case._asdict(), **harness.summarize(times), "img_s": float(f"{img_s:.5g}"),
        "gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_gpu else None,
        "mfu": round(limit_ms / ms, 4), "limit_ms": round(limit_ms, 3),
        "compile_s": round(first, 1) if case.compiled else None,
        "peak_tflops": round(peak / 1e12, 1),
    }  # fmt: skip


def run(cases, path, setting, device):
    """Measure the cases; returns those of our networks that failed: a failure ends no run."""
    peak, failed = measure_peak(device), []
    print(f"{setting}; bf16 products {peak / 1e12:.0f} TFLOP/s", flush=True)
    for case in cases:
        gc.collect()
        torch.compiler.reset()
        torch.cuda.empty_cache()
        try:
            record = measure(case, device, peak) | setting
        except Exception as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            print(f"{case}: {type(error).__name__}: {reason}", flush=True)
            failed += [case] if case.model.startswith("DiM") else []
            continue
        print(" | ".join(make_cells(record)), flush=True)
        records = harness.merge(harness.load(path), [record], Case._fields)
        harness.write(path, records, make_table(records))
    return failed


COLUMNS = ("model", "task", "px", "batch", "precision", "how", "median ms", "10-90%", "img/s",
           "GiB", "MFU", "limit ms", "ratio", "commit")  # fmt: skip


def make_cells(r):
    low, high = r["spread"]
    first = f" ({r['compile_s']:.0f} s)" if r["compile_s"] and not r["graph"] else ""
    gib = "-" if r["gib"] is None else f"{r['gib']:.1f}"
    return [
        *(str(r[k]) for k in Case._fields[:5]), describe_way(r) + first, f"{r['ms']:.2f}",
        f"{low:.2f} - {high:.2f}", f"{r['img_s']:.4g}", gib, f"{r['mfu']:.1%}",
        f"{r['limit_ms']:.2f}", f"{r['ms'] / r['limit_ms']:.2f}", r["commit"],
    ]  # fmt: skip


def make_table(records):
    """Markdown: the records by task, resolution and batch."""
    tasks, rows = list(SHAPES), list(records)
    rows.sort(key=lambda r: (tasks.index(r["task"]), r["pixels"], -r["batch"], r["model"]))
    head = (
        f"`bench_model.py`: {rows[0]['gpu']}, torch {rows[-1]['torch']}. MFU: FLOPs of all matrix "
        "products, times 3 in training, over time and the speed of bf16 products of 8192 x 8192 "
        "matrices; limit: their time at that speed, ratio the time over it. sample: ms of one "
        "solver step, both halves of guidance in one batch, and images of 50 steps a second. GiB: "
        "max_memory_allocated. compile: in brackets the first call.\n\n"
    )
    return head + harness.make_table(COLUMNS, map(make_cells, rows))


def draw(records, path):
    """Images a second of forward passes against resolution, each network its fastest way."""
    from matplotlib.figure import Figure

    best = {}
    for r in records:
        if (r["task"], r["batch"], r["precision"]) == ("forward", 2, "bf16"):
            points = best.setdefault(r["model"], {})
            points[r["pixels"]] = max(points.get(r["pixels"], 0), r["img_s"])
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log", xlabel="pixels a side")
    axes.set_ylabel("images a second, forward, batch 2, bf16")
    axes.set_title(f"{records[-1]['gpu']}, torch {records[-1]['torch']}; each its fastest way")
    for model, points in sorted(best.items()):
        style = "-o" if model.startswith("DiM") else "--s"
        axes.plot(*zip(*sorted(points.items()), strict=True), style, label=model)
    axes.set_xticks(sorted(points), map(str, sorted(points)))
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path, dpi=120)


def main(argv=None):
    parser = harness.make_parser(__doc__)
    parser.add_argument("--draw", type=harness.Path, metavar="JSON", help="records to draw")
    args = parser.parse_args(argv)
    if args.draw:
        return draw(harness.load(args.draw), harness.ROOT / "docs" / "throughput.png")
    cases = [case for case in list_cases() if harness.is_selected(str(case), args.only, HOLD)]
    if not torch.cuda.is_available():
        parser.error("there is no GPU here; --draw needs none")
    torch.manual_seed(0)
    path = harness.result_path(args.out, "model")
    return bool(run(cases, path, harness.describe_setting("cuda", args.commit), "cuda"))


if __name__ == "__main__":
    sys.exit(main())
