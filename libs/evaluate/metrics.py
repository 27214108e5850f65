"""Metrics of generated images: functions of the features of two sets of images, by name."""

import importlib
import threading
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch

from utils import UserError, look_up

METRICS = {}  # name -> Metric, whose fields are the arguments of `metric`
Metric = namedtuple("Metric", "function kind rows alone package")
GROUPS = {
    "training": ("frechet_distance", "class_agreement", "real_halves"),
    "standard": ("frechet_distance", "class_agreement", "real_halves", "precision_recall"),
    "adm": ("frechet_distance", "sfid", "inception_score", "precision_recall"),
    "dinov2": ("fd_dinov2", "mmd_dinov2"),
}
BLOCK = 2000  # rows of features at a time; 2,000 x 50,000 distances in float64 are 800 MB
HALVINGS, WIDE = 20, 512  # of `real_halves`
SPLITS, SUBSETS, SUBSET_SIZE = 10, 100, 1000  # torch-fidelity's, and papers'
NEIGHBOURS = 3  # the paper's k, and ADM's
_IMPORTING = threading.Lock()


def metric(name, *, kind="features", rows=None, alone=False, package=False):
    """Decorator that registers f(generated, real) -> figure for json, of FeatureSets.
    kind: of the features, `features` those of sample.features; rows: 'needed' if moments of real
    images do not suffice, 'used' if real.features may be None; alone: if real may be None;
    package: if it needs torch-fidelity.
    """

    def register(function):
        METRICS[name] = Metric(function, kind, rows, alone, package)
        return function

    return register


def iter_blocks(features, device):
    """Rows of an array (n, dim) as float64 on `device`, BLOCK at a time."""
    for start in range(0, len(features), BLOCK):
        yield torch.from_numpy(features[start : start + BLOCK]).to(device, torch.float64)


class Moments:
    """Count, sum and outer products of features in float64."""

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
    features: np.ndarray | None = None  # float32 (m, dim), of all images or some, evenly spaced
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
    distance between Gaussians fitted to two sets of features (Heusel et al. 2017, arXiv 1706.08500,
    eq. 6). The trace of the root is the sum of singular values of A1^T A2, where sigma = A A^T. No
    rounding is square-rooted twice: at rank 1500 of 2048 the distance of a set to itself is 3e-13
    instead of 2e-7, and singular covariances need no offset.
    """
    moments = (mu1, sigma1, mu2, sigma2)
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(x, dtype=torch.float64).cpu() for x in moments)
    root_trace = torch.linalg.svdvals(_factor(sigma1).T @ _factor(sigma2)).sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * root_trace
    return max(0.0, distance.item())  # below zero only by rounding


@metric("fd_dinov2", kind="dinov2")
@metric("sfid", kind="spatial")
@metric("frechet_distance")
def _distance(generated, real):
    return frechet_distance(generated.mu, generated.sigma, real.mu, real.sigma)


@metric("density_coverage", rows="needed")
def density_coverage(generated, real, k=5):
    """Naeem et al. 2020 (arXiv 2002.09797, eq. 4 and 5), of the features in float64: a ball reaches
    from each real feature to its k-th nearest other; density is the mean number of balls that hold
    a generated feature, over k, and coverage the share of balls that hold one.
    """
    rows, device = (generated.features, real.features), generated.mu.device
    generated, real = (torch.from_numpy(x).to(device, torch.float64) for x in rows)
    # The nearest is the feature itself.
    radii = [torch.cdist(x, real).topk(k + 1, largest=False).values for x in real.split(BLOCK)]
    radii = torch.cat(radii)[:, -1]
    held = sum((torch.cdist(x, real) < radii).sum(0) for x in generated.split(BLOCK))
    figures = {"density": held.sum().item() / (k * len(generated)), "k": k}
    figures["coverage"] = (held > 0).double().mean().item()
    return {**figures, "real": len(real), "generated": len(generated)}


@metric("mmd_dinov2", kind="dinov2", rows="needed")
def maximum_mean_discrepancy(generated, real):
    """1000 times the squared MMD, as CMMD has it (Jayasumana et al. 2024, arXiv 2401.09603, eq. 4):
    features scaled to length 1, the kernel exp(-|x - y|^2 / 200), the biased estimate.
    """
    made, real, device = generated.features, real.features, generated.mu.device

    def compare(a, b):
        """The mean kernel less 1, whose digits float32 would lose beside 1."""
        total, unit = 0.0, torch.nn.functional.normalize
        for x in iter_blocks(a, device):
            for y in iter_blocks(b, device):
                cosines = unit(x).float() @ unit(y).float().T
                total += cosines.sub_(1).div_(100).expm1_().sum(dtype=torch.float64).item()
        return total / (len(a) * len(b))

    return 1000 * (compare(real, real) + compare(made, made) - 2 * compare(real, made))


metric("class_agreement", alone=True)(lambda generated, real: generated.agreement)


@metric("real_halves")
def _real_halves(generated, real):
    """The floor for generated images: the mean distance of HALVINGS random pairs of halves of the
    real images (one pair of features wider than WIDE: seconds); `ratio` is the images' own over it.
    """
    if real.source["file"] or len(real.features) < 4:  # a half needs a covariance
        return None
    rng, distances = torch.Generator().manual_seed(1234), []
    for _ in range(HALVINGS if real.features.shape[1] <= WIDE else 1):
        order = torch.randperm(len(real.features), generator=rng)
        halves = np.split(real.features[order.numpy()], [len(order) // 2])
        distances.append(_distance(*(make_feature_set(half, real.mu.device) for half in halves)))
    mean, own = np.mean(distances).item(), _distance(generated, real)
    floor = {"frechet_distance": mean, "pairs": len(distances), "ratio": own / mean}
    return {**floor, "class_agreement": real.agreement}


def _ask_fidelity(name, *sets, **options):
    """torch-fidelity's figure of the features of FeatureSets."""
    with _IMPORTING:  # its modules import one another: a second thread would find one half made
        module = importlib.import_module(f"torch_fidelity.metric_{name}")
    rows = [torch.from_numpy(found.features).to(sets[0].mu.device) for found in sets]
    return getattr(module, f"{name}_features_to_metric")(*rows, **options)


@metric("inception_score", kind="logits", alone=True, package=True)
def _inception_score(generated, real):
    """Salimans et al. 2016 (arXiv 1606.03498), over SPLITS parts in a random order."""
    found = _ask_fidelity("isc", generated, splits=SPLITS)
    return {key: found[f"inception_score_{key}"] for key in ("mean", "std")} | {"splits": SPLITS}


@metric("kid", rows="needed", package=True)
def _kid(generated, real):
    """Bińkowski et al. 2018 (arXiv 1801.01401): cubic kernel, mean over random subsets."""
    size = min(SUBSET_SIZE, len(generated.features), len(real.features))
    subsets = dict(kid_subsets=SUBSETS, kid_subset_size=size, verbose=False)
    found = _ask_fidelity("kid", generated, real, **subsets)
    figures = {key: found[f"kernel_inception_distance_{key}"] for key in ("mean", "std")}
    return {**figures, "subsets": SUBSETS, "subset_size": size}


@metric("precision_recall", rows="used")
def _precision_recall(generated, real):
    """Kynkäänniemi et al. 2019 (arXiv 1904.06991); None without torch-fidelity or features."""
    m, n = (0 if x.features is None else len(x.features) for x in (real, generated))
    if min(m, n) <= NEIGHBOURS or not find_spec("torch_fidelity"):
        return None
    options = dict(prc_neighborhood=NEIGHBOURS, save_cpu_ram=True, verbose=False)
    found = _ask_fidelity("prc", generated, real, **options)
    shares = {key: found[key] for key in ("precision", "recall")}
    return {**shares, "k": NEIGHBOURS, "real": m, "generated": n}


def choose_metrics(text, key="sample.metrics"):
    """The METRICS that `text` names, by GROUPS, too, with commas between; UserError if one is not
    known, or needs torch-fidelity, which is not there.
    """
    known = {**{name: (name,) for name in METRICS}, **GROUPS}
    names = [name for word in text.split(",") for name in look_up(known, word.strip(), key)]
    needing = [name for name in names if METRICS[name].package]
    if needing and not find_spec("torch_fidelity"):
        raise UserError(f"the metric {needing[0]} needs torch-fidelity: pip install torch-fidelity")
    return tuple(dict.fromkeys(names))


def compute_metrics(generated, real, names):
    """{name: figure} of two dicts {kind: FeatureSet}; None where features are not there."""

    def compute(name):
        function, kind, _, alone, _ = METRICS[name]
        made, reference = (sets.get(kind) for sets in (generated or {}, real or {}))
        known = made is not None and (reference is not None or alone)
        return function(made, reference) if known else None

    with ThreadPoolExecutor() as threads:  # precision and recall need one core for long
        return dict(zip(names, threads.map(compute, names), strict=True))
