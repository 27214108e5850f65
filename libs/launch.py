"""How a run is laid over processes, devices and number formats."""

import contextlib
import datetime
import os

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

import utils
from libs.engine import REQUEST
from utils import UserError

PRECISIONS = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def make_accelerator():
    """The Accelerator of this process: gloo on the CPU where no GPU is visible.

    Precision is ours (see Precision), so that fp16 also runs on the CPU and an overflow is told
    from a broken step.

    Raises:
        UserError: accelerate sees another number of processes than the launcher started.
    """
    utils.check_launcher()
    utils.set_cpu_if_no_gpu()
    # DeepSpeed, if asked for, is libs.engine's: accelerate would drop it on a CPU without a word.
    requested = os.environ.pop(REQUEST, None)
    accelerator = Accelerator(
        mixed_precision="no",
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            # A rank may save or sample while the others wait.
            InitProcessGroupKwargs(timeout=datetime.timedelta(minutes=30)),
        ],
    )
    if requested is not None:
        os.environ[REQUEST] = requested
    utils.check_world_size(accelerator.num_processes)
    return accelerator


def ranks(accelerator):
    """The ranks of all processes, as each says its own: [0, 1, ..] unless a launch went wrong."""
    own = torch.tensor([accelerator.process_index], device=accelerator.device)
    return sorted(accelerator.gather(own).tolist())


class Precision:
    """Autocast and loss scaling of one number format.

    name: 'no' (float32), 'fp16' or 'bf16'; None takes what `accelerate launch --mixed_precision`
        says.
    """

    def __init__(self, name, device):
        self.name = name or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if self.name not in PRECISIONS:
            raise UserError(
                f"mixed precision is {self.name!r}, expected one of {', '.join(PRECISIONS)}"
            )
        self.device, self.dtype = device, PRECISIONS[self.name]
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.name == "fp16")

    def autocast(self):
        """The context of a forward pass."""
        return (
            torch.autocast(self.device.type, self.dtype) if self.dtype else contextlib.nullcontext()
        )
