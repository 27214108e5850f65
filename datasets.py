"""Data sets (digits, CIFAR-10, image folders) and the order in which training reads them.

`get_dataset` opens a data set by name, `GlobalBatchSampler` says which image stands where in the
training stream. Importing this module reads nothing and imports neither torchvision nor
scikit-learn: accelerate may look for Hugging Face's package of the same name and find this file.
"""

import hashlib
import http.client
import io
import itertools
import os
import pickle
import tarfile
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset, Sampler

from utils import UserError, replacing

# Purposes of the keyed random streams: two purposes never share a draw.
PERMUTATION, FLIP = 1, 2


def _philox(seed, purpose, *, epoch, index=0):
    """The counter-based generator of one (seed, purpose), set to the place of (epoch, index)."""
    return np.random.Philox(key=seed + (purpose << 64), counter=index + (epoch << 64))


class ImageDataset(Dataset):
    """Base of the data sets: labels and keyed augmentation. Subclasses give `_read(index)`.

    Attributes: `shape` (C, H, W); `num_classes`, 0 for none; `labels`, int64 array (length,) or
    None, known without reading an image; `preprocessing`, a note for the records of statistics.
    """

    preprocessing = "none"

    def __init__(self, *, length, shape, labels, num_classes, random_flip, seed):
        self.length, self.shape, self.random_flip, self.seed = length, shape, random_flip, seed
        self.labels = labels
        self.num_classes = 0 if labels is None else num_classes

    def __len__(self):
        return self.length

    def _read(self, index):
        """The image as float32 (C, H, W) in [-1, 1], and the index it was read from."""
        raise NotImplementedError

    def __getitem__(self, key):
        """(epoch, index) -> x float32 (C, H, W) in [-1, 1], y int64 (0 if there are no classes)."""
        epoch, index = key
        x, source = self._read(index)
        if self.random_flip and _philox(self.seed, FLIP, epoch=epoch, index=index).random_raw() & 1:
            x = x.flip(-1)
        y = np.int64(0) if self.labels is None else self.labels[source]
        return x, y


def _uint8_to_float(image):
    """uint8 array (C, H, W) -> float32 tensor in [-1, 1]."""
    return torch.from_numpy(image.astype(np.float32) / 127.5 - 1)


def _require_path(name, path):
    if not path:
        raise UserError(f"the data set {name!r} needs dataset.path, the directory with its files")
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
        from sklearn.datasets import load_digits

        digits = load_digits()
        self.images = torch.from_numpy(digits.images.astype(np.float32) / 8 - 1)[:, None]
        super().__init__(
            length=len(self.images),
            shape=(1, 8, 8),
            labels=digits.target.astype(np.int64) if labels else None,
            num_classes=10,
            random_flip=False,
            seed=seed,
        )

    def _read(self, index):
        return self.images[index].clone(), index


# ------------------------------------------------------------ CIFAR-10

CIFAR10_FOLDER = "cifar-10-batches-py"
MAX_BATCH_BYTES = 1 << 28  # the published batches have 31 MB


# What a pickled uint8 array names, and what we call it.
PICKLED_ARRAY_NAMES = {
    ("numpy.core.multiarray", "_reconstruct"): "array",
    ("numpy._core.multiarray", "_reconstruct"): "array",
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    ("_codecs", "encode"): "encode",  # how Python 3 writes bytes at protocol 2
}


class _Record:
    """What a pickle wanted to build, as plain data: the callable's name, arguments and state."""

    def __init__(self, name, args):
        self.name, self.args, self.state = name, args, None

    def __setstate__(self, state):
        self.state = state


class _RecordingUnpickler(pickle.Unpickler):
    """Reads the pickles of CIFAR-10 without calling anything they name.

    PICKLED_ARRAY_NAMES give a `_Record`, every other name is refused. Not even numpy's own
    `dtype` and `ndarray` are called: a forged dtype state could make numpy take bytes of the
    file for object pointers.
    """

    def find_class(self, module, name):
        kind = PICKLED_ARRAY_NAMES.get((module, name))
        if kind is None:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no data file needs")
        # A new function each time: a file that sets attributes on it changes nothing of ours.
        return lambda *args: _Record(kind, args)


def _plain(value):
    """bytes and recorded bytes -> str (latin1); anything else as it is."""
    if isinstance(value, _Record) and value.name == "encode":
        value = value.args[0]
    return value.decode("latin1") if isinstance(value, bytes) else value


def _array_from_record(record):
    """The uint8 array that a recorded `numpy.ndarray` describes."""
    if not (isinstance(record, _Record) and record.name == "array"):
        raise ValueError("'data' is not an array")
    _, shape, dtype, fortran_order, raw = record.state
    if _plain(dtype.args[0]) not in ("u1", "|u1"):
        raise ValueError("'data' is not of type uint8")
    raw = raw if isinstance(raw, bytes) else _plain(raw).encode("latin1")
    return np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran_order else "C")


def _parse_cifar10_batch(data):
    """Bytes of a batch file -> uint8 (n, 3, 32, 32), int64 (n,)."""
    # encoding="bytes": the published files are Python 2 pickles, whose strings hold the pixels.
    batch = _RecordingUnpickler(io.BytesIO(data), encoding="bytes").load()
    batch = {_plain(key): value for key, value in batch.items()}
    if not {"data", "labels"} <= batch.keys():
        raise ValueError("it has no 'data' and 'labels'")
    images, labels = _array_from_record(batch["data"]), batch["labels"]
    if images.ndim != 2 or images.shape[1] != 3 * 32 * 32:
        raise ValueError(f"'data' has shape {images.shape}, expected (n, 3072)")
    if len(labels) != len(images) or not all(type(y) is int and 0 <= y < 10 for y in labels):
        raise ValueError(f"'labels' are not {len(images)} integers of 0..9")
    return images.reshape(-1, 3, 32, 32), np.array(labels, np.int64)


def _read_cifar10_batch(name, data, where):
    try:
        return _parse_cifar10_batch(data)
    except Exception as error:  # broken and hostile pickles raise almost any kind
        reason = str(error) or type(error).__name__
        raise UserError(f"{name} in {where} is not a CIFAR-10 batch file: {reason}") from error


def _batches_from_folder(folder, names):
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing)}: put all files of CIFAR-10 there")
    return {name: (folder / name).read_bytes() for name in names}


def _batches_from_archive(archive, names):
    """Read in place: nothing is unpacked, so no path or link in the archive can write anywhere."""
    batches = {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                name = member.name.removeprefix(CIFAR10_FOLDER + "/")
                if name in names and member.isreg() and member.size <= MAX_BATCH_BYTES:
                    batches[name] = tar.extractfile(member).read()
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise UserError(f"{archive} is not a whole .tar.gz, fetch it again: {error}") from error
    missing = [name for name in names if name not in batches]
    if missing:
        raise UserError(f"the archive {archive} lacks {', '.join(missing)}: fetch it again")
    return {name: batches[name] for name in names}


def _download_cifar10(path):
    """Fetch the archive into the directory `path` through torchvision, whole or not at all."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import download_url

    archive = path / CIFAR10.filename
    try:
        with replacing(archive) as temporary:
            download_url(CIFAR10.url, str(path), temporary.name, CIFAR10.tgz_md5)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise UserError(
            f"CIFAR-10 is not in {path} and could not be downloaded ({error}): "
            f"put {CIFAR10.filename}, or the folder {CIFAR10_FOLDER} that it holds, there"
        ) from error
    return archive


def _cifar10_batches(path, names):
    """Bytes of the batch files by name, and the folder or archive below `path` that has them."""
    from torchvision.datasets import CIFAR10

    for folder in (path / CIFAR10_FOLDER, path):
        if folder.is_dir() and folder.name == CIFAR10_FOLDER or (folder / names[0]).exists():
            return _batches_from_folder(folder, names), folder
    archive = path / CIFAR10.filename
    if not archive.is_file():
        archive = _download_cifar10(path)
    return _batches_from_archive(archive, names), archive


def _warn_if_repacked(batches, published, where):
    md5 = {name: hashlib.md5(data).hexdigest() for name, data in batches.items()}
    unknown = [name for name in batches if md5[name] != published[name]]
    if unknown:
        warnings.warn(
            f"{', '.join(unknown)} in {where} are not CIFAR-10's published files (another md5); "
            "they are used as they are, and no code in them is run",
            stacklevel=2,
        )


class Cifar10(ImageDataset):
    """CIFAR-10 from its original files: (3, 32, 32), ten classes; 50,000 images (train) or 10,000.

    `path` holds the folder `cifar-10-batches-py`, is that folder, or holds the archive; where
    there is neither, the archive is downloaded into it.
    """

    def __init__(self, *, path, resolution, labels, train, **augmentation):
        path = _require_path("cifar10", path)
        _require_resolution("cifar10", resolution, 32)
        from torchvision.datasets import CIFAR10

        published = dict(CIFAR10.train_list if train else CIFAR10.test_list)  # name -> md5
        batches, where = _cifar10_batches(path, list(published))
        _warn_if_repacked(batches, published, where)
        parts = [_read_cifar10_batch(name, data, where) for name, data in batches.items()]
        self.images = np.concatenate([images for images, _ in parts])
        super().__init__(
            length=len(self.images),
            shape=(3, 32, 32),
            labels=np.concatenate([y for _, y in parts]) if labels else None,
            num_classes=10,
            **augmentation,
        )

    def _read(self, index):
        return _uint8_to_float(self.images[index]), index


# ------------------------------------------------------------ image folders

IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
MAX_UNREADABLE = 10


def _to_rgb(image):
    """Any PIL mode -> RGB. Alpha is dropped, not composited, as ADM and pytorch-fid do."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.mode.startswith("I"):  # 16-bit grey, which PIL's convert would clip at 255
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode == "P":  # by RGBA, since `convert("RGB")` warns of transparent palette entries
        image = image.convert("RGBA")
    return image.convert("RGB")


def center_crop(image, resolution):
    """PIL image -> square PIL image: halvings by box filter, bicubic to the short side, crop.

    ADM's `center_crop_arr` (Dhariwal & Nichol 2021, guided_diffusion/image_datasets.py), with
    which ImageNet figures are made. Raises ValueError for a strip that would become enormous.
    """
    while min(image.size) >= 2 * resolution:
        image = image.resize([side // 2 for side in image.size], Image.Resampling.BOX)
    scale = resolution / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    if width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"too narrow, the short side at {resolution} makes it {width}x{height}")
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))


def _is_image(name):
    return name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith(".")


def _list_images(root):
    """Paths of the images below `root`, relative to it and sorted; hidden names are left out."""
    found = []
    for directory, subdirectories, files in os.walk(root, followlinks=True):
        subdirectories[:] = [name for name in subdirectories if not name.startswith(".")]
        relative = os.path.relpath(directory, root)
        found += [os.path.normpath(os.path.join(relative, n)) for n in files if _is_image(n)]
    if not found:
        raise UserError(f"no images ({', '.join(IMAGE_EXTENSIONS)}) in {root}")
    return sorted(found)


def _labels_from_subdirectories(root, files):
    """int64 labels (n,) and the number of classes: first-level subdirectories, sorted."""
    loose = [file for file in files if os.sep not in file]
    if loose:
        raise UserError(
            f"{loose[0]} in {root} is in no class directory: put every image into a subdirectory "
            "named as its class, or read the folder without labels"
        )
    entries = (entry for entry in os.scandir(root) if not entry.name.startswith("."))
    classes = sorted(entry.name for entry in entries if entry.is_dir())
    number = {name: i for i, name in enumerate(classes)}
    labels = np.array([number[file.split(os.sep)[0]] for file in files], np.int64)
    empty = sorted(set(range(len(classes))) - set(labels.tolist()))
    if empty:
        raise UserError(f"the class directory {root / classes[empty[0]]} has no images: remove it")
    return labels, len(classes)


class ImageFolder(ImageDataset):
    """Images below a directory, centre-cropped to (3, resolution, resolution).

    The class is the first-level subdirectory. An unreadable image is named in a warning and the
    next readable one stands in for it, label included, so that no other image changes its place;
    more than MAX_UNREADABLE of them (in one process) raise UserError.
    """

    def __init__(self, *, path, resolution, labels, train, **augmentation):
        self.root = _require_path("folder", path)
        if not self.root.is_dir():
            raise UserError(f"the data set directory {path} does not exist: check dataset.path")
        if resolution is None:
            raise UserError("the data set 'folder' needs a resolution to crop and resize to")
        if not train:
            raise UserError("an image folder has one split: point dataset.path to the test images")
        self.files = _list_images(self.root)
        self.unreadable = {}  # index -> reason
        self.preprocessing = f"RGB, centre crop to {resolution} (ADM: box halvings, then bicubic)"
        targets, num_classes = None, 0
        if labels:
            targets, num_classes = _labels_from_subdirectories(self.root, self.files)
        super().__init__(
            length=len(self.files),
            shape=(3, resolution, resolution),
            labels=targets,
            num_classes=num_classes,
            **augmentation,
        )

    def _note_unreadable(self, index, error):
        unknown = isinstance(error, UnidentifiedImageError)  # whose text repeats the path
        self.unreadable[index] = "no image" if unknown else str(error) or type(error).__name__
        named = [f"{self.root / self.files[i]} ({why})" for i, why in self.unreadable.items()]
        limit = min(MAX_UNREADABLE, self.length - 1)
        if len(named) > limit:
            raise UserError(
                f"more than {limit} of {self.length} images cannot be read, repair or remove "
                f"them: {'; '.join(named)}"
            ) from error
        warnings.warn(f"unreadable image, the next stands in for it: {named[-1]}", stacklevel=2)

    def _load(self, index):
        with Image.open(self.root / self.files[index]) as image:
            image = center_crop(_to_rgb(image), self.shape[-1])
        return _uint8_to_float(np.asarray(image).transpose(2, 0, 1))

    def _read(self, index):
        while True:
            if index not in self.unreadable:
                try:
                    return self._load(index), index
                except Exception as error:  # noqa: BLE001 - PIL raises many kinds, bombs included
                    self._note_unreadable(index, error)
            index = (index + 1) % self.length


# ------------------------------------------------------------ by name

DATASETS = {"digits": Digits, "cifar10": Cifar10, "folder": ImageFolder}


def get_dataset(
    name, *, path=None, resolution=None, random_flip=False, labels=True, seed=0, train=True
):
    """Open a data set by its name in DATASETS; `ImageDataset` says what it offers.

    labels=False gives no classes. Augmentation is keyed by (seed, epoch, index) only. Raises
    UserError for an unknown name, missing files, files of another kind, a wrong resolution.
    """
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r}: dataset.name is one of {', '.join(DATASETS)}")
    return DATASETS[name](
        path=path,
        resolution=resolution,
        labels=labels,
        train=train,
        random_flip=random_flip,
        seed=seed,
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
