"""Tensors and arrays out of files, without running code from them, and into modules, strictly."""

import contextlib
import gzip
import hashlib
import os
import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from utils import PASSING_ERRORS, UserError, listed


def weights_file(path):
    """The file to evaluate at `path`: of a `<step>.ckpt` directory the averaged weights, ours or an
    official nnet_ema.pth; of a .pth that is not there our .safetensors of the same name.
    """
    path = Path(path)
    if path.is_dir():
        own, official = path / "nnet_ema.safetensors", path / "nnet_ema.pth"
        return official if official.is_file() and not own.exists() else own
    ours = path.with_suffix(".safetensors")
    return ours if path.suffix == ".pth" and not path.exists() and ours.is_file() else path


def hash_file(path):
    """Hexadecimal SHA-256 of a file of any size."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


# In names of tensors: of DistributedDataParallel, torch.compile, FSDP, activation checkpointing.
_WRAPPERS = r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."


@contextlib.contextmanager
def reading(path, kind):
    """UserError that names the file, for what libraries raise for broken files: almost any kind."""
    try:
        yield
    except Exception as error:
        not_the_file = (UserError, MemoryError, FileNotFoundError, PermissionError)
        if isinstance(error, not_the_file) or getattr(error, "errno", None) in PASSING_ERRORS:
            raise
        reason = f"{type(error).__name__}: {error}"[:200]
        if "pickl" in reason.lower():  # the libraries' texts advise to run the code
            asked = re.search(r"GLOBAL (\S+)", str(error))
            reason = f"{asked[1] + ': ' if asked else ''}no code from files is run"
        with open(path, "rb") as file:
            start = file.read(100).strip()
        if start.startswith((b"<", b"version https://git-lfs")):
            page = "a web page: download the file again"
            pointer = "a Git LFS pointer: fetch the file with `git lfs pull`"
            raise UserError(f"{path} is {page if start[:1] == b'<' else pointer}") from error
        raise UserError(f"{path} is damaged or no {kind} ({reason})") from error


def read_safetensors(path):
    """name -> CPU tensor of a .safetensors file; UserError if it is damaged or none."""
    with reading(path, "safetensors file"):
        return load_file(path)


def read_torch(path):
    """What torch.save wrote, tensors on the CPU (zip files are mapped) and plain values."""
    with reading(path, "torch file of plain tensors and values"):
        return torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def _list_states(content):
    """Names of the dicts of tensors in `content`, one or two deep, an optimizer's aside."""
    for name, value in content.items():
        inner = [value, *value.values()] if isinstance(value, dict) else []
        leaves = [x for table in inner if isinstance(table, dict) for x in table.values()]
        if any(map(torch.is_tensor, leaves)) and not str(name).startswith("opt"):
            yield name


def unwrap(content):
    """({name: tensor}, sentences): a network's weights out of a weights file's content, the
    averaged ones of a training's checkpoint, without what wrappers add to names.
    """
    said = []
    while states := list(_list_states(content)):
        name = next((name for name in states if "ema" in name.lower()), states[0])
        said.append(f"of {', '.join(map(str, content))} in the file, {name} is read")
        content = content[name]
    names = {k: re.sub(_WRAPPERS, "", k) for k, x in content.items() if torch.is_tensor(x)}
    names.pop("n_averaged", None)  # of torch's AveragedModel
    shared = os.path.commonprefix(list(names.values())).rfind(".") + 1
    if changed := [f"{k} -> {name[shared:]}" for k, name in names.items() if k != name[shared:]]:
        said.append(f"wrappers' parts of names are left out: {changed[0]}")
    return {name[shared:]: content[k] for k, name in names.items()}, said


def load_strict(module, tensors, source):
    """Load `tensors` into `module`; every name and shape must match. UserError names `source` and
    the first few differences; the module is unchanged then.
    """
    own = module.state_dict()
    both = [(name, tensors[name].shape, own[name].shape) for name in own if name in tensors]
    shapes = [f"{name} {tuple(x)} instead of {tuple(y)}" for name, x, y in both if x != y]
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


def read_arrays(path, leave_out=()):
    """{name: array} of a .npz file; UserError if it is damaged, none or holds pickled objects."""
    with reading(path, ".npz file of plain arrays"), np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files if name not in leave_out}


def map_array(path, name):
    """The array `name` of a .npz file, mapped if it is uncompressed, else read; None without it."""
    with reading(path, ".npz file of plain arrays"), zipfile.ZipFile(path) as archive:
        entry = archive.NameToInfo.get(f"{name}.npy")
        if entry is None or entry.compress_type != zipfile.ZIP_STORED:
            return entry and read_arrays(path)[name]
        with open(path, "rb") as file:
            file.seek(entry.header_offset + 26)  # of the lengths of a name and of an extra field
            file.seek(sum(np.frombuffer(file.read(4), "<u2").tolist()), os.SEEK_CUR)
            major, _ = np.lib.format.read_magic(file)
            shape, fortran, dtype = getattr(np.lib.format, f"read_array_header_{major}_0")(file)
            return np.memmap(path, dtype, "r", file.tell(), shape, "F" if fortran else "C")


def read_idx(path):
    """The uint8 array of an idx file, gzipped or not: 0, 0, 8, rank, big-endian shape, values."""
    with reading(path, "idx file of bytes"):
        opened = gzip.open(path) if path.suffix == ".gz" else open(path, "rb")
        with opened as file:
            shape = np.frombuffer(file.read(4 * file.read(4)[3]), ">u4")
            return np.frombuffer(file.read(), np.uint8).reshape(shape)


class _Pickled:
    """A call that a pickle asks for, as plain data."""

    def __init__(self, *args):
        self.args, self.state = args, None

    def __setstate__(self, state):
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Calls nothing, numpy neither: its `__setstate__` would take numbers for addresses."""

    def find_class(self, module, name):
        if name not in ("_reconstruct", "ndarray", "dtype", "scalar", "encode"):
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return _Pickled


def _rebuild(value):
    """A pickled array of numbers or a number of numpy's as an array, one of objects as a list."""
    if not isinstance(value, _Pickled):
        return value
    _, shape, dtype, fortran_order, data = value.state or (1, (), value.args[0], 0, value.args[1])
    if isinstance(data, list):
        return [_rebuild(item) for item in data]
    # Protocol 2 writes bytes as _codecs.encode(text, "latin1").
    data = data.args[0].encode("latin1") if isinstance(data, _Pickled) else data
    code = dtype.state[1] + dtype.args[0]
    if not re.fullmatch("[<>|][fiu][1248]", code):
        raise ValueError(f"it holds {code}")
    return np.frombuffer(data, code).reshape(shape, order="F" if fortran_order else "C")


def read_array(path):
    """The array of a .npy file; objects, such as U-ViT's (moments, label), as a list."""
    with reading(path, ".npy file of arrays and numbers"), open(path, "rb") as file:
        major, _ = np.lib.format.read_magic(file)
        _, _, dtype = getattr(np.lib.format, f"read_array_header_{major}_0")(file)
        if dtype.hasobject:
            return _rebuild(_Unpickler(file).load())
        return np.load(path, allow_pickle=False)
