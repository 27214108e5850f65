"""Plain arrays from .npy and .npz files, never more bytes than the reader asked for.

What a header claims is compared with the limit before anything is allocated or unpacked. Layer 0:
imports nothing of ours.
"""

import io
import math
import sys
import zipfile

import numpy as np

# version -> (bytes of the header's length, its reader)
_HEADERS = {
    (1, 0): (2, np.lib.format.read_array_header_1_0),
    (2, 0): (4, np.lib.format.read_array_header_2_0),
}
MAX_HEADER_BYTES = 10_000  # numpy's own limit, which it looks at after reading
# zipfile unpacks those piece by piece; of bzip2 and LZMA it unpacks all that a piece becomes.
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def read_header(file):
    """An open .npy file -> (shape, whether in Fortran order, dtype), the file being at the data."""
    version = np.lib.format.read_magic(file)
    if version not in _HEADERS:
        raise ValueError(f"its .npy version is {version}")
    digits, parse = _HEADERS[version]
    prefix = file.read(digits)
    size = int.from_bytes(prefix, "little")
    if size > MAX_HEADER_BYTES:
        raise ValueError(f"its .npy header claims {size} bytes")
    return parse(io.BytesIO(prefix + file.read(size)))


def read_npy(file, max_bytes):
    """The array in an open .npy file, read-only; ValueError for pickled objects and for more than
    max_bytes, other exceptions too for broken files.
    """
    shape, fortran_order, dtype = read_header(file)
    if dtype.hasobject:
        raise ValueError("it holds pickled objects, which are never read")
    if dtype.kind not in "biufU":
        raise ValueError(f"it is of type {dtype}")
    size = math.prod(shape) * dtype.itemsize
    if not 0 <= size <= max_bytes:
        raise ValueError(f"it claims to be of shape {shape}, more than {max_bytes >> 20} MiB")
    data = file.read(size)
    if len(data) != size:
        raise ValueError("it is cut short")
    characters = np.frombuffer(data, dtype.byteorder + "u4") if dtype.kind == "U" else ()
    if len(characters) and characters.max() > sys.maxunicode:  # of which Python makes no text
        raise ValueError("its text is none")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran_order else "C")


def read_npz(path, names, max_bytes):
    """{name: array} of those `names` that the .npz file has, of max_bytes in all; as `read_npy`."""
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: info for info in archive.infolist()}
        for name in names:
            info = members.get(f"{name}.npy")
            if info is None:
                continue
            if info.compress_type not in _METHODS:
                raise ValueError(f"{name} is compressed by another method than deflate")
            with archive.open(info) as file:
                left = max_bytes - sum(array.nbytes for array in arrays.values())
                arrays[name] = read_npy(file, left)
    return arrays
