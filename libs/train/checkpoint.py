"""Checkpoints: <directory>/<step>.ckpt/, whole or absent however a save ends.

A save writes the hidden directory .saving-<step>, its manifest (size and SHA-256 of each file)
last, and gives it the checkpoint's name. The next start finishes or removes what a killed save left
behind. One process at a time saves into a directory.
"""

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from libs.files import read_safetensors, read_torch, sha256_of
from utils import UserError, write_json

log = logging.getLogger("dim")


class Saved(NamedTuple):
    """What a checkpoint holds: weights and their average, CPU tensors by name, and the rest."""

    nnet: dict[str, torch.Tensor]
    ema: dict[str, torch.Tensor]
    training_state: dict


# ---------------------------------------------------------------------------------------------
# Saving


def saving_folder(directory, step):
    """Where the checkpoint of `step` is being written."""
    return Path(directory) / f".saving-{step}"


def _write_manifest(folder, step):
    """manifest.json, the last file: all others are on the disk then."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        entry = {"size": path.stat().st_size, "sha256": sha256_of(path)}
        files[path.relative_to(folder).as_posix()] = entry
    write_json(folder / "manifest.json", {"format": 1, "step": step, "files": files})


def _write_files(folder, nnet, ema, training_state, config):
    for name, tensors in ("nnet", nnet), ("nnet_ema", ema):
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        save_file(tensors, folder / f"{name}.safetensors")
    with (folder / "training.pt").open("wb") as file:
        torch.save(training_state, file)
    write_json(folder / "config.json", config)
    for path in folder.glob("*.safetensors"):  # that library's files are the owner's only
        path.chmod((folder / "config.json").stat().st_mode)


def _put_in_place(folder):
    """Give the whole checkpoint .saving-<step> its name; the one that had it goes."""
    target = folder.with_name(f"{folder.name.split('-')[1]}.ckpt")
    if target.exists():
        shutil.rmtree(target)
    folder.rename(target)
    return target


def _steps(directory):
    """The steps of everything with a checkpoint's name, in ascending order."""
    matches = (re.fullmatch(r"(\d+)\.ckpt", path.name) for path in directory.glob("*.ckpt"))
    return sorted(int(match[1]) for match in matches if match)


def _prune(directory, step, keep_last):
    """Of the checkpoints before `step`, keep the keep_last - 1 newest."""
    older = [old for old in _steps(directory) if old < step]
    for old in older[: max(0, len(older) - keep_last + 1)]:
        shutil.rmtree(directory / f"{old}.ckpt", ignore_errors=True)


def save(directory, step, *, nnet, ema, training_state, config, keep_last):
    """Save a checkpoint and return its path, directory/<step>.ckpt.

    nnet, ema: name -> tensor, any device and dtype. training_state: nested dicts and lists of
    tensors and plain values. config: a dict for JSON. keep_last: how many checkpoints to keep, this
    one included, or None for all; the oldest are deleted once this one is in place.

    UserError if the disk is full or cannot be written: earlier checkpoints are as they were.
    """
    directory, folder = Path(directory), saving_folder(directory, step)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_files(folder, nnet, ema, training_state, config)
        _write_manifest(folder, step)
        target = _put_in_place(folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        # torch makes a RuntimeError of an OSError
        reason = getattr(error.__context__ or error, "strerror", None) or error
        raise UserError(
            f"could not save checkpoint {directory / f'{step}.ckpt'}: {reason}; earlier "
            "checkpoints are as they were"
        ) from error
    if keep_last is not None:
        _prune(directory, step, keep_last)
    return target


# ---------------------------------------------------------------------------------------------
# Finding and loading


def clean(directory):
    """Finish the saves that were killed after their manifest, remove the others; only while nobody
    saves there.
    """
    for folder in directory.glob(".saving-*"):
        if (folder / "manifest.json").is_file():
            _put_in_place(folder)
        else:
            log.warning("removing %s: a save that did not finish", folder)
            shutil.rmtree(folder)


def verify(path):
    """Compare every byte of a checkpoint with its manifest; ValueError, or OSError for a missing
    file, names the first that differs.
    """
    for name, entry in json.loads((path / "manifest.json").read_text())["files"].items():
        if (path / name).stat().st_size != entry["size"]:
            raise ValueError(f"{name} does not have {entry['size']} bytes")
        if sha256_of(path / name) != entry["sha256"]:
            raise ValueError(f"the SHA-256 of {name} is another")


def find_latest(directory):
    """The newest checkpoint in `directory` that is whole, or None; the log names the others.

    Any other error of the system's, such as a file that may not be read, is raised: that checkpoint
    may be as good as it was.
    """
    for step in reversed(_steps(directory)):
        path = directory / f"{step}.ckpt"
        try:
            verify(path)
            return path
        except (ValueError, LookupError, TypeError, FileNotFoundError, NotADirectoryError) as error:
            log.warning("skipping checkpoint %s, which is damaged: %s", path, error)
    return None


def load(path):
    """Read a checkpoint, which `find_latest` has verified; no code in its files is run."""
    return Saved(
        read_safetensors(path / "nnet.safetensors"),
        read_safetensors(path / "nnet_ema.safetensors"),
        read_torch(path / "training.pt"),
    )
