"""Averaging of parameters."""

import itertools

import numpy as np
import pytest
import runs
import torch
from safetensors.torch import load_file

from configs import common
from libs.train.ema import EMA, _overlap, fit_average, get_power, make_averages


def test_the_average_is_a_frozen_float32_copy_without_heads_that_sampling_does_not_need():
    """Parameters follow by name, also where the head that stays out lies between; buffers stay."""
    heads = {"internal": torch.nn.BatchNorm1d(4), "repa": torch.nn.Linear(2, 3)}
    model, heads["internal"].sampled, heads["repa"].sampled = torch.nn.Module(), True, False
    model.heads, model.last = torch.nn.ModuleDict(heads), torch.nn.Linear(2, 3)
    ema = EMA(model.bfloat16(), 0.999)
    found = dict(ema.model.named_parameters())
    before = {name: parameter.clone() for name, parameter in found.items()}
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        tensor.data += 1
    ema.update(model)
    expected = {n: p for n, p in model.named_parameters() if not n.startswith("heads.repa")}
    assert found.keys() == expected.keys() and len(found) == 4
    for name, parameter in found.items():
        assert parameter.dtype == torch.float32 and not parameter.requires_grad
        # float32's rounding; bfloat16, with 8 bits, would lose so small a change
        wanted = before[name] + 1e-3 * (expected[name].float() - before[name])
        torch.testing.assert_close(parameter, wanted, rtol=1e-6, atol=1e-7)
        assert expected[name].requires_grad
    assert model.training and not ema.model.training
    assert torch.equal(ema.model.heads["internal"].running_mean, torch.zeros(4))


def test_averages_have_the_weights_of_their_formulas():
    """Two gammas (arXiv 2312.02696, section 3.1); a step weighs the profile's integral over it. By
    a rate it weighs (1 - rate) rate^(steps since), beginning with the weights at the start, here 0.
    """
    assert [get_power(0.05) - 1, get_power(0.1) - 1] == pytest.approx([16.97, 6.94], abs=5e-3)
    model, settings = torch.nn.Linear(400, 1, bias=False), common.get_config().train
    settings.ema_lengths, settings.ema_rate = (0.1,), 0.99
    model.weight.data.zero_()
    by_rate, by_length = make_averages(model, settings).values()
    for step in range(1, 401):
        model.weight.data = torch.eye(400)[step - 1 : step]
        by_rate.update(model, step)
        by_length.update(model, step)
    # 400 roundings of float32, of numbers below 0.02
    for average, expected in (
        (by_rate, 0.01 * 0.99 ** np.arange(399, -1, -1)), (by_length, integrate(1, 0.1, 400)),
    ):  # fmt: skip
        np.testing.assert_allclose(average.model.weight[0], expected, rtol=0, atol=1e-7)


def integrate(step, length, n):
    """Integrals of a profile over n bins of [0, 1]."""
    return np.diff(np.minimum(np.arange(n + 1) / n / step, 1) ** get_power(length))


def test_an_average_of_any_length_from_those_of_two():
    """Of noise on weights that stay: its error is the distance of the profiles in closed form."""
    for first, second in ((0.25, 0.05), (1.0, 0.1)), ((0.5, 0.08), (0.5, 0.2)):
        summed = 4000 * integrate(*first, 4000) @ integrate(*second, 4000)
        closed = _overlap(first[0], get_power(first[1]), second[0], get_power(second[1]))
        assert closed == pytest.approx(summed, rel=1e-4)  # (power / 4000)^2 / 12 and less

    model, settings, saved = torch.nn.Linear(20_000, 1, bias=False), common.get_config().train, {}
    settings.ema_lengths = (0.05, 0.1, 0.03, 0.08, 0.2)
    averages, rng = make_averages(model, settings), torch.Generator().manual_seed(0)
    for step in range(1, 401):
        model.weight.data = 30 + torch.randn(1, 20_000, generator=rng)
        for name, average in averages.items():
            average.update(model, step)
            if step % 100 == 0:
                saved[step, name[16:]] = average.model.weight.data.double()
    kept = [(step, length) for step in (100, 200, 300, 400) for length in ("0.05", "0.1")]
    for length in ("0.03", "0.08", "0.2"):
        steps, lengths = zip(*((step, float(kind)) for step, kind in kept), strict=True)
        coefficients, error = fit_average(steps, lengths, 400, float(length))
        found = sum(c * saved[key] for c, key in zip(coefficients, kept, strict=True))
        measured = (found - saved[400, length]).norm() / (saved[400, length] - 30).norm()
        # Three standard deviations of the norm of 20,000 normal numbers, twice.
        assert measured.item() == pytest.approx(error, rel=0.02)


def test_averages_of_a_run_are_added_up_and_sampled_by_their_files(in_process, tmp_path, capsys):
    tiny = dict(train__num_workers=0, train__fid_samples=0, train__grid_samples=0)
    assert in_process("train", runs.arguments(tmp_path, **tiny)) == 0
    steps, lengths, out = [4, 4, 8, 8, 12, 12], [0.05, 0.1] * 3, tmp_path / "0.08.safetensors"
    kept = [
        tmp_path / "ckpts" / f"{step}.ckpt" / f"nnet_ema_length_{length}.safetensors"
        for step, length in zip(steps, lengths, strict=True)
    ]
    words = ["--length=0.08", f"--out={out}"]
    assert in_process("scripts.posthoc_ema", [f"--workdir={tmp_path}", *words]) == 0
    coefficients, _ = fit_average(steps, lengths, 12, 0.08)
    for name, tensor in load_file(out).items():
        wanted = sum(c * load_file(file)[name] for c, file in zip(coefficients, kept, strict=True))
        torch.testing.assert_close(tensor, wanted, rtol=1e-5, atol=1e-6)  # float32
    pictures, picture = set(), tmp_path / "picture.png"
    for file in kept[-1].with_name("nnet_ema.safetensors"), kept[-1], out:
        assert in_process("sample", [f"--nnet_path={file}", "--n=1", f"--out={picture}"]) == 0
        pictures.add(picture.read_bytes())
    assert len(pictures) == 3
    assert in_process("scripts.posthoc_ema", [f"--workdir={tmp_path}/no", *words]) == 1
    runs.assert_one_sentence(1, capsys.readouterr().err, "train.ema_lengths=")
