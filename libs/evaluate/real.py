"""The features of real images: statistics files, ours and others', or a data set measured here."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from libs.evaluate.features import BATCH, extract_features, to_images
from libs.evaluate.metrics import (
    KINDS,
    NEED_ROWS,
    WITHOUT_REAL,
    FeatureSet,
    Moments,
    make_feature_set,
)
from libs.files import hash_file, map_array, read_arrays
from utils import UserError, replacing

MEASURE_UP_TO = 10_000  # images of a data set without a statistics file
SUFFIXES = {"features": "", "spatial": "_s", "dinov2": "_dinov2"}  # kind -> of names in a file


def save_statistics(path, *, mu, sigma, features=None, **record):
    """Write an .npz that pytorch-fid reads too. features: (m, dim) of some random images; record:
    count, extractor, resolution and preprocessing of all, class_agreement where it is known, and
    mu, sigma and features of further kinds, with SUFFIXES.
    """
    arrays = {"mu": np.asarray(mu, np.float64), "sigma": np.asarray(sigma, np.float64), **record}
    if features is not None:
        arrays["features"] = np.asarray(features, np.float32)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


class Statistics:
    """Sums of the features of real images and the features of some, for a file."""

    def __init__(self, extractors):
        dims = {kind: dim for kind, dim in extractors.dims.items() if kind in SUFFIXES}
        self.extractors, self.moments = extractors, {k: Moments(dim) for k, dim in dims.items()}
        self.rows = {kind: [] for kind in dims}

    def update(self, found, chosen):
        """found: {kind: features (B, width)}; chosen: bool (B,), whose features are stored."""
        for kind, moments in self.moments.items():
            moments.update(found[kind])
            self.rows[kind].append(found[kind][chosen])

    def save(self, path, **record):
        """Write the file; record: as of save_statistics."""
        arrays, names = {}, self.extractors.names
        for kind, moments in self.moments.items():
            suffix, rows = SUFFIXES[kind], torch.cat(self.rows[kind])
            arrays[f"mu{suffix}"], arrays[f"sigma{suffix}"] = moments.mean_and_covariance()
            arrays |= {f"features{suffix}": rows.numpy()} if len(rows) else {}
        arrays |= {"extractor_dinov2": names["dinov2"]} if "dinov2" in names else {}
        save_statistics(path, **arrays, extractor=self.extractors.name, **record)


def _describe_file(path, arrays, pictures):
    """What records say of a statistics file."""
    origin = "mu and sigma alone, as of pytorch-fid, U-ViT or JiT"
    if arrays.keys() >= {"count", "extractor", "resolution", "preprocessing"}:
        origin = f"ours: {arrays['preprocessing']}"
    elif pictures is not None and "mu_s" in arrays:
        origin = (
            "ADM's: of its training set mu and sigma for FID, mu_s and sigma_s for sFID; "
            f"{len(pictures):,} pictures, arr_0, for what needs features"
        )
    found = {"file": str(path), "sha256": hash_file(path), "origin": origin}
    found["count"] = arrays["count"].item() if "count" in arrays else None
    if "class_agreement" in arrays:  # of the real images: the ceiling of generated ones
        found["class_agreement"] = arrays["class_agreement"].item()
    return found


def load_statistics(path, *, extractor, resolution, dim, kind="features"):
    """The FeatureSet of a kind in a statistics file, for images of `resolution` and features
    (n, dim) named `extractor`; UserError if it is not there, or made for others. Moments are
    float32 or float64. A file of U-ViT, pytorch-fid or JiT has mu and sigma alone, ADM's pictures
    besides; both are taken as they are.
    """
    if not Path(path).is_file():
        raise UserError(f"there is no {path}: scripts/compute_fid_stats.py makes statistics")
    arrays, pictures = read_arrays(path, leave_out=("arr_0",)), map_array(path, "arr_0")
    names, expected = [name + SUFFIXES[kind] for name in ("mu", "sigma")], [(dim,), (dim, dim)]
    shapes = [np.shape(arrays.get(name)) for name in names]
    if shapes != expected:
        said = f"{' and '.join(names)} have shapes {shapes}, expected {expected}"
        raise UserError(f"{path}: {said}; scripts/compute_fid_stats.py --metrics makes them")
    made = {} if pictures is None else {"resolution": pictures.shape[1]}
    made |= {key: arrays[key].item() for key in ("resolution", "extractor") if key in arrays}
    if kind == "dinov2":
        made["extractor"] = arrays["extractor_dinov2"].item()
    for key, expected in (("extractor", extractor), ("resolution", resolution)):
        if (found := made.get(key, expected)) != expected:
            raise UserError(f"{path} was made with {key} {found}, expected {expected}")
    mu, sigma = (torch.from_numpy(arrays[name].astype(np.float64)) for name in names)
    rows = arrays.get(f"features{SUFFIXES[kind]}")
    return FeatureSet(mu, sigma, rows, source=_describe_file(path, arrays, pictures))


def _load_file(path, extractors, metrics, side):
    """{kind: FeatureSet} of a statistics file for `metrics`, with the features of ADM's pictures
    where one needs them. UserError: a metric needs features of real images that it lacks.
    """
    sets, pictures = {}, None
    for kind in {KINDS.get(name, "features") for name in set(metrics).difference(WITHOUT_REAL)}:
        given = dict(extractor=extractors.names[kind], resolution=side, dim=extractors.dims[kind])
        sets[kind] = load_statistics(path, **given, kind=kind)
    if {"precision_recall", *NEED_ROWS} & set(metrics):
        pictures = map_array(path, "arr_0")
    if pictures is not None:
        found = [
            {kind: rows.cpu() for kind, rows in extractors(to_images(part)).items()}
            for part in tqdm(np.split(pictures, range(BATCH, len(pictures), BATCH)), "arr_0")
        ]
        for kind in sets:
            rows = torch.cat([part[kind] for part in found]).numpy()
            sets[kind] = replace(sets[kind], features=rows)
    for name in set(metrics).intersection(NEED_ROWS):
        if sets[KINDS.get(name, "features")].features is None:
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
    if set(metrics) <= set(WITHOUT_REAL):
        return None
    if settings.fid_stats:
        return _load_file(settings.fid_stats, extractors, metrics, side)
    if dataset is None or getattr(dataset, "latent", False) or len(dataset) > MEASURE_UP_TO:
        raise UserError(
            "dataset.fid_stats names no statistics file: make one with "
            "scripts/compute_fid_stats.py, and pass --config.dataset.fid_stats=FILE"
        )
    if dataset.shape[-1] != side:
        raise UserError(
            f"the images of the data set {settings.name} are {dataset.shape[-1]} pixels wide, but "
            f"the generated images {side}: give dataset.resolution or dataset.fid_stats that fit"
        )
    classify, parts, agreeing = extractors.classify if dataset.num_classes else None, [], 0
    for found, images, labels in extract_features(dataset, range(len(dataset)), extractors):
        parts.append(found)
        if classify:
            agreeing += (classify(images).cpu() == labels).sum().item()
    identity = {"dataset": settings.name, "list_sha256": dataset.list_sha256(*dataset.sizes)}
    source = {"file": None, "count": len(dataset), "origin": "measured here", "images": identity}
    more = dict(agreement=agreeing / len(dataset) if classify else None, source=source)
    rows = {kind: torch.cat([part[kind] for part in parts]).numpy() for kind in extractors.dims}
    return {kind: make_feature_set(rows[kind], device, **more) for kind in rows}
