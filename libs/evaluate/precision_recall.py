"""Precision and recall of generated images (Kynkäänniemi et al. 2019, arXiv 1904.06991), in the
features of libs.evaluate.metrics.

A set's manifold is the union of balls around its features, each reaching to the k-th nearest other
feature of the set (eq. 1). Precision is the share of generated features in the real manifold, and
recall the share of real ones in the generated manifold (eq. 2).
"""

import torch

from libs.evaluate.metrics import BLOCK, blocks

NEIGHBOURS = 3  # the paper's k, and ADM's
# Squared distances below this share of the squared norms are 0: of equal rows, the products leave
# about 1e-15 of them, and whether one is in the other's ball of radius 0 must not depend on that.
ROUNDING = 1e-12


def _squared_distances(a, b):
    """(A, dim) and (B, dim) in float64, where the products' cancellation is harmless -> (A, B)."""
    norms = a.square().sum(1)[:, None] + b.square().sum(1)
    distances = torch.addmm(norms, a, b.T, alpha=-2)
    return distances.masked_fill_(distances <= ROUNDING * norms, 0)


def _squared_radii(features, k, device):
    """(n,): squared distance from each row to its k-th nearest other row."""
    radii = []
    for rows in blocks(features, device):
        nearest = rows.new_full((len(rows), k + 1), torch.inf)
        for others in blocks(features, device):
            both = torch.cat([nearest, _squared_distances(rows, others)], 1)
            nearest = both.topk(k + 1, largest=False).values  # the row itself is among them
        radii.append(nearest.amax(1))
    return torch.cat(radii)


def _share_inside(points, manifold, squared_radii, device):
    """The share of rows of `points` that lie in a ball around a row of `manifold`."""
    count = 0
    for rows in blocks(points, device):
        inside = torch.zeros(len(rows), dtype=torch.bool, device=device)
        others = zip(blocks(manifold, device), squared_radii.split(BLOCK), strict=True)
        for centres, radii in others:
            inside |= (_squared_distances(rows, centres) <= radii).any(1)
        count += inside.sum().item()
    return count / len(points)


def precision_recall(real, generated, device="cpu", k=NEIGHBOURS):
    """How much of what was generated is real, and how much of what is real was generated.

    real, generated: arrays (m, dim) and (n, dim) of any floating type, memory-mapped or not; each
    needs more than k rows. Takes the memory of a few blocks on `device` and (m + n)^2 dim products.

    Returns:
        {'precision', 'recall': in [0, 1], 'k', 'real', 'generated': how many}.
    """
    for features in (real, generated):
        if len(features) <= k:
            raise ValueError(f"{len(features)} rows have no {k}-th neighbour")
    real_radii = _squared_radii(real, k, device)
    generated_radii = _squared_radii(generated, k, device)
    return {
        "precision": _share_inside(generated, real, real_radii, device),
        "recall": _share_inside(real, generated, generated_radii, device),
        "k": k,
        "real": len(real),
        "generated": len(generated),
    }
