"""The features of real images: statistics files, ours and others', or a data set measured here."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from libs.evaluate.features import BATCH, extract_features, to_images
from libs.evaluate.metrics import METRICS, FeatureSet, Moments, make_feature_set
from libs.files import hash_file, map_array, read_arrays
from utils import UserError, replacing

MEASURE_UP_TO = 10_000  # images of a data set without a statistics file
SUFFIXES = {"features": "", "spatial": "_s", "dinov2": "_dinov2"}  # kind -> of names in a file


class Statistics:
    """A statistics file in the making: sums of all features, and the features of some images."""

    def __init__(self, extractors):
        self.extractors = extractors
        self.moments = {k: Moments(dim) for k, dim in extractors.dims.items() if k in SUFFIXES}
        self.rows = {kind: [] for kind in self.moments}

    def update(self, found, chosen):
        """found: {kind: features (B, width)}; chosen: bool (B,), whose features are stored."""
        for kind, moments in self.moments.items():
            moments.update(found[kind])
            self.rows[kind].append(found[kind][chosen])

    def save(self, path, **record):
        """An .npz that pytorch-fid reads too. record: what evaluations check and say."""
        names = self.extractors.names
        arrays = {"extractor": names["features"], **record}
        for kind, moments in self.moments.items():
            suffix, rows = SUFFIXES[kind], torch.cat(self.rows[kind]).numpy()
            arrays[f"mu{suffix}"], arrays[f"sigma{suffix}"] = moments.mean_and_covariance()
            arrays |= {f"features{suffix}": rows} if len(rows) else {}
            arrays |= {"extractor_dinov2": names[kind]} if kind == "dinov2" else {}
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)


def _describe_file(path, arrays, pictures):
    """What records say of a statistics file."""
    origin = "mu and sigma alone, as of pytorch-fid, U-ViT or JiT"
    if "preprocessing" in arrays:
        origin = f"ours: {arrays['preprocessing']}"
    elif pictures is not None:
        origin = (
            "ADM's: mu and sigma for FID, mu_s and sigma_s for sFID of its training set, arr_0, "
            f"{len(pictures):,} pictures, for what needs features"
        )
    found = {"file": str(path), "sha256": hash_file(path), "origin": origin}
    numbers = ("count", "class_agreement")  # the latter is the ceiling of generated images
    return found | {"count": None} | {k: arrays[k].item() for k in numbers if k in arrays}


def _read_kind(arrays, kind, extractors, side, source):
    """The FeatureSet of a kind in the arrays of a statistics file; UserError if it is not there, or
    made for others. Files that do not name their extractor are taken as they are.
    """
    names, dim = [name + SUFFIXES[kind] for name in ("mu", "sigma")], extractors.dims[kind]
    shapes, expected = [np.shape(arrays.get(name)) for name in names], [(dim,), (dim, dim)]
    path = source["file"]
    if shapes != expected:
        said = f"{' and '.join(names)} have shapes {shapes}, expected {expected}"
        raise UserError(f"{path}: {said}; scripts/compute_fid_stats.py --metrics makes them")
    name = "extractor_dinov2" if kind == "dinov2" else "extractor"
    for key, expected in ((name, extractors.names[kind]), ("resolution", side)):
        found = arrays[key].item() if key in arrays else expected
        if found != expected:
            raise UserError(f"{path} was made with {key} {found}, expected {expected}")
    mu, sigma = (torch.from_numpy(arrays[name].astype(np.float64)) for name in names)
    return FeatureSet(mu, sigma, arrays.get(f"features{SUFFIXES[kind]}"), source=source)


def load_statistics(path, extractors, kinds, *, metrics, side):
    """{kind: FeatureSet} of a statistics file, for images of `side` pixels, with features of ADM's
    pictures where `metrics` need them. UserError: there is no file; it was made for others, or
    lacks a kind, or features of real images that a metric needs.
    """
    if not Path(path).is_file():
        raise UserError(f"there is no {path}: scripts/compute_fid_stats.py makes statistics")
    arrays, pictures = read_arrays(path, leave_out=("arr_0",)), map_array(path, "arr_0")
    source = _describe_file(path, arrays, pictures)
    if pictures is not None:
        arrays["resolution"] = np.asarray(pictures.shape[1])
    sets = {kind: _read_kind(arrays, kind, extractors, side, source) for kind in kinds}
    if pictures is not None and any(METRICS[name].rows for name in metrics):
        parts = tqdm(np.split(pictures, range(BATCH, len(pictures), BATCH)), "arr_0")
        found = [extractors(to_images(part)) for part in parts]
        rows = {kind: torch.cat([part[kind] for part in found]).cpu().numpy() for kind in sets}
        sets = {kind: replace(known, features=rows[kind]) for kind, known in sets.items()}
    for name in metrics:
        if METRICS[name].rows == "needed" and sets[METRICS[name].kind].features is None:
            raise UserError(
                f"{path} has no features of real images, which {name} needs: make a file with "
                "scripts/compute_fid_stats.py"
            )
    return sets


def load_real(settings, extractors, dataset, *, metrics, side, device):
    """{kind: FeatureSet} of the real images: of the statistics file dataset.fid_stats if it is
    given, else of `dataset`, not augmented or None, measured here. None where no metric compares.
    settings: config.dataset; side: of the generated images in pixels. UserError: neither a file nor
    a data set of few images; they do not fit the generated ones.
    """
    kinds = {METRICS[name].kind for name in metrics} & SUFFIXES.keys()
    if not kinds:
        return None
    if settings.fid_stats:
        return load_statistics(settings.fid_stats, extractors, kinds, metrics=metrics, side=side)
    if dataset is None or dataset.latent or len(dataset) > MEASURE_UP_TO:
        raise UserError(
            "dataset.fid_stats names no statistics file: make one with "
            "scripts/compute_fid_stats.py, and pass --config.dataset.fid_stats=FILE"
        )
    if dataset.shape[-1] != side:
        raise UserError(
            f"the images of the data set {settings.name} are {dataset.shape[-1]} pixels wide, but "
            f"the generated images {side}: give dataset.resolution or dataset.fid_stats that fit"
        )
    parts = list(extract_features(dataset, range(len(dataset)), extractors))
    rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    known = {"agreement": rows["correct"].double().mean().item()} if "correct" in rows else {}
    identity = {"dataset": settings.name, "list_sha256": dataset.list_sha256(*dataset.sizes)}
    source = {"file": None, "count": len(dataset), "origin": "measured here", "images": identity}
    return {k: make_feature_set(rows[k].numpy(), device, source=source, **known) for k in kinds}
