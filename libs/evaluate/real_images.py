"""The real side of an evaluation: features of real images from a statistics file, or measured."""

from dataclasses import dataclass

import numpy as np
import torch

from datasets import LATENTS, dataset_of
from libs.evaluate import metrics
from libs.runtime import beat
from utils import UserError

# Without a statistics file, a data set up to this size is measured on the spot.
MEASURE_UP_TO = 10_000
PASS = 50  # images of a pass through the feature network, 1 GB of Inception's activations


@dataclass(frozen=True)
class RealImages:
    """What generated images are compared with. source: where it is from, for the recipe."""

    mu: torch.Tensor  # float64 (dim,)
    sigma: torch.Tensor  # float64 (dim, dim)
    features: np.ndarray | None  # float32 (m, dim), of all or a random subset; for manifolds
    source: dict
    right: np.ndarray | None = None  # bool (m,), which are classified right, of images at hand


def as_saved(images):
    """Images in [0, 1] rounded as PNG files hold them, so that statistics describe the files."""
    return (images * 255).round() / 255


def images_to_measure(config):
    """The data set of an evaluation's real images, opened; None where a statistics file stands for
    them, no figures are asked for, or the data are latents.
    """
    settings = config.dataset
    needless = settings.fid_stats or config.sample.features == metrics.NoFeatures.name
    return None if needless or settings.name in LATENTS else dataset_of(config)


def can_be_measured(dataset):
    """Whether the data set is at hand, of images and small."""
    if dataset is None or getattr(dataset, "latent", False):
        return False
    return len(dataset) <= MEASURE_UP_TO


def require_statistics(config, dataset):
    """UserError where FID can have no real side: no statistics file where one is named; none named,
    and many images, latents, or no data set (None).
    """
    if config.dataset.fid_stats:
        metrics.require_file(config.dataset.fid_stats)
    if not config.dataset.fid_stats and not can_be_measured(dataset):
        raise UserError(
            "dataset.fid_stats names no statistics file: make one with "
            "scripts/compute_fid_stats.py (see the README) and pass "
            "--config.dataset.fid_stats=FILE"
        )


def dataset_features(features, dataset):
    """Features float32 (n, dim) on the CPU of real images as 8-bit files hold them; and bool (n,),
    which of them `features` classifies right, None where there are no classes.
    """
    classify = getattr(features, "classify", None) if dataset.num_classes else None
    rows, right = [], []
    for start in range(0, len(dataset), PASS):
        beat("measuring real images")
        items = [dataset[(0, i)] for i in range(start, min(start + PASS, len(dataset)))]
        images = as_saved(torch.stack([x for x, _ in items]).mul(0.5).add(0.5))
        rows.append(features(images).cpu())
        if classify is not None:
            labels = torch.tensor([int(y) for _, y in items])
            right.append(classify(images).cpu() == labels)
    return torch.cat(rows).numpy(), torch.cat(right).numpy() if right else None


def moments_of(rows, device):
    """(mu, sigma) in float64 of features (n, dim), an array or a memory map."""
    moments = metrics.Moments(rows.shape[1], device)
    for block in metrics.blocks(rows, device):
        moments.update(block)
    return moments.mean_and_covariance()


def require_measurable(name, dataset, resolution):
    """UserError unless the data set `name` has images enough, of the generated ones' resolution."""
    if len(dataset) < 2:
        raise UserError(
            f"the data set {name} has {len(dataset)} images, too few to compare with, expected 2 "
            "or more: give a larger one, or a statistics file, dataset.fid_stats"
        )
    if dataset.shape[-1] != resolution:
        raise UserError(
            f"the images of the data set {name} are {dataset.shape[-1]} pixels wide, but the "
            f"generated ones {resolution}: give dataset.resolution or dataset.fid_stats that fit"
        )


def real_images(config, features, dataset, *, resolution, device):
    """The RealImages of an evaluation: from dataset.fid_stats, or measured here.

    resolution: side of the generated images in pixels.

    Raises:
        UserError: `require_statistics`, or the file was made by another extractor or at another
            resolution; `require_measurable`.
    """
    require_statistics(config, dataset)
    path = config.dataset.fid_stats
    if not path:
        require_measurable(config.dataset.name, dataset, resolution)
        rows, right = dataset_features(features, dataset)
        source = {
            "file": None, "count": len(dataset), "known": True,
            "images": {"dataset": config.dataset.name, "list_sha256": dataset.list_sha256()},
        }  # fmt: skip
        return RealImages(*moments_of(rows, device), rows, source, right)
    found = metrics.load_statistics(
        path, extractor=features.name, resolution=resolution, dim=features.dim
    )
    source = {"file": path, "sha256": found.sha256, "count": found.count, "known": found.known}
    return RealImages(found.mu, found.sigma, found.features, source)


def halves_baseline(real, seed):
    """How two random halves of 4 or more real images at hand compare, the floor for generated ones.

    Returns:
        {'frechet_distance': of the halves, 'class_agreement': of their mean, or None}; None where
        there are too few, or only statistics.
    """
    if real.source["file"] is not None or len(real.features) < 4:  # a half needs a covariance
        return None
    order = torch.randperm(
        len(real.features), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    halves = order[: len(order) // 2], order[len(order) // 2 :]
    moments = [moments_of(real.features[half], real.mu.device) for half in halves]
    agreement = None
    if real.right is not None:
        agreement = float(np.mean([real.right[half].mean() for half in halves]))
    distance = metrics.frechet_distance(*moments[0], *moments[1])
    return {"frechet_distance": distance, "class_agreement": agreement}
