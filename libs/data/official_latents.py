"""Latents in one file an image, as the official scripts of U-ViT and DiM write them.

`{i}.npy` (U-ViT) is an array of objects (moments, label), `{i}.npy.npz` (DiM) has the arrays `z`
and `label`; a plain array in `{i}.npy` is moments without a label. i runs from 0 without gaps;
images and their flipped copies are files of their own.
"""

import os
import re
from pathlib import Path

import numpy as np

from libs.data.latents import MANIFEST, PackedLatents
from libs.files import read_array, read_arrays, reading
from utils import UserError

LAYOUTS = (".npy", ".npy.npz")


def read_latent_file(path):
    """float32 moments (2C, h, w) and the label, or None, of one file."""
    with reading(path, "file of moments and a label"):
        if str(path).endswith(".npz"):
            arrays = read_arrays(path)
            moments, label = arrays["z"], arrays["label"]
        else:
            contents = read_array(path)
            moments, label = contents if isinstance(contents, list) else (contents, None)
        return np.asarray(moments, np.float32), None if label is None else np.asarray(label).item()


def count_latent_files(folder):
    """(layout, number of files) of the numbered files in a folder; UserError for a gap."""
    numbers = {layout: set() for layout in LAYOUTS}
    with os.scandir(folder) as entries:
        for entry in entries:
            if match := re.fullmatch(r"(0|[1-9][0-9]*)(\.npy(?:\.npz)?)", entry.name):
                numbers[match[2]].add(int(match[1]))
    layout = max(LAYOUTS, key=lambda name: len(numbers[name]))
    found = numbers[layout]
    if missing := sorted(set(range(max(found, default=-1))) - found):
        raise UserError(f"{folder} lacks {missing[0]}{layout}, but has {max(found)}{layout}")
    return layout, len(found)


class LatentFiles:
    """The per-image latents in a folder: each file is an item, flipped images are files too.

    Attributes as those of PackedLatents. With num_classes given, `labels` is None, since millions
    of files would have to be read for them. Without it they are all read here.
    """

    flips, manifest, feature_shape = False, None, None

    def __init__(self, folder, num_classes=None):
        self.folder = Path(folder)
        self.layout, self.num_images = count_latent_files(folder)
        moments, label = self._read(0)
        self.shape, self.labels, self.num_classes = moments.shape, None, 0
        if label is not None:
            if not num_classes:
                self.labels = np.array([self._read(i)[1] for i in range(self.num_images)], np.int64)
            self.num_classes = num_classes or int(self.labels.max()) + 1

    def _read(self, image):
        return read_latent_file(self.folder / f"{image}{self.layout}")

    def read_labelled(self, images, flipped):
        """images (n,) integers -> float32 (n, 2C, h, w), int64 (n,) or None without labels."""
        moments, labels = zip(*map(self._read, images), strict=True)
        return np.stack(moments), np.array(labels, np.int64) if self.num_classes else None


def open_latents(folder, num_classes=None):
    """The latents in `folder`: PackedLatents, or LatentFiles with num_classes."""
    folder = Path(folder)
    if not (folder / MANIFEST).exists() and count_latent_files(folder)[1]:
        return LatentFiles(folder, num_classes)
    return PackedLatents(folder)
