"""Frechet distance: the feature networks, their moments, the distance and its statistics files.

The distance between Gaussians fitted to features of two image sets (FID, Heusel et al. 2017,
arXiv 1706.08500, eq. 6), in the features of pytorch-fid's Inception or of our digits classifier.
"""

import hashlib
import http.client
import warnings
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import safetensors
import torch
import torch.nn.functional as F
from torch import nn

from libs.files import read_arrays, read_safetensors, read_torch, sha256_of
from utils import UserError, replacing

# ------------------------------------------------------------ Inception

# As in the published file's name, pt_inception-2015-12-05-6726825d.pth.
INCEPTION_SHA256_PREFIX = "6726825d"


def _find_inception_weights():
    """The file in torch hub's cache (under TORCH_HOME), downloaded from pytorch-fid if absent."""
    from pytorch_fid.inception import FID_WEIGHTS_URL

    path = Path(torch.hub.get_dir(), "checkpoints", FID_WEIGHTS_URL.rsplit("/", 1)[-1])
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(FID_WEIGHTS_URL, str(path), INCEPTION_SHA256_PREFIX)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise UserError(
            f"the FID network's weights could not be downloaded ({error}): put {path.name} into "
            f"{path.parent}, or say where it is: sample.fid_weights_path (--weights of "
            "compute_fid_stats.py)"
        ) from error
    return path


def _load_inception(path):
    """pytorch-fid's network with the weights of `path`, of which only tensors are read."""
    from pytorch_fid import inception

    state_dict = read_torch(path)
    try:
        # pytorch-fid downloads in its constructor: it is handed the checked weights instead.
        with mock.patch.object(inception, "load_state_dict_from_url", lambda *_, **__: state_dict):
            return inception.InceptionV3([inception.InceptionV3.DEFAULT_BLOCK_INDEX])
    except Exception as error:  # state dict errors are of many kinds
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{path} does not hold pytorch-fid's Inception weights: {reason}"
        ) from error


class InceptionFeatures:
    """pool3 features (2048) of the FID Inception, as pytorch-fid computes them.

    `weights_path` None looks in torch hub's cache, then downloads. The file must have the sha256
    prefix of the published one; sha256_prefix=None takes any. `name` carries the file's own
    prefix, so statistics made with other weights are told apart. Raises UserError for a file
    that is missing, altered or of another network; it is never executed.
    """

    dim = 2048

    def __init__(self, weights_path=None, device="cpu", *, sha256_prefix=INCEPTION_SHA256_PREFIX):
        path = Path(weights_path) if weights_path else _find_inception_weights()
        if not path.is_file():
            raise UserError(
                f"the FID weights file {path} does not exist: check sample.fid_weights_path "
                "(--weights of compute_fid_stats.py)"
            )
        digest = sha256_of(path)
        if sha256_prefix is not None and not digest.startswith(sha256_prefix):
            raise UserError(
                f"{path} is not pytorch-fid's weights file: its sha256 starts with {digest[:8]}, "
                f"expected {sha256_prefix}; fetch it again"
            )
        self.name = f"inception_v3_fid-{digest[:8]}"
        self.network = _load_inception(path).eval().to(device)
        self.device = device

    @torch.inference_mode()
    def __call__(self, images):
        """images float32 (B, 3, H, W) in [0, 1], any size -> float32 (B, 2048)."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise UserError(f"Inception features need (B, 3, H, W), not {tuple(images.shape)}")
        return self.network(images.to(self.device, torch.float32))[0].flatten(1)


# ------------------------------------------------------------ digits classifier

# Where scripts/train_digits_classifier.py writes it.
DIGITS_CLASSIFIER_PATH = (
    Path(__file__).resolve().parents[2] / "assets/digits_classifier.safetensors"
)


class DigitsClassifier(nn.Module):
    """A small convolutional classifier of 8x8 digits with 48 features before its last layer."""

    dim = 48

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.hidden = nn.Linear(64 * 4 * 4, self.dim)
        self.head = nn.Linear(self.dim, 10)

    def features(self, images):
        """(B, 1, 8, 8) in [0, 1] -> (B, 48), smooth and unbounded as a Gaussian fit likes it."""
        x = F.gelu(self.conv1(2 * images - 1))  # (B, 32, 8, 8)
        x = F.max_pool2d(F.gelu(self.conv2(x)), 2)  # (B, 64, 4, 4)
        return self.hidden(x.flatten(1))  # (B, 48)

    def forward(self, images):
        """(B, 1, 8, 8) in [0, 1] -> logits (B, 10)."""
        return self.head(F.gelu(self.features(images)))


class DigitsClassifierFeatures:
    """Features (48) and classes by the classifier that scripts/train_digits_classifier.py wrote.

    `metadata` (strings) holds its held-out accuracy, seed and split. `name` carries a hash of the
    weights: two classifiers are two extractors. Raises UserError for a missing or other file.
    """

    dim = DigitsClassifier.dim

    def __init__(self, path=None, device="cpu"):
        path = Path(path or DIGITS_CLASSIFIER_PATH)
        if not path.is_file():
            raise UserError(
                f"there is no digits classifier {path}: run scripts/train_digits_classifier.py"
            )
        self.network = DigitsClassifier()
        try:
            with safetensors.safe_open(path, "pt") as file:
                self.metadata = file.metadata() or {}
            self.network.load_state_dict(read_safetensors(path))
        except Exception as error:  # of a broken file or another network: of many kinds
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"{path} is not a digits classifier of ours: {reason}") from error
        # Of the tensors: safetensors writes its metadata in random order, so files differ.
        weights = b"".join(x.numpy().tobytes() for x in self.network.state_dict().values())
        self.name = f"digits_classifier-{hashlib.sha256(weights).hexdigest()[:8]}"
        self.network.eval().to(device)
        self.device = device

    def _check(self, images):
        if images.ndim != 4 or images.shape[1:] != (1, 8, 8):
            raise UserError(f"the digits classifier needs (B, 1, 8, 8), not {tuple(images.shape)}")
        return images.to(self.device, torch.float32)

    @torch.inference_mode()
    def __call__(self, images):
        """images float32 (B, 1, 8, 8) in [0, 1] -> float32 (B, 48)."""
        return self.network.features(self._check(images))

    @torch.inference_mode()
    def classify(self, images):
        """images float32 (B, 1, 8, 8) in [0, 1] -> int64 (B,), the most likely digit."""
        return self.network(self._check(images)).argmax(1)


FEATURES = {"inception": InceptionFeatures, "digits_classifier": DigitsClassifierFeatures}


class NoFeatures:
    """Measures nothing, for evaluations that only make pictures: one number an image, its mean, by
    which one that is not finite is noticed.
    """

    name, dim = "none", 1

    def __init__(self, path, device):
        pass

    def __call__(self, images):
        """Images (B, C, H, W) -> (B, 1)."""
        return images.flatten(1).mean(1, keepdim=True)


FEATURES["none"] = NoFeatures


def require_known(name):
    """UserError unless there is a feature network of that name."""
    if name not in FEATURES:
        raise UserError(f"unknown features {name!r}: they are one of {', '.join(FEATURES)}")


def make_features(name, path, device):
    """The feature network of that name in FEATURES; path None means its usual place."""
    require_known(name)
    return FEATURES[name](path, device)


# ------------------------------------------------------------ moments and distance


BLOCK = 5000  # rows of features at a time; 5,000 x 5,000 distances in float64 are 200 MB


def blocks(features, device):
    """Rows of an array (n, dim), memory-mapped or not, as float64 on `device`, BLOCK at a time."""
    for start in range(0, len(features), BLOCK):
        rows = np.array(features[start : start + BLOCK])  # a copy: torch takes no read-only memory
        yield torch.from_numpy(rows).to(device, torch.float64)


class Moments:
    """Count, sum and outer products of features in float64; ranks add up the three tensors."""

    def __init__(self, dim, device="cpu"):
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.sum = torch.zeros(dim, dtype=torch.float64, device=device)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, features):
        """Add features (B, dim) of any floating type."""
        features = features.to(self.sum)
        self.count += len(features)
        self.sum += features.sum(0)
        self.outer += features.T @ features

    def mean_and_covariance(self):
        """float64 (dim,) and (dim, dim), unbiased as numpy.cov. UserError if not finite."""
        if self.count < 2:
            raise UserError(f"a covariance needs 2 images or more, not {int(self.count)}")
        if not self.outer.isfinite().all():
            raise UserError("the features are not finite: some images contain NaN or infinity")
        mu = self.sum / self.count
        return mu, (self.outer - self.count * torch.outer(mu, mu)) / (self.count - 1)


def _factor(sigma):
    """A with sigma = A A^T for a symmetric positive semidefinite sigma, singular or not."""
    eigenvalues, eigenvectors = torch.linalg.eigh(sigma)
    return eigenvectors * eigenvalues.clamp(min=0).sqrt()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), a float, from float64.

    The trace of the root is the sum of singular values of A1^T A2, where sigma = A A^T: squared
    they are the eigenvalues of sigma1 sigma2. The factors come from symmetric eigenvalues. Unlike
    a root of the product, no rounding is square-rooted twice: at rank 1500 of 2048 the distance of
    a set to itself is 3e-13 instead of 2e-7, and singular covariances need no offset.
    """
    moments = (mu1, sigma1, mu2, sigma2)
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(x, dtype=torch.float64).cpu() for x in moments)
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape:
        raise UserError(f"the statistics have {len(mu1)} and {len(mu2)} features: they differ")
    root_trace = torch.linalg.svdvals(_factor(sigma1).T @ _factor(sigma2)).sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * root_trace
    return max(0.0, distance.item())  # below zero only by rounding


# ------------------------------------------------------------ statistics files




@dataclass(frozen=True)
class Statistics:
    """Moments of a data set's features, and how they were made (None where the file is silent)."""

    mu: torch.Tensor  # float64 (dim,)
    sigma: torch.Tensor  # float64 (dim, dim)
    count: int | None
    extractor: str | None
    resolution: int | None
    preprocessing: str | None
    features: np.ndarray | None  # float32 (m, dim), of a random subset, for precision and recall
    sha256: str  # of the file, for the recipe of an evaluation

    @property
    def known(self):
        """Whether the file says how it was made; U-ViT's and pytorch-fid's do not."""
        return None not in (self.count, self.extractor, self.resolution, self.preprocessing)


def save_statistics(
    path, *, mu, sigma, count, extractor, resolution, preprocessing, features=None
):
    """Write an .npz that pytorch-fid reads too (mu, sigma), whole or not at all.

    features: those of a random subset of the images (m, dim), for precision and recall.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {
        "mu": torch.as_tensor(mu, dtype=torch.float64, device="cpu").numpy(),
        "sigma": torch.as_tensor(sigma, dtype=torch.float64, device="cpu").numpy(),
        "count": np.int64(count),
        "extractor": np.str_(extractor),
        "resolution": np.int64(resolution),
        "preprocessing": np.str_(preprocessing),
    }
    if features is not None:
        arrays["features"] = np.asarray(features, np.float32)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def require_file(path):
    """UserError unless there is a statistics file at `path`."""
    if not Path(path).is_file():
        raise UserError(
            f"the statistics {path} do not exist: scripts/compute_fid_stats.py makes them"
        )


def _read_arrays(path):
    """The file's arrays by name, pickled objects refused, and its sha256."""
    require_file(path)
    return read_arrays(path), sha256_of(path)


def _scalar(path, arrays, name, kind):
    """The 0-d array `name` as a Python value of type `kind`, None if the file lacks it."""
    if name not in arrays:
        return None
    value = arrays[name].item() if arrays[name].ndim == 0 else arrays[name]
    if type(value) is not kind:
        raise UserError(f"{path}: {name!r} is {value!r}, expected one {kind.__name__}")
    return value


def _require_moments(path, arrays, dim):
    for name in ("mu", "sigma"):
        if name not in arrays:
            raise UserError(f"{path} has no {name!r}: expected arrays mu (dim,), sigma (dim, dim)")
    mu, sigma = arrays["mu"], arrays["sigma"]
    if mu.ndim != 1 or sigma.shape != 2 * mu.shape or dim not in (None, len(mu)):
        raise UserError(
            f"{path}: mu has shape {mu.shape} and sigma {sigma.shape}, "
            f"expected ({dim or 'dim'},) and ({dim or 'dim'}, {dim or 'dim'})"
        )
    if any(x.dtype.kind != "f" or not np.isfinite(x).all() for x in (mu, sigma)):
        raise UserError(f"{path}: mu and sigma are not finite floating-point numbers")


def _reference_features(path, arrays, dim):
    """float32 (m, dim), or None if the file keeps none."""
    features = arrays.get("features")
    if features is None:
        return None
    if features.ndim != 2 or features.shape[1] != dim or features.dtype.kind != "f":
        raise UserError(
            f"{path}: 'features' are {features.dtype} of shape {features.shape}, expected "
            f"floating-point numbers (m, {dim})"
        )
    if not np.isfinite(features).all():
        raise UserError(f"{path}: 'features' are not finite")
    return features.astype(np.float32)


def load_statistics(path, *, extractor, resolution, dim=None):
    """Read a statistics file for images of `resolution` in the features named `extractor`.

    A file with mu and sigma only is accepted with one warning, and one without features of images
    silently. Raises UserError if the file is
    missing, broken, has other shapes than `dim` asks, or was made otherwise than expected.
    """
    arrays, sha256 = _read_arrays(path)
    _require_moments(path, arrays, dim)
    kinds = {"count": int, "extractor": str, "resolution": int, "preprocessing": str}
    statistics = Statistics(
        mu=torch.from_numpy(arrays["mu"].astype(np.float64)),
        sigma=torch.from_numpy(arrays["sigma"].astype(np.float64)),
        **{name: _scalar(path, arrays, name, kind) for name, kind in kinds.items()},
        features=_reference_features(path, arrays, len(arrays["mu"])),
        sha256=sha256,
    )
    for name, expected in (("extractor", extractor), ("resolution", resolution)):
        found = getattr(statistics, name)
        if found not in (None, expected):
            raise UserError(
                f"{path} was made with {name} {found}, expected {expected}: make statistics for "
                "this evaluation with scripts/compute_fid_stats.py"
            )
    if not statistics.known:
        missing = ", ".join(name for name in kinds if getattr(statistics, name) is None)
        warnings.warn(f"{path} does not record its {missing}: unknown, not checked", stacklevel=2)
    return statistics
