"""Latents in one file an image, as the official scripts of U-ViT and DiM write them.

`{i}.npy` (U-ViT) is a pickled array of objects (moments, label), `{i}.npy.npz` (DiM) has the arrays
`z` and `label`; a plain array in `{i}.npy` is moments without a label. i runs from 0 without gaps;
images and their flipped copies are files of their own. Nothing that a pickle names is called.
"""

import math
import os
import re
from pathlib import Path

import numpy as np

from libs import pickled
from libs.arrays import read_header, read_npy, read_npz
from libs.data.latents import MAKE, MANIFEST, MAX_RECORD_BYTES, PROGRESS, Features
from utils import UserError

LAYOUTS = (".npy", ".npy.npz")
FLOATS = ("f4", "f2", "f8")
MAX_PICKLE_BYTES = MAX_RECORD_BYTES + 4096


def _as_moments(value):
    """An array, read or recorded, as float32 (2C, h, w)."""
    array = value if isinstance(value, np.ndarray) else pickled.array(value, FLOATS)
    if array.dtype.str[1:] not in FLOATS or array.ndim != 3:
        raise ValueError(f"its moments are {array.dtype} of shape {array.shape}, not (2C, h, w)")
    return array.astype(np.float32)


def _as_label(value):
    if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and value.size == 1:
        return int(value.item())
    return pickled.integer(value)


def _parse_npz(path):
    arrays = read_npz(path, ("z", "label"), MAX_RECORD_BYTES)
    return _as_moments(arrays["z"]), _as_label(arrays["label"])


def _parse_npy(path):
    with open(path, "rb") as file:
        _, _, dtype = read_header(file)
        if not dtype.hasobject:
            file.seek(0)
            return _as_moments(read_npy(file, MAX_RECORD_BYTES)), None
        moments, label = pickled.elements(pickled.load(file.read(MAX_PICKLE_BYTES)))
    return _as_moments(moments), _as_label(label)


def read_feature_file(path):
    """float32 moments (2C, h, w) and the label, or None, of one file; UserError if it is broken."""
    try:
        if not os.path.isfile(path):  # a pipe would never be read to its end
            raise ValueError("it is no plain file")
        return _parse_npz(path) if str(path).endswith(".npz") else _parse_npy(path)
    except Exception as error:  # broken and hostile files raise almost any kind
        reason = str(error) or type(error).__name__
        raise UserError(
            f"{path} holds no moments and label as U-ViT or DiM write them ({reason}): make it "
            f"again, or use {MAKE}"
        ) from error


def count_feature_files(folder):
    """{'.npy': how many, '.npy.npz': how many} numbered files are in a folder.

    Raises UserError if the numbers of a layout have gaps or do not begin at 0.
    """
    numbers = {layout: [] for layout in LAYOUTS}
    with os.scandir(folder) as entries:
        for entry in entries:
            match = re.fullmatch(r"(0|[1-9][0-9]*)(\.npy(?:\.npz)?)", entry.name)
            if match:
                numbers[match[2]].append(int(match[1]))
    for layout, found in numbers.items():
        if found and max(found) >= len(found):
            gap = min(set(range(len(found))) - set(found))
            raise UserError(
                f"{folder} lacks {gap}{layout}, but has {max(found)}{layout}: copy it again, or "
                f"make latents with {MAKE}"
            )
    return {layout: len(found) for layout, found in numbers.items()}


class FeatureFiles:
    """The per-image latents in a folder: each file is an item, flipped images are files too.

    Attributes as those of libs.data.latents.Features. With num_classes given, `labels` is None,
    since
    millions of files would have to be read for them; they are checked when read. Without it they
    are all read here. Raises UserError.
    """

    flips, manifest = False, None

    def __init__(self, folder, num_classes=None):
        self.folder = Path(folder)
        counts = count_feature_files(self.folder)
        if all(counts.values()):
            raise UserError(f"{folder} has both 0.npy and 0.npy.npz: keep one of the layouts")
        self.layout = max(counts, key=counts.get)
        self.num_images = counts[self.layout]
        moments, self._first_label = self._read(0)
        self.shape, self.labels, self.num_classes = moments.shape, None, 0
        if self._first_label is not None:
            self.num_classes = num_classes
            if num_classes is None:
                self._read_all_labels()

    def __len__(self):
        return self.num_images

    def _read_all_labels(self):
        self.num_classes = math.inf  # none is too large yet
        labels = [self._read_checked(i)[1] for i in range(self.num_images)]
        self.labels, self.num_classes = np.array(labels, np.int64), max(labels) + 1

    def _read(self, image):
        return read_feature_file(self.folder / f"{image}{self.layout}")

    def _read_checked(self, image):
        """One image and its label; UserError if they do not go with the first."""
        moments, label = self._read(image)
        name = f"{image}{self.layout}"
        if moments.shape != self.shape:
            raise UserError(
                f"{name} in {self.folder} has the shape {moments.shape}, but 0{self.layout} "
                f"{self.shape}: latents of one data set have one shape"
            )
        if (label is None) != (self._first_label is None):
            raise UserError(f"only some of the files in {self.folder} have labels, see {name}")
        if label is not None and not 0 <= label < self.num_classes:
            raise UserError(
                f"{name} in {self.folder} has the label {label}, expected 0 to "
                f"{self.num_classes - 1}"
            )
        return moments, label

    def read_labelled(self, images, flipped):
        """images (n,) integers -> float32 (n, 2C, h, w), int64 (n,) or None without labels."""
        out, labels = np.empty((len(images), *self.shape), np.float32), []
        for row, image in zip(out, images, strict=True):
            row[...], label = self._read_checked(image)
            labels.append(label)
        return out, None if self._first_label is None else np.array(labels, np.int64)


def open_features(folder, num_classes=None):
    """The latents in `folder`: Features, or FeatureFiles with num_classes; UserError if none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"the folder of latents {folder} does not exist: make them with {MAKE}")
    ours = (folder / MANIFEST).exists() or (folder / PROGRESS).exists()
    if not ours and any(count_feature_files(folder).values()):
        return FeatureFiles(folder, num_classes)
    return Features(folder)
