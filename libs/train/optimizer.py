"""Optimizers and learning-rate schedules by name."""

import functools
import math

import torch

from libs.train.registry import register
from utils import look_up

OPTIMIZERS = {}  # config.optimizer.name -> f(parameters, settings) -> torch.optim.Optimizer
SCHEDULES = {}  # config.lr_scheduler.name -> f(step, warmup_steps, n_steps) -> factor of the rate


@register(OPTIMIZERS, "adamw")
def adamw(parameters, settings):
    """AdamW over all parameters in one group: every parameter is decayed, as in the official
    runs.
    """
    return torch.optim.AdamW(
        parameters,
        lr=settings.lr,
        betas=tuple(map(float, settings.betas)),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def make_optimizer(settings, parameters):
    """The optimizer that config.optimizer names, over `parameters`; UserError for no known one."""
    return look_up(OPTIMIZERS, settings.name, "optimizer.name")(parameters, settings)


@register(SCHEDULES, "warmup_constant", "customized")  # the latter is the official name
def warmup_constant(step, warmup_steps, n_steps):
    """The factor of update `step`, counted from 0: it rises linearly from 0, so that the first
    update changes nothing, to 1 at update `warmup_steps`. Without warm-up (0 or -1) it is 1.
    """
    return min(step / warmup_steps, 1.0) if warmup_steps > 0 else 1.0


@register(SCHEDULES, "cosine")
def cosine(step, warmup_steps, n_steps):
    """The warm-up times half a cosine from 1 at update 0 to 0 at update `n_steps` (arXiv
    1608.03983, eq. 5).
    """
    half = 0.5 * (1 + math.cos(math.pi * min(step / n_steps, 1.0)))
    return warmup_constant(step, warmup_steps, n_steps) * half


def make_schedule(settings, n_steps):
    """f(step, from 0) -> the factor of optimizer.lr, as config.lr_scheduler names it."""
    schedule = look_up(SCHEDULES, settings.name, "lr_scheduler.name")
    return functools.partial(schedule, warmup_steps=settings.warmup_steps, n_steps=n_steps)


def set_learning_rate(optimizer, lr):
    """For the next step of all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = lr
