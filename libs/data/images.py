"""Image files: the files below a directory, their classes, and their pixels as squares."""

import math
import os

import numpy as np
from PIL import Image

from utils import PASSING_ERRORS, UserError

IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
# PIL's decoders of those, and of GIF, which often has another's name; of any other file PIL would
# try them all, Ghostscript among them, which runs PostScript.
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "PPM", "TIFF", "GIF")
MIN_CROP_SHARE = 0.8  # a random crop has this share of the short side, or more


class UnreadableImage(ValueError):
    """A damaged image file; the text names it."""


# ------------------------------------------------------------ pixels


def _resize(image, short_side):
    """PIL image -> its short side at `short_side`: halvings by box filter, then bicubic."""
    while min(image.size) >= 2 * short_side:
        image = image.resize([side // 2 for side in image.size], Image.Resampling.BOX)
    scale = short_side / min(image.size)
    size = [round(side * scale) for side in image.size]
    return image.resize(size, Image.Resampling.BICUBIC)


def center_crop(image, resolution):
    """PIL image -> its central square, resized to `resolution`.

    ADM's `center_crop_arr` (Dhariwal & Nichol 2021, guided_diffusion/image_datasets.py), with
    which ImageNet figures are made.
    """
    image = _resize(image, resolution)
    left, top = ((side - resolution) // 2 for side in image.size)
    return image.crop((left, top, left + resolution, top + resolution))


def random_crop(image, resolution, words):
    """PIL image -> a square of it, resized to `resolution`.

    ADM's `random_crop_arr`: the short side becomes any length from resolution to resolution / 0.8,
    and the square is anywhere in the result. words: three random integers of 64 bits, for length,
    left edge and upper edge.
    """
    longest = math.ceil(resolution / MIN_CROP_SHARE)
    size, x, y = map(int, words)
    image = _resize(image, resolution + size % (longest - resolution + 1))
    left, top = (w % (side - resolution + 1) for w, side in zip((x, y), image.size, strict=True))
    return image.crop((left, top, left + resolution, top + resolution))


def read_square(path, resolution, words=None):
    """A square of the image file as uint8 (3, resolution, resolution), RGB: the central one, or,
    with the words of `random_crop`, a random one.

    Alpha is dropped, not composited, as ADM and pytorch-fid do. UnreadableImage for a damaged file.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            image = image.convert("RGB")
        if words is None:
            image = center_crop(image, resolution)
        else:
            image = random_crop(image, resolution, words)
    except Exception as error:  # PIL raises many kinds
        not_the_file = isinstance(error, (MemoryError, FileNotFoundError, PermissionError))
        if not_the_file or getattr(error, "errno", None) in PASSING_ERRORS:
            raise
        raise UnreadableImage(f"{path}: {error}") from error
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


# ------------------------------------------------------------ files


def _is_image(name):
    return name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith(".")


def list_images(root):
    """Paths of the images below `root`, relative to it and sorted; hidden names are left out.

    Links are followed. Raises UserError if there are none. ImageNet's 1.28 million take about two
    seconds.
    """

    def refuse(error):  # else its images would be missing without a word
        raise error

    found = []
    for directory, subdirectories, files in os.walk(root, onerror=refuse, followlinks=True):
        subdirectories[:] = sorted(name for name in subdirectories if not name.startswith("."))
        relative = os.path.relpath(directory, root)
        prefix = "" if relative == os.curdir else relative + os.sep
        found += [prefix + name for name in files if _is_image(name)]
    if not found:
        raise UserError(f"no images ({', '.join(IMAGE_EXTENSIONS)}) in {root}")
    return sorted(found)


def label_by_directory(root, files):
    """int64 labels (n,) of `files`, paths below `root`, and the names of the classes: the
    first-level subdirectories, sorted; hidden names are left out.

    Raises UserError for an image in none of them.
    """
    entries = [entry for entry in os.scandir(root) if not entry.name.startswith(".")]
    classes = sorted(entry.name for entry in entries if entry.is_dir())
    number = {name: i for i, name in enumerate(classes)}
    labels = [number.get(file.split(os.sep)[0]) for file in files]
    if None in labels:
        file = files[labels.index(None)]
        raise UserError(
            f"{file} in {root} is in no class directory: put every image into a subdirectory "
            "named as its class, or read the folder without labels"
        )
    return np.array(labels, np.int64), classes
