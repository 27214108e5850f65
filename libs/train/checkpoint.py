"""Checkpoints: <directory>/<step>.ckpt/, whole or absent however a save ends.

A save writes a hidden directory beside its target, syncs it to disk and renames it; the manifest
(size and SHA-256 of each file) is written last. What a dead save left behind never has the name
of a checkpoint and is removed by the next save.
"""

import contextlib
import dataclasses
import errno
import logging
import os
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from libs.files import read_safetensors, read_torch, sha256_of
from utils import PASSING_ERRORS, UserError, read_json, write_json

FORMAT = 1
_FILES = ("nnet.safetensors", "nnet_ema.safetensors", "training.pt", "config.json")
_LOGGER = logging.getLogger("dim")

# A disk or its rights that say no, which is not the file's fault.
_UNREADABLE = PASSING_ERRORS | {errno.EACCES, errno.EPERM}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What `load` reads: CPU tensors by name, and plain values."""

    step: int
    nnet: dict[str, torch.Tensor]
    ema: dict[str, torch.Tensor]
    training_state: dict
    config: dict


# ---------------------------------------------------------------------------------------------
# What is written

def _plain(value, where: str):
    """A copy of a state with tensors on the CPU; TypeError for what weights_only cannot read.

    Better refused at the first save than at the first resume.
    """
    if isinstance(value, torch.Tensor):
        # clone: torch.save writes the whole storage of a view
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {_plain(key, f"a key of {where}"): _plain(item, f"{where}[{key!r}]")
                for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(item, f"{where}[{i}]") for i, item in enumerate(value))
    if value is None or type(value) in (int, float, bool, str, bytes):
        return value
    raise TypeError(f"{where} is a {type(value).__name__}: a checkpoint holds tensors, dicts, "
                    "lists, tuples, numbers and strings only")


def _weights(tensors: dict) -> dict:
    """The tensors on the CPU, contiguous, each in memory of its own, as safetensors wants them."""
    seen, result = set(), {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        result[name] = value.clone() if storage in seen else value
        seen.add(storage)
    return result


def _sync(path: Path) -> None:
    """Flush a file or directory to the disk; a rename is durable once its directory is."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open directories
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or path.is_file():  # some network file systems cannot
            raise                                          # sync a directory
    finally:
        os.close(descriptor)


def _save_training_state(state: dict, path: Path) -> None:
    """torch.save; a failed write is an OSError (torch's zip writer makes it a RuntimeError)."""
    with path.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            cause = error.__context__
            raise (cause if isinstance(cause, OSError) else OSError(str(error))) from None


def _write_files(folder: Path, step, nnet, ema, training_state, config) -> None:
    save_file(_weights(nnet), folder / "nnet.safetensors")
    save_file(_weights(ema), folder / "nnet_ema.safetensors")
    _save_training_state(training_state, folder / "training.pt")
    write_json(folder / "config.json", config)
    for name in ("nnet.safetensors", "nnet_ema.safetensors"):  # safetensors' are the owner's only
        (folder / name).chmod((folder / "config.json").stat().st_mode)
    for name in _FILES:
        _sync(folder / name)
    entries = {name: {"size": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
               for name in _FILES}
    write_json(folder / "manifest.json", {"format": FORMAT, "step": step, "files": entries})
    _sync(folder / "manifest.json")
    _sync(folder)


# ---------------------------------------------------------------------------------------------
# Directories. `.saving-5-<pid>` is being written, `.removing-5` being deleted, and `.replaced-5`
# is the old checkpoint of step 5 for the instant in which a new one takes its place.

def _steps(directory: Path) -> dict[int, Path]:
    """step -> path of everything with a checkpoint's name, or replaced and not yet succeeded."""
    found = {}
    for pattern in (r"\.replaced-(\d+)", r"(\d+)\.ckpt"):  # the later one wins
        found.update({int(match[1]): path for path in directory.iterdir()
                      if (match := re.fullmatch(pattern, path.name))})
    return found


def _discard(path: Path, step: int) -> None:
    """Delete a checkpoint; a kill half-way leaves nothing with a checkpoint's name."""
    doomed = path.with_name(f".removing-{step}")
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def clean(directory: Path) -> None:
    """Finish or undo what a save that died left behind; only while nobody else saves there."""
    for path in directory.iterdir() if directory.is_dir() else ():
        if re.match(r"\.(saving|removing)-\d+", path.name):
            shutil.rmtree(path, ignore_errors=True)
        elif match := re.fullmatch(r"\.replaced-(\d+)", path.name):
            target = directory / f"{match[1]}.ckpt"
            if target.exists():
                shutil.rmtree(path)
            else:
                path.rename(target)


def _put_in_place(temporary: Path, target: Path, step: int) -> None:
    replaced = target.with_name(f".replaced-{step}")
    if target.exists():
        target.rename(replaced)
    temporary.rename(target)
    _sync(target.parent)
    if replaced.exists():
        _discard(replaced, step)


def _keep(directory: Path, step: int, keep_last: int) -> None:
    """Of the checkpoints before `step`, keep the keep_last - 1 newest."""
    older = sorted((old, path) for old, path in _steps(directory).items() if old < step)
    for old, path in older[:max(0, len(older) - keep_last + 1)]:
        try:
            _discard(path, old)
        except OSError as error:  # the new one is safe: no reason to stop
            _LOGGER.warning("could not delete the old checkpoint %s: %s", path, error)


# ---------------------------------------------------------------------------------------------
# Saving

def save(directory, step: int, *, nnet: dict, ema: dict, training_state: dict, config: dict,
         keep_last: int | None) -> Path:
    """Save a checkpoint and return its path, directory/<step>.ckpt.

    nnet, ema: name -> tensor, any device, layout and dtype. training_state: nested dicts and
    lists of tensors and plain values (TypeError otherwise). config: a dict for JSON.
    keep_last: how many checkpoints to keep, this one included, or None for all of them; older
    ones are deleted once this one is in place.

    Raises UserError if the disk is full or cannot be written: nothing of the failed save remains
    and earlier checkpoints are as they were. One process at a time saves into a directory.
    """
    directory = Path(directory)
    target, temporary = directory / f"{step}.ckpt", directory / f".saving-{step}-{os.getpid()}"
    training_state = _plain(training_state, "training_state")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        clean(directory)
        temporary.mkdir()
        _write_files(temporary, step, nnet, ema, training_state, config)
        _put_in_place(temporary, target, step)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"could not save checkpoint {target}: {reason}; "
                        f"{_still_good(directory)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if keep_last is not None:
        _keep(directory, step, keep_last)
    return target


def _still_good(directory: Path) -> str:
    with contextlib.suppress(OSError, UserError):
        if found := latest(directory, report=lambda line: None):
            return f"the last good checkpoint is {found[0]}"
    return "there is no earlier checkpoint"


# ---------------------------------------------------------------------------------------------
# Checking

def _is(kind, path: Path) -> bool:
    """Whether `path` is there and of a kind, stat.S_ISREG or S_ISDIR; OSError where the system does
    not say, which pathlib takes for no from Python 3.14 on.
    """
    try:
        return kind(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _read_manifest(folder):
    """manifest.json: 'files', name -> {'size': int, 'sha256': str}, and other entries."""
    path = folder / "manifest.json"
    manifest = read_json(path)
    try:
        for entry in manifest["files"].values():
            int(entry["size"]), bytes.fromhex(entry["sha256"])
    except Exception as error:
        raise UserError(f"{path} is damaged: it has no size and sha256 of files") from error
    return manifest


def _check_file(path: Path, entry: dict) -> None:
    if not _is(stat.S_ISREG, path):
        raise UserError(f"{path} is missing")
    if path.stat().st_size != entry["size"]:
        raise UserError(f"{path} has {path.stat().st_size} bytes instead of {entry['size']}")
    if sha256_of(path) != entry["sha256"]:
        raise UserError(f"{path} is damaged: its SHA-256 is not the one in manifest.json")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                file.keys()
        except SafetensorError as error:
            raise UserError(f"{path} is not a safetensors file: {error}") from error


def verify(path) -> int:
    """Check the checkpoint directory `path` against its manifest and return its step.

    Reads every byte. Raises UserError naming the file and what is wrong with it.
    """
    path = Path(path)
    if not _is(stat.S_ISDIR, path):
        raise UserError(f"{path} is not a checkpoint directory")
    if not _is(stat.S_ISREG, path / "manifest.json"):
        raise UserError(f"{path} has no manifest.json: it was not saved to the end")
    manifest = _read_manifest(path)
    version, step, files = manifest.get("format"), manifest.get("step"), manifest["files"]
    if version != FORMAT:
        raise UserError(f"{path} has checkpoint format {version}; this version of DiM reads "
                        f"format {FORMAT}")
    if type(step) is not int or not set(_FILES) <= files.keys():
        raise UserError(f"{path / 'manifest.json'} is damaged: it has no step, or not all of "
                        f"{', '.join(_FILES)}")
    for name in _FILES:
        _check_file(path / name, files[name])
    return step


def latest(directory, report: Callable[[str], None] = _LOGGER.warning):
    """(path, step) of the newest checkpoint in `directory` that verifies, or None.

    Each one that does not, and each unfinished save, is named to `report` with the reason.
    UserError for one that the system does not let us read: it may be as good as it was.
    """
    directory = Path(directory)
    if not directory.is_dir():
        return None
    for unfinished in sorted(directory.glob(".saving-*")):
        report(f"ignoring {unfinished}: a save that did not finish")
    for step, path in sorted(_steps(directory).items(), reverse=True):
        try:
            verify(path)
            return path, step
        except (UserError, OSError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            if isinstance(cause, OSError) and cause.errno in _UNREADABLE:
                raise UserError(
                    f"cannot read checkpoint {path} ({cause.strerror}): mend that, or move it away "
                    "to go on from the one before it"
                ) from error
            report(f"skipping checkpoint {path}: {error}")
    return None


# ---------------------------------------------------------------------------------------------
# Loading

def load(path) -> Checkpoint:
    """Verify and read a checkpoint directory; tensors on the CPU, in the dtypes they were saved in.

    Pickled code is never executed. Raises UserError if the checkpoint is missing or damaged.
    """
    path = Path(path)
    step = verify(path)
    saved = Checkpoint(step=step, nnet=read_safetensors(path / "nnet.safetensors"),
                       ema=read_safetensors(path / "nnet_ema.safetensors"),
                       training_state=read_torch(path / "training.pt"),
                       config=read_json(path / "config.json"))
    for name, value in ("training.pt", saved.training_state), ("config.json", saved.config):
        if not isinstance(value, dict):
            raise UserError(f"{path / name} is damaged: it holds no entries by name")
    return saved
