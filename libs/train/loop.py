"""The training loop.

Every draw is keyed by (seed, global batch, position in it), so a run does not depend on the number
of processes, on the accumulation, or on where it was interrupted.
"""

import contextlib
import functools
import logging
import sys
import time
from pathlib import Path

from tqdm import tqdm

import utils
from libs.evaluate import make_image_sampler
from libs.ops import describe_backends
from libs.runtime import (
    MetricsLog,
    StopRequest,
    environment,
    get_logger,
    make_accelerator,
    ranks,
)
from libs.train.loader import Prefetcher, micro_batches
from libs.train.losses import Objective, make_draws
from libs.train.optimizer import make_schedule
from libs.train.resume import find_checkpoint, make_state, save
from libs.train.snapshots import Snapshots
from libs.train.step import require_few_bad, take_step, update

log = logging.getLogger("dim")

STOPPED = 143  # exit status after SIGTERM or Ctrl-C, which save first: 128 + 15, as shells count


@contextlib.contextmanager
def open_run(directory, accelerator):
    """The run directory, locked, and its log; yields the StopRequest."""
    directory.mkdir(parents=True, exist_ok=True)
    main = accelerator.is_main_process
    with utils.RunLock(directory) if main else contextlib.nullcontext(), StopRequest() as stop:
        get_logger(directory, accelerator.process_index)
        if main:
            utils.remove_leftovers(directory, directory / "samples")
        yield stop


def log_start(directory, accelerator, all_ranks, state, dataset, found):
    """The first lines of a run's log; found: what `environment` says."""
    packages = ", ".join(f"{name} {version}" for name, version in found["packages"].items())
    log.info("run directory %s; commit %s", directory, found["commit"])
    log.info("packages %s", packages)
    log.info(
        "%d process(es), ranks %s, on %s, %d thread(s) each, precision %s, engine %s",
        accelerator.num_processes, all_ranks, ", ".join(found["devices"]),
        found["torch_threads"], state.precision.name, state.engine.name,
    )  # fmt: skip
    for line in describe_backends(accelerator.device):
        log.info("operator %s", line)
    parameters = f"{sum(p.numel() for p in state.network.parameters()):,}"
    log.info("network %s, %s parameters", type(state.network).__name__, parameters)
    log.info("%s images of shape %s", f"{len(dataset):,}", dataset.shape)
    if names := dataset.class_names:
        shown = ", ".join(f"{i} {name}" for i, name in enumerate(names[:10]))
        log.info("%d classes: %s%s", len(names), shown, ", ..." if len(names) > 10 else "")
    if 0 < dataset.num_classes < state.network.num_classes:
        log.warning(
            "the data set has %d classes, but nnet.num_classes is %d: the others have no images, "
            "and are drawn for grids and FID all the same",
            dataset.num_classes, state.network.num_classes,
        )  # fmt: skip


@contextlib.contextmanager
def open_metrics(config, directory, accelerator, state, dataset, lines):
    """The MetricsLog of this start, None on all processes but the main one, which also writes
    config.json and environment.json and logs what the run is, `lines`, and what differs from the
    first start.
    """
    all_ranks = ranks(accelerator)
    if not accelerator.is_main_process:
        yield None
        return
    classes = {name: number for number, name in enumerate(dataset.class_names or ())}
    found = environment() | {"images": len(dataset), "classes": classes}
    changes = utils.write_run_files(directory, config, found)
    log_start(directory, accelerator, all_ranks, state, dataset, found)
    for line in changes:
        log.warning("changed since this run began: %s", line)
    for line in lines:
        log.info("%s", line)
    settings = config.train
    metrics_log = MetricsLog(directory, tensorboard=settings.tensorboard, wandb=settings.wandb)
    with contextlib.closing(metrics_log):
        metrics_log.truncate_after(state.progress.step, state.progress.batch)
        yield metrics_log


class StepLog:
    """A line of metrics.jsonl every settings.log_interval steps, and the progress bar.

    metrics_log: None on all processes but the main one; settings: config.train.
    """

    def __init__(self, metrics_log, settings, step):
        self.metrics_log, self.settings = metrics_log, settings
        quiet = metrics_log is None
        self.bar = tqdm(total=settings.n_steps, initial=step, unit="step", disable=quiet)
        self.restart()

    def restart(self):
        """Leave the time until now out of img_s."""
        self.batches, self.began = 0, time.monotonic()

    def write(self, progress, stats, outcome, lr):
        """After each step, with any outcome."""
        step, settings = progress.step, self.settings
        self.batches += 1
        due = outcome != "ok" or step == settings.n_steps or step % settings.log_interval == 0
        if self.metrics_log and due:
            img_s = self.batches * settings.batch_size / (time.monotonic() - self.began)
            line = {"batch": progress.batch, "loss": stats.loss, "grad_norm": stats.grad_norm}
            self.metrics_log.write(step, {**line, "lr": lr, "img_s": img_s, "outcome": outcome})
            self.bar.set_postfix(loss=f"{stats.loss:.4f}", img_s=f"{img_s:.0f}")
            self.restart()
        if outcome == "ok":
            self.bar.update()


def make_batches(config, accelerator, dataset, codec, network, start_batch):
    """(iterator over this rank's micro-batches from a global batch on, f(batch) -> its Draws)."""
    settings = config.train
    batches = micro_batches(
        dataset, accelerator, batch_size=settings.batch_size, num_workers=settings.num_workers,
        accumulation=config.gradient_accumulation_steps, seed=config.seed, start_batch=start_batch,
    )  # fmt: skip
    draw = functools.partial(
        make_draws, config.seed, size=settings.batch_size, encoding=codec.needs_noise,
        shape=codec.latent_shape(dataset.shape), device=accelerator.device,
        depth=network.depth if getattr(network, "drop_path", 0) else 0,
    )  # fmt: skip
    return Prefetcher(batches, accelerator.device), draw


def make_objective(config, process, codec, null_label):
    """The Objective of a config."""
    p_uncond = config.dataset.p_uncond if config.dataset.cfg else 0.0
    return Objective(
        process, codec, pred=config.pred, weights=config.loss, null_label=null_label,
        p_uncond=None if config.train.mode == "uncond" else p_uncond,
    )  # fmt: skip


def train(config, directory, *, model, process, codec, dataset, start_weights=list):
    """Train `model` to config.train.n_steps, from the newest good checkpoint in `directory` on.

    model, process, codec, dataset: as libs.parts makes them. start_weights: called where there is
    no checkpoint; gives the model its first weights and returns lines for the log.

    Raises UserError where the directory is in use, the disk is full, no checkpoint is whole, or too
    many steps in a row were not finite; SystemExit with status 143 after a signal, the state saved.
    """
    accelerator, directory, settings = make_accelerator(), Path(directory), config.train
    with open_run(directory, accelerator) as stop, contextlib.ExitStack() as at_end:
        found = find_checkpoint(directory / "ckpts", accelerator)
        lines = [f"resuming from {found}"] if found else start_weights()
        state = make_state(
            model, accelerator, found, settings=settings, optimizer=config.optimizer,
            max_norm=config.max_grad_norm, accumulation=config.gradient_accumulation_steps,
        )  # fmt: skip
        progress, codec = state.progress, codec.to(accelerator.device)
        batches, draw = make_batches(config, accelerator, dataset, codec, model, progress.batch)
        objective = make_objective(config, process, codec, model.num_classes)
        schedule = make_schedule(config.lr_scheduler, settings.n_steps)
        image_sampler = make_image_sampler(
            config, state.ema.model, process, codec, precision=state.precision, seed=config.seed
        )
        metrics_log = at_end.enter_context(
            open_metrics(config, directory, accelerator, state, dataset, lines)
        )
        snapshots = Snapshots(
            config, directory, accelerator, image_sampler, dataset, metrics_log, stop
        )
        if found:
            snapshots.make(snapshots.missing(progress.step), progress.step)

        step_log, stopping = StepLog(metrics_log, settings, progress.step), False
        while progress.step < settings.n_steps and not stopping:
            lr = config.optimizer.lr * schedule(progress.step)
            stats = take_step(
                accelerator, state, objective, batches, draw(progress.batch), lr=lr,
                accumulation=config.gradient_accumulation_steps, stop=stop.requested,
            )  # fmt: skip
            outcome, stopping = update(state, stats), stats.stop
            step_log.write(progress, stats, outcome, lr)
            require_few_bad(progress, stats, settings.max_bad_steps)
            due = snapshots.due(progress.step) if outcome == "ok" else ()
            if stopping or "save" in due:
                save(state, accelerator, directory / "ckpts", config, settings.keep_last)
            if due and not stopping:
                snapshots.make(due, progress.step)
                step_log.restart()
        step_log.bar.close()
        if finished := progress.step == settings.n_steps and not stop.requested:
            log.info("finished %d steps", progress.step)
        else:
            log.info("stopped at step %d as asked; the same command goes on", progress.step)
    accelerator.end_training()  # else gloo's threads now and then abort the process at its end
    if not finished:
        sys.exit(STOPPED)
