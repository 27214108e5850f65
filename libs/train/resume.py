"""What a run needs to go on as if it had never stopped."""

import logging
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch

from libs.files import load_strict
from libs.ops import turn_on_fp8
from libs.runtime import Precision, wait_without_timeout
from libs.train import checkpoint
from libs.train.ema import EMA
from libs.train.engine import Engine, make_engine
from utils import UserError, listed

log = logging.getLogger("dim")


@dataclass
class Progress:
    """Counters of a run.

    step: optimizer steps made. batch: global batches taken from the data, skipped ones included.
    bad_in_a_row: non-finite steps since the last good one.
    """

    step: int = 0
    batch: int = 0
    bad_in_a_row: int = 0


class TrainState(NamedTuple):
    """Everything that changes in training; all of it is in a checkpoint."""

    network: torch.nn.Module
    ema: EMA
    engine: Engine  # with the optimizer
    precision: Precision  # with the loss scaler
    progress: Progress


def save(state, accelerator, directory, config, keep_last):
    """Write <directory>/<step>.ckpt; all processes must call it, and the main one writes.

    config: for its config.json; keep_last: as of checkpoint.save.
    """
    step, engine = state.progress.step, state.engine
    training_state = {
        "optimizer": engine.save_optimizer(checkpoint.saving_folder(directory, step)),
        "scaler": state.precision.scaler.state_dict(),
        "progress": asdict(state.progress),
    }
    nnet, ema = engine.gather(state.network), engine.gather(state.ema.model)
    accelerator.wait_for_everyone()  # each has written its part of ZeRO-2's state
    if accelerator.is_main_process:
        path = checkpoint.save(
            directory, step, nnet=nnet, ema=ema, training_state=training_state,
            config=config.to_dict(), keep_last=keep_last,
        )  # fmt: skip
        log.info("saved %s", path)
    wait_without_timeout(accelerator)


def make_state(model, accelerator, found, *, settings, optimizer, max_norm, accumulation):
    """The TrainState around `model`, from the checkpoint `found`, or new where that is None.

    settings, optimizer: config.train and config.optimizer, which overrules what was saved.
    UserError for a checkpoint that does not fit, or was saved by ZeRO-2 and goes on without, or the
    other way round.
    """
    precision = Precision(settings.mixed_precision, accelerator.device)
    network = model.to(accelerator.device).train()
    ema = EMA(network, settings.ema_rate)
    if settings.fp8:
        turn_on_fp8(network, precision.dtype, "train.fp8")
    if found:
        saved = checkpoint.load(found)
        load_strict(network, saved.nnet, found)
        load_strict(ema.model, saved.ema, found)
    engine = make_engine(
        accelerator, network, ema.model, optimizer, precision, max_norm=max_norm,
        accumulation=accumulation, graphed=settings.cuda_graphs,
    )  # fmt: skip
    progress = Progress()
    if found:
        _load_optimizer(engine, optimizer, saved.training_state["optimizer"], found)
        if precision.scaler.is_enabled() and saved.training_state["scaler"]:
            precision.scaler.load_state_dict(saved.training_state["scaler"])
        progress = Progress(**saved.training_state["progress"])
    return TrainState(network, ema, engine, precision, progress)


def _load_optimizer(engine, settings, state, path):
    """Its state, and nothing of its settings, which are the config's."""
    if (path / "zero2").is_dir() != engine.zero2:
        raise UserError(
            f"{path} was saved {'without' if engine.zero2 else 'with'} ZeRO-2, whose optimizer "
            "state no other engine reads or writes: go on with the engine that saved it"
        )
    groups = engine.optimizer.param_groups
    wanted = [{key: group[key] for key in settings if key in group} for group in groups]
    engine.load_optimizer(state, path)
    for group, own in zip(engine.optimizer.param_groups, wanted, strict=True):
        group.update(own)


def _find(directory):
    for path in sorted(directory.glob("*.ckpt")):
        # Published weights, as they are put for an evaluation: a save would replace them.
        if not (path / "manifest.json").is_file() and any(path.glob("*.pth")):
            raise UserError(
                f"{path} holds weights that this run has not saved: train in another directory, "
                "--workdir=..., or move them away"
            )
    checkpoint.clean(directory)
    found = checkpoint.find_latest(directory)
    damaged = sorted(path.name for path in directory.glob("*.ckpt"))
    if damaged and not found:
        raise UserError(
            f"no checkpoint in {directory} is whole ({listed(damaged)}); move them away to start "
            "from scratch"
        )
    return found


def find_checkpoint(directory, accelerator):
    """The newest good checkpoint or None, found by the main process for all.

    Raises:
        UserError: there are checkpoints, and none is good, or somebody else's; nothing is
            overwritten.
    """
    found = [_find(directory) if accelerator.is_main_process else None]
    wait_without_timeout(accelerator)
    if accelerator.num_processes > 1:
        torch.distributed.broadcast_object_list(found)
    return found[0]
