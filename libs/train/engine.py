"""How gradients become one optimizer step: in one process or by DistributedDataParallel; by
DeepSpeed's ZeRO-2 or by FSDP2 where `accelerate launch` is asked for them (configs/accelerate).

All hold the same plain values: their checkpoints are each other's, whatever the number of
processes.
"""

import contextlib
import logging
import os
import warnings

import torch

from libs.runtime import GraphedTraining, requested_engine
from libs.train import sharding
from utils import UserError

log = logging.getLogger("dim")

# DDP's, of a DiM's two depthwise convolutions: strides differ in the axis of size 1 alone.
_HARMLESS = r"(?s)Grad strides do not match .*grad\.sizes\(\) = \[\d+, 1, 3, 3\]"


class Engine:
    """DistributedDataParallel over several processes, the bare network in one; graphed: its forward
    and backward replayed from CUDA graphs.

    model: what to call; network: its parameters' owner; optimizer: over them; precision: whose loss
    scaler is used; max_norm: that the gradients are clipped to, inf for none.
    """

    @property
    def name(self):
        name = "DDP" if self.accelerator.num_processes > 1 else "one process"
        return f"{name}, by CUDA graphs" if self.graphed else name

    def __init__(self, accelerator, network, optimizer, precision, max_norm, graphed=False):
        self.accelerator, self.network, self.optimizer = accelerator, network, optimizer
        self.scaler, self.max_norm, self.graphed = precision.scaler, max_norm, graphed
        if graphed:
            network = GraphedTraining(network)
        warnings.filterwarnings("ignore", _HARMLESS, UserWarning)
        self.model = accelerator.prepare_model(network)

    def is_active(self):
        """Whether the engine is what it says it is, asked of what it made."""
        wrapped = isinstance(self.model, torch.nn.parallel.DistributedDataParallel)
        return wrapped == (self.accelerator.num_processes > 1)

    def backward(self, loss):
        """Adds the gradients of a micro-batch's loss, 0-dim, already divided by their number."""
        self.scaler.scale(loss).backward()

    def accumulating(self, last):
        """The context of a micro-batch: under DDP gradients meet over the processes with the
        last; the other engines do it their own way.
        """
        return contextlib.nullcontext() if last else self.accelerator.no_sync(self.model)

    def clip(self):
        """The norm of all gradients, 0-dim; they are clipped to max_norm."""
        self.scaler.unscale_(self.optimizer)
        return torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.max_norm)

    def step(self, bad):
        """AdamW's step, or none where bad, 0-dim float32 on the device, is 1: the device decides,
        so the host need not have heard of it yet.
        """
        self.optimizer.found_inf = bad  # read by torch's fused AdamW
        self.optimizer.step()
        del self.optimizer.found_inf

    def zero_grad(self):
        self.optimizer.zero_grad(set_to_none=True)

    def optimizer_state(self):
        """The optimizer's state_dict over the single parameters; all processes must ask, and the
        main process has it whole (see `whole`).
        """
        return self.whole(self.optimizer.state_dict())

    def whole(self, state):
        """`state`, of the network, its average or the optimizer, as one process would have it; all
        must ask, and the main process is the one that can rely on the answer.
        """
        return state


class ZeroEngine(Engine):
    """ZeRO stage 2 (Rajbhandari et al., arXiv 1910.02054): every process steps its part of one flat
    float32 buffer, and the parts are gathered.

    Weights stay float32 under autocast, as elsewhere. DeepSpeed skips a step whose gradients are
    not finite, which agrees with our rule for such steps.
    """

    name = "DeepSpeed ZeRO-2"

    def __init__(self, accelerator, network, optimizer, max_norm, micro_batches):
        import deepspeed

        self.accelerator, self.network = accelerator, network
        self.micro_batches, self.seen = micro_batches, 0
        state = optimizer.state_dict()
        optimizer.state.clear()
        self.model, self.optimizer, _, _ = deepspeed.initialize(
            model=network,
            optimizer=optimizer,
            config={
                "train_micro_batch_size_per_gpu": 1,  # only its logs read it
                "gradient_accumulation_steps": micro_batches,
                "gradient_clipping": 0.0 if max_norm == float("inf") else max_norm,
                "zero_optimization": {"stage": 2},
                "zero_allow_untested_optimizer": True,
                "steps_per_print": 1 << 62,
            },
        )
        self._install(state)

    def is_active(self):
        return self.model.zero_optimization_stage() == 2

    @property
    def _flat(self):
        """This process's part of the flat parameters, which is what the inner AdamW steps."""
        (flat,) = self.optimizer.single_partition_of_fp32_groups
        return flat

    def _parameters(self):
        """The parameters in the order of the flat buffer."""
        (group,) = self.optimizer.round_robin_bit16_groups
        return list(group)

    def backward(self, loss):
        # DeepSpeed looks at the gradients alone: of a loss that is not finite they become NaN.
        loss = loss * torch.where(loss.isfinite(), 1.0, torch.nan)
        self.model.backward(loss, scale_wrt_gas=False)
        self.seen += 1
        if self.seen % self.micro_batches:
            self.model.step()  # counts the micro-batch

    def accumulating(self, last):
        return contextlib.nullcontext()

    def clip(self):
        norm = torch.as_tensor(self.optimizer.scaled_global_norm(), device=self._flat.device)
        return torch.where(norm < 0, torch.inf, norm)  # -1: not finite

    def step(self, bad):
        self.model.step()  # where `bad` is 1, DeepSpeed finds it, too, and drops the gradients

    def zero_grad(self):
        pass

    def _install(self, state):
        """Put an AdamW's state_dict over the single parameters into the flat parts."""
        if not state["state"]:
            return
        numbers = {id(p): i for i, p in enumerate(self.network.parameters())}
        entries = [state["state"][numbers[id(p)]] for p in self._parameters()]
        size, rank = self._flat.numel(), self.accelerator.process_index
        flat = {"step": entries[0]["step"].to(self._flat.device)}
        for key in ("exp_avg", "exp_avg_sq"):
            whole = torch.cat([entry[key].flatten() for entry in entries]).to(self._flat)
            padded = torch.cat([whole, whole.new_zeros(size * self._count() - whole.numel())])
            flat[key] = padded[rank * size : (rank + 1) * size].clone()
        self.optimizer.optimizer.state[self._flat] = flat

    def _count(self):
        return self.accelerator.num_processes

    def optimizer_state(self):
        inner, flat = self.optimizer.optimizer, self._flat
        groups = [
            {key: value for key, value in group.items() if key != "params"}
            | {"params": list(range(len(self._parameters())))}
            for group in inner.param_groups
        ]
        if flat not in inner.state:
            return {"state": {}, "param_groups": groups}
        part = inner.state[flat]
        sizes = [p.numel() for p in self._parameters()]
        whole = {}
        for key in ("exp_avg", "exp_avg_sq"):
            parts = [torch.empty_like(flat) for _ in range(self._count())]
            torch.distributed.all_gather(parts, part[key].contiguous())
            whole[key] = torch.cat(parts)[: sum(sizes)].split(sizes)
        numbers = {id(p): i for i, p in enumerate(self.network.parameters())}
        state = {
            numbers[id(p)]: {
                "step": torch.as_tensor(part["step"]).clone(),
                **{key: whole[key][k].view(p.shape) for key in whole},
            }
            for k, p in enumerate(self._parameters())
        }
        return {"state": dict(sorted(state.items())), "param_groups": groups}


class ShardedEngine(Engine):
    """FSDP2 (torch's fully_shard): weights, their average, gradients and optimizer state in parts.

    Weights stay float32 under autocast, as elsewhere: they are gathered and gradients are averaged
    in float32. Gradients meet with every micro-batch, which keeps them in parts; without, the sum
    of an accumulation would be whole on every process.
    """

    name = "FSDP2"

    def __init__(self, accelerator, network, ema, optimizer, precision, max_norm):
        self.accelerator, self.network, self.optimizer = accelerator, network, optimizer
        self.scaler, self.max_norm = precision.scaler, max_norm
        mesh = sharding.make_mesh(accelerator.device, accelerator.num_processes)
        keep = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "false"
        sharding.shard(network, network.blocks, mesh, reshard_after_forward=not keep)
        sharding.shard_average(ema.model, network)
        sharding.shard_optimizer(optimizer, network.parameters())
        self.model = network

    def is_active(self):
        return sharding.is_sharded(self.network)

    def accumulating(self, last):
        return contextlib.nullcontext()

    def clip(self):
        return super().clip().full_tensor()

    def whole(self, state):
        return sharding.whole(state, keep=self.accelerator.is_main_process)


def make_engine(config, accelerator, network, ema, optimizer, precision):
    """The Engine that `accelerate launch` asks for (libs.runtime.launch.requested_engine), around a
    network, its average and its optimizer, all with what was resumed.

    Raises:
        UserError: an engine that cannot run so, or that turns out not to be active.
    """
    max_norm = config.max_grad_norm or float("inf")
    requested = requested_engine()
    require_possible(requested, accelerator, precision, config.train.cuda_graphs)
    if requested == "zero2":
        accumulation = config.gradient_accumulation_steps
        engine = ZeroEngine(accelerator, network, optimizer, max_norm, accumulation)
    elif requested == "fsdp2":
        engine = ShardedEngine(accelerator, network, ema, optimizer, precision, max_norm)
    else:
        graphed = config.train.cuda_graphs and accelerator.device.type == "cuda"
        if config.train.cuda_graphs and not graphed:
            log.info("train.cuda_graphs changes nothing without a GPU")
        engine = Engine(accelerator, network, optimizer, precision, max_norm, graphed)
    if not engine.is_active():
        raise UserError(
            f"{engine.name} is asked for, but is not what runs: check the versions of torch, "
            "accelerate and deepspeed, or use another file of configs/accelerate"
        )
    return engine


def require_possible(requested, accelerator, precision, graphed):
    """UserError for an engine that has nothing to run on."""
    if requested is None:
        return
    name = {"zero2": ZeroEngine.name, "fsdp2": ShardedEngine.name}[requested]
    if accelerator.num_processes == 1:
        raise UserError(
            f"{name} shards over processes, but there is one: give accelerate launch "
            "--num_processes 2 or more, or start with plain python"
        )
    if graphed:
        raise UserError(
            f"train.cuda_graphs is for one process or DDP, and {name} is asked for: use "
            "configs/accelerate/ddp.yaml, or --config.train.cuda_graphs=False"
        )
    if requested == "zero2" and precision.scaler.is_enabled():
        raise UserError(
            f"{name} runs in bf16 or without mixed precision, not in fp16: pass "
            "--mixed_precision bf16"
        )
    if requested == "fsdp2":
        from torch.distributed import fsdp  # 0.7 s, which other engines do not need

        if not hasattr(fsdp, "fully_shard"):
            raise UserError(f"{name} needs torch 2.6 or newer, and this is {torch.__version__}")
