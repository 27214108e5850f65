"""The distribution whose denoiser is known in closed form: x_0 ~ N(mu, s^2), elementwise; and the
loss of any network.
"""

import torch

from libs.data.codec import PixelCodec
from libs.train.losses import Draws, Objective


def training_loss(model, process, x0, y, *, pred, u, eps):
    """Losses (B,) as training computes them: u (B,) uniform in [0, 1) gives the times."""
    objective = Objective(
        process, PixelCodec(), pred=pred, weights={"mse": 1.0}, null_label=-1,
        p_uncond=None if y is None else 0.0,
    )  # fmt: skip
    return objective(model, x0, y, Draws(u, u, u.new_zeros(len(u), 0), eps, None))


def noise_prediction(x, mu, s, log_alpha):
    """E[eps | x_t = x] in float64; log_alpha of the time, a float64 scalar."""
    alpha = torch.as_tensor(log_alpha, dtype=torch.float64).exp()
    sigma = (-torch.expm1(2 * torch.as_tensor(log_alpha, dtype=torch.float64))).sqrt()
    return sigma * (x.double() - alpha * mu) / (alpha**2 * s**2 + sigma**2)


def prediction(process, pred, mu, s):
    """The raw output(x, t) of a perfect network for `pred`, in x's dtype."""

    def output(x, t):
        alpha, sigma = process.alpha(t.double()), process.sigma(t.double())
        centred = (x.double() - alpha * mu) / (alpha**2 * s**2 + sigma**2)
        x0, eps = mu + alpha * s**2 * centred, sigma * centred
        return process.target(pred, x0, eps, t).to(x.dtype)

    return output


class Mixture:
    """x_0 of two Gaussians, elementwise, under a flow: (x - x_0) / t of the expected x_0."""

    weights, means, stds = torch.tensor([[0.4, 0.6], [-0.7, 0.5], [0.2, 0.3]]).double()

    def velocity(self, x, t):
        alpha, x = 1 - t, x[..., None]
        variance = (alpha * self.stds)**2 + t**2
        centred = x - alpha * self.means
        log_p = self.weights.log() - variance.log() / 2 - centred**2 / (2 * variance)
        x0 = self.means + alpha * self.stds**2 / variance * centred
        return (x - x0).mul(log_p.softmax(-1)).sum(-1) / t

    def normal_quantile(self, x):
        """The flow keeps quantiles: the x_1 ~ N(0, 1) from which it comes to x_0 = x."""
        share = torch.special.ndtr((x[..., None] - self.means) / self.stds)
        return torch.special.ndtri((self.weights * share).sum(-1))


def ode_solution(process, x, mu, s, t_end, t_start=1.0):
    """Where the probability flow takes x from t_start to t_end: (x_t - alpha mu) / std(x_t) is
    constant.
    """
    def mean_and_std(t):
        t = torch.tensor(t, dtype=torch.float64)
        return process.alpha(t) * mu, (process.alpha(t)**2 * s**2 + process.sigma(t)**2).sqrt()

    mean_start, std_start = mean_and_std(t_start)
    mean_end, std_end = mean_and_std(t_end)
    return mean_end + std_end / std_start * (x - mean_start)
