"""Small files in the formats that users have: CIFAR-10, image folders, ImageNet, an autoencoder."""

import gzip
import hashlib
import pickle
import struct

import numpy as np
import torch
from PIL import Image

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


def make_autoencoder(widths=(32, 32, 32, 32), seed=0, **options):
    """A small AutoencoderKL; norms and biases drawn too, so that none could be left out unseen."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    network = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        **options,
    )
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def write_autoencoder(path, seed=0):
    """A diffusers folder."""
    make_autoencoder(seed=seed).save_pretrained(path)
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


def write_cifar10(parent, count=20):
    """`count` images a file in the published layout, with other md5 than the published: see
    `cifar10_lists`.
    """
    rng, folder = np.random.default_rng(0), parent / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in [*TRAIN_FILES, "test_batch"]:
        pixels = rng.integers(256, size=(count, 3072), dtype=np.uint8)
        batch = {"data": pixels, "labels": rng.integers(10, size=count).tolist()}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("0123456789")}))
    return folder


def cifar10_lists(parent):
    """The attributes of torchvision's CIFAR10 with which it takes the files in `parent`."""
    md5 = {
        path.name: hashlib.md5(path.read_bytes()).hexdigest()
        for path in (parent / "cifar-10-batches-py").iterdir()
    }
    return {
        "train_list": [[name, md5[name]] for name in TRAIN_FILES],
        "test_list": [["test_batch", md5["test_batch"]]],
        "meta": {"filename": "batches.meta", "key": "label_names", "md5": md5["batches.meta"]},
    }


def cifar10_environment(parent):
    """{name: value} of the environment in which Python's processes take the files in `parent`."""
    site = parent / "site"
    site.mkdir(exist_ok=True)
    lines = ["from torchvision.datasets import CIFAR10"]
    lines += [f"CIFAR10.{name} = {value!r}" for name, value in cifar10_lists(parent).items()]
    (site / "sitecustomize.py").write_text("\n".join(lines) + "\n")
    return {"PYTHONPATH": str(site)}


def write_fashion_mnist(folder, part, *, gz):
    """Seven images of train or t10k in the published layout; returns their pixels and labels."""
    rng = np.random.default_rng(0)
    arrays = [rng.integers(n, size=(7, *s), dtype=np.uint8) for n, s in ((256, (28, 28)), (10, ()))]
    folder.mkdir(parents=True, exist_ok=True)
    for kind, array in zip(("images-idx3", "labels-idx1"), arrays, strict=True):
        header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
        content, name = header + array.tobytes(), f"{part}-{kind}-ubyte" + ".gz" * gz
        (folder / name).write_bytes(gzip.compress(content) if gz else content)
    return arrays


def place_of_everything(folder, classes=4):
    """A folder with ImageNet's layout (40 images), CIFAR-10's and an autoencoder."""
    rng = np.random.default_rng(0)
    for i in range(40):
        wnid = f"n{i % classes:08}"
        path = folder / "ImageNet" / "train" / wnid / f"{wnid}_{i}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(256, size=(6, 7, 3), dtype=np.uint8))
        small.resize((150, 140)).save(path)
    write_cifar10(folder)
    write_autoencoder(folder / "autoencoder")
    return folder
