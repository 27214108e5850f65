"""Tensors from files, without running code from them, and into modules, strictly."""

import hashlib
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from utils import UserError, read_json

USE_ANOTHER = "use another checkpoint"


def weights_file(path):
    """The file to evaluate at `path`: of a `<step>.ckpt` directory the averaged weights."""
    path = Path(path)
    return path / "nnet_ema.safetensors" if path.is_dir() else path


def sha256_of(path):
    """Hexadecimal SHA-256 of a file of any size."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def check_manifest(path):
    """UserError where the manifest of the checkpoint that holds the file `path` has another hash.

    A file without a manifest beside it, such as one that was copied alone, passes.
    """
    manifest = path.with_name("manifest.json")
    entries = read_json(manifest).get("files", {}) if manifest.is_file() else {}
    if path.name in entries and sha256_of(path) != entries[path.name]["sha256"]:
        raise UserError(
            f"{path} is damaged: its SHA-256 is not the one in manifest.json; use another "
            "checkpoint"
        )


def read_safetensors(path):
    """name -> CPU tensor of a .safetensors file; UserError if it is damaged or none."""
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is damaged or no safetensors file ({error}); {USE_ANOTHER}"
        ) from error


def read_torch(path):
    """What torch.save wrote, tensors on the CPU; UserError if it is damaged, or holds pickled code,
    which is never run.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        with open(path, "rb") as file:
            if file.read(1) not in (b"P", b"\x80"):  # neither a zip archive nor a pickle
                raise UserError(f"{path} is damaged or no torch file; {USE_ANOTHER}") from error
        raise UserError(
            f"{path} contains pickled code or objects, which are never executed; only plain "
            "tensors and values are read, so use a "
            "checkpoint from a source you trust"
        ) from error
    except (
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
    ) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")
        raise UserError(f"{path} is damaged or no torch file ({reason}); {USE_ANOTHER}") from error


def listed(names):
    """The first three names, and how many more."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def load_strict(module, tensors, source):
    """Load `tensors` into `module`; every name and shape must match.

    Raises UserError naming `source` and the first few missing, unexpected or misshapen tensors; the
    module is unchanged then.
    """
    own = module.state_dict()
    shapes = [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    problems = {
        "missing": [name for name in own if name not in tensors],
        "unexpected": [name for name in tensors if name not in own],
        "of the wrong shape": shapes,
    }
    said = [f"{kind}: {listed(names)}" for kind, names in problems.items() if names]
    if said:
        raise UserError(
            f"the weights in {source} do not fit this network; {'; '.join(said)}; use the "
            "configuration that they were trained with"
        )
    module.load_state_dict(tensors)
