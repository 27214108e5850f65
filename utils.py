"""What every module may need: errors, files, the run directory, seeds, pictures, the launcher.

Layer 0: imports nothing of ours, nor accelerate; torch and Pillow where they are used.
"""

import contextlib
import errno
import glob
import hashlib
import json
import logging
import math
import operator
import os
import re
import socket
import sys
import tempfile
from pathlib import Path

from ml_collections import config_dict

# Threads of torch's CPU operators sleep between them instead of spinning. It costs nothing on idle
# cores; where others compute beside us, spinning made a training step of the digits config 9 times
# as slow (700 instead of 78 ms on two busy cores). libgomp reads this when torch is imported, so
# scripts import this module before torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


class UserError(ValueError):
    """A mistake of the user's: one sentence saying what is wrong and what to do, no traceback."""

    exit_code = 1

    def __init__(self, text=""):
        # Out of a DataLoader's worker, torch makes the exception anew from its traceback as text.
        # Any other text is left alone: a file may hold this name to hide its own from the sentence.
        if text.startswith("Caught "):
            text = text.rsplit(f"\n{type(self).__module__}.{type(self).__name__}: ", 1)[-1]
        super().__init__(text.strip())


# ---------------------------------------------------------------------------------------------
# Files

def look_up(table, name, key):
    """table[name], of things registered by name; key: of the config, for the sentence.

    Raises:
        UserError: the table has no such name.
    """
    if name not in table:
        raise UserError(f"{key} is {name!r}, expected one of {', '.join(table)}")
    return table[name]


def make_directory(path) -> Path:
    """Make the directory `path` and its parents; UserError if that cannot be."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the directory {path}: {error.strerror}") from error
    return Path(path)


def listed(names):
    """The first three names, and how many more."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# What a system says when it is short of something or its network is: another time the same file
# can be read.
PASSING_ERRORS = {
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE, errno.ENOMEM,
}  # fmt: skip


def require_place(path) -> None:
    """UserError unless a picture can be put at `path`: a .png, in a directory that is there."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a directory")
    if path.suffix.lower() != ".png":
        raise UserError(f"cannot write {path}: pictures are PNG files, so give it the suffix .png")
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: No such file or directory as {path.parent}")


def file_to_write(path, name):
    """`path` as a Path, its directory made; UserError for a directory, and where no file can be
    made, now and not after hours. name: of the flag.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a directory: {name} is the file to write")
    make_directory(path.parent)
    try:
        with tempfile.NamedTemporaryFile(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent):
            return path
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): give another {name}") from error


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path beside `path`; on success it takes the place of `path` atomically."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:  # of a write, it does not say where
        if error.errno is not None:
            error.filename = error.filename or str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(*folders, name=None) -> None:
    """Remove what `replacing` left behind where a process was killed, of files called `name` or of
    all; only while nobody writes those.
    """
    for folder in folders:
        for path in Path(folder).glob(f".{glob.escape(name) if name else '*'}.*.tmp"):
            if re.fullmatch(r"\..+\.\d+\.tmp", path.name):
                path.unlink(missing_ok=True)


def write_json(path, value) -> None:
    """Write dicts, tuples, lists, strings and numbers (floats exactly) as JSON, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


MAX_JSON_BYTES = 1 << 24  # a manifest of 80,000 shards; in memory, up to 60 times as much


def read_json(path):
    """Read what `write_json` wrote; every JSON array comes back as a tuple.

    Raises UserError for a file that is missing, is not JSON or has over MAX_JSON_BYTES.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if len(text) > MAX_JSON_BYTES:
        raise UserError(f"{path} is no file of ours: it has over {MAX_JSON_BYTES >> 20} MiB")
    try:
        return _tuples(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error


def _tuples(value):
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(_tuples(item) for item in value)
    return value


# ---------------------------------------------------------------------------------------------
# Configs

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
    """Lines `train.batch_size: 64 -> 128` for what differs between two configs, or two dicts.

    Tuples and lists with the same entries are equal: JSON does not tell them apart.
    """
    old, new = flatten(old), flatten(new)

    def shown(flat, key):
        return repr(_tuples(flat[key])) if key in flat else "absent"

    keys = list(old) + [key for key in new if key not in old]
    return [f"{key}: {shown(old, key)} -> {shown(new, key)}"
            for key in keys if shown(old, key) != shown(new, key)]


# ---------------------------------------------------------------------------------------------
# The run directory

def _file_name(text: str) -> str:
    """`text` as a file name; what had to be replaced or cut is told apart by a hash."""
    safe = re.sub(r"[^A-Za-z0-9._=+-]+", "_", text)
    if safe == text and len(safe) <= 255:
        return safe
    return f"{safe[:246]}-{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}"


def run_directory(config_path: str, overrides: dict, workdir: str | None) -> Path:
    """`workdir`, or workdir/<config name>/<overrides>, the convention of U-ViT.

    The last part is 'default' without overrides, else 'optimizer.lr=0.001-train.batch_size=64':
    sorted, and different for different overrides.
    """
    if workdir:
        return Path(workdir)
    # A string with '=' or '-' in it could imitate another override: repr quotes it, which hashes.
    parts = [f"{key}={value if re.fullmatch('[A-Za-z0-9._+]*', str(value)) else repr(value)}"
             for key, value in sorted(overrides.items())]
    return Path("workdir") / Path(config_path).stem / _file_name("-".join(parts) or "default")


class RunLock:
    """Keeps a second run out of `directory` until `release` or the death of this process.

    The lock is the operating system's and belongs to the process: kill -9 releases it at once,
    and forked data loader workers do not inherit it (an flock they would keep alive).
    Raises UserError naming the holder's process id and host, and `flag`, which chooses another
    directory. Take it on one rank only.
    """

    def __init__(self, directory, flag="--workdir"):
        path = make_directory(directory) / ".lock"
        try:
            self._file = path.open("a+", encoding="utf-8")  # "a+" keeps the holder's text
        except OSError as error:
            raise UserError(f"cannot write into {directory}: {error.strerror}") from error
        try:
            _lock(self._file)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read() or "another process"
            self._file.close()
            raise UserError(f"{directory} is in use by {holder}; wait for it, stop it, or give "
                            f"another {flag}") from None
        try:
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
            self._file.flush()
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error

    def release(self) -> None:
        self._file.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.release()


def write_run_files(directory, config, environment: dict) -> list[str]:
    """Write config.json and environment.json (from `libs.runtime.logs.environment`) into
    `directory`.

    Returns lines saying what differs from the files that were there; none for a new run.
    """
    changes = []
    for name, value in ("config", config.to_dict()), ("environment", environment):
        path = Path(directory) / f"{name}.json"
        if path.exists():
            try:
                differences = config_differences(read_json(path), value)
            except (UserError, AttributeError) as error:  # no reason not to train
                differences = [f"it was damaged ({error}) and is written anew"]
            changes += [f"{name}: {line}" for line in differences]
        write_json(path, value)
    return changes


def _lock(file) -> None:
    """Lock `file` for this process; BlockingIOError if another holds it."""
    if sys.platform == "win32":
        import msvcrt
        file.seek(1 << 30)  # a locked byte cannot be read on Windows: lock one beyond the text
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError as error:
            raise BlockingIOError from error
        return
    import fcntl
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:  # POSIX allows EAGAIN and EACCES
        raise BlockingIOError from error
    except OSError as error:  # some cluster file systems have no locks: better unlocked than not
        logging.getLogger("dim").warning("cannot lock %s (%s): make sure that no second run uses "
                                         "this directory", file.name, error.strerror)


# ---------------------------------------------------------------------------------------------
# Seeds

def derive_seed(*keys: int | str) -> int:
    """A seed in [0, 2^63) from integers and strings, the same on every platform and process.

    Draws keyed by (seed, 'noise', step, position) are independent of rank and batch layout.
    """
    exact = [key if isinstance(key, str) else operator.index(key) for key in keys]
    digest = hashlib.blake2b(json.dumps(exact).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


# ---------------------------------------------------------------------------------------------
# Pictures

def _to_uint8(images):
    import torch
    if images.dtype == torch.uint8:
        return images.detach().cpu()
    return images.detach().cpu().float().clamp(0, 1).mul(255).round().to(torch.uint8)


def save_png(path, image) -> None:
    """Save one image, (C, H, W) with C 1 or 3, float in [0, 1] (clamped) or uint8, atomically.

    Raises UserError if the file cannot be written.
    """
    from PIL import Image
    pixels = _to_uint8(image)
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3):
        raise ValueError(f"expected an image (1 or 3, H, W), got {tuple(image.shape)}")
    pixels = pixels[0] if pixels.shape[0] == 1 else pixels.permute(1, 2, 0)
    try:
        with replacing(path) as temporary:
            Image.fromarray(pixels.contiguous().numpy()).save(temporary, format="PNG")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def save_grid(path, images, nrow: int) -> None:
    """Save images (B, C, H, W), float in [0, 1] or uint8, as a grid with `nrow` a row.

    Small images are enlarged by a whole factor (nearest pixel) to a grid of 600 pixels or more.
    """
    from torchvision.utils import make_grid
    nrow = min(nrow, images.shape[0])
    scale = max(1, math.ceil(600 / (nrow * images.shape[-1])))
    large = _to_uint8(images).repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    save_png(path, make_grid(large, nrow=nrow))


# ---------------------------------------------------------------------------------------------
# Launchers

def set_cpu_if_no_gpu() -> None:
    """Where no GPU is visible, tell accelerate to use the CPU; call before any accelerate object.

    Without it, accelerate 1.x started by `accelerate launch --multi_gpu` or torchrun on a machine
    with no GPU makes every process a run of its own. Only `Accelerator` reads the variable:
    a `PartialState` made first does not.
    """
    import torch
    if not torch.cuda.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"


def check_launcher() -> None:
    """Raise UserError for a WORLD_SIZE that no launcher set, before accelerate waits for others."""
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR") if name not in os.environ]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and missing:
        raise UserError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} is not set: unset "
            "WORLD_SIZE for one process, or start with accelerate launch --multi_gpu"
        )


def check_world_size(num_processes: int) -> None:
    """Raise UserError unless accelerate's `num_processes` is what the launcher was asked for."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != num_processes:
        raise UserError(f"the launcher started {launched} processes, but accelerate sees "
                        f"{num_processes}: each would train alone; check the launch command")
    # Asked for several processes without --multi_gpu, `accelerate launch` starts one, with a
    # rendezvous address (prepare_simple_launcher_cmd_env of accelerate 1.x).
    alone = "ACCELERATE_MIXED_PRECISION" in os.environ and "WORLD_SIZE" not in os.environ
    if alone and "MASTER_PORT" in os.environ and "MASTER_PORT" not in _launcher_environment():
        raise UserError("accelerate launch was asked for several processes but started one: add "
                        "--multi_gpu (it works without a GPU too), or use --num_processes 1")


def _launcher_environment() -> dict:
    import psutil
    try:
        return psutil.Process(os.getppid()).environ()
    except psutil.Error:
        return {"MASTER_PORT": ""}  # not to be known: assume that the user exported it
