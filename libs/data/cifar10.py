"""CIFAR-10's original files: found, downloaded, read without running code from them."""

import gzip
import hashlib
import http.client
import os
import tarfile
import warnings

import numpy as np

from libs import pickled
from utils import UserError, replacing

FOLDER = "cifar-10-batches-py"
MAX_BYTES = 1 << 29  # of an archive unpacked, and of a batch; the published have 186 and 31 MB


def _parse_batch(data):
    """Bytes of a batch file -> uint8 (n, 3, 32, 32), int64 (n,)."""
    batch = {pickled.text(key): value for key, value in pickled.load(data).items()}
    if not {"data", "labels"} <= batch.keys():
        raise ValueError("it has no 'data' and 'labels'")
    images, labels = pickled.array(batch["data"], ["u1"]), batch["labels"]
    if images.ndim != 2 or images.shape[1] != 3 * 32 * 32:
        raise ValueError(f"'data' has shape {images.shape}, expected (n, 3072)")
    if len(labels) != len(images) or not all(type(y) is int and 0 <= y < 10 for y in labels):
        raise ValueError(f"'labels' are not {len(images)} integers of 0..9")
    return images.reshape(-1, 3, 32, 32), np.array(labels, np.int64)


def _read_batch(name, data, where):
    try:
        return _parse_batch(data)
    except Exception as error:  # broken and hostile pickles raise almost any kind
        reason = str(error) or type(error).__name__
        raise UserError(f"{name} in {where} is not a CIFAR-10 batch file: {reason}") from error


def _batches_from_folder(folder, names):
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing)}: put all files of CIFAR-10 there")
    large = [name for name in names if (folder / name).stat().st_size > MAX_BYTES]
    if large:
        raise UserError(f"{large[0]} in {folder} is no CIFAR-10 batch file: it is too large")
    return {name: (folder / name).read_bytes() for name in names}


def _read_members(archive, names):
    """{name: bytes} of those `names` that are plain files in FOLDER in a .tar.gz.

    Not by tarfile's own walk, which reads long names and pax headers of any size and keeps every
    header: a megabyte that unpacks to gigabytes of them would fill the memory.
    """
    found, unpacked = {}, 0
    with gzip.open(archive) as file:
        while any(block := file.read(tarfile.BLOCKSIZE)):
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            size = -(-header.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            unpacked += tarfile.BLOCKSIZE + size
            if size < 0 or unpacked > MAX_BYTES:
                raise ValueError(f"it unpacks to more than {MAX_BYTES >> 20} MiB")
            name = header.name.removeprefix(FOLDER + "/")
            if name in names and header.isreg():
                found[name] = file.read(header.size)
                size -= len(found[name])
            file.seek(size, os.SEEK_CUR)
    return found


def _batches_from_archive(archive, names):
    """Read in place: nothing is unpacked, so no path or link in the archive can write anywhere."""
    try:
        batches = _read_members(archive, names)
    except Exception as error:  # broken and hostile archives raise several kinds
        raise UserError(f"{archive} is not a whole .tar.gz, fetch it again: {error}") from error
    missing = [name for name in names if name not in batches]
    if missing:
        raise UserError(f"the archive {archive} lacks {', '.join(missing)}: fetch it again")
    return {name: batches[name] for name in names}


def _download(path):
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
            f"put {CIFAR10.filename}, or the folder {FOLDER} that it holds, there"
        ) from error
    return archive


def _batches(path, names):
    """Bytes of the batch files by name, and the folder or archive below `path` that has them."""
    from torchvision.datasets import CIFAR10

    for folder in (path / FOLDER, path):
        if folder.is_dir() and folder.name == FOLDER or (folder / names[0]).exists():
            return _batches_from_folder(folder, names), folder
    archive = path / CIFAR10.filename
    if not archive.is_file():
        archive = _download(path)
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


def read_cifar10(path, train):
    """uint8 images (n, 3, 32, 32) and int64 labels (n,): 50,000 of the training split, or 10,000.

    `path` holds the folder `cifar-10-batches-py`, is that folder, or holds the archive; where
    there is neither, the archive is downloaded into it. Raises UserError.
    """
    from torchvision.datasets import CIFAR10

    published = dict(CIFAR10.train_list if train else CIFAR10.test_list)  # name -> md5
    batches, where = _batches(path, list(published))
    _warn_if_repacked(batches, published, where)
    parts = [_read_batch(name, data, where) for name, data in batches.items()]
    return np.concatenate([images for images, _ in parts]), np.concatenate([y for _, y in parts])
