"""Files that nobody should trust: whatever is in them, the reader's answer is a value or one
sentence that names the file. More cases: DIM_FUZZ=2000 for these tests, and tests/fuzzing.py.
"""

import io
import json
import os
import pickletools
import string
import struct
import tarfile
import zipfile
import zlib

import fuzzing
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from libs import pickled, torch_files
from libs.runtime import flags
from utils import UserError, flatten

CASES = int(os.environ.get("DIM_FUZZ", "20"))
pytestmark = pytest.mark.timeout(300 + 2 * CASES)


def examples(share=1.0):
    """Settings of a hypothesis test of share * CASES cases, the same at every run."""
    return settings(
        max_examples=max(10, int(share * CASES)), derandomize=True, database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------
# Content: bytes flipped, cut, moved, and numbers where lengths and offsets are


@pytest.mark.parametrize("name", fuzzing.FORMATS)
def test_changed_bytes(name, tmp_path):
    fuzzer = fuzzing.Fuzzer(name, tmp_path)
    seen = {fuzzer.case(0, number) for number in range(CASES)}
    assert seen <= {"read", "refused"}


def test_the_fuzzer_finds_what_it_is_for(tmp_path, monkeypatch):
    """Another exception, a sentence without the file, and no answer are findings."""

    def hang(folder):
        while True:
            pass

    def fail(folder):
        raise KeyError("label")

    def mute(folder):
        raise UserError("something is wrong")

    monkeypatch.setattr(fuzzing, "HANG_S", 0.1)
    for read, says in ((hang, "no answer"), (fail, "KeyError"), (mute, "without the file's name")):
        with pytest.raises(fuzzing.Finding, match=says):
            fuzzing.outcome(read, tmp_path)


# ---------------------------------------------------------------------------------------------
# Structure

INTEGERS = st.one_of(
    st.integers(-2, 20), st.sampled_from([2**31, 2**40, 2**60, 2**63 - 1, 2**63, 2**70])
)
TEXT = st.text(string.printable + "\0é\x1b", max_size=12) | st.sampled_from(
    ["..", "../../etc/passwd", "/etc/passwd", "UserError: fine", "nnet.safetensors"]
)
JSON = st.recursive(
    st.none() | st.booleans() | INTEGERS | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


def places(document, path=()):
    """Paths of all nodes of a JSON document."""
    yield path
    if isinstance(document, (dict, list, tuple)):
        items = document.items() if isinstance(document, dict) else enumerate(document)
        for key, value in items:
            yield from places(value, (*path, key))


def replaced(document, path, value):
    """A copy of the document with `value` at the path."""
    if not path:
        return value
    copy = dict(document) if isinstance(document, dict) else list(document)
    copy[path[0]] = replaced(document[path[0]], path[1:], value)
    return copy


JSON_FILES = [
    (name, file)
    for name, form in fuzzing.FORMATS.items()
    for file in form.changes
    if file.endswith(".json")
]


@pytest.mark.parametrize("name, file", JSON_FILES)
def test_any_value_at_any_place_of_a_json_file(name, file, tmp_path):
    fuzzer = fuzzing.Fuzzer(name, tmp_path)
    document = json.loads((fuzzer.sample / file).read_text())

    @examples()
    @given(st.sampled_from(list(places(document))), JSON)
    def one(path, value):
        fuzzer.reset()
        (fuzzer.work / file).write_text(json.dumps(replaced(document, path, value)))
        fuzzing.outcome(fuzzer.format.read, fuzzer.work)

    one()


TENSORS = st.builds(
    lambda shape, dtype: torch.ones(shape, dtype=dtype),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]),
)


def test_any_value_at_any_place_of_a_training_state(tmp_path):
    """Resumed, and a step made: what does not fit is said before."""
    fuzzer = fuzzing.Fuzzer("checkpoint directory", tmp_path)
    state = torch_files.load(fuzzer.sample / "4.ckpt" / "training.pt")

    @examples()
    @given(st.sampled_from(list(places(state))), JSON | TENSORS)
    def one(path, value):
        fuzzer.reset()
        torch.save(replaced(state, path, value), fuzzer.work / "4.ckpt" / "training.pt")
        fuzzing.forge_manifest(fuzzer.work)
        fuzzing.outcome(fuzzer.format.read, fuzzer.work)

    one()


def npy(descr, order, shape, data):
    """An .npy file of version 1 with any header."""
    header = repr({"descr": descr, "fortran_order": order, "shape": shape}).encode(
        "latin1", "replace"
    )
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header + b"\n" + data


DESCRS = st.sampled_from(
    ["<f4", ">f2", "<f8", "|u1", "<i8", "|b1", "<c8", "<U3", "|S5", "|V9", "|O", "<M8[s]",
     "<U" + "9" * 9, [("a", "<f4")], [("a", "<f4", (2**31, 2**31))], ("<f4", (2, 2)), "f4,f4",
     "", "x", {}]
) | TEXT  # fmt: skip
SHAPES = st.lists(INTEGERS, max_size=4).map(tuple) | INTEGERS | TEXT


@pytest.mark.parametrize(
    "name, file",
    [("latents .npy", "1.npy"), ("image store", "store/features.npy"),
     ("image store", "store/done.npy")],
)  # fmt: skip
def test_any_header_of_an_array(name, file, tmp_path):
    fuzzer = fuzzing.Fuzzer(name, tmp_path)

    @examples(2)
    @given(DESCRS, st.booleans() | TEXT, SHAPES, st.binary(max_size=200))
    def one(descr, order, shape, data):
        fuzzer.reset()
        (fuzzer.work / file).write_bytes(npy(descr, order, shape, data))
        fuzzing.outcome(fuzzer.format.read, fuzzer.work)

    one()


@pytest.mark.parametrize(
    "name, file", [("FID statistics", "stats.npz"), ("latents .npz", "1.npy.npz")]
)
def test_any_header_of_an_array_in_an_npz(name, file, tmp_path):
    fuzzer = fuzzing.Fuzzer(name, tmp_path)
    with zipfile.ZipFile(fuzzer.sample / file) as archive:
        members = {member: archive.read(member) for member in archive.namelist()}
    methods = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]

    @examples(2)
    @given(
        st.sampled_from(list(members)),
        DESCRS,
        SHAPES,
        st.binary(max_size=99),
        st.sampled_from(methods),
    )
    def one(member, descr, shape, data, method):
        fuzzer.reset()
        with zipfile.ZipFile(fuzzer.work / file, "w", method) as archive:
            for known, content in members.items():
                archive.writestr(
                    known, npy(descr, False, shape, data) if known == member else content
                )
        fuzzing.outcome(fuzzer.format.read, fuzzer.work)

    one()


@pytest.mark.parametrize("order", "<>")
def test_text_of_characters_that_are_none(tmp_path, order):
    """numpy reads them, and Python's SystemError is what they become there."""
    fuzzer = fuzzing.Fuzzer("FID statistics", tmp_path)
    with zipfile.ZipFile(fuzzer.work / "stats.npz", "a") as archive, pytest.warns(UserWarning):
        archive.writestr("extractor.npy", npy(f"{order}U1", False, (), b"\xff" * 4))
    assert fuzzing.outcome(fuzzer.format.read, fuzzer.work) == "refused"
    with np.load(fuzzer.work / "stats.npz") as file, pytest.raises(SystemError):
        file["extractor"].item()


# ---------------------------------------------------------------------------------------------
# Pickles: any opcodes, with any arguments

NAMES = st.sampled_from(
    ["numpy._core.multiarray _reconstruct", "numpy ndarray", "numpy dtype", "os system",
     "builtins eval", "torch._utils _rebuild_tensor_v2", "torch FloatStorage", "torch Size",
     "collections OrderedDict", "_codecs encode", "builtins bytearray"]
)  # fmt: skip


def opcode_bytes(opcode):
    """Strategy of one opcode with an argument that fits its kind."""
    code = opcode.code.encode("latin1")
    lengths = {"1": "<B", "4": "<i", "8": "<Q"}
    argument = opcode.arg.name if opcode.arg else None
    if argument is None:
        return st.just(code)
    if argument == "stringnl_noescape_pair":
        return NAMES.map(lambda name: code + name.replace(" ", "\n").encode() + b"\n")
    if argument in ("uint1", "uint2", "int4", "uint4", "uint8", "float8"):
        size = int(argument[-1])
        small = st.integers(0, 3).map(lambda n: n.to_bytes(size, "little"))
        return (small | st.binary(min_size=size, max_size=size)).map(lambda raw: code + raw)
    if argument[-1] in lengths and not argument.startswith("decimal"):
        form = lengths[argument[-1]]
        return st.binary(max_size=6).map(lambda raw: code + struct.pack(form, len(raw)) + raw)
    return st.sampled_from(["0", "1", "12", "'a'", "x", "00", "01", "1.5", "9" * 30]).map(
        lambda line: code + line.encode() + b"\n"
    )


PICKLES = st.lists(st.one_of([opcode_bytes(op) for op in pickletools.opcodes]), max_size=25).map(
    lambda parts: b"".join(parts) + b"."
)


@examples(8)
@given(PICKLES)
def test_any_opcodes_give_plain_values(data):
    """Without a name being called: there is nothing in the machine that could."""
    try:
        value = pickled.load(data)
    except Exception as error:
        assert not isinstance(error, (MemoryError, SystemError))
    else:
        known = (int, float, str, bytes, dict, list, tuple, pickled.Record, type(None))
        assert isinstance(value, known)


@pytest.mark.parametrize("place", ["pair", "batch", "zip", "old"])
def test_any_opcodes_in_a_file(place, tmp_path):
    name = {"pair": "latents .npy, pickled", "batch": "CIFAR-10 pickles", "zip": "official .pth",
            "old": "official .pth, old"}[place]  # fmt: skip
    fuzzer = fuzzing.Fuzzer(name, tmp_path)
    (file,) = fuzzer.format.changes
    whole = (fuzzer.sample / file).read_bytes()

    def contents(data):
        if place == "pair":
            return npy("|O", False, (2,), data)
        if place == "batch":
            return data
        if place == "old":  # after the magic number, the protocol and the system
            start = whole.index(b"collections\nOrderedDict") - 3
            return whole[:start] + data + whole[-200:]
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            archive.writestr("a/data.pkl", data)
            archive.writestr("a/data/0", bytes(16))
        return out.getvalue()

    @examples()
    @given(PICKLES)
    def one(data):
        fuzzer.reset()
        (fuzzer.work / file).write_bytes(contents(data))
        assert fuzzing.outcome(fuzzer.format.read, fuzzer.work) == "refused"

    one()


# ---------------------------------------------------------------------------------------------
# Tensors: any claims about a storage of 16 bytes


def save_claims(path, storage, numel, offset, size, stride, zipped):
    """A file of torch.save whose one float32 tensor has 4 numbers and makes these claims."""
    torch.save({"a": torch.arange(4.0)}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    pickle_of = {
        True: lambda: zipfile.ZipFile(io.BytesIO(whole)).read(f"{path.stem}/data.pkl"),
        False: lambda: whole,
    }[zipped]()

    def number(n):
        return (
            b"\x8a"
            + bytes([raw := (n.bit_length() // 8 + 1)])
            + n.to_bytes(raw, "little", signed=True)
        )

    def numbers(values):
        return b"(" + b"".join(map(number, values)) + b"t"

    start = pickle_of.index(b"Q", pickle_of.index(b"FloatStorage"))
    old_numel = pickle_of.rindex(b"K\x04", 0, start)
    end = pickle_of.index(b"\x89", start)  # requires_grad, after offset, size and stride
    forged = (
        pickle_of[:old_numel].replace(b"FloatStorage", storage) + number(numel)
        + pickle_of[old_numel + 2 : start + 1] + number(offset) + numbers(size) + numbers(stride)
        + pickle_of[end:]
    )  # fmt: skip
    if not zipped:
        path.write_bytes(forged)
        return
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", forged)
        archive.writestr("a/data/0", torch.arange(4.0).numpy().tobytes())


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_any_claims_of_a_tensor(zipped, tmp_path):
    path = tmp_path / "a.pth"

    @examples(4)
    @given(
        st.sampled_from([b"FloatStorage"] * 4 + [b"DoubleStorage", b"CharStorage"]),
        st.sampled_from([4, 4, 4, 4, 3, 2**40]), st.just(0) | INTEGERS,
        st.lists(INTEGERS, max_size=3), st.lists(INTEGERS, max_size=3),
    )  # fmt: skip
    def one(storage, numel, offset, size, stride):
        save_claims(path, storage, numel, offset, size, stride, zipped)
        try:
            tensor = torch_files.load(path)["a"]
        except Exception:  # noqa: BLE001 - read_torch makes a sentence of all of them
            return
        # What is read is what numpy's bounds allow, too, on the four numbers.
        assert numel <= 4 and tensor.shape == tuple(size) and tensor.numel() <= numel
        if storage != b"FloatStorage":  # an old file does not say how large its elements are
            assert not zipped
            return
        places = np.full(size, offset)
        for axis, step in enumerate(stride):
            places = (
                places + np.arange(size[axis]).reshape(-1, *[1] * (len(size) - axis - 1)) * step
            )
        assert not places.size or places.max() < 4
        np.testing.assert_array_equal(tensor.numpy(), places)

    one()


SAFE_ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from("F32 F16 BF16 F8_E4M3 F4 I64 BOOL U8 C64 X".split()),
        "shape": st.lists(INTEGERS, max_size=3), "data_offsets": st.lists(INTEGERS, max_size=3),
    },
)  # fmt: skip


def test_any_header_of_safetensors(tmp_path):
    fuzzer = fuzzing.Fuzzer("safetensors", tmp_path)
    names = st.sampled_from(["pos_embed", "__metadata__", "head.bias"]) | TEXT
    file = fuzzer.work / "nnet_ema.safetensors"

    @examples(4)
    @given(st.dictionaries(names, SAFE_ENTRY | JSON, max_size=3), st.binary(max_size=64), INTEGERS)
    def one(header, data, claimed):
        fuzzer.reset()
        text = json.dumps(header).encode()
        length = len(text) if claimed < 10 else claimed % 2**64
        file.write_bytes(length.to_bytes(8, "little") + text + data)
        assert fuzzing.outcome(fuzzer.format.read, fuzzer.work) == "refused"

    one()


# ---------------------------------------------------------------------------------------------
# Headers of archives and images


def test_any_member_of_an_archive(tmp_path):
    """Links, devices, names that lead away, sizes that are none: nothing is written anywhere."""
    fuzzer = fuzzing.Fuzzer("CIFAR-10 archive", tmp_path)
    kinds = [bytes([kind]) for kind in b"01234567LKxgSAZ\0"]
    names = st.sampled_from(["cifar-10-batches-py/data_batch_1", "../escaped", "/escaped"]) | TEXT
    sizes = st.integers(0, 2**33 - 1)

    @examples(2)
    @given(
        st.lists(st.tuples(names, st.sampled_from(kinds), sizes, TEXT), max_size=3),
        st.binary(max_size=1500),
    )  # fmt: skip
    def one(members, data):
        fuzzer.reset()
        out = io.BytesIO()
        for name, kind, size, link in members:
            header = tarfile.TarInfo(name)
            header.type, header.size, header.linkname = kind, size, link
            out.write(header.tobuf(tarfile.GNU_FORMAT, errors="replace") + data)
        archive = fuzzer.work / "cifar-10-python.tar.gz"
        archive.write_bytes(fuzzing.gzip.compress(out.getvalue(), 1))
        assert fuzzing.outcome(fuzzer.format.read, fuzzer.work) == "refused"
        assert [path.name for path in fuzzer.work.iterdir()] == [archive.name]

    one()
    assert not (tmp_path / "escaped").exists()


def png(width, height, depth, color, data):
    def chunk(kind, content):
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(data))
        + chunk(b"IEND", b"")
    )


def test_any_header_of_a_png(tmp_path):
    fuzzer = fuzzing.Fuzzer("PNG", tmp_path)
    sides = st.integers(0, 20) | st.sampled_from([2**12, 2**20, 2**31 - 1, 2**32 - 1])

    @examples(2)
    @given(
        sides,
        sides,
        st.sampled_from([1, 2, 4, 8, 16, 3]),
        st.integers(0, 7),
        st.binary(max_size=99),
    )
    def one(width, height, depth, color, data):
        fuzzer.reset()
        (fuzzer.work / "a.png").write_bytes(png(width, height, depth, color, data))
        assert fuzzing.outcome(fuzzer.format.read, fuzzer.work) == "read"  # b.png stands in

    one()


# ---------------------------------------------------------------------------------------------
# Command lines

KEYS = list(flatten(fuzzing.config_of()))
WORDS = st.text(max_size=20) | st.sampled_from(
    ["", "1", "-1", "1e999", "nan", "true", "None", "(1,2)", "(1,", "((((((((1))))))))", "[1]",
     "{}", "9" * 5000, "(" * 200, "'", "__import__('os').getcwd()", "1_000", "0x10", "\0", "()",
     "('a',)"]
)  # fmt: skip


@examples(2)
@given(st.lists(st.tuples(st.sampled_from(KEYS) | TEXT, WORDS), min_size=1, max_size=3))
def test_any_overrides_of_a_config(words):
    arguments = [f"--config.{key}={value}" for key, value in words]
    try:
        config = fuzzing.config_of(*arguments)
    except UserError as error:
        assert str(error)
    else:
        assert list(flatten(config)) == KEYS


def test_a_sentence_is_one_line_of_plain_text(capsys):
    """Names in files hold what they like: line ends, a terminal's commands, megabytes."""
    flags._report(UserError("the file\nhas \x1b[2J\x07 a name" + "x" * 10**6))
    said = capsys.readouterr().err
    assert said.startswith(r"error: the file has \x1b[2J\x07 a namexxx")
    assert said.count("\n") == 1 and len(said) < 2 * flags.MAX_MESSAGE


@pytest.mark.parametrize("name", ["UserError: all is well", "x\nutils.UserError: all is well"])
def test_a_file_cannot_hide_its_name(tmp_path, name):
    """UserError takes off what a data loader's worker adds to it, and nothing that a file says."""
    path, model = tmp_path / "nnet_ema.safetensors", fuzzing.tiny_model()
    save_file({**model.state_dict(), name: torch.zeros(1)}, path)
    with pytest.raises(UserError) as caught:
        fuzzing.load_into(model, path)
    assert str(path) in str(caught.value) and f"unexpected: {name}" in str(caught.value)
