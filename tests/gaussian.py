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
    """The raw output(x, t) of a perfect network for 'noise_pred' or 'x0_pred', in x's dtype."""

    def output(x, t):
        eps = noise_prediction(x, mu, s, process.log_alpha(t.double()))
        x0, eps = process.to_x0_eps("noise_pred", eps, x.double(), t.double())
        return (eps if pred == "noise_pred" else x0).to(x.dtype)

    return output


def ode_solution(process, x, mu, s, t_end):
    """Where the probability flow takes x from t = 1 to t_end: (x_t - alpha mu) / std(x_t) is
    constant.
    """
    def mean_and_std(t):
        t = torch.tensor(t, dtype=torch.float64)
        return process.alpha(t) * mu, (process.alpha(t)**2 * s**2 + process.sigma(t)**2).sqrt()

    mean_start, std_start = mean_and_std(1.0)
    mean_end, std_end = mean_and_std(t_end)
    return mean_end + std_end / std_start * (x - mean_start)
