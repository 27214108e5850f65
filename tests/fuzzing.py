"""Hostile files by the thousand: for each format that is read a small whole sample, its reader as
the scripts use it, and changes to its bytes and to what is packed in them.

    python tests/fuzzing.py --cases=2000 --seed=1

prints a table: for each format how many changed files were read and how many refused by a sentence;
and every finding: another exception than UserError, a sentence without the file's name, a hang.
tests/test_fuzz.py runs a few cases of each.
"""

import argparse
import contextlib
import gzip
import io
import json
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
import tarfile
import tempfile
import time
import traceback
import types
import warnings
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

import utils
from datasets import get_dataset
from libs.data.autoencoder import load_autoencoder
from libs.data.latent_writer import Packing, ShardWriter, make_settings
from libs.data.latents import Features
from libs.data.official_latents import open_features
from libs.evaluate import metrics
from libs.evaluate.image_store import ImageStore, create, pending
from libs.evaluate.run import require_own_place
from libs.files import sha256_of
from libs.model.build import build_model, config_beside, load_into
from libs.model.published import to_official
from libs.runtime import flags
from libs.train import checkpoint
from libs.train.resume import resume
from utils import UserError

ROOT = Path(__file__).resolve().parents[1]
CONFIG = f"--config={ROOT}/configs/digits_T_DiM.py"
TINY = ["--config.nnet.dim=4", "--config.nnet.depth=3", "--config.nnet.mamba.d_state=2"]
HANG_S = 60


# ------------------------------------------------------------ changes to bytes


def _numbers(rng):
    """Bytes of a number that a length, an offset or a shape should not be."""
    value = rng.choice([0, 1, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**60, 2**63 - 1])
    return struct.pack(rng.choice("<>") + "Q", value)[: rng.choice([1, 2, 4, 8])]


def _change(rng, data):
    place = rng.randrange(len(data) + 1)
    size = min(rng.choice([1, 1, 2, 8, 64, 1000]), len(data) - place)
    middle = data[place : place + size]
    replaced = rng.choice([
        lambda: bytes(byte ^ 1 << rng.randrange(8) for byte in middle),
        lambda: rng.randbytes(size),
        lambda: bytes(size),
        lambda: b"",
        lambda: middle * rng.choice([2, 3, 50]),
        lambda: _numbers(rng),
        lambda: middle + rng.randbytes(rng.choice([1, 100])),
    ])()  # fmt: skip
    return data[:place] + replaced + data[place + size :]


def change_bytes(rng, data):
    """One to three changes, or the file cut short."""
    if rng.random() < 0.15:
        return data[: rng.randrange(len(data) + 1)]
    for _ in range(rng.choice([1, 1, 2, 3])):
        data = _change(rng, data)
    return data


# ------------------------------------------------------------ changes to what bytes hold

_VALUES = (
    None, True, -1, 0, 1, 2**31, 2**63, 2**70, -(2**63), 0.5, -1.0, 1e308, float("nan"),
    float("inf"), "", "x", "..", "../../etc/passwd", "/etc/passwd", "nnet.safetensors\0", "9" * 99,
    "UserError: all is well", "\x1b[2J", [], {}, [1], [[]], {"a": {"b": 1}}, ["a", 1, None],
)  # fmt: skip


def change_json(rng, value):
    """A JSON value with one node of it replaced, removed, or doubled."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.1:
        return rng.choice(_VALUES)
    value = dict(value) if isinstance(value, dict) else list(value)
    key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    way = rng.random()
    if way < 0.1:
        del value[key]
    elif way < 0.2 and isinstance(value, list):
        value.append(value[key])
    elif way < 0.2:
        value[rng.choice(["", "..", "a.b", "name", "__class__"])] = value[key]
    else:
        value[key] = change_json(rng, value[key])
    return value


def change_json_file(rng, data):
    return json.dumps(change_json(rng, json.loads(data))).encode()


def change_zip(rng, data):
    """One member changed, its checksum right again; sometimes packed in another way."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        chosen = rng.choice(old.namelist())
        methods = [zipfile.ZIP_STORED] * 6 + [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2]
        with zipfile.ZipFile(out, "w", rng.choice(methods)) as new:
            for name in old.namelist():
                content = old.read(name)
                if name == chosen and rng.random() < 0.1:
                    continue
                new.writestr(name, change_bytes(rng, content) if name == chosen else content)
    return out.getvalue()


def change_safetensors(rng, data):
    """The header's JSON changed, its length right again."""
    size = int.from_bytes(data[:8], "little")
    header = change_json_file(rng, data[8 : 8 + size])
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def change_gzip(rng, data):
    return gzip.compress(change_bytes(rng, gzip.decompress(data)), 1)


def change_png(rng, data):
    """One chunk changed, its checksum right again."""
    chunks, place = [], 8
    while place < len(data):
        size = int.from_bytes(data[place : place + 4], "big")
        chunks.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + size]))
        place += 12 + size
    chosen = rng.randrange(len(chunks))
    kind, content = chunks[chosen]
    if kind == b"IDAT" and rng.random() < 0.5:
        content = zlib.compress(change_bytes(rng, zlib.decompress(content)))
    else:
        content = change_bytes(rng, content)
    chunks[chosen] = (kind, content)
    return data[:8] + b"".join(
        struct.pack(">I", len(content)) + kind + content
        + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )  # fmt: skip


# ------------------------------------------------------------ samples and readers


def config_of(*words):
    """The tiny network's config, from a command line."""
    spec = {"config": (flags.config_file, flags.REQUIRED, "")}
    return flags.parse_flags(["x.py", CONFIG, *TINY, *words], spec).config


def tiny_model():
    return build_model(config_of().nnet, seed=0)


def make_pth(folder, zipped=True):
    torch.save(to_official(tiny_model()), folder / "nnet_ema.pth",
               _use_new_zipfile_serialization=zipped)  # fmt: skip


def read_weights(folder, name="nnet_ema.pth"):
    load_into(tiny_model(), folder / name)


def make_safetensors(folder):
    save_file(tiny_model().state_dict(), folder / "nnet_ema.safetensors")


def optimizer_of(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def make_checkpoint(folder):
    model = tiny_model()
    state = {"optimizer": optimizer_of(model).state_dict(), "scaler": {},
             "progress": {"step": 4, "batch": 4, "bad_in_a_row": 0}}  # fmt: skip
    weights = model.state_dict()
    checkpoint.save(folder, 4, nnet=weights, ema=weights, training_state=state,
                    config=config_of().to_dict(), keep_last=None)  # fmt: skip


def forge_manifest(folder):
    """Make size and checksums of a checkpoint's manifest agree with its files, as an attacker."""
    with contextlib.suppress(Exception):
        path = folder / "4.ckpt" / "manifest.json"
        manifest = json.loads(path.read_text())
        for name, entry in manifest["files"].items():
            file = path.with_name(name)
            entry.update(size=file.stat().st_size, sha256=sha256_of(file))
        path.write_text(json.dumps(manifest))


def read_checkpoint(folder):
    """As a training that goes on, and as sample.py, which takes the network from config.json."""
    path = folder / "4.ckpt"
    model = tiny_model()
    precision = types.SimpleNamespace(scaler=torch.amp.GradScaler("cpu", enabled=False))
    optimizer = optimizer_of(model)
    refusals = []
    for read in (
        lambda: resume((path, 4), model, types.SimpleNamespace(model=tiny_model()),
                       optimizer, precision),
        optimizer.step,
        lambda: load_into(build_model(config_beside(path).nnet), path),
    ):  # fmt: skip
        try:
            read()
        except UserError as error:
            check_sentence(error, folder)
            refusals.append(error)
    if refusals:
        raise refusals[0]


def moments(count):
    return np.random.default_rng(0).standard_normal((count, 8, 4, 4)).astype(np.float16)


def make_npy(folder):
    for i, record in enumerate(moments(2)):
        np.save(folder / f"{i}.npy", record)


def pair_bytes(pair):
    """A pickled (moments, label), as np.save of numpy before 1.24 wrote it."""
    both = np.empty(2, object)
    both[:] = pair
    file = io.BytesIO()
    header = {"descr": "|O", "fortran_order": False, "shape": (2,)}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + pickle.dumps(both, protocol=3)


def make_pairs(folder):
    for i, record in enumerate(moments(2)):
        (folder / f"{i}.npy").write_bytes(pair_bytes((record, np.int64(i))))


def make_npz_latents(folder):
    for i, record in enumerate(moments(2)):
        np.savez(folder / f"{i}.npy", z=record, label=np.int64(i))


def read_latents(folder):
    features = open_features(folder)
    features.read_labelled([1, 0], np.zeros(2, bool))


def make_shards(folder, progress_only=False):
    packing = Packing(folder, latent_settings())
    packing.begin()
    for number in packing.missing():
        with ShardWriter(packing, number) as writer:
            writer.write(moments(5)[packing.images(number).start : packing.images(number).stop])
            writer.commit({str(packing.images(number).start): 1})
    if not progress_only:
        packing.finish(np.array([0, 1, 1, 0, 1]))


def latent_settings():
    return make_settings(
        record_shape=(8, 4, 4), scale_factor=0.18215, resolution=32, flips=False,
        autoencoder_sha256="a" * 64, precision="fp32", crop="centre crop", source="folder",
        images_sha256="b" * 64, num_images=5, images_per_shard=3, class_names=("ant", "bee"),
    )  # fmt: skip


def read_shards(folder):
    features = Features(folder)
    features.read_labelled([4, 0], np.zeros(2, bool))
    features.verify()


def read_progress(folder):
    """As an extraction that goes on: states that are none are made again."""
    packing = Packing(folder, latent_settings())
    packing.begin()
    if not packing.missing():
        packing.finish(np.array([0, 1, 1, 0, 1]))


def make_statistics(folder):
    metrics.save_statistics(
        folder / "stats.npz", mu=np.zeros(4), sigma=np.eye(4), count=9, extractor="x",
        resolution=8, preprocessing="none", features=np.zeros((6, 4)),
    )  # fmt: skip


def read_statistics(folder):
    metrics.load_statistics(folder / "stats.npz", extractor="x", resolution=8, dim=4)


def image_maker(extension, mode="RGB", **options):
    def make(folder):
        pixels = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
        for name in ("a", "b"):
            image = Image.fromarray(pixels).convert(mode)
            image.save(folder / f"{name}.{extension}", **options)

    return make


def read_images(folder):
    dataset = get_dataset("folder", path=folder, resolution=8, labels=False)
    for index in range(2):
        x, _ = dataset[0, index]
        assert x.shape == (3, 8, 8) and x.isfinite().all()


def cifar_batch(number):
    rng = np.random.default_rng(number)
    data = rng.integers(256, size=(2, 3072), dtype=np.uint8)
    return pickle.dumps({b"labels": [1, 2], b"data": data, b"filenames": [b"x", b"y"]}, protocol=2)


CIFAR_FILES = [f"data_batch_{number}" for number in range(1, 6)]


def make_cifar(folder):
    (folder / "cifar-10-batches-py").mkdir()
    for number, name in enumerate(CIFAR_FILES):
        (folder / "cifar-10-batches-py" / name).write_bytes(cifar_batch(number))


def make_cifar_archive(folder):
    with tarfile.open(folder / "cifar-10-python.tar.gz", "w:gz", compresslevel=1) as tar:
        for number, name in enumerate(CIFAR_FILES):
            header = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            header.size = len(data := cifar_batch(number))
            tar.addfile(header, io.BytesIO(data))


def read_cifar(folder):
    get_dataset("cifar10", path=folder)[0, 0]


ARRAYS = {"features": ((4, 3), np.float32), "done": ((4,), np.uint8),
          "pixels": ((4, 2, 2, 3), np.uint8)}  # fmt: skip
RECIPE = {"seed": 1, "weights": {"file": "x", "sha256": "y"}, "nnet": {"dim": [1, 2]}}


def make_store(folder):
    (folder / "store").mkdir()
    create(folder / "store", RECIPE, ARRAYS)
    utils.write_json(folder / "result.json", {**RECIPE, "frechet_distance": 1.0})


def read_store(folder):
    """As an evaluation that goes on."""
    require_own_place(folder / "result.json", folder / "store", None, RECIPE)
    create(folder / "store", RECIPE, ARRAYS)
    todo = pending(folder / "store", 2)
    store = ImageStore(folder / "store")
    for indices in todo:
        store.write(indices, torch.zeros(2, 3), None, torch.zeros(2, 3, 2, 2, dtype=torch.uint8))
    assert store.features.read().shape == (4, 3) and 0 <= store.agreement() <= 1


def make_autoencoder(folder):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    network = AutoencoderKL(
        block_out_channels=(32,), down_block_types=("DownEncoderBlock2D",), layers_per_block=1,
        up_block_types=("UpDecoderBlock2D",),
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    save_file(network.half().state_dict(), folder / "diffusion_pytorch_model.safetensors")


class Format(NamedTuple):
    """make(folder) writes a sample that read(folder) takes; `changes`: file -> ways to change it;
    after(folder) is called on half of the changed samples.
    """

    make: object
    read: object
    changes: dict
    after: object = None


_JSON, _BYTES = (change_json_file, change_json_file, change_bytes), (change_bytes,)
_ZIP, _SAFE = (change_zip, change_zip, change_bytes), (change_safetensors, change_bytes)


def _image(extension, *ways, **options):
    changes = {f"a.{extension}": ways or _BYTES}
    return Format(image_maker(extension, **options), read_images, changes)


FORMATS = {
    "official .pth": Format(make_pth, read_weights, {"nnet_ema.pth": _ZIP}),
    "official .pth, old": Format(
        lambda folder: make_pth(folder, zipped=False), read_weights, {"nnet_ema.pth": _BYTES}
    ),
    "safetensors": Format(
        make_safetensors, lambda folder: read_weights(folder, "nnet_ema.safetensors"),
        {"nnet_ema.safetensors": _SAFE},
    ),
    "checkpoint directory": Format(
        make_checkpoint, read_checkpoint,
        {"4.ckpt/manifest.json": _JSON, "4.ckpt/config.json": _JSON, "4.ckpt/training.pt": _ZIP,
         "4.ckpt/nnet.safetensors": _SAFE, "4.ckpt/nnet_ema.safetensors": _SAFE},
        forge_manifest,
    ),
    "latents .npy": Format(make_npy, read_latents, {"1.npy": _BYTES}),
    "latents .npy, pickled": Format(make_pairs, read_latents, {"1.npy": _BYTES}),
    "latents .npz": Format(make_npz_latents, read_latents, {"1.npy.npz": _ZIP}),
    "latent shards": Format(
        make_shards, read_shards,
        {"manifest.json": (*_JSON, *_JSON), "labels.bin": _BYTES, "shard-00001.bin": _BYTES},
    ),
    "extraction in progress": Format(
        lambda folder: make_shards(folder, progress_only=True), read_progress,
        {f".progress/{name}.json": _JSON for name in ("plan", "00000", "00001")},
    ),
    "FID statistics": Format(make_statistics, read_statistics, {"stats.npz": _ZIP}),
    "PNG": _image("png", change_png, change_png, change_bytes),
    "PNG, 16 bit": _image("png", change_png, mode="I;16"),
    "JPEG": _image("jpg"), "WebP": _image("webp"), "TIFF": _image("tiff", compression="tiff_lzw"),
    "BMP": _image("bmp"), "PPM": _image("ppm"),
    "CIFAR-10 pickles": Format(
        make_cifar, read_cifar, {"cifar-10-batches-py/data_batch_2": _BYTES}
    ),
    "CIFAR-10 archive": Format(
        make_cifar_archive, read_cifar,
        {"cifar-10-python.tar.gz": (change_gzip, change_gzip, change_bytes)},
    ),
    "image store": Format(
        make_store, read_store,
        {"store/features.npy": _BYTES, "store/done.npy": _BYTES, "store/pixels.npy": _BYTES,
         "store/recipe.json": _JSON, "result.json": _JSON},
    ),
    "autoencoder": Format(
        make_autoencoder, load_autoencoder,
        {"config.json": _JSON, "diffusion_pytorch_model.safetensors": _SAFE},
    ),
}  # fmt: skip


# ------------------------------------------------------------ running


class Finding(AssertionError):
    """What must not happen."""


class _Hang(BaseException):
    pass


@contextlib.contextmanager
def time_limit(seconds):
    def stop(*_):
        raise _Hang

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def check_sentence(error, folder):
    """A UserError must name the file, or the folder that it is in."""
    if str(folder) not in str(error):
        raise Finding(f"a sentence without the file's name: {error}")


def outcome(read, folder):
    """'read' or 'refused'; Finding for anything else."""
    try:
        with warnings.catch_warnings(), time_limit(HANG_S):
            warnings.simplefilter("ignore")
            read(folder)
    except UserError as error:
        check_sentence(error, folder)
        return "refused"
    except Finding:
        raise
    except _Hang as error:
        raise Finding(f"no answer in {HANG_S} s") from error
    except BaseException as error:
        raise Finding(f"{type(error).__name__}: {error}\n{traceback.format_exc()}") from error
    return "read"


class Fuzzer:
    """Cases of one format in a folder of its own; each is keyed by (seed, number)."""

    def __init__(self, name, folder):
        self.name, self.format, self.folder = name, FORMATS[name], Path(folder)
        self.sample, self.work = self.folder / "sample", self.folder / "work"
        self.sample.mkdir()
        self.format.make(self.sample)
        self.reset()
        self.format.read(self.work)  # the sample is whole: what is refused is refused for a change

    def reset(self):
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.sample, self.work)

    def case(self, seed, number):
        """'read' or 'refused'; Finding, with what reproduces it."""
        rng = random.Random(f"{self.name} {seed} {number}")
        self.reset()
        file = rng.choice(list(self.format.changes))
        way = rng.choice(self.format.changes[file])
        path = self.work / file
        path.write_bytes(way(rng, path.read_bytes()))
        if self.format.after and rng.random() < 0.7:
            self.format.after(self.work)
        try:
            return outcome(self.format.read, self.work)
        except Finding as error:
            raise Finding(f"{self.name}, seed {seed}, case {number}, {file}: {error}") from error


def table(rows, args):
    """Markdown of (format, Counter, seconds)."""
    total = sum(counts.total() for _, counts, _ in rows)
    found = sum(counts["findings"] for _, counts, _ in rows)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    lines = [
        f"`python tests/fuzzing.py --cases={args.cases} --seed={args.seed}`: {total:,} changed "
        f"files of {len(rows)} formats, {found} findings; at most {peak:.2f} GiB of memory in one "
        "process, Python and torch included. Read: to values of the right form; refused: by one "
        "sentence that names the file.", "",
        "| format | read | refused | findings | seconds |", "|---" * 5 + "|",
    ]  # fmt: skip
    for name, counts, seconds in rows:
        figures = [counts[key] for key in ("read", "refused", "findings")]
        lines.append("| " + " | ".join(map(str, [name, *figures, round(seconds)])) + " |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=500, help="of each format")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--format", choices=FORMATS, help="one only")
    parser.add_argument("--out", type=Path, help="a Markdown file for the table")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in [args.format] if args.format else FORMATS:
        counts, began = Counter(), time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            fuzzer = Fuzzer(name, folder)
            for number in range(args.cases):
                try:
                    counts[fuzzer.case(args.seed, number)] += 1
                except Finding as error:
                    counts["findings"] += 1
                    print(f"FINDING {error}", flush=True)
        rows.append((name, counts, time.monotonic() - began))
        print(f"{name}: {dict(counts)}", flush=True)
    print(table(rows, args))
    if args.out:
        args.out.write_text(table(rows, args), encoding="utf-8")
    sys.exit(any(counts["findings"] for _, counts, _ in rows))


if __name__ == "__main__":
    main()
