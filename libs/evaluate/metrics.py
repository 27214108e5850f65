"""Metrics of generated images: functions of the features of two sets of images, by name.

A new metric is a function f(generated, real) -> {figure: value} of two FeatureSets, in METRICS.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from libs.files import hash_file, read_arrays
from utils import UserError, replacing

BLOCK = 5000  # rows of features at a time; 5,000 x 5,000 distances in float64 are 200 MB


def iter_blocks(features, device):
    """Rows of an array (n, dim) as float64 on `device`, BLOCK at a time."""
    for start in range(0, len(features), BLOCK):
        yield torch.from_numpy(features[start : start + BLOCK]).to(device, torch.float64)


class Moments:
    """Count, sum and outer products of features in float64; ranks add up the three tensors."""

    def __init__(self, dim, device="cpu"):
        shapes, like = ((), (dim,), (dim, dim)), dict(dtype=torch.float64, device=device)
        self.count, self.sum, self.outer = (torch.zeros(shape, **like) for shape in shapes)

    def update(self, features):
        """Add features (B, dim) of any floating type."""
        features = features.to(self.sum)
        self.count += len(features)
        self.sum += features.sum(0)
        self.outer += features.T @ features

    def mean_and_covariance(self):
        """float64 (dim,) and (dim, dim), unbiased as numpy.cov. UserError if not finite."""
        mu = self.sum / self.count
        sigma = (self.outer - self.count * torch.outer(mu, mu)) / (self.count - 1)
        if not sigma.isfinite().all():
            n = int(self.count)
            raise UserError(f"{n} images have no finite covariance: too few, or one contains NaN")
        return mu, sigma


@dataclass(frozen=True)
class FeatureSet:
    """The features of a set of images, as far as they are known."""

    mu: torch.Tensor  # float64 (dim,)
    sigma: torch.Tensor  # float64 (dim, dim), unbiased
    features: np.ndarray | None = None  # float32 (m, dim), of all images or a random subset
    agreement: float | None = None  # share of images that are classified as their labels
    source: dict | None = None  # where real images are from, for records


def make_feature_set(features, device, **more):
    """The FeatureSet of an array float32 (n, dim); its moments are computed on `device`."""
    moments = Moments(features.shape[1], device)
    for rows in iter_blocks(features, device):
        moments.update(rows)
    return FeatureSet(*moments.mean_and_covariance(), features, **more)


def _factor(sigma):
    """A with sigma = A A^T for a symmetric positive semidefinite sigma, singular or not."""
    eigenvalues, eigenvectors = torch.linalg.eigh(sigma)
    return eigenvectors * eigenvalues.clamp(min=0).sqrt()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), a float, from float64: the
    distance between Gaussians fitted to two sets of features (FID, Heusel et al. 2017, arXiv
    1706.08500, eq. 6).

    The trace of the root is the sum of singular values of A1^T A2, where sigma = A A^T: squared
    they are the eigenvalues of sigma1 sigma2. The factors come from symmetric eigenvalues. Unlike
    a root of the product, no rounding is square-rooted twice: at rank 1500 of 2048 the distance of
    a set to itself is 3e-13 instead of 2e-7, and singular covariances need no offset.
    """
    moments = (mu1, sigma1, mu2, sigma2)
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(x, dtype=torch.float64).cpu() for x in moments)
    root_trace = torch.linalg.svdvals(_factor(sigma1).T @ _factor(sigma2)).sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * root_trace
    return max(0.0, distance.item())  # below zero only by rounding


NEIGHBOURS = 3  # the paper's k, and ADM's
# Squared distances below this share of the squared norms are 0: of equal rows, the products leave
# about 1e-15, and a row is to be in the ball of radius 0 of its equal.
ROUNDING = 1e-12


def _squared_distances(a, b):
    """(A, dim) and (B, dim) in float64, where the products' cancellation is harmless -> (A, B)."""
    norms = a.square().sum(1)[:, None] + b.square().sum(1)
    distances = torch.addmm(norms, a, b.T, alpha=-2)
    return distances.masked_fill_(distances <= ROUNDING * norms, 0)


def _squared_radii(features, k, device):
    """(n,): squared distance from each row to its k-th nearest other row."""
    radii = []
    for rows in iter_blocks(features, device):
        nearest = rows.new_full((len(rows), k + 1), torch.inf)
        for others in iter_blocks(features, device):
            both = torch.cat([nearest, _squared_distances(rows, others)], 1)
            nearest = both.topk(k + 1, largest=False).values  # the row itself is among them
        radii.append(nearest.amax(1))
    return torch.cat(radii)


def _share_inside(points, manifold, squared_radii, device):
    """The share of rows of `points` that lie in a ball around a row of `manifold`."""
    count = 0
    for rows in iter_blocks(points, device):
        inside = torch.zeros(len(rows), dtype=torch.bool, device=device)
        others = zip(iter_blocks(manifold, device), squared_radii.split(BLOCK), strict=True)
        for centres, radii in others:
            inside |= (_squared_distances(rows, centres) <= radii).any(1)
        count += inside.sum().item()
    return count / len(points)


def precision_recall(real, generated, device="cpu", k=NEIGHBOURS):
    """Precision and recall of Kynkäänniemi et al. 2019 (arXiv 1904.06991) of float arrays (m, dim)
    and (n, dim) with more than k rows: {'precision', 'recall', 'k', 'real': m, 'generated': n}.

    A set's manifold is the union of balls around its features, each reaching to the k-th nearest
    other feature of the set (eq. 1). Precision is the share of generated features in the real
    manifold, and recall the share of real features in the generated manifold (eq. 2).
    """
    precision = _share_inside(generated, real, _squared_radii(real, k, device), device)
    recall = _share_inside(real, generated, _squared_radii(generated, k, device), device)
    counts = {"k": k, "real": len(real), "generated": len(generated)}
    return {"precision": precision, "recall": recall, **counts}


HALVINGS, WIDE = 20, 512


def _frechet_distance(generated, real):
    distance = frechet_distance(generated.mu, generated.sigma, real.mu, real.sigma)
    return {"frechet_distance": distance}


def _real_halves(generated, real):
    """The floor for generated images: the mean distance of HALVINGS random pairs of halves of the
    real images (one pair of features wider than WIDE: seconds); `ratio` is the images' own over it.
    """
    if real.source["file"] or len(real.features) < 4:  # a half needs a covariance
        return {}
    rng, distances = torch.Generator().manual_seed(1234), []
    for _ in range(HALVINGS if real.features.shape[1] <= WIDE else 1):
        order = torch.randperm(len(real.features), generator=rng)
        halves = np.split(real.features[order.numpy()], [len(order) // 2])
        first, second = (make_feature_set(half, real.mu.device) for half in halves)
        distances += _frechet_distance(first, second).values()
    mean, own = np.mean(distances).item(), _frechet_distance(generated, real)["frechet_distance"]
    floor = {"frechet_distance": mean, "pairs": len(distances), "ratio": own / mean}
    return {"real_halves": {**floor, "class_agreement": real.agreement}}


def _precision_recall(generated, real):
    """None where real features are unknown, or there are no k-th neighbours."""
    sets, found = (real.features, generated.features), None
    if all(features is not None and len(features) > NEIGHBOURS for features in sets):
        found = precision_recall(*sets, generated.mu.device)
    return {"precision_recall": found}


# name -> f(generated, real) -> {figure: value for json}; FeatureSets, real.features may be None.
METRICS = {
    "frechet_distance": _frechet_distance,
    "class_agreement": lambda generated, real: {"class_agreement": generated.agreement},
    "real_halves": _real_halves,
    "precision_recall": _precision_recall,
}
IN_TRAINING = ("frechet_distance", "class_agreement", "real_halves")  # need moments alone


def compute_metrics(generated, real, names=METRICS):
    """The figures of the METRICS `names`: dict. Without real images, None of the usual ones."""
    if real is None:
        return {"frechet_distance": None, "class_agreement": None, "precision_recall": None}
    return {key: x for name in names for key, x in METRICS[name](generated, real).items()}


def save_statistics(path, *, mu, sigma, features=None, **record):
    """Write an .npz that pytorch-fid reads too. features: (m, dim) of some random images; record:
    count, extractor, resolution and preprocessing of all, class_agreement where it is known.
    """
    arrays = {"mu": np.asarray(mu, np.float64), "sigma": np.asarray(sigma, np.float64), **record}
    if features is not None:
        arrays["features"] = np.asarray(features, np.float32)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def load_statistics(path, *, extractor, resolution, dim):
    """The FeatureSet of a statistics file, for images of `resolution` and features (n, dim) named
    `extractor`; UserError if it is not there, or made for others. A file of U-ViT or pytorch-fid
    has only mu and sigma, and is taken as it is.
    """
    if not Path(path).is_file():
        raise UserError(f"there is no {path}: scripts/compute_fid_stats.py makes statistics")
    arrays = read_arrays(path)
    shapes, expected = [np.shape(arrays.get(x)) for x in ("mu", "sigma")], [(dim,), (dim, dim)]
    if shapes != expected:
        raise UserError(f"{path}: mu and sigma have shapes {shapes}, expected {expected}")
    for name, expected in (("extractor", extractor), ("resolution", resolution)):
        found = arrays[name].item() if name in arrays else expected
        if found != expected:
            raise UserError(f"{path} was made with {name} {found}, expected {expected}")
    count = arrays["count"].item() if "count" in arrays else None
    source = {"file": str(path), "sha256": hash_file(path), "count": count}
    source["known"] = arrays.keys() >= {"count", "extractor", "resolution", "preprocessing"}
    if "class_agreement" in arrays:  # of the real images: the ceiling of generated ones
        source["class_agreement"] = arrays["class_agreement"].item()
    mu, sigma = (torch.from_numpy(arrays[name].astype(np.float64)) for name in ("mu", "sigma"))
    return FeatureSet(mu, sigma, arrays.get("features"), source=source)
