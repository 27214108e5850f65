"""Exponential moving averages of a network's parameters, several of them in one run."""

import copy

import numpy as np
import torch


def _get_local(tensor):
    """This process's part of a DTensor, else the tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class EMA:
    """A float32 copy of `model` that follows it: ema <- rate * ema + (1 - rate) * parameter.

    rate: a number, or f(step), step 1 being that of the first update. Only parameters are averaged.
    A buffer keeps the value that it had when the copy was made. The copy lacks the heads of `model`
    that sampling does not need.
    """

    def __init__(self, model, rate):
        self.get_rate = rate if callable(rate) else lambda step: rate
        self._averages, self._parameters = [], []
        self.model = copy.deepcopy(model).float().eval().requires_grad_(False)
        heads = getattr(self.model, "heads", {})
        for name in [name for name, head in heads.items() if not head.sampled]:
            del heads[name]

    @torch.no_grad()
    def update(self, model, step=None):
        """Move the average towards `model`, always the same one, after its optimizer step `step`.
        Rate 0 copies exactly.
        """
        if not self._parameters:  # a walk takes as long as a step of a small network's optimizer
            self._averages = list(self.model.parameters())
            names = [name for name, _ in self.model.named_parameters()]
            self._parameters = [model.get_parameter(name) for name in names]
        sources = [_get_local(parameter).float() for parameter in self._parameters]
        averages = [_get_local(average) for average in self._averages]
        torch._foreach_lerp_(averages, sources, 1 - self.get_rate(step))


def get_power(length):
    """gamma + 1 of the power-function average of the relative length sigma_rel, below 0.288: the
    standard deviation of its profile, t^gamma, over the time of the run (Karras et al., arXiv
    2312.02696): sigma_rel^2 (gamma + 2)^2 (gamma + 3) = gamma + 1.
    """
    inverse = length**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max()) + 1


def make_power_rate(length):
    """f(step) -> rate of the power-function average of this relative length (the same paper,
    section 3.1): (1 - 1 / step)^(gamma + 1).
    """
    power = get_power(length)
    return lambda step: (1 - 1 / step) ** power


def _overlap(step, power, other_step, other_power):
    """Inner product of two profiles power / step^power t^(power - 1), t from 0 to step, broadcast
    (Karras et al., arXiv 2312.02696, appendix C).
    """
    both, first = power + other_power - 1, np.minimum(step, other_step)
    scales = (first / step) ** power * (first / other_step) ** other_power
    return power * other_power / both * scales / first


def fit_average(steps, lengths, step, length):
    """(coefficients (n,) float64, error): the sum of the power-function averages that had these
    lengths at these steps, n of each, whose profile is nearest to that of `length` at `step`, a
    later one; the error is the distance of the profiles over the norm of the one wanted.

    Least squares as in arXiv 2312.02696, appendix C; but the coefficients sum to 1, so that weights
    that hardly move come out as they are, however few the averages.
    """
    times, n = np.asarray(steps) / step, len(steps)
    powers, power = np.array([get_power(each) for each in lengths]), get_power(length)
    overlaps = _overlap(times[:, None], powers[:, None], times, powers)
    wanted, norm = _overlap(times, powers, 1.0, power), _overlap(1.0, power, 1.0, power)
    ones = np.ones((n, 1))
    system = np.block([[overlaps, ones], [ones.T, np.zeros((1, 1))]])  # with Lagrange's multiplier
    found = np.linalg.lstsq(system, np.append(wanted, 1.0), rcond=None)[0][:n]
    left = norm - 2 * found @ wanted + found @ overlaps @ found
    return found, float(np.sqrt(max(left, 0.0) / norm))


def make_averages(model, settings):
    """{name of its file in a checkpoint: EMA of `model`}, the usual one first. settings:
    config.train.
    """
    rates = {"nnet_ema": settings.ema_rate}
    rates |= {f"nnet_ema_rate_{rate}": rate for rate in settings.ema_rates or ()}
    lengths = settings.ema_lengths or ()
    rates |= {f"nnet_ema_length_{length}": make_power_rate(length) for length in lengths}
    return {name: EMA(model, rate) for name, rate in rates.items()}
