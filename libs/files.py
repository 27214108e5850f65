"""Tensors from files, without running code from them, and into modules, strictly."""

import hashlib
from pathlib import Path

from safetensors.torch import load_file

from libs import pickled, torch_files
from utils import UserError, listed, read_json

USE_ANOTHER = "use another checkpoint"


def weights_file(path):
    """The file to evaluate at `path`: of a `<step>.ckpt` directory the averaged weights, ours or an
    official nnet_ema.pth; of a .pth that is not there our .safetensors of the same name, which is
    what our runs write.
    """
    path = Path(path)
    if path.is_dir():
        own, official = path / "nnet_ema.safetensors", path / "nnet_ema.pth"
        return official if official.is_file() and not own.exists() else own
    ours = path.with_suffix(".safetensors")
    return ours if path.suffix == ".pth" and not path.exists() and ours.is_file() else path


def sha256_of(path):
    """Hexadecimal SHA-256 of a file of any size."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def manifest_of(folder):
    """{file name: {'size': int, 'sha256': str}} and the other entries of a checkpoint's
    manifest.json, as a dict; UserError if it is no such file.
    """
    path = Path(folder) / "manifest.json"
    manifest = read_json(path)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not all(
        isinstance(entry, dict) and type(entry.get("size")) is int
        and isinstance(entry.get("sha256"), str)
        for entry in files.values()
    ):  # fmt: skip
        raise UserError(f"{path} is damaged: it has no size and sha256 of files; {USE_ANOTHER}")
    return manifest


def check_manifest(path):
    """UserError where the manifest of the checkpoint that holds the file `path` has another hash.

    A file without a manifest beside it, such as one that was copied alone, passes.
    """
    if not path.with_name("manifest.json").is_file():
        return
    entry = manifest_of(path.parent)["files"].get(path.name)
    if entry and sha256_of(path) != entry["sha256"]:
        raise UserError(
            f"{path} is damaged: its SHA-256 is not the one in manifest.json; use another "
            "checkpoint"
        )


def read_safetensors(path):
    """name -> CPU tensor of a .safetensors file; UserError if it is damaged or none."""
    try:
        return load_file(path)
    except Exception as error:  # broken and hostile files raise several kinds
        raise UserError(
            f"{path} is damaged or no safetensors file ({error}); {USE_ANOTHER}"
        ) from error


def read_torch(path):
    """What torch.save wrote, tensors on the CPU; UserError if it is damaged, or asks for code to be
    run, which is never done.
    """
    try:
        return torch_files.load(path)
    except pickled.ForbiddenName as error:
        raise UserError(
            f"{path} contains pickled code or objects, which are never executed ({error}); only "
            "plain tensors and values are read, so use a checkpoint from a source you trust"
        ) from error
    except Exception as error:  # broken and hostile files raise almost any kind
        reason = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")
        raise UserError(f"{path} is damaged or no torch file ({reason}); {USE_ANOTHER}") from error


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
