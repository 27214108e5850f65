"""Data sets (digits, CIFAR-10, image folders, ImageNet, latents) and the order in which training
reads them.

`get_dataset` opens a data set by name, `GlobalBatchSampler` says which image stands where in the
training stream. Importing this module reads nothing and imports neither torchvision nor
scikit-learn: accelerate may look for Hugging Face's package of the same name and find this file.
"""

import fcntl
import functools
import hashlib
import importlib.util
import itertools
import json
import warnings
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from libs.data import (
    center_crop,
    class_names,
    empty,
    labels_from_directories,
    list_images,
    open_features,
    random_crop,
    read_image,
    refuse_system_error,
    unreadable_reason,
)
from utils import UserError

# Purposes of the keyed random streams: two purposes never share a draw.
PERMUTATION, FLIP, CROP = 1, 2, 3


def _philox(seed, purpose, *, epoch, index=0):
    """The counter-based generator of one (seed, purpose), set to the place of (epoch, index)."""
    return np.random.Philox(key=seed + (purpose << 64), counter=index + (epoch << 64))


class ImageDataset(Dataset):
    """Base of the data sets: labels and keyed augmentation. Subclasses give `_read(epoch, index)`.

    Attributes: `shape` (C, H, W); `num_classes`, 0 for none; `labels`, int64 array (length,) or
    None, known without reading an image; `preprocessing`, a note for the records of statistics;
    `latent`, whether items are an autoencoder's moments instead of images; `class_names`, by
    number, and `files`, None where there are none.
    """

    preprocessing, latent, class_names, files = "none", False, None, None

    def __init__(self, *, length, shape, labels, num_classes, random_flip, seed):
        self.length, self.shape, self.random_flip, self.seed = length, shape, random_flip, seed
        self.labels = labels
        self.num_classes = 0 if labels is None else num_classes

    def __len__(self):
        return self.length

    def list_sha256(self):
        """Of the names of files and classes: what tells a folder from another, without reading."""
        listing = json.dumps([self.files, self.class_names]).encode()
        return hashlib.sha256(listing).hexdigest()

    def _read(self, epoch, index):
        """The image as float32 (C, H, W) in [-1, 1], and the index it was read from."""
        raise NotImplementedError

    def __getitem__(self, key):
        """(epoch, index) -> x float32 (C, H, W) in [-1, 1], y int64 (0 if there are no classes)."""
        epoch, index = key
        x, source = self._read(epoch, index)
        if self.random_flip and _philox(self.seed, FLIP, epoch=epoch, index=index).random_raw() & 1:
            x = x.flip(-1)
        y = np.int64(0) if self.labels is None else self.labels[source]
        return x, y


def _uint8_to_float(image):
    """uint8 array (C, H, W) -> float32 tensor in [-1, 1]."""
    return torch.from_numpy(image.astype(np.float32) / 127.5 - 1)


def _require_path(name, path):
    if not path:
        raise UserError(
            f"the data set {name!r} needs dataset.path (--path of the scripts), the directory with "
            "its files"
        )
    return Path(path)


def _require_resolution(name, resolution, expected):
    if resolution not in (None, expected):
        raise UserError(
            f"{name} has {expected}x{expected} images, so resolution is not {resolution}"
        )


# ------------------------------------------------------------ digits


class Digits(ImageDataset):
    """scikit-learn's 1,797 handwritten digits: (1, 8, 8), ten classes, 0..16 mapped to [-1, 1]."""

    def __init__(self, *, path, resolution, labels, train, random_flip, seed):
        if path:
            raise UserError(f"digits come with scikit-learn: leave dataset.path empty, not {path}")
        if random_flip:
            raise UserError("random_flip is not for digits: a flipped digit is another sign")
        if not train:
            raise UserError("digits have no test split: all 1,797 images are the training split")
        _require_resolution("digits", resolution, 8)
        pixels, classes = self._read_table()
        self.images = torch.from_numpy(pixels.astype(np.float32) / 8 - 1)[:, None]
        super().__init__(
            length=len(self.images),
            shape=(1, 8, 8),
            labels=classes.astype(np.int64) if labels else None,
            num_classes=10,
            random_flip=False,
            seed=seed,
        )

    @staticmethod
    @functools.cache
    def _read_table():
        """(0..16 (1797, 8, 8), classes (1797,)) of scikit-learn's file, without its load_digits:
        importing that takes 1.5 s, a fifth of a short run.
        """
        (package,) = importlib.util.find_spec("sklearn").submodule_search_locations
        table = np.loadtxt(Path(package, "datasets", "data", "digits.csv.gz"), delimiter=",")
        return table[:, :-1].reshape(-1, 8, 8), table[:, -1]

    def _read(self, epoch, index):
        return self.images[index].clone(), index


# ------------------------------------------------------------ CIFAR-10


class Cifar10(ImageDataset):
    """CIFAR-10: (3, 32, 32), ten classes; 50,000 images (train) or 10,000.

    `path` holds the folder `cifar-10-batches-py`, is that folder, or holds the archive; where
    there is neither, the archive is downloaded into it.
    """

    def __init__(self, *, path, resolution, labels, train, **augmentation):
        _require_resolution("cifar10", resolution, 32)
        images, targets = self._read_files(_require_path("cifar10", path), train)
        self.images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        super().__init__(
            length=len(self.images),
            shape=(3, 32, 32),
            labels=np.array(targets, np.int64) if labels else None,
            num_classes=10,
            **augmentation,
        )

    @staticmethod
    def _read_files(path, train):
        """uint8 (n, 32, 32, 3) and labels. torchvision checks the md5 before it unpickles."""
        from torchvision.datasets import CIFAR10

        root = path.parent if path.name == CIFAR10.base_folder else path
        lock = root / ".download"
        try:
            if lock.exists() or not (root / CIFAR10.base_folder).exists():
                root.mkdir(parents=True, exist_ok=True)
                with open(lock, "w") as file:
                    fcntl.flock(file, fcntl.LOCK_EX)  # other processes wait for the first
                    CIFAR10(root, download=True)
            files = CIFAR10(root, train)
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"{root} has no {CIFAR10.base_folder} with CIFAR-10's published files, and they "
                f"could not be downloaded ({error})"
            ) from error
        return files.data, files.targets

    def _read(self, epoch, index):
        return _uint8_to_float(self.images[index]), index


# ------------------------------------------------------------ image folders

MAX_UNREADABLE = 10


class ImageFolder(ImageDataset):
    """Images below a directory, cropped to (3, resolution, resolution), in the centre or at random.

    The class is the first-level subdirectory. An unreadable image is named in a warning and the
    next readable one stands in for it, label included, so that no other image changes its place;
    more than MAX_UNREADABLE of them (in one process) raise UserError.

    Further attributes: `root` and `files`, paths relative to it.
    """

    name = "folder"

    def __init__(self, *, path, resolution, labels, train, random_crop=False, **augmentation):
        self.root, class_root = self._directories(_require_path(self.name, path), train)
        if resolution is None:
            raise UserError(
                f"the data set {self.name!r} needs dataset.resolution (--resolution of the "
                "scripts), to crop and resize to"
            )
        self.files = list_images(self.root)
        self.random_crop = random_crop
        self.unreadable = {}  # index -> reason
        kind = "random crop" if random_crop else "centre crop"
        self.preprocessing = f"RGB, {kind} to {resolution} (ADM: box halvings, then bicubic)"
        targets = None
        if labels:
            self.class_names = class_names(class_root)
            targets = labels_from_directories(self.root, self.files, self.class_names)
            self._check_classes(class_root, targets)
        super().__init__(
            length=len(self.files),
            shape=(3, resolution, resolution),
            labels=targets,
            num_classes=len(self.class_names or ()),
            **augmentation,
        )

    def _directories(self, path, train):
        """The directory of the images, and the one whose subdirectories are all the classes."""
        if not path.is_dir():
            raise UserError(
                f"the data set directory {path} does not exist: check dataset.path (--path of the "
                "scripts)"
            )
        if not train:
            raise UserError("an image folder has one split: point dataset.path to the test images")
        return path, path

    def _check_classes(self, class_root, targets):
        """UserError for a class without images, which is a mistake more often than not."""
        empty = np.flatnonzero(np.bincount(targets, minlength=len(self.class_names)) == 0)
        if class_root == self.root and len(empty):
            name = self.root / self.class_names[empty[0]]
            raise UserError(f"the class directory {name} has no images: remove it")

    def _note_unreadable(self, index, error):
        self.unreadable[index] = unreadable_reason(error)
        named = [f"{self.root / self.files[i]} ({why})" for i, why in self.unreadable.items()]
        limit = min(MAX_UNREADABLE, self.length - 1)
        if len(named) > limit:
            raise UserError(
                f"more than {limit} of {self.length} images cannot be read, repair or remove "
                f"them: {'; '.join(named)}"
            ) from error
        warnings.warn(f"unreadable image, the next stands in for it: {named[-1]}", stacklevel=2)

    def pixels(self, epoch, index):
        """One image as uint8 (3, H, W), not flipped; PIL's many exceptions if it is unreadable."""
        resolution = self.shape[-1]

        def crop(image):
            if not self.random_crop:
                return center_crop(image, resolution)
            words = _philox(self.seed, CROP, epoch=epoch, index=index).random_raw(3)
            return random_crop(image, resolution, words)

        return read_image(self.root / self.files[index], crop)

    def _read(self, epoch, index):
        while True:
            if index not in self.unreadable:
                try:
                    return _uint8_to_float(self.pixels(epoch, index)), index
                except Exception as error:  # noqa: BLE001 - PIL raises many kinds, bombs included
                    refuse_system_error(error, self.root / self.files[index])
                    self._note_unreadable(index, error)
            index = (index + 1) % self.length


class ImageNet(ImageFolder):
    """ImageNet (ILSVRC 2012) as it is unpacked: `train/<wnid>/*.JPEG` below `path`, classes sorted
    by wnid; train=False reads `val/<wnid>/*.JPEG`, numbered as the classes in train.

    A part of it works too: a warning says how many images and classes there are.
    """

    name = "imagenet"
    NUM_IMAGES, NUM_CLASSES = {True: 1_281_167, False: 50_000}, 1000

    def __init__(self, *, path, train, **options):
        super().__init__(path=path, train=train, **options)
        found = (len(self), self.num_classes or self.NUM_CLASSES)
        if found != (self.NUM_IMAGES[train], self.NUM_CLASSES):
            warnings.warn(
                f"{self.root} has {found[0]:,} images in {found[1]:,} classes, the whole ImageNet "
                f"has {self.NUM_IMAGES[train]:,} in {self.NUM_CLASSES:,}; it is used as it is",
                stacklevel=3,
            )

    def _directories(self, path, train):
        split = path / ("train" if train else "val")
        if not split.is_dir():
            raise UserError(
                f"there is no {split}: dataset.path must be the directory that holds ImageNet as "
                f"{split.name}/<wnid>/*.JPEG"
            )
        whole = path / "train"
        return split, whole if whole.is_dir() else split


# ------------------------------------------------------------ latents


class Latents(ImageDataset):
    """An autoencoder's moments of images, from packed shards or from one file an image.

    Items are x float32 (2C, h, w), mean and log-variance, unscaled, and y as everywhere. With
    random_flip the record of the flipped image is read, by the same draw that flips pixels.

    Further attributes: `features`, the open libs.data.latents.Features or FeatureFiles;
    `scale_factor`
    and `autoencoder_sha256`, with which latents were made, None where the files do not say.
    """

    latent = True
    DOWNSAMPLE, CHANNELS = 8, 4  # of Stable Diffusion's autoencoder

    def __init__(
        self, *, name, default_resolution, num_classes, path, resolution, labels, train,
        random_flip, seed,
    ):  # fmt: skip
        if not train:
            raise UserError(f"{name} has one split: point dataset.path to the latents to read")
        self.features = features = open_features(_require_path(name, path), num_classes)
        made_with = features.manifest or {}
        self.scale_factor = made_with.get("scale_factor")
        self.autoencoder_sha256 = made_with.get("autoencoder_sha256")
        self.preprocessing = made_with.get("crop", "unknown")
        self.class_names = made_with.get("class_names") if labels else None
        self._check_shape(name, resolution or default_resolution, default_resolution is not None)
        if labels and not features.num_classes:
            raise UserError(
                f"the latents in {path} have no labels: train without classes (train.mode=uncond), "
                "or make them from a folder with classes"
            )
        if random_flip and not features.flips:
            raise UserError(
                f"the latents in {path} have no records of flipped images: make them with --flip, "
                "or set dataset.random_flip to False"
            )
        super().__init__(
            length=features.num_images, shape=features.shape,
            labels=features.labels if labels else None,
            num_classes=features.num_classes, random_flip=random_flip, seed=seed,
        )  # fmt: skip
        self.labelled = labels
        # Known without labels too, which millions of single files would have to be read for.
        self.num_classes = features.num_classes if labels else 0
        self._cached = (None, None)  # (epoch, its flips)

    def _check_shape(self, name, resolution, is_imagenet):
        """UserError if these are no latents of images of this resolution; None fits everything."""
        folder, found = self.features.folder, (self.features.manifest or {}).get("resolution")
        if resolution and found and found != resolution:
            raise UserError(
                f"the latents in {folder} are of {found}x{found} pixels, but {name} is to have "
                f"{resolution}x{resolution}: check dataset.name, path and resolution"
            )
        side = (resolution or 0) // self.DOWNSAMPLE
        expected = (2 * self.CHANNELS, side, side)
        if is_imagenet and self.features.shape != expected:
            raise UserError(
                f"the latents in {folder} have the shape {self.features.shape}, but {name} has "
                f"{expected}: check dataset.name and dataset.path"
            )

    def _flips(self, keys):
        """bool (n,): the draws of ImageDataset, an epoch at a time."""
        if not self.random_flip:
            return np.zeros(len(keys), bool)
        epochs, indices = np.array(keys).T
        flips = np.empty(len(keys), bool)
        for epoch in np.unique(epochs):
            flips[epochs == epoch] = self._epoch_flips(int(epoch))[indices[epochs == epoch]]
        return flips

    def _epoch_flips(self, epoch):
        if self._cached[0] != epoch:
            # Each place of the generator gives four words: the first is the draw of one image.
            words = _philox(self.seed, FLIP, epoch=epoch).random_raw(4 * self.length)[::4]
            self._cached = epoch, (words & 1).astype(bool)
        return self._cached[1]

    def __getitems__(self, keys):
        """Many keys at once, as a DataLoader asks for a batch: a list of (x, y)."""
        x, y = self.features.read_labelled([index for _, index in keys], self._flips(keys))
        x_float32 = torch.from_numpy(empty(x.shape, np.float32)).copy_(torch.from_numpy(x))
        y = y if self.labelled else np.zeros(len(keys), np.int64)
        return list(zip(x_float32, y, strict=True))

    def __getitem__(self, key):
        return self.__getitems__([key])[0]


# ------------------------------------------------------------ by name


def _latents(name, default_resolution=None, num_classes=None):
    return functools.partial(
        Latents, name=name, default_resolution=default_resolution, num_classes=num_classes
    )


DATASETS = {
    "digits": Digits,
    "cifar10": Cifar10,
    "folder": ImageFolder,
    "imagenet": ImageNet,
    "folder_features": _latents("folder_features"),
    "imagenet256_features": _latents("imagenet256_features", 256, 1000),
    "imagenet512_features": _latents("imagenet512_features", 512, 1000),
}
CROPPED = ("folder", "imagenet")
LATENTS = tuple(name for name in DATASETS if name.endswith("_features"))


def get_dataset(
    name, *, path=None, resolution=None, random_crop=False, random_flip=False, labels=True,
    seed=0, train=True,
):  # fmt: skip
    """Open a data set by its name in DATASETS; `ImageDataset` says what it offers.

    labels=False gives no classes. Augmentation is keyed by (seed, epoch, index) only. Raises
    UserError for an unknown name, missing files, files of another kind, a wrong resolution.
    """
    if name not in DATASETS:
        raise UserError(
            f"unknown data set {name!r}: dataset.name (--dataset of the scripts) is one of "
            f"{', '.join(DATASETS)}"
        )
    if random_crop and name not in CROPPED:
        raise UserError(f"random_crop is for {' and '.join(CROPPED)}, not for {name}: leave it out")
    crop = {"random_crop": random_crop} if name in CROPPED else {}
    return DATASETS[name](
        **crop,
        path=path,
        resolution=resolution,
        labels=labels,
        train=train,
        random_flip=random_flip,
        seed=seed,
    )


def dataset_of(config, *, augmented=False):
    """The data set of a config; augmented, as training reads it: cropped and flipped at random.

    Of pixels that have to be cropped, the network's side is the resolution where none is given.
    """
    settings, resolution = config.dataset, config.dataset.resolution
    if settings.name in CROPPED and config.get("z_shape") is None:
        resolution = resolution or config.nnet.input_size
    augmentation = {"random_crop": settings.random_crop, "random_flip": settings.random_flip}
    return get_dataset(
        settings.name,
        path=settings.path,
        resolution=resolution,
        labels=config.train.mode == "cond",
        seed=config.seed,
        **(augmentation if augmented else {}),
    )


# ------------------------------------------------------------ order


def permutation(length, *, seed, epoch):
    """The order of one epoch, int64 (length,), the same on every machine and numpy version."""
    # numpy keeps raw Philox words stable over its versions, not Generator.permutation (NEP 19).
    return np.argsort(_philox(seed, PERMUTATION, epoch=epoch).random_raw(length), kind="stable")


def _require_divisible(batch_size, num_processes, accumulation):
    parts = num_processes * accumulation
    if batch_size >= 1 and batch_size % parts == 0:
        return
    below = max(batch_size, 0) // parts * parts
    nearest = " and ".join(str(size) for size in (below, below + parts) if size > 0)
    raise UserError(
        f"train.batch_size {batch_size} is not divisible by {num_processes} processes x "
        f"{accumulation} accumulation steps = {parts}: the nearest that work: {nearest}"
    )


class GlobalBatchSampler(Sampler):
    """Batch sampler of one rank over an endless stream that is the same for any number of ranks.

    Stream position p has epoch p // length and index permutation(seed, epoch)[p % length]; global
    batch k is positions [k * batch_size, (k + 1) * batch_size). From batch `start_batch` on, each
    gives `accumulation` lists of (epoch, index): micro-batch m of rank r is the b positions from
    (m * num_processes + r) * b of the batch, b = batch_size / (num_processes * accumulation).
    Starting anywhere costs one permutation. Raises UserError if batch_size does not divide.
    """

    def __init__(
        self, length, batch_size, *, num_processes, rank, accumulation, seed, start_batch=0
    ):
        _require_divisible(batch_size, num_processes, accumulation)
        if length < 1:
            raise UserError("the data set is empty")
        if not 0 <= rank < num_processes:
            raise ValueError(f"rank {rank} is not in 0..{num_processes - 1}")
        self.length, self.batch_size, self.start_batch = length, batch_size, start_batch
        self.num_processes, self.rank = num_processes, rank
        self.accumulation, self.seed = accumulation, seed
        self._cached = (None, None)  # (epoch, its permutation); positions only rise: one is enough

    def _permutation(self, epoch):
        if self._cached[0] != epoch:
            self._cached = epoch, permutation(self.length, seed=self.seed, epoch=epoch)
        return self._cached[1]

    def _keys(self, start, stop):
        """(epoch, index) of the stream positions [start, stop), which may cross epochs."""
        places = (divmod(position, self.length) for position in range(start, stop))
        return [(epoch, int(self._permutation(epoch)[offset])) for epoch, offset in places]

    def __iter__(self):
        mini_batch_size = self.batch_size // (self.num_processes * self.accumulation)
        for batch in itertools.count(self.start_batch):
            for micro_batch in range(self.accumulation):
                part = micro_batch * self.num_processes + self.rank
                start = batch * self.batch_size + part * mini_batch_size
                yield self._keys(start, start + mini_batch_size)
