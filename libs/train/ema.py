"""Exponential moving averages of a network's parameters, several of them in one run."""

import copy

import numpy as np
import torch


def _get_local(tensor):
    """This process's part of a DTensor, else the tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class EMA:
    """A float32 copy of `model` that follows it: ema <- rate * ema + (1 - rate) * parameter.

    rate: a number, or f(step), from step 1 on. Only parameters are averaged; a buffer keeps its
    value at the copy. The copy lacks the heads that sampling does not need.
    """

    def __init__(self, model, rate):
        self.get_rate, self._pairs = rate if callable(rate) else lambda step: rate, []
        self.model = copy.deepcopy(model).float().eval().requires_grad_(False)
        for name, head in list(getattr(self.model, "heads", {}).items()):
            if not head.sampled:
                del self.model.heads[name]

    @torch.no_grad()
    def update(self, model, step=None):
        """Move the average towards `model`, always the same one, after `step`; rate 0 copies."""
        if not self._pairs:  # a walk takes as long as a step of a small network's optimizer
            own = self.model.named_parameters()
            self._pairs = [(average, model.get_parameter(name)) for name, average in own]
        averages = [_get_local(average) for average, _ in self._pairs]
        sources = [_get_local(parameter).float() for _, parameter in self._pairs]
        torch._foreach_lerp_(averages, sources, 1 - self.get_rate(step))


def get_power(length):
    """gamma + 1 of the profile t^gamma of this standard deviation over the run, sigma_rel, below
    0.288: sigma_rel^2 (gamma + 2)^2 (gamma + 3) = gamma + 1 (Karras et al., arXiv 2312.02696).
    """
    inverse = length**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max()) + 1


def make_averages(model, settings):
    """{name of its file in a checkpoint: EMA of `model`}, of the rates and lengths of settings,
    config.train. A power-function average has the rate (1 - 1 / step)^(gamma + 1).
    """
    rates = {"": settings.ema_rate} | {f"_rate_{rate}": rate for rate in settings.ema_rates or ()}
    for length in settings.ema_lengths or ():
        power = get_power(length)
        rates[f"_length_{length}"] = lambda step, power=power: (1 - 1 / step) ** power
    return {f"nnet_ema{name}": EMA(model, rate) for name, rate in rates.items()}


def _overlap(step, power, other_step, other_power):
    """Inner product, broadcast, of profiles power / step^power t^(power - 1), t from 0 to step."""
    first, both = np.minimum(step, other_step), power * other_power / (power + other_power - 1)
    return both * (first / step) ** power * (first / other_step) ** other_power / first


def fit_average(steps, lengths, step, length):
    """(coefficients (n,), error): of n averages, by the steps and lengths that they had, the sum
    whose profile is nearest to that of `length` at `step`, and the distance over the norm (arXiv
    2312.02696, appendix C). The coefficients sum to 1: weights that hardly move stay as they are.
    """
    times, powers = np.asarray(steps) / step, np.array([get_power(each) for each in lengths])
    power, overlaps = get_power(length), _overlap(times[:, None], powers[:, None], times, powers)
    wanted, norm = _overlap(times, powers, 1.0, power), _overlap(1.0, power, 1.0, power)
    found = np.linalg.lstsq(overlaps, wanted, rcond=None)[0]
    found /= found.sum()
    left = norm - 2 * found @ wanted + found @ overlaps @ found
    return found, float(np.sqrt(max(left, 0.0) / norm))
