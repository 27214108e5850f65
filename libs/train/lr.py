"""The learning-rate schedules of training, as factors of optimizer.lr."""

import math


def warmup_factor(step, warmup_steps):
    """What multiplies the base learning rate at update `step`, counted from 0.

    It rises linearly from 0, so that the first update changes nothing, to 1 at update
    `warmup_steps`. Without warm-up (0 or -1 steps) it is 1 throughout.
    """
    return min(step / warmup_steps, 1.0) if warmup_steps > 0 else 1.0


def cosine_factor(step, n_steps):
    """Half a cosine from 1 at update 0 to 0 at update `n_steps` (arXiv 1608.03983, eq. 5)."""
    return 0.5 * (1 + math.cos(math.pi * min(step / n_steps, 1.0)))


def lr_factor(name, step, *, warmup_steps, n_steps):
    """The factor of update `step`, counted from 0, under the schedule `name`.

    'customized', the official name, warms up and stays; 'cosine' also falls to 0 at `n_steps`.
    """
    warmup = warmup_factor(step, warmup_steps)
    return warmup * cosine_factor(step, n_steps) if name == "cosine" else warmup
