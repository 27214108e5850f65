"""Density and coverage, and MMD, of generated features against their definitions."""

import numpy as np
import pytest
import torch

from libs.evaluate import metrics
from libs.evaluate.metrics import FeatureSet, density_coverage, maximum_mean_discrepancy


def sets_of(*arrays):
    return [FeatureSet(torch.zeros(()), None, rows) for rows in arrays]


def brute_force(real, generated, k):
    """Equations 4 and 5 of arXiv 2002.09797, one pair at a time, without products."""
    real, generated = real.astype(np.float64), generated.astype(np.float64)
    radii = np.array([np.sort(np.linalg.norm(real - row, axis=1))[k] for row in real])
    held = [np.linalg.norm(real - row, axis=1) < radii for row in generated]
    return np.sum(held) / (k * len(generated)), np.any(held, axis=0).mean()


@pytest.fixture(params=[2000, 16])
def block(request, monkeypatch):
    """All rows at once, and in many uneven blocks."""
    monkeypatch.setattr(metrics, "BLOCK", request.param)


@pytest.mark.parametrize("offset", [0, 1000])
@pytest.mark.parametrize("k", [1, 5])
def test_density_and_coverage_against_brute_force(block, offset, k):
    """Also far from the origin, where float32 products would leave nothing of the distances."""
    random = np.random.default_rng(0)
    real = (random.normal(size=(70, 6)) + offset).astype(np.float32)
    generated = (random.normal(size=(45, 6)) * 1.1 + 0.5 + offset).astype(np.float32)
    expected = brute_force(real, generated, k)
    assert all(0.1 < share < 0.95 for share in expected), "a test of something"
    found = density_coverage(*sets_of(generated, real), k=k)
    assert (found["density"], found["coverage"]) == pytest.approx(expected, rel=1e-12)
    assert (found["real"], found["generated"], found["k"]) == (70, 45, k)


def column(*values):
    return np.array(values, np.float32)[:, None]


def test_density_and_coverage_on_a_line():
    """By hand. Real 0..9, k 1: open balls of radius 1, so that edges are outside."""
    found = density_coverage(*sets_of(column(-0.5, 3, 3.5, 10, 20), column(*range(10))), k=1)
    # -0.5 is in the ball of 0, 3 in that of 3, 3.5 in those of 3 and 4, 10 and 20 in none.
    assert (found["density"], found["coverage"]) == (4 / 5, 3 / 10)


def test_mmd_is_cmmds_definition(block):
    """Equation 4 of arXiv 2401.09603 in float64, all pairs at once, on rows of length 1."""
    random = np.random.default_rng(0)
    sets = random.normal(size=(70, 6)) + 3, 2 * random.normal(size=(45, 6))
    x, y = (rows / np.linalg.norm(rows, axis=1)[:, None] for rows in sets)

    def mean_kernel(a, b):
        return np.exp(-(((a[:, None] - b) ** 2).sum(2)) / 200).mean()

    expected = 1000 * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))
    found = maximum_mean_discrepancy(*sets_of(*(rows.astype(np.float32) for rows in sets)))
    assert found == pytest.approx(expected, rel=1e-5) and found > 1  # cosines in float32
    assert maximum_mean_discrepancy(*sets_of(x, x)) == pytest.approx(0, abs=1e-6)
