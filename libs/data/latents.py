"""Packed latents: an autoencoder's moments of every image in memory-mapped shards.

A folder holds `manifest.json`, `shard-00000.bin`, ... and, with classes, `labels.bin`. A shard is
raw little-endian float16 records (2C, h, w), mean then log-variance, unscaled: record
i * (1 + flips) + f is image i, flipped left to right if f is 1. Shards hold `images_per_shard`
images each, the last fewer; labels are int64, one an image. The manifest is written last: without
it, the extraction is unfinished.
"""

import math
import os
import stat
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import get_worker_info

from libs.files import sha256_of
from utils import UserError, listed, read_json

MANIFEST, LABELS = "manifest.json", "labels.bin"
FORMAT = "DiM latents 1"
DTYPE = np.dtype("<f2")
MAKE = "scripts/extract_imagenet_feature.py"
_REPAIR = f"delete it and run {MAKE} again as before, which makes only what is missing"
MAX_RECORD_BYTES = 1 << 26  # moments of 16384 x 16384 pixels
PROGRESS = ".progress"  # what a restarted extraction goes on from; no reader needs it

# What an extraction is made with, the same in its plan and in the manifest, key -> type.
SETTINGS = {
    "format": str, "record_shape": tuple, "dtype": str, "scale_factor": float, "resolution": int,
    "autoencoder_sha256": str, "precision": str, "flips": bool, "crop": str, "source": str,
    "images_sha256": str, "num_images": int, "images_per_shard": int,
    "class_names": (tuple, type(None)),
}  # fmt: skip
_RESULTS = {"labels": (dict, type(None)), "stand_ins": dict, "shards": tuple}
SHARD_ENTRY = {"file": str, "records": int, "bytes": int, "sha256": str}


def shard_name(number):
    return f"shard-{number:05}.bin"


def shard_images(settings, number):
    """The images of shard `number`, a range."""
    size, total = settings["images_per_shard"], settings["num_images"]
    return range(number * size, min((number + 1) * size, total))


def num_shards(settings):
    return -(-settings["num_images"] // settings["images_per_shard"])


def _record_bytes(settings):
    return math.prod(settings["record_shape"]) * DTYPE.itemsize


def shard_records(settings, number):
    return len(shard_images(settings, number)) * (1 + settings["flips"])


# ------------------------------------------------------------ checks


def has_types(value, types):
    """Whether a dict has these keys with these types, where True is no int."""
    return isinstance(value, dict) and all(
        key in value
        and isinstance(value[key], kind)
        and (kind is bool or not isinstance(value[key], bool))
        for key, kind in types.items()
    )


def settings_fault(settings):
    """What is impossible in the settings of a manifest, or None."""
    if not has_types(settings, SETTINGS):
        wrong = [key for key, kind in SETTINGS.items() if not has_types(settings, {key: kind})]
        return f"{listed(wrong)} missing or of another type"
    shape, names = settings["record_shape"], settings["class_names"]
    found = (settings["format"], settings["dtype"])
    if found != (FORMAT, "float16"):
        return f"format and dtype {found}, not {(FORMAT, 'float16')}"
    if len(shape) != 3 or not all(type(side) is int and side > 0 for side in shape) or shape[0] % 2:
        return f"record_shape {shape} is not (2C, h, w)"
    if _record_bytes(settings) > MAX_RECORD_BYTES:
        return f"record_shape {shape} is absurdly large"
    if settings["num_images"] < 1 or settings["images_per_shard"] < 1:
        return "num_images and images_per_shard must be 1 or more"
    if names is not None and not all(isinstance(name, str) for name in names):
        return "class_names are not text"
    return None


def _manifest_fault(manifest):
    """What is impossible in a manifest, or None; its file names are ours alone, none leads away."""
    fault = settings_fault(manifest)
    if fault:
        return fault
    if not has_types(manifest, _RESULTS):
        return "labels, stand_ins or shards missing or of another type"
    if len(manifest["shards"]) != num_shards(manifest):
        return f"{len(manifest['shards'])} shards, expected {num_shards(manifest)}"
    for number, shard in enumerate(manifest["shards"]):
        records = shard_records(manifest, number)
        expected = (shard_name(number), records, records * _record_bytes(manifest))
        if not has_types(shard, SHARD_ENTRY):
            return f"entry {number} of shards lacks {listed(SHARD_ENTRY)}"
        if (shard["file"], shard["records"], shard["bytes"]) != expected:
            found = (shard["file"], shard["records"], shard["bytes"])
            return f"shard {number} is {found}, expected {expected} (file, records, bytes)"
    labels = manifest["labels"]
    if (labels is None) != (manifest["class_names"] is None):
        return "labels and class_names do not agree"
    if labels is not None and (
        not has_types(labels, {"file": str, "bytes": int, "sha256": str})
        or (labels["file"], labels["bytes"]) != (LABELS, 8 * manifest["num_images"])
    ):
        return f"labels are {labels}, expected {LABELS} with 8 bytes an image"
    return None


def _check_file(path, size):
    """UserError unless `path` is a plain file, no link, of `size` bytes."""
    try:
        found = os.lstat(path)
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror}): run {MAKE} again as before, which makes only "
            "what is missing"
        ) from error
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path} is a link or no plain file; {_REPAIR}")
    if found.st_size != size:
        raise UserError(f"{path} has {found.st_size} bytes, but {MANIFEST} says {size}; {_REPAIR}")


# ------------------------------------------------------------ reading


def _bytes_of(array):
    """A contiguous array's memory."""
    return memoryview(array.reshape(-1)).cast("B")


def _map(path, size):
    """The file's bytes in memory: nothing is read before it is used, nothing written ever.

    torch's mapping, since numpy's keeps a file descriptor for each shard; private, as torch has no
    read-only one.
    """
    try:
        tensor = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    except RuntimeError as error:
        raise UserError(f"cannot read {path}: {str(error).splitlines()[0]}") from error
    return memoryview(tensor.numpy())


def empty(shape, dtype):
    """An array to be filled, at an address that copies are fast to.

    numpy's own begin 16 bytes into a page, where a copy from the start of one is half as fast
    (reads wait for the write before them, whose lowest 12 bits are the same); torch's have no huge
    pages, and filling 32 MiB of them costs 12 ms of page faults.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


class Features:
    """The packed latents in a folder, memory-mapped.

    Attributes: `manifest`, a dict; `shape` (2C, h, w) of a record; `num_images`; `flips`, whether
    each image has a flipped record; `labels` int64 (num_images,) and `num_classes`, None and 0
    without classes. Raises UserError, one sentence, if manifest and files disagree in anything but
    checksums; those too where the environment has DIM_CHECK=1. Can be pickled: it is opened again.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.manifest = manifest = _read_manifest(self.folder)
        self.shape, self.flips = manifest["record_shape"], manifest["flips"]
        self.num_images, self.labels, self.num_classes = manifest["num_images"], None, 0
        for entry in self._entries():
            _check_file(self.folder / entry["file"], entry["bytes"])
        self._files = [(str(self.folder / s["file"]), s["bytes"]) for s in manifest["shards"]]
        self._shards = [_map(path, size) for path, size in self._files]
        if manifest["labels"]:
            self._read_labels()
        if os.environ.get("DIM_CHECK") == "1":
            self.verify()

    def __reduce__(self):
        return type(self), (self.folder,)

    def __len__(self):
        """The number of records."""
        return self.num_images * (1 + self.flips)

    def _entries(self):
        labels = self.manifest["labels"]
        return [*self.manifest["shards"], *([labels] if labels else [])]

    def _read_labels(self):
        path = self.folder / LABELS
        self.labels = np.fromfile(path, "<i8").astype(np.int64)
        self.num_classes = len(self.manifest["class_names"])
        if self.labels.min() < 0 or self.labels.max() >= self.num_classes:
            raise UserError(
                f"{path} has labels from {self.labels.min()} to {self.labels.max()}, but "
                f"{MANIFEST} names {self.num_classes} classes; {_REPAIR}"
            )

    def read(self, records, out=None):
        """Copies of records (n,), integers, as one contiguous float16 array (n, 2C, h, w).

        out: such an array to fill. IndexError for a record that does not exist.
        """
        records = np.asarray(records, np.int64)
        if records.size and not 0 <= records.min() <= records.max() < len(self):
            raise IndexError(f"there are records 0 to {len(self) - 1}")
        shape = (len(records), *self.shape)
        out = empty(shape, np.float16) if out is None else out
        if out.shape != shape or out.dtype != np.float16 or not out.flags.c_contiguous:
            raise ValueError(f"out is {out.dtype} {out.shape}, expected contiguous float16 {shape}")
        # A memoryview copies a record with 0.4 us of Python: 600k records of 16 KiB a second on one
        # core. numpy's assignment makes 510k, its `take` and torch's `index_select`, which want one
        # shard at a time, 124k over eight shards.
        size, target, shards = _record_bytes(self.manifest), _bytes_of(out), self._shards
        numbers, rows = np.divmod(records, shard_records(self.manifest, 0))
        places = range(0, len(records) * size, size)
        numbers = numbers.tolist()
        if get_worker_info() is None:
            self._require_whole(numbers)
        starts = zip(places, numbers, (rows * size).tolist(), strict=True)
        for place, number, start in starts:
            target[place : place + size] = shards[number][start : start + size]
        return out

    def _require_whole(self, numbers):
        """UserError if one of these shards was cut short since it was mapped, which would be a bus
        error. That of a data loader's worker ends the worker alone, and the loader says so.
        """
        for number in set(numbers):
            path, size = self._files[number]
            if os.stat(path).st_size != size:
                _check_file(path, size)

    def read_labelled(self, images, flipped):
        """images (n,) integers, flipped (n,) bool -> float16 (n, 2C, h, w), int64 (n,) or None."""
        records = np.asarray(images, np.int64) * (1 + self.flips) + flipped
        return self.read(records), None if self.labels is None else self.labels[images]

    def verify(self, report=lambda file: None):
        """UserError unless every file has the SHA-256 of the manifest; report(file) after each."""
        for entry in self._entries():
            path = self.folder / entry["file"]
            if sha256_of(path) != entry["sha256"]:
                raise UserError(
                    f"{path} is damaged: its SHA-256 is not the one in {MANIFEST}; {_REPAIR}"
                )
            report(entry["file"])


def _read_manifest(folder):
    path = folder / MANIFEST
    if not path.is_file():
        if (folder / PROGRESS).is_dir():
            raise UserError(
                f"the latents in {folder} are unfinished: run {MAKE} again as before, it goes on "
                "where it stopped"
            )
        raise UserError(f"{folder} has no {MANIFEST}: make latents with {MAKE}")
    manifest = read_json(path)
    fault = _manifest_fault(manifest)
    if fault:
        raise UserError(f"{path} is damaged or not ours: {fault}; make the latents again")
    return manifest
