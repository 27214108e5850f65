"""How a run is laid over processes, devices and number formats."""

import contextlib
import datetime
import importlib.util
import os

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

import utils
from libs.runtime import watch
from utils import UserError

PRECISIONS = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}

# How `accelerate launch` passes on what its configuration file or its words ask for.
REQUESTS = {"ACCELERATE_USE_DEEPSPEED": "zero2", "ACCELERATE_USE_FSDP": "fsdp2"}
# What accelerate then reports.
_KINDS = {"zero2": "DEEPSPEED", "fsdp2": "FSDP"}
CONFIGURATIONS = "configs/accelerate/{}.yaml"
# Further settings of the launcher: what they must be, the value if they are not set, and the
# reason. Whatever would be ignored is refused.
_NEEDED = {
    "zero2": {
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": ("none", "none", "a file of DeepSpeed's is not read"),
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": ("2", "2", "stage 2 is the one there is"),
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": ("none", "none", "nothing is offloaded"),
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": ("none", "none", "nothing is offloaded"),
        "ACCELERATE_GRADIENT_CLIPPING": ("none", "none", "clipping is --config.max_grad_norm"),
    },
    "fsdp2": {
        "FSDP_VERSION": ("2", "1", "fsdp_version 2 is the one there is"),
        "FSDP_OFFLOAD_PARAMS": ("false", "false", "nothing is offloaded"),
        "FSDP_ACTIVATION_CHECKPOINTING": (
            "false", "false", "recomputing is --config.nnet.activation_checkpointing"
        ),
    },
}  # fmt: skip


def requested_engine():
    """'zero2', 'fsdp2' or None, as `accelerate launch` was asked; nothing else chooses one.

    Raises:
        UserError: two engines, or a setting that would have no effect.
    """
    engines = [
        engine
        for name, engine in REQUESTS.items()
        if os.environ.get(name, "false").lower() in ("true", "1")
    ]
    if len(engines) > 1:
        raise UserError("DeepSpeed and FSDP are both asked for: give accelerate launch one of them")
    engine = engines[0] if engines else None
    for name, (needed, default, reason) in _NEEDED.get(engine, {}).items():
        found = os.environ.get(name, default).lower()
        if found != needed:
            raise UserError(
                f"accelerate launch says {name}={found}, but {reason}: use "
                f"{CONFIGURATIONS.format(engine)} as it is, with {needed}"
            )
    return engine


@contextlib.contextmanager
def _hidden_from_accelerate(on_cpu):
    """Hide the requests that libs.train.engine serves where accelerate does not: on the CPU it
    drops
    DeepSpeed and FSDP without a word.
    """
    names = REQUESTS if on_cpu else ()
    requests = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(requests)


def _require_installed(requested, on_cpu):
    """UserError unless what an engine needs is there."""
    needed = ("deepspeed",) if on_cpu else ("deepspeed", "transformers")  # accelerate's plugin does
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if requested == "zero2" and missing:
        raise UserError(
            f"ZeRO-2 is asked for, but {' and '.join(missing)} is not installed: pip install "
            f"{' '.join(missing)}, or use {CONFIGURATIONS.format('ddp')} or "
            f"{CONFIGURATIONS.format('fsdp2')}"
        )


def make_accelerator():
    """The Accelerator of this process: gloo on the CPU where no GPU is visible.

    Precision is ours (see Precision), so that fp16 also runs on the CPU and an overflow is told
    from a broken step.

    Raises:
        UserError: accelerate sees another number of processes than the launcher started, or does
            not run the engine that the launcher was asked for; the launcher has a setting without
            effect; a package that the engine needs is missing; DIM_TIMEOUT_S is no number.
    """
    utils.check_launcher()
    utils.set_cpu_if_no_gpu()
    requested, timeout = requested_engine(), watch.timeout_s()
    on_cpu = not torch.cuda.is_available()
    _require_installed(requested, on_cpu)
    with _hidden_from_accelerate(on_cpu):
        accelerator = Accelerator(
            mixed_precision="no",
            kwargs_handlers=[
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
                # libs.runtime.watch, which can name a rank, speaks first.
                InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=timeout + 60)),
            ],
        )
    utils.check_world_size(accelerator.num_processes)
    if not on_cpu:
        require_reported(requested, accelerator)
    if accelerator.num_processes > 1:
        _make_patient_group()
        watch.start(timeout)
    return accelerator


_patient_group = None  # of all processes, on gloo, with a time-out that no work reaches


def _make_patient_group():
    global _patient_group
    patience = datetime.timedelta(days=30)
    _patient_group = torch.distributed.new_group(backend="gloo", timeout=patience)


def wait_without_timeout(accelerator):
    """Wait for all processes, for as long as it takes: for work that rank 0 does alone, such as
    saving, which must not trip the time-out of the process group.
    """
    if accelerator.num_processes > 1:
        torch.distributed.barrier(group=_patient_group)


def require_reported(requested, accelerator):
    """UserError unless accelerate reports DeepSpeed or FSDP as active where it is requested, and
    only there.
    """
    kind = str(accelerator.distributed_type).rpartition(".")[2]
    if (kind if kind in _KINDS.values() else None) != _KINDS.get(requested):
        name = requested or "ddp"
        raise UserError(
            f"accelerate launch was asked for {name}, but accelerate runs {kind}: start with "
            f"--config_file {CONFIGURATIONS.format(name)} and --num_processes 2 or more"
        )


def ranks(accelerator):
    """The ranks of all processes, as each says its own: [0, 1, ..] unless a launch went wrong."""
    own = torch.tensor([accelerator.process_index], device=accelerator.device)
    return sorted(accelerator.gather(own).tolist())


class Precision:
    """Autocast and loss scaling of one number format.

    name: 'no' (float32), 'fp16' or 'bf16', else UserError; None takes what `accelerate launch
        --mixed_precision` says. dtype: autocast's, None for float32; scaler: enabled for fp16 only.
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
