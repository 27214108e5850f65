"""The images of an evaluation on disk while it runs, so that it goes on where it was interrupted.

A folder beside the result holds recipe.json, features.npy (float32, a row an image), done.npy (a
byte an image) and, for the evaluation suite of ADM, pixels.npy. An image is done when everything
else of it has been written; what is done is not made again.
"""

import contextlib
import math
import os
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

import utils
from utils import UserError

# Values of done.npy. AGREES: made, and classified as what it was to be.
MISSING, MADE, AGREES = 0, 1, 2
PNG_THREADS = 4
RECIPE = "recipe.json"
OWN = (".lock", RECIPE, "features.npy", "done.npy", "pixels.npy")


def _without_files(recipe):
    return {
        key: _without_files(value) if isinstance(value, dict) else value
        for key, value in recipe.items()
        if key != "file"
    }


def compared(recipe):
    """What counts of a recipe: not the names of files, which may move; their hashes are in it too.

    Older recipes lack `fp8`, which was off or not noted, and name the file of kept.adm_npz.
    """
    counts = {"fp8": False, **_without_files(recipe)}
    if isinstance(counts.get("kept"), dict):
        counts["kept"]["adm_npz"] = bool(counts["kept"].get("adm_npz"))
    return counts


def read_recipe(path, remedy):
    """The dict in a json file of an evaluation; UserError, with what to do, if it holds none."""
    found = utils.read_json(path)
    if not isinstance(found, dict):
        raise UserError(f"{path} is not of an evaluation: {remedy}")
    return found


def require_same_recipe(folder, recipe, remedy):
    """UserError naming the first difference if `folder` belongs to another recipe than this one."""
    path = Path(folder) / RECIPE
    if not path.exists():
        return
    found = read_recipe(path, remedy)
    if lines := utils.config_differences(compared(found), compared(recipe)):
        raise UserError(f"{folder} holds images of another recipe ({lines[0]}): {remedy}")


def _is_own(path):
    return path.name in OWN or path.name.startswith(f".{RECIPE}.")  # the latter of utils.replacing


def require_own_folder(folder):
    """UserError if `folder` is not of an evaluation: it has no recipe, but files of others."""
    folder = Path(folder)
    if not folder.is_dir() or (folder / RECIPE).exists():
        return
    foreign = sorted(path.name for path in folder.iterdir() if not _is_own(path))
    if foreign:
        raise UserError(
            f"{folder}, where the images of this evaluation go, holds other files ({foreign[0]}): "
            "move it away, or give another --output_path"
        )


def create(folder, recipe, arrays):
    """Make the files of a new evaluation, or keep those of the same one that was interrupted.

    Called by one process, which holds the folder's lock. arrays: name -> (shape, dtype).
    """
    folder = Path(folder)
    require_same_recipe(
        folder, recipe, "delete it to start anew, or give another --output_path to keep it"
    )
    if (folder / RECIPE).exists():
        for name, (shape, dtype) in arrays.items():
            RowFile(folder / f"{name}.npy").require(shape, dtype)
        return
    for name, (shape, dtype) in arrays.items():
        np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shape)  # zeros, and sparse
    utils.write_json(folder / RECIPE, recipe)  # the last: what a kill leaves without it is remade


def pending(folder, batch_size, png_folder=None):
    """Batches of `folder` that lack an image, as lists of indices. Batch b is images b * batch_size
    and the next ones whatever is done, since other company may change an image's last bits. An
    image that is no longer in png_folder, if there is one, is to be made again.
    """
    done = RowFile(Path(folder) / "done.npy").read() != MISSING
    if png_folder:
        there = set(os.listdir(png_folder))
        done &= np.array([f"{i}.png" in there for i in range(len(done))])
    batches = (range(len(done))[i : i + batch_size] for i in range(0, len(done), batch_size))
    return [list(batch) for batch in batches if not done[batch.start : batch.stop].all()]


class RowFile:
    """A .npy file with a row an image, read through a memory map and written with file writes: of a
    full disk those raise, where a map would kill the process, and they can be synchronized.
    """

    def __init__(self, path):
        self.path = path
        try:
            with open(path, "rb") as file:
                np.lib.format.read_magic(file)
                header = np.lib.format.read_array_header_1_0(file)
                self.shape, fortran_order, self.dtype = header
                self._start, size = file.tell(), os.fstat(file.fileno()).st_size
            self._row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
            if self.dtype.hasobject or fortran_order or not self.shape or 0 in self.shape:
                raise ValueError(f"it holds {self.dtype} of shape {self.shape}")
            if size != self._start + self.shape[0] * self._row_bytes:
                raise ValueError(f"it has {size} bytes, which its shape {self.shape} has not")
            self._file = open(path, "r+b")
        except FileNotFoundError as error:
            raise UserError(
                f"{path} is not there: every process must see the folder of --output_path, also on "
                "other machines, and nobody may delete it meanwhile"
            ) from error
        except Exception as error:  # broken headers raise many kinds
            self._refuse(error, error)

    def _refuse(self, reason, cause=None):
        raise UserError(
            f"{self.path} is damaged ({reason}): delete {Path(self.path).parent} to start anew"
        ) from cause

    def require(self, shape, dtype):
        """UserError if the file is of another shape or type."""
        self.close()
        if (self.shape, self.dtype) != (shape, dtype):
            self._refuse(f"it holds {self.dtype} of shape {self.shape}, not {dtype} of {shape}")

    def write(self, first, rows):
        """Rows (B, ...) of images first, first + 1, ..; on the disk when this returns."""
        self._file.seek(self._start + first * self._row_bytes)
        self._file.write(np.ascontiguousarray(rows, self.dtype).tobytes())
        self._file.flush()
        os.fsync(self._file.fileno())

    def read(self):
        """The rows as a read-only memory map."""
        return np.memmap(self.path, self.dtype, "r", self._start, self.shape)

    def close(self):
        self._file.close()


class ImageStore:
    """Reads and writes the files that `create` made; every process has its own.

    png_folder: where <index>.png of every image goes; None for nowhere.
    """

    def __init__(self, folder, png_folder=None):
        self.folder, self.png_folder = Path(folder), png_folder and Path(png_folder)
        self.features = RowFile(self.folder / "features.npy")
        self.done = RowFile(self.folder / "done.npy")
        pixels = self.folder / "pixels.npy"
        self.pixels = RowFile(pixels) if pixels.exists() else None
        self._threads = ThreadPoolExecutor(PNG_THREADS)

    @property
    def keeps_pictures(self):
        return bool(self.png_folder or self.pixels)

    def write(self, indices, features, agrees, pixels):
        """Keep the images `indices` (consecutive) and, last of all, that they are done.

        features: float (B, dim); agrees: bool (B,) or None; pixels: uint8 (B, C, H, W), or None
        where no pictures are kept; all on the CPU.

        Raises:
            UserError: the images of these features contain NaN or infinity.
        """
        broken = [i for i, row in zip(indices, features, strict=True) if not row.isfinite().all()]
        if broken:
            raise UserError(
                f"the features of image {broken[0]} are not finite ({len(broken)} of the "
                f"{len(indices)} images of its batch): they contain NaN or infinity; try another "
                "precision or sampling algorithm"
            )
        if self.png_folder:
            paths = (self.png_folder / f"{index}.png" for index in indices)
            list(self._threads.map(utils.save_png, paths, pixels))
        if self.pixels:
            rgb = pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels
            self.pixels.write(indices[0], rgb.permute(0, 2, 3, 1).numpy())
        self.features.write(indices[0], features.float().numpy())
        right = torch.zeros(len(indices)) if agrees is None else agrees
        self.done.write(indices[0], torch.where(right.bool(), AGREES, MADE).numpy())

    def agreement(self):
        """The share of images that the classifier takes for what they were to be."""
        return float((self.done.read() == AGREES).mean())

    def write_adm_npz(self, path):
        """The pictures as arr_0, uint8 (n, H, W, 3) in order of index, in an uncompressed .npz, as
        evaluator.py of openai/guided-diffusion reads it. Whole or not at all; copied in pieces.
        """
        with utils.replacing(path) as temporary:
            with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
                with archive.open("arr_0.npy", "w", force_zip64=True) as target:
                    with open(self.pixels.path, "rb") as source:
                        shutil.copyfileobj(source, target, 1 << 24)

    def remove(self):
        """Close and delete our files, the lock's with them, and the folder if nothing else is in
        it.
        """
        for file in filter(None, (self.features, self.done, self.pixels)):
            file.close()
        # The recipe first: what a kill leaves without it is remade.
        own = sorted(filter(_is_own, self.folder.iterdir()), key=lambda path: path.name != RECIPE)
        for path in own:
            with contextlib.suppress(OSError):
                path.unlink()
        with contextlib.suppress(OSError):
            self.folder.rmdir()

