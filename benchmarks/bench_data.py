"""Times cached latents: `python benchmarks/bench_data.py`, on a quiet machine.

Writes random records in packed shards, warms the page cache, and reads 256 random records at a
time on one core, raw and as labelled items. Records are added to features_cpu.json in
benchmarks/results, the table beside them: per_s is the median of many batches, spread the 10th and
90th percentile. Needs 1.1 GB of disk and memory.

`--pictures=50000` times eval.py --images instead: pictures of 256 px in an npz (10 GB of disk and
memory) and 2,000 PNG files, through Inception with random weights, then the metrics against 10,000
real pictures; and all metrics of as many random features. Records are in metrics_<gpu>.json.
"""

import os
import runpy
import sys
import tempfile
import time
from unittest import mock

import harness
import numpy as np
import torch
import torchvision

from datasets import get_dataset
from libs.data import LatentWriter, open_latents
from libs.evaluate import choose_metrics, compute_metrics, make_feature_set
from libs.files import hash_file
from utils import read_json, save_png

BATCH = 256
PACKED_BYTES = 1 << 29  # 16 times the last-level cache of the machine of the published figures
COLUMNS = ("px", "layout", "what", "bytes", "per_s", "spread", "cpu", "cores", "torch", "load")


def write_packed(folder, resolution, flips, size=PACKED_BYTES):
    """`size` bytes of records in eight shards, written as an extraction writes them."""
    side = resolution // 8
    records = size // (2 * 8 * side * side)
    num_images = records // (1 + flips)
    writer = LatentWriter(
        folder, record_shape=(8, side, side), flips=flips, num_images=num_images,
        images_per_shard=num_images // 8, class_names=tuple(map(str, range(1000))),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    writer.begin()
    for number in writer.missing():
        moments = rng.standard_normal((records // 8, 8, side, side), np.float32)
        writer.write(number, [(moments.astype(np.float16),)])
    writer.finish(rng.integers(1000, size=num_images))
    return folder


def measure(read, repeats, length):
    """read(BATCH random numbers below `length`): items a second, median and percentiles."""
    batches = iter(np.random.default_rng(1).integers(length, size=(repeats + 3, BATCH)))
    times = harness.time_apart(lambda: read(next(batches)), "cpu", repeats)
    found = harness.summarize([1e3 * BATCH / ms for ms in reversed(times)])
    return {"per_s": round(found["ms"]), "spread": [round(x) for x in found["spread"]]}


def time_packed(folder, resolution, repeats):
    """Rows of packed shards: raw records, and labelled items."""
    packed = write_packed(folder / str(resolution), resolution, flips=True)
    latents = open_latents(packed)  # written just now: the cache is warm
    dataset = get_dataset(f"imagenet{resolution}_features", path=packed, random_flip=True)
    row = {"px": resolution, "layout": "shards", "bytes": latents.read([0]).nbytes}
    yield {**row, "what": "read, new array", **measure(latents.read, repeats, len(latents))}

    def read_items(images):
        return dataset.__getitems__([(0, image) for image in images.tolist()])

    yield {**row, "what": "items", **measure(read_items, repeats, len(dataset))}


def write_pictures(folder, n):
    """Weights, statistics as ADM's, and pictures of 256 px: {layout: path}."""
    network = torchvision.models.inception_v3(
        num_classes=1008, aux_logits=False, init_weights=False
    )
    for layer in network.modules():  # features as large as the pictures' values
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight)
    torch.save(network.state_dict(), folder / "inception.pth")
    some = np.random.default_rng(0).integers(256, size=(1000, 256, 256, 3), dtype=np.uint8)
    np.savez(folder / "pictures.npz", arr_0=np.resize(some, (n, 256, 256, 3)))
    (folder / "png").mkdir()
    for i in range(min(n, 2000)):
        save_png(folder / "png" / f"{i}.png", torch.from_numpy(some[i % 1000]).permute(2, 0, 1))
    real = dict(mu=np.zeros(2048), sigma=np.eye(2048), mu_s=np.zeros(2023), sigma_s=np.eye(2023))
    np.savez(folder / "real.npz", **real, arr_0=np.resize(some, (min(n, 10_000), 256, 256, 3)))
    return {"npz": folder / "pictures.npz", "PNG": folder / "png"}


def time_metrics(folder, n):
    """Rows of eval.py --images, in this process."""
    for layout, path in write_pictures(folder, n).items():
        keys = {"sample.metrics": "adm,kid,density_coverage", "sample.features": "inception_tf"}
        keys["sample.fid_weights_path"] = weights = folder / "inception.pth"
        keys["dataset.fid_stats"] = folder / "real.npz"
        words = [f"--images={path}", *(f"--config.{key}={value}" for key, value in keys.items())]
        digest, name = hash_file(weights)[:8], "libs.evaluate.inception.INCEPTION_SHA256_PREFIX"
        with mock.patch(name, digest), mock.patch.object(sys, "argv", ["eval.py", *words]):
            runpy.run_path(str(harness.ROOT / "eval.py"), run_name="__main__")
        found = read_json(f"{path}.json")
        numbers = ("n", "img_s", "figures_s")
        yield {"layout": layout, **{key: round(found[key], 1) for key in numbers}}


def time_stored(n, device):
    """The row of all metrics of n random features against a fifth as many, as eval.py has them."""
    names = choose_metrics("adm,dinov2,kid,density_coverage")
    widths = {"features": 2048, "spatial": 2023, "logits": 1008, "dinov2": 1024}
    rng, mixed = np.random.default_rng(0), np.random.default_rng(1).normal(size=(2048, 2048)) / 45
    rows = [np.maximum(rng.normal(size=(m, 2048)) @ mixed, 0).astype("f4") for m in (n, n // 5)]
    start = time.monotonic()
    sets = [{k: make_feature_set(x[:, :w], device) for k, w in widths.items()} for x in rows]
    found = compute_metrics(*sets, names)
    assert None not in found.values()
    seconds = round(time.monotonic() - start, 1)
    return {"layout": "stored", "n": n, "img_s": None, "figures_s": seconds}


def main(argv=None):
    parser = harness.make_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=400)
    parser.add_argument("--pictures", type=int, default=0)
    args = parser.parse_args(argv)
    if args.pictures:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        path = harness.result_path(args.out, "metrics", device)
        with tempfile.TemporaryDirectory() as name:
            rows = list(time_metrics(harness.Path(name), args.pictures))
        rows.append(time_stored(args.pictures, device))
        rows = [row | harness.describe_setting(device, args.commit) for row in rows]
        return harness.write(path, rows, harness.make_table(rows[0], (r.values() for r in rows)))
    about = {"cpu": harness.device_name("cpu"), "cores": os.cpu_count()}
    about |= {"torch": torch.__version__, "load": round(os.getloadavg()[0], 2)}
    torch.set_num_threads(1)  # as in the workers of a DataLoader
    with tempfile.TemporaryDirectory() as name:
        folder = harness.Path(name)
        rows = [row for px in (256, 512) for row in time_packed(folder, px, args.repeats)]
    path, rows = args.out / "features_cpu.json", [{**row, **about} for row in rows]
    records = harness.merge(harness.load(path), rows, COLUMNS[:3])
    table = harness.make_table(COLUMNS, ([r[key] for key in COLUMNS] for r in records))
    harness.write(path, records, table)


if __name__ == "__main__":
    sys.exit(main())
