"""Exponential moving average of a network's parameters."""

import copy

import torch


def _own(tensor):
    """What this process holds of a tensor: its part of a DTensor (libs.train.sharding), else
    all."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class EMA:
    """A float32 copy of `model` that follows it: ema <- rate * ema + (1 - rate) * parameter.

    Only parameters are averaged. A buffer keeps the value that it had when the copy was made.
    """

    def __init__(self, model, rate):
        self.rate = rate
        self.model = copy.deepcopy(model).float().eval().requires_grad_(False)
        self._followed, self._averages, self._parameters = None, [], []

    def _follow(self, model):
        """Look up the parameters of both, once for a model; a walk over its modules takes about as
        long as a step of a small model's optimizer.
        """
        averages = dict(self.model.named_parameters())
        parameters = dict(model.named_parameters())
        if averages.keys() != parameters.keys():
            different = sorted(averages.keys() ^ parameters.keys())
            raise ValueError(f"only one of the model and its average has: {', '.join(different)}")
        self._averages = list(averages.values())
        self._parameters = [parameters[name] for name in averages]
        self._followed = model

    @torch.no_grad()
    def update(self, model, rate=None):
        """Move the average towards `model`, at `rate` instead of the usual one if given.

        Rate 0 copies exactly. ValueError if the two have different parameters.
        """
        rate = self.rate if rate is None else rate
        if self._followed is not model:
            self._follow(model)
        sources = [_own(parameter).float() for parameter in self._parameters]
        torch._foreach_lerp_([_own(average) for average in self._averages], sources, 1 - rate)

    def state_dict(self):
        """The average as the model's own state dict."""
        return self.model.state_dict()

    def load_state_dict(self, state_dict):
        """Load what `state_dict` returned; RuntimeError unless every name and shape fits."""
        self.model.load_state_dict(state_dict, strict=True)
