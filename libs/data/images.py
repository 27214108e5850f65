"""Image files: which there are below a directory, their classes, and their pixels as squares."""

import math
import os
import stat

import numpy as np
from PIL import Image, UnidentifiedImageError

from utils import PASSING_ERRORS, UserError

IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
# PIL's decoders of those, and of GIF, which often has another's name; of any other file PIL would
# try them all, Ghostscript among them, which runs PostScript.
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "PPM", "TIFF", "GIF")
MAX_PIXELS = 1 << 27  # 16384 x 8192, in PIL half a GiB, and a few times that while converted
MIN_CROP_SHARE = 0.8  # a random crop has this share of the short side, or more

# ------------------------------------------------------------ pixels


def _to_rgb(image):
    """Any PIL mode -> RGB. Alpha is dropped, not composited, as ADM and pytorch-fid do."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.mode.startswith("I"):  # 16-bit grey, which PIL's convert would clip at 255
        values = np.asarray(image).astype(np.int32).clip(0, 65535)
        values += 128
        values //= 257
        image = Image.fromarray(values.astype(np.uint8))
    if image.mode == "P":  # by RGBA, since `convert("RGB")` warns of transparent palette entries
        image = image.convert("RGBA")
    return image.convert("RGB")


def _resize(image, short_side):
    """PIL image -> its short side at `short_side`: halvings by box filter, then bicubic.

    Raises ValueError for a strip that would become enormous.
    """
    while min(image.size) >= 2 * short_side:
        image = image.resize([side // 2 for side in image.size], Image.Resampling.BOX)
    scale = short_side / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    if width * height > MAX_PIXELS:
        raise ValueError(f"too narrow, the short side at {short_side} makes it {width}x{height}")
    return image.resize((width, height), Image.Resampling.BICUBIC)


def center_crop(image, resolution):
    """PIL image -> its central square, resized to `resolution`.

    ADM's `center_crop_arr` (Dhariwal & Nichol 2021, guided_diffusion/image_datasets.py), with
    which ImageNet figures are made. Raises ValueError for a strip that would become enormous.
    """
    image = _resize(image, resolution)
    left, top = ((side - resolution) // 2 for side in image.size)
    return image.crop((left, top, left + resolution, top + resolution))


def random_crop(image, resolution, words):
    """PIL image -> a square of it, resized to `resolution`.

    ADM's `random_crop_arr`: the short side becomes any length from resolution to resolution / 0.8,
    and the square is anywhere in the result. words: three random integers of 64 bits, for length,
    left edge and upper edge. Raises ValueError as center_crop does.
    """
    longest = math.ceil(resolution / MIN_CROP_SHARE)
    size, x, y = map(int, words)
    image = _resize(image, resolution + size % (longest - resolution + 1))
    left, top = (w % (side - resolution + 1) for w, side in zip((x, y), image.size, strict=True))
    return image.crop((left, top, left + resolution, top + resolution))


def read_image(path, crop):
    """The image file as uint8 (3, H, W), RGB; crop: PIL image -> PIL image.

    PIL raises many kinds of exceptions for broken files. ValueError for more than MAX_PIXELS, and
    for what is no plain file, such as a pipe, which would never be read to its end.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("no plain file")
    with Image.open(path, formats=FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width}x{image.height} pixels are more than {MAX_PIXELS}")
        return np.ascontiguousarray(np.asarray(crop(_to_rgb(image))).transpose(2, 0, 1))


def refuse_system_error(error, path):
    """UserError where what `read_image` raised for `path` is not the image's fault."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) in PASSING_ERRORS:
        reason = getattr(error, "strerror", None) or "memory ran out"
        raise UserError(
            f"cannot read {path}: {reason}; once that is mended, the same command goes on"
        ) from error


def unreadable_reason(error):
    """What `read_image` raised, in a few words."""
    # An unidentified image's text repeats the path.
    unknown = isinstance(error, UnidentifiedImageError)
    return "no image" if unknown else str(error) or type(error).__name__


# ------------------------------------------------------------ files


def _is_image(name):
    return name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith(".")


def list_images(root):
    """Paths of the images below `root`, relative to it and sorted; hidden names are left out.

    Links are followed, and a directory is read once, however many links lead to it. Raises
    UserError if there are none, or a directory cannot be read. ImageNet's 1.28 million take about
    two seconds.
    """

    def refuse(error):
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error

    found, visited = [], set()
    for directory, subdirectories, files in os.walk(root, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(directory)) in visited:
            subdirectories.clear()
            continue
        visited.add(real)
        subdirectories[:] = sorted(name for name in subdirectories if not name.startswith("."))
        relative = os.path.relpath(directory, root)
        prefix = "" if relative == os.curdir else relative + os.sep
        found += [prefix + name for name in files if _is_image(name)]
    if not found:
        raise UserError(f"no images ({', '.join(IMAGE_EXTENSIONS)}) in {root}")
    return sorted(found)


def class_names(root):
    """Names of the classes: the first-level subdirectories, sorted; hidden names are left out."""
    entries = (entry for entry in os.scandir(root) if not entry.name.startswith("."))
    return sorted(entry.name for entry in entries if entry.is_dir())


def labels_from_directories(root, files, classes):
    """int64 labels (n,) of `files`, paths below `root`, by their first-level subdirectory.

    Raises UserError for an image in none of the directories named in `classes`.
    """
    number = {name: i for i, name in enumerate(classes)}
    labels = [number.get(file.split(os.sep)[0]) for file in files]
    if None in labels:
        file = files[labels.index(None)]
        raise UserError(
            f"{file} in {root} is in no class directory: put every image into a subdirectory "
            "named as its class, or read the folder without labels"
        )
    return np.array(labels, np.int64)
