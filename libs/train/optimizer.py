"""Optimizers and learning-rate schedules by name."""

import math

import torch


def adamw(network, settings, parameters=None):
    """AdamW over all parameters, or these, in one group: each is decayed, as in official runs."""
    betas, decay = tuple(map(float, settings.betas)), settings.weight_decay
    parameters = network.parameters() if parameters is None else parameters
    return torch.optim.AdamW(parameters, settings.lr, betas, settings.eps, decay, fused=True)


class MuonAdamW(torch.optim.Optimizer):
    """Muon (torch 2.9) on the matrices of the blocks' linear layers but dt_proj, at optimizer.lr
    times 0.2 sqrt(longer side) (arXiv 2502.16982, eq. 4); AdamW on all else. A group each, with one
    state. Muon does not read found_inf.
    """

    def __init__(self, network, settings):
        layers = (pair for block in network.blocks for pair in block.named_modules())
        linear = (m for k, m in layers if isinstance(m, torch.nn.Linear) and "dt_proj" not in k)
        matrices = {id(layer.weight): layer.weight for layer in linear}
        others = [p for p in network.parameters() if id(p) not in matrices]
        rate, decay, adjusted = settings.lr, settings.weight_decay, "match_rms_adamw"
        muon = torch.optim.Muon(matrices.values(), rate, decay, adjust_lr_fn=adjusted)
        self.parts = muon, adamw(network, settings, others)
        super().__init__([part.param_groups[0] for part in self.parts], {})

    def step(self, closure=None):
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.state, part.param_groups = self.state, [group]  # load_state_dict makes new ones
            part.step()


OPTIMIZERS = {"adamw": adamw, "muon": MuonAdamW}  # f(network, config.optimizer) -> an Optimizer


def warmup_constant(step, warmup_steps, n_steps):
    """The factor of update `step`, counted from 0: it rises linearly from 0, so that the first
    update changes nothing, to 1 at update `warmup_steps`. Without warm-up (0 or -1) it is 1.
    """
    return min(step / warmup_steps, 1.0) if warmup_steps > 0 else 1.0


def cosine(step, warmup_steps, n_steps):
    """Warm-up times half a cosine, 1 at update 0 and 0 at `n_steps` (arXiv 1608.03983, eq. 5)."""
    half = 0.5 * (1 + math.cos(math.pi * min(step / n_steps, 1.0)))
    return warmup_constant(step, warmup_steps, n_steps) * half


def warmup_stable_decay(step, warmup_steps, n_steps):
    """Warm-up, constant, linear over the last fifth to 0 at `n_steps` (arXiv 2405.18392)."""
    return warmup_constant(step, warmup_steps, n_steps) * min(5 * (1 - step / n_steps), 1.0)


# f(step, warmup_steps, n_steps) -> factor of optimizer.lr; customized: the official name
SCHEDULES = {"warmup_constant": warmup_constant, "cosine": cosine, "customized": warmup_constant}
SCHEDULES["warmup_stable_decay"] = warmup_stable_decay
