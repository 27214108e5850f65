"""Processes and losses beyond the golden numbers: exact times, draws, predictions."""

import pytest
import torch

from sde import VPSDE, DiscreteSchedule, denoising_loss, eps_from_model

PROCESSES = [VPSDE(), DiscreteSchedule()]


def test_the_network_gets_whole_steps_in_training():
    process = DiscreteSchedule()
    u = torch.cat([(torch.arange(1000) + 0.5) / 1000, torch.tensor([0.0, 1 - 2**-24])])
    expected = torch.cat([torch.arange(1, 1001), torch.tensor([1, 1000])]).float()
    t = process.time_from_uniform(u)
    assert torch.equal(process.model_time(t), expected)
    assert torch.equal(t, (expected.double() / 1000).float())
    assert (t * 1000 != expected).any()  # what the naive product would have given
    between = torch.tensor([0.25049, 0.9001, 0.00105])
    assert torch.equal(process.model_time(between), between * 1000)


def test_training_mixes_with_the_table_of_the_step():
    process = DiscreteSchedule()
    n = torch.arange(1, 1001)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64)**2
    cum_alpha = (1 - betas).cumprod(0)
    t = (n.double() / 1000).float()
    one, zero = torch.ones(1000, 1), torch.zeros(1000, 1)
    assert torch.equal(process.sample(one, t=t, eps=zero)[2][:, 0], cum_alpha.sqrt().float())
    assert torch.equal(process.sample(zero, t=t, eps=one)[2][:, 0], (1 - cum_alpha).sqrt().float())


@pytest.mark.parametrize("process", PROCESSES)
def test_draws_come_from_the_generator(process):
    x0 = torch.full((512, 1, 8, 8), 2.0)
    draws = [process.sample(x0, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    for a, b, c in zip(*draws, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
    t, eps, x_t = draws[0]
    assert 0 <= t.min() < 0.02
    assert 0.98 < t.max() <= 1
    assert abs(eps.std() - 1) < 0.02
    alpha, sigma = (f(t.double()).reshape(-1, 1, 1, 1) for f in (process.alpha, process.sigma))
    torch.testing.assert_close(x_t.double(), alpha * x0 + sigma * eps, rtol=0, atol=1e-5)


@pytest.mark.parametrize("process", PROCESSES)
def test_float64_schedule(process):
    t = torch.linspace(1e-3, 1, 777, dtype=torch.float64)
    alpha, sigma = process.alpha(t), process.sigma(t)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t), rtol=1e-14, atol=0)
    torch.testing.assert_close(process.lam(t), (alpha / sigma).log(), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(process.inverse_lam(process.lam(t)), t, rtol=1e-10, atol=0)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("time", [torch.tensor(0.25), torch.tensor([0.25, 0.5])])
def test_both_predictions_give_the_same_noise(process, time):
    x0, eps = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    t, _, x_t = process.sample(x0, t=time.expand(2), eps=eps)
    calls = []

    def network(result):
        def model(x, time, y):
            calls.append((time, y))
            return result
        return model

    y = torch.tensor([3, 1])
    assert torch.equal(eps_from_model(network(eps), process, "noise_pred")(x_t, time, y), eps)
    # The table of step n and the interpolation differ by up to 1e-6 in alpha.
    from_x0 = eps_from_model(network(x0), process, "x0_pred")(x_t, time, y)
    torch.testing.assert_close(from_x0, eps, rtol=0, atol=2e-5)
    for model_time, labels in calls:
        assert model_time.shape == (2,)
        assert torch.equal(model_time, process.model_time(t))
        assert labels is y


def test_loss_passes_keywords_on_and_has_gradients():
    scale = torch.tensor(2.0, requires_grad=True)

    def model(x, t, y, *, shift):
        return scale.bfloat16() * torch.ones_like(x).bfloat16() + shift

    x0 = torch.zeros(3, 1, 2, 2)
    eps = torch.tensor([0.0, 1.0, 5.0]).reshape(3, 1, 1, 1).expand_as(x0)
    loss = denoising_loss(model, VPSDE(), x0, None, pred="noise_pred", t=torch.full((3,), 0.5),
                          eps=eps, shift=1.0)
    assert loss.dtype == torch.float32
    assert loss.tolist() == [9.0, 4.0, 4.0]
    loss.sum().backward()
    assert scale.grad.item() == 2 * (3 + 2 - 2)


def test_unknown_prediction():
    with pytest.raises(ValueError, match="'v_pred'.*noise_pred, x0_pred"):
        eps_from_model(None, VPSDE(), "v_pred")
    with pytest.raises(ValueError, match="'v_pred'.*noise_pred, x0_pred"):
        denoising_loss(None, VPSDE(), None, None, pred="v_pred", t=None, eps=None)
