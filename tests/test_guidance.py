"""Guidance: classifier-free and internal, by formula, batches and interval."""

import functools

import pytest
import torch

from configs.common import d
from libs.diffusion.guidance import at_process_time, make_guided
from libs.diffusion.samplers import count_calls
from sde import VPSDE, DiscreteSchedule, Flow
from utils import UserError

NULL = 10
Y = torch.tensor([3, 7])
X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("y, scale", [(Y, 0), (None, 0.5), (Y, 0.5)])
@pytest.mark.parametrize("internal", [0, 0.7])
def test_guidance(y, scale, internal):
    """cond + scale (cond - uncond) of both halves in one batch, of one half where labels or scale
    are missing; out + internal (out - inner), which corrects both halves first; each in its
    interval alone, ends included.
    """
    settings = d(cfg=True, scale=scale, guidance_interval=(0.3, 0.6), internal_scale=internal,
                 internal_interval=(0.5, 0.8))
    given = dict(pred="velocity_pred", null_label=NULL, settings=settings)
    calls = []

    def network(x, t, y, hidden=()):
        calls.append((hidden, None if y is None else y.tolist()))
        out = x * t.reshape(-1, 1, 1, 1) + (0 if y is None else y.reshape(-1, 1, 1, 1))
        return (out, {"internal": out / 2 - 3}) if hidden else out

    def expect(t, label):
        out = X * 1000 * t + label
        return out + internal * (out - (out / 2 - 3)) if 0.5 <= t <= 0.8 else out

    output, guided = make_guided(network, Flow(), y, **given), y is not None and scale
    for t in (0.29, 0.3, 0.49, 0.5, 0.6, 0.61, 0.8, 0.81):
        expected, labels = expect(t, 0 if y is None else Y.reshape(-1, 1, 1, 1)), [3, 7]
        if guided and 0.3 <= t <= 0.6:
            expected = expected + scale * (expected - expect(t, NULL))
            labels = [3, 7, NULL, NULL]
        torch.testing.assert_close(output(X, torch.tensor(t)), expected, rtol=1e-6, atol=1e-4)
        head = ("internal",) if internal and 0.5 <= t <= 0.8 else ()
        assert calls.pop() == (head, None if y is None else labels) and not calls
    # Of one image in ten steps: t = 0.6, 0.5, 0.4, 0.3, at which steps end and start, take both.
    y = None if y is None else Y[:1]
    make_output = functools.partial(make_guided, process=Flow(), y=y, **given)
    options = dict(pred="velocity_pred", algorithm="heun", steps=10)
    assert count_calls(Flow(), (3, 4, 4), make_output, **options) == (27 if guided else 19)


@pytest.mark.parametrize("process", [VPSDE(), DiscreteSchedule()])
@pytest.mark.parametrize("t", [torch.tensor(0.25), torch.tensor([0.25, 0.5])])
def test_the_network_gets_a_time_an_image_and_may_give_hidden_tokens(process, t):
    calls = []

    def network(x, time, y, hidden=()):
        calls.append((time, y))
        out = x.bfloat16()
        return (out, {k: k * x for k in hidden}) if hidden else out

    predict = at_process_time(network, process)
    out, (second, inner) = predict(X, t, Y), predict(X, t, Y, hidden=(8,))
    assert out.dtype == torch.float32 and torch.equal(out, second)
    assert torch.equal(inner[8], 8 * X)
    for time, y in calls:
        assert torch.equal(time, process.model_time(t).expand(2)) and y is Y


@pytest.mark.parametrize("guidance, process, message", [
    ("no_such", VPSDE(), "sample.guidance is 'no_such'.*classifier_free"),
    (None, object(), "upsampling guidance needs alpha_bar, which process object"),
])
def test_errors(guidance, process, message):
    settings = d(guidance=guidance, cfg=False)
    with pytest.raises(UserError, match=message):
        make_guided(None, process, Y, pred="noise_pred", null_label=NULL, settings=settings,
                    upsample={"m": 2})
