"""Guidance: classifier-free by formula, batches and interval; a new one by name."""

import functools

import pytest
import torch

from configs.common import d
from libs.diffusion.guidance import at_process_time, classifier_free, make_guided
from libs.diffusion.samplers import count_calls
from sde import VPSDE, DiscreteSchedule, Flow
from utils import UserError

NULL = 10
Y = torch.tensor([3, 7])
X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


class Network:
    def __init__(self):
        self.labels = []

    def __call__(self, x, t, y):
        self.labels.append(None if y is None else y.tolist())
        return x * t + (0 if y is None else y.reshape(-1, 1, 1, 1))


def guided(network, y, scale, interval=None):
    return classifier_free(network, y, NULL, d(cfg=True, scale=scale, guidance_interval=interval))


def test_guided_prediction():
    network, t = Network(), torch.tensor(0.5)
    out = guided(network, Y, 0.4)(X, t)
    cond, uncond = Y.reshape(-1, 1, 1, 1) + X * t, NULL + X * t
    torch.testing.assert_close(out, uncond + 1.4 * (cond - uncond))
    assert network.labels == [[3, 7, NULL, NULL]]


@pytest.mark.parametrize("y, scale", [(Y, 0), (None, 0.4)])
def test_scale_zero_or_no_labels_leave_one_half(y, scale):
    network = Network()
    out = guided(network, y, scale)(X, torch.tensor(0.5))
    assert torch.equal(out, X * 0.5 + (0 if y is None else Y.reshape(-1, 1, 1, 1)))
    assert network.labels == [None if y is None else [3, 7]]


def test_interval_includes_its_ends():
    network = Network()
    output = guided(network, Y, 1.0, interval=(0.3, 0.7))
    for t in (0.29, 0.3, 0.7, 0.71):
        assert output(X, torch.tensor(t)).shape == X.shape
    assert [len(labels) for labels in network.labels] == [2, 4, 4, 2]


@pytest.mark.parametrize("y, scale, calls", [(Y, 0, 5), (None, 0, 5), (Y, 0.5, 8)])
def test_internal_guidance(y, scale, calls):
    """out + w (out - inner), alone from one call of B images, and inside classifier-free guidance,
    where both halves of one batch are corrected first; only in its interval, ends included.
    """
    settings = d(cfg=True, scale=scale, guidance_interval=(0.0, 0.6), internal_scale=0.7,
                 internal_interval=(0.3, 0.8))
    given = dict(pred="velocity_pred", null_label=NULL, settings=settings)
    network, asked = Network(), []

    def with_head(x, t, y, hidden=()):
        out = network(x, t.reshape(-1, 1, 1, 1), y)
        asked.append(hidden)
        return (out, {"internal": out / 2 - 3}) if hidden else out

    def expect(t, label):
        out = X * 1000 * t + label
        return out + 0.7 * (out - (out / 2 - 3)) if 0.3 <= t <= 0.8 else out

    output = make_guided(with_head, Flow(), y, **given)
    for t in (0.29, 0.3, 0.6, 0.8, 0.81):
        expected = expect(t, 0 if y is None else Y.reshape(-1, 1, 1, 1))
        if scale and t <= 0.6:
            expected = expected + scale * (expected - expect(t, NULL))
        torch.testing.assert_close(output(X, torch.tensor(t)), expected, rtol=1e-6, atol=1e-4)
    assert asked == [(), *[("internal",)] * 3, ()]
    assert sum(len(labels or Y) for labels in network.labels) == 2 * calls
    # Of one image in ten steps: t = 0.6, 0.5, ..., 0.1 take both halves.
    y = None if y is None else Y[:1]
    make_output = functools.partial(make_guided, process=Flow(), y=y, **given)
    options = dict(pred="velocity_pred", algorithm="heun", steps=10)
    assert count_calls(Flow(), (3, 4, 4), make_output, **options) == (19 + 12 if scale else 19)


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
        make_guided(Network(), process, Y, pred="noise_pred", null_label=NULL, settings=settings,
                    upsample={"m": 2})
