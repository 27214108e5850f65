"""Encode images once: write the autoencoder's moments of a data set into packed shards.

    accelerate launch --multi_gpu --num_processes 8 scripts/extract_imagenet_feature.py \\
        --path=assets/datasets/ImageNet --resolution=256 \\
        --autoencoder=assets/stable-diffusion/autoencoder_kl_ema.pth \\
        --output=assets/datasets/imagenet256_features

--dataset=folder takes any directory of images, with classes (first-level subdirectories) or with
--labels=false; --flip adds the flipped images. The same command goes on after an interruption, with
any number of processes (on several machines, the folder must be shared). --verify --output=FOLDER
reads everything and compares checksums.
"""

import contextlib
import math
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from accelerate.utils import broadcast_object_list
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import utils
from datasets import CROPPED, get_dataset
from libs.data import (
    Features,
    Packing,
    ShardWriter,
    load_autoencoder,
    make_settings,
    num_shards,
    refuse_system_error,
    unreadable_reason,
)
from libs.runtime import (
    REQUIRED,
    WAITING,
    StopRequest,
    beat,
    detach_worker,
    file_path,
    make_accelerator,
    run_main,
    starting_workers,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STOPPED = 143  # exit status after SIGTERM or Ctrl-C, as in training
NAMED = 10  # unreadable images that are named

FLAGS = {
    "path": (
        file_path, None, "the data set's directory; ImageNet's is the one that holds train/",
    ),
    "output": (
        file_path, REQUIRED,
        "the folder to write, for example .../imagenet256_features",
    ),
    "autoencoder": (
        file_path, "assets/stable-diffusion/autoencoder_kl_ema.pth", "its weights",
    ),
    "dataset": (str, "imagenet", f"one of {', '.join(CROPPED)}"),
    "labels": (bool, True, "whether the data set has classes"),
    "resolution": (int, 256, "side of the square that is cut from each image, in pixels"),
    "flip": (bool, False, "also encode every image flipped, for dataset.random_flip"),
    "precision": (str, "fp32", "fp32 (torch lets GPUs convolve in TF32), bf16 or fp16"),
    "batch_size": (int, 32, "images a batch, per process"),
    "num_workers": (int, None, "processes that read images; if not given, the cores, at most 16"),
    "images_per_shard": (int, 4096, "a restart begins at a shard that was not finished"),
    "skip_unreadable": (bool, False, "let the next image stand in for one that cannot be read"),
    "verify": (bool, False, "only compare the checksums of the latents in --output"),
}  # fmt: skip
MAX_SHARDS = 50_000  # each is a memory map, of which Linux allows 65,530


def check_flags(args):
    """Raise UserError for values out of range and a data set of another kind."""
    for name, allowed in {"precision": DTYPES, "dataset": CROPPED}.items():
        if getattr(args, name) not in allowed:
            raise utils.UserError(
                f"--{name} is {getattr(args, name)!r}, expected one of {', '.join(allowed)}"
            )
    if not args.path and not args.verify:
        raise utils.UserError(f"--path is required: {FLAGS['path'][2]}")


def settings_of(args, images, autoencoder):
    """What these latents are made with; a restart must have the same."""
    side, rest = divmod(args.resolution, autoencoder.downsample)
    if rest:
        raise utils.UserError(
            f"--resolution is {args.resolution}, it must be a multiple of {autoencoder.downsample}"
        )
    settings = make_settings(
        record_shape=(2 * autoencoder.latent_channels, side, side),
        scale_factor=float(autoencoder.scale_factor),
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
    )
    if num_shards(settings) > MAX_SHARDS:
        raise utils.UserError(
            f"--images_per_shard={args.images_per_shard} makes {num_shards(settings):,} shards, "
            f"more than the {MAX_SHARDS:,} that can be opened at once: take "
            f"{math.ceil(len(images) / MAX_SHARDS)} or more"
        )
    return settings


# ------------------------------------------------------------ reading


class Pixels(Dataset):
    """image -> uint8 (3, H, W), and None or a note on an unreadable file.

    A note has image, file, reason and `source`: the next readable image, whose pixels these are, or
    None if there is none or it was not asked for.
    """

    def __init__(self, images, skip_unreadable):
        self.images, self.tries = images, len(images) if skip_unreadable else 1

    def __len__(self):
        return len(self.images)

    def __getitem__(self, image):
        note = None
        for source in range(image, image + self.tries):
            source %= len(self)
            try:
                pixels = torch.from_numpy(self.images.pixels(0, source))
                return pixels, note and {**note, "source": source}
            except Exception as error:  # noqa: BLE001 - PIL raises many kinds, bombs included
                file = str(self.images.root / self.images.files[image])
                refuse_system_error(error, file)
                note = note or {"image": image, "file": file, "reason": unreadable_reason(error)}
        return torch.zeros(self.images.shape, dtype=torch.uint8), {**note, "source": None}


def collate(items):
    pixels, notes = zip(*items, strict=True)
    return torch.stack(pixels), [note for note in notes if note]


def batches_of(images, batch_size):
    """A range of images as lists of batch_size, the last shorter."""
    return [list(images[i : i + batch_size]) for i in range(0, len(images), batch_size)]


def make_loader(args, images, batches, accelerator):
    """Iterator over (pixels (b, 3, H, W), notes) of the batches, in their order."""
    on_gpu = accelerator.device.type == "cuda"
    workers = args.num_workers
    if workers is None:
        cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        workers = min(16, max(1, cores)) if on_gpu else 1  # a CPU needs its cores to encode
    loader = DataLoader(
        Pixels(images, args.skip_unreadable),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=on_gpu,
        worker_init_fn=detach_worker,
    )
    with starting_workers():
        return iter(loader)


# ------------------------------------------------------------ encoding


class Encoder:
    """Encodes batches in their order, computing one while the one before it is written.

    loader: iterator over (uint8 pixels, notes). `waited` is how long it let us wait, in seconds.
    """

    def __init__(self, autoencoder, loader, device, flip):
        self.autoencoder, self.loader, self.device, self.flip = autoencoder, loader, device, flip
        self.waited = 0.0

    def _launch(self, pixels):
        """Begin to compute float16 records (n, 2C, h, w); returns a function that waits for them.

        n is len(pixels), or twice that with flips, the flipped image after each image.
        """
        x = pixels.to(self.device, non_blocking=True).float() / 127.5 - 1
        if self.flip:
            x = torch.stack([x, x.flip(-1)], 1).flatten(0, 1)
        moments = self.autoencoder.moments(x).half()
        finite = torch.isfinite(moments).all().to("cpu", non_blocking=True)
        records = moments.to("cpu", non_blocking=True)
        done = torch.cuda.Event() if self.device.type == "cuda" else None
        if done:
            done.record()

        def wait():
            if done:
                done.synchronize()
            if not finite:
                raise utils.UserError(
                    "moments of an image are not finite in float16: use --precision=fp32, or "
                    "another autoencoder if that does not help"
                )
            return records.numpy()

        return wait

    def __iter__(self):
        """Yields (float16 records, notes) of every batch."""
        before = None
        while True:
            began = time.monotonic()
            batch = next(self.loader, None)
            self.waited += time.monotonic() - began
            launched = batch and (self._launch(batch[0]), batch[1])
            if before:
                yield before[0](), before[1]
            if launched is None:
                return
            before = launched


class Bar:
    """The progress bar of the main process: images of all processes, those of earlier runs too."""

    def __init__(self, packing, shown):
        self.packing, self.began = packing, time.monotonic()
        self.before = self.finished()
        total = packing.settings["num_images"]
        self.bar = tqdm(total=total, initial=self.before, unit="img", disable=not shown)

    def finished(self):
        """Images in finished shards."""
        left = sum(len(self.packing.images(number)) for number in self.packing.missing())
        return self.packing.settings["num_images"] - left

    def count(self):
        """Set the bar to what all processes have finished."""
        if not self.bar.disable:
            self.bar.update(self.finished() - self.bar.n)

    def report(self, waited):
        """The last line: img/s of this run, and how much of its time it waited for images."""
        self.bar.close()
        seconds = max(time.monotonic() - self.began, 1e-9)
        return (
            f"{(self.finished() - self.before) / seconds:.1f} img/s, {waited / seconds:.0%} of the "
            "time waiting for images to be read"
        )


def encode_shard(packing, number, encoded, num_batches, bar, stop):
    """Write one shard, or note why it cannot be; SystemExit where the run is asked to stop."""
    notes = []
    with ShardWriter(packing, number) as writer:
        for _ in range(num_batches):
            beat("encoding")
            records, unreadable = next(encoded)
            writer.write(records)
            notes += unreadable
            bar.bar.update(len(records) // (1 + packing.settings["flips"]))
            if stop.requested:
                print("stopped as asked: the same command goes on from here", file=sys.stderr)
                sys.exit(STOPPED)
        if any(note["source"] is None for note in notes):
            reasons = {note["file"]: note["reason"] for note in notes}
            packing.write_state(number, {"unreadable": reasons})
        else:
            writer.commit({str(note["image"]): note["source"] for note in notes})
    bar.count()


# ------------------------------------------------------------ the whole


def lock(output):
    """Keep other runs out of the folder."""
    try:
        return utils.RunLock(output)
    except utils.UserError as error:
        raise utils.UserError(str(error).replace("--workdir", "--output")) from error


def deal(accelerator, packing):
    """The numbers of the shards that this process makes; None if all are there and checked."""
    missing = [None]
    if accelerator.is_main_process:
        missing = [None if packing.begin() else packing.missing()]
    broadcast_object_list(missing)
    beat(WAITING)  # also of a process that has nothing to do, and goes
    if missing[0] is None:
        return None
    return missing[0][accelerator.process_index :: accelerator.num_processes]


def wait_for_others(packing, bar, stop):
    """Wait for the shards of other processes; should one of them fail, the launcher ends us, and
    should it hang, libs.runtime.watch."""
    beat(WAITING)
    while packing.missing() and not stop.requested:
        bar.count()
        time.sleep(0.5)
    if stop.requested:
        sys.exit(STOPPED)


def refuse_unreadable(packing):
    """UserError if any process met images that cannot be read."""
    states = (packing.state(number) for number in range(packing.num_shards))
    unreadable = {
        file: why for state in states for file, why in state.get("unreadable", {}).items()
    }
    if unreadable:
        named = [f"{file} ({why})" for file, why in list(unreadable.items())[:NAMED]]
        raise utils.UserError(
            f"{len(unreadable)} images cannot be read: {'; '.join(named)}"
            f"{'; ...' if len(unreadable) > NAMED else ''}; put readable ones of the same names "
            "there, or give --skip_unreadable to let the next image stand in for each, and run "
            "the same command again"
        )


def finish(packing, labels):
    """Write the manifest, once every shard is there."""
    refuse_unreadable(packing)
    packing.finish(labels)
    features = Features(packing.folder)
    stand_ins = features.manifest["stand_ins"]
    if stand_ins:
        print(
            f"{len(stand_ins)} images could not be read, the next stands in: "
            f"{utils.listed(stand_ins)}",
            file=sys.stderr,
        )
    return features


def describe(features):
    classes = f" in {features.num_classes} classes" if features.num_classes else ""
    return (
        f"{features.folder}: {features.num_images:,} images{classes}, {len(features):,} records "
        f"of {features.shape} in {len(features.manifest['shards'])} shards"
    )


def verify(folder):
    features = Features(folder)
    files = len(features.manifest["shards"]) + (features.labels is not None)
    with tqdm(total=files, unit="file") as bar:
        features.verify(lambda file: bar.update())
    print(f"verified {describe(features)}")


def extract(args, accelerator):
    """All shards that are not there yet, then the manifest."""
    main_process, device = accelerator.is_main_process, accelerator.device
    images = get_dataset(
        args.dataset, path=args.path, resolution=args.resolution, labels=args.labels
    )
    autoencoder = load_autoencoder(args.autoencoder).to(device, DTYPES[args.precision])
    packing = Packing(args.output, settings_of(args, images, autoencoder))
    if main_process:
        packing.check()  # before the lock's file is put into somebody else's folder
    with lock(args.output) if main_process else contextlib.nullcontext(), StopRequest() as stop:
        shards = deal(accelerator, packing)
        if shards is None:
            if main_process:
                print(f"complete already: {describe(Features(args.output))}")
            return
        batches = {number: batches_of(packing.images(number), args.batch_size) for number in shards}
        loader = make_loader(args, images, sum(batches.values(), []), accelerator)
        encoder = Encoder(autoencoder, loader, device, args.flip)
        encoded, bar = iter(encoder), Bar(packing, shown=main_process)
        for number in shards:
            encode_shard(packing, number, encoded, len(batches[number]), bar, stop)
        if main_process:
            wait_for_others(packing, bar, stop)
            report = bar.report(encoder.waited)
            print(f"wrote {describe(finish(packing, images.labels))}\n{report}")


def main(args):
    """args: the flags of FLAGS."""
    check_flags(args)
    if args.verify:
        return verify(args.output)
    accelerator = make_accelerator()
    extract(args, accelerator)
    accelerator.end_training()  # else gloo's threads now and then abort the process at its end


if __name__ == "__main__":
    run_main(main, FLAGS)
