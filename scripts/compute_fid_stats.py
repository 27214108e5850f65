"""Write the statistics of a data set that FID compares with: mu and sigma, as pytorch-fid reads
them, how they were made, which an evaluation checks, and features of some images.

    python scripts/compute_fid_stats.py --dataset=cifar10 --path=assets/datasets/cifar10 \\
        --resolution=32 --features=inception --out=assets/fid_stats/cifar10.npz
"""

import checkout  # noqa: F401 - finds the project
import torch
from tqdm import tqdm

import utils
from configs.common import d
from datasets import get_dataset
from libs.evaluate import FEATURES, Extractors, Statistics, choose_metrics, extract_features
from libs.runtime import REQUIRED, file_path, run_main

FLAGS = {
    "dataset": (str, REQUIRED, "a data set of images: cifar10, fashion_mnist_test, imagenet..."),
    "path": (file_path, None, "the data set's directory; images of a folder may lie at any depth"),
    "resolution": (int, REQUIRED, "side of the images in pixels"),
    "features": (str, "inception", f"one of {', '.join(FEATURES)}"),
    "weights": (file_path, None, "the feature network's file; where it usually is if not given"),
    "metrics": (str, "standard", "what the file will serve, as sample.metrics"),
    "dinov2": (file_path, None, "DINOv2's file, for metrics in its features"),
    "out": (file_path, REQUIRED, "the .npz file to write"),
    "kept_features": (int, 10_000, "keep the features of this many, evenly spaced; 0 for none"),
    "batch_size": (int, 50, "images a batch"),
    "num_workers": (int, 2, "processes that read images; 0 reads in this one"),
}


def main(args):
    utils.file_to_write(args.out, "--out")
    settings = d(features=args.features, fid_weights_path=args.weights, dinov2_path=args.dinov2)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    extractors = Extractors(settings, choose_metrics(args.metrics, "--metrics"), device)
    given = dict(path=args.path, resolution=args.resolution, labels=bool(extractors.classify))
    dataset = get_dataset(args.dataset, **given)
    print(f"{len(dataset):,} images; left out: {dataset.left_out or 'nothing'}")
    count, kept = len(dataset), min(args.kept_features, len(dataset))
    stored = torch.zeros(count, dtype=torch.bool)
    stored[[i * count // kept for i in range(kept)]] = True  # of a folder, each class has its share
    loading = dict(batch_size=args.batch_size, num_workers=args.num_workers)
    batches = extract_features(dataset, range(count), extractors, **loading)
    statistics, correct = Statistics(extractors), []
    parts = tqdm(stored.split(args.batch_size))
    for found, chosen in zip(batches, parts, strict=True):
        statistics.update(found, chosen)
        correct += found.get("correct", torch.empty(0)).tolist()
    images = f"{args.dataset}, {count} images; {dataset.preprocessing}; 8 bit"
    record = {"count": count, "resolution": dataset.shape[-1], "preprocessing": images}
    record |= {"class_agreement": sum(correct) / count} if correct else {}
    statistics.save(args.out, **record)
    print(f"wrote {args.out}: {extractors.name}, {record}")


if __name__ == "__main__":
    run_main(main, FLAGS)
