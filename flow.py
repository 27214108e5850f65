"""The process of flow matching, one of sde.PROCESSES: what its methods are, says sde.py."""

import math

import torch

from utils import look_up


def per_sample(value, x):
    """(B,) -> (B, 1, ..., 1), to scale x (B, ...) by; a 0-dim value stays as it is."""
    return value.reshape(-1, *[1] * (x.dim() - 1)) if value.dim() else value


def draw_logit_normal(u, mean, std):
    """sigmoid(N(mean, std^2)) by its quantile function (Esser et al., arXiv 2403.03206, eq. 19)."""
    return torch.sigmoid(mean + std * torch.special.ndtri(u.clamp(2**-24, 1 - 2**-24)))


# process.times -> f(u, mean, std), u (B,) uniform
TRAINING_TIMES = {"uniform": lambda u, mean, std: u, "logit_normal": draw_logit_normal}


class Flow:
    """x_t = (1 - t) x0 + t eps, whose velocity is eps - x0 (Lipman et al., arXiv 2210.02747).

    times: of TRAINING_TIMES, mean and std those of their logit; shift: see `shift_time`. At t = 1
    predicted noise says nothing about x0, at t = 0 predicted x0 nothing about the noise: what is
    missing is 0 there, the mean of the noise and about that of data in [-1, 1].
    """

    predictions = ("velocity_pred", "noise_pred", "x0_pred")
    dpm_grid, dpm_predicts = "log_snr", "x0"  # see sde.VariancePreserving
    ends = (1e-3, 1 - 1e-3)  # beyond them half_log_snr is constant, as it diverges

    def __init__(self, times="uniform", mean=0.0, std=1.0, shift=1.0):
        self.draw_time = look_up(TRAINING_TIMES, times, "process.times")
        self.mean, self.std, self.shift = mean, std, shift

    def alpha(self, t):
        return 1 - t

    def sigma(self, t):
        return t

    def half_log_snr(self, t):
        """log(alpha / sigma) within `ends`."""
        return -t.clamp(*self.ends).logit()

    def inverse_half_log_snr(self, value):
        return torch.sigmoid(-value)

    def shift_time(self, t):
        """s t / (1 + (s - 1) t), s = shift (Esser et al., eq. 23), so written that 1 stays 1."""
        return self.shift * t / (self.shift * t + (1 - t))

    def train_time(self, u):
        return self.shift_time(self.draw_time(u, self.mean, self.std))

    def model_time(self, t):
        return 1000 * t

    def mix(self, x0, eps, t):
        t = per_sample(t, x0)
        return (1 - t).to(x0.dtype) * x0 + t.to(x0.dtype) * eps

    def target(self, pred, x0, eps, t):
        return eps - x0 if pred == "velocity_pred" else {"noise_pred": eps, "x0_pred": x0}[pred]

    def to_x0_eps(self, pred, out, x_t, t):
        """(x0, eps); a predicted one is `out` itself."""
        t = per_sample(t, x_t)
        if pred == "velocity_pred":
            return x_t - t * out, x_t + (1 - t) * out
        if pred == "noise_pred":
            return (x_t - t * out) / torch.where(t < 1, 1 - t, math.inf), out
        return out, (x_t - (1 - t) * out) / torch.where(t > 0, t, math.inf)

    def velocity(self, pred, out, x_t, t):
        x0, eps = self.to_x0_eps(pred, out, x_t, t)
        return eps - x0
