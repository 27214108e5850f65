"""Times cached latents: `python benchmarks/bench_features.py`, on a quiet machine.

Writes random records in the shards of libs.data.latents, and some in the official layouts of one
file
an image, warms the page cache, and reads 256 random ones at a time. Prints a table and writes it to
benchmarks/results/features_cpu.md, with every figure in features_cpu.json. A figure is the median
of many batches, its spread the 10th and 90th percentile. Needs 1.2 GB of disk and memory.
"""

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.utils.data import DataLoader, default_collate  # noqa: E402

from datasets import GlobalBatchSampler, get_dataset  # noqa: E402
from libs.data.latent_writer import Packing, ShardWriter, make_settings  # noqa: E402
from libs.data.latents import Features, empty  # noqa: E402
from libs.runtime.logs import environment  # noqa: E402

BATCH = 256
PACKED_BYTES = 1 << 29  # 16 times the last-level cache of the machine of the published figures
FILES = 2048


def random_moments(rng, count, side):
    return rng.standard_normal((count, 8, side, side), np.float32).astype(np.float16)


def write_packed(folder, resolution, flips, size=PACKED_BYTES):
    """`size` bytes of records in eight shards, written as an extraction writes them."""
    side = resolution // 8
    records = size // (2 * 8 * side * side)
    num_images = records // (1 + flips)
    settings = make_settings(
        record_shape=(8, side, side), scale_factor=0.18215, resolution=resolution,
        autoencoder_sha256="0" * 64, precision="fp32", flips=flips, crop="none", source="imagenet",
        images_sha256="0" * 64, num_images=num_images, images_per_shard=num_images // 8,
        class_names=tuple(f"class {i}" for i in range(1000)),
    )  # fmt: skip
    packing, rng = Packing(folder, settings), np.random.default_rng(0)
    packing.begin()
    for number in range(packing.num_shards):
        with ShardWriter(packing, number) as writer:
            writer.write(random_moments(rng, records // 8, side))
            writer.commit({})
    packing.finish(rng.integers(1000, size=num_images))
    return folder


def write_files(folder, resolution, layout):
    """FILES files of the official layout {i}.npy.npz, or {i}.npy."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(FILES):
        moments, label = random_moments(rng, 1, resolution // 8)[0].astype(np.float32), i % 1000
        if layout == ".npy.npz":
            np.savez(folder / f"{i}.npy", z=moments, label=label)
        else:
            pair = np.empty(2, object)
            pair[:] = [moments, label]
            np.save(folder / f"{i}.npy", pair)
    return folder


def measure(call, items, repeats):
    """Items a second of call(i), i = 0, 1, ...: median, and 10th and 90th percentile."""
    seconds = []
    for i in range(repeats + 3):
        start = time.perf_counter()
        call(i)
        seconds.append(time.perf_counter() - start)
    rates = sorted(items / s for s in seconds[3:])
    low, high = rates[len(rates) // 10], rates[-1 - len(rates) // 10]
    return {"per_s": round(rates[len(rates) // 2]), "spread": [round(low), round(high)]}


def time_reads(features, repeats):
    """Features.read into a new array, and into one that is there."""
    rng = np.random.default_rng(1)
    records = rng.integers(len(features), size=(repeats + 3, BATCH))
    out = empty((BATCH, *features.shape), np.float16)
    yield "read, new array", measure(lambda i: features.read(records[i]), BATCH, repeats)
    yield "read, out=", measure(lambda i: features.read(records[i], out=out), BATCH, repeats)
    np.testing.assert_array_equal(out, np.stack([features.read([r])[0] for r in records[-1]]))


def time_items(dataset, repeats, workers):
    """Labelled items: as the Dataset gives them, collated, and out of a DataLoader."""
    sampler = GlobalBatchSampler(
        len(dataset), BATCH, num_processes=1, rank=0, accumulation=1, seed=0
    )
    keys = list(itertools.islice(sampler, repeats + 3))

    def collated(i):
        return default_collate(dataset.__getitems__(keys[i]))

    yield "items", measure(lambda i: dataset.__getitems__(keys[i]), BATCH, repeats)
    yield "items, collated", measure(collated, BATCH, repeats)
    loader = iter(DataLoader(dataset, batch_sampler=sampler, num_workers=workers))
    yield f"DataLoader, {workers} workers", measure(lambda i: next(loader), BATCH, repeats)


def run_all(folder, repeats):
    """Rows of the table."""
    for resolution in (256, 512):
        packed = write_packed(folder / str(resolution), resolution, flips=True)
        features = Features(packed)
        features.verify()  # reads everything: the cache is warm
        size = features.read([0]).nbytes
        name = f"imagenet{resolution}_features"
        dataset = get_dataset(name, path=packed, random_flip=True)
        timed = itertools.chain(time_reads(features, repeats), time_items(dataset, repeats, 2))
        for what, figures in timed:
            yield {"px": resolution, "layout": "shards", "what": what, "bytes": size, **figures}
        for layout in (".npy", ".npy.npz"):
            files = write_files(folder / f"{resolution}{layout}", resolution, layout)
            dataset = get_dataset(name, path=files)
            few = max(5, repeats // 20)
            what, figures = next(time_items(dataset, few, 2))
            row = {"px": resolution, "layout": f"{{i}}{layout}", "what": what, "bytes": 2 * size}
            yield {**row, **figures}


def table(rows, header):
    lines = [
        header, "",
        "| px | layout | what | a second | 10-90% | GB/s |",
        "|---" * 6 + "|",
    ]  # fmt: skip
    for r in rows:
        low, high = r["spread"]
        rate = f"{r['per_s'] * r['bytes'] / 1e9:.2f}"
        cells = [r["px"], r["layout"], r["what"], f"{r['per_s']:,}", f"{low:,} - {high:,}", rate]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=400)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()

    load, cores, machine = os.getloadavg()[0], os.cpu_count(), environment()
    torch.set_num_threads(1)  # as in the workers of a DataLoader
    with tempfile.TemporaryDirectory() as folder:
        rows = list(run_all(Path(folder), args.repeats))
    header = (
        f"`bench_features.py`: {machine['devices'][0]}, {cores} cores, torch {torch.__version__}, "
        f"numpy {np.__version__}; load average at the start {load:.1f}. {BATCH} random records or "
        "items at a time from a warm cache, moments 8x32x32 (256 px) and 8x64x64 (512 px) in "
        "float16, one file an image in float32. `read` copies every byte into one contiguous array "
        "on one core; items are (float32 moments, label) by the keyed draw of flips, on one "
        "thread as in a DataLoader's worker; GB/s is of the bytes that are read."
    )
    args.out.mkdir(parents=True, exist_ok=True)
    about = {"cpu": machine["devices"][0], "cores": cores, "torch": torch.__version__}
    rows = [{**row, **about, "load": round(load, 2)} for row in rows]
    (args.out / "features_cpu.json").write_text(json.dumps(rows, indent=1) + "\n")
    (args.out / "features_cpu.md").write_text(table(rows, header))
    print(table(rows, header))


if __name__ == "__main__":
    main()
