"""Data sets by name: digits, Fashion-MNIST, CIFAR-10, image folders, ImageNet, latents; classes.

Importing this module reads nothing and imports neither torchvision nor scikit-learn: accelerate may
look for Hugging Face's package of the same name and find this file.
"""

import fcntl
import functools
import hashlib
import importlib.util
import json
import multiprocessing
import warnings
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from libs import data
from libs.files import read_idx
from utils import UserError, listed, look_up


class ImageDataset(Dataset):
    """Base of the data sets: labels and keyed augmentation. Subclasses give `_read(epoch, index)`:
    the image as float32 (C, H, W) in [-1, 1], and the index it was read from.

    A subclass is constructed with path (a Path or None), resolution (or None), labels (False: no
    classes), random_flip and seed.

    Attributes: `shape` (C, H, W); `num_classes`, 0 for none; `labels`, int64 array (length,) or
    None, known without reading an image; `preprocessing`, a note for the records of statistics;
    `latent`, whether items are an autoencoder's moments instead of images; `class_names`, by
    number, and `files`, None where there are none, `sizes` of files, and `left_out`, a text that
    counts files that are no images; `feature_shape` (N, D), where an item has as its third part
    the tokens that an image network makes of the image.
    """

    needs_path, latent = False, False
    preprocessing, class_names, files, sizes, left_out = "none", None, None, (), ""
    feature_shape = None

    def __init__(self, *, length, shape, labels, num_classes, random_flip, seed):
        self.length, self.shape, self.random_flip, self.seed = length, shape, random_flip, seed
        self.labels, self.num_classes = labels, num_classes

    def __len__(self):
        return self.length

    def list_sha256(self, *sizes):
        """Of the names of files and classes, and `sizes`: tells a folder without reading it."""
        listing = json.dumps([self.files, self.class_names, *sizes]).encode()
        return hashlib.sha256(listing).hexdigest()

    def _is_flipped(self, epoch, index):
        draw = functools.partial(data.keyed_words, 1, self.seed, "flip")
        return self.random_flip and draw(epoch=epoch, index=index)[0] & 1

    def __getitem__(self, key):
        """(epoch, index) -> x float32 (C, H, W) in [-1, 1], y int64 (0 if there are no classes)."""
        epoch, index = key
        x, source = self._read(epoch, index)
        x = x.flip(-1) if self._is_flipped(epoch, index) else x
        y = np.int64(0) if self.labels is None else self.labels[source]
        return x, y


def _uint8_to_float(image):
    """uint8 array (C, H, W) -> float32 tensor in [-1, 1]."""
    return torch.from_numpy(image.astype(np.float32) / 127.5 - 1)


def _open_torchvision(name, root, what, *, download):
    """torchvision's data set `name` in `root`. UserError if it is not there nor to be had."""
    import torchvision

    kind = getattr(torchvision.datasets, name)
    try:
        if not download:
            return kind(root)
        root.mkdir(parents=True, exist_ok=True)
        with open(root / ".download", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # other processes wait for the first
            return kind(root, download=True)
    except (RuntimeError, OSError) as error:
        text = f"{root} has no {what}, and it could not be downloaded ({error})"
        raise UserError(text) from error


class InMemory(ImageDataset):
    """Ten classes in memory. `_load(path, resolution)`: uint8 images (n, C, H, W) and labels."""

    def __init__(self, *, path, resolution, labels, **augmentation):
        self.images, targets = self._load(path, resolution)
        targets = np.array(targets, np.int64) if labels else None
        length, *shape = self.images.shape
        known = dict(labels=targets, num_classes=10 if labels else 0)
        super().__init__(length=length, shape=tuple(shape), **known, **augmentation)

    def _read(self, epoch, index):
        return _uint8_to_float(self.images[index]), index


class Digits(InMemory):
    """scikit-learn's 1,797 handwritten digits: (1, 8, 8), 0..16 mapped to [-1, 1]."""

    @staticmethod
    @functools.cache
    def _load(path, resolution):
        """From scikit-learn's file: importing its load_digits takes a fifth of a short run."""
        (package,) = importlib.util.find_spec("sklearn").submodule_search_locations
        table = np.loadtxt(Path(package, "datasets", "data", "digits.csv.gz"), delimiter=",")
        pixels = table[:, :-1].astype(np.float32).reshape(-1, 1, 8, 8)
        return torch.from_numpy(pixels / 8 - 1), table[:, -1]

    def _read(self, epoch, index):
        return self.images[index].clone(), index


class Cifar10(InMemory):
    """CIFAR-10's 50,000 images for training, (3, 32, 32).

    `path` holds the folder `cifar-10-batches-py`, is that folder, or holds the archive; where
    there is neither, the archive is downloaded into it.
    """

    @staticmethod
    def _load(path, resolution):
        """torchvision checks the md5 before it unpickles."""
        root, folder = path or Path("assets/datasets/cifar10"), "cifar-10-batches-py"
        root = root.parent if root.name == folder else root
        download = (root / ".download").exists() or not (root / folder).exists()
        files = _open_torchvision("CIFAR10", root, f"{folder} as published", download=download)
        return np.ascontiguousarray(files.data.transpose(0, 3, 1, 2)), files.targets


class FashionMnist(InMemory):
    """Fashion-MNIST's 60,000 images for training (Xiao et al., arXiv 1708.07747): (1, 28, 28),
    padded with -1 to `resolution`, 32 if it is not given.

    `path`, or its FashionMNIST/raw, holds the idx files, gzipped or not, of any md5; where there
    are none, they are downloaded into it.
    """

    part = "train"
    class_names = tuple("T-shirt trouser pullover dress coat sandal shirt sneaker bag boot".split())

    @classmethod
    def _load(cls, path, resolution):
        root = path or Path("assets/datasets/fashion_mnist")
        names = [f"{cls.part}-{kind}-ubyte*" for kind in ("images-idx3", "labels-idx1")]

        def find():
            folders = (root, root / "FashionMNIST/raw")
            return [sorted(x for folder in folders for x in folder.glob(name)) for name in names]

        if (root / ".download").exists() or not all(find()):
            _open_torchvision("FashionMNIST", root, f"{names[0]} and so on", download=True)
        images, labels = (read_idx(files[0]) for files in find())
        edge = (resolution or 32) - images.shape[-1]
        sides = edge // 2, edge - edge // 2
        return np.pad(images, ((0, 0), sides, sides))[:, None], labels


class FashionMnistTest(FashionMnist):
    """Its 10,000 images for tests."""

    part = "t10k"


MAX_UNREADABLE = 10, 0.01  # images, and share of the data set; the larger counts
_SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation"}


class ImageFolder(ImageDataset):
    """Images below a directory or in a zip file, cropped in the centre to a square of `resolution`,
    else of the first image's smaller side, with the classes of libs.data.label_images.

    An unreadable image is named in a warning and the next readable one stands in for it, label
    included, so that no other image changes its place; more than MAX_UNREADABLE of them, counted
    over all workers of a process, raise UserError.
    """

    needs_path, subfolder = True, ""

    def __init__(self, *, path, resolution, labels, **augmentation):
        self.root, targets = path / self.subfolder if path.is_dir() else path, None
        self.files, self.left_out = data.list_images(self.root)
        splits = _SPLITS & {file.split("/")[0].lower() for file in self.files}
        if len(splits) > 1:
            said = f"all images of {self.root} are read, those of {', '.join(sorted(splits))}"
            warnings.warn(f"{said} alike: to read one, name it in the path", stacklevel=2)
        self.unreadable = multiprocessing.RawArray("b", len(self.files))  # workers share it
        resolution = resolution or data.read_square(self.root, self.files[0]).shape[-1]
        self.preprocessing = f"RGB, centre crop to {resolution} (ADM: box halvings, then bicubic)"
        if labels:
            targets, self.class_names = data.label_images(self.root, self.files)
        super().__init__(
            length=len(self.files), shape=(3, resolution, resolution), labels=targets,
            num_classes=len(self.class_names or ()), **augmentation,
        )  # fmt: skip

    def pixels(self, index):
        """One image as uint8 (3, H, W), not flipped; UnreadableImage for a damaged file."""
        return data.read_square(self.root, self.files[index], self.shape[-1])

    @property
    def sizes(self):
        some = self.files[:: max(1, len(self.files) // 10_000)]
        paths = [self.root / name for name in some] if self.root.is_dir() else [self.root]
        return [path.stat().st_size for path in paths]

    def _note_unreadable(self, index, error):
        self.unreadable[index] = 1
        bad = np.flatnonzero(self.unreadable)
        limit = min(max(MAX_UNREADABLE[0], int(MAX_UNREADABLE[1] * self.length)), self.length - 1)
        if len(bad) > limit:
            raise UserError(
                f"more than {limit} of {self.length} images in {self.root} cannot be read, repair "
                f"or remove them: {listed(self.files[i] for i in bad)}; the last one: {error}"
            ) from error
        warnings.warn(f"unreadable image, the next stands in for it: {error}", stacklevel=2)

    def _read(self, epoch, index):
        while True:
            if not self.unreadable[index]:
                try:
                    return _uint8_to_float(self.pixels(index)), index
                except data.UnreadableImage as error:
                    self._note_unreadable(index, error)
            index = (index + 1) % self.length


class ImageNet(ImageFolder):
    """ImageNet (ILSVRC 2012), unpacked, or a part of it: `train/<wnid>/*.JPEG` below `path`."""

    subfolder = "train"


class FolderLatents(ImageDataset):
    """An autoencoder's moments of images, from packed shards or from one file an image.

    Items are x float32 (2C, h, w), mean and log-variance, unscaled, and y as everywhere. With
    random_flip the record of the flipped image is read, by the same draw that flips pixels. With
    features, and where they are stored, tokens (N, D) float16 of an image network are a third part.

    Further attributes: `latents`, as libs.data.open_latents gives them; those of the Autoencoder
    that made them, or, where the files do not say, of Stable Diffusion's without a checksum.
    """

    needs_path = latent = True
    known_classes = None  # how many, where single files need not be read for it

    def __init__(self, *, path, resolution, labels, random_flip, seed, features=False):
        self.latents = latents = data.open_latents(path, self.known_classes)
        self.feature_shape = latents.feature_shape if features else None
        made_with = latents.manifest or {}
        scaling = {k: v for k, v in made_with.items() if k in data.Scaling._fields}
        self.scaling = data.Scaling(**scaling)
        self.latent_channels = latents.shape[0] // 2
        self.downsample = made_with.get("resolution", 8 * latents.shape[-1]) // latents.shape[-1]
        self.autoencoder_sha256 = made_with.get("autoencoder_sha256")
        self.files = [shard["sha256"] for shard in made_with.get("shards", ())]
        self.preprocessing = made_with.get("crop", "unknown")
        self.class_names = made_with.get("class_names") if labels else None
        if labels and not latents.num_classes:
            raise UserError(
                f"the latents in {path} have no labels: train without classes (train.mode=uncond), "
                "or make them from a folder with classes"
            )
        if random_flip and not latents.flips:
            raise UserError(
                f"the latents in {path} have no records of flipped images: make them with --flip, "
                "or set dataset.random_flip to False"
            )
        super().__init__(
            length=latents.num_images, shape=latents.shape, random_flip=random_flip, seed=seed,
            labels=latents.labels if labels else None,  # None for single files, too
            num_classes=latents.num_classes if labels else 0,
        )  # fmt: skip

    def __getitems__(self, keys):
        """Many keys at once, as a DataLoader asks: a list of (x, y) or (x, y, features)."""
        images = [index for _, index in keys]
        flips = np.array([self._is_flipped(*key) for key in keys], bool)
        x, y = self.latents.read_labelled(images, flips)
        y = y if self.num_classes else np.zeros(len(keys), np.int64)
        items = [torch.from_numpy(x).float(), y]
        if self.feature_shape:
            items.append(torch.from_numpy(self.latents.read_features(images, flips)))
        return list(zip(*items, strict=True))

    def __getitem__(self, key):
        return self.__getitems__([key])[0]


class ImageNetLatents(FolderLatents):
    """Of ImageNet's images, at 256 or 512 pixels."""

    known_classes = 1000


DATASETS = {
    "digits": Digits,
    "fashion_mnist": FashionMnist,
    "fashion_mnist_test": FashionMnistTest,
    "cifar10": Cifar10,
    "folder": ImageFolder,
    "imagenet": ImageNet,
    "folder_features": FolderLatents,
    "imagenet256_features": ImageNetLatents,
    "imagenet512_features": ImageNetLatents,
}
LATENTS = tuple(name for name, kind in DATASETS.items() if kind.latent)


def get_dataset(
    name, *, path=None, resolution=None, random_flip=False, labels=True, seed=0, features=False
):
    """Open a data set by its name in DATASETS; `ImageDataset` says what it offers.

    labels=False gives no classes; features=True adds those that are stored beside latents. Raises
    UserError for an unknown name and for missing or damaged files.
    """
    kind = look_up(DATASETS, name, "dataset.name")
    if kind.needs_path and not (path and Path(path).exists()):
        where = "its directory (or zip file of images)"
        raise UserError(f"the data set {name!r} needs {where} as dataset.path, not {path!r}")
    options = {"features": True} if features and kind.latent else {}
    return kind(
        path=Path(path) if path else None, resolution=resolution, labels=labels,
        random_flip=random_flip, seed=seed, **options,
    )  # fmt: skip
