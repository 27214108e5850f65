"""Small files that ask for much: unpacked, allocated, called, followed. What reading them takes is
measured, and that the attacks are real ones is shown on the ordinary readers.

The bounds are SECURITY.md's.
"""

import contextlib
import ctypes
import gc
import gzip
import io
import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import tarfile
import warnings
import zipfile
import zlib
from pathlib import Path

import fuzzing
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from datasets import get_dataset
from libs import pickled
from libs.data import cifar10, images
from libs.data.official_latents import read_feature_file
from libs.evaluate import metrics
from libs.model.build import config_beside, load_into
from libs.model.published import load_checkpoint
from utils import MAX_JSON_BYTES, UserError, read_json

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux's /proc")
MIB = 2**20


def resident(field):
    """VmRSS or VmHWM, its peak since the last `clear_refs`, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


class Peak:
    """Context that measures by how much the memory in use grows, `grown`, in bytes."""

    def __enter__(self):
        gc.collect()  # what is freed within would hide what is taken
        with contextlib.suppress(AttributeError):  # glibc's
            ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        self.before = resident("VmRSS")
        return self

    def __exit__(self, *exception):
        self.grown = resident("VmHWM") - self.before


@contextlib.contextmanager
def refused(path, says, mib=32):
    """The block raises UserError, which names the file, and needs less than `mib` MiB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 8 * 2**30, hard))  # this machine's protection
    try:
        with Peak() as peak, pytest.raises(UserError, match=says) as caught:
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert str(path) in str(caught.value)
    assert peak.grown < mib * MIB, f"{peak.grown / MIB:.0f} MiB"


# ---------------------------------------------------------------------------------------------
# Checkpoints


def packed_pth(path, tensors, method=zipfile.ZIP_DEFLATED):
    """A file of torch.save, packed again by another method."""
    whole = io.BytesIO()
    torch.save(tensors, whole)
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w", method) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name), compresslevel=1)
    return path


def test_a_packed_checkpoint(tmp_path):
    path = packed_pth(tmp_path / "nnet_ema.pth", {"a": torch.zeros(160 * MIB // 4)})
    assert path.stat().st_size < MIB
    with refused(path, "it is compressed"):
        load_checkpoint(path)
    with Peak() as peak:
        torch.load(path, weights_only=True)
    assert peak.grown > 150 * MIB, "the attack is a real one"


def test_members_that_overlap(tmp_path):
    """One storage of a MiB by 500 names: the archive claims 500 MiB."""
    path = tmp_path / "nnet_ema.pth"
    torch.save({str(i): torch.zeros(1) for i in range(500)}, path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_STORED) as archive:
        archive.writestr("large", bytes(MIB))
        large = archive.getinfo("large")
        for info in archive.infolist():
            if "/data/" in info.filename:
                info.header_offset, info.CRC = large.header_offset, large.CRC
                info.compress_size = info.file_size = MIB
        archive._didModify = True
    with refused(path, "claim more than it holds"):
        load_checkpoint(path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_a_shape_beyond_the_storage(tmp_path, zipped):
    path = tmp_path / "nnet_ema.pth"
    torch.save({"a": torch.zeros(1).expand(2**30, 2**30)}, path,
               _use_new_zipfile_serialization=zipped)  # fmt: skip
    with refused(path, "claims more than its 1 numbers"):
        load_checkpoint(path)


def test_an_object_that_torch_makes_as_large_as_asked(tmp_path):
    """bytearray is on torch's list of what weights may call."""
    path, huge = tmp_path / "nnet_ema.pth", b"cbuiltins\nbytearray\nJ\0\0\0\x40\x85R."
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", huge)
    with refused(path, "asks for builtins.bytearray"):
        load_checkpoint(path)


def test_a_safetensors_header_beyond_the_file(tmp_path):
    path = tmp_path / "nnet_ema.safetensors"
    for claimed in (2**60, 2**40, 10**8):
        path.write_bytes(struct.pack("<Q", claimed) + b"{}")
        with refused(path, "damaged or no safetensors file"):
            load_checkpoint(path)


@pytest.mark.parametrize(
    "key, value",
    [("nnet.dim", 65536), ("nnet.dim", 2**60), ("nnet.depth", 255), ("nnet.depth", 10**9 + 1),
     ("nnet.input_size", 16384), ("nnet.num_classes", 2**24), ("nnet.mamba.expand", 1024),
     ("nnet.mamba.d_state", 1024), ("nnet.patch_size", 16384), ("sample.sample_steps", 2**40),
     ("ug_m", 2**40)],
)  # fmt: skip
def test_a_config_that_asks_for_a_huge_network(tmp_path, key, value):
    """sample.py builds what the config.json beside the weights says."""
    fuzzing.make_checkpoint(tmp_path)
    path = tmp_path / "4.ckpt" / "config.json"
    config = json.loads(path.read_text())
    *sections, name = key.split(".")
    section = config
    for part in sections:
        section = section[part]
    section[name] = value
    if key == "nnet.patch_size":
        section["input_size"] = value
    path.write_text(json.dumps(config))
    with refused(path, "is not the config of a run|parameters that .* asks for", mib=300):
        config_beside(tmp_path / "4.ckpt")


@pytest.mark.parametrize("name", ["pos_embed", "patch_embed.weight", "head.weight"])
def test_weights_whose_resizing_would_multiply_them(tmp_path, name):
    """Position tables and patches are fitted to the network: wide ones would become wider still."""
    model, path = fuzzing.tiny_model(), tmp_path / "nnet_ema.safetensors"
    shape = {"pos_embed": (1, 3, 2**20), "patch_embed.weight": (2**19, 1, 1, 1),
             "head.weight": (2**19, 2)}[name]  # fmt: skip
    save_file({**model.state_dict(), name: torch.zeros(shape)}, path)
    with refused(path, f"{name} .* instead of"):
        load_into(model, path)


# ---------------------------------------------------------------------------------------------
# Pickles

DEEP = b"}" + b")" + b"\x85" * 300_000 + b"Ns."  # {((((...),),),): None}
# [f(*args), f(*args), ...], 50,000 times, of a function and arguments that are written once.
CALL, AGAIN = b"](%bq\1", b"q\0R" + b"h\1h\0R" * 50_000 + b"e."
PAIRS = b"".join(b"(I%d\nNl" % i for i in range(10_000))
MAKES = "calls make more than it holds"
PICKLES = {
    "a memo index": (b"}r\0\0\0\x01.", None),  # a table of 2^25 entries; at 2^32, of 64 GiB
    "a deep key": (DEEP, "other keys than text"),
    "a million dicts": (b"(" + b"}" * 1_100_000 + b"l.", "more than 1000000 opcodes"),
    "sets": (b"(" + b"\x8f" * 900_000 + b"l.", "opcode EMPTY_SET"),
    "bytes that are not there": (b"\x8e" + struct.pack("<Q", 2**40) + b".", "but only"),
    "text that is not there": (b"X" + struct.pack("<I", 2**31) + b"x.", "but only"),
    "bytes of one text": (CALL % b"c_codecs\nencode\n" + b"X" + struct.pack("<I", 20_000)
                          + b"x" * 20_000 + b"X\6\0\0\0latin1\x86" + AGAIN, MAKES),
    "dicts of one list": (CALL % b"ccollections\nOrderedDict\n" + b"](" + PAIRS + b"e\x85" + AGAIN,
                          MAKES),
    "a buffer": (b"\x96" + struct.pack("<Q", 2**33) + b".", "but only"),
}  # fmt: skip


def test_sizes_of_one_long_list(tmp_path):
    """Each call a tuple of its own: 50,000 of 10,000 numbers."""
    numbers = b"](" + b"K\1" * 10_000 + b"e\x85"
    path, data = tmp_path / "nnet_ema.pth", CALL % b"ctorch\nSize\n" + numbers + AGAIN
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", data)
    with refused(path, "besides tensors and plain values", mib=64):
        load_checkpoint(path)


@pytest.mark.parametrize("kind", PICKLES)
def test_pickles(tmp_path, kind):
    data, says = PICKLES[kind]
    path = tmp_path / "0.npy"
    with open(path, "wb") as file:
        header = {"descr": "|O", "fortran_order": False, "shape": (2,)}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(data)
    with refused(path, "holds no moments and label", mib=250):
        read_feature_file(path)
    if says is None:
        assert pickled.load(data) == {}
    else:
        with pytest.raises(Exception, match=says):  # noqa: B017 - almost any kind
            pickled.load(data)


def test_the_pickles_are_real_attacks():
    with Peak() as peak:
        pickle.loads(PICKLES["a memo index"][0])
    if sys.version_info < (3, 14):
        assert peak.grown > 200 * MIB
    crash = f"import pickle; pickle.loads({DEEP[:2]!r} + b'\\x85' * 300_000 + b'Ns.')"
    done = subprocess.run([sys.executable, "-c", crash], capture_output=True, timeout=60)
    assert done.returncode != 0


# ---------------------------------------------------------------------------------------------
# Arrays


def npy_header(shape, descr="<f8"):
    file = io.BytesIO()
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_packed_statistics(tmp_path, monkeypatch, method):
    """64 MiB from a few KiB, where 16 are allowed; numpy reads them all."""
    monkeypatch.setattr(metrics, "MAX_STATISTICS_BYTES", 16 * MIB)
    path = tmp_path / "stats.npz"
    with zipfile.ZipFile(path, "w", method, compresslevel=1) as archive:
        archive.writestr("mu.npy", npy_header((8,)) + bytes(64))
        archive.writestr("sigma.npy", npy_header((8 * MIB,)) + bytes(64 * MIB))
    with refused(path, "more than 15 MiB|another method"):
        metrics.load_statistics(path, extractor="x", resolution=8)
    with Peak() as peak, np.load(path) as file:
        file["sigma"]
    assert peak.grown > 60 * MIB, "the attack is a real one"


@pytest.mark.parametrize("kind", ["statistics", "latents", "sparse file"])
def test_a_long_npy_header(tmp_path, kind):
    """numpy reads what its length claims, up to 4 GiB, before it looks at it."""
    size = 256 * MIB
    start = b"\x93NUMPY\x02\x00" + size.to_bytes(4, "little")
    path = tmp_path / ("0.npy" if kind == "sparse file" else "0.npy.npz")
    if kind == "sparse file":
        path.write_bytes(start)
        os.truncate(path, len(start) + size)
    else:
        name = "mu.npy" if kind == "statistics" else "z.npy"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            with archive.open(name, "w") as file:
                file.write(start)
                for _ in range(size // MIB):
                    file.write(b" " * MIB)
    with refused(path, f"header claims {size} bytes"):
        if kind == "statistics":
            metrics.load_statistics(path, extractor="x", resolution=8)
        else:
            read_feature_file(path)


def test_a_short_array_in_a_long_member(tmp_path):
    """bzip2 unpacks a piece as a whole: 8 numbers would cost what the member holds."""
    path = tmp_path / "0.npy.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("z.npy", npy_header((2, 2, 2), "<f4") + bytes(64 * MIB))
        archive.writestr("label.npy", npy_header((), "<i8") + bytes(8))
    with refused(path, "another method"):
        read_feature_file(path)


@pytest.mark.parametrize("shape", [(2**60,), (2**31, 2**31), (2**70,), (10**18, 10**18, 10**18)])
def test_absurd_shapes(tmp_path, shape):
    latents, statistics = tmp_path / "0.npy", tmp_path / "stats.npz"
    latents.write_bytes(npy_header(shape, "<f4"))
    with refused(latents, "claims to be of shape"):
        read_feature_file(latents)
    with zipfile.ZipFile(statistics, "w") as archive:
        archive.writestr("mu.npy", npy_header(shape))
    with refused(statistics, "claims to be of shape"):
        metrics.load_statistics(statistics, extractor="x", resolution=8)


def test_json(tmp_path):
    path = tmp_path / "manifest.json"
    for text, says in (
        ("[" * 100_000, "not valid JSON"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "not valid JSON"),
        ("[" + "9" * 100_000 + "]", "not valid JSON"),
    ):
        path.write_text(text)
        with refused(path, says):
            read_json(path)
    with open(path, "wb") as file:
        file.truncate(MAX_JSON_BYTES * 100)
    with refused(path, "over 16 MiB", mib=2 * MAX_JSON_BYTES // MIB):
        read_json(path)


# ---------------------------------------------------------------------------------------------
# CIFAR-10


def write_archive(folder, *members):
    path = folder / "cifar-10-python.tar.gz"
    with gzip.open(path, "wb", 1) as file:
        for header, size in members:
            header.size = size
            file.write(header.tobuf(tarfile.USTAR_FORMAT))
            for _ in range(size // MIB):
                file.write(b" " * MIB)
    return path


@pytest.mark.parametrize(
    "kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK]
)
def test_a_long_header_of_an_archive(tmp_path, kind):
    header = tarfile.TarInfo("x")
    header.type = kind
    path = write_archive(tmp_path, (header, 100 * MIB))
    assert path.stat().st_size < MIB
    with refused(path, "lacks data_batch_1"):
        get_dataset("cifar10", path=tmp_path)
    with Peak() as peak, contextlib.suppress(tarfile.TarError), tarfile.open(path) as archive:
        archive.next()
    assert peak.grown > 90 * MIB, "the attack is a real one"


def test_a_member_that_unpacks_to_more_than_allowed(tmp_path):
    name = "cifar-10-batches-py/data_batch_1"
    path = write_archive(tmp_path, (tarfile.TarInfo(name), cifar10.MAX_BYTES))
    with refused(path, "unpacks to more than 512 MiB"):
        get_dataset("cifar10", path=tmp_path)


# ---------------------------------------------------------------------------------------------
# Images


def read_image(path, resolution=8):
    return images.read_image(path, lambda image: images.center_crop(image, resolution))


def png_chunk(kind, content):
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def write_png(path, width, height, rows, *chunks, depth=8, color=2):
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + b"".join(chunks)
        + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")
    )  # fmt: skip
    return path


@pytest.mark.parametrize("side", [13_000, 60_000, 2**31 - 1])
def test_an_image_of_too_many_pixels(tmp_path, side):
    path = write_png(tmp_path / "a.png", side, side, zlib.compress(b""))
    with Peak() as peak, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises((ValueError, Image.DecompressionBombError)):
            read_image(path)
    assert peak.grown < 32 * MIB


def test_packed_text_beside_an_image(tmp_path):
    large = zlib.compress(bytes(128 * MIB), 1)
    rows = zlib.compress(bytes(8 * (1 + 3 * 8)))
    for name, content in ((b"zTXt", b"a\0\0" + large), (b"iCCP", b"a\0\0" + large)):
        path = write_png(tmp_path / "a.png", 8, 8, rows, png_chunk(name, content))
        with Peak() as peak, contextlib.suppress(ValueError, OSError):
            read_image(path)
        assert peak.grown < 32 * MIB


@pytest.mark.slow
@pytest.mark.parametrize("depth, color", [(8, 6), (16, 0), (8, 3), (16, 2), (1, 0)])
def test_the_largest_image_that_is_read(tmp_path, depth, color):
    width, height = 16384, images.MAX_PIXELS // 16384
    samples = {0: 1, 2: 3, 3: 1, 6: 4}[color]
    pack, row = zlib.compressobj(1), bytes(1 + width * depth * samples // 8)
    rows = b"".join(pack.compress(row) for _ in range(height)) + pack.flush()
    palette = [png_chunk(b"PLTE", bytes(3)), png_chunk(b"tRNS", b"\0")] if color == 3 else []
    path = write_png(tmp_path / "a.png", width, height, rows, *palette, depth=depth, color=color)
    with Peak() as peak, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        assert read_image(path, 64).shape == (3, 64, 64)
    print(f"{depth} bit, color type {color}: {peak.grown / MIB:.0f} MiB")
    assert peak.grown < 3 * 1024 * MIB


def test_another_kind_of_file_by_the_name_of_an_image(tmp_path):
    """PIL hands PostScript to Ghostscript, whatever the file's name is."""
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(path, format="EPS")
    assert Image.open(path).format == "EPS", "the attack is a real one"
    with pytest.raises(OSError, match="cannot identify"):
        read_image(path)


@pytest.mark.filterwarnings("ignore:unreadable image")
def test_a_pipe_by_the_name_of_an_image(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    dataset = get_dataset("folder", path=tmp_path, resolution=8, labels=False)
    with fuzzing.time_limit(60):
        assert dataset[0, 0][0].shape == (3, 8, 8)
    assert dataset.unreadable == {0: "no plain file"}


def test_links_in_circles(tmp_path):
    """Two links to the folder above them: os.walk would follow 2^40 paths."""
    folder = tmp_path / "a"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "x.png")
    for name in ("l", "m"):
        (folder / name).symlink_to(tmp_path)
    with fuzzing.time_limit(60):
        assert images.list_images(tmp_path) == ["a/x.png"]


def test_links_that_double(tmp_path):
    """Each of 30 folders holds two links to the next one: 2^30 paths to one image."""
    for i in range(30):
        (tmp_path / str(i)).mkdir()
        for name in ("l", "m"):
            (tmp_path / str(i) / name).symlink_to(f"../{i + 1}")
    (tmp_path / "30").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "30" / "x.png")
    with fuzzing.time_limit(60):
        (found,) = images.list_images(tmp_path)
    assert found.endswith("x.png")


# ---------------------------------------------------------------------------------------------
# Names that lead away


def edit_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "shard-00001.bin"])
def test_a_manifest_of_latents_names_only_our_files(tmp_path, name):
    folder = tmp_path / "latents"
    folder.mkdir()
    fuzzing.make_shards(folder)
    (tmp_path / "secret").write_bytes(bytes(768))
    for key in ("shards", "labels"):
        whole = (folder / "manifest.json").read_text()
        edit_json(folder / "manifest.json", lambda manifest, key=key: (
            manifest["shards"][0] if key == "shards" else manifest["labels"]
        ).update(file=name))  # fmt: skip
        with refused(folder, "expected"):
            fuzzing.read_shards(folder)
        (folder / "manifest.json").write_text(whole)


@pytest.mark.parametrize("name", ["shard-00000.bin", "labels.bin"])
def test_links_in_a_folder_of_latents_are_not_followed(tmp_path, name):
    folder = tmp_path / "latents"
    folder.mkdir()
    fuzzing.make_shards(folder)
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with refused(folder, "is a link or no plain file"):
        fuzzing.read_shards(folder)


def test_a_manifest_of_a_checkpoint_names_only_our_files(tmp_path):
    """What else it names is neither read nor needed; what is missing from it is said."""
    fuzzing.make_checkpoint(tmp_path)
    manifest = tmp_path / "4.ckpt" / "manifest.json"
    entry = {"size": 1, "sha256": "x"}
    edit_json(manifest, lambda value: value["files"].update({"../../etc/passwd": entry}))
    fuzzing.read_checkpoint(tmp_path)
    edit_json(manifest, lambda value: value["files"].pop("training.pt"))
    with refused(manifest, "not all of"):
        fuzzing.read_checkpoint(tmp_path)


def test_states_of_an_extraction_name_only_its_images(tmp_path):
    """A label beyond the list, or one that another file's name would be."""
    for stand_ins in ({"0": 5}, {"4": 0}, {"0": "1"}, {"../x": 1}, {"0": True}):
        folder = tmp_path / str(stand_ins).replace("/", "_")
        folder.mkdir()
        fuzzing.make_shards(folder, progress_only=True)
        edit_json(folder / ".progress" / "00000.json",
                  lambda state, stand_ins=stand_ins: state.update(stand_ins=stand_ins))  # fmt: skip
        packing = fuzzing.Packing(folder, fuzzing.latent_settings())
        packing.begin()
        assert packing.missing() == [0]


def test_a_pipe_by_the_name_of_latents(tmp_path):
    os.mkfifo(tmp_path / "0.npy")
    with fuzzing.time_limit(60), pytest.raises(UserError, match="no plain file"):
        read_feature_file(tmp_path / "0.npy")
