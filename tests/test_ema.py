"""Averaging of parameters."""

import numpy as np
import pytest
import runs
import torch
from safetensors.torch import load_file

from configs import common
from libs.train.ema import EMA, _overlap, fit_average, get_power, make_averages, make_power_rate


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


def test_power_functions_have_the_paper_s_exponents_and_weights():
    """gamma of two lengths (arXiv 2312.02696, section 3.1), and what (1 - 1 / step)^(gamma + 1)
    comes to: a step's weight is the profile's integral over it.
    """
    power, rate = get_power(0.1), make_power_rate(0.1)
    assert [get_power(0.05) - 1, power - 1] == pytest.approx([16.97, 6.94], abs=5e-3)
    steps, weights = np.arange(1, 401), np.zeros(400)
    for step in steps:
        weights *= rate(step)
        weights[step - 1] = 1 - rate(step)
    np.testing.assert_allclose(weights, np.diff((np.arange(401) / 400) ** power), rtol=1e-9)
    # The standard deviation of the times over the run; bins of 1 / 400 are the tolerance.
    deviation = np.sqrt(weights @ (steps / 400) ** 2 - (weights @ (steps / 400)) ** 2)
    assert deviation == pytest.approx(0.1, abs=1 / 400)


def bin_profile(step, length, n=4000):
    """Integrals of a profile over n bins of [0, 1]."""
    edges = np.minimum(np.arange(n + 1) / n / step, 1)
    return np.diff(edges ** get_power(length))


def test_an_average_of_any_length_from_those_of_two():
    """Of noise on weights that stay: its error is the distance of the profiles in closed form."""
    steps, lengths = np.repeat([100, 200, 300, 400], 2), np.tile([0.05, 0.1], 4)
    for first, second in ((0.25, 0.05), (1.0, 0.1)), ((0.5, 0.08), (0.5, 0.2)):
        summed = 4000 * bin_profile(*first) @ bin_profile(*second)
        powers = get_power(first[1]), get_power(second[1])
        closed = _overlap(first[0], powers[0], second[0], powers[1])
        assert closed == pytest.approx(summed, rel=1e-4)  # (power / 4000)^2 / 12 and less

    model, settings = torch.nn.Linear(20_000, 1, bias=False), common.get_config().train
    settings.ema_lengths = (0.05, 0.1, 0.03, 0.08, 0.2)
    averages, saved = make_averages(model, settings), {}
    for step in range(1, 401):
        randomise(model, step)
        model.weight.data += 30
        for average in averages.values():
            average.update(model, step)
        for length in settings.ema_lengths:
            tensor = averages[f"nnet_ema_length_{length}"].model.weight.data
            saved[step, length] = tensor.double().clone()
    for target in (0.03, 0.08, 0.2):
        coefficients, error = fit_average(steps, lengths, 400, target)
        assert coefficients.sum() == pytest.approx(1, abs=1e-12)
        parts = zip(coefficients, steps, lengths, strict=True)
        found = sum(c * saved[step, length] for c, step, length in parts)
        wanted = saved[400, target]
        # Three standard deviations of the norm of 20,000 normal numbers.
        measured = (found - wanted).norm() / (wanted - 30).norm()
        assert measured.item() == pytest.approx(error, rel=0.02)


def test_averages_of_a_run_are_added_up_and_sampled_by_their_files(in_process, tmp_path, capsys):
    """posthoc_ema.py over the checkpoints of a real run, at a length that needs none of them but
    one, and at one that needs all.
    """
    tiny = dict(train__num_workers=0, train__fid_samples=0, train__grid_samples=0)
    assert in_process("train", runs.arguments(tmp_path, **tiny)) == 0
    files = [
        tmp_path / "ckpts" / f"{step}.ckpt" / f"nnet_ema_length_{length}.safetensors"
        for step in (4, 8, 12) for length in (0.05, 0.1)
    ]  # fmt: skip
    kept = [load_file(file) for file in files]
    for length in (0.1, 0.08):
        out = tmp_path / f"{length}.safetensors"
        words = [f"--workdir={tmp_path}", f"--length={length}", f"--out={out}"]
        assert in_process("scripts.posthoc_ema", words) == 0
        coefficients, _ = fit_average([4, 4, 8, 8, 12, 12], [0.05, 0.1] * 3, 12, length)
        found = load_file(out)
        assert found.keys() == kept[0].keys()
        for name, tensor in found.items():
            parts = zip(coefficients, kept, strict=True)
            wanted = sum(c * part[name].double() for c, part in parts)
            assert tensor.dtype == torch.float32
            torch.testing.assert_close(tensor.double(), wanted, rtol=2**-23, atol=0)
            if length == 0.1:
                torch.testing.assert_close(tensor, kept[-1][name], rtol=1e-6, atol=1e-6)  # float32
    pictures, usual = [], files[-1].with_name("nnet_ema.safetensors")
    for file in usual, files[-1], tmp_path / "0.1.safetensors":
        pictures.append(tmp_path / f"{len(pictures)}.png")
        assert in_process("sample", [f"--nnet_path={file}", "--n=1", f"--out={pictures[-1]}"]) == 0
    first, length, added = (picture.read_bytes() for picture in pictures)
    assert first != length == added
    assert in_process("scripts.posthoc_ema", [f"--workdir={tmp_path}/no", *words[1:]]) == 1
    runs.assert_one_sentence(1, capsys.readouterr().err, "train.ema_lengths=(0.05,0.1)")
