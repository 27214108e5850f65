"""Makes folders of packed latents, in any number of processes: a shard that is there is whole, a
restart makes the others. The format is that of libs.data.latents.
"""

import contextlib
import os
from pathlib import Path

import numpy as np

import utils
from libs.data.latents import DTYPE, FORMAT, LABELS, MANIFEST, shard_name
from libs.files import hash_file


class LatentWriter:
    """A folder of latents that is being made, a shard at a time.

    settings: record_shape (2C, h, w), num_images, images_per_shard, flips, class_names or None, and
    what else tells these latents from others: scaling, resolution, autoencoder_sha256, crop...;
    with features of the images also feature_shape (N, D) and features, their network's name.
    One process calls `begin` before and `finish` after everything else.
    """

    def __init__(self, folder, **settings):
        self.folder = Path(folder)
        self.settings = {"format": FORMAT, "dtype": "float16", **settings}
        self.kinds = ("shard", "features") if settings.get("features") else ("shard",)
        self.num_shards = -(-settings["num_images"] // settings["images_per_shard"])

    def images(self, number):
        """The images of a shard, a range."""
        size, total = self.settings["images_per_shard"], self.settings["num_images"]
        return range(number * size, min((number + 1) * size, total))

    def _names(self, number):
        """The files of a shard."""
        return [shard_name(number, kind) for kind in self.kinds]

    def missing(self):
        """Numbers of the shards that are not there."""
        there = set(os.listdir(self.folder))
        return [i for i in range(self.num_shards) if not there.issuperset(self._names(i))]

    def begin(self):
        """Prepare the folder. Returns whether the latents are complete already.

        Raises UserError if the folder holds other files, or latents of other settings.
        """
        utils.make_directory(self.folder)
        path, begun = self.folder / MANIFEST, {}
        if path.is_file():
            begun = utils.read_json(path)
            other = [key for key, value in self.settings.items() if begun.get(key) != value]
        else:
            other = [file.name for file in self.folder.iterdir() if file.name[0] != "."]
        if other:
            raise utils.UserError(
                f"{self.folder} holds other files, or latents begun with other settings "
                f"({utils.listed(other)}): give another folder, or the former settings"
            )
        utils.remove_leftovers(self.folder)
        if "shards" in begun and not self.missing():
            return True
        utils.write_json(path, self.settings)
        return False

    def write(self, number, batches):
        """Write a shard of batches, all, or nothing if they raise. A batch is a tuple of float16
        arrays: records (n, 2C, h, w) and, with features, (n, N, D).
        """
        paths = [self.folder / name for name in self._names(number)]
        with contextlib.ExitStack() as stack:
            temporary = [stack.enter_context(utils.replacing(path)) for path in paths]
            files = [stack.enter_context(open(path, "wb")) for path in temporary]
            for batch in batches:
                for file, records in zip(files, batch, strict=True):
                    file.write(np.ascontiguousarray(records, DTYPE))
            for file in files:
                file.flush()
                os.fsync(file.fileno())  # or a loss of power could leave its name and not its data

    def _describe(self, name, **more):
        path = self.folder / name
        return {"file": name, "bytes": path.stat().st_size, "sha256": hash_file(path), **more}

    def finish(self, labels):
        """Write labels (num_images,) or None, then the whole manifest; every shard is there."""
        entry = None
        if labels is not None:
            with utils.replacing(self.folder / LABELS) as temporary:
                labels.astype("<i8").tofile(temporary)
            entry = self._describe(LABELS)
        results = {"labels": entry, "scaled": False}
        flips = 1 + self.settings["flips"]
        for key, kind in zip(("shards", "feature_shards"), self.kinds, strict=False):
            counts = {shard_name(i, kind): len(self.images(i)) for i in range(self.num_shards)}
            results[key] = [self._describe(name, records=n * flips) for name, n in counts.items()]
        utils.write_json(self.folder / MANIFEST, {**self.settings, **results})
