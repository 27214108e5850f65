"""Processes and losses beyond the golden numbers: exact times, conversions, velocities."""

import itertools

import gaussian
import pytest
import torch

from libs.diffusion.guidance import at_process_time
from sde import VPSDE, DiscreteSchedule, Flow, FlowFromDiscrete, make_process
from utils import UserError

BOTH = pytest.mark.parametrize("process", [VPSDE(), DiscreteSchedule()])


def test_the_network_gets_whole_steps_in_training():
    process = DiscreteSchedule()
    u = torch.cat([(torch.arange(1000) + 0.5) / 1000, torch.tensor([0.0, 1 - 2**-24])])
    expected = torch.cat([torch.arange(1, 1001), torch.tensor([1, 1000])]).float()
    t = process.train_time(u)
    assert torch.equal(process.model_time(t), expected)
    assert torch.equal(t, (expected.double() / 1000).float())
    assert (t * 1000 != expected).any()  # what the naive product would have given
    between = torch.tensor([0.25049, 0.9001, 0.00105])
    assert torch.equal(process.model_time(between), between * 1000)


def test_training_mixes_with_the_table_of_the_step():
    process = DiscreteSchedule()
    n = torch.arange(1, 1001)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64)**2
    alpha_bar = (1 - betas).cumprod(0)
    t = (n.double() / 1000).float()
    one, zero = torch.ones(1000, 1), torch.zeros(1000, 1)
    assert torch.equal(process.mix(one, zero, t)[:, 0], alpha_bar.sqrt().float())
    assert torch.equal(process.mix(zero, one, t)[:, 0], (1 - alpha_bar).sqrt().float())
    torch.testing.assert_close(process.betas(), betas, rtol=1e-9, atol=0)


@BOTH
def test_float64_schedule(process):
    t = torch.linspace(1e-3, 1, 777, dtype=torch.float64)
    alpha, sigma, lam = process.alpha(t), process.sigma(t), process.half_log_snr(t)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t), rtol=1e-14, atol=0)
    torch.testing.assert_close(lam, (alpha / sigma).log(), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(process.inverse_half_log_snr(lam), t, rtol=1e-10, atol=0)


@pytest.mark.parametrize("process, pred", [
    *itertools.product([VPSDE(), DiscreteSchedule()], ["noise_pred", "x0_pred"]),
    *itertools.product([Flow(shift=3.0)], Flow.predictions),
])
@pytest.mark.parametrize("time", [torch.tensor(0.2505), torch.tensor([0.2505, 0.4995])])
def test_conversions_undo_the_mixing(process, pred, time):
    time = time.double()
    x0, eps = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()

    def path(t):
        factors = (f(t).reshape(-1, 1, 1, 1) for f in (process.alpha, process.sigma))
        return sum(f * z for f, z in zip(factors, (x0, eps), strict=True))

    x_t, out = path(time), process.target(pred, x0, eps, time)
    found = process.to_x0_eps(pred, out, x_t, time)
    if pred != "velocity_pred":
        assert any(z is out for z in found)  # the predicted one costs no arithmetic
    for z, expected in zip(found, (x0, eps), strict=True):
        torch.testing.assert_close(z, expected, rtol=0, atol=1e-11)
    h = 1e-6  # the times lie between steps, where the discrete schedule is smooth
    expected = (path(time + h) - path(time - h)) / (2 * h)
    found = process.velocity(pred, out, x_t, time)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


# --- flow ---


@pytest.mark.parametrize("pred", Flow.predictions)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ends_of_flow_stay_finite(pred, dtype):
    """At t = 1 x_t is the noise, at t = 0 the data; what the output cannot say there is 0."""
    process, t = Flow(), torch.tensor([0.0, 1.0], dtype=dtype)
    x0, eps = torch.randn(2, 2, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    x_t, out = process.mix(x0, eps, t), process.target(pred, x0, eps, t)
    assert torch.equal(x_t, torch.stack([x0[0], eps[1]]))
    expected = [x0 * (t < 1)[:, None] if pred == "noise_pred" else x0,
                eps * (t > 0)[:, None] if pred == "x0_pred" else eps]
    found = process.to_x0_eps(pred, out, x_t, t) + (process.velocity(pred, out, x_t, t),)
    for z, wanted in zip(found, [*expected, expected[1] - expected[0]], strict=True):
        # two sums of numbers below 4
        torch.testing.assert_close(z, wanted, rtol=0, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("s", [1.0, 1.7, 3.0])
def test_the_shift_is_more_noise(s):
    """s times as much noise as at the even time has its signal-to-noise ratio; the ends stay."""
    process, even = Flow(shift=s), torch.linspace(0, 1, 1001)
    t = process.shift_time(even)
    assert t[0] == 0 and t[-1] == 1 and (t.diff() > 0).all() and (s > 1 or torch.equal(t, even))
    t, even = t[1:-5].double(), even[1:-5].double()  # float32 rounds 1 - t to 4e-5 of it
    expected = Flow().half_log_snr(even) - torch.tensor(s).log()
    torch.testing.assert_close(process.half_log_snr(t), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("mean, std, shift", [(0.0, 1.0, 1.0), (-0.4, 0.8, 2.0)])
def test_logit_normal_times(mean, std, shift):
    """Quantiles of sigmoid(N(mean, std^2)), shifted; finite for every u that a draw may be."""
    process = Flow("logit_normal", mean=mean, std=std, shift=shift)
    logit = mean + std * torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor([0.1, 0.5, 0.9]))
    expected = 1 / (1 + (-logit).exp() / shift)
    u = (torch.arange(100_000) + 0.5) / 100_000
    found = process.train_time(u).quantile(torch.tensor([0.1, 0.5, 0.9]))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    ends = process.train_time(torch.tensor([0.0, 1 - 2**-24]))
    assert 0 < ends[0] < 0.03 and 0.97 < ends[1] < 1


# --- from the published weights' process to flow ---

MU, S = 0.3, 0.5


def trained_by_vp(x, step, y):
    """A perfect network for data N(MU, S^2) under DiscreteSchedule: x (B, ...), step (B,)."""
    log_alpha = DiscreteSchedule().log_alpha(step.double() / 1000)
    return gaussian.noise_prediction(x, MU, S, log_alpha.reshape(-1, *[1] * (x.dim() - 1)))


def test_a_network_of_the_discrete_schedule_has_the_velocity_of_flow():
    process = FlowFromDiscrete()
    t = torch.linspace(2e-3, process.end, 500, dtype=torch.float64)
    x = torch.randn(500, 1, generator=torch.Generator().manual_seed(0)).double()
    out = at_process_time(trained_by_vp, process)(x, t, None)
    expected = gaussian.prediction(Flow(), "velocity_pred", MU, S)(x, t[:, None])
    found = process.velocity("noise_pred", out, x, t)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_what_such_a_network_learns():
    """Its target implies x0 beyond the end too; a perfect network's loss is the noise's variance
    given x_t. The mean of 4096 squares is off by 0.022 of itself.
    """
    process, rng = FlowFromDiscrete(times="logit_normal"), torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 6, 4096, generator=rng, dtype=torch.float64)
    t = torch.tensor([0.0, 0.5, 0.93, 0.95, 0.99, 1.0], dtype=torch.float64)
    out, x_t = process.target("noise_pred", x0, eps, t), process.mix(x0, eps, t)
    found = process.to_x0_eps("noise_pred", out, x_t, t)
    torch.testing.assert_close(found, (x0, eps), rtol=0, atol=1e-12)
    u = torch.tensor([0.01, 0.3, 0.5, 0.8, 0.9, 0.99], dtype=torch.float64)
    given, t = dict(pred="noise_pred", u=u, eps=eps), process.train_time(u)
    losses = gaussian.training_loss(trained_by_vp, process, MU + S * x0, None, **given).double()
    clean = ((1 - t) * S).square()
    torch.testing.assert_close(losses, clean / (clean + t.square()), rtol=0.1, atol=0)


def test_processes_by_name():
    with pytest.raises(UserError, match="process.times is 'normal', expected.*uniform, logit_n"):
        make_process("flow", times="normal")
    assert make_process("vpsde", beta_max=10.0).g2(torch.tensor(1.0)) == 10
    with pytest.raises(UserError, match="process.name is 'vp'.*vpsde, discrete"):
        make_process("vp")
