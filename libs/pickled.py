"""Arrays and plain values out of pickles, without calling anything that a pickle names.

Layer 0: imports nothing of ours.
"""

import io
import pickle

import numpy as np

# What pickled numpy arrays and numbers name, in every version of numpy, and what we call it.
_NAMES = {
    ("numpy.core.multiarray", "_reconstruct"): "array",
    ("numpy._core.multiarray", "_reconstruct"): "array",
    ("numpy.core.multiarray", "scalar"): "scalar",
    ("numpy._core.multiarray", "scalar"): "scalar",
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    ("_codecs", "encode"): "encode",  # how Python 3 writes bytes at protocol 2
}


class Record:
    """What a pickle wanted to build, as plain data: the callable's name, arguments and state."""

    def __init__(self, name, args):
        self.name, self.args, self.state = name, args, None

    def __setstate__(self, state):
        self.state = state


class _RecordingUnpickler(pickle.Unpickler):
    """_NAMES give a `Record`, every other name is refused. Not even numpy's own `dtype` and
    `ndarray` are called: a forged dtype state could make numpy take bytes of the file for object
    pointers.
    """

    def find_class(self, module, name):
        kind = _NAMES.get((module, name))
        if kind is None:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no data file needs")
        # A new function each time: a file that sets attributes on it changes nothing of ours.
        return lambda *args: Record(kind, args)


def load(data):
    """Bytes of a pickle -> its dicts, lists, tuples, strings and numbers; arrays are `Record`s.

    Broken and hostile pickles raise almost any kind of exception.
    """
    # encoding="bytes": the strings of Python 2's pickles hold pixels.
    return _RecordingUnpickler(io.BytesIO(data), encoding="bytes").load()


def text(value):
    """bytes and recorded bytes -> str (latin1); anything else as it is."""
    if isinstance(value, Record) and value.name == "encode":
        value = value.args[0]
    return value.decode("latin1") if isinstance(value, bytes) else value


def _bytes(value):
    return value if isinstance(value, bytes) else text(value).encode("latin1")


def _dtype(record, allowed):
    """The numpy dtype that a recorded one describes, if its code is in `allowed` ('f4', 'u1')."""
    code = text(record.args[0]).lstrip("<|=>")
    if code not in allowed:
        raise ValueError(f"it is not of type {' or '.join(allowed)}")
    order = text(record.state[1]) if record.state else "="
    return np.dtype({">": ">", "<": "<"}.get(order, "=") + code)


def array(record, allowed):
    """The array that a `Record` of one describes; its dtype, without byte order, is in `allowed`.

    ValueError, or another error of a broken record, if it describes something else.
    """
    if not (isinstance(record, Record) and record.name == "array"):
        raise ValueError("it is not an array")
    _, shape, dtype, fortran_order, raw = record.state
    values = np.frombuffer(_bytes(raw), _dtype(dtype, allowed))
    return values.reshape(shape, order="F" if fortran_order else "C")


def integer(value):
    """An int, or one of numpy's as recorded, as an int; ValueError for anything else."""
    codes = ("i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1")
    if isinstance(value, Record) and value.name == "scalar":
        value = np.frombuffer(_bytes(value.args[1]), _dtype(value.args[0], codes)).item()
    elif isinstance(value, Record):
        value = array(value, codes).item()
    if type(value) is not int:
        raise ValueError("it is not an integer")
    return value


def elements(record):
    """The elements of a recorded array of objects, or of a tuple or list, as a list."""
    if isinstance(record, Record) and record.name == "array":
        _, _, dtype, _, values = record.state
        if text(dtype.args[0]).lstrip("|") not in ("O", "O8", "O4"):
            raise ValueError("it is not an array of objects")
        record = values
    if not isinstance(record, (list, tuple)):
        raise ValueError("it is neither an array of objects nor a tuple")
    return list(record)
