"""Processes and losses beyond the golden numbers: exact times, conversions, velocities."""

import pytest
import torch

from sde import PROCESSES, VPSDE, DiscreteSchedule, make_process
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


@BOTH
@pytest.mark.parametrize("pred", ["noise_pred", "x0_pred"])
@pytest.mark.parametrize("time", [torch.tensor(0.2505), torch.tensor([0.2505, 0.4995])])
def test_conversions_undo_the_mixing(process, pred, time):
    time = time.double()
    x0, eps = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()

    def path(t):
        factors = (f(t).reshape(-1, 1, 1, 1) for f in (process.alpha, process.sigma))
        return sum(f * z for f, z in zip(factors, (x0, eps), strict=True))

    x_t, out = path(time), process.target(pred, x0, eps, time)
    found = process.to_x0_eps(pred, out, x_t, time)
    assert any(z is out for z in found)  # the predicted one costs no arithmetic
    for z, expected in zip(found, (x0, eps), strict=True):
        torch.testing.assert_close(z, expected, rtol=0, atol=1e-11)
    h = 1e-6  # the times lie between steps, where the discrete schedule is smooth
    expected = (path(time + h) - path(time - h)) / (2 * h)
    found = process.velocity(pred, out, x_t, time)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


def test_processes_by_name():
    assert {"vpsde", "discrete"} <= PROCESSES.keys()
    assert make_process("vpsde", beta_max=10.0).g2(torch.tensor(1.0)) == 10
    with pytest.raises(UserError, match="process.name is 'vp'.*vpsde, discrete"):
        make_process("vp")
