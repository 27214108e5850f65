"""Cached latents: packed shards and the official layouts."""

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import get_dataset
from libs.data.autoencoder import Scaling
from libs.data.latent_writer import LatentWriter
from libs.data.latents import PackedLatents
from utils import UserError

SHAPE = (8, 4, 4)


def random_records(count, shape=SHAPE, seed=0):
    return np.random.default_rng(seed).standard_normal((count, *shape)).astype(np.float16)


def settings_for(records, labels, flips):
    return dict(
        record_shape=records.shape[1:], scale_factor=0.18215, resolution=8 * records.shape[-1],
        flips=flips, autoencoder_sha256="a" * 64, precision="fp32", crop="centre crop",
        source="folder", images_sha256="b" * 64, num_images=len(records) // (1 + flips),
        images_per_shard=3, class_names=None if labels is None else ("ant", "bee"),
    )  # fmt: skip


def write_packed(folder, records, labels, flips=True):
    writer = LatentWriter(folder, **settings_for(records, labels, flips))
    assert writer.begin() is False
    for number in writer.missing():
        images = writer.images(number)
        writer.write(number, [(records[images.start * (1 + flips) : images.stop * (1 + flips)],)])
    writer.finish(labels)
    return folder


@pytest.fixture
def packed(tmp_path):
    """Seven images, flipped too, in shards of three."""
    records, labels = random_records(14), np.array([0, 1, 1, 0, 1, 0, 1])
    return write_packed(tmp_path / "latents", records, labels)


# ------------------------------------------------------------ packed shards


def test_packed_records_are_read_as_written(packed):
    latents, records = PackedLatents(packed), random_records(14)
    assert (len(latents), latents.num_images, latents.shape) == (14, 7, SHAPE)
    assert latents.labels.tolist() == [0, 1, 1, 0, 1, 0, 1] and latents.num_classes == 2
    order = np.random.default_rng(1).integers(14, size=50)
    read = latents.read(order)
    assert read.dtype == np.float16
    np.testing.assert_array_equal(read, records[order])
    x, y = latents.read_labelled([6, 0, 3], np.array([True, False, True]))
    np.testing.assert_array_equal(x, records[[13, 0, 7]])
    assert y.tolist() == [1, 0, 0]


def test_what_is_read_is_a_copy(packed):
    latents = PackedLatents(packed)
    before = {path: path.read_bytes() for path in packed.iterdir() if path.is_file()}
    latents.read([0])[...] = 0
    latents._shards[0][:1] = 0  # a private mapping: not even this reaches the file
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_pickled_reader_opens_the_files_again(packed):
    latents = PackedLatents(packed)
    data = pickle.dumps(latents)
    assert len(data) < 1000  # what spawned workers get
    np.testing.assert_array_equal(pickle.loads(data).read([5]), latents.read([5]))


def test_the_format_of_version_0_1(tmp_path):
    """As it was written then, byte for byte; plain numpy files."""
    records, labels = random_records(14), np.array([0, 1, 1, 0, 1, 0, 1])
    shards = []
    for number in range(3):
        part = records[6 * number : 6 * number + 6]
        name = f"shard-{number:05}.bin"
        part.astype("<f2").tofile(tmp_path / name)
        entry = {"file": name, "records": len(part), "bytes": part.nbytes, "sha256": "0" * 64}
        shards.append(entry)
    labels.astype("<i8").tofile(tmp_path / "labels.bin")
    manifest = {
        "format": "DiM latents 1", "dtype": "float16", **settings_for(records, labels, True),
        "labels": {"file": "labels.bin", "bytes": 56, "sha256": "0" * 64},
        "stand_ins": {"3": 4}, "shards": shards,
    }  # fmt: skip
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / ".progress").mkdir()
    dataset = get_dataset("folder_features", path=tmp_path, random_flip=True, seed=1)
    items = dataset.__getitems__([(0, i) for i in range(7)])
    flips = [bool((x.numpy() == records[2 * i + 1]).all()) for i, (x, _) in enumerate(items)]
    assert 0 < sum(flips) < 7
    for i, (x, y) in enumerate(items):
        np.testing.assert_array_equal(x, records[2 * i + flips[i]])
        assert y == labels[i]
    write_packed(tmp_path / "now", records, labels)
    for name in ("shard-00001.bin", "labels.bin"):
        assert (tmp_path / "now" / name).read_bytes() == (tmp_path / name).read_bytes()
    now = PackedLatents(tmp_path / "now").manifest
    assert now.keys() - {"scaled"} == manifest.keys() - {"stand_ins"}


def test_unfinished_missing_and_cut_latents(packed, tmp_path):
    shard = packed / "shard-00001.bin"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match="00001.bin has 1535 bytes, but manifest.json says 1536"):
        PackedLatents(packed)
    writer = LatentWriter(tmp_path / "begun", **settings_for(random_records(14), None, True))
    writer.begin()
    with pytest.raises(UserError, match="begun are unfinished: run scripts/extract.* as before"):
        get_dataset("folder_features", path=tmp_path / "begun")
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="cannot read .*other/manifest.json"):
        get_dataset("folder_features", path=tmp_path / "other")


def test_a_shard_is_whole_or_absent(tmp_path):
    writer = LatentWriter(tmp_path, **settings_for(random_records(14), None, True))

    def interrupted():
        yield (random_records(2),)
        raise KeyboardInterrupt

    writer.begin()
    with pytest.raises(KeyboardInterrupt):
        writer.write(0, interrupted())
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
    records = random_records(6)
    writer.write(0, [(records[:1],), (records[1:],)])
    assert writer.missing() == [1, 2]
    assert (tmp_path / "shard-00000.bin").read_bytes() == records.tobytes()


# ------------------------------------------------------------ data sets of latents


def test_items_are_moments_and_labels(packed):
    records, dataset = random_records(14), get_dataset("folder_features", path=packed)
    assert (len(dataset), dataset.shape, dataset.num_classes) == (7, SHAPE, 2)
    assert dataset.latent and dataset.scaling.scale_factor == 0.18215
    assert dataset.autoencoder_sha256 == "a" * 64 and dataset.preprocessing == "centre crop"
    for i in range(7):
        x, y = dataset[3, i]
        assert x.dtype == torch.float32 and x.shape == SHAPE and type(y) is np.int64
        np.testing.assert_array_equal(x, records[2 * i])
        assert y == dataset.labels[i]
    unlabelled = get_dataset("folder_features", path=packed, labels=False)
    assert unlabelled.labels is None and unlabelled.num_classes == 0 and unlabelled[0, 1][1] == 0


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


def test_requests_that_latents_do_not_fit(tmp_path):
    single = write_packed(tmp_path / "single", random_records(5), None, flips=False)
    with pytest.raises(UserError, match="have no records of flipped images: make .* with --flip"):
        get_dataset("folder_features", path=single, labels=False, random_flip=True)
    with pytest.raises(UserError, match="have no labels: train without classes"):
        get_dataset("imagenet256_features", path=single)


# ------------------------------------------------------------ one file an image


def write_npz(folder, i, moments, label):
    np.savez(folder / f"{i}.npy", z=moments, label=label)  # which makes it .npy.npz


def write_pair(folder, i, moments, label):
    pair = np.empty(2, object)
    pair[:] = [moments, label]
    np.save(folder / f"{i}.npy", pair)


@pytest.mark.parametrize("write", [write_npz, write_pair])
@pytest.mark.parametrize("name", ["imagenet256_features", "folder_features"])
def test_official_layouts_are_read(tmp_path, write, name):
    moments, labels = random_records(5).astype(np.float32), np.arange(5) * 7
    for i in range(5):
        write(tmp_path, i, moments[i], labels[i])
    dataset = get_dataset(name, path=tmp_path)
    assert (len(dataset), dataset.shape) == (5, SHAPE)
    assert dataset.num_classes == (1000 if name == "imagenet256_features" else 29)
    assert dataset.scaling == Scaling() and dataset.autoencoder_sha256 is None
    items = dataset.__getitems__([(0, i) for i in (4, 0, 2)])
    for (x, y), i in zip(items, (4, 0, 2), strict=True):
        assert x.dtype == torch.float32 and y.dtype == np.int64 and y == labels[i]
        np.testing.assert_array_equal(x, moments[i])
    unlabelled = get_dataset(name, path=tmp_path, labels=False)
    assert unlabelled.num_classes == 0 and unlabelled[0, 3][1] == 0
    (next(tmp_path.glob("2.npy*"))).unlink()
    with pytest.raises(UserError, match="lacks 2.npy.*, but has 4.npy"):
        get_dataset(name, path=tmp_path)


def test_plain_moments_have_no_label(tmp_path):
    moments = random_records(3)
    for i in range(3):
        np.save(tmp_path / f"{i}.npy", moments[i])
    with pytest.raises(UserError, match="have no labels: train without classes"):
        get_dataset("imagenet256_features", path=tmp_path)
    dataset = get_dataset("imagenet256_features", path=tmp_path, labels=False)
    np.testing.assert_array_equal(dataset[0, 2][0], moments[2])
