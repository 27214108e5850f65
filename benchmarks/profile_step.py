"""Where the time of a step goes: `python benchmarks/profile_step.py DiM-H:256:64 DiM-S:32:128`.

For each model:pixels:batch it profiles, with torch.profiler, a training step on random data, one
evaluation of the network in sampling (an image, guidance in one batch; eager, and by CUDA graph),
and steps of the real loop of libs/train/loop.py on a small generated data set, with what makes the
host wait there. Kernels are grouped by name. Writes benchmarks/results/profile_<gpu>.md.
"""

import argparse
import collections
import contextlib
import itertools
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import workloads  # noqa: E402
from bench_model import MODELS, about, forget, synchronize  # noqa: E402
from model_report import RESULTS, result_path  # noqa: E402
from PIL import Image  # noqa: E402
from torch.autograd import DeviceType  # noqa: E402
from torch.optim.optimizer import register_optimizer_step_post_hook  # noqa: E402
from torch.profiler import ProfilerActivity, profile, record_function  # noqa: E402

from configs import cifar10_S_DiM, imagenet256_H_DiM  # noqa: E402
from datasets import dataset_of  # noqa: E402
from libs.data.codec import LatentCodec, PixelCodec  # noqa: E402
from libs.data.latent_writer import Packing, ShardWriter, make_settings  # noqa: E402
from libs.train.loop import train  # noqa: E402

STEPS = 3  # profiled
SKIPPED = 12  # of the loop before them; the later ones are timed without the profiler
# The first pattern that a kernel's name holds says its group; on a CPU the names are operators'
GROUPS = {
    "optimizer, clipping, average": r"multi_tensor_apply|adam|foreach|lpnorm",
    "scan": r"scan_forward|scan_backward|sum_parts|selective_scan",
    "convolution": r"conv(?!ert)|fprop|dgrad|wgrad",
    "norm, modulation, gate": r"gate_|norm|rowwise|gammabeta",
    "attention": r"flash|fmha|attention|softmax",
    "matrix products": r"gemm|nvjet|cutlass|xmma|cublas|splitk|::(mm|addmm|bmm|matmul|linear)",
    "copies, casts, fills": r"copy|memcpy|memset|fill|zero_|catarray|::cat\b|quantize|::to\b",
}
OTHER = "other"
WAITS = (
    "cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize", "aten::item",
    "aten::_local_scalar_dense", "aten::nonzero",
)  # fmt: skip
SPAN = "profiled steps"


class Target(NamedTuple):
    model: str
    pixels: int
    batch: int


# ---------------------------------------- recording


class Recording:
    """A stretch of work under torch.profiler, from start() to stop(), both at rest."""

    def __init__(self, device):
        self.device = torch.device(device)
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self.profiler = profile(activities=activities)

    def start(self):
        synchronize(self.device)
        self.profiler.start()
        self.span = record_function(SPAN)
        self.span.__enter__()
        self.began = time.perf_counter()

    def stop(self):
        self.span.__exit__(None, None, None)
        synchronize(self.device)
        self.seconds = time.perf_counter() - self.began
        self.profiler.stop()
        self.events = list(self.profiler.events())

    def kernels(self):
        """(name, start us, end us) of what ran on the device; on a CPU the operators, by the time
        that each took itself."""
        if self.device.type == "cpu":
            operators = [e for e in self.events if e.name != SPAN]
            return [(e.name, 0.0, float(e.self_cpu_time_total)) for e in operators]
        on_device = [e for e in self.events if e.device_type == DeviceType.CUDA]
        return [
            (e.name, e.time_range.start, e.time_range.end)
            for e in on_device
            if e.name != SPAN and not getattr(e, "is_user_annotation", False)
        ]

    def host_calls(self):
        """{name: [ms, ...]} of what the host did within the stretch: operators, CUDA's calls."""
        host = [e for e in self.events if e.device_type == DeviceType.CPU]
        (span,) = [e.time_range for e in host if e.name == SPAN]
        calls = collections.defaultdict(list)
        for e in host:
            if e.name != SPAN and span.start <= e.time_range.start <= span.end:
                calls[e.name].append((e.time_range.end - e.time_range.start) / 1e3)
        return calls


def recorded(call, device, warm_up=3):
    """The Recording of STEPS calls."""
    for _ in range(warm_up):
        call()
    recording = Recording(device)
    recording.start()
    for _ in range(STEPS):
        call()
    recording.stop()
    return recording


# ---------------------------------------- tables


def group_of(name):
    found = (group for group, p in GROUPS.items() if re.search(p, name, re.IGNORECASE))
    return next(found, OTHER)


def busy_ms(kernels):
    """Milliseconds in which at least one kernel ran."""
    total, until = 0.0, float("-inf")
    for _, start, end in sorted(kernels, key=lambda kernel: kernel[1]):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total / 1e3


def groups_table(recording):
    """Markdown: milliseconds, share and launches a step of each group of kernels."""
    times = collections.defaultdict(list)
    for name, start, end in recording.kernels():
        times[group_of(name)].append((end - start) / 1e3)
    total = sum(map(sum, times.values()))
    rows = sorted(times.items(), key=lambda row: -sum(row[1]))
    rows.append(("all", list(itertools.chain(*times.values()))))
    lines = ["| kernels | ms a step | share | launches |", "|---" * 4 + "|"]
    for group, ms in rows:
        figures = f"{sum(ms) / STEPS:.2f} | {sum(ms) / total:.1%} | {len(ms) / STEPS:.0f}"
        lines.append(f"| {group} | {figures} |")
    if recording.device.type == "cuda":
        wall = 1e3 * recording.seconds
        idle = 1 - busy_ms(recording.kernels()) / wall
        lines += ["", f"A step under the profiler: {wall / STEPS:.2f} ms, the GPU idle {idle:.1%}."]
    return lines


def largest(recording, count=12):
    """Lines for the console: the kernels that take longest."""
    times = collections.Counter()
    for name, start, end in recording.kernels():
        times[name] += (end - start) / 1e3 / STEPS
    most = times.most_common(count)
    return [f"{ms:9.3f} ms {group_of(name):30} {name[:90]}" for name, ms in most]


def waits_table(recording):
    """Markdown: what the host waits for, and copies between host and device, a step."""
    host = recording.host_calls()
    rows = {name: host[name] for name in WAITS if name in host}
    loading = (ms for name, ms in host.items() if "DataLoader" in name)
    rows["data loader"] = list(itertools.chain(*loading))
    for name, start, end in recording.kernels():
        if name.startswith("Memcpy") and "DtoD" not in name:
            rows.setdefault(name, []).append((end - start) / 1e3)
    lines = ["| waits and copies | a step | ms a step |", "|---" * 3 + "|"]
    for name, ms in rows.items():
        lines.append(f"| {name} | {len(ms) / STEPS:.1f} | {sum(ms) / STEPS:.3f} |")
    return lines


# ---------------------------------------- the real loop


def write_pictures(folder, side, count):
    """PNG files of noise."""
    rng = np.random.default_rng(0)
    for i in range(count):
        pixels = rng.integers(256, size=(side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:05}.png")


def write_latents(folder, pixels, count, num_classes):
    """Cached latents of noise, as an extraction writes them."""
    side = pixels // 8
    settings = make_settings(
        record_shape=(8, side, side), scale_factor=0.18215, resolution=pixels,
        autoencoder_sha256="0" * 64, precision="fp32", flips=False, crop="none", source="folder",
        images_sha256="0" * 64, num_images=count, images_per_shard=count,
        class_names=tuple(f"class {i}" for i in range(num_classes)),
    )  # fmt: skip
    packing, rng = Packing(folder, settings), np.random.default_rng(0)
    packing.begin()
    with ShardWriter(packing, 0) as writer:
        writer.write(rng.standard_normal((count, 8, side, side), np.float32).astype(np.float16))
        writer.commit({})
    packing.finish(rng.integers(num_classes, size=count))


def loop_config(target, folder, num_classes, workers):
    """A config of the loop, its data written into `folder`; no pictures, no checkpoints."""
    in_pixels = target.pixels <= workloads.PIXEL_SPACE
    config = (cifar10_S_DiM if in_pixels else imagenet256_H_DiM).get_config()
    config.dataset.update(path=str(folder), resolution=target.pixels, random_flip=False)
    config.dataset.name = "folder" if in_pixels else "folder_features"
    config.train.update(
        batch_size=target.batch, n_steps=10**6, mixed_precision="bf16", num_workers=workers,
        grid_samples=0, fid_samples=0, save_interval=10**6, eval_interval=10**6,
    )  # fmt: skip
    if in_pixels:
        write_pictures(folder, target.pixels, 8 * target.batch)
    else:
        write_latents(folder, target.pixels, 8 * target.batch, num_classes)
    return config


class Finished(Exception):
    """Ends the loop once the steps are recorded: no checkpoint of gigabytes is written."""


@contextlib.contextmanager
def watching(recording):
    """Record STEPS steps of the loop after SKIPPED; gives the list of the times of steps.

    An optimizer's step ends each, so a hook of all optimizers sees them without a change to the
    loop.
    """
    times, number = [], itertools.count()

    def at_step(*_):
        times.append(time.perf_counter())
        n = next(number)
        if n == SKIPPED:
            recording.start()
        elif n == SKIPPED + STEPS:
            recording.stop()
            raise Finished

    hook = register_optimizer_step_post_hook(at_step)
    try:
        yield times
    finally:
        hook.remove()


def profiled_loop(target, device, workers=8):
    """(Recording, milliseconds of a step before it): of libs.train.loop's loop, batch and all."""
    model = workloads.make_network(target.model, target.pixels, device, "bf16")
    recording = Recording(device)
    with watching(recording) as times, tempfile.TemporaryDirectory() as folder:
        data, run = Path(folder, "data"), Path(folder, "run")
        data.mkdir()
        config = loop_config(target, data, model.num_classes, workers)
        pixel_space = target.pixels <= workloads.PIXEL_SPACE
        codec = PixelCodec() if pixel_space else LatentCodec(scale_factor=0.18215)
        try:
            train(
                config, run, model=model, process=workloads.process_for(target.pixels),
                codec=codec, dataset=dataset_of(config, augmented=True),
            )  # fmt: skip
        except Finished:
            pass
    steps = [b - a for a, b in itertools.pairwise(times[SKIPPED // 3 : SKIPPED])]
    return recording, 1e3 * statistics.median(steps)


# ---------------------------------------- a run


def training_section(target, device):
    """Lines of the report; the largest kernels go to the console."""
    network = workloads.make_network(target.model, target.pixels, device, "bf16")
    step = workloads.training_step(network, target.pixels, target.batch, device, "bf16")
    recording = recorded(step, device)
    print("\n".join(largest(recording)), flush=True)
    return ["", "### Training step, random data", "", *groups_table(recording)]


def sampling_section(target, device, graph):
    """An evaluation of the network for one image, guidance in one batch."""
    network = workloads.make_network(target.model, target.pixels, device, "bf16")
    evaluate = workloads.prepare_for_sampling(network, device, "bf16")
    inputs = workloads.random_inputs(network, target.pixels, 2, device)
    if graph:
        evaluate = workloads.replayed(evaluate, *inputs)
    recording = recorded(lambda: evaluate(*inputs), device)
    print("\n".join(largest(recording)), flush=True)
    how = "CUDA graph" if graph else "eager"
    return ["", f"### Sampling, one evaluation, batch 2, {how}", "", *groups_table(recording)]


def loop_section(target, device, workers=8):
    """The loop of libs/train/loop.py, EMA and data loading included."""
    recording, ms = profiled_loop(target, device, workers)
    speed = (
        f"Without the profiler a step takes {ms:.2f} ms, {1e3 * target.batch / ms:.4g} img/s; "
        f"{workers} workers load the data."
    )
    tables = [*groups_table(recording), "", *waits_table(recording)]
    return ["", "### The loop of libs/train/loop.py", "", speed, "", *tables]


def report(targets, device, facts, workers=8):
    """The whole Markdown text."""
    lines = [
        f"`profile_step.py`: {facts['gpu']}, torch {facts['torch']}, commit {facts['commit']}; "
        f"bf16 autocast, {STEPS} steps each. cudaStreamSynchronize and aten::item are where the "
        "host waits for the device; data loader: the host waits for its workers."
    ]
    graphs = (False, True) if torch.device(device).type == "cuda" else (False,)
    for target in targets:
        lines += ["", f"## {target.model}, {target.pixels} px, batch {target.batch}"]
        sections = [lambda t=target: training_section(t, device)]
        sections += [lambda t=target, g=graph: sampling_section(t, device, g) for graph in graphs]
        sections += [lambda t=target: loop_section(t, device, workers)]
        for section in sections:
            forget(device)
            lines += section()
    return "\n".join(lines) + "\n"


def target(text):
    """An argparse type: model:pixels:batch."""
    model, *sizes = text.split(":")
    if model not in MODELS or len(sizes) != 2 or not all(s.isdigit() and int(s) for s in sizes):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not model:pixels:batch, such as DiM-H:256:64, of {', '.join(MODELS)}"
        )
    return Target(model, *map(int, sizes))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = [Target("DiM-H", 256, 64), Target("DiM-S", 32, 128)]
    parser.add_argument("targets", nargs="*", type=target, default=default)
    parser.add_argument("--workers", type=int, default=8, help="of the loop's data loader")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--commit", default=None, help="what is profiled; default: git's HEAD")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("there is no GPU here")
    torch.manual_seed(0)
    facts = about("cuda", args.commit)
    text = report(args.targets, "cuda", facts, args.workers)
    name = result_path(args.out, facts["gpu"]).name.replace("model_", "profile_")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / name).with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
