"""Encode images once: write the autoencoder's moments of a data set into packed shards.

    accelerate launch --multi_gpu --num_processes 8 scripts/extract_imagenet_feature.py \\
        --path=assets/datasets/ImageNet --resolution=256 \\
        --autoencoder=assets/stable-diffusion/autoencoder_kl_ema.pth \\
        --output=assets/datasets/imagenet256_features

--dataset=folder takes any directory of images, with classes (first-level subdirectories) or with
--labels=false; --flip adds the flipped images. The same command goes on after an interruption, with
any number of processes (on several machines, the folder must be shared). --verify --output=FOLDER
reads everything and compares checksums. --features=dinov2 --features_weights=FILE adds the tokens
that the loss term `repa` takes.
"""

import contextlib
import itertools

import checkout  # noqa: F401 - finds the project
import torch
from accelerate.utils import broadcast_object_list
from torch.utils.data import Dataset
from tqdm import tqdm

import utils
from datasets import get_dataset
from libs.data import LatentWriter, load_autoencoder, open_latents
from libs.evaluate import make_features
from libs.runtime import (
    REQUIRED,
    file_path,
    make_accelerator,
    read_batches,
    run_main,
    wait_without_timeout,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FLAGS = {
    "path": (file_path, None, "the data set's directory; of ImageNet the one that holds train/"),
    "output": (file_path, REQUIRED, "the folder to write"),
    "autoencoder": (file_path, "assets/stable-diffusion/autoencoder_kl_ema.pth", "its weights"),
    "dataset": (str, "imagenet", "imagenet or folder"),
    "labels": (bool, True, "whether the data set has classes"),
    "resolution": (int, 256, "side of the square that is cut from each image, in pixels"),
    "flip": (bool, False, "also encode every image flipped, for dataset.random_flip"),
    "features": (str, "none", "a network with tokens, dinov2 or classifier, or none"),
    "features_weights": (file_path, None, "that network's file"),
    "precision": (str, "fp32", "fp32 (TF32 on GPUs), bf16, or fp16 (fp32 if force_upcast)"),
    "batch_size": (int, 32, "images a batch, per process"),
    "num_workers": (int, 8, "processes that read images, per process; 0 reads in this one"),
    "images_per_shard": (int, 4096, "a restart begins at a shard that was not finished"),
    "verify": (bool, False, "only compare the checksums of the latents in --output"),
}


def make_settings(args, images, autoencoder, features):
    """What these latents are made with; a restart must have the same."""
    side = args.resolution // autoencoder.downsample
    tokens = features and features.tokens(torch.zeros(1, *images.shape))
    return dict(
        record_shape=(2 * autoencoder.latent_channels, side, side),
        **autoencoder.scaling._asdict(),  # not applied
        resolution=args.resolution,
        autoencoder_sha256=autoencoder.sha256,
        precision=args.precision,
        flips=args.flip,
        crop=images.preprocessing,
        source=args.dataset,
        images_sha256=images.list_sha256(),
        num_images=len(images),
        images_per_shard=args.images_per_shard,
        class_names=None if images.class_names is None else tuple(images.class_names),
        features=features and features.name,
        feature_shape=None if tokens is None else tuple(tokens.shape[1:]),
    )


class Pixels(Dataset):
    """image -> (uint8 (3, H, W),)."""

    def __init__(self, images):
        self.images = images

    def __getitem__(self, image):
        return (torch.from_numpy(self.images.pixels(image)),)


def encode(autoencoder, features, batches, device, flip):
    """Yields float16 records (n, 2C, h, w) of each batch [pixels] and, unless features is None,
    tokens (n, N, D); with flip, n is twice as large, the flipped image after each image.
    """
    for (pixels,) in batches:
        x = pixels.to(device, non_blocking=True).float() / 127.5 - 1
        if flip:
            x = torch.stack([x, x.flip(-1)], 1).flatten(0, 1)
        records = autoencoder.moments(x).half()
        if not records.isfinite().all():
            raise utils.UserError(
                "moments of an image are not finite in float16: use --precision=fp32, or another "
                "autoencoder if that does not help"
            )
        tokens = [features.tokens(0.5 * x + 0.5).half()] if features else []
        yield tuple(array.cpu().numpy() for array in (records, *tokens))


def deal(accelerator, writer):
    """The numbers of the shards that this process makes; None if the latents are complete."""
    missing = [None]
    if accelerator.is_main_process and not writer.begin():
        missing = [writer.missing()]
    broadcast_object_list(missing)
    if missing[0] is None:
        return None
    return missing[0][accelerator.process_index :: accelerator.num_processes]


def write_shards(args, accelerator, writer, images, networks, shards):
    """Encode and write the shards of these numbers; networks: autoencoder and features."""
    device, size = accelerator.device, args.batch_size
    parts = [writer.images(number) for number in shards]
    batches = [[part[i : i + size] for i in range(0, len(part), size)] for part in parts]
    loading = dict(num_workers=args.num_workers, pin_memory=device.type == "cuda")
    loader = read_batches(Pixels(images), batch_sampler=sum(batches, []), **loading)
    total = sum(map(len, parts))
    name = f"process {accelerator.process_index} of {accelerator.num_processes}"
    with tqdm(total=total, desc=name, unit="img", disable=not accelerator.is_main_process) as bar:
        for number, own in zip(shards, batches, strict=True):
            pixels = itertools.islice(loader, len(own))
            writer.write(number, encode(*networks, pixels, device, args.flip))
            bar.update(len(writer.images(number)))


def describe(latents):
    classes = f" in {latents.num_classes} classes" if latents.num_classes else ""
    features = f" and features {latents.feature_shape}" if latents.feature_shape else ""
    return (
        f"{latents.folder}: {latents.num_images:,} images{classes}, {len(latents):,} records of "
        f"{latents.shape}{features} in {len(latents.manifest['shards'])} shards"
    )


def extract(args, accelerator):
    """All shards that are not there yet, then the manifest."""
    images = get_dataset(
        args.dataset, path=args.path, resolution=args.resolution, labels=args.labels
    )
    autoencoder = load_autoencoder(args.autoencoder)
    if autoencoder.force_upcast and args.precision == "fp16":
        args.precision = "fp32"
    if accelerator.is_main_process:
        print(f"left out: {images.left_out or 'nothing'}; encoding in {args.precision}")
    features = make_features(args.features, args.features_weights, accelerator.device)
    writer = LatentWriter(args.output, **make_settings(args, images, autoencoder, features))
    shards = deal(accelerator, writer)
    if shards is not None:
        autoencoder.to(accelerator.device, DTYPES[args.precision])
        write_shards(args, accelerator, writer, images, (autoencoder, features), shards)
        wait_without_timeout(accelerator)
        if accelerator.is_main_process:
            writer.finish(images.labels)
    if accelerator.is_main_process:
        said = "complete already" if shards is None else "wrote"
        print(f"{said}: {describe(open_latents(args.output))}")


def verify(folder):
    latents = open_latents(folder)
    damaged = [path.name for path in latents.find_damage()]
    if damaged:
        raise utils.UserError(
            f"{utils.listed(damaged)} in {folder} are damaged: delete them and run this script "
            "again as before, which makes only what is missing"
        )
    print(f"verified {describe(latents)}")


def main(args):
    """args: the flags of FLAGS."""
    if args.verify:
        return verify(args.output)
    accelerator, lock = make_accelerator(), contextlib.nullcontext()
    if accelerator.is_main_process:
        lock = utils.locked(args.output, "--output")
    with lock:
        extract(args, accelerator)
    accelerator.end_training()  # else gloo's threads now and then abort the process at its end


if __name__ == "__main__":
    run_main(main, FLAGS)
