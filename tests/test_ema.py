"""Averaging of parameters."""

import torch

from libs.train.ema import EMA


def make_model(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))


def randomise(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))


def test_average_is_the_weighted_sum():
    model, rate = make_model(), 0.9
    ema = EMA(model, rate)
    history = [[p.detach().double().clone() for p in model.parameters()]]
    for step in range(5):
        randomise(model, step)
        ema.update(model)
        history.append([p.detach().double().clone() for p in model.parameters()])
    weights = [rate**5] + [(1 - rate) * rate**(4 - step) for step in range(5)]
    for i, average in enumerate(ema.model.parameters()):
        expected = sum(weight * values[i] for weight, values in zip(weights, history, strict=True))
        # five float32 roundings of values below 4
        torch.testing.assert_close(average.double(), expected, rtol=0, atol=1e-6)


def test_only_parameters_follow():
    model = make_model()
    ema = EMA(model, 0)
    model(torch.randn(8, 3))
    randomise(model, 1)
    ema.update(model)
    for average, parameter in zip(ema.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(average, parameter)
    assert torch.equal(ema.model[1].running_mean, torch.zeros(4))
    assert not torch.equal(model[1].running_mean, torch.zeros(4))


def test_the_average_is_a_frozen_float32_copy():
    model = make_model().bfloat16()
    ema = EMA(model, 0.999)
    assert not ema.model.training
    assert model.training
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in ema.model.parameters())
    assert all(p.requires_grad for p in model.parameters())
    before = ema.model[0].weight.clone()
    model[0].weight.data.add_(1)
    ema.update(model)
    change = ema.model[0].weight - before
    # bfloat16, with 8 bits, would lose so small a change
    torch.testing.assert_close(change, torch.full_like(change, 1e-3), rtol=1e-2, atol=0)


def test_the_average_has_the_heads_that_sampling_needs():
    """And follows the others by name: the heads lie before the last layer."""
    model = torch.nn.Module()
    model.heads = torch.nn.ModuleDict({"repa": torch.nn.Linear(2, 3), "internal": make_model()})
    model.last = torch.nn.Linear(2, 3)
    model.heads["repa"].sampled, model.heads["internal"].sampled = False, True
    ema = EMA(model, 0.5)
    before = ema.model.state_dict()
    assert before.keys() == {n for n in model.state_dict() if not n.startswith("heads.repa")}
    assert {name.split(".")[0] for name in before} == {"heads", "last"}
    expected = {name: average.clone() for name, average in ema.model.named_parameters()}
    randomise(model, 3)
    ema.update(model)
    for name, average in ema.model.named_parameters():
        mean = (expected[name] + model.get_parameter(name)) / 2
        torch.testing.assert_close(average, mean, rtol=1e-6, atol=1e-6)  # float32
