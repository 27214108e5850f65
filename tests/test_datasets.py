"""Data sets against files in their true formats, and the order of training."""

import errno
import io
import itertools
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torchvision.datasets
import writers
from PIL import Image
from torch.utils.data import DataLoader
from writers import noise_image, write_fashion_mnist, write_folder

import datasets
from datasets import get_dataset
from libs.data import images
from libs.data.order import deal_keys, permutation
from utils import UserError

# ------------------------------------------------------------ digits


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    digits = get_dataset("digits", resolution=8)
    assert (len(digits), digits.shape, digits.num_classes) == (1797, (1, 8, 8), 10)
    images = torch.stack([digits[0, i][0] for i in range(len(digits))])
    assert images.dtype == torch.float32
    np.testing.assert_array_equal((images[:, 0] + 1) * 8, load_digits().images)
    np.testing.assert_array_equal(digits.labels, load_digits().target)
    assert digits[3, 5][1] == digits.labels[5] and digits[3, 5][1].dtype == np.int64


def test_import_is_cheap():
    code = (
        "import datasets, sys; print({'torchvision', 'sklearn', 'accelerate'} & set(sys.modules))"
    )
    root = Path(datasets.__file__).parent
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )
    assert run.stdout == "set()\n", run.stderr


@pytest.mark.parametrize(
    "name, options, says",
    [
        ("mnist", {}, "dataset.name is 'mnist', expected one of digits, "),
        ("folder", {"path": "nowhere"}, "needs its directory .* as dataset.path, not 'nowhere'"),
        ("imagenet256_features", {}, "needs its directory .* as dataset.path, not None"),
    ],
)
def test_wrong_requests_are_refused(name, options, says):
    with pytest.raises(UserError, match=says):
        get_dataset(name, **options)


# ------------------------------------------------------------ CIFAR-10


def test_cifar10_is_its_files(tmp_path, cifar10):
    folder = cifar10(tmp_path)
    batches = [pickle.loads((folder / name).read_bytes()) for name in writers.TRAIN_FILES]
    data = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
    for path in (tmp_path, folder):
        dataset = get_dataset("cifar10", path=path)
        assert (len(dataset), dataset.shape, dataset.num_classes) == (len(data), (3, 32, 32), 10)
        for i, image in enumerate(data):
            x, y = dataset[0, i]
            np.testing.assert_array_equal(((x + 1) * 127.5).round(), image)
            assert x.dtype == torch.float32 and x.is_contiguous() and y == dataset.labels[i]
        assert dataset.labels.tolist() == sum((batch["labels"] for batch in batches), [])


def test_cifar10_is_fetched_where_it_is_not(tmp_path, cifar10, monkeypatch):
    cifar10(tmp_path / "made")
    with tarfile.open(tmp_path / "made.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "made" / "cifar-10-batches-py", "cifar-10-batches-py")

    def fetch(url, root, filename=None, md5=None):
        (Path(root) / filename).write_bytes((tmp_path / "made.tar.gz").read_bytes())

    monkeypatch.setattr(torchvision.datasets.utils, "download_url", fetch)
    assert len(get_dataset("cifar10", path=tmp_path / "new")) == 15
    assert len(get_dataset("cifar10", path=tmp_path / "new")) == 15
    monkeypatch.setattr(
        torchvision.datasets.utils, "download_url", Mock(side_effect=OSError("no network"))
    )
    with pytest.raises(UserError, match="other has no cifar-10-batches-py .*no network"):
        get_dataset("cifar10", path=tmp_path / "other")


# ------------------------------------------------------------ Fashion-MNIST


def test_fashion_mnist_is_its_idx_files(tmp_path, monkeypatch):
    """Gzipped or not, in the folder or where torchvision has them; padded by 28 + 2 + 3 pixels."""
    download = Mock(side_effect=RuntimeError("no network"))
    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", download)
    pixels, labels = write_fashion_mnist(tmp_path, "train", gz=True)
    write_fashion_mnist(tmp_path / "FashionMNIST" / "raw", "t10k", gz=False)
    train = get_dataset("fashion_mnist", path=tmp_path, resolution=33)
    assert (len(train), train.shape, train.num_classes) == (7, (1, 33, 33), 10)
    expected = np.pad(pixels, ((0, 0), (2, 3), (2, 3)))
    for i in range(7):
        x, y = train[0, i]
        np.testing.assert_array_equal(pixels_of(x)[0], expected[i])
        assert x.dtype == torch.float32 and y == labels[i] and x[0, 0, 0] == -1
    assert get_dataset("fashion_mnist_test", path=tmp_path).shape == (1, 32, 32)
    with pytest.raises(UserError, match="other has no t10k-images.* downloaded .no network"):
        get_dataset("fashion_mnist_test", path=tmp_path / "other")
    folder = tmp_path / "other" / "FashionMNIST" / "raw"
    download.side_effect = lambda *_, **__: write_fashion_mnist(folder, "t10k", gz=False)
    assert len(get_dataset("fashion_mnist_test", path=tmp_path / "other")) == 7


# ------------------------------------------------------------ image folders


def pixels_of(x):
    return ((x + 1) * 127.5).round().numpy().astype(np.uint8)


def test_folder_classes_are_the_first_level_subdirectories(tmp_path):
    images = write_folder(tmp_path)
    (tmp_path / "bee" / "deeper").mkdir()
    (tmp_path / "bee" / "05.png").rename(tmp_path / "bee" / "deeper" / "05.PNG")
    (tmp_path / "ant" / "notes.txt").write_text("no image")
    (tmp_path / "ant" / "._00.png").write_text("a hidden file of macOS")
    (tmp_path / ".cache").mkdir()
    folder = get_dataset("folder", path=tmp_path, resolution=8)
    assert (len(folder), folder.shape, folder.num_classes) == (6, (3, 8, 8), 2)
    assert folder.labels.tolist() == [0, 0, 0, 1, 1, 1] and folder.labels.dtype == np.int64
    for i, image in enumerate(images):
        x, y = folder[0, i]
        np.testing.assert_array_equal(pixels_of(x), image)
        assert y == folder.labels[i] and x.dtype == torch.float32
    unlabelled = get_dataset("folder", path=tmp_path, resolution=8, labels=False)
    assert len(unlabelled) == 6 and unlabelled.labels is None and unlabelled.num_classes == 0


def test_folder_mistakes_are_named(tmp_path):
    (tmp_path / "ant").mkdir()
    with pytest.raises(UserError, match="no images .*.png.* in .*; left out: "):
        get_dataset("folder", path=tmp_path, resolution=8)
    noise_image(0).save(tmp_path / "loose.png")
    with pytest.raises(UserError, match="loose.png in .* is in no class directory"):
        get_dataset("folder", path=tmp_path, resolution=8)
    assert len(get_dataset("folder", path=tmp_path, resolution=8, labels=False)) == 1


TRANSPARENT = Image.new("RGBA", (9, 9), (250, 100, 30, 128))
PALETTE = Image.new("RGB", (9, 9), (250, 100, 30)).quantize(4)


@pytest.mark.parametrize(
    "image, name, expected, tolerance",
    [
        (Image.new("L", (9, 9), 200), "x.png", (200, 200, 200), 0),
        (Image.new("LA", (9, 9), (200, 9)), "x.png", (200, 200, 200), 0),
        (Image.new("1", (9, 9), 1), "x.png", (255, 255, 255), 0),
        (TRANSPARENT, "x.png", (250, 100, 30), 0),
        (PALETTE, "x.png", (250, 100, 30), 0),
        (Image.new("CMYK", (9, 9), (5, 155, 225, 0)), "x.jpg", (250, 100, 30), 3),  # JPEG rounds
    ],
)
def test_folder_converts_every_mode_to_rgb(tmp_path, image, name, expected, tolerance):
    image.save(tmp_path / name)
    x, _ = get_dataset("folder", path=tmp_path, resolution=8, labels=False)[0, 0]
    difference = pixels_of(x).astype(int) - np.reshape(expected, (3, 1, 1))
    assert np.abs(difference).max() <= tolerance


def adm_center_crop(image, size):
    """As in guided_diffusion/image_datasets.py, by arrays."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.BICUBIC)
    pixels = np.array(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize("size", [(50, 37), (37, 50), (10, 7), (16, 16), (67, 131), (33, 32)])
def test_center_crop_is_adms(size):
    image = noise_image(0, size)
    expected = adm_center_crop(image, 16)
    assert expected.shape == (16, 16, 3)
    np.testing.assert_array_equal(np.asarray(images.crop_square(image, 16)), expected)


def encoded(image, kind="png"):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def unreadable_files():
    jpeg = encoded(noise_image(0, (64, 64)), "jpeg")
    return {
        "truncated png": encoded(noise_image(0))[:100],
        "truncated jpeg": jpeg[: len(jpeg) // 2],
        "text": b"%!PS-Adobe-3.0 hello",
    }


@pytest.mark.parametrize("kind", unreadable_files())
def test_an_unreadable_image_is_replaced_by_the_next(tmp_path, kind):
    write_folder(tmp_path)
    whole = get_dataset("folder", path=tmp_path, resolution=8)
    expected = [whole[0, i] for i in range(6)]
    for name in ("ant/02.png", "bee/05.png"):  # the first of the next class; round to the start
        (tmp_path / name).write_bytes(unreadable_files()[kind])
    broken = get_dataset("folder", path=tmp_path, resolution=8)
    with pytest.warns(UserWarning, match="unreadable image") as warned:
        read = [(i, *broken[0, i]) for i in (5, 2, 0, 1, 2, 3, 4, 5)]
    for i, x, y in read:
        torch.testing.assert_close(x, expected[{2: 3, 5: 0}.get(i, i)][0], rtol=0, atol=0)
        assert y == {2: 1, 5: 0}.get(i, expected[i][1])
    named = [str(warning.message) for warning in warned]
    assert len(named) == 2 and "05.png" in named[0] and "02.png" in named[1] and len(broken) == 6


@pytest.mark.parametrize("error", [OSError(errno.ESTALE, "Stale file handle"), MemoryError()])
def test_a_passing_error_of_the_system_replaces_no_image(tmp_path, monkeypatch, error):
    """The image is there again afterwards: another in its place would stay for the whole run."""
    write_folder(tmp_path)
    folder = get_dataset("folder", path=tmp_path, resolution=8)
    expected = folder[0, 3]
    with monkeypatch.context() as patch:
        patch.setattr(images.Image, "open", Mock(side_effect=error))
        with pytest.raises(type(error)):
            folder[0, 3]
    assert not any(folder.unreadable) and torch.equal(folder[0, 3][0], expected[0])


def test_too_many_unreadable_images_end_the_run(tmp_path):
    write_folder(tmp_path, count=20)
    for i in range(11):
        name = f"{'ant' if i < 10 else 'bee'}/{i:02}.png"
        (tmp_path / name).write_bytes(b"broken")
    folder = get_dataset("folder", path=tmp_path, resolution=8)
    with pytest.warns(UserWarning), pytest.raises(UserError) as error:
        folder[0, 0]
    assert "more than 10 of 20 images" in str(error.value)
    assert "ant/00.png, ant/01.png, ant/02.png and 8 more" in str(error.value)


# ------------------------------------------------------------ ImageNet


def test_imagenet_is_its_train_folder_with_classes_by_wnid(tmp_path):
    imagenet = get_dataset("imagenet", path=writers.write_images(tmp_path), resolution=8)
    assert (len(imagenet), imagenet.shape) == (writers.NUM_IMAGES, (3, 8, 8))
    assert imagenet.class_names == writers.WNIDS and imagenet.num_classes == 3
    assert imagenet.labels.tolist() == 5 * [0] + 5 * [1] + 4 * [2]
    for i in range(writers.NUM_IMAGES):
        with Image.open(tmp_path / "train" / imagenet.files[i]) as image:
            expected = adm_center_crop(image.convert("RGB"), 8).transpose(2, 0, 1)
        np.testing.assert_array_equal(pixels_of(imagenet[0, i][0]), expected)


# ------------------------------------------------------------ augmentation


def flips_of(folder, epoch):
    plain = [datasets._uint8_to_float(folder.pixels(i)) for i in range(len(folder))]
    flips = []
    for i, image in enumerate(plain):
        x, _ = folder[epoch, i]
        assert torch.equal(x, image) or torch.equal(x, image.flip(-1))
        flips.append(not torch.equal(x, image))
    return flips


def test_flips_are_keyed_by_seed_epoch_and_index(tmp_path):
    write_folder(tmp_path, count=100)
    options = {"path": tmp_path, "resolution": 8, "random_flip": True}
    folder = get_dataset("folder", seed=1, **options)
    flips = flips_of(folder, 0)
    assert 30 < sum(flips) < 70  # 4 standard deviations about 50
    assert flips_of(folder, 0) == flips
    others = [flips_of(folder, 1), flips_of(get_dataset("folder", seed=2, **options), 0)]
    for other in others:
        assert 30 < sum(a != b for a, b in zip(flips, other, strict=True)) < 70
    assert sum(flips_of(get_dataset("folder", path=tmp_path, resolution=8), 0)) == 0
    loader = DataLoader(folder, batch_sampler=[[(0, 4), (0, 9)], [(0, 2)]], num_workers=2)
    images, labels = zip(*loader, strict=True)
    expected = torch.stack([folder[0, i][0] for i in (4, 9, 2)])
    torch.testing.assert_close(torch.cat(images), expected, rtol=0, atol=0)
    assert labels[0].dtype == torch.int64


# ------------------------------------------------------------ order


def stream(length, seed, stop):
    """The definition, position by position."""
    epochs = {}
    for position in range(stop):
        epoch, offset = divmod(position, length)
        if epoch not in epochs:
            epochs[epoch] = permutation(length, seed=seed, epoch=epoch)
        yield epoch, int(epochs[epoch][offset])


def global_batches(length, batch_size, processes, accumulation, batches, start_batch=0):
    """For each global batch, its keys in stream order, gathered from all ranks."""
    given = dict(num_processes=processes, accumulation=accumulation, seed=3)
    given["start_batch"] = start_batch
    ranks = [deal_keys(length, batch_size, rank=r, **given) for r in range(processes)]
    parts = [list(itertools.islice(rank, batches * accumulation)) for rank in ranks]
    sizes = {len(micro) for rank in parts for micro in rank}
    assert sizes == {batch_size // (processes * accumulation)}
    micro_batches = [key for micro in zip(*parts, strict=True) for rank in micro for key in rank]
    return [micro_batches[i : i + batch_size] for i in range(0, len(micro_batches), batch_size)]


@pytest.mark.parametrize("length", [1, 7, 12, 13, 24, 100])  # shorter than, equal to, coprime...
@pytest.mark.parametrize("processes, accumulation", [(1, 1), (1, 3), (4, 1), (2, 3), (12, 1)])
def test_every_rank_layout_reads_the_same_stream(length, processes, accumulation):
    keys = list(stream(length, 3, 12 * 9))
    expected = [keys[i : i + 12] for i in range(0, len(keys), 12)]
    assert global_batches(length, 12, processes, accumulation, 9) == expected
    assert global_batches(length, 12, processes, accumulation, 4, start_batch=5) == expected[5:]


def test_an_indivisible_batch_is_refused():
    with pytest.raises(UserError, match="100 is not .* 4 processes x 3 accumulation steps = 12"):
        deal_keys(50, 100, num_processes=4, rank=0, accumulation=3, seed=0)


def test_the_permutation_is_a_fixed_function():
    """Numbers written down once: a checkpoint resumes with any later version and machine."""
    assert permutation(10, seed=0, epoch=0).tolist() == [5, 3, 7, 8, 2, 4, 1, 0, 6, 9]
    assert permutation(10, seed=0, epoch=1).tolist() == [3, 5, 2, 7, 4, 6, 8, 9, 1, 0]
    assert permutation(10, seed=1, epoch=0).tolist() != [5, 3, 7, 8, 2, 4, 1, 0, 6, 9]


def test_resuming_far_into_training_is_immediate():
    options = {"num_processes": 8, "rank": 3, "accumulation": 2, "seed": 0}
    keys = next(deal_keys(1000, 1024, start_batch=10**9, **options))
    assert len(keys) == 64 and keys[0][0] == (10**9 * 1024 + 3 * 64) // 1000
