"""Tensors and plain values from files of torch.save, new (zip) and old, without torch's unpickler.

torch.load(weights_only=True) runs no code either, but it unpacks a compressed archive of a
megabyte to a gigabyte, and makes a `bytearray` as large as a pickle says. Here a file can claim no
more than it has. Imports only libs.pickled of ours.
"""

import math
import mmap
import os
import zipfile

import torch

from libs import pickled
from libs.pickled import Record

_DTYPES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}  # fmt: skip
_NAMES = {
    **{("torch", name): name for name in _DTYPES},
    ("torch._utils", "_rebuild_tensor"): "tensor",
    ("torch._utils", "_rebuild_tensor_v2"): "tensor",
    ("torch._utils", "_rebuild_parameter"): "parameter",
    ("torch", "Size"): "size",
}
_OLD_MAGIC = 0x1950A86A20F9469CFC6C  # torch.serialization.MAGIC_NUMBER
_CHUNK = 1 << 22
MAX_DIMS = 64  # more than any tensor has


def _storage_of(record):
    """(key, dtype, number of elements) that a persistent id asks for."""
    if type(record) is not Record or record.name != "persistent":
        raise ValueError("a tensor in it has no storage")
    kind, storage, key, _, numel, *views = record.args
    if kind != "storage" or type(key) is not str or type(numel) is not int or numel < 0:
        raise ValueError("a storage in it is none")
    if any(views):  # of torch before 0.4
        raise ValueError("a storage in it is a part of another")
    return key, _DTYPES[storage.name], numel


def _strided(flat, offset, size, stride):
    """A view of the storage `flat` (n,), which must have every element that it asks for."""
    size = size.args[0] if type(size) is Record else size
    numbers = (offset, *size, *stride)
    if not all(type(n) is int and 0 <= n < 2**63 for n in numbers) or len(size) != len(stride):
        raise ValueError(f"a tensor in it has shape {size} and strides {stride}")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 not in size and (last >= len(flat) or math.prod(size) > len(flat)):
        raise ValueError(f"a tensor of shape {size} in it claims more than its {len(flat)} numbers")
    return torch.as_strided(flat, size, stride, offset)


class _Builder:
    """Recorded values -> tensors and plain ones; read(key, dtype, numel) gives a storage, (n,)."""

    def __init__(self, read):
        self.read, self.storages, self.built = read, {}, {}

    def storage(self, record):
        asked = _storage_of(record)
        if asked[0] not in self.storages:
            self.storages[asked[0]] = asked, self.read(*asked)
        known, flat = self.storages[asked[0]]
        if known != asked:
            raise ValueError("one storage in it is claimed to be two")
        return flat

    def value(self, recorded):
        """Each object once, however often it is named, so that no small file is a large tree."""
        if id(recorded) not in self.built:
            self.built[id(recorded)] = self.make(recorded)
        return self.built[id(recorded)]

    def make(self, recorded):
        if isinstance(recorded, dict):
            return {key: self.value(item) for key, item in recorded.items()}
        if isinstance(recorded, (list, tuple)):
            return type(recorded)(self.value(item) for item in recorded)
        if not isinstance(recorded, Record):
            return recorded
        if recorded.name == "tensor":
            storage, offset, size, stride = recorded.args[:4]
            return _strided(self.storage(storage), offset, size, stride)
        if recorded.name == "parameter":
            return self.value(recorded.args[0])
        if recorded.name == "size" and len(recorded.args[0]) <= MAX_DIMS:
            return tuple(recorded.args[0])
        raise ValueError("it holds something besides tensors and plain values")


def _fill(file, dtype, numel):
    """The next numel elements of an open file, a tensor (numel,)."""
    memory = torch.empty(numel * dtype.itemsize, dtype=torch.uint8)
    target, place = memoryview(memory.numpy()), 0
    while place < len(target):
        data = file.read(min(_CHUNK, len(target) - place))
        if not data:
            raise ValueError("it is cut short")
        target[place : place + len(data)] = data
        place += len(data)
    return memory.view(dtype)


def _read_zip(path):
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: info for info in archive.infolist()}
        if any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
            raise ValueError("it is compressed, which torch.save does not do")
        if sum(info.file_size for info in members.values()) > os.path.getsize(path):
            raise ValueError("its members claim more than it holds")
        (folder,) = [name[: -len("data.pkl")] for name in members if name.endswith("/data.pkl")]
        if f"{folder}byteorder" in members and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("its byte order is not little")

        def read(key, dtype, numel):
            info = members[f"{folder}data/{key}"]
            if info.file_size != numel * dtype.itemsize:
                raise ValueError(f"storage {key} has {info.file_size} bytes, not {numel} elements")
            with archive.open(info) as file:
                return _fill(file, dtype, numel)

        return _Builder(read).value(pickled.load(archive.read(f"{folder}data.pkl"), _NAMES))


def _read_old(file, size):
    """Five pickles (magic, protocol, system, the object, the storages' keys), then the storages."""
    asked = []
    if pickled.load(file, _NAMES) != _OLD_MAGIC:
        raise ValueError("it begins with another pickle than torch.save's")
    _, system, recorded = (pickled.load(file, _NAMES, asked) for _ in range(3))
    keys = pickled.load(file, _NAMES)
    if not system["little_endian"]:
        raise ValueError("its byte order is not little")
    storages = {key: (dtype, numel) for key, dtype, numel in map(_storage_of, asked)}
    places, place = {}, file.tell()
    for key in keys:
        places[key] = place
        dtype, numel = storages[key]
        place += 8 + numel * dtype.itemsize
    if place > size:
        raise ValueError("it is cut short, or claims more than it holds")

    def read(key, dtype, numel):
        file.seek(places[key])
        if int.from_bytes(file.read(8), "little") != numel:
            raise ValueError(f"storage {key} has not {numel} elements")
        return _fill(file, dtype, numel)

    return _Builder(read).value(recorded)


def load(path):
    """What torch.save wrote to `path`: tensors on the CPU, in dicts, lists and tuples, with plain
    values. Needs as much memory as the file is large, 4 times what is no tensor, and 256 MiB.

    Raises:
        libs.pickled.ForbiddenName: it asks for anything to be called, which is not done.
        ValueError and almost any other exception: it is broken, hostile or no file of torch.save.
    """
    with open(path, "rb") as file:
        if file.read(4) == b"PK\x03\x04":
            return _read_zip(path)
        # Mapped, since reading n bytes of a map gives what there is, without room for n before.
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return _read_old(mapped, len(mapped))
