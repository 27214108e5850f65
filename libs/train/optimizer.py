"""Optimizers and learning-rate schedules by name."""

import math

import torch
from torch import nn

from utils import UserError


def _make_adamw(parameters, settings):
    betas, decay = tuple(map(float, settings.betas)), settings.weight_decay
    return torch.optim.AdamW(parameters, settings.lr, betas, settings.eps, decay, fused=True)


class MuonAdamW(torch.optim.Optimizer):
    """Muon steps the first of two groups, AdamW the second; their state is one. A NaN gradient
    would destroy what Muon steps: unlike fused AdamW it does not read found_inf.
    """

    def __init__(self, matrices, others, settings):
        rate, decay = settings.lr, settings.weight_decay
        muon = torch.optim.Muon(matrices, rate, decay, adjust_lr_fn="match_rms_adamw")
        self.parts = muon, _make_adamw(others, settings)
        super().__init__([part.param_groups[0] for part in self.parts], {})

    def step(self, closure=None):
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.state, part.param_groups = self.state, [group]  # load_state_dict makes new ones
            part.step()


def adamw(network, settings):
    """AdamW over all parameters in one group: each is decayed, as in the official runs."""
    return _make_adamw(network.parameters(), settings)


def muon(network, settings):
    """Muon (Jordan et al., 2024) on the matrices of the blocks' linear layers, dt_proj aside, at
    optimizer.lr times 0.2 sqrt(longer side), which moves a weight as far as AdamW does (Liu et al.,
    arXiv 2502.16982, eq. 4); AdamW on all else. UserError for torch before 2.9.
    """
    if not hasattr(torch.optim, "Muon"):
        raise UserError(
            f"optimizer.name is 'muon', which is in torch 2.9 and newer, but this is torch "
            f"{torch.__version__}: update torch, or take adamw"
        )
    modules = [pair for block in network.blocks for pair in block.named_modules()]
    layers = [m for name, m in modules if isinstance(m, nn.Linear) and "dt_proj" not in name]
    matrices = [layer.weight for layer in layers]
    chosen = set(map(id, matrices))
    return MuonAdamW(matrices, [p for p in network.parameters() if id(p) not in chosen], settings)


# f(network, config.optimizer) -> torch.optim.Optimizer
OPTIMIZERS = {"adamw": adamw, "muon": muon}


def warmup_constant(step, warmup_steps, n_steps):
    """The factor of update `step`, counted from 0: it rises linearly from 0, so that the first
    update changes nothing, to 1 at update `warmup_steps`. Without warm-up (0 or -1) it is 1.
    """
    return min(step / warmup_steps, 1.0) if warmup_steps > 0 else 1.0


def cosine(step, warmup_steps, n_steps):
    """Warm-up times half a cosine, 1 at update 0 and 0 at `n_steps` (arXiv 1608.03983, eq. 5)."""
    half = 0.5 * (1 + math.cos(math.pi * min(step / n_steps, 1.0)))
    return warmup_constant(step, warmup_steps, n_steps) * half


def warmup_stable_decay(step, warmup_steps, n_steps):
    """Warm-up, then constant, then linear over the last fifth of the run, to 0 at `n_steps` (Hagele
    et al., arXiv 2405.18392: a fifth is about as good as a cosine).
    """
    return warmup_constant(step, warmup_steps, n_steps) * min(5 * (1 - step / n_steps), 1.0)


# f(step, warmup_steps, n_steps) -> factor of optimizer.lr; customized: the official name
SCHEDULES = {
    "warmup_constant": warmup_constant, "customized": warmup_constant, "cosine": cosine,
    "warmup_stable_decay": warmup_stable_decay,
}  # fmt: skip
