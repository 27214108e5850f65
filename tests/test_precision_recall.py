"""Precision and recall of generated features against their definition."""

import numpy as np
import pytest

from libs.evaluate import metrics
from libs.evaluate.metrics import precision_recall


def brute_force(real, generated, k):
    """Equations 1 and 2 of arXiv 1904.06991, one pair at a time, without products."""

    def share(points, manifold):
        radii = [np.sort(np.linalg.norm(manifold - row, axis=1))[k] for row in manifold]
        inside = [(np.linalg.norm(manifold - row, axis=1) <= radii).any() for row in points]
        return np.mean(inside)

    real, generated = real.astype(np.float64), generated.astype(np.float64)
    return share(generated, real), share(real, generated)


def both(real, generated, **keywords):
    found = precision_recall(real, generated, **keywords)
    return found["precision"], found["recall"]


@pytest.fixture(params=[5000, 16])
def block(request, monkeypatch):
    """All rows at once, and in many uneven blocks."""
    monkeypatch.setattr(metrics, "BLOCK", request.param)


@pytest.mark.parametrize("offset", [0, 1000])
@pytest.mark.parametrize("k", [1, 3])
def test_against_brute_force(block, offset, k):
    """Also far from the origin, where float32 products would leave nothing of the distances."""
    random = np.random.default_rng(0)
    real = (random.normal(size=(70, 6)) + offset).astype(np.float32)
    generated = (random.normal(size=(45, 6)) * 1.3 + 1 + offset).astype(np.float32)
    expected = brute_force(real, generated, k)
    assert all(0.1 < share < 0.9 for share in expected), "a test of something"
    assert both(real, generated, k=k) == expected
    found = precision_recall(real, generated, k=k)
    assert (found["real"], found["generated"], found["k"]) == (70, 45, k)


def column(*values):
    return np.array(values, np.float32)[:, None]


def test_on_a_line():
    """By hand. Real 0..9, k 1: balls of radius 1. Generated: two close pairs and one twice."""
    real, generated = column(*range(10)), column(-0.5, -0.75, 10, 10.5, 3, 3)
    # -0.5, -0.75, 3, 3 are inside, 10 is on the edge of 9's ball, 10.5 is outside. The generated
    # balls have radii 1/4, 1/2 and 0 and hold no real number but 3.
    assert both(real, generated, k=1) == (5 / 6, 1 / 10)
    # k 3: radius 3 at both ends, 2 elsewhere.
    generated = column(0.5, 12, 12.5, -3, -3.25)
    assert both(real, generated, k=3)[0] == 3 / 5


def test_the_ends():
    """The same set, sets far apart, and a generator that makes one image again and again, real or
    not: its balls have radius 0.
    """
    random = np.random.default_rng(1)
    real = random.normal(size=(40, 64)).astype(np.float32)
    assert both(real, real.copy()) == (1, 1)
    assert both(real, real + 100) == (0, 0)
    assert both(real, np.repeat(real[:1], 30, 0)) == (1, 1 / 40)
    assert both(real, np.repeat(real[:1] + 100, 30, 0)) == (0, 0)
