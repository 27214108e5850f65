"""Times training and evaluation on 1..N GPUs of one host:

    python benchmarks/bench_scaling.py --gpus 1,2,4,8 --models L,H --engines ddp,zero2,fsdp2

It starts its own processes, `accelerate launch --config_file configs/accelerate/<engine>.yaml`, and
adds its figures to benchmarks/results/scaling_<gpu>.json and .md. NCCL's multicast over NVLink
stays off (NCCL_NVLS_ENABLE=0). Without a GPU: gloo and the `tiny` network, to try it out.

A step is the one of libs/train/loop.py: forward, backward, clipping, AdamW, average, bf16. Weak
scaling: 96 images a GPU; strong: 768 in all. Where a micro-batch does not fit, it is halved, and
the gradients are accumulated. A step is timed three times, each the mean of --steps steps after a
warm-up, by the slowest process:

* alone: every GPU at once makes the steps of its own share of the batch, without the other
  processes and with a batch that lies on the GPU: `compute`. It keeps the whole optimizer, so what
  ZeRO-2 and FSDP2 save by stepping a part of it comes off their `communication`.
* together, the same batch: its time less the one before is `communication` that computation does
  not hide, waiting for the slowest process included.
* together, with batches out of the data loader (random latents in the shards of libs/features,
  from the page cache): its time less the one before is `input`. This one is `step` and `img/s`.

Evaluation: images by index as eval_ldm_discrete.py draws them, with guidance, few solver steps
(--sample_steps) and decoding by an autoencoder of Stable Diffusion's size, random weights.
`efficiency` is img/s over `ideal`, the number of GPUs times img/s of one; `gib` the largest peak of
memory that torch allocated in training on a GPU.
"""

import argparse
import contextlib
import copy
import functools
import gc
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import utils  # noqa: E402, I001 - before torch
import torch  # noqa: E402
from bench_features import write_packed  # noqa: E402
from bench_ops import current_commit  # noqa: E402

from configs import digits_T_DiM, imagenet256_H_DiM, imagenet256_L_DiM  # noqa: E402
from datasets import dataset_of  # noqa: E402
from libs.runtime import watch  # noqa: E402
from libs.train.loader import micro_batches  # noqa: E402
from libs.data.codec import LatentCodec, PixelCodec  # noqa: E402
from libs.train.ema import EMA  # noqa: E402
from libs.train.engine import Engine, make_engine  # noqa: E402
from libs.evaluate import make_image_sampler  # noqa: E402
from libs.evaluate.generate import batches_of_rank  # noqa: E402
from libs.runtime.launch import Precision, make_accelerator  # noqa: E402
from libs.model.build import build_model  # noqa: E402
from libs.train.resume import Progress  # noqa: E402
from libs.train.loop import (  # noqa: E402
    Draws,
    Verdict,
    accumulate_gradients,
    make_optimizer,
    set_learning_rate,
    update,
)
from sde import VPSDE, DiscreteSchedule  # noqa: E402

# name: config, images a GPU in weak scaling, images in all in strong scaling, images a GPU to draw.
MODELS = {
    "tiny": (digits_T_DiM, 8, 16, 8),
    "L": (imagenet256_L_DiM, 96, 768, 100),
    "H": (imagenet256_H_DiM, 96, 768, 100),
}
ENGINES = ("ddp", "zero2", "fsdp2")
LATENT_BYTES = 1 << 28
OUT_OF_MEMORY, FAILED_S = "out of memory", 580
ON_GPU = torch.cuda.is_available()


# ---------------------------------------------------------------------------------------------
# One process


class Alone:
    """What an engine asks of accelerate, where there is no other process."""

    num_processes, process_index, is_main_process = 1, 0, True

    def __init__(self, device):
        self.device = device

    def prepare_model(self, model):
        return model

    def no_sync(self, model):
        return contextlib.nullcontext()

    def reduce(self, tensor, reduction):
        return tensor


def config_of(job):
    """The model's config for this benchmark; --set has the last word."""
    config = MODELS[job["model"]][0].get_config()
    config.train.mixed_precision = "bf16" if ON_GPU else "no"
    config.train.num_workers = job["workers"]
    config.sample.sample_steps = job["sample_steps"]
    config.sample.mini_batch_size = min(config.sample.mini_batch_size, MODELS[job["model"]][3])
    if job["latents"]:
        config.dataset.name, config.dataset.path = "imagenet256_features", job["latents"]
        config.dataset.random_flip = False
    with config.unlocked():
        for change in job["set"]:
            key, value = change.split("=", 1)
            config.update_from_flattened_dict({key: json.loads(value)})
    return config


def parts_of(config):
    """(process, codec) of training."""
    if config.get("z_shape") is None:
        return VPSDE(), PixelCodec()
    return DiscreteSchedule(), LatentCodec(scale_factor=config.autoencoder.scale_factor)


class Steps:
    """Optimizer steps of one process, as libs.train.loop's loop makes them.

    batches: None for one batch that lies on the device, else an iterator over micro-batches.
    """

    def __init__(self, config, accelerator, dataset, alone):
        self.config, self.accelerator, self.progress = config, accelerator, Progress()
        device = accelerator.device
        self.process, self.codec = parts_of(config)
        self.shape, self.z_shape = dataset.shape, self.codec.latent_shape(dataset.shape)
        with device:
            network = build_model(config.nnet, seed=config.seed).train()
        self.ema = EMA(network, config.train.ema_rate)
        optimizer = make_optimizer(config, network)
        self.precision = Precision(config.train.mixed_precision, device)
        if alone:
            max_norm = config.max_grad_norm or float("inf")
            self.engine = Engine(accelerator, network, optimizer, self.precision, max_norm)
        else:
            self.engine = make_engine(
                config, accelerator, network, self.ema, optimizer, self.precision
            )

    def same_batch(self):
        """One micro-batch on the device, again and again."""
        config, device = self.config, self.accelerator.device
        parts = self.accelerator.num_processes * config.gradient_accumulation_steps
        size = config.train.batch_size // parts
        generator = torch.Generator(device).manual_seed(0)
        x = torch.randn(size, *self.shape, generator=generator, device=device).clamp_(-3, 3)
        return itertools.repeat((x, torch.zeros(size, dtype=torch.int64, device=device)))

    def step(self, batches):
        config, device = self.config, self.accelerator.device
        draws = Draws(
            seed=config.seed, batch=self.progress.batch, size=config.train.batch_size,
            shape=self.z_shape, depth=0, device=device, encoding=self.codec.needs_noise,
        )  # fmt: skip
        self.engine.zero_grad()
        loss = accumulate_gradients(
            config, self.accelerator, self.precision, self.engine, self.process, self.codec,
            batches, draws,
        )  # fmt: skip
        verdict = Verdict(self.accelerator, self.precision, loss, self.engine.clip(), False)
        set_learning_rate(config, self.engine.optimizer, self.progress.step)
        self.engine.step(verdict.bad)
        loss, norm, _, scale = verdict.read()
        outcome = update(
            self.precision, self.engine, self.ema, self.progress, loss, norm, scale
        )
        if outcome != "ok":
            raise RuntimeError(f"a step was {outcome}: loss {loss}, gradient norm {norm}")


def wait():
    if ON_GPU:
        torch.cuda.synchronize()


def slowest(seconds, accelerator):
    """The largest of all processes' times."""
    return accelerator.gather(torch.tensor([seconds], device=accelerator.device)).max().item()


def timed(call, n, warmup, accelerator):
    """Mean seconds of a call, of the slowest process."""
    for _ in range(warmup):
        call()
    accelerator.wait_for_everyone()
    wait()
    begin = time.perf_counter()
    for _ in range(n):
        call()
    wait()
    return slowest((time.perf_counter() - begin) / n, accelerator)


def release():
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()


def time_alone(config, accelerator, dataset, n, warmup):
    """`compute` of the docstring."""
    own = copy.deepcopy(config)
    own.train.batch_size = config.train.batch_size // accelerator.num_processes
    steps = Steps(own, Alone(accelerator.device), dataset, alone=True)
    call = functools.partial(steps.step, steps.same_batch())
    return timed(call, n, warmup, accelerator)


def time_together(config, accelerator, dataset, n, warmup):
    """(seconds with one batch, seconds with the data loader's, name of the engine)."""
    steps = Steps(config, accelerator, dataset, alone=False)
    same = functools.partial(steps.step, steps.same_batch())
    loaded = functools.partial(steps.step, micro_batches(config, dataset, accelerator, 0))
    together = timed(same, n, warmup, accelerator)
    return together, timed(loaded, n, warmup, accelerator), steps.engine.name


def training_record(config, accelerator, dataset, n):
    """The figures of a training step with the batch and accumulation of `config`."""
    sizes, alone = (config, accelerator, dataset, n, min(3, n)), None
    if accelerator.num_processes > 1:
        alone = time_alone(*sizes)
        release()
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    together, real, name = time_together(*sizes)
    gib = torch.cuda.max_memory_allocated() / 2**30 if ON_GPU else None
    release()
    alone = alone or together
    return dict(
        engine=name, batch=config.train.batch_size,
        accumulation=config.gradient_accumulation_steps, img_s=config.train.batch_size / real,
        step_s=real, compute_s=alone, communication_s=together - alone, input_s=real - together,
        gib=gib and slowest(gib, accelerator),
    )  # fmt: skip


def evaluation_record(job, config, accelerator):
    """Images a second, drawn by index."""
    process, codec = parts_of(config)
    if job["latents"]:
        from bench_latent import stable_diffusion_autoencoder

        autoencoder = stable_diffusion_autoencoder(accelerator.device)
        codec = LatentCodec(autoencoder, scale_factor=config.autoencoder.scale_factor)
    with accelerator.device:
        model = build_model(config.nnet, seed=config.seed).eval()
    precision = Precision(config.train.mixed_precision, accelerator.device)
    image_sampler = make_image_sampler(
        config, model, process, codec, precision=precision, seed=config.seed
    )
    n = MODELS[job["model"]][3] * accelerator.num_processes
    batches = batches_of_rank(n, config.sample.mini_batch_size, accelerator)

    def draw(batches):
        for indices in batches:
            image_sampler(indices)

    draw(batches[:1])
    seconds = timed(functools.partial(draw, batches), 1, 0, accelerator)
    return dict(
        mode="evaluation", engine="-", batch=config.sample.mini_batch_size, img_s=n / seconds,
        sample_steps=config.sample.sample_steps, algorithm=config.sample.algorithm,
    )  # fmt: skip


def settings_of(job):
    """(mode, batch, accumulation, steps) of the trainings to time."""
    n, (_, share_of_gpu, total, _) = job["gpus"], MODELS[job["model"]]
    for mode, own in ("weak", share_of_gpu), ("strong", total // n):
        if mode == "strong" and total % n:
            continue
        micro = max(size for size in range(1, min(job["micro_batch"], own) + 1) if own % size == 0)
        accumulation = own // micro
        yield mode, own * n, accumulation, max(2, job["steps"] // (1 if mode == "weak" else 3))


def work(job):
    """What one of the processes does; the main one writes the records."""
    accelerator, records = make_accelerator(), []
    config = config_of(job)
    dataset = dataset_of(config, augmented=True)
    for mode, batch, accumulation, n in settings_of(job):
        with config.unlocked():
            config.train.batch_size, config.gradient_accumulation_steps = batch, accumulation
        record = training_record(config, accelerator, dataset, n)
        records.append({"mode": mode, **record})
    if job["evaluation"]:
        records.append(evaluation_record(job, config, accelerator))
    watch.beat(watch.WAITING)
    if accelerator.is_main_process:
        Path(job["record"]).write_text(json.dumps(records), encoding="utf-8")
    accelerator.wait_for_everyone()
    accelerator.end_training()


def work_or_say_that_memory_ended(job):
    try:
        work(job)
    except torch.OutOfMemoryError:
        Path(job["record"]).write_text(json.dumps(OUT_OF_MEMORY), encoding="utf-8")
        os._exit(1)  # the others wait in a collective: the launcher ends them


# ---------------------------------------------------------------------------------------------
# The launcher of all


def command_of(job):
    """One process by itself, several as the README starts them."""
    words = [str(Path(__file__).resolve()), "--job", json.dumps(job)]
    if job["gpus"] == 1:
        return [sys.executable, *words]
    return [
        sys.executable, "-m", "accelerate.commands.launch",
        "--config_file", str(ROOT / "configs" / "accelerate" / f"{job['launch']}.yaml"),
        "--num_processes", str(job["gpus"]), "--main_process_port", "0", *words,
    ]  # fmt: skip


def launch(job):
    """The records of a job, OUT_OF_MEMORY, or none, with the reason, where its processes failed."""
    record = Path(job["record"])
    record.unlink(missing_ok=True)
    done = subprocess.run(
        command_of(job), env={**os.environ, "NCCL_NVLS_ENABLE": "0"}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=FAILED_S,
    )  # fmt: skip
    if not record.exists():
        print(f"{job['model']} {job['launch']} on {job['gpus']} failed:\n{done.stdout[-6000:]}")
        return []
    return json.loads(record.read_text(encoding="utf-8"))


def launch_that_fits(job):
    """The same, with half the micro-batch until it fits; the job keeps the size that did."""
    while (found := launch(job)) == OUT_OF_MEMORY:
        if job["micro_batch"] == 1:
            raise SystemExit(f"{job['model']} does not fit with one image a GPU")
        job["micro_batch"] //= 2
        print(f"out of memory: micro-batches of {job['micro_batch']}", flush=True)
    return found


def jobs_of(arguments, folder, latents):
    """One for each model, number of GPUs and engine."""
    for model in arguments.models:
        job = dict(
            model=model, micro_batch=MODELS[model][1], steps=arguments.steps, set=arguments.set,
            sample_steps=arguments.sample_steps, record=str(folder / "record.json"),
            latents=None if model == "tiny" else str(latents),
        )  # fmt: skip
        for gpus in sorted(arguments.gpus):
            cores = (os.cpu_count() or 1) // gpus
            job |= dict(gpus=gpus, workers=min(8, cores - 1) if ON_GPU else 0, evaluation=True)
            for engine in arguments.engines if gpus > 1 else ("one",):
                job["launch"] = engine
                yield job  # micro_batch may shrink: it holds for the rest of the model
                job["evaluation"] = False


def with_efficiency(records):
    """The records with `ideal` and `efficiency`, where one GPU was timed with the same model."""
    one = {(r["model"], r["mode"]): r["img_s"] for r in records if r["gpus"] == 1}
    for record in records:
        base = one.get((record["model"], record["mode"]))
        record["ideal_img_s"] = base and base * record["gpus"]
        record["efficiency"] = base and record["img_s"] / record["ideal_img_s"]
    return records


def key_of(record):
    return tuple(record[key] for key in ("model", "mode", "gpus", "launch"))


def merged(old, new):
    """The records of both; of the same measurement the new one."""
    found = {key_of(record): record for record in [*old, *new]}
    order = {name: i for i, name in enumerate((*MODELS, "weak", "strong", "evaluation", *ENGINES))}
    return sorted(
        with_efficiency(list(found.values())),
        key=lambda r: (order[r["model"]], order[r["mode"]], r["gpus"], order.get(r["launch"], -1)),
    )


def shown(value, form):
    return "-" if value is None else format(value, form)


COLUMNS = {
    "model": "", "mode": "", "gpus": "d", "engine": "", "batch": "d", "accumulation": "d",
    "img_s": ".1f", "ideal_img_s": ".1f", "efficiency": ".1%", "step_s": ".4f",
    "compute_s": ".4f", "communication_s": ".4f", "input_s": ".4f", "gib": ".1f",
}  # fmt: skip


def table(records):
    """Markdown; img/s beside the ideal line."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for record in records:
        cells = [shown(record.get(key), form) for key, form in COLUMNS.items()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def head_of(records):
    """What the table was measured with."""
    made = sorted({f"{r['gpu']}, torch {r['torch']}, commit {r['commit']}" for r in records})
    precision = "bf16" if ON_GPU else "float32"
    return (
        f"{'; '.join(made)}; {precision}, NVLink multicast off. `python "
        "benchmarks/bench_scaling.py`, whose docstring says what the columns are. Batch is that of "
        "all GPUs; evaluation: of one, seconds-long draws with few solver steps.\n"
    )


def name_of_device():
    return torch.cuda.get_device_name() if ON_GPU else "cpu"


def write_results(out, records):
    name = re.sub(r"\W+", "_", name_of_device()).lower()
    path = utils.make_directory(out) / f"scaling_{name}.json"
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    records = merged(old, records)
    utils.write_json(path, records)
    text = "\n".join(["# Scaling", "", head_of(records), table(records), ""])
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    return path, records


def words_in(kinds):
    """An argparse type: a list of words, each of these."""

    def parse(text):
        words = text.split(",")
        if unknown := set(words) - set(kinds):
            raise argparse.ArgumentTypeError(f"{unknown.pop()!r} is none of {', '.join(kinds)}")
        return words

    return parse


def counts(text):
    found = sorted({int(word) for word in text.split(",")})
    if found[0] < 1:
        raise argparse.ArgumentTypeError(f"{found[0]} is no number of GPUs")
    if ON_GPU and found[-1] > torch.cuda.device_count():
        raise argparse.ArgumentTypeError(
            f"{found[-1]} GPUs asked for, {torch.cuda.device_count()} found"
        )
    return found


def parse_arguments(words=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = [2**i for i in range(4) if 2**i <= torch.cuda.device_count()] or [1, 2]
    parser.add_argument("--gpus", type=counts, default=every, help="numbers of GPUs: 1,2,4,8")
    models = ["L", "H"] if ON_GPU else ["tiny"]
    parser.add_argument("--models", type=words_in(MODELS), default=models)
    parser.add_argument("--engines", type=words_in(ENGINES), default=list(ENGINES))
    parser.add_argument("--steps", type=int, default=10, help="timed steps; a third where strong")
    parser.add_argument("--sample_steps", type=int, default=5, help="solver steps of evaluation")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=JSON",
                        help="of the config: nnet.activation_checkpointing=true")  # fmt: skip
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--commit", default=None, help="what was measured; default: git's HEAD")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main(arguments):
    if "zero2" in arguments.engines and importlib.util.find_spec("deepspeed") is None:
        print("DeepSpeed is not installed: ZeRO-2 is left out")
        arguments.engines.remove("zero2")
    origin = dict(gpu=name_of_device(), torch=torch.__version__)
    origin["commit"] = arguments.commit or current_commit()
    made, failed = [], False
    with tempfile.TemporaryDirectory() as folder:
        latents = Path(folder) / "latents"
        if set(arguments.models) - {"tiny"}:
            write_packed(latents, 256, False, LATENT_BYTES)
        for job in jobs_of(arguments, Path(folder), latents):
            begin = time.monotonic()
            found = launch_that_fits(job)
            origin |= dict(model=job["model"], gpus=job["gpus"], set=job["set"])
            new = [{**origin, "launch": job["launch"], **record} for record in found]
            for record in new:
                record["launch"] = "-" if record["mode"] == "evaluation" else record["launch"]
            path, records = write_results(arguments.out, new)
            made += map(key_of, new)
            failed |= not found
            seconds = time.monotonic() - begin
            print(f"{job['model']} {job['launch']} on {job['gpus']}: {seconds:.0f} s", flush=True)
    print(table([record for record in records if key_of(record) in made]))
    print(f"wrote {path}")
    return failed


if __name__ == "__main__":
    ARGUMENTS = parse_arguments()
    if ARGUMENTS.job:
        work_or_say_that_memory_ended(ARGUMENTS.job)
    else:
        sys.exit(main(ARGUMENTS))
