"""Guidance: from a network to output(x, t), the raw output that a sampler converts.

x (B, C, H, W) float32; t process time, a 0-dim tensor on the CPU; y (B,) int64 labels or None.
A new guidance is a function in GUIDANCE, chosen by `config.sample.guidance`.
"""

import torch
import torch.nn.functional as F

from sde import make_input, require_offered
from utils import look_up


def at_process_time(network, process):
    """predict(x, t, y, hidden=()) of a network: its output in x's dtype at process time t, and with
    `hidden`, blocks and heads, (output, {number: tokens (B, L, D), name: the head's output}).
    """

    def predict(x, t, y, hidden=()):
        time = process.model_time(t)
        if time.dim() == 0:  # filled in: copying t to the device would make the host wait for it
            time = torch.full((len(x),), float(time), device=x.device)
        x = make_input(process, x, t)
        if not hidden:
            return network(x, time, y).to(x.dtype)
        out, inner = network(x, time, y, hidden=hidden)
        return out.to(x.dtype), inner

    return predict


def internal(predict, settings):
    """`predict` with out + internal_scale * (out - weak) within internal_interval, ends included;
    weak is the output of the head `internal`, a weaker model (arXiv 2512.24176, eq. 6).
    """
    scale, interval = settings.get("internal_scale"), settings.get("internal_interval")
    lo, hi = interval or (0.0, 1.0)

    def corrected(x, t, y, hidden=()):
        if not scale or t < lo or t > hi:
            return predict(x, t, y, hidden=hidden)
        out, inner = predict(x, t, y, hidden=(*hidden, "internal"))
        out = out + scale * (out - inner["internal"])
        return (out, inner) if hidden else out

    return corrected


def classifier_free(predict, y, null_label, settings):
    """cond + scale * (cond - uncond) (Ho and Salimans, arXiv 2207.12598, equation 6).

    Elsewhere written uncond + w * (cond - uncond), w = 1 + scale. Both halves run in one batch, the
    unconditional half with `null_label`. Without scale, `settings.cfg` or labels, and outside of
    guidance_interval, ends included (Kynkäänniemi et al., arXiv 2404.07724), the network runs once.
    """
    scale = settings.scale if settings.cfg and y is not None else 0
    if scale == 0:
        return lambda x, t: predict(x, t, y)
    lo, hi = settings.guidance_interval or (0.0, 1.0)
    y_both = torch.cat([y, torch.full_like(y, null_label)])

    def output(x, t):
        if t < lo or t > hi:  # compared in float32, so that a time on an end counts as inside
            return predict(x, t, y)
        cond, uncond = predict(torch.cat([x, x]), t, y_both).chunk(2)
        return cond + scale * (cond - uncond)

    return output


# name -> f(predict, y, null_label, settings) -> output(x, t); predict as `at_process_time` makes
# it, settings the config's section `sample`.
GUIDANCE = {"classifier_free": classifier_free}


def low_resolution_time(process, t, m):
    """The time tau at which an image m times smaller has m^2 times the signal-to-noise ratio of t
    (...): as published the nearest of 1000 times, written n / 999, and none above the first of t.
    """
    times = torch.arange(999, -1, -1, dtype=torch.float32) / 1000
    times[-1] = 1e-5

    def snr(t):
        alpha_bar = process.alpha_bar(t)
        return alpha_bar / (1 - alpha_bar)

    index = (snr(times.to(t.device)).to(t.dtype) - m * m * snr(t)[..., None]).abs().argmin(-1)
    return (1 - index.to(t.dtype) / 999).clamp(max=t.flatten()[0])


def upsampling(output, process, pred, m, theta=1.0, eta=0.3, T=1.0):
    """Samples m times as large as the network was trained for (Hwang et al., arXiv 2404.01709):
    where t >= (1 - eta) T, the predicted noise's m-fold average is moved towards that for the m
    times smaller image, by theta. The average of m x m pixels has m^2 times the signal-to-noise
    ratio; divided by the root of its power alpha^2 + sigma^2 / m^2 it is a noisy image of time tau
    (`low_resolution_time`), whose noise is m times too large.
    """
    require_offered(process, ("alpha_bar",), "upsampling guidance")

    def guided(x, t):
        out = output(x, t)
        if t < (1 - eta) * T:  # compared in float32, as in classifier_free
            return out
        _, eps = process.to_x0_eps(pred, out, x, t)
        alpha_bar = process.alpha_bar(t)
        power = alpha_bar + (1 - alpha_bar) / m**2
        small, tau = F.avg_pool2d(x, m) / power.sqrt(), low_resolution_time(process, t, m)
        _, small_eps = process.to_x0_eps(pred, output(small, tau), small, tau)
        shift = small_eps / m - F.avg_pool2d(eps, m)
        eps = eps + theta * F.interpolate(shift, scale_factor=m, mode="nearest")
        return process.target(pred, *process.to_x0_eps("noise_pred", eps, x, t), t)

    return guided


def make_guided(network, process, y, *, pred, null_label, settings, upsample=None):
    """output(x, t) of network(x, model_time, y) under the guidance of `settings`, the config's
    section `sample`; upsample: keywords m, theta, eta, T of `upsampling`, or None. Internal
    guidance comes first, and other guidance combines its outputs (as in arXiv 2512.24176).
    """
    name = settings.get("guidance") or "classifier_free"
    guide = look_up(GUIDANCE, name, "sample.guidance")
    predict = internal(at_process_time(network, process), settings)
    output = guide(predict, y, null_label, settings)
    return upsampling(output, process, pred, **upsample) if upsample else output
