"""Makes folders of packed latents, in any number of processes, so that kill -9 loses little: shards
are whole or absent, a restart makes those that are absent, the manifest comes last. The format is
that of libs.data.latents.
"""

import contextlib
import hashlib
import os
from pathlib import Path

import numpy as np

from libs.data.latents import (
    DTYPE,
    FORMAT,
    LABELS,
    MANIFEST,
    PROGRESS,
    SETTINGS,
    SHARD_ENTRY,
    Features,
    has_types,
    num_shards,
    settings_fault,
    shard_images,
    shard_name,
    shard_records,
)
from libs.files import sha256_of
from utils import (
    UserError,
    config_differences,
    listed,
    make_directory,
    read_json,
    replacing,
    write_json,
)

PLAN = "plan.json"
_STATE = {**SHARD_ENTRY, "stand_ins": dict}


def _names_in(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


class ShardWriter:
    """Context in which one shard is written; it is there once `commit` has returned, else not."""

    def __init__(self, packing, number):
        self.packing, self.number = packing, number
        self.path = packing.folder / shard_name(number)
        self.temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")

    def __enter__(self):
        self.packing.forget(self.number)  # of another file, if the shard is made again
        self.file, self.digest, self.records = open(self.temporary, "wb"), hashlib.sha256(), 0
        return self

    def __exit__(self, *exception):
        self.file.close()
        self.temporary.unlink(missing_ok=True)

    def write(self, records):
        """Append records, float16 (n, 2C, h, w)."""
        shape = self.packing.settings["record_shape"]
        if records.dtype != np.float16 or records.shape[1:] != shape:
            raise ValueError(f"records {records.dtype} {records.shape}, expected float16 {shape}")
        data = np.ascontiguousarray(records, DTYPE).data.cast("B")
        self.file.write(data)
        self.digest.update(data)
        self.records += len(records)

    def commit(self, stand_ins):
        """Finish the shard. stand_ins: {image: the image that was read in its place}."""
        expected = shard_records(self.packing.settings, self.number)
        if self.records != expected:
            raise ValueError(f"{self.records} records in shard {self.number}, expected {expected}")
        self.file.flush()
        os.fsync(self.file.fileno())  # or a loss of power could leave its name and not its data
        size = self.file.tell()
        self.file.close()
        os.replace(self.temporary, self.path)
        self.packing.write_state(
            self.number,
            {"file": self.path.name, "records": self.records, "bytes": size,
             "sha256": self.digest.hexdigest(), "stand_ins": stand_ins},
        )  # fmt: skip


class Packing:
    """A folder of latents that is being made, by any number of processes, one shard at a time.

    settings: the dict of `make_settings`. A shard is finished once its state, a small file in
    PROGRESS, is there; one process calls `begin` before and `finish` after everything else.
    """

    def __init__(self, folder, settings):
        self.folder, self.settings = Path(folder), settings
        self.num_shards = num_shards(settings)

    def images(self, number):
        """The images of a shard, a range."""
        return shard_images(self.settings, number)

    def _state_path(self, number):
        return self.folder / PROGRESS / f"{number:05}.json"

    def write_state(self, number, state):
        """Note that a shard is finished, or {'unreadable': {file: reason}}."""
        write_json(self._state_path(number), state)

    def forget(self, number):
        """Remove what `write_state` wrote."""
        self._state_path(number).unlink(missing_ok=True)

    def _can_stand_in(self, number, stand_ins):
        """Whether all are images of the shard, by name, and images that there are."""
        known = stand_ins.keys() <= set(map(str, self.images(number)))
        every, sources = range(self.settings["num_images"]), stand_ins.values()
        return known and all(type(source) is int and source in every for source in sources)

    def state(self, number):
        """What `write_state` wrote; None if there is none, or its shard has another size."""
        path, expected = self._state_path(number), shard_records(self.settings, number)
        if not path.is_file():
            return None
        with contextlib.suppress(UserError, OSError):  # a file cut short by a loss of power
            state = read_json(path)
            shard = self.folder / shard_name(number)
            if has_types(state, {"unreadable": dict}):
                return state
            if not has_types(state, _STATE) or not self._can_stand_in(number, state["stand_ins"]):
                return None
            if state["records"] == expected:
                return state if os.lstat(shard).st_size == state["bytes"] else None
        return None

    def check(self):
        """UserError if the folder holds something else, or latents begun with other settings.

        Returns the file that said with which, None for a new folder. Nothing is written.
        """
        files = (self.folder / MANIFEST, self.folder / PROGRESS / PLAN)
        begun = next((path for path in files if path.is_file()), None)
        if begun:
            self._check_same(read_json(begun))
        elif others := [name for name in _names_in(self.folder) if name not in (".lock", PROGRESS)]:
            raise UserError(
                f"{self.folder} holds {listed(others)}, but no latents of ours: give another folder"
            )
        return begun

    def _check_same(self, begun):
        old = {key: begun.get(key) for key in SETTINGS} if isinstance(begun, dict) else {}
        changes = config_differences(old, self.settings)
        if any(line.startswith("images_sha256") for line in changes):
            of_the_list = ("images_sha256", "class_names", "num_images")
            changes = [line for line in changes if not line.startswith(of_the_list)]
            counts = f"{old.get('num_images')} then, {self.settings['num_images']} now"
            changes.append(f"other image files or classes ({counts})")
        if changes:
            raise UserError(
                f"{self.folder} holds latents begun with other settings, {'; '.join(changes)}: "
                "give another folder, or the former settings"
            )

    def begin(self):
        """`check`, then prepare the folder. Returns whether the latents are complete already."""
        if self.check() == self.folder / MANIFEST:
            with contextlib.suppress(UserError):
                Features(self.folder)
                return True
        make_directory(self.folder / PROGRESS)
        write_json(self.folder / PROGRESS / PLAN, self.settings)
        (self.folder / MANIFEST).unlink(missing_ok=True)
        for folder in (self.folder, self.folder / PROGRESS):
            for leftover in folder.glob(".*.tmp"):  # of a run that was killed
                leftover.unlink()
        for number in range(self.num_shards):
            if "unreadable" in (self.state(number) or {}):
                self.forget(number)
        return False

    def missing(self):
        """Numbers of the shards that are not finished."""
        return [number for number in range(self.num_shards) if self.state(number) is None]

    def finish(self, labels):
        """Write labels (num_images,) or None, then the manifest; every shard must be finished."""
        shards = [dict(self.state(number)) for number in range(self.num_shards)]
        stand_ins = {}
        for shard in shards:
            stand_ins.update(shard.pop("stand_ins"))
        entry = None
        if labels is not None:
            labels = labels.copy()
            for image, source in stand_ins.items():
                labels[int(image)] = labels[source]
            with replacing(self.folder / LABELS) as temporary:
                labels.astype("<i8").tofile(temporary)
                entry = {"file": LABELS, "bytes": 8 * len(labels), "sha256": sha256_of(temporary)}
        results = {"labels": entry, "stand_ins": stand_ins, "shards": shards}
        write_json(self.folder / MANIFEST, {**self.settings, **results})


def make_settings(**settings):
    """The settings of an extraction, all of them; see SETTINGS."""
    settings = {"format": FORMAT, "dtype": "float16", **settings}
    fault = settings_fault(settings)
    if fault or settings.keys() != SETTINGS.keys():
        raise ValueError(f"settings of latents: {fault or sorted(settings)}")
    return settings
