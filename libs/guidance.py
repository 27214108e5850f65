"""Guidance: turns a noise prediction f(x, t, y) into the eps_fn(x, t) that a sampler integrates.

x (B, C, H, W); t process time, a 0-dim tensor; y (B,) int64 labels.
"""

import torch

from utils import UserError


def unguided(eps_fn3, y):
    """eps_fn(x, t) = eps_fn3(x, t, y); y None means unconditional."""
    return lambda x, t: eps_fn3(x, t, y)


def classifier_free(eps_fn3, y, scale, null_label, interval=None):
    """cond + scale * (cond - uncond) (Ho and Salimans, arXiv 2207.12598, equation 6).

    This is the paper's convention; where guidance is written uncond + w * (cond - uncond), w = 1 +
    scale. Both halves run in one batch, the unconditional one with `null_label` (the number of
    classes) for every image. With scale 0, and at times outside interval = (lo, hi), ends included
    (Kynkäänniemi et al., arXiv 2404.07724), only the conditional half runs. y None runs
    unconditionally. UserError if it is to be guided nevertheless, or if the interval is empty.
    """
    if scale == 0:
        return unguided(eps_fn3, y)
    if y is None:
        raise UserError(f"guidance of scale {scale} needs labels, and there are none: set it to 0")
    lo, hi = interval or (0.0, 1.0)
    if lo > hi:
        raise UserError(f"the guidance interval ({lo}, {hi}) is empty: give the smaller first")
    y_both = torch.cat([y, torch.full_like(y, null_label)])

    def eps_fn(x, t):
        if t < lo or t > hi:  # compared in float32, so that a time on an end counts as inside
            return eps_fn3(x, t, y)
        cond, uncond = eps_fn3(torch.cat([x, x]), t, y_both).chunk(2)
        return cond + scale * (cond - uncond)

    return eps_fn
