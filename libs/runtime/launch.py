"""How a run is laid over processes, devices and number formats."""

import contextlib
import datetime
import importlib.util
import logging
import os

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

from utils import UserError, look_up

log = logging.getLogger("dim")

PRECISIONS = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}
ENGINES = {"ACCELERATE_USE_DEEPSPEED": "zero2", "ACCELERATE_USE_FSDP": "fsdp2"}
# What else its words or its default_config.yaml may ask for, with the value that asks for nothing.
UNUSED = {
    "ACCELERATE_DYNAMO_BACKEND": "no", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
    "ACCELERATE_GRADIENT_CLIPPING": "none", "ACCELERATE_USE_MEGATRON_LM": "false",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "false", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": "none", "FSDP_ACTIVATION_CHECKPOINTING": "false",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none", "FSDP_OFFLOAD_PARAMS": "false",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
}  # fmt: skip
# Of torchrun, whose single process runs as one without it: accelerate would wrap its network.
RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
TIMEOUT_S = float(os.environ.get("DIM_TIMEOUT_S") or 1800)  # of what the processes do together

_patient_group = None  # of all processes, on gloo, with a time-out that no work reaches


def requested_engine():
    """'zero2', 'fsdp2' or None, as `accelerate launch` was asked; nothing else chooses."""
    names = [name for name in ENGINES if os.environ.get(name, "").lower() in ("true", "1")]
    return ENGINES[names[0]] if names else None


def make_accelerator():
    """The Accelerator of this process: gloo on the CPU where no GPU is visible.

    A warning names what `accelerate launch` was asked for in vain. Precision is ours (see
    Precision), so that fp16 also runs on the CPU and an overflow is told from a broken step.
    UserError for an engine that lacks its package or a second process.
    """
    global _patient_group
    engine, on_cpu = requested_engine(), not torch.cuda.is_available()
    if engine == "zero2" and importlib.util.find_spec("deepspeed") is None:
        raise UserError('ZeRO-2 needs DeepSpeed: pip install -e ".[deepspeed]", or use fsdp2.yaml')
    if on_cpu:  # else every process of `accelerate launch --multi_gpu` would be a run of its own
        os.environ["ACCELERATE_USE_CPU"] = "true"
    unused = [n for n, none in UNUSED.items() if os.environ.get(n, none).lower() != none]
    if unused and os.environ.get("RANK", "0") == "0":
        asked = ", ".join(f"{name}={os.environ[name]}" for name in unused)
        log.warning("accelerate launch asks for %s, which DiM does not use", asked)
    alone = os.environ.get("WORLD_SIZE") == "1"
    timeout = datetime.timedelta(seconds=TIMEOUT_S)
    # Accelerate would obey these. On the CPU, libs.train.engine serves the engines.
    names = (*unused, *(ENGINES if on_cpu or alone else ()), *(RANK if alone else ()))
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    accelerator = Accelerator(
        mixed_precision="no",
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=timeout),
        ],
    )
    os.environ.update(hidden)
    if accelerator.num_processes > 1:
        patience = datetime.timedelta(days=30)
        _patient_group = torch.distributed.new_group(backend="gloo", timeout=patience)
    elif engine:
        raise UserError(f"{engine} needs --num_processes 2 or more")
    return accelerator


def wait_without_timeout(accelerator):
    """Wait for all processes, for as long as it takes: rank 0 saves or measures alone."""
    if accelerator.num_processes > 1:
        torch.distributed.barrier(group=_patient_group)


class Precision:
    """Autocast and loss scaling of a number format.

    name: 'no' (float32), 'fp16' or 'bf16', else UserError; None takes what `accelerate launch
        --mixed_precision` says. dtype: autocast's, None for float32; scaler: enabled for fp16 only.
    """

    def __init__(self, name, device):
        self.name = name or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        self.device, self.dtype = device, look_up(PRECISIONS, self.name, "mixed precision")
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.name == "fp16")

    def autocast(self):
        """The context of a forward pass."""
        on = self.dtype is not None
        return torch.autocast(self.device.type, self.dtype) if on else contextlib.nullcontext()
