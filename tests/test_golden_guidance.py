"""Upsampling guidance and its sampler against the official code's numbers."""

import golden_cases
import numpy as np
import pytest
import torch
from golden_cases import assert_close

from configs.common import d
from libs.diffusion import guidance
from libs.diffusion.samplers import sample
from sde import DiscreteSchedule

# Tolerances of the golden README.
SINGLE_TOL = 5e-6
WHOLE_RUN_TOL = 3e-3


def toy_network(scale=1.0):
    """The case's network as f(x, t, y) of process times, and a list of its calls."""
    calls = []

    def predict(x, t, y):
        time = torch.as_tensor(t).float() * 1000
        calls.append((list(x.shape[-2:]), float(time.max())))
        time = time.expand(len(x)).view(-1, 1, 1, 1)
        out = 0.6 * x + 0.3 * x.roll(1, -1) - 0.2 * x.roll(1, -2) + 0.1 * (time / 50).sin()
        out = out + 0.05 * (time / 7).cos() * x
        return scale * (out + 0.02 * (y.view(-1, 1, 1, 1) + 1) * x.mean(1, keepdim=True))

    return predict, calls


def guided(case, y, scale=1.0):
    predict, calls = toy_network(scale)
    settings = d(cfg=True, scale=case["scale"], guidance_interval=None)
    output = guidance.classifier_free(predict, y, case["K"], settings)
    strength = case["m"], case["ug_theta"], case["ug_eta"], case["ug_T"]
    return guidance.upsampling(output, DiscreteSchedule(), "noise_pred", *strength), calls


@pytest.mark.parametrize("case, arrays", golden_cases.params("get_tau"))
def test_low_resolution_times(case, arrays):
    process = DiscreteSchedule()
    t = torch.from_numpy(arrays["t"])
    for m in case["m"]:
        tau = torch.stack([guidance.low_resolution_time(process, time, m) for time in t])
        clamped = np.minimum(1 - np.arange(1000, dtype=np.float32) / np.float32(999), 1)
        # Near ties an honest float32 result may be one entry off.
        low = np.minimum(clamped[arrays[f"index_hi_m{m}"]], arrays["t"]) - 1e-6
        high = np.minimum(clamped[arrays[f"index_lo_m{m}"]], arrays["t"]) + 1e-6
        assert ((tau.numpy() >= low) & (tau.numpy() <= high)).all(), m
        batched = guidance.low_resolution_time(process, torch.from_numpy(arrays["batched_t"]), m)
        assert_close(batched, arrays[f"batched_tau_m{m}"], 1.1e-3)


@pytest.mark.parametrize("case, arrays", golden_cases.params("upsample_guidance"))
def test_one_evaluation(case, arrays):
    x, y, times = (torch.from_numpy(arrays[name]) for name in ("x", "y", "t"))
    for k, t in enumerate(times):
        output, calls = guided(case, y)
        assert_close(output(x, t), arrays["out"][k], SINGLE_TOL, f"t = {t}")
        # Guidance halves in one batch here, one after the other there.
        expected = case["network_calls_per_t"][k][::2]
        assert [size for size, _ in calls] == [call["x_shape"][-2:] for call in expected]
        network_times = [call["network_time"][0] for call in expected]
        assert [time for _, time in calls] == pytest.approx(network_times, abs=1e-3)


@pytest.mark.parametrize("case, arrays", golden_cases.params("sampler_upsample_g"))
def test_the_whole_sampler(case, arrays):
    output, calls = guided(case, torch.from_numpy(arrays["y"]), scale=0.5)
    options = dict(pred="noise_pred", algorithm="dpm_solver_upsample_g", steps=case["steps"])
    result = sample(output, DiscreteSchedule(), torch.from_numpy(arrays["x_init"]), **options)
    assert_close(result, arrays["out"], WHOLE_RUN_TOL)
    expected = case["network_calls"][::2]
    assert [size for size, _ in calls] == [call["HW"] for call in expected]
    network_times = [call["network_time"] for call in expected]
    assert [time for _, time in calls] == pytest.approx(network_times, abs=1.1)
