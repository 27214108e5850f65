"""Times whole networks on a GPU: `python benchmarks/bench_model.py`, ours and two transformers.

Training steps (forward, loss, backward, clipping, fused AdamW, float32 weights under autocast, no
EMA, random data on the device), forward passes and sampling (a few steps of DPM-Solver++(2M) at
256 px, guidance in one batch) of DiM-S, -L, -H, U-ViT-H and diffusers' DiT-XL/2, nobody with
activation checkpointing. Forward passes and sampling keep matrix weights in bf16, every network's;
'graph' is the replay of a CUDA graph, 'compile' torch.compile. A figure is the median of steps that
follow one another without the host waiting, between events on the device.

Records are merged into benchmarks/results/model_<gpu>.json, with the table beside it, after every
case, so that several calls add up: `--missing` goes on where another call of the same commit
stopped, `--tasks`, `--models` and `--only` choose. `--draw` alone draws docs/throughput.png and
writes the README's table from the records, without a GPU (pip install -e ".[bench]").
"""

import argparse
import gc
import itertools
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import model_report as report  # noqa: E402
import torch  # noqa: E402
import workloads  # noqa: E402
from bench_ops import current_commit  # noqa: E402
from workloads import Unavailable  # noqa: E402

from libs.runtime.logs import environment  # noqa: E402

MODELS = tuple(workloads.NETWORKS)
TASKS = ("train", "forward", "sample")
PRECISIONS = ("bf16", "fp16", "fp8")
TRAIN = [(256, 64), (512, 16)]  # (pixels, batch)
TRAIN_S = [(32, 128), (256, 64)]
FORWARD = [(256, 64), (256, 2), (512, 2), (1024, 2), (1536, 2), (2048, 2)]
SAMPLE = [(256, 1), (256, 32)]
# torch.compile takes from half a minute to minutes, so it runs where it is compared
COMPILED = {
    "DiM-H": [("train", 256, 64)],
    "U-ViT-H": [("forward", pixels, 2) for pixels in (256, 1024, 1536, 2048)],
    "DiT-XL/2": [("train", 256, 64), ("forward", 256, 64)]
    + [("forward", pixels, 2) for pixels in (256, 1024, 1536, 2048)],
}
SECONDS = 0.7  # of each measurement, about
SOLVER_STEPS = 5  # timed at once
IMAGE_STEPS = 50  # of an image, for images a second


class Case(NamedTuple):
    """One network built once; `graph` is measured with it where it is in `ways`."""

    model: str
    task: str
    pixels: int
    batch: int
    precision: str
    compiled: bool = False

    @property
    def ways(self):
        """Values of `graph` to measure: replay where the launches of the host are the bound."""
        few = self.task == "sample" or (self.task == "forward" and self.batch <= 2)
        few |= (self.model, self.task) == ("DiM-S", "train")
        return (False, True) if few else (False,)

    def __str__(self):
        way = "compile" if self.compiled else "eager"
        return f"{self.model} {self.task} {self.pixels} {self.batch} {self.precision} {way}"


def all_cases(precisions):
    """Every case, the compiled ones last: those that a short call can do without."""
    for task, model, precision in itertools.product(TASKS, MODELS, precisions):
        shapes = {"forward": FORWARD, "sample": SAMPLE, "train": TRAIN}[task]
        if precision == "fp8" and not model.startswith("DiM"):
            continue
        for pixels, batch in TRAIN_S if (task, model) == ("train", "DiM-S") else shapes:
            yield Case(model, task, pixels, batch, precision)
    for model, shapes in COMPILED.items():
        for shape in shapes if "bf16" in precisions else ():
            yield Case(model, *shape, "bf16", compiled=True)


# ---------------------------------------- measuring


def synchronize(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def between_marks(call, device, repeats):
    """Milliseconds of each of `repeats` calls in a row; the host waits after the last only."""
    if torch.device(device).type == "cuda":
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        marks[0].record()
        for mark in marks[1:]:
            call()
            mark.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]
    marks = [time.perf_counter()]
    for _ in range(repeats):
        call()
        marks.append(time.perf_counter())
    return [1e3 * (b - a) for a, b in itertools.pairwise(marks)]


def time_ms(call, device, seconds, warm_up=3):
    """(sorted milliseconds of 5 to 50 calls, about `seconds` in all; seconds of the first call)."""
    start = time.perf_counter()
    call()
    synchronize(device)
    first = time.perf_counter() - start
    typical = statistics.median(between_marks(call, device, warm_up))
    repeats = min(max(int(1e3 * seconds / typical), 5), 50)
    return sorted(between_marks(call, device, repeats)), first


def product_peak(device, size=8192, seconds=0.5):
    """FLOP/s of a product of two size x size matrices in bf16, random data."""
    a = torch.randn(size, size, device=device).bfloat16()
    return 2e3 * size**3 / statistics.median(time_ms(lambda: a @ a, device, seconds)[0])


def peak_gib(device):
    """Since the last reset; None on a CPU."""
    if torch.device(device).type != "cuda":
        return None
    return round(torch.cuda.max_memory_allocated() / 2**30, 2)


def reset_peak(device):
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def forget(device):
    """Give the memory of the last case back, its compiled code too."""
    gc.collect()
    torch.compiler.reset()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def timed_call(case, graph, evaluate, network, device):
    """What is timed of a forward pass or of sampling: (call, evaluations of the network in it)."""
    sampling = case.task == "sample"
    batch = 2 * case.batch if sampling else case.batch
    inputs = workloads.random_inputs(network, case.pixels, batch, device)
    if graph:
        evaluate = workloads.replayed(evaluate, *inputs)
    if not sampling:
        return lambda: evaluate(*inputs), 1
    steps = workloads.solver_steps(
        evaluate, network, case.pixels, case.batch, device, SOLVER_STEPS
    )
    return steps, SOLVER_STEPS


def measure(case, device, peak):
    """Records of a case, one for each of its ways.

    Raises:
        Unavailable: it cannot run here.
    """
    network = workloads.make_network(case.model, case.pixels, device, case.precision)
    of_one = workloads.product_flops(network, case.pixels)
    setting = (device, case.precision, case.compiled)
    ways = case.ways if torch.device(device).type == "cuda" else (False,)
    if case.task == "train":
        for graph in ways:
            reset_peak(device)
            step = workloads.training_step(network, case.pixels, case.batch, *setting, graph)
            yield record(case, graph, time_ms(step, device, SECONDS), 3 * of_one, device, peak)
        return
    evaluate = workloads.prepare_for_sampling(network, *setting)
    for graph in ways:
        reset_peak(device)
        call, evaluations = timed_call(case, graph, evaluate, network, device)
        times, first = time_ms(call, device, SECONDS)
        times = [t / evaluations for t in times]
        flops = of_one * (2 if case.task == "sample" else 1)
        yield record(case, graph, (times, first), flops, device, peak)


def record(case, graph, timed, flops_of_image, device, peak):
    """One record; flops_of_image: of the matrix products of a step, by image of the batch."""
    times, first = timed
    ms = statistics.median(times)
    limit_ms = 1e3 * case.batch * flops_of_image / peak
    steps = IMAGE_STEPS if case.task == "sample" else 1
    return {
        **case._asdict(), "graph": graph, "ms": round(ms, 3),
        "spread": [round(times[len(times) // 10], 3), round(times[-1 - len(times) // 10], 3)],
        "img_s": float(f"{1e3 * case.batch / (ms * steps):.5g}"), "gib": peak_gib(device),
        "mfu": round(limit_ms / ms, 4), "limit_ms": round(limit_ms, 3),
        "compile_s": round(first, 1) if case.compiled else None,
        "peak_tflops": round(peak / 1e12, 1),
    }  # fmt: skip


# ---------------------------------------- a run


def about(device, commit):
    gpu = torch.cuda.get_device_name() if device == "cuda" else environment()["devices"][0]
    return {"gpu": gpu, "torch": torch.__version__, "commit": commit or current_commit()}


def attempt(case, device, peak):
    """(records, None), or (those that came before, one line on why there are no more)."""
    forget(device)
    records = []
    try:
        for r in measure(case, device, peak):
            records.append(r)
    except Unavailable as reason:
        return records, f"skipped: {reason}"
    except torch.OutOfMemoryError:
        return records, "out of memory"
    except Exception as error:  # a peer's own failure, or ours, must not end the run
        lines = str(error).strip().splitlines() or [""]
        return records, f"failed: {type(error).__name__}: {lines[0]}"
    return records, None


def is_done(case, records, facts):
    """Whether all records of a case are there, of this commit and torch."""
    wanted = {**case._asdict(), **facts}
    found = [r["graph"] for r in records if all(r.get(k) == v for k, v in wanted.items())]
    return set(case.ways) <= set(found)


def run(cases, path, facts, device, minutes):
    """Measure what fits into `minutes`; returns the cases of ours that failed."""
    start, failed, left = time.monotonic(), [], []
    peak = product_peak(device)
    print(f"{facts}; bf16 products {peak / 1e12:.0f} TFLOP/s", flush=True)
    for case in cases:
        if time.monotonic() - start > 60 * minutes:
            left.append(case)
            continue
        records, problem = attempt(case, device, peak)
        for r in records:
            r.update(facts)
            print(" | ".join(report.cells(r)), flush=True)
        if records:
            report.write(path, report.merged(report.load(path), records))
        if problem:
            print(f"{case}: {problem}", flush=True)
            failed += [case] if problem.startswith("failed") and "DiM" in case.model else []
    if left:
        print(f"no time for {len(left)} cases; --missing goes on: {'; '.join(map(str, left))}")
    return failed


def chosen(args):
    """The cases that the command line asks for."""
    only = args.only.lower()
    for case in all_cases(args.precision):
        if case.model in args.models and case.task in args.tasks and only in str(case).lower():
            yield case


def list_of(known):
    """An argparse type: a comma-separated part of `known`."""

    def parse(text):
        names = tuple(name.strip() for name in text.split(","))
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
        return names

    return parse


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=list_of(MODELS), default=MODELS)
    parser.add_argument("--tasks", type=list_of(TASKS), default=TASKS)
    parser.add_argument("--precision", type=list_of(PRECISIONS), default=("bf16",))
    parser.add_argument(
        "--only", default="",
        help="cases whose line holds this, such as 'DiT-XL/2 forward 1536 2 bf16 compile'",
    )  # fmt: skip
    parser.add_argument("--missing", action="store_true", help="what this commit has no record of")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument("--minutes", type=float, default=9, help="begin no case after these")
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    parser.add_argument("--commit", default=None, help="what is measured; default: git's HEAD")
    parser.add_argument("--draw", action="store_true", help="draw the records, measure nothing")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "throughput.png")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="its table")
    parser.add_argument("--records", type=Path, default=None, help="the json file to draw")
    return parser, parser.parse_args(argv)


def draw(parser, args):
    paths = [args.records] if args.records else sorted(args.out.glob("model_*.json"))
    if len(paths) != 1:
        parser.error(f"{len(paths)} files model_*.json in {args.out}: name one with --records")
    records = report.load(paths[0])
    report.draw(records, args.picture)
    report.write_summary(records, args.readme)
    print(f"drew {args.picture} and wrote the table of {args.readme}")


def main(argv=None):
    parser, args = parse_arguments(argv)
    if args.draw:
        return draw(parser, args)
    cases = list(chosen(args))
    if args.list:
        return print("\n".join(map(str, cases)))
    if not torch.cuda.is_available():
        parser.error("there is no GPU here; --draw and --list need none")
    torch.manual_seed(0)
    facts = about("cuda", args.commit)
    path = report.result_path(args.out, facts["gpu"])
    if args.missing:
        cases = [case for case in cases if not is_done(case, report.load(path), facts)]
    if run(cases, path, facts, "cuda", args.minutes):
        sys.exit(1)


if __name__ == "__main__":
    main()
