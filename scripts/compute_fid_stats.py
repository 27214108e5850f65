"""Write the statistics of a data set that FID compares with.

    python scripts/compute_fid_stats.py --dataset=cifar10 --path=assets/datasets/cifar10 \\
        --resolution=32 --features=inception --out=assets/fid_stats/cifar10.npz

--dataset=folder takes a directory of images (any depth), --dataset=digits needs no path. The file
holds mu and sigma, as pytorch-fid reads them, the extractor, resolution, count and preprocessing,
which an evaluation checks, and the features of a random subset, for precision and recall.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import utils
from datasets import DATASETS, LATENTS, get_dataset
from libs.evaluate import FEATURES, Moments, make_features, save_statistics
from libs.runtime import REQUIRED, file_path, run_main

IMAGES = [name for name in DATASETS if name not in LATENTS]
FLAGS = {
    "dataset": (str, REQUIRED, f"one of {', '.join(IMAGES)}"),
    "path": (file_path, None, "the data set's directory"),
    "resolution": (int, REQUIRED, "side of the images in pixels"),
    "features": (str, "inception", f"one of {', '.join(FEATURES)}"),
    "weights": (file_path, None, "the feature network's file; where it usually is if not given"),
    "out": (file_path, REQUIRED, "the .npz file to write"),
    "max_images": (int, None, "take this many images, evenly spaced; all if not given"),
    "kept_features": (int, 10_000, "store the features of this many random images; 0 for none"),
    "batch_size": (int, 50, "images a batch"),
    "num_workers": (int, 2, "processes that read images; 0 reads in this one"),
    "device": (str, "cuda" if torch.cuda.is_available() else "cpu", "where the network runs"),
}


def choose_images(length, max_images):
    """Evenly spaced indices, so that a part of a folder sorted by class has every class."""
    count = min(length, max_images or length)
    return [int(i) for i in np.arange(count) * length // count]


def choose_stored(count, stored):
    """bool (count,): a random subset of `stored` images, or all; the same at every call."""
    rng = torch.Generator().manual_seed(utils.derive_seed("kept features"))
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[torch.randperm(count, generator=rng)[:stored]] = True
    return chosen


def compute(dataset, indices, features, *, stored, batch_size, num_workers):
    """(Moments of all images `indices`, features (m, dim) of those that `stored` (n,) marks)."""
    moments, rows, chosen = Moments(features.dim), [], iter(stored.split(batch_size))
    batches = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    keys = [[(0, index) for index in batch] for batch in batches]
    loader = DataLoader(dataset, batch_sampler=keys, num_workers=num_workers)
    for images, _ in tqdm(loader, desc="features", unit="batch"):
        # The values that pytorch-fid has from an 8-bit file, free of the rounding of [-1, 1].
        found = features(((images + 1) * 127.5).round() / 255).cpu()
        moments.update(found)
        rows.append(found[next(chosen)])
    return moments, torch.cat(rows)


def main(args):
    """args: the flags of FLAGS."""
    utils.file_to_write(args.out, "--out")
    dataset = get_dataset(args.dataset, path=args.path, resolution=args.resolution, labels=False)
    features = make_features(args.features, args.weights, args.device)
    indices = choose_images(len(dataset), args.max_images)
    stored = choose_stored(len(indices), args.kept_features)
    moments, rows = compute(
        dataset, indices, features,
        stored=stored, batch_size=args.batch_size, num_workers=args.num_workers,
    )  # fmt: skip
    mu, sigma = moments.mean_and_covariance()
    preprocessing = (
        f"{args.dataset}, {len(indices)} of {len(dataset)} images; {dataset.preprocessing}; 8 bit"
    )
    save_statistics(
        args.out, mu=mu, sigma=sigma, count=len(indices), extractor=features.name,
        resolution=args.resolution, preprocessing=preprocessing,
        features=rows if len(rows) else None,
    )  # fmt: skip
    print(f"wrote {args.out}: {features.name}, {args.resolution} pixels, {preprocessing}")


if __name__ == "__main__":
    run_main(main, FLAGS)
