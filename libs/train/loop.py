"""The training loop.

Every draw is keyed by (seed, global batch, position in it), so a run does not depend on the number
of processes, on the accumulation, or on where it was interrupted.
"""

import contextlib
import functools
import logging
import sys
from pathlib import Path

from accelerate.utils import gather_object
from tqdm import tqdm

import utils
from libs.evaluate import make_features, report_run
from libs.model import load_into
from libs.ops import describe_backends
from libs.runtime import MetricsLog, StopRequest, environment, get_logger, make_accelerator
from libs.train.loader import make_batches
from libs.train.losses import Objective, make_draws
from libs.train.optimizer import SCHEDULES
from libs.train.resume import find_checkpoint, make_state
from libs.train.saver import Saver
from libs.train.snapshots import Snapshots
from libs.train.step import finish_step, report_bad_step, take_step
from utils import look_up

log = logging.getLogger("dim")

STOPPED = 143  # exit status after SIGTERM or Ctrl-C, which save first: 128 + 15, as shells count


@contextlib.contextmanager
def open_run(directory, accelerator):
    """The run directory, locked, and its log; yields the StopRequest."""
    utils.make_directory(directory)
    main = accelerator.is_main_process
    with utils.locked(directory) if main else contextlib.nullcontext(), StopRequest() as stop:
        get_logger(directory, accelerator.process_index)
        if main:
            utils.remove_leftovers(directory, directory / "samples")
        yield stop


def check_classes(path, classes):
    """UserError where the classes {name: number} are not those of the environment.json `path`."""
    before = utils.read_json(path).get("classes")
    if before and classes and before != classes:
        new, gone = utils.listed(classes.keys() - before), utils.listed(before.keys() - classes)
        raise utils.UserError(
            f"the run began with other classes (new: {new or 'none'}; gone: {gone or 'none'}): "
            "restore the data, or go on in another --workdir with nnet.pretrained_path"
        )


@contextlib.contextmanager
def open_metrics(config, directory, accelerator, state, dataset, lines):
    """The MetricsLog of this start, None on all processes but the main one; the log says what the
    run is, `lines`, and what differs from its first start.
    """
    all_ranks = gather_object([accelerator.process_index])  # each says its own
    if not accelerator.is_main_process:
        yield None
        return
    parameters = sum(p.numel() for p in state.network.parameters())
    names = dataset.class_names or ()
    classes = {name: number for number, name in enumerate(names)}
    found = environment() | {"images": len(dataset), "classes": classes}
    found["images_sha256"] = dataset.list_sha256(*dataset.sizes)
    if state.progress.batch and (path := directory / "environment.json").exists():
        check_classes(path, classes)
    packages = ", ".join(map(" ".join, found["packages"].items()))
    log.info("run directory %s; commit %s; packages %s", directory, found["commit"], packages)
    log.info(
        "%d process(es), ranks %s, on %s, %d thread(s) each, precision %s, engine %s",
        accelerator.num_processes, all_ranks, ", ".join(found["devices"]),
        found["torch_threads"], state.precision.name, state.engine.name,
    )  # fmt: skip
    log.info("network %s, %s parameters", type(state.network).__name__, f"{parameters:,}")
    log.info("%s images of shape %s", f"{len(dataset):,}", dataset.shape)
    if dataset.left_out:
        log.info("left out: %s", dataset.left_out)
    log.info("%d classes%s", dataset.num_classes, ": " * bool(names) + utils.listed(names))
    for line in (*(f"operator {line}" for line in describe_backends(accelerator.device)), *lines):
        log.info("%s", line)
    for line in utils.write_run_files(directory, config, found):
        log.warning("changed since this run began: %s", line)
    tensorboard, wandb = config.train.tensorboard, config.train.wandb
    with contextlib.closing(MetricsLog(directory, tensorboard, wandb)) as metrics_log:
        metrics_log.truncate_after(state.progress.step, state.progress.batch)
        yield metrics_log


class StepLog:
    """A line of metrics.jsonl every settings.log_interval steps, and the progress bar.

    metrics_log: None on all processes but the main one; settings: config.train.
    """

    def __init__(self, metrics_log, settings, step):
        self.metrics_log, self.settings, quiet = metrics_log, settings, metrics_log is None
        self.bar = tqdm(total=settings.n_steps, initial=step, unit="step", disable=quiet)
        self.batches, self.seconds = 0, 0.0

    def write(self, progress, stats, outcome):
        """After each step, with any outcome."""
        step, settings = progress.step, self.settings
        self.batches, self.seconds = self.batches + 1, self.seconds + stats.seconds
        due = outcome != "ok" or step == settings.n_steps or step % settings.log_interval == 0
        if self.metrics_log and due:
            img_s = self.batches * settings.batch_size / self.seconds
            line = dict(batch=progress.batch, loss=stats.loss, grad_norm=stats.grad_norm)
            line |= dict(lr=stats.lr, img_s=img_s, outcome=outcome)
            self.metrics_log.write(step, line)
            self.bar.set_postfix(loss=f"{stats.loss:.4f}", img_s=f"{img_s:.0f}", refresh=False)
            self.batches, self.seconds = 0, 0.0
        self.bar.update(outcome == "ok")


def make_objective(config, process, codec, network, dataset, device):
    """(Objective of a config, f(batch) -> its Draws)."""
    p_uncond = config.dataset.p_uncond if config.dataset.cfg else 0.0
    tokens, repa = None, config.loss.get("repa")
    if repa and not dataset.feature_shape:
        tokens = make_features(repa.features, repa.get("path"), device).tokens
    objective = Objective(
        process, codec, pred=config.pred, weights=config.loss, null_label=network.num_classes,
        p_uncond=None if config.train.mode == "uncond" else p_uncond, tokens=tokens,
    )  # fmt: skip
    routing = (0,)
    if getattr(network, "routing", None):
        groups = (side // 2 for side in network.native_grid)
        routing = (config.train.routed_share * config.train.n_steps, *groups)
    draw = functools.partial(
        make_draws, config.seed, size=config.train.batch_size, encoding=codec.needs_noise,
        shape=codec.latent_shape(dataset.shape), device=device,
        depth=network.depth if getattr(network, "drop_path", 0) else 0, routing=routing,
    )  # fmt: skip
    return objective, draw


def train(config, directory, *, model, process, codec, dataset):
    """Train `model` to config.train.n_steps, from the newest good checkpoint in `directory` on,
    else from the weights nnet.pretrained_path, or from scratch.

    model, process, codec, dataset: as libs.parts makes them. UserError for a directory in use, a
    full disk, no whole checkpoint, too many non-finite steps in a row; SystemExit with status 143
    after a signal, the state being saved.
    """
    accelerator, directory, settings = make_accelerator(), Path(directory), config.train
    accumulation, device = config.gradient_accumulation_steps, accelerator.device
    with open_run(directory, accelerator) as stop:
        found = find_checkpoint(directory / "ckpts", accelerator)
        start = config.nnet.pretrained_path
        lines = [f"resuming from {found}" if found else f"starting from {start or 'scratch'}"]
        if start and not found:
            lines += load_into(model, start, new=True)
        optimizer, max_norm = config.optimizer, config.max_grad_norm
        state = make_state(model, accelerator, found, settings, optimizer, max_norm, accumulation)
        progress, codec = state.progress, codec.to(device)
        batches = make_batches(
            dataset, accelerator, settings, accumulation, config.seed, progress.batch,
            lambda: stop.requested,
        )  # fmt: skip
        objective, draw = make_objective(config, process, codec, model, dataset, device)
        schedule = look_up(SCHEDULES, config.lr_scheduler.name, "lr_scheduler.name")
        opened = open_metrics(config, directory, accelerator, state, dataset, lines)
        with opened as metrics_log, Saver(state, accelerator, directory / "ckpts", config) as saver:
            snapshots = Snapshots(
                config, directory, accelerator, state, process, codec, metrics_log, stop
            )
            if progress.step:  # at 0 nothing is due: the network is untrained
                snapshots.make(snapshots.missing(progress.step), progress.step)
            step_log, stopping = StepLog(metrics_log, settings, progress.step), False
            while progress.step < settings.n_steps and not stopping:
                factor = schedule(progress.step, config.lr_scheduler.warmup_steps, settings.n_steps)
                lr, draws = optimizer.lr * factor, draw(progress.batch)
                stats = take_step(
                    accelerator, state, objective, batches, draws, accumulation, lr, stop
                )
                outcome, stopping = finish_step(state, stats), stats.stop
                if outcome:
                    step_log.write(progress, stats, outcome)
                if outcome in ("overflow", "bad"):
                    report_bad_step(outcome, progress, stats, settings.max_bad_steps)
                due = snapshots.due(progress.step) if outcome == "ok" else ()
                snapshots.write_figures(wait=stopping or "save" in due)  # a save keeps the best
                saver.check()
                if stopping or "save" in due:
                    saver.save()
                if due and not stopping:
                    snapshots.make(due, progress.step)
            saver.finish()
            snapshots.write_figures(wait=True)
            step_log.bar.close()
        finished = progress.step >= settings.n_steps and not stop.requested
        said = "finished %d steps" if finished else "stopped at step %d; the same command goes on"
        log.info(said, progress.step)
        if accelerator.is_main_process:
            report_run(directory)
    accelerator.end_training()  # else gloo's threads now and then abort the process at its end
    if not finished:
        sys.exit(STOPPED)
