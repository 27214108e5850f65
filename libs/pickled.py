"""Plain values out of pickles, without calling anything that a pickle names.

Python's own unpickler is not used at all: even with every name refused, a pickle of six bytes can
make it fill gigabytes (a memo index), and one of a megabyte end the process (a deep tuple as a
key). Layer 0: imports nothing of ours.
"""

import io
import pickletools

import numpy as np

# A file takes 10 to 100 opcodes an array; a million of the largest take some 200 MB.
MAX_OPCODES = 1_000_000

# What pickled numpy arrays and numbers name, in every version of numpy, and what we call it.
NUMPY_NAMES = {
    ("numpy.core.multiarray", "_reconstruct"): "array",
    ("numpy._core.multiarray", "_reconstruct"): "array",
    ("numpy.core.multiarray", "scalar"): "scalar",
    ("numpy._core.multiarray", "scalar"): "scalar",
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
}
# What Python itself names for plain values.
_PLAIN_NAMES = {
    ("_codecs", "encode"): "encode",  # how Python 3 writes bytes at protocol 2
    ("builtins", "bytes"): "bytes",  # and none of them
    ("__builtin__", "bytes"): "bytes",
    ("collections", "OrderedDict"): "dict",
}
_CONSTANTS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE",
    "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip
_KEYS = (str, bytes, int, float, bool, type(None))


class ForbiddenName(ValueError):
    """A pickle that asks for something to be imported and called."""


class Record:
    """What a pickle wanted to build, as plain data: the callable's name, arguments and state."""

    def __init__(self, name, args=None):
        self.name, self.args, self.state = name, args, None


class _Machine:
    """The stack of one pickle. A method for each opcode that data need, by its name in lower case;
    ValueError or any other exception for the rest, and for what is malformed.
    """

    def __init__(self, names, persistent):
        self.names, self.persistent = names, persistent
        self.stack, self.marks, self.memo = [], [], {}
        self.given, self.made = 0, 0  # opcodes and characters of text; what calls made of them

    def run(self, file):
        for count, (opcode, arg, _) in enumerate(pickletools.genops(file)):
            if opcode.name == "STOP":
                (value,) = self.stack
                return value
            if count >= MAX_OPCODES:
                raise ValueError(f"it has more than {MAX_OPCODES} opcodes")
            self.given += 1
            if opcode.name in _CONSTANTS:
                self.given += len(arg) if type(arg) is str else 0
                self.stack.append(arg)
            elif opcode.name in _OPERATIONS:
                _OPERATIONS[opcode.name](self, arg)
            else:
                raise ValueError(f"it has the opcode {opcode.name}, which no data file needs")

    def marked(self):
        """Take everything after the last mark from the stack."""
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def op_proto(self, arg):
        pass

    op_frame = op_proto

    def op_mark(self, arg):
        self.marks.append(len(self.stack))

    def op_none(self, arg):
        self.stack.append(None)

    def op_newtrue(self, arg):
        self.stack.append(True)

    def op_newfalse(self, arg):
        self.stack.append(False)

    def op_empty_list(self, arg):
        self.stack.append([])

    def op_empty_dict(self, arg):
        self.stack.append({})

    def op_empty_tuple(self, arg):
        self.stack.append(())

    def op_tuple1(self, arg, count=1):
        items = tuple(self.stack[-count:])
        if len(items) != count:
            raise ValueError("it takes more from its stack than there is")
        self.stack[-count:] = [items]

    def op_tuple2(self, arg):
        self.op_tuple1(arg, 2)

    def op_tuple3(self, arg):
        self.op_tuple1(arg, 3)

    def op_tuple(self, arg):
        self.stack.append(tuple(self.marked()))

    def op_list(self, arg):
        self.stack.append(self.marked())

    def op_dict(self, arg):
        items = self.marked()
        self.stack.append({})
        self.set_items(items)

    def op_append(self, arg):
        self.extend([self.stack.pop()])

    def op_appends(self, arg):
        self.extend(self.marked())

    def extend(self, items):
        if type(self.stack[-1]) is not list:
            raise ValueError("it appends to what is no list")
        self.stack[-1].extend(items)

    def op_setitem(self, arg):
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def op_setitems(self, arg):
        self.set_items(self.marked())

    def set_items(self, items):
        target, keys = self.stack[-1], items[::2]
        # Hashing a tuple takes as long, and as much of the stack, as its author likes.
        if type(target) is not dict or not all(type(key) in _KEYS for key in keys):
            raise ValueError("it sets entries by other keys than text and numbers")
        target.update(zip(keys, items[1::2], strict=True))

    def op_put(self, arg):
        self.memo[arg] = self.stack[-1]

    op_binput = op_long_binput = op_put

    def op_memoize(self, arg):
        self.memo[len(self.memo)] = self.stack[-1]

    def op_get(self, arg):
        self.stack.append(self.memo[arg])

    op_binget = op_long_binget = op_get

    def op_global(self, arg):
        module, _, name = arg.partition(" ")
        if (module, name) not in self.names:
            raise ForbiddenName(f"it asks for {module}.{name}, which no data file needs")
        self.stack.append(Record(self.names[module, name]))

    def op_stack_global(self, arg):
        name, module = self.stack.pop(), self.stack.pop()
        self.op_global(f"{module} {name}")

    def op_binpersid(self, arg):
        self.persistent.append(Record("persistent", self.stack.pop()))
        self.stack.append(self.persistent[-1])

    def op_reduce(self, arg):
        args, function = self.stack.pop(), self.stack.pop()
        if type(function) is not Record or function.args is not None or type(args) is not tuple:
            raise ValueError("it calls what is no name")
        value = _PLAIN.get(function.name, Record)(function.name, args)
        if type(value) is not Record:
            self.made += len(value)
            if self.made > self.given:  # the same list or text made into new ones again and again
                raise ValueError("its calls make more than it holds")
        self.stack.append(value)

    def op_build(self, arg):
        state = self.stack.pop()
        if type(self.stack[-1]) is Record:
            self.stack[-1].state = state
        elif type(self.stack[-1]) is not dict:  # an OrderedDict's attributes are left out
            raise ValueError("it sets the state of what has none")


_OPERATIONS = {
    name.removeprefix("op_").upper(): function
    for name, function in vars(_Machine).items()
    if name.startswith("op_")
}


def _plain_bytes(name, args):
    return args[0].encode("latin1") if name == "encode" else bytes(0)


def _plain_dict(name, args):
    if any(type(key) not in _KEYS for pairs in args for key, _ in pairs):
        raise ValueError("it sets entries by other keys than text and numbers")
    return dict(*args)


_PLAIN = {"encode": _plain_bytes, "bytes": _plain_bytes, "dict": _plain_dict}


def load(file, names=NUMPY_NAMES, persistent=None):
    """One pickle -> its dicts, lists, tuples, text (Python 2's as latin1), bytes, numbers.

    Args:
        file: bytes, or an open binary file whose `read` never allocates more than it returns.
        names: {(module, name): what a Record of it is called}, all that the pickle may name.
        persistent: a list that takes the Record of every persistent object.

    Returns:
        the value; a `Record` in place of every call of a name and every persistent object. It may
        hold itself, and one object many times.

    Raises:
        ForbiddenName: it names something else. ValueError and almost any other exception: it is
        broken or hostile.
    """
    file = io.BytesIO(file) if isinstance(file, bytes) else file
    persistent = [] if persistent is None else persistent
    return _Machine({**_PLAIN_NAMES, **names}, persistent).run(file)


def text(value):
    """bytes -> str (latin1); anything else as it is."""
    return value.decode("latin1") if isinstance(value, bytes) else value


def _bytes(value):
    return value if isinstance(value, bytes) else value.encode("latin1")


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
