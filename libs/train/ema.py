"""Exponential moving average of a network's parameters."""

import copy

import torch


def _get_local(tensor):
    """This process's part of a DTensor, else the tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class EMA:
    """A float32 copy of `model` that follows it: ema <- rate * ema + (1 - rate) * parameter.

    Only parameters are averaged. A buffer keeps the value that it had when the copy was made. The
    copy lacks the heads of `model` that sampling does not need.
    """

    def __init__(self, model, rate):
        self.rate, self._averages, self._parameters = rate, [], []
        self.model = copy.deepcopy(model).float().eval().requires_grad_(False)
        heads = getattr(self.model, "heads", {})
        for name in [name for name, head in heads.items() if not head.sampled]:
            del heads[name]

    @torch.no_grad()
    def update(self, model, rate=None):
        """Move the average towards `model`, always the same one, at `rate` instead of the usual one
        if given; rate 0 copies exactly.
        """
        if not self._parameters:  # a walk takes as long as a step of a small network's optimizer
            self._averages = list(self.model.parameters())
            names = [name for name, _ in self.model.named_parameters()]
            self._parameters = [model.get_parameter(name) for name in names]
        sources = [_get_local(parameter).float() for parameter in self._parameters]
        averages = [_get_local(average) for average in self._averages]
        torch._foreach_lerp_(averages, sources, 1 - (self.rate if rate is None else rate))
