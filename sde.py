"""Diffusion processes in continuous time, and the losses that train a network on them.

Both processes are variance preserving: x_t = alpha(t) x_0 + sigma(t) eps, eps ~ N(0, I), alpha^2 +
sigma^2 = 1, with process time t in [0, 1]. Every schedule function takes a tensor of times of any
shape and returns one of the same shape, dtype and device.

They are computed in the dtype of t by the naive formulas, sigma as sqrt(1 - exp(2 log_alpha)): in
float32 that cancels near t = 0 (a relative error of 3e-3 in 1 - alpha^2 at t = 1e-4), and published
results carry exactly that error. Pass float64 times for accurate values.
"""

import math

import torch

N_TIMESTEPS = 1000  # of the discrete schedule


def _per_sample(value, x):
    """(B,) -> (B, 1, ..., 1), to scale x (B, ...) by; a scalar stays one."""
    return value.reshape(-1, *[1] * (x.dim() - 1)) if value.dim() else value


class Process:
    """What the two share; they add log_alpha, inverse_lam, model_time and time_from_uniform."""

    def alpha(self, t):
        """Factor of the clean image in x_t."""
        return self.log_alpha(t).exp()

    def sigma(self, t):
        """Standard deviation of the noise in x_t."""
        return (1 - (2 * self.log_alpha(t)).exp()).sqrt()

    def lam(self, t):
        """log(alpha / sigma), half the log signal-to-noise ratio; it falls as t grows."""
        log_alpha = self.log_alpha(t)
        return log_alpha - 0.5 * (1 - (2 * log_alpha).exp()).log()

    def _mixing_factors(self, t):
        return self.alpha(t), self.sigma(t)

    def sample(self, x0, generator=None, *, t=None, eps=None):
        """Draw from the forward process: x_t = alpha(t) x0 + sigma(t) eps.

        x0 (B, ...) of any float dtype. Times t (B,) float32 and noise eps (of x0's shape and dtype)
        are drawn from `generator`, which lives on x0's device, unless they are given. Returns (t,
        eps, x_t), x_t in x0's dtype.
        """
        if t is None:
            t = self.time_from_uniform(torch.rand(len(x0), generator=generator, device=x0.device))
        if eps is None:
            eps = torch.randn(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype)
        signal, noise = (_per_sample(factor, x0).to(x0.dtype) for factor in self._mixing_factors(t))
        return t, eps, signal * x0 + noise * eps


class VPSDE(Process):
    """dx = -beta/2 x dt + sqrt(beta) dw, beta(t) linear (Song et al., arXiv 2011.13456, eq. 11)."""

    def __init__(self, beta_min=0.1, beta_max=20.0):
        self.beta_min, self.beta_max = beta_min, beta_max

    def squared_diffusion(self, t):
        """g(t)^2 = beta(t)."""
        return self.beta_min + (self.beta_max - self.beta_min) * t

    def drift(self, x, t):
        """f(x, t) = -beta(t)/2 x, of x's shape."""
        return _per_sample(-0.5 * self.squared_diffusion(t), x) * x

    def log_alpha(self, t):
        """-1/2 of the integral of beta from 0 to t."""
        return -0.25 * (self.beta_max - self.beta_min) * t**2 - 0.5 * self.beta_min * t

    def cum_alpha(self, t):
        """alpha^2."""
        return (2 * self.log_alpha(t)).exp()

    def cum_beta(self, t):
        """sigma^2 = 1 - alpha^2."""
        return 1 - self.cum_alpha(t)

    def nsr(self, t):
        """sigma^2 / alpha^2, accurate near t = 0 too."""
        return torch.expm1(-2 * self.log_alpha(t))

    def snr(self, t):
        """alpha^2 / sigma^2, inf at t = 0."""
        return 1 / self.nsr(t)

    def inverse_lam(self, lam):
        """The t with lam(t) = lam, from the quadratic -2 log_alpha(t) = log(1 + exp(-2 lam))."""
        slope = self.beta_max - self.beta_min
        scaled = 2 * slope * torch.logaddexp(-2 * lam, torch.zeros_like(lam))
        return scaled / ((self.beta_min**2 + scaled).sqrt() + self.beta_min) / slope

    def model_time(self, t):
        """The time that the network is given."""
        return 999 * t

    def time_from_uniform(self, u):
        """Training times (B,) from u (B,) uniform on [0, 1): u itself."""
        return u


class DiscreteSchedule(Process):
    """The 1000 steps of latent diffusion as a process in t = n / 1000.

    sqrt(beta_n) is linear in n (Rombach et al., arXiv 2112.10752); step n = 0 is clean data.
    Between steps log_alpha is linear in t, as DPM-Solver has it (Lu et al., arXiv 2206.00927).
    `cum_alpha`, `cum_beta` and `snr` do not interpolate: they look up entry trunc(1000 t).

    Training times are the float32 numbers nearest to n / 1000. `model_time` recognises those by
    equality and returns exactly n, where the float32 product 1000 t can miss it by one unit in the
    last place; `sample` takes alpha and sigma of exactly step n for them. Any other t, such as a
    sampler's, is given to the network as 1000 t.
    """

    def __init__(self):
        ends = math.sqrt(0.00085), math.sqrt(0.012)
        betas = torch.linspace(*ends, N_TIMESTEPS, dtype=torch.float64) ** 2
        clean = torch.ones(1, dtype=torch.float64)
        cum_alpha = torch.cat([clean, (1 - betas).cumprod(0)])
        cum_beta = 1 - cum_alpha
        self._tables = {  # (1001,) float64, by step n
            "t": torch.arange(N_TIMESTEPS + 1, dtype=torch.float64) / N_TIMESTEPS,
            "cum_alpha": cum_alpha,
            "cum_beta": cum_beta,
            "snr": cum_alpha / cum_beta,
            "alpha": cum_alpha.sqrt(),
            "sigma": cum_beta.sqrt(),
        }
        self._betas = betas
        self._copies = {}

    def _log_alpha_table(self, dtype):
        """log alpha (1001,) by step n, rounded to dtype from the first operation on.

        In float32 this moves lam by up to 4e-5 near t = 1e-3, as it does in published results.
        """
        log_alpha = 0.5 * (1 - self._betas.to(dtype)).log().cumsum(0)
        return torch.cat([torch.zeros(1, dtype=dtype), log_alpha])

    def _table(self, name, like):
        """The table in the dtype and on the device of `like`, copied there once."""
        key = name, like.dtype, like.device
        if key not in self._copies:
            table = self._log_alpha_table(like.dtype) if name == "log_alpha" else self._tables[name]
            self._copies[key] = table.to(like.device, like.dtype)
        return self._copies[key]

    def _lookup(self, name, t):
        return self._table(name, t)[(t * N_TIMESTEPS).long()]

    def cum_alpha(self, t):
        """alpha^2 at step trunc(1000 t).

        In float32 the product is below n, so that this is step n - 1, at the times of steps 251,
        253, 502, 506 and 511.
        """
        return self._lookup("cum_alpha", t)

    def cum_beta(self, t):
        """sigma^2 at step trunc(1000 t)."""
        return self._lookup("cum_beta", t)

    def snr(self, t):
        """alpha^2 / sigma^2 at step trunc(1000 t), inf at t = 0."""
        return self._lookup("snr", t)

    def log_alpha(self, t):
        """log alpha, linear between steps."""
        table, position = self._table("log_alpha", t), self.model_time(t)
        step = position.long().clamp(0, N_TIMESTEPS - 1)
        return torch.lerp(table[step], table[step + 1], position - step)

    def inverse_lam(self, lam):
        """The t with lam(t) = lam."""
        table = -self._table("log_alpha", lam)
        value = 0.5 * torch.logaddexp(-2 * lam, torch.zeros_like(lam))
        step = (torch.searchsorted(table, value, right=True) - 1).clamp(0, N_TIMESTEPS - 1)
        return (step + (value - table[step]) / (table[step + 1] - table[step])) / N_TIMESTEPS

    def model_time(self, t):
        """The time that the network is given: n at the training time of step n, else 1000 t."""
        product = t * N_TIMESTEPS
        step = product.round()
        return torch.where(t == self._table("t", t)[step.long()], step, product)

    def time_from_uniform(self, u):
        """Training times (B,) from u (B,) uniform on [0, 1): the step is uniform on 1..1000."""
        return self._table("t", u)[(u * N_TIMESTEPS).long() + 1]

    def _mixing_factors(self, t):
        step = (t * N_TIMESTEPS).round().long()
        return self._table("alpha", t)[step], self._table("sigma", t)[step]


_PREDICTIONS = ("noise_pred", "x0_pred")


def _check_prediction(pred):
    if pred not in _PREDICTIONS:
        known = ", ".join(_PREDICTIONS)
        raise ValueError(f"pred is {pred!r}, but a network predicts one of: {known}")


def eps_from_model(model, process, pred):
    """Wrap a network as f(x, t, y) -> eps.

    x (B, C, H, W) float32; t process time, a scalar tensor or (B,); y (B,) labels or None. The
    result has x's shape and dtype. `pred` says what the network predicts; 'x0_pred' is turned into
    noise by eps = (x - alpha x_0) / sigma. ValueError for any other `pred` than 'noise_pred' and
    'x0_pred'.
    """
    _check_prediction(pred)

    def eps_fn(x, t, y):
        time = process.model_time(t)
        if time.dim() == 0:  # filled in: copying t to the device would make the host wait for it
            time = torch.full((len(x),), float(time), device=x.device)
        out = model(x, time, y).to(x.dtype)
        if pred == "noise_pred":
            return out
        return (x - _per_sample(process.alpha(t), x) * out) / _per_sample(process.sigma(t), x)

    return eps_fn


def denoising_loss(model, process, x0, y, *, pred, t, eps, **model_kwargs):
    """Squared error of the network's prediction, averaged over C, H, W (Ho et al., arXiv
    2006.11239, equation 14).

    x0 and eps (B, C, H, W); y (B,) labels or None; t (B,) float32 process times; pred 'noise_pred'
    or 'x0_pred', else ValueError; model_kwargs go to the network. Returns (B,) float32, accumulated
    in float32 whatever the network's dtype.
    """
    _check_prediction(pred)
    _, _, x_t = process.sample(x0, t=t, eps=eps)
    out = model(x_t, process.model_time(t), y, **model_kwargs)
    target = eps if pred == "noise_pred" else x0
    return (out.float() - target.float()).square().flatten(1).mean(1)
