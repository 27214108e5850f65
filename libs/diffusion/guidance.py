"""Guidance: turns a noise prediction f(x, t, y) into the eps_fn(x, t) that a sampler integrates.

x (B, C, H, W); t process time, a 0-dim tensor; y (B,) int64 labels.
"""

import torch
import torch.nn.functional as F

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
    unconditionally. With a scale other than 0, UserError if y is None or the interval is empty.
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


def low_resolution_time(process, t, m):
    """The time tau at which an image m times smaller has m^2 times the signal-to-noise ratio of t.

    t (...) process times; the nearest of 1000 times, written n / 999, as the official code has it,
    and none above the first of t.
    """
    times = torch.arange(999, -1, -1, dtype=torch.float32) / 1000
    times[-1] = 1e-5
    snr = process.snr(times.to(t.device)).to(t.dtype)
    index = (snr - m * m * process.snr(t)[..., None]).abs().argmin(-1)
    return (1 - index.to(t.dtype) / 999).clamp(max=t.flatten()[0])


def upsampling(eps_fn, process, m, theta=1.0, eta=0.3, end=1.0):
    """Samples m times as large as the network was trained for, without training (Hwang et al.,
    arXiv 2404.01709): where t >= (1 - eta) end, the prediction's m-fold average is moved towards
    that for the m times smaller image, by theta.

    The average of m x m pixels has m^2 times the signal-to-noise ratio; divided by the root of its
    power alpha^2 + sigma^2 / m^2 it is a noisy image of time tau (`low_resolution_time`), whose
    noise is m times too large. UserError for an image that m does not divide.
    """

    def guided(x, t):
        if x.shape[-2] % m or x.shape[-1] % m:
            raise UserError(
                f"upsampling by ug_m {m} needs latents whose height and width it divides, not "
                f"{x.shape[-2]}x{x.shape[-1]}: choose another ug_m or nnet.input_size"
            )
        eps = eps_fn(x, t)
        if t < (1 - eta) * end:  # compared in float32, as in classifier_free
            return eps
        power = process.cum_alpha(t) + process.cum_beta(t) / m**2
        small = F.avg_pool2d(x, m) / power.sqrt()
        small_eps = eps_fn(small, low_resolution_time(process, t, m))
        shift = small_eps / m - F.avg_pool2d(eps, m)
        return eps + theta * F.interpolate(shift, scale_factor=m, mode="nearest")

    return guided


def guided_by(config, predict, process, y, null_label):
    """eps_fn(x, t) with the guidance of a config: classifier-free where train.mode is 'cond' and
    sample.cfg is set, upsampling where ug_m is. predict: f(x, t, y).
    """
    scale = config.sample.scale if config.train.mode == "cond" and config.sample.cfg else 0.0
    eps_fn = classifier_free(predict, y, scale, null_label, config.sample.guidance_interval)
    if config.get("ug_m") is None:
        return eps_fn
    return upsampling(eps_fn, process, config.ug_m, config.ug_theta, config.ug_eta, config.ug_T)
