"""Checkpoints: <directory>/<step>.ckpt/, whole or absent however a save ends.

A save writes the hidden directory .saving-<step>, its manifest (size and SHA-256 of each file)
last, and gives it the checkpoint's name. The next start finishes or removes what a killed save left
behind. One process at a time saves into a directory.
"""

import json
import logging
import os
import shutil

import torch
from accelerate.utils import send_to_device
from safetensors import SafetensorError
from safetensors.torch import save_file

from libs.files import hash_file
from utils import UserError, write_json

log = logging.getLogger("dim")

SAVING = ".saving-{}"  # the folder of a step's checkpoint while it is being written


def _write(folder, step, weights, training_state, config):
    """All files, manifest.json last, and all of them onto the disk."""
    for name, tensors in weights.items():
        path = folder / f"{name}.safetensors"
        save_file({key: x.detach().cpu().contiguous() for key, x in tensors.items()}, path)
        path.chmod(folder.stat().st_mode & 0o666)  # safetensors makes files for the owner alone
    with (folder / "training.pt").open("wb") as file:
        torch.save(send_to_device(training_state, "cpu"), file)
    write_json(folder / "config.json", config)
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        entry = {"size": path.stat().st_size, "sha256": hash_file(path)}
        files[path.relative_to(folder).as_posix()] = entry
    write_json(folder / "manifest.json", {"format": 1, "step": step, "files": files})
    for name in (*files, "manifest.json"):
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())


def _put_in_place(folder):
    """Give the whole checkpoint .saving-<step> its name; the one that had it goes."""
    target = folder.with_name(f"{folder.name.split('-')[1]}.ckpt")
    if target.exists():
        shutil.rmtree(target)
    return folder.rename(target)


def _get_steps(directory):
    """The steps of all checkpoints by their names, in ascending order."""
    return sorted(int(path.stem) for path in directory.glob("*.ckpt") if path.stem.isdigit())


def save(directory, step, *, weights, training_state, config, keep_last, best=None):
    """Save a checkpoint and return its path, directory/<step>.ckpt.

    weights: file -> name -> tensor, any device and dtype. training_state: nested dicts and lists of
    tensors and plain values. config: a dict for JSON. keep_last: how many checkpoints to keep, this
    one included, or None for all; best: a step whose checkpoint stays, too. UserError if the disk
    is full or cannot be written.
    """
    folder = directory / SAVING.format(step)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder, step, weights, training_state, config)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        # torch makes a RuntimeError of an OSError
        reason = getattr(error.__context__ or error, "strerror", None) or error
        raise UserError(
            f"could not save checkpoint {directory / f'{step}.ckpt'}: {reason}; earlier "
            "checkpoints are as they were"
        ) from error
    target = _put_in_place(folder)
    older = [old for old in _get_steps(directory) if old < step and old != best]
    for old in older[: max(0, len(older) + 1 - (keep_last or len(older) + 1))]:
        shutil.rmtree(directory / f"{old}.ckpt", ignore_errors=True)
    return target


def find_best(metrics):
    """The step of the best FID in a metrics.jsonl; None without one."""
    lines = metrics.read_text().splitlines() if metrics.exists() else ()
    lines = (json.loads(line) for line in lines if '"frechet_distance"' in line)  # of 50,000, few
    found = [(line["frechet_distance"], line["step"]) for line in lines]
    return min((pair for pair in found if isinstance(pair[0], float)), default=(0, None))[1]


def clean(directory):
    """Finish the saves that were killed after their manifest, remove the others; only while nobody
    saves there.
    """
    for folder in directory.glob(".saving-*"):
        if (folder / "manifest.json").is_file():
            _put_in_place(folder)
        else:
            shutil.rmtree(folder)


def find_latest(directory):
    """The newest checkpoint in `directory` whose every byte is as its manifest says, or None; the
    log names the damaged ones. A file that may not be read is an OSError: it may be good.
    """
    for step in reversed(_get_steps(directory)):
        path = directory / f"{step}.ckpt"
        try:
            files = json.loads((path / "manifest.json").read_text())["files"]
            for name, entry in files.items():
                found = (path / name).stat().st_size, hash_file(path / name)
                if found != (entry["size"], entry["sha256"]):
                    raise ValueError(f"size or SHA-256 of {name} is another")
            return path
        except (ValueError, LookupError, TypeError, FileNotFoundError, NotADirectoryError) as error:
            log.warning("skipping checkpoint %s, which is damaged: %s", path, error)
    return None
