"""Image files in a directory or a zip file: names, classes, and pixels as squares."""

import collections
import functools
import io
import json
import os
import zipfile

import numpy as np
from PIL import Image

from libs.files import reading
from utils import PASSING_ERRORS, UserError, listed

# Decoders tried beside that of the suffix, since many files have another's; and never: EPS, which
# runs Ghostscript, and formats that Pillow only writes or leaves to other programs.
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "PPM", "TIFF", "GIF")
NEVER_READ = {"EPS", "PDF", "PALM", "MPEG", "BUFR", "GRIB", "HDF5", "WMF"}
# What Synology, QNAP, NetApp, macOS, Windows and Linux leave in a folder, besides hidden names.
SYSTEM_FOLDERS = set(
    "@eadir @tmp @recycle @recently-snapshot @sharebin @transcode @__thumb #recycle #snapshot "
    "~snapshot __macosx $recycle.bin recycler lost+found".split()
) | {"system volume information", "network trash folder", "temporary items"}
# Of EDM's and StyleGAN's tools: {"labels": [[file, class or one-hot vector], ...]}.
LABELS = "dataset.json"


class UnreadableImage(UserError):
    """A damaged image file; the text names it."""


@functools.lru_cache(maxsize=4)
def _mount(root, process):
    """A directory or zip file as a Path; after a fork handles would share their place in it."""
    with reading(root, "zip file"):
        return root if root.is_dir() else zipfile.Path(root)


@functools.cache
def list_formats():
    """{suffix: decoder} of the images that Pillow reads by itself; MPO's is JPEG's."""
    found = Image.registered_extensions().items()
    return {s: f if f in Image.OPEN else "JPEG" for s, f in found if f not in NEVER_READ}


def _is_left_out(folder):
    return folder.startswith(".") or folder.lower() in SYSTEM_FOLDERS


def _list_files(root):
    """Paths below `root`, with a slash at the end of folders."""

    def refuse(error):  # else its images would be missing without a word
        raise error

    if not root.is_dir():
        return (yield from _mount(root, os.getpid()).root.namelist())
    for directory, subdirectories, files in os.walk(root, onerror=refuse, followlinks=True):
        relative = os.path.relpath(directory, root)
        prefix = "" if relative == os.curdir else relative + "/"
        yield from (f"{prefix}{name}/" for name in subdirectories)
        yield from (prefix + name for name in files)
        subdirectories[:] = sorted(name for name in subdirectories if not _is_left_out(name))


def list_images(root):
    """Names of the images below `root`, a directory or zip file, sorted, and a text that counts
    what is left out: other files, hidden and systems' names.

    Links are followed. Raises UserError if there are none. ImageNet's 1.28 million: four seconds.
    """
    found, skipped, known = [], collections.Counter(), list_formats()
    for path in _list_files(root):
        *folders, name = path.split("/")
        suffix = os.path.splitext(name)[1].lower()
        if left_out := [folder for folder in folders if _is_left_out(folder)]:
            skipped[left_out[0]] += 1
        elif name.startswith("."):
            skipped["hidden"] += 1
        elif suffix in known:
            found.append(path)
        elif name and path != LABELS:
            skipped[suffix or name] += 1
    left_out = ", ".join(f"{number} {kind}" for kind, number in skipped.most_common())
    if not found:
        raise UserError(f"no images ({', '.join(known)}) in {root}; left out: {left_out}")
    return sorted(found), left_out


def label_images(root, files):
    """int64 labels (n,) of `files`, names below `root`, and the names of the classes: by
    dataset.json, else the first-level folders, sorted, without what list_images leaves out.

    Raises UserError for an image without a class, and for two links to one folder.
    """
    folder, found = _mount(root, os.getpid()), {}
    if (folder / LABELS).is_file():
        found = json.loads((folder / LABELS).read_text())
    if "labels" in found:
        names, numbers = zip(*found["labels"] or [("", -1)], strict=True)
        if np.ndim(numbers) == 2:
            *others, largest = np.sort(numbers).T
            if np.any(others) or np.any(largest != 1):
                what = "neither numbers nor one-hot vectors"
                raise UserError(f"the labels of {root / LABELS} are {what}")
            numbers = np.argmax(numbers, 1).tolist()
        number, keys = dict(zip(names, numbers, strict=True)), files
        classes = [str(i) for i in range(max(numbers) + 1)]
    else:
        entries = [entry for entry in folder.iterdir() if not _is_left_out(entry.name)]
        classes = sorted(entry.name for entry in entries if entry.is_dir())
        number, keys = {name: i for i, name in enumerate(classes)}, [f.split("/")[0] for f in files]
    places = {os.path.realpath(root / name): name for name in classes}
    if doubles := set(classes) - set(places.values()):
        raise UserError(f"in {root} another class is a link to the same folder: {listed(doubles)}")
    labels = [number.get(key) for key in keys]
    if None in labels:
        raise UserError(
            f"{files[labels.index(None)]} in {root} is in no class directory (nor in a {LABELS}): "
            "put every image into a subdirectory named as its class, or read them without labels"
        )
    return np.array(labels, np.int64), classes


def crop_square(image, resolution):
    """PIL image -> the square in its centre, resized to `resolution`: halvings by box filter, then
    bicubic.

    ADM's `center_crop_arr` (Dhariwal & Nichol 2021, guided_diffusion/image_datasets.py), with which
    ImageNet figures are made.
    """
    while min(image.size) >= 2 * resolution:
        image = image.resize([side // 2 for side in image.size], Image.Resampling.BOX)
    scale = resolution / min(image.size)
    image = image.resize([round(x * scale) for x in image.size], Image.Resampling.BICUBIC)
    left, top = ((side - resolution) // 2 for side in image.size)
    return image.crop((left, top, left + resolution, top + resolution))


def read_square(root, name, resolution=None):
    """`crop_square` of the image `name` below `root` as uint8 (3, resolution, resolution), RGB;
    without a resolution, of its smaller side.

    Alpha is dropped, not composited, as ADM and pytorch-fid do. UnreadableImage for a damaged file.
    """
    try:
        file = io.BytesIO((_mount(root, os.getpid()) / name).read_bytes())
        own = list_formats().get(os.path.splitext(name)[1].lower(), "PNG")
        with Image.open(file, formats=(*FORMATS, own)) as image:
            image = crop_square(image.convert("RGB"), resolution or min(image.size))
    except Exception as error:  # PIL raises many kinds
        not_the_file = isinstance(error, (MemoryError, FileNotFoundError, PermissionError))
        if not_the_file or getattr(error, "errno", None) in PASSING_ERRORS:
            raise
        reason = str(error).split(" <")[0]
        raise UnreadableImage(f"{root / name} is damaged or no image ({reason})") from error
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
