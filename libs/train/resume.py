"""What a run needs to go on as if it had never stopped."""

import logging
from collections import namedtuple
from dataclasses import dataclass

from accelerate.utils import broadcast_object_list

from libs.files import load_strict, read_safetensors, read_torch
from libs.ops import turn_on_fp8
from libs.runtime import Precision, wait_without_timeout
from libs.train import checkpoint
from libs.train.ema import make_averages
from libs.train.engine import ZeroEngine, make_engine
from utils import UserError, listed

log = logging.getLogger("dim")


@dataclass
class Progress:
    """Counters of a run."""

    step: int = 0  # optimizer steps made
    batch: int = 0  # global batches taken from the data, skipped ones included
    bad_in_a_row: int = 0  # non-finite steps since the last good one


# Everything that changes in training; all of it is in a checkpoint. averages: as of make_averages;
# the engine has the optimizer, the Precision the loss scaler.
TrainState = namedtuple("TrainState", "network averages engine precision progress")


def make_state(model, accelerator, found, settings, optimizer, max_norm, accumulation):
    """The TrainState around `model`, from the checkpoint `found`, or new where that is None.
    settings, optimizer: config.train and config.optimizer, which overrules what was saved.
    """
    precision = Precision(settings.mixed_precision, accelerator.device)
    network = model.to(accelerator.device).train()
    averages = make_averages(network, settings)
    if settings.fp8:
        turn_on_fp8(network, precision.dtype, "train.fp8")
    if found:
        saved = read_torch(found / "training.pt")
        load_strict(network, read_safetensors(found / "nnet.safetensors"), found)
        for name, average in averages.items():
            own, usual = found / f"{name}.safetensors", found / "nnet_ema.safetensors"
            load_strict(average.model, read_safetensors(own if own.is_file() else usual), found)
    engine = make_engine(
        accelerator, network, averages, optimizer, precision, max_norm=max_norm,
        accumulation=accumulation, graphed=settings.cuda_graphs,
    )  # fmt: skip
    progress = Progress()
    if found:
        _load_optimizer(engine, optimizer, saved["optimizer"], found)
        if precision.scaler.is_enabled() and saved["scaler"]:
            precision.scaler.load_state_dict(saved["scaler"])
        progress = Progress(**saved["progress"])
    return TrainState(network, averages, engine, precision, progress)


def _load_optimizer(engine, settings, state, path):
    """Its state, and nothing of its settings, which are the config's."""
    if (saved := (path / "zero2").is_dir()) != isinstance(engine, ZeroEngine):
        raise UserError(
            f"{path} was saved {'with' if saved else 'without'} ZeRO-2, whose optimizer state no "
            "other engine reads or writes: go on with the engine that saved it"
        )
    groups = engine.optimizer.param_groups
    wanted = [{key: group[key] for key in settings if key in group} for group in groups]
    engine.load_optimizer(state, path)
    for group, own in zip(engine.optimizer.param_groups, wanted, strict=True):
        group.update(own)


def find_checkpoint(directory, accelerator):
    """The newest good checkpoint or None, found by the main process for all. UserError where there
    are checkpoints, and none is good, or published weights by their names: nothing is overwritten.
    """
    found = [None]
    if accelerator.is_main_process:
        if published := sorted(str(path) for path in directory.glob("*.ckpt/*.pth")):
            raise UserError(
                f"{published[0]} is not of this run, whose checkpoints would replace it: train in "
                "another directory, --workdir=..., or move it away"
            )
        checkpoint.clean(directory)
        found = [checkpoint.find_latest(directory)]
        damaged = sorted(path.name for path in directory.glob("*.ckpt"))
        if damaged and not found[0]:
            raise UserError(
                f"no checkpoint in {directory} is whole ({listed(damaged)}); move them away to "
                "start from scratch, or train in another directory, --workdir=..."
            )
    wait_without_timeout(accelerator)
    return broadcast_object_list(found)[0]
