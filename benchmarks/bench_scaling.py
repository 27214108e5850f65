"""Times training on 1..N GPUs of one host:

    python benchmarks/bench_scaling.py --gpus=1,2,4,8 --models=L,H --engines=ddp,zero2,fsdp2

Starts itself by `accelerate launch --config_file configs/accelerate/<engine>.yaml`, with NVLink
multicast off, and adds its figures to benchmarks/results/scaling_<gpu>.json, the table beside them.
Training is libs.train.train, in bf16, on random latents in packed shards: img_s is what it logs
over the last --steps steps, gib the peak of torch's memory in the first process. Weak scaling: 96
images a GPU; strong: 768 in all; above --micro_batch images a GPU, gradients are accumulated.
compute_s is the step of one GPU with as many images a GPU, communication_s the rest of step_s;
efficiency is img_s over the number of GPUs times img_s of one. --saves saves every --steps steps:
in saves_<gpu>.json saves_s are the seconds that each save but the last, which nothing follows,
added to training, and writes_s those from its begin to its end, which must fit into --steps.
Without a GPU: gloo and `tiny`.
"""

import argparse
import functools
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import harness
import torch
from bench_data import write_packed

from configs import digits_T_DiM, imagenet256_H_DiM, imagenet256_L_DiM
from libs.parts import make_parts
from libs.train import train

# name: config, images a GPU in weak scaling, images in all in strong scaling
MODELS = {
    "tiny": (digits_T_DiM, 8, 16),
    "L": (imagenet256_L_DiM, 96, 768),
    "H": (imagenet256_H_DiM, 96, 768),
}
ENGINES = {"one": "one process", "ddp": "DDP", "zero2": "DeepSpeed ZeRO-2", "fsdp2": "FSDP2"}
CASE = ("model", "mode", "gpus", "launch")
COLUMNS = {
    "model": "", "mode": "", "gpus": "d", "engine": "", "batch": "d", "accumulation": "d",
    "img_s": ".1f", "ideal_img_s": ".1f", "efficiency": ".1%", "step_s": ".4f",
    "compute_s": ".4f", "communication_s": ".4f", "input_s": ".4f", "gib": ".1f",
}  # fmt: skip
OF_SAVES = {"model": "", "gpus": "d", "batch": "d", "step_s": ".3f", "writes_s": "", "saves_s": ""}
LATENT_BYTES = 1 << 28
ON_GPU = torch.cuda.is_available()


def make_config(job):
    """The model's config for a job."""
    config, never = MODELS[job["model"]][0].get_config(), 10**9
    config.train.update(
        mixed_precision="bf16" if ON_GPU else "no", n_steps=2 * job["steps"], save_interval=never,
        eval_interval=never, grid_samples=0, fid_samples=0, log_interval=job["steps"],
        batch_size=job["batch"],
    )  # fmt: skip
    if job["saves"]:
        config.train.update(n_steps=4 * job["steps"], save_interval=job["steps"], log_interval=1)
    config.gradient_accumulation_steps = job["accumulation"]
    if config.z_shape is not None:
        config.dataset.update(name="imagenet256_features", path=f"{job['folder']}/latents")
        config.dataset.random_flip = False
        config.autoencoder.pretrained_path = None  # no pictures are made
    return config


def find_save_seconds(directory, job):
    """Of each save the seconds that it took; and those that training waited for it, with those by
    which the steps up to the next were longer than the median of the steps before the first.
    """
    log = (directory / "output.log").read_text()
    found = re.findall(r"in ([\d.]+) s, of which training waited ([\d.]+)", log)
    took, waited = ([float(pair[k]) for pair in found] for k in (0, 1))
    lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    seconds, n = [job["batch"] / line["img_s"] for line in lines], job["steps"]
    longer = [x - median(seconds[2:n]) for x in seconds]
    added = [waited[k] + sum(longer[(k + 1) * n : (k + 2) * n]) for k in range(3)]
    return took, [round(x, 2) for x in added]


def work(job):
    """What each of the processes does; the first one writes the figures."""
    directory, config = Path(job["folder"]) / "-".join(str(job[k]) for k in CASE), make_config(job)
    train(config, directory, **make_parts(config, data="training")._asdict())
    if os.environ.get("RANK", "0") == "0":
        line = (directory / "metrics.jsonl").read_text().splitlines()[-1]
        img_s, gib = json.loads(line)["img_s"], torch.cuda.max_memory_allocated() / 2**30
        found = {"img_s": img_s, "step_s": job["batch"] / img_s, "input_s": None}
        found["gib"] = gib or None
        if job["saves"]:
            found["writes_s"], found["saves_s"] = find_save_seconds(directory, job)
        Path(job["folder"], "record.json").write_text(json.dumps(found))


def launch(job):
    """The record of a job, or None, with its output printed, where its processes failed."""
    command = [sys.executable, str(Path(__file__).resolve()), "--job", json.dumps(job)]
    if job["gpus"] > 1:
        config_file = harness.ROOT / "configs" / "accelerate" / f"{job['launch']}.yaml"
        command[1:1] = [
            "-m", "accelerate.commands.launch", "--config_file", str(config_file),
            "--num_processes", str(job["gpus"]), "--main_process_port", "0",
        ]  # fmt: skip
    done = subprocess.run(
        command, env={**os.environ, "NCCL_NVLS_ENABLE": "0"}, capture_output=True, text=True
    )
    if done.returncode:
        return print(f"{job} failed:\n{done.stdout[-3000:]}{done.stderr[-6000:]}")
    figures = json.loads(Path(job["folder"], "record.json").read_text())
    setting = {key: value for key, value in job.items() if key not in ("folder", "steps", "saves")}
    return {**setting, "engine": ENGINES[job["launch"]], **figures}


def list_jobs(args, folder):
    """A job for each model, number of GPUs, mode and engine."""
    counts, modes = sorted(map(int, args.gpus)), ("weak",) if args.saves else ("weak", "strong")
    for model, gpus, mode in itertools.product(args.models, counts, modes):
        _, share, total = MODELS[model]
        for engine in args.engines if gpus > 1 else ["one"]:
            images = share if mode == "weak" else total // gpus
            yield {
                "model": model, "mode": mode, "gpus": gpus, "launch": engine,
                "batch": images * gpus, "accumulation": -(-images // args.micro_batch),
                "steps": args.steps, "saves": args.saves, "folder": folder,
            }  # fmt: skip


def compare_with_one(records):
    """The records with what follows from those of one GPU, where there are any, in order."""
    one = {(r["model"], r["mode"]): r["img_s"] for r in records if r["gpus"] == 1}
    for r in records:
        base = one.get((r["model"], r["mode"]))
        r["ideal_img_s"] = base and base * r["gpus"]
        r["efficiency"] = base and r["img_s"] / r["ideal_img_s"]
        if base and r.get("step_s") and "compute_s" not in r:
            r["compute_s"] = r["batch"] / r["ideal_img_s"]
            r["communication_s"] = r["step_s"] - r["compute_s"]
    order = [*MODELS, "weak", "strong", "evaluation", *map(str, range(1, 65)), "-", *ENGINES]
    return sorted(records, key=lambda r: [order.index(str(r[key])) for key in CASE])


def make_table(records):
    columns = OF_SAVES if "saves_s" in records[0] else COLUMNS
    rows = [
        ["-" if r.get(key) is None else f"{r[key]:{form}}" for key, form in columns.items()]
        for r in records
    ]
    made = sorted({f"{r['gpu']}, torch {r['torch']}, commit {r['commit']}" for r in records})
    head = f"# Scaling\n\n{'; '.join(made)}. `bench_scaling.py` says what the columns are.\n\n"
    return head + harness.make_table(columns, rows)


def main(argv=None):
    counts = [2**i for i in range(4) if 2**i <= torch.cuda.device_count()] or [1, 2]
    parser = harness.make_parser(__doc__)
    split = functools.partial(str.split, sep=",")
    parser.add_argument("--gpus", type=split, default=counts)
    parser.add_argument("--models", type=split, default=["L", "H"] if ON_GPU else ["tiny"])
    parser.add_argument("--engines", type=split, default=["ddp", "fsdp2"])
    parser.add_argument("--steps", type=int, default=10, help="steps that are timed")
    parser.add_argument("--saves", action="store_true", help="measure what saving adds")
    parser.add_argument("--micro_batch", type=int, default=96, help="images on a GPU at once")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.job:
        return work(args.job)
    device, failed = "cuda" if ON_GPU else "cpu", False
    path = harness.result_path(args.out, "saves" if args.saves else "scaling", device)
    setting = harness.describe_setting(device, args.commit)
    with tempfile.TemporaryDirectory() as folder:
        if set(args.models) - {"tiny"}:
            write_packed(Path(folder, "latents"), 256, False, LATENT_BYTES)
        for job in list_jobs(args, folder):
            record = launch(job)
            failed |= record is None
            new = [{**setting, **record}] if record else []
            records = compare_with_one(harness.merge(harness.load(path), new, CASE))
            harness.write(path, records, make_table(records))
            print(record, flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
