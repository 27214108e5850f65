"""What a run needs to go on as if it had never stopped: its counters, the state of optimizer and
loss scaler, and the newest good checkpoint.
"""

import logging
import math
from dataclasses import asdict, dataclass

import torch

from libs.files import load_strict
from libs.train import checkpoint
from utils import UserError, listed

log = logging.getLogger("dim")

MAX_STEPS = 2**53  # the largest that a float64 counts to


@dataclass
class Progress:
    """Counters of a run, all of them in the checkpoint.

    step: optimizer steps made. batch: global batches taken from the data, skipped ones included.
    bad_in_a_row: non-finite steps since the last good one.
    """

    step: int = 0
    batch: int = 0
    bad_in_a_row: int = 0


def training_state(engine, precision, progress):
    """Everything that changes in training besides the weights and their average; all processes must
    ask for it.
    """
    return {
        "optimizer": engine.optimizer_state(),
        "scaler": precision.scaler.state_dict(),
        "progress": asdict(progress),
    }


def check_optimizer_state(state, optimizer):
    """ValueError for a state of another optimizer, which torch takes and stumbles over later."""

    def kind(value):
        return tuple(map(kind, value)) if isinstance(value, (tuple, list)) else (
            float if type(value) is int else type(value)
        )  # fmt: skip

    groups = optimizer.state_dict()["param_groups"]
    for group, own in zip(state["param_groups"], groups, strict=True):
        for key in own.keys() & group.keys() - {"fused"}:
            if kind(group[key]) != kind(own[key]):
                raise ValueError(f"its {key} is {group[key]!r}")
        if not all(0 <= beta < 1 for beta in group["betas"]):
            raise ValueError(f"its betas are {group['betas']!r}")
        if not all(0 <= group[key] < math.inf for key in ("lr", "eps", "weight_decay")):
            raise ValueError("its lr, eps or weight_decay is negative or not finite")
        if list(group["params"]) != own["params"]:
            raise ValueError("its parameters are others")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, averages in state["state"].items():
        own = {"step": (), **dict.fromkeys(("exp_avg", "exp_avg_sq"), parameters[index].shape)}
        found = {name: x.shape for name, x in averages.items() if x.is_floating_point()}
        if found != own or found.keys() != averages.keys():
            raise ValueError(f"its averages of parameter {index} do not fit")
        if not 0 <= averages["step"].item() <= MAX_STEPS:
            raise ValueError(f"its step of parameter {index} is {averages['step'].item()}")


# What the config says of an optimizer, at every start; the learning rate follows in every step.
_SETTINGS = ("betas", "eps", "weight_decay")


def resume(found, network, ema, optimizer, precision):
    """Load the checkpoint at `found` (path, step) everywhere. Returns its Progress."""
    saved = checkpoint.load(found[0])
    load_strict(network, saved.nnet, found[0])
    load_strict(ema.model, saved.ema, found[0])
    state = saved.training_state
    try:
        check_optimizer_state(state["optimizer"], optimizer)
        wanted = [{key: group[key] for key in _SETTINGS} for group in optimizer.param_groups]
        optimizer.load_state_dict(state["optimizer"])
        for group, settings in zip(optimizer.param_groups, wanted, strict=True):
            group.update(settings)
        if precision.scaler.is_enabled() and state["scaler"]:
            precision.scaler.load_state_dict(state["scaler"])
        if not all(type(count) is int and count >= 0 for count in state["progress"].values()):
            raise ValueError(f"its progress is {state['progress']}")
        return Progress(**state["progress"])
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{found[0] / 'training.pt'} is not the state of a run like this one ({error!r}); go "
            "on with the version and config that saved it, or move the checkpoint away"
        ) from error


def require_own(directory):
    """UserError where published weights, as they are put for an evaluation, lie among a run's
    checkpoints: a save of the same step would replace them.
    """
    for path in sorted(directory.glob("*.ckpt")):
        if not (path / "manifest.json").is_file() and any(path.glob("*.pth")):
            raise UserError(
                f"{path} holds weights that this run has not saved: train in another directory, "
                "--workdir=..., or move them away"
            )


def find_checkpoint(directory, accelerator):
    """(path, step) of the newest good checkpoint or None, found by the main process for all.

    Raises:
        UserError: there are checkpoints, and none is good, or somebody else's; nothing is
            overwritten.
    """
    found = [None]
    if accelerator.is_main_process:
        require_own(directory)
        found = [checkpoint.latest(directory, report=log.warning)]
        checkpoint.clean(directory)
        if found[0] and not found[0][0].is_dir():  # it has got its name back
            found = [checkpoint.latest(directory, report=log.warning)]
        damaged = sorted(path.name for path in directory.glob("*.ckpt")) if not found[0] else []
        if damaged:
            raise UserError(
                f"no checkpoint in {directory} is whole ({listed(damaged)}); move them away to "
                "start from scratch"
            )
    if accelerator.num_processes > 1:
        torch.distributed.broadcast_object_list(found)
    return found[0]
