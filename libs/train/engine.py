"""How gradients become one optimizer step: in one process or by DistributedDataParallel; by FSDP2
or DeepSpeed's ZeRO-2 where `accelerate launch` is asked for them (configs/accelerate).
"""

import contextlib
import os
import warnings

import torch
from torch import nn

from libs.runtime import GraphedTraining, requested_engine
from libs.train.optimizer import OPTIMIZERS, MuonAdamW
from utils import UserError, look_up

# DDP's, of a DiM's two depthwise convolutions: strides differ in the axis of size 1 alone.
_HARMLESS = r"(?s)Grad strides do not match .*grad\.sizes\(\) = \[\d+, 1, 3, 3\]"


def _key_by_name(state, optimizer, network):
    """The state_dict of an optimizer by parameters' names; version 0.1.0 saved it by number."""
    own = {id(parameter): name for name, parameter in network.named_parameters()}
    names = dict(enumerate(own[id(p)] for g in optimizer.param_groups for p in g["params"]))
    groups = [g | {"params": [names.get(k, k) for k in g["params"]]} for g in state["param_groups"]]
    entries = {names.get(k, k): entry for k, entry in state["state"].items()}
    return {"state": entries, "param_groups": groups}


def _call_whole(name, *arguments):
    """A function of torch's for state dicts, with whole tensors on the CPU of rank 0."""
    from torch.distributed.checkpoint import state_dict  # takes two seconds

    options = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)
    return getattr(state_dict, name)(*arguments, options=options)


class Engine:
    """One process or DistributedDataParallel. model: what to call; network: the owner of its
    parameters; optimizer: over them; scaler: of the loss; max_norm: of the clipped gradients.
    copied: None, or the torch.cuda.Event before which no step may change the state (Saver).
    """

    def __init__(self, name, model, network, optimizer, scaler, max_norm):
        self.name, self.model, self.network, self.optimizer = name, model, network, optimizer
        self.scaler, self.max_norm, self.copied = scaler, max_norm, None

    def accumulating(self, last):
        """The context of a micro-batch: under DDP gradients meet with the last."""
        no_sync = getattr(self.model, "no_sync", contextlib.nullcontext)
        return contextlib.nullcontext() if last else no_sync()

    def backward(self, loss):
        """Add the gradients of a micro-batch's loss, 0-dim, already divided by their number."""
        self.scaler.scale(loss).backward()

    def clip(self):
        """The norm of all gradients, 0-dim; they are clipped to max_norm."""
        self.scaler.unscale_(self.optimizer)
        if self.max_norm < float("inf"):
            return nn.utils.clip_grad_norm_(self.network.parameters(), self.max_norm)
        # As there, but for the factor 1 on every gradient.
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2.0)))

    def step(self, found_inf):
        """The optimizer's step, or none where found_inf, 0-dim float32, is 1: torch's fused
        optimizers read it on the device, and the host need not have heard of it.
        """
        if self.copied is not None:
            torch.cuda.current_stream().wait_event(self.copied)  # the host goes on
        if self.optimizer.defaults.get("fused"):
            self.optimizer.found_inf = found_inf
            self.optimizer.step()
            del self.optimizer.found_inf
        elif not found_inf.item():
            self.optimizer.step()

    def gather(self, model):
        """The whole state_dict of the network or its average, on the main process; all must ask."""
        return model.state_dict()

    def save_optimizer(self, folder):
        """The optimizer's state_dict by parameters' names, as `gather`; None where it is in files
        in `folder`, a checkpoint that is being written.
        """
        return _key_by_name(self.optimizer.state_dict(), self.optimizer, self.network)

    def load_optimizer(self, state, folder):
        """Take over what `save_optimizer` returned, before the first step."""
        self.optimizer.load_state_dict(state)


class ShardedEngine(Engine):
    """FSDP2 (torch's fully_shard): weights, their average, gradients and optimizer state in parts.
    Gradients meet with every micro-batch, or their sum would be whole on every process.
    """

    def clip(self):
        return super().clip().full_tensor()

    def gather(self, model):
        return _call_whole("get_model_state_dict", model)

    def save_optimizer(self, folder):
        return _call_whole("get_optimizer_state_dict", self.network, self.optimizer)

    def load_optimizer(self, state, folder):
        if state["state"]:  # else it was saved before the first step
            state = _key_by_name(state, self.optimizer, self.network)
            _call_whole("set_optimizer_state_dict", self.network, self.optimizer, state)


class ZeroEngine(Engine):
    """ZeRO stage 2 (Rajbhandari et al., arXiv 1910.02054) by DeepSpeed, whose engine is `model`."""

    def backward(self, loss):
        # DeepSpeed looks at the gradients alone: of a loss that is not finite they become NaN.
        loss = loss * torch.where(loss.isfinite(), 1.0, torch.nan)
        self.model.backward(loss, scale_wrt_gas=False)

    @contextlib.contextmanager
    def accumulating(self, last):
        yield
        if not last:
            self.model.step()  # counts the micro-batch

    def clip(self):
        """Clips and steps at once; DeepSpeed makes no step where a gradient is not finite."""
        self.model.step()
        norm = self.model.get_global_grad_norm() if self.model.was_step_applied() else torch.inf
        return torch.as_tensor(norm, device=self.model.device)

    def step(self, found_inf):
        """Made by `clip`."""

    def save_optimizer(self, folder):
        self.model.save_checkpoint(folder, tag="zero2", save_latest=False)

    def load_optimizer(self, state, folder):
        self.model.load_checkpoint(folder, tag="zero2", load_lr_scheduler_states=False)


def _make_zero(network, optimizer, scaler, max_norm, accumulation):
    if scaler.is_enabled():
        raise UserError("ZeRO-2 runs in bf16 or float32, not in fp16: --mixed_precision bf16")
    if isinstance(optimizer, MuonAdamW):
        raise UserError("muon needs matrices, and ZeRO-2 has none: use DDP, FSDP2 or adamw")
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,  # only its logs read it
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0 if max_norm == float("inf") else max_norm,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 62,
    }
    model, optimizer, *_ = deepspeed.initialize(model=network, optimizer=optimizer, config=config)
    return ZeroEngine("DeepSpeed ZeRO-2", model, network, optimizer, scaler, max_norm)


def _shard(network, averages, device, num_processes):
    """Make the parameters of `network` and its averages DTensors, in place. A block gathers its
    weights while it computes, the network the others.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard  # torch 2.6 and newer
    from torch.distributed.tensor import distribute_tensor

    mesh = init_device_mesh(device.type, (num_processes,))
    reshard = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false"
    for block in network.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(network, mesh=mesh)
    parts = dict(network.named_parameters())
    for average in averages.values():
        own = {
            name: distribute_tensor(p.data, mesh, parts[name].placements)
            for name, p in average.model.named_parameters()
        }
        average.model.load_state_dict(own, strict=False, assign=True)


@contextlib.contextmanager
def whole_weights(model):
    """A context in which the parameters of `model` are whole on all processes, as the average's are
    to sample; all must enter.
    """
    parts = {name: p for name, p in model.named_parameters() if hasattr(p, "full_tensor")}
    whole = {name: part.full_tensor() for name, part in parts.items()}
    model.load_state_dict(whole, strict=False, assign=True)
    try:
        yield
    finally:
        model.load_state_dict(parts, strict=False, assign=True)


def make_engine(
    accelerator, network, averages, settings, precision, *, max_norm, accumulation, graphed
):
    """The Engine that `accelerate launch` asks for, with a new optimizer, around a network and its
    averages, which have their weights. settings: config.optimizer; max_norm: of gradients, or None;
    graphed: by CUDA graphs, in one process or DDP on a GPU. UserError: ZeRO-2 in fp16 or with Muon.
    """
    requested, max_norm = requested_engine(), max_norm or float("inf")
    if requested == "fsdp2":
        _shard(network, averages, accelerator.device, accelerator.num_processes)
    make_optimizer = look_up(OPTIMIZERS, settings.name, "optimizer.name")
    optimizer, scaler = make_optimizer(network, settings), precision.scaler
    if requested == "fsdp2":
        return ShardedEngine("FSDP2", network, network, optimizer, scaler, max_norm)
    if requested == "zero2":
        return _make_zero(network, optimizer, scaler, max_norm, accumulation)
    graphed = graphed and accelerator.device.type == "cuda"
    name = "DDP" if accelerator.num_processes > 1 else "one process"
    name += ", by CUDA graphs" if graphed else ""
    warnings.filterwarnings("ignore", _HARMLESS, UserWarning)
    model = accelerator.prepare_model(GraphedTraining(network) if graphed else network)
    return Engine(name, model, network, optimizer, scaler, max_norm)
