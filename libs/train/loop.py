"""The training loop: one flat function, and the pieces it is made of.

Every draw is keyed by (seed, global batch, position in it), so a run does not depend on the number
of processes, on the accumulation, or on where it was interrupted.
"""

import contextlib
import faulthandler
import logging
import math
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import utils
from libs.evaluate import make_image_sampler
from libs.ops import describe_backends, fp8
from libs.runtime import (
    MetricsLog,
    Precision,
    StopRequest,
    beat,
    environment,
    get_logger,
    make_accelerator,
    ranks,
)
from libs.train.ema import EMA
from libs.train.engine import make_engine
from libs.train.loader import micro_batches
from libs.train.lr import lr_factor
from libs.train.prefetch import Prefetcher
from libs.train.resume import Progress, find_checkpoint, resume, training_state
from libs.train.snapshots import Outputs
from sde import denoising_loss
from utils import UserError

log = logging.getLogger("dim")

MAX_CHANGES = 20  # lines about what differs from the run's start
STOPPED = 143  # exit status after SIGTERM or Ctrl-C, which save first: 128 + 15, as shells count


class Draws:
    """The random numbers of one global batch, the same on every rank; a rank takes its rows by
    position. All are float32 on `device`.

    size: of the global batch; shape: (C, H, W) of z; depth: of a network with stochastic depth,
    else 0; encoding: whether the codec draws. time, label (size,) and drop_path (size, depth) are
    uniform in [0, 1), eps and latent (size, C, H, W) standard normal, latent None unless encoding.
    """

    def __init__(self, *, seed, batch, size, shape, depth, device, encoding):
        generator = torch.Generator(device).manual_seed(utils.derive_seed("training", seed, batch))
        uniform = torch.rand(size, 2 + depth, generator=generator, device=device)
        self.time, self.label, self.drop_path = uniform[:, 0], uniform[:, 1], uniform[:, 2:]
        self.eps = torch.randn(size, *shape, generator=generator, device=device)
        self.latent = None  # of the autoencoder's sampling
        if encoding:
            self.latent = torch.randn(size, *shape, generator=generator, device=device)


def make_optimizer(config, model):
    """AdamW over all parameters in one group: every parameter is decayed, as in the official runs
    (golden item 27).
    """
    settings = config.optimizer
    if settings.name != "adamw":
        raise UserError(f"optimizer.name is {settings.name!r}, expected 'adamw'")
    return torch.optim.AdamW(
        model.parameters(),
        lr=settings.lr,
        betas=tuple(map(float, settings.betas)),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def rows_of(config, accelerator, micro_batch):
    """The rows of the global batch in micro-batch `micro_batch` of this rank, as GlobalBatchSampler
    deals them: a slice.
    """
    size = config.train.batch_size // (
        accelerator.num_processes * config.gradient_accumulation_steps
    )
    start = (micro_batch * accelerator.num_processes + accelerator.process_index) * size
    return slice(start, start + size)


def training_labels(config, y, draw, null_label):
    """Labels (B,), dropped to the null class where the draw falls below p_uncond; None in an
    unconditional run.
    """
    if config.train.mode == "uncond":
        return None
    return torch.where(draw < config.dataset.p_uncond, null_label, y) if config.dataset.cfg else y


def accumulate_gradients(config, accelerator, precision, engine, process, codec, batches, draws):
    """Forward and backward of this rank's micro-batches; returns their mean loss, 0-dim float32.

    batches: iterator over (x, y) of this rank; draws: Draws of the global batch. When gradients are
    averaged over the ranks is the engine's matter.
    """
    accumulation = config.gradient_accumulation_steps
    null_label = engine.network.num_classes
    total = torch.zeros((), device=accelerator.device)
    for m in range(accumulation):
        rows = rows_of(config, accelerator, m)
        beat("reading data")
        x, y = (tensor.to(accelerator.device, non_blocking=True) for tensor in next(batches))
        beat("computing")
        y = training_labels(config, y, draws.label[rows], null_label)
        t = process.train_time(draws.time[rows])
        drop_path = {"drop_path_draw": draws.drop_path[rows]} if draws.drop_path.shape[1] else {}
        with engine.accumulating(last=m + 1 == accumulation):
            with precision.autocast():
                noise = None if draws.latent is None else draws.latent[rows]
                z, eps = codec.encode(x, noise), draws.eps[rows]
                losses = denoising_loss(
                    engine.model, process, z, y, pred=config.pred, t=t, eps=eps, **drop_path
                )
            loss = losses.mean() / accumulation
            engine.backward(loss)
        total += loss.detach()
    return total


class Verdict:
    """What a step's gradients came to, on its way from the device to the host.

    bad: 0-dim float32 on the device, 1 if loss or gradient norm is not finite, else 0.
    """

    def __init__(self, accelerator, precision, loss, norm, stop):
        summed = accelerator.reduce(torch.stack([loss, torch.full_like(loss, stop)]), "sum")
        norm, scale = norm.to(summed), precision.scaler.scale(torch.ones_like(loss))
        self.bad = (~(summed[0].isfinite() & norm.isfinite())).float()
        self.num_processes = accelerator.num_processes
        self._values = torch.cat([summed, torch.stack([norm, scale])]).to("cpu", non_blocking=True)
        self._arrived = None
        if loss.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self):
        """(mean loss over the processes, gradient norm, whether any process was asked to stop, loss
        scale).

        The one host sync of a step: it waits for the gradients, not for the optimizer's work that
        was queued since, which keeps the device busy until the host has gone on.
        """
        if self._arrived is not None:
            self._arrived.synchronize()
        loss, stops, norm, scale = self._values.tolist()
        return loss / self.num_processes, norm, stops > 0, scale


def set_learning_rate(config, optimizer, step):
    """Set optimizer.lr times the schedule's factor for optimizer step number `step`, from 0."""
    schedule, n_steps = config.lr_scheduler, config.train.n_steps
    factor = lr_factor(schedule.name, step, warmup_steps=schedule.warmup_steps, n_steps=n_steps)
    for group in optimizer.param_groups:
        group["lr"] = config.optimizer.lr * factor


def update(precision, engine, ema, progress, loss, norm, scale):
    """What follows from a step: if loss and gradient are finite, the optimizer has made it, and
    average and counters go with it; returns 'ok', 'overflow' or 'bad'.

    Under fp16 a gradient that overflows while the loss is finite halves the loss scale, is not
    counted, and moves nothing but the data, as long as the scale stays at 1 or above; below it, and
    for any non-finite loss, the step counts as bad. scale: that of this step's loss.
    """
    progress.batch += 1
    scaler = precision.scaler
    if math.isfinite(loss) and math.isfinite(norm):
        if scaler.is_enabled():
            scaler.update()
        ema.update(engine.network)
        progress.step += 1
        progress.bad_in_a_row = 0
        return "ok"
    if scaler.is_enabled():
        # A broken loss is not the scale's fault, and leaves it as it is.
        scaler.update(None if math.isfinite(loss) else scale)
        if 1 <= scaler.get_scale() < scale:
            return "overflow"
    progress.bad_in_a_row += 1
    return "bad"


def report_bad_step(settings, outcome, progress, loss, norm, precision):
    """Log a step that was not made; UserError once too many came in a row, leaving the last good
    checkpoint as it is.
    """
    if outcome == "overflow":
        log.info(
            "step %d: the gradient overflows float16; loss scale now %g",
            progress.step,
            precision.scaler.get_scale(),
        )
        return
    log.warning(
        "step %d, batch %d skipped: loss %g, gradient norm %g",
        progress.step,
        progress.batch - 1,
        loss,
        norm,
    )
    if progress.bad_in_a_row >= settings.max_bad_steps:
        raise UserError(
            f"{progress.bad_in_a_row} steps in a row had a non-finite loss or gradient, the last "
            f"at step {progress.step} (loss {loss:g}, "
            f"gradient norm {norm:g}); lower optimizer.lr, or use bf16 or no mixed precision, and "
            "go on from the last checkpoint"
        )


class Speed:
    """Images a second since the last reading, without pauses."""

    def __init__(self, batch_size, batch):
        self.batch_size, self.batch, self.began = batch_size, batch, time.monotonic()

    def __call__(self, batch):
        """img/s up to global batch `batch`."""
        now = time.monotonic()
        img_s = (batch - self.batch) * self.batch_size / (now - self.began)
        self.batch, self.began = batch, now
        return img_s

    @contextlib.contextmanager
    def paused(self):
        """A time that does not count."""
        paused = time.monotonic()
        yield
        self.began += time.monotonic() - paused


def note_run(config, directory, dataset):
    """Write config.json and environment.json, and log what differs from the run's start."""
    classes = {name: number for number, name in enumerate(dataset.class_names or ())}
    found = environment() | {"images": len(dataset), "classes": classes}
    changes = utils.write_run_files(directory, config, found)
    for line in changes[:MAX_CHANGES]:
        log.warning("changed since this run began: %s", line)
    if len(changes) > MAX_CHANGES:
        log.warning("and %d more", len(changes) - MAX_CHANGES)


def announce(config, directory, accelerator, all_ranks, precision, engine, dataset, start):
    """The first lines of a run's log."""
    found = environment()
    packages = ", ".join(f"{name} {version}" for name, version in found["packages"].items())
    log.info("run directory %s; commit %s", directory, found["commit"])
    log.info("packages %s", packages)
    log.info(
        "%d process(es), ranks %s, on %s, %d thread(s) each, precision %s, engine %s",
        accelerator.num_processes, all_ranks, ", ".join(found["devices"]),
        found["torch_threads"], precision.name, engine.name,
    )  # fmt: skip
    for line in describe_backends(accelerator.device):
        log.info("operator %s", line)
    parameters = f"{sum(p.numel() for p in engine.network.parameters()):,}"
    log.info("network %s, %s parameters", config.nnet.name, parameters)
    log.info("%s images of shape %s", f"{len(dataset):,}", dataset.shape)
    if names := dataset.class_names:
        shown = ", ".join(f"{i} {name}" for i, name in enumerate(names[:10]))
        log.info("%d classes: %s%s", len(names), shown, ", ..." if len(names) > 10 else "")
    if 0 < dataset.num_classes < engine.network.num_classes:
        log.warning(
            "the data set has %d classes, but nnet.num_classes is %d: the others have no images, "
            "and are drawn for grids and FID all the same",
            dataset.num_classes, engine.network.num_classes,
        )  # fmt: skip
    for line in start:
        log.info("%s", line)


def train(config, directory, *, model, process, codec, dataset, start_weights=list):
    """Train `model` to config.train.n_steps, resuming from the newest good checkpoint.

    Args:
        config: a whole config; see configs/common.py.
        directory: the run directory, made and locked here.
        model, process, codec, dataset: of libs.model.build, sde, libs.data.codec and datasets.
        start_weights: called if there is nothing to resume from; gives the model its first weights
            and returns lines for the log.

    Raises:
        UserError: another run holds the directory, the disk is full, or too many steps in a row
            were not finite.
        SystemExit: with status 143 after a signal, the state being saved.
    """
    if not faulthandler.is_enabled():
        faulthandler.enable()  # a file that is cut short under its memory map is a bus error
    accelerator = make_accelerator()
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    lock = utils.RunLock(directory) if accelerator.is_main_process else contextlib.nullcontext()
    with lock, StopRequest() as stop, contextlib.ExitStack() as at_end:
        get_logger(directory, accelerator.process_index)
        if accelerator.is_main_process:
            utils.remove_leftovers(directory, directory / "samples")
        finished = loop(
            config, directory, accelerator, stop, at_end, model, process, codec, dataset,
            start_weights,
        )  # fmt: skip
    accelerator.end_training()  # else gloo's threads now and then abort the process at its end
    if not finished:
        sys.exit(STOPPED)


def loop(
    config, directory, accelerator, stop, at_end, model, process, codec, dataset, start_weights
):  # fmt: skip
    """The body of `train`, flat; returns whether it came to the end. at_end: what is to be closed,
    however it ends.
    """
    precision = Precision(config.train.mixed_precision, accelerator.device)
    start = start_weights() if not any((directory / "ckpts").glob("*.ckpt")) else []
    network = model.to(accelerator.device).train()
    ema = EMA(network, config.train.ema_rate)
    if config.train.fp8:
        fp8.turn_on(network, precision.dtype, "train.fp8")
    optimizer = make_optimizer(config, network)
    progress, found = Progress(), find_checkpoint(directory / "ckpts", accelerator)
    if found:
        progress = resume(found, network, ema, optimizer, precision)
        start = [f"resuming from {found[0]}"]
    engine = make_engine(config, accelerator, network, ema, optimizer, precision)
    batches = micro_batches(config, dataset, accelerator, progress.batch)
    codec, z_shape = codec.to(accelerator.device), codec.latent_shape(dataset.shape)
    image_sampler = make_image_sampler(
        config, ema.model, process, codec, precision=precision, seed=config.seed
    )

    def state():
        training = training_state(engine, precision, progress)
        return engine.whole(network.state_dict()), engine.whole(ema.state_dict()), training

    outputs = Outputs(config, directory, accelerator, image_sampler, dataset, state)
    metrics_log, all_ranks = None, ranks(accelerator)
    if accelerator.is_main_process:
        note_run(config, directory, dataset)
        metrics_log = MetricsLog(
            directory, tensorboard=config.train.tensorboard, wandb=config.train.wandb
        )
        at_end.callback(metrics_log.close)
        metrics_log.truncate_after(progress.step, progress.batch)
        announce(config, directory, accelerator, all_ranks, precision, engine, dataset, start)

    if found:
        missing = outputs.missing(progress.step)
        outputs.make(missing, progress.step, metrics_log, lambda: stop.requested)

    depth = network.depth if getattr(network, "drop_path", 0) else 0
    settings = config.train
    speed, stops = Speed(settings.batch_size, progress.batch), False
    main, device = accelerator.is_main_process, accelerator.device
    batches = Prefetcher(batches, device)
    bar = tqdm(total=settings.n_steps, initial=progress.step, unit="step", disable=not main)
    while progress.step < settings.n_steps and not stops:
        draws = Draws(
            seed=config.seed, batch=progress.batch, size=settings.batch_size, shape=z_shape,
            depth=depth, device=device, encoding=codec.needs_noise,
        )  # fmt: skip
        engine.zero_grad()
        loss = accumulate_gradients(
            config, accelerator, precision, engine, process, codec, batches, draws
        )
        verdict = Verdict(accelerator, precision, loss, engine.clip(), stop.requested)
        set_learning_rate(config, engine.optimizer, progress.step)
        engine.step(verdict.bad)
        batches.prefetch()
        loss, norm, stops, scale = verdict.read()
        outcome = update(precision, engine, ema, progress, loss, norm, scale)
        step, last = progress.step, progress.step == settings.n_steps
        if main and (outcome != "ok" or step % settings.log_interval == 0 or last):
            lr, img_s = engine.optimizer.param_groups[0]["lr"], speed(progress.batch)
            line = dict(
                batch=progress.batch, loss=loss, grad_norm=norm, lr=lr, img_s=img_s, outcome=outcome
            )
            metrics_log.write(step, line)
            bar.set_postfix(loss=f"{loss:.4f}", img_s=f"{img_s:.0f}")
        if outcome == "ok":
            bar.update()
        else:
            report_bad_step(settings, outcome, progress, loss, norm, precision)
        if stops or (outcome == "ok" and (last or step % settings.save_interval == 0)):
            outputs.save(step)
        if outcome == "ok" and not stops:
            with speed.paused():
                outputs.make(outputs.due(step), step, metrics_log, lambda: stop.requested)
    bar.close()
    if progress.step < settings.n_steps or stop.requested:
        log.info("stopped at step %d as asked; the same command goes on from here", progress.step)
        return False
    log.info(
        "finished %d steps; weights in %s",
        progress.step,
        directory / "ckpts" / f"{progress.step}.ckpt",
    )
    return True
