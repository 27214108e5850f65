"""Cached latents: packed shards and the official layouts, whole, damaged and hostile."""

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from datasets import get_dataset
from libs.data.latent_writer import Packing, ShardWriter, make_settings
from libs.data.latents import Features
from utils import UserError

SHAPE = (8, 4, 4)


def random_records(count, shape=SHAPE, seed=0):
    return np.random.default_rng(seed).standard_normal((count, *shape)).astype(np.float16)


def settings_for(num_images, shape=SHAPE, **changes):
    settings = dict(
        record_shape=shape, scale_factor=0.18215, resolution=8 * shape[-1], flips=True,
        autoencoder_sha256="a" * 64, precision="fp32", crop="centre crop", source="folder",
        images_sha256="b" * 64, num_images=num_images, images_per_shard=3,
        class_names=("ant", "bee"),
    )  # fmt: skip
    return make_settings(**{**settings, **changes})


def write_packed(folder, records, labels, **changes):
    """Shards of these records, with the settings of `settings_for`."""
    flips = changes.get("flips", True)
    if labels is None:
        changes["class_names"] = None
    num_images = len(records) // (1 + flips)
    packing = Packing(folder, settings_for(num_images, records.shape[1:], **changes))
    assert packing.begin() is False
    for number in packing.missing():
        images = packing.images(number)
        with ShardWriter(packing, number) as writer:
            writer.write(records[images.start * (1 + flips) : images.stop * (1 + flips)])
            writer.commit({})
    packing.finish(labels)
    return folder


@pytest.fixture
def packed(tmp_path):
    """Seven images, flipped too, in shards of three."""
    records, labels = random_records(14), np.array([0, 1, 1, 0, 1, 0, 1])
    return write_packed(tmp_path / "latents", records, labels)


def edit(folder, change):
    """Change the manifest's dict in place."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


# ------------------------------------------------------------ packed shards


def test_packed_records_are_read_as_written(packed):
    features, records = Features(packed), random_records(14)
    assert (len(features), features.num_images, features.shape) == (14, 7, SHAPE)
    assert features.labels.tolist() == [0, 1, 1, 0, 1, 0, 1] and features.num_classes == 2
    order = np.random.default_rng(1).integers(14, size=50)
    read = features.read(order)
    assert read.dtype == np.float16 and read.flags.c_contiguous and read.ctypes.data % 64 == 0
    np.testing.assert_array_equal(read, records[order])
    out = np.full((50, *SHAPE), np.nan, np.float16)
    assert features.read(order, out=out) is out
    np.testing.assert_array_equal(out, records[order])
    x, y = features.read_labelled([6, 0, 3], np.array([True, False, True]))
    np.testing.assert_array_equal(x, records[[13, 0, 7]])
    assert y.tolist() == [1, 0, 0]
    assert features.read([]).shape == (0, *SHAPE)
    for wrong in (14, -1):
        with pytest.raises(IndexError, match="records 0 to 13"):
            features.read([0, wrong])
    for wrong in (out, out[:2].astype(np.float32), np.empty((2, 4, 4, 8), np.float16).T):
        with pytest.raises(ValueError, match="out is .*, expected contiguous float16"):
            features.read([0, 1], out=wrong)


def test_what_is_read_is_a_copy(packed):
    features = Features(packed)
    before = {path: path.read_bytes() for path in packed.iterdir() if path.is_file()}
    features.read([0])[...] = 0
    features._shards[0][:100] = bytes(100)  # a private mapping: not even this reaches the file
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_pickled_reader_opens_the_files_again(packed):
    features = Features(packed)
    data = pickle.dumps(features)
    assert len(data) < 1000  # what spawned workers get
    np.testing.assert_array_equal(pickle.loads(data).read([5]), features.read([5]))


def test_the_shards_are_plain_numpy_files(packed):
    """As the README of a folder might say: no code of ours is needed."""
    shard = np.memmap(packed / "shard-00001.bin", "<f2").reshape(-1, *SHAPE)
    np.testing.assert_array_equal(shard, random_records(14)[6:12])
    assert np.fromfile(packed / "labels.bin", "<i8").tolist() == [0, 1, 1, 0, 1, 0, 1]


def set_key(*keys):
    *parents, last, value = keys

    def change(manifest):
        for key in parents:
            manifest = manifest[key]
        manifest[last] = value

    return change


MANIFESTS = {
    "parent": (set_key("shards", 0, "file", "../shard-00000.bin"), "shard 0 is .*'../shard"),
    "absolute": (set_key("shards", 0, "file", "/etc/passwd"), "shard 0 is .*'/etc/passwd'"),
    "another shard": (set_key("shards", 0, "file", "shard-00001.bin"), "expected .*00000.bin"),
    "labels elsewhere": (set_key("labels", "file", "../labels.bin"), "expected labels.bin"),
    "labels count": (set_key("labels", "bytes", 8), "expected labels.bin with 8 bytes an image"),
    "no labels": (set_key("labels", None), "labels and class_names do not agree"),
    "absurd shape": (set_key("record_shape", [8, 2**30, 2**30]), "absurdly large"),
    "negative shape": (set_key("record_shape", [8, -4, -4]), "is not .2C, h, w"),
    "odd channels": (set_key("record_shape", [7, 4, 4]), "is not .2C, h, w"),
    "flat shape": (set_key("record_shape", [128]), "is not .2C, h, w"),
    "shape of text": (set_key("record_shape", ["8", "4", "4"]), "is not .2C, h, w"),
    "another shape": (set_key("record_shape", [8, 4, 8]), "expected .*3072"),
    "dtype": (set_key("dtype", "object"), "format and dtype .*object"),
    "format": (set_key("format", "DiM latents 2"), "latents 2"),
    "no flips": (set_key("flips", False), "expected .*, 3, "),
    "flips of text": (set_key("flips", "yes"), "flips missing or of another type"),
    "count of truth": (set_key("num_images", True), "num_images missing or of another type"),
    "more images": (set_key("num_images", 9), "shard 2 is"),
    "far more images": (set_key("num_images", 10**15), "3 shards, expected"),
    "no images": (set_key("num_images", 0), "must be 1 or more"),
    "shard size": (set_key("images_per_shard", 0), "must be 1 or more"),
    "records": (set_key("shards", 1, "records", 5), "shard 1 is"),
    "bytes": (set_key("shards", 2, "bytes", 1), "shard 2 is"),
    "no checksum": (set_key("shards", 2, {"file": "shard-00002.bin"}), "entry 2 of shards lacks"),
    "shards": (set_key("shards", "all"), "shards missing or of another type"),
    "classes": (set_key("class_names", [1, 2]), "class_names are not text"),
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_manifest_that_cannot_be_is_refused(packed, kind):
    change, says = MANIFESTS[kind]
    edit(packed, change)
    with pytest.raises(UserError, match=f"manifest.json is damaged or not ours: .*{says}"):
        Features(packed)


@pytest.mark.parametrize("text", ["", "[1]", "{", "null", "{}"])
def test_a_manifest_that_is_none(packed, text):
    (packed / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="manifest.json is (damaged or not ours|not valid JSON)"):
        Features(packed)


def test_shards_that_disagree_with_the_manifest(packed, tmp_path):
    shard, original = packed / "shard-00001.bin", (packed / "shard-00001.bin").read_bytes()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(original)
    repair = "delete it and run scripts/extract_imagenet_feature.py again"
    for content in (original[:-1], b"", original + b"x"):
        shard.write_bytes(content)
        with pytest.raises(UserError, match=f"has {len(content)} bytes, but .* 1536; {repair}"):
            Features(packed)
    shard.unlink()
    with pytest.raises(UserError, match="cannot read .*00001.bin .No such file.*: run scripts/"):
        Features(packed)
    shard.symlink_to(elsewhere)
    with pytest.raises(UserError, match="00001.bin is a link or no plain file"):
        Features(packed)
    shard.unlink()
    shard.mkdir()
    with pytest.raises(UserError, match="00001.bin is a link or no plain file"):
        Features(packed)


@pytest.mark.parametrize("name", ["shard-00000.bin", "shard-00002.bin", "labels.bin"])
def test_a_flipped_bit_is_found_by_verify(packed, name, monkeypatch):
    Features(packed).verify()
    content = bytearray((packed / name).read_bytes())
    content[16] ^= 1
    (packed / name).write_bytes(content)
    seen = []
    features = Features(packed)  # sizes and labels are possible: only the checksum tells
    with pytest.raises(UserError, match=f"{name} is damaged: its SHA-256 .*delete it and run"):
        features.verify(seen.append)
    assert name not in seen
    monkeypatch.setenv("DIM_CHECK", "1")
    with pytest.raises(UserError, match=f"{name} is damaged"):
        Features(packed)


def test_labels_beyond_the_classes_are_refused(packed):
    np.array([0, 1, 2, 0, 0, 0, 0], "<i8").tofile(packed / "labels.bin")
    with pytest.raises(UserError, match="labels from 0 to 2, but manifest.json names 2 classes"):
        Features(packed)


def test_unfinished_and_missing_latents(packed, tmp_path):
    (packed / "manifest.json").unlink()
    with pytest.raises(UserError, match="unfinished: run scripts/extract.* again as before"):
        get_dataset("folder_features", path=packed)
    with pytest.raises(UserError, match="nowhere does not exist: make them with scripts/extract"):
        get_dataset("folder_features", path=tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="other has no manifest.json: make latents with"):
        get_dataset("folder_features", path=tmp_path / "other")


def test_a_shard_is_whole_or_absent(tmp_path):
    packing = Packing(tmp_path, settings_for(7))
    packing.begin()
    records = random_records(6)
    with pytest.raises(KeyboardInterrupt), ShardWriter(packing, 0) as writer:
        writer.write(records)
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="5 records in shard 0, expected 6"):
        with ShardWriter(packing, 0) as writer:
            writer.write(records[:5])
            writer.commit({})
    with ShardWriter(packing, 0) as writer, pytest.raises(ValueError, match="expected float16"):
        writer.write(records[:, :, :2])
    assert not list(tmp_path.glob("*shard*")) and packing.missing() == [0, 1, 2]
    with ShardWriter(packing, 0) as writer:
        writer.write(records[:1])
        writer.write(records[1:])
        writer.commit({})
    assert packing.missing() == [1, 2]
    (tmp_path / ".progress" / "00000.json").write_text("")  # as a loss of power may leave it
    assert packing.missing() == [0, 1, 2]


def test_a_shard_made_again_has_no_old_checksum(packed, monkeypatch):
    """Killed between the new file and its checksum, it is not taken for the old one."""
    manifest = Features(packed).manifest
    packing = Packing(packed, {key: manifest[key] for key in settings_for(7)})
    (packed / "shard-00000.bin").unlink()
    assert packing.begin() is False and packing.missing() == [0]
    assert not (packed / "manifest.json").exists(), "nobody reads it while it is made"
    monkeypatch.setattr(packing, "write_state", lambda number, state: 1 / 0)
    with pytest.raises(ZeroDivisionError), ShardWriter(packing, 0) as writer:
        writer.write(random_records(6, seed=9))  # as another GPU might round
        writer.commit({})
    assert (packed / "shard-00000.bin").exists() and packing.missing() == [0]


# ------------------------------------------------------------ data sets of latents


def test_items_are_moments_and_labels(packed):
    records, dataset = random_records(14), get_dataset("folder_features", path=packed)
    assert (len(dataset), dataset.shape, dataset.num_classes) == (7, SHAPE, 2)
    assert dataset.latent and dataset.scale_factor == 0.18215
    assert dataset.autoencoder_sha256 == "a" * 64 and dataset.preprocessing == "centre crop"
    for i in range(7):
        x, y = dataset[3, i]
        assert x.dtype == torch.float32 and x.shape == SHAPE and type(y) is np.int64
        np.testing.assert_array_equal(x, records[2 * i])
        assert y == dataset.labels[i]
    unlabelled = get_dataset("folder_features", path=packed, labels=False)
    assert unlabelled.labels is None and unlabelled.num_classes == 0 and unlabelled[0, 1][1] == 0
    assert not get_dataset("digits").latent


def test_a_data_loader_takes_batches(packed):
    dataset = get_dataset("folder_features", path=packed, random_flip=True)
    keys = [[(0, 6), (0, 2), (1, 2)], [(0, 0), (5, 1)]]
    for workers in (0, 1):
        batches = list(DataLoader(dataset, batch_sampler=keys, num_workers=workers))
        for (x, y), batch in zip(batches, keys, strict=True):
            assert x.dtype == torch.float32 and y.dtype == torch.int64
            for i, key in enumerate(batch):
                assert torch.equal(x[i], dataset[key][0]) and y[i] == dataset[key][1]


def test_the_same_draws_flip_latents_and_pixels(tmp_path):
    """Item i of latents is the flipped record exactly where item i of the images is flipped."""
    (tmp_path / "images").mkdir()
    for i in range(50):
        pixels = np.random.default_rng(i).integers(256, size=(4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i:02}.png")
    options = {"labels": False, "random_flip": True, "seed": 7}
    images = get_dataset("folder", path=tmp_path / "images", resolution=4, **options)
    plain = get_dataset("folder", path=tmp_path / "images", resolution=4, labels=False)
    records = np.zeros((100, *SHAPE), np.float16)
    records[1::2] = 1
    write_packed(tmp_path / "latents", records, None)
    latents = get_dataset("folder_features", path=tmp_path / "latents", **options)
    keys = [(epoch, i) for epoch in (0, 1, 9) for i in range(50)]
    keys += [(epoch, i) for i in range(50) for epoch in (3, 4)]  # across an end of an epoch
    expected = [not torch.equal(images[key][0], plain[key][0]) for key in keys]
    assert 90 < sum(expected) < 160
    assert [bool(x.all()) for x, _ in latents.__getitems__(keys)] == expected


def test_requests_that_latents_do_not_fit(packed, tmp_path):
    def refused(says, name="folder_features", path=packed, **options):
        with pytest.raises(UserError, match=says):
            get_dataset(name, path=path, **options)

    refused("of 32x32 pixels, but imagenet256_features is to have 256x256", "imagenet256_features")
    refused("of 32x32 pixels, but folder_features is to have 64x64", resolution=64)
    assert get_dataset("imagenet256_features", path=packed, resolution=32).shape == SHAPE
    refused("one split", train=False)
    records = random_records(5)
    single = write_packed(tmp_path / "single", records, None, flips=False)
    refused("have no records of flipped images: make them with --flip", path=single,
            labels=False, random_flip=True)  # fmt: skip
    refused("have no labels: train without classes", path=single)
    tall = write_packed(tmp_path / "tall", random_records(5, (8, 32, 64)), None, flips=False,
                        resolution=256)  # fmt: skip
    refused(r"the shape \(8, 32, 64\), but imagenet256_features has \(8, 32, 32\)",
            "imagenet256_features", tall, labels=False)  # fmt: skip
    large = write_packed(tmp_path / "large", random_records(2, (8, 64, 64)), None, flips=False)
    refused("512x512 pixels", "imagenet256_features", large, labels=False)
    assert get_dataset("imagenet512_features", path=large, labels=False).shape == (8, 64, 64)


# ------------------------------------------------------------ one file an image

IMAGENET = {"name": "imagenet256_features", "resolution": 32}


def write_npz(folder, i, moments, label):
    np.savez(folder / f"{i}.npy", z=moments, label=label)  # which makes it .npy.npz


def write_pair(folder, i, moments, label, *, dump=pickle.dumps, protocol=3):
    """As np.save(file, (moments, label)) of numpy before 1.24: an array of objects, pickled."""
    pair = np.empty(2, object)
    pair[:] = [moments, label]
    with open(folder / f"{i}.npy", "wb") as file:
        header = {"descr": "|O", "fortran_order": False, "shape": (2,)}
        np.lib.format.write_array_header_1_0(file, header)
        data = dump(pair, protocol=protocol)
        if protocol < 4:  # of which the former name was
            data = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
        file.write(data)


def write_layout(folder, layout, count=5, write_label=np.int64, dtype=np.float32):
    folder.mkdir()
    moments, labels = random_records(count).astype(dtype), np.arange(count) * 7 % 1000
    for i in range(count):
        write = write_npz if layout == ".npy.npz" else write_pair
        write(folder, i, moments[i], write_label(labels[i]))
    return moments, labels


@pytest.mark.parametrize("layout", [".npy", ".npy.npz"])
@pytest.mark.parametrize("name", ["imagenet256_features", "folder_features"])
def test_official_layouts_are_read(tmp_path, layout, name):
    moments, labels = write_layout(tmp_path / "latents", layout)
    dataset = get_dataset(name, path=tmp_path / "latents", resolution=32)
    assert (len(dataset), dataset.shape) == (5, SHAPE)
    assert dataset.num_classes == (1000 if name == "imagenet256_features" else 29)
    assert dataset.scale_factor is None and dataset.autoencoder_sha256 is None
    items = dataset.__getitems__([(0, i) for i in (4, 0, 2)])
    for (x, y), i in zip(items, (4, 0, 2), strict=True):
        assert x.dtype == torch.float32 and y.dtype == np.int64 and y == labels[i]
        np.testing.assert_array_equal(x, moments[i])
    unlabelled = get_dataset(name, path=tmp_path / "latents", resolution=32, labels=False)
    assert unlabelled.num_classes == 0 and unlabelled[0, 3][1] == 0


def test_plain_moments_have_no_label(tmp_path):
    moments = random_records(3)
    for i in range(3):
        np.save(tmp_path / f"{i}.npy", moments[i])
    with pytest.raises(UserError, match="have no labels: train without classes"):
        get_dataset(**IMAGENET, path=tmp_path)
    dataset = get_dataset(**IMAGENET, path=tmp_path, labels=False)
    np.testing.assert_array_equal(dataset[0, 2][0], moments[2])


def test_folders_of_files_that_do_not_fit(tmp_path):
    folder = tmp_path / "latents"
    moments, _ = write_layout(folder, ".npy.npz")

    def refused(says, **options):
        with pytest.raises(UserError, match=says):
            get_dataset(**{**IMAGENET, **options}, path=folder)[0, 2]

    refused("have the shape .8, 4, 4., but imagenet256_features has .8, 32, 32", resolution=None)
    refused(
        "no records of flipped images: .* or set dataset.random_flip to False", random_flip=True
    )
    (folder / "2.npy.npz").unlink()
    refused("lacks 2.npy.npz, but has 4.npy.npz")
    write_npz(folder, 2, moments[2], 3)
    (folder / "manifest.json").write_text("{}")  # ours goes first
    refused("manifest.json is damaged or not ours")
