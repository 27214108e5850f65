"""Optimizers and learning-rate schedules by name."""

import math

import torch


def adamw(parameters, settings):
    """AdamW over all parameters in one group: each is decayed, as in the official runs."""
    betas, decay = tuple(map(float, settings.betas)), settings.weight_decay
    return torch.optim.AdamW(parameters, settings.lr, betas, settings.eps, decay, fused=True)


OPTIMIZERS = {"adamw": adamw}  # f(parameters, config.optimizer) -> torch.optim.Optimizer


def warmup_constant(step, warmup_steps, n_steps):
    """The factor of update `step`, counted from 0: it rises linearly from 0, so that the first
    update changes nothing, to 1 at update `warmup_steps`. Without warm-up (0 or -1) it is 1.
    """
    return min(step / warmup_steps, 1.0) if warmup_steps > 0 else 1.0


def cosine(step, warmup_steps, n_steps):
    """Warm-up times half a cosine, 1 at update 0 and 0 at `n_steps` (arXiv 1608.03983, eq. 5)."""
    half = 0.5 * (1 + math.cos(math.pi * min(step / n_steps, 1.0)))
    return warmup_constant(step, warmup_steps, n_steps) * half


# f(step, warmup_steps, n_steps) -> factor of optimizer.lr; customized: the official name
SCHEDULES = {"warmup_constant": warmup_constant, "cosine": cosine, "customized": warmup_constant}
