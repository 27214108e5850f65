"""How gradients become one optimizer step: torch's own way, or DeepSpeed's ZeRO-2 where it is asked
for, which shards gradients and optimizer state over the processes.

Both hold the same plain values: their checkpoints are each other's.
"""

import contextlib
import importlib.util
import os

import torch

from utils import UserError

REQUEST = "ACCELERATE_USE_DEEPSPEED"  # what `accelerate launch --use_deepspeed` sets


class Engine:
    """DistributedDataParallel over several processes, the bare network in one.

    model: what to call; network: its parameters' owner; optimizer: over them.
    """

    name = "torch"

    def __init__(self, accelerator, network, optimizer, precision, max_norm):
        self.accelerator, self.network, self.optimizer = accelerator, network, optimizer
        self.scaler, self.max_norm = precision.scaler, max_norm
        self.model = accelerator.prepare_model(network)

    def backward(self, loss):
        """Adds this micro-batch's gradients."""
        self.scaler.scale(loss).backward()

    def accumulating(self, last):
        """The context of a micro-batch: gradients meet over the processes with the last."""
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
        """The optimizer's whole state_dict, on every process that asks; all must ask."""
        return self.optimizer.state_dict()


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


def zero_requested(config):
    """Whether ZeRO-2 is asked for: by train.zero_stage=2 or by `accelerate launch --use_deepspeed`.

    Nothing else turns it on. UserError for another stage, or a DeepSpeed configuration file.
    """
    launcher = os.environ.get(REQUEST, "false").lower() in ("true", "1")
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2") if launcher else None
    stage = int(stage) if launcher and stage.isdigit() else config.train.zero_stage
    if launcher and os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") != "none":
        raise UserError(
            "a DeepSpeed configuration file has no effect here: give --use_deepspeed --zero_stage "
            "2 alone; everything else is in the config"
        )
    if stage not in (0, 2):
        raise UserError(
            f"DeepSpeed's ZeRO stage is {stage}, expected 2, which shards gradients and optimizer "
            "state, or 0, which is off"
        )
    return stage == 2


def make_engine(config, accelerator, network, optimizer, precision):
    """The Engine that config and launcher ask for, around a network and its optimizer, both with
    what was resumed.

    Raises:
        UserError: ZeRO-2 without DeepSpeed, in one process, or in fp16.
    """
    max_norm = config.max_grad_norm or float("inf")
    if not zero_requested(config):
        return Engine(accelerator, network, optimizer, precision, max_norm)
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "ZeRO-2 is asked for, but DeepSpeed is not installed: pip install deepspeed, or leave "
            "out --use_deepspeed and train.zero_stage"
        )
    if accelerator.num_processes == 1:
        raise UserError(
            "ZeRO-2 shards over processes, but there is one: use accelerate launch with "
            "--num_processes 2 or more, or leave out --use_deepspeed and train.zero_stage"
        )
    if precision.scaler.is_enabled():
        raise UserError(
            "ZeRO-2 runs in bf16 or without mixed precision, not in fp16: pass "
            "--mixed_precision bf16"
        )
    accumulation = config.gradient_accumulation_steps
    return ZeroEngine(accelerator, network, optimizer, max_norm, accumulation)
