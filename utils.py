"""What every module may need: errors, files, configs, the run directory, seeds, pictures."""

import contextlib
import errno
import fcntl
import functools
import hashlib
import inspect
import json
import logging
import math
import operator
import os
import re
import socket
from pathlib import Path

from ml_collections import config_dict

# A system is short of something, or its network is: another time the same file can be read.
PASSING_ERRORS = {
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE, errno.ENOMEM,
}  # fmt: skip


class UserError(ValueError):
    """A mistake of the user's: one sentence saying what is wrong and what to do, no traceback."""

    exit_code = 1


def listed(names):
    """The first three names, and how many more."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def look_up(table, name, key):
    """table[name]; UserError without that name. key: of the config, for the sentence."""
    if name not in table:
        raise UserError(f"{key} is {name!r}, expected one of {', '.join(table)}")
    return table[name]


def bind(function, section, /, *given, **keywords):
    """functools.partial; UserError for a keyword of this section of a config that does not fit."""
    signature = inspect.signature(function)
    try:
        signature.bind_partial(*given, **keywords)
    except TypeError as error:
        takes = f"{function.__name__} takes {signature}"
        raise UserError(f"config.{section}: {error}; {takes}") from None
    return functools.partial(function, *given, **keywords)


def make_directory(path) -> Path:
    """Make the directory `path` and its parents; UserError if that cannot be."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the directory {path}: {error.strerror}") from error
    return Path(path)


def file_to_write(path, name):
    """`path` as a Path, its directory made; UserError where it cannot be written. name: a flag."""
    path = Path(path)
    if path.is_dir() or not os.access(make_directory(path.parent), os.W_OK):
        raise UserError(f"cannot write the file {path}: give another {name}")
    return path


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path beside `path`; on success it takes the place of `path` atomically."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(*folders) -> None:
    """Remove what `replacing` left where a process was killed; only while nobody writes."""
    for folder in folders:
        for path in Path(folder).glob(".*.tmp"):
            path.unlink(missing_ok=True)


def write_json(path, value) -> None:
    """Write dicts, tuples, lists, strings and numbers (floats exactly) as JSON, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path):
    """Read what `write_json` wrote, arrays as tuples; UserError for a file that is no JSON."""
    try:
        return make_tuples(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def make_tuples(value):
    """`value`, whose lists at any depth are tuples."""
    if isinstance(value, dict):
        return {key: make_tuples(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(make_tuples(item) for item in value)
    return value


def flatten(config) -> dict:
    """{'train.batch_size': 64, ...} of a nested ConfigDict or dict, in its own order."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, (config_dict.ConfigDict, dict)):
            flat.update({f"{key}.{name}": leaf for name, leaf in flatten(value).items()})
        else:
            flat[key] = value
    return flat


def config_differences(old, new) -> list[str]:
    """Lines `train.batch_size: 64 -> 128` for what differs between two configs, or two dicts."""
    # Tuples and lists with the same entries are equal: JSON does not tell them apart.
    old, new = ({k: repr(make_tuples(v)) for k, v in flatten(c).items()} for c in (old, new))
    pairs = {key: (old.get(key, "absent"), new.get(key, "absent")) for key in [*old, *new]}
    return [f"{key}: {a} -> {b}" for key, (a, b) in pairs.items() if a != b]


def _make_file_name(text: str) -> str:
    """`text` as a file name; what had to be replaced or cut is told apart by a hash."""
    safe = re.sub(r"[^A-Za-z0-9._=+-]+", "_", text)
    if safe == text and len(safe) <= 255:
        return safe
    return f"{safe[:246]}-{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}"


def run_directory(config_path: str, overrides: dict, workdir: str | None) -> Path:
    """`workdir`, or as U-ViT has it workdir/<config name>/default, with overrides instead
    workdir/<config name>/optimizer.lr=0.001-train.batch_size=64: sorted and unambiguous.
    """
    if workdir:
        return Path(workdir)
    # A string with '=' or '-' in it could imitate another override: repr quotes it, which hashes.
    parts = [
        f"{key}={value if re.fullmatch('[A-Za-z0-9._+]*', str(value)) else repr(value)}"
        for key, value in sorted(overrides.items())
    ]
    path = Path(config_path)  # one run's config.json is told from another's by its folder
    name = _make_file_name(str(path.parent)) if path.suffix == ".json" else path.stem
    return Path("workdir") / name / _make_file_name("-".join(parts) or "default")


@contextlib.contextmanager
def locked(directory, flag="--workdir"):
    """A context that keeps a second run out of `directory`, by a lock of the operating system:
    kill -9 releases it at once, and forked data loader workers do not inherit it, as they would an
    flock. Take it on one rank only. UserError names the holder and `flag`, which chooses another
    directory.
    """
    with (make_directory(directory) / ".lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # POSIX allows EAGAIN and EACCES
            file.seek(0)
            holder = file.read() or "another process"
            text = f"{directory} is in use by {holder}; wait for it, or give another {flag}"
            raise UserError(text) from None
        except OSError as error:  # some cluster file systems have no locks
            logging.getLogger("dim").warning("cannot lock %s: %s", directory, error.strerror)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def write_run_files(directory, config, environment: dict) -> list[str]:
    """Write config.json and environment.json into `directory`; returns lines saying what differs
    from the files that were there, none for a new run.
    """
    changes = []
    for name, value in ("config", config.to_dict()), ("environment", environment):
        path = Path(directory) / f"{name}.json"
        if path.exists():
            changes += [f"{name}: {line}" for line in config_differences(read_json(path), value)]
        write_json(path, value)
    return changes


def derive_seed(*keys: int | str) -> int:
    """A seed in [0, 2^63) from integers and strings, the same on every platform and process."""
    exact = [key if isinstance(key, str) else operator.index(key) for key in keys]
    digest = hashlib.blake2b(json.dumps(exact).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def to_uint8(images):
    """Images, float in [0, 1] (clamped) or uint8, as files hold them, on the CPU."""
    images = images.detach().cpu()
    if images.is_floating_point():
        images = images.float().clamp(0, 1).mul(255).round().byte()
    return images


def save_png(path, image) -> None:
    """Save an image, (C, H, W) with C 1 or 3, float in [0, 1] (clamped) or uint8, atomically."""
    from PIL import Image
    pixels = to_uint8(image).permute(1, 2, 0).squeeze(-1)
    with replacing(path) as temporary:
        Image.fromarray(pixels.contiguous().numpy()).save(temporary, format="PNG")


def save_grid(path, images, nrow: int) -> None:
    """Save images (B, C, H, W), float in [0, 1] or uint8, as a grid with `nrow` a row, small images
    enlarged by a whole factor (nearest pixel) to a grid of 600 pixels or more.
    """
    from torchvision.utils import make_grid
    nrow = min(nrow, images.shape[0])
    scale = max(1, math.ceil(600 / (nrow * images.shape[-1])))
    large = to_uint8(images).repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    save_png(path, make_grid(large, nrow=nrow))
