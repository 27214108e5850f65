"""Diffusion processes: how data becomes noise, what a network learns, and which times it is told.

A process is a class in PROCESSES, chosen by `config.process.name`. Process time t runs from 0
(data x0) to 1 (noise eps). Every process has

    predictions                  the names of what a network may predict (`config.pred`)
    mix(x0, eps, t)              x_t, the noisy data that a network is trained on
    target(pred, x0, eps, t)     what the network should answer
    to_x0_eps(pred, out, x_t, t) (x0, eps) from the network's output
    velocity(pred, out, x_t, t)  dx_t/dt of the probability flow ODE from the network's output
    train_time(u)                training times from u uniform on [0, 1)
    model_time(t)                the time that the network is given
    shift_time(t)                if it has one: from an even grid in [0, 1] to a sampler's times
    model_input(x, t)            if it has one: from x_t to the input that the network is given

x0, eps, x_t and out are (B, ...), t is (B,) or 0-dim; results have the shape and dtype of x_t.
A sampler or guidance refuses by name a process that lacks an attribute it needs, a log-SNR say.

Schedule functions such as `alpha` take times of any shape and return that shape, dtype and device.
They use the naive formulas in the dtype of t, sigma as sqrt(1 - exp(2 log_alpha)): in float32 that
cancels near t = 0 (a relative error of 3e-3 in 1 - alpha^2 at t = 1e-4), and published results
carry exactly that error. Float64 times give accurate values.
"""

import math

import torch

from flow import Flow, per_sample
from utils import UserError, bind, look_up

N_TIMESTEPS = 1000  # of the discrete schedule


class VariancePreserving:
    """x_t = alpha x0 + sigma eps with alpha^2 + sigma^2 = 1.

    A subclass adds log_alpha, log_alpha_slope = d log_alpha / dt, inverse_half_log_snr, model_time.
    """

    predictions = ("noise_pred", "x0_pred")
    dpm_grid = "log_snr"  # even steps of DPM-Solver in the official evaluation: in log_snr or time
    dpm_predicts = "noise"  # what DPM-Solver integrates there: noise, or x0 (DPM-Solver++)

    def alpha(self, t):
        """Factor of the clean image in x_t."""
        return self.log_alpha(t).exp()

    def sigma(self, t):
        """Standard deviation of the noise in x_t."""
        return (1 - (2 * self.log_alpha(t)).exp()).sqrt()

    def half_log_snr(self, t):
        """log(alpha / sigma), half the log signal-to-noise ratio; it falls as t grows."""
        log_alpha = self.log_alpha(t)
        return log_alpha - 0.5 * (1 - (2 * log_alpha).exp()).log()

    def alpha_bar(self, t):
        return (2 * self.log_alpha(t)).exp()

    def betas(self):
        """The betas (1000,) float64 of the chain that is the process at t = 0.001, ..., 1."""
        alpha_bar = self.alpha(torch.arange(N_TIMESTEPS + 1).double() / N_TIMESTEPS) ** 2
        return 1 - alpha_bar[1:] / alpha_bar[:-1]

    def train_time(self, u):
        return u

    def mixing_factors(self, t):
        """alpha and sigma as training takes them."""
        return self.alpha(t), self.sigma(t)

    def mix(self, x0, eps, t):
        """x_t = alpha x0 + sigma eps, in x0's dtype."""
        alpha, sigma = (per_sample(f, x0).to(x0.dtype) for f in self.mixing_factors(t))
        return alpha * x0 + sigma * eps

    def target(self, pred, x0, eps, t):
        return {"noise_pred": eps, "x0_pred": x0}[pred]

    def to_x0_eps(self, pred, out, x_t, t):
        """(x0, eps); the predicted one is `out` itself."""
        alpha, sigma = per_sample(self.alpha(t), x_t), per_sample(self.sigma(t), x_t)
        if pred == "noise_pred":
            return (x_t - sigma * out) / alpha, out
        return out, (x_t - alpha * out) / sigma

    def velocity(self, pred, out, x_t, t):
        """dx_t/dt = (log alpha)' (x_t - eps / sigma), as sigma' = -alpha alpha' / sigma."""
        _, eps = self.to_x0_eps(pred, out, x_t, t)
        slope, sigma = self.log_alpha_slope(t), self.sigma(t)
        return per_sample(slope, x_t) * (x_t - eps / per_sample(sigma, x_t))


class VPSDE(VariancePreserving):
    """dx = -beta/2 x dt + sqrt(beta) dw, beta(t) linear (Song et al., arXiv 2011.13456, eq. 11)."""

    def __init__(self, beta_min=0.1, beta_max=20.0):
        self.beta_min, self.beta_max = beta_min, beta_max

    def g2(self, t):
        """g(t)^2 = beta(t), the squared diffusion; the drift is -g2/2 x."""
        return self.beta_min + (self.beta_max - self.beta_min) * t

    def log_alpha(self, t):
        """-1/2 of the integral of beta from 0 to t."""
        return -0.25 * (self.beta_max - self.beta_min) * t**2 - 0.5 * self.beta_min * t

    def log_alpha_slope(self, t):
        return -0.5 * self.g2(t)

    def inverse_half_log_snr(self, value):
        """The t of a half log-SNR, from the quadratic -2 log_alpha(t) = log(1 + exp(-2 value))."""
        slope = self.beta_max - self.beta_min
        scaled = 2 * slope * torch.logaddexp(-2 * value, torch.zeros_like(value))
        return scaled / ((self.beta_min**2 + scaled).sqrt() + self.beta_min) / slope

    def model_time(self, t):
        return 999 * t


class DiscreteSchedule(VariancePreserving):
    """The 1000 steps of latent diffusion as a process in t = n / 1000.

    sqrt(beta_n) is linear in n (Rombach et al., arXiv 2112.10752); step n = 0 is clean data.

    Training is on whole steps: `train_time` gives the float32 number nearest to n / 1000, for which
    `mix` reads the tables at n and `model_time` is exactly n (the float32 product 1000 t can miss
    n by one unit in the last place). A sampler's times may lie between steps. There log_alpha is
    linear in t, as DPM-Solver has it (Lu et al., arXiv 2206.00927), and `model_time` is 1000 t.
    Upsampling's `alpha_bar` is the table at trunc(1000 t), as published: in float32 that is step
    n - 1 at the times of steps 251, 253, 502, 506 and 511.
    """

    dpm_grid, dpm_predicts = "time", "x0"

    def __init__(self):
        ends = math.sqrt(0.00085), math.sqrt(0.012)
        betas = torch.linspace(*ends, N_TIMESTEPS, dtype=torch.float64) ** 2
        alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), (1 - betas).cumprod(0)])
        self._tables = {  # (1001,) float64, by step n
            "t": torch.arange(N_TIMESTEPS + 1, dtype=torch.float64) / N_TIMESTEPS,
            "alpha_bar": alpha_bar,
            "alpha": alpha_bar.sqrt(),
            "sigma": (1 - alpha_bar).sqrt(),
        }
        self._step_betas = betas
        self._copies = {}

    def _log_alpha_table(self, dtype):
        """log alpha (1001,) by step n, rounded to dtype from the first operation on.

        In float32 this moves half_log_snr by up to 4e-5 near t = 1e-3, as in published results.
        """
        log_alpha = 0.5 * (1 - self._step_betas.to(dtype)).log().cumsum(0)
        return torch.cat([torch.zeros(1, dtype=dtype), log_alpha])

    def _table(self, name, like):
        """The table in the dtype and on the device of `like`, copied there once."""
        key = name, like.dtype, like.device
        if key not in self._copies:
            table = self._log_alpha_table(like.dtype) if name == "log_alpha" else self._tables[name]
            self._copies[key] = table.to(like.device, like.dtype)
        return self._copies[key]

    def alpha_bar(self, t):
        return self._table("alpha_bar", t)[(t * N_TIMESTEPS).long()]

    def _interval(self, t):
        """(log_alpha at the step before t and at the one after it, how far between them t lies)."""
        table, position = self._table("log_alpha", t), self.model_time(t)
        step = position.long().clamp(0, N_TIMESTEPS - 1)
        return table[step], table[step + 1], position - step

    def log_alpha(self, t):
        return torch.lerp(*self._interval(t))

    def log_alpha_slope(self, t):
        before, after, _ = self._interval(t)
        return (after - before) * N_TIMESTEPS

    def inverse_half_log_snr(self, value):
        table = -self._table("log_alpha", value)
        wanted = 0.5 * torch.logaddexp(-2 * value, torch.zeros_like(value))
        step = (torch.searchsorted(table, wanted, right=True) - 1).clamp(0, N_TIMESTEPS - 1)
        return (step + (wanted - table[step]) / (table[step + 1] - table[step])) / N_TIMESTEPS

    def model_time(self, t):
        product = t * N_TIMESTEPS
        step = product.round()
        return torch.where(t == self._table("t", t)[step.long()], step, product)

    def train_time(self, u):
        """The step is uniform on 1..1000."""
        return self._table("t", u)[(u * N_TIMESTEPS).long() + 1]

    def mixing_factors(self, t):
        step = (t * N_TIMESTEPS).round().long()
        return self._table("alpha", t)[step], self._table("sigma", t)[step]


class FlowFromDiscrete(Flow):
    """Flow of a network that learnt the noise of a DiscreteSchedule: it is given x_t scaled as
    there, and the step with t's signal-to-noise ratio; so both have the same probability flow.

    At times beyond `end` = 0.936, the flow's time of step 1000, where alpha is still 0.068, the
    network is given step 1000: its output means the x0 that it implies there.
    """

    predictions, schedule = ("noise_pred",), DiscreteSchedule()
    end = torch.sigmoid(-schedule.half_log_snr(torch.ones((), dtype=torch.float64))).item()

    def model_time(self, t):
        step = self.schedule.inverse_half_log_snr(self.half_log_snr(t)).clamp(max=1)
        return self.schedule.model_time(step)

    def model_input(self, x, t):
        return x / per_sample(torch.hypot(t, 1 - t), x)

    def _view(self, x_t, t):
        """(t, that time or `end`, what the network is given as an x_t of that time)."""
        known = t.clamp(max=self.end)
        x = self.model_input(x_t, t) * per_sample(torch.hypot(known, 1 - known), x_t)
        return per_sample(t, x_t), per_sample(known, x_t), x

    def target(self, pred, x0, eps, t):
        """The noise; beyond `end` what the network's input holds beside x0."""
        t, known, x = self._view(self.mix(x0, eps, t), t)
        return torch.where(t > known, (x - (1 - known) * x0) / known, eps)

    def to_x0_eps(self, pred, out, x_t, t):
        t, known, x = self._view(x_t, t)
        x0 = (x - known * out) / (1 - known)
        beyond = (t > known).to(t.dtype)  # 1 or 0, without a device to wait for
        return x0, beyond * (x_t - (1 - t) * x0) / t.clamp(min=self.end) + (1 - beyond) * out


PROCESSES = {"vpsde": VPSDE, "discrete": DiscreteSchedule, "flow": Flow}
PROCESSES["flow_from_discrete"] = FlowFromDiscrete


def make_process(name, **settings):
    """The process of this name in PROCESSES; settings are keywords of its class, else UserError."""
    return bind(look_up(PROCESSES, name, "process.name"), "process", **settings)()


def make_input(process, x, t):
    """x_t (B, ...) at times t as a network is given it: x_t itself for most processes."""
    return process.model_input(x, t) if hasattr(process, "model_input") else x


def require_offered(process, names, user):
    """UserError where the process does not define all of `names`, which `user` needs."""
    missing = [name for name in names if not hasattr(process, name)]
    if missing:
        kind = type(process).__name__
        raise UserError(f"{user} needs {missing[0]}, which process {kind} does not have")
