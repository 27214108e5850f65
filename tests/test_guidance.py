"""Classifier-free guidance: its formula, its batches, its interval."""

import pytest
import torch

from libs.diffusion.guidance import classifier_free, unguided
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


def test_guided_prediction():
    network, t = Network(), torch.tensor(0.5)
    out = classifier_free(network, Y, 0.4, NULL)(X, t)
    cond, uncond = Y.reshape(-1, 1, 1, 1) + X * t, NULL + X * t
    torch.testing.assert_close(out, uncond + 1.4 * (cond - uncond))
    assert network.labels == [[3, 7, NULL, NULL]]


def test_scale_zero_is_conditional():
    network = Network()
    out = classifier_free(network, Y, 0, NULL)(X, torch.tensor(0.5))
    assert torch.equal(out, Y.reshape(-1, 1, 1, 1) + X * 0.5)
    assert network.labels == [[3, 7]]


@pytest.mark.parametrize("t, guided", [
    (0.29, False), (0.3, True), (0.5, True), (0.7, True), (0.71, False)])
def test_interval_includes_its_ends(t, guided):
    network = Network()
    out = classifier_free(network, Y, 1.0, NULL, interval=(0.3, 0.7))(X, torch.tensor(t))
    assert network.labels == [[3, 7, NULL, NULL] if guided else [3, 7]]
    assert out.shape == X.shape


def test_unconditional():
    for eps_fn_of in (unguided, lambda network, y: classifier_free(network, y, 0, NULL)):
        network = Network()
        assert torch.equal(eps_fn_of(network, None)(X, torch.tensor(0.5)), X * 0.5)
        assert network.labels == [None]


def test_errors():
    with pytest.raises(UserError, match="needs labels"):
        classifier_free(Network(), None, 0.4, NULL)
    with pytest.raises(UserError, match="empty"):
        classifier_free(Network(), Y, 0.4, NULL, interval=(0.7, 0.3))
