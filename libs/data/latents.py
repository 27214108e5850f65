"""Packed latents: an autoencoder's moments of every image in memory-mapped shards.

A folder holds `manifest.json`, `shard-00000.bin`, ... and, with classes, `labels.bin`; with patch
tokens of an image network, for the loss term `repa`, also `features-00000.bin`, ... A shard is
raw little-endian float16 records (2C, h, w), mean then log-variance, unscaled: record
i * (1 + flips) + f is image i, flipped left to right if f is 1. Features are float16 records (N, D)
in the same order. Shards hold `images_per_shard` images each, the last fewer; labels are int64, one
an image. The manifest has the settings of the extraction, and `shards`, `feature_shards` and
`labels`, sizes and checksums of the files, once it is finished.
"""

from pathlib import Path

import numpy as np
import torch

from libs.files import hash_file
from utils import UserError, read_json

MANIFEST, LABELS = "manifest.json", "labels.bin"
FORMAT = "DiM latents 1"
DTYPE = np.dtype("<f2")
MAKE = "scripts/extract_imagenet_feature.py"


def shard_name(number, kind="shard"):
    return f"{kind}-{number:05}.bin"


class PackedLatents:
    """The packed latents in a folder, memory-mapped.

    Attributes: `manifest`, a dict; `shape` (2C, h, w) of a record; `num_images`; `flips`, whether
    each image has a flipped record; `labels` int64 (num_images,) and `num_classes`, None and 0
    without classes; `feature_shape` (N, D) of an image's features, None without. Raises
    UserError for unfinished latents and for files cut short. Can be pickled: it is opened again.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.manifest = manifest = read_json(self.folder / MANIFEST)
        if manifest.get("format") != FORMAT or "shards" not in manifest:
            raise UserError(f"the latents in {folder} are unfinished: run {MAKE} again as before")
        self.shape, self.flips = manifest["record_shape"], manifest["flips"]
        self.num_images, self.labels, self.num_classes = manifest["num_images"], None, 0
        self._records_a_shard = manifest["images_per_shard"] * (1 + self.flips)
        self.feature_shape = manifest.get("feature_shape")
        self._shards = [self._map(entry, self.shape) for entry in manifest["shards"]]
        others = manifest.get("feature_shards", ())
        self._features = [self._map(entry, self.feature_shape) for entry in others]
        if manifest["class_names"] is not None:
            self.labels = np.fromfile(self.folder / LABELS, "<i8").astype(np.int64)
            self.num_classes = len(manifest["class_names"])

    def __reduce__(self):
        return type(self), (self.folder,)

    def __len__(self):
        """The number of records."""
        return self.num_images * (1 + self.flips)

    def _map(self, entry, shape):
        """The records of a shard: nothing is read before it is used, nothing written ever."""
        path = self.folder / entry["file"]
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise UserError(
                f"{path} has {size} bytes, but {MANIFEST} says {entry['bytes']}: copy it again"
            )
        numbers = size // DTYPE.itemsize  # by torch: numpy's map keeps a file open for each shard
        flat = torch.from_file(str(path), shared=False, size=numbers, dtype=torch.float16)
        return flat.numpy().reshape(-1, *shape)

    def read(self, records, shards=None):
        """Copies of records (n,), integers, as float16 (n, 2C, h, w), or those of other shards."""
        shards = shards or self._shards
        numbers, rows = np.divmod(np.asarray(records, np.int64), self._records_a_shard)
        out = np.empty((len(rows), *shards[0].shape[1:]), np.float16)
        # A copy a record: 510k of 16 KiB a second on one core. `take` of a shard at a time: 124k.
        for target, number, row in zip(out, numbers.tolist(), rows.tolist(), strict=True):
            target[...] = shards[number][row]
        return out

    def read_labelled(self, images, flipped):
        """images (n,) integers, flipped (n,) bool -> float16 (n, 2C, h, w), int64 (n,) or None."""
        records = np.asarray(images, np.int64) * (1 + self.flips) + flipped
        return self.read(records), None if self.labels is None else self.labels[images]

    def read_features(self, images, flipped):
        """images (n,) integers, flipped (n,) bool -> float16 (n, N, D)."""
        return self.read(np.asarray(images) * (1 + self.flips) + flipped, self._features)

    def find_damage(self):
        """Yields the files whose SHA-256 is not the manifest's."""
        entries = [*self.manifest["shards"], *self.manifest.get("feature_shards", ())]
        entries += [self.manifest["labels"]] if self.labels is not None else []
        for entry in entries:
            if hash_file(self.folder / entry["file"]) != entry["sha256"]:
                yield self.folder / entry["file"]
