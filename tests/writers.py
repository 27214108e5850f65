"""Small files in the formats that users have: CIFAR-10, image folders, ImageNet, an autoencoder."""

import io
import pickle
import struct
import tarfile

import numpy as np
import torch
from PIL import Image

from libs.data.autoencoder import to_ldm

TRAIN_FILES = [f"data_batch_{i}" for i in range(1, 6)]

WNIDS = ["n01440764", "n01443537", "n02105855"]
NUM_IMAGES = 14


def write_images(root):
    """ImageNet's layout: RGB, grey and CMYK JPEGs and palette PNGs, all named .JPEG."""
    modes = [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG")]
    rng = np.random.default_rng(0)
    for i in range(NUM_IMAGES):
        wnid, (mode, kind) = WNIDS[i * len(WNIDS) // NUM_IMAGES], modes[i % 4]
        path = root / "train" / wnid / f"{wnid}_{i:02}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(256, size=(4, 5, 3), dtype=np.uint8))
        small.resize((32 + 3 * i, 40)).convert(mode).save(path, kind)
    return root


def write_autoencoder(path, seed=0):
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    network = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32,) * 4, layers_per_block=1, latent_channels=4,
    )  # fmt: skip
    torch.save(to_ldm(network), path)
    return path


def noise_image(seed, size=(8, 8)):
    pixels = np.random.default_rng(seed).integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write_folder(root, count=6):
    """Classes 'ant' and 'bee' with `count` 8x8 PNG images in all; returns their pixels in order."""
    images = []
    for i in range(count):
        path = root / ("ant" if i < count // 2 else "bee") / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = noise_image(i)
        image.save(path)
        images.append(np.asarray(image).transpose(2, 0, 1))
    return images


class Python2Pickler(pickle._Pickler):
    """Writes str and bytes as Python 2's cPickle wrote the published files (opcode BINSTRING)."""

    def save_string(self, value):
        raw = value.encode("latin1") if isinstance(value, str) else value
        self.write(b"T" + struct.pack("<i", len(raw)) + raw)
        self.memoize(value)


Python2Pickler.dispatch = {
    **pickle._Pickler.dispatch,
    str: Python2Pickler.save_string,
    bytes: Python2Pickler.save_string,
}


def python2_pickle(value):
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(value)
    return file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def python3_pickle(value):
    return pickle.dumps(value, protocol=2)


def cifar10_batch(number, count=3):
    rng = np.random.default_rng(number)
    return {
        b"batch_label": b"testing batch",
        b"labels": rng.integers(10, size=count).tolist(),
        b"data": rng.integers(256, size=(count, 3072), dtype=np.uint8),
        b"filenames": [b"x.png"] * count,
    }


def write_cifar10(parent, dump=python2_pickle):
    folder = parent / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for number, name in enumerate([*TRAIN_FILES, "test_batch"], start=1):
        (folder / name).write_bytes(dump(cifar10_batch(number)))
    return folder


def write_archive(parent, folder):
    with tarfile.open(parent / "cifar-10-python.tar.gz", "w:gz") as tar:
        tar.add(folder, "cifar-10-batches-py")
    return parent / "cifar-10-python.tar.gz"


def place_of_everything(folder, classes=4):
    """A folder with ImageNet's layout (40 images), CIFAR-10's and an autoencoder's file."""
    rng = np.random.default_rng(0)
    for i in range(40):
        wnid = f"n{i % classes:08}"
        path = folder / "ImageNet" / "train" / wnid / f"{wnid}_{i}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(256, size=(6, 7, 3), dtype=np.uint8))
        small.resize((150, 140)).save(path)
    write_cifar10(folder)
    write_autoencoder(folder / "autoencoder_kl.pth")
    return folder
