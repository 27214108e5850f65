"""Features of images: the networks that extract them, by name."""

import hashlib
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from libs.evaluate.inception import InceptionFeatures, TensorFlowInceptionFeatures
from libs.evaluate.metrics import METRICS
from libs.files import hash_file, load_strict, read_arrays, read_safetensors, read_torch, reading
from libs.runtime import read_batches
from utils import UserError, look_up


def _read_tensors(path, usual):
    """name -> tensor of a .safetensors, an .npz or a torch file; UserError where there is none."""
    if not (path and Path(path).is_file()):
        raise UserError(f"there is no {path}: give the feature network's {usual}")
    readers = {".safetensors": read_safetensors, ".npz": read_arrays}
    found = readers.get(Path(path).suffix, read_torch)(path)
    return {name: torch.as_tensor(x) for name, x in found.items()}


class Classifier(nn.Module):
    """A small convolutional classifier; `f` and `h` are names in its files."""

    def __init__(self, *, channels, num_classes):
        super().__init__()
        widths, strides = (32, 64, 64, 128, 128), (1, 2, 1, 2, 1)
        self.f = nn.Sequential(*(
            nn.Sequential(nn.Conv2d(i, o, 3, stride, 1), nn.BatchNorm2d(o), nn.ReLU())
            for i, o, stride in zip((channels, *widths), widths, strides, strict=False)
        ))  # fmt: skip
        self.h = nn.Linear(widths[-1], num_classes)

    def forward(self, images):
        """(B, C, H, W) in [-1, 1] -> logits (B, classes)."""
        return self.h(self.f(images).mean((2, 3)))  # (B, 128, H/4, W/4) -> (B, 128)


class ClassifierFeatures:
    """Features and classes by a file of scripts/train_classifier.py, or an .npz of its tensors."""

    kind, path, dim = "classifier", None, 128

    def __init__(self, path=None, device="cpu"):
        path, file = path or self.path, "file of scripts/train_classifier.py"
        tensors = _read_tensors(path, file)
        with reading(path, file):
            channels, num_classes = tensors["f.0.0.weight"].shape[1], len(tensors["h.bias"])
        self.network = Classifier(channels=channels, num_classes=num_classes)
        load_strict(self.network, tensors, path)
        # Of the tensors, whichever kind of file they come from.
        weights = b"".join(x.numpy().tobytes() for x in self.network.state_dict().values())
        self.name = f"{self.kind}-{hashlib.sha256(weights).hexdigest()[:8]}"
        self.network.eval().requires_grad_(False).to(device)
        self.device = torch.device(device)

    @torch.no_grad()
    def _map(self, images):
        with torch.autocast(self.device.type, enabled=False):
            return self.network.f(2 * images.to(self.device, torch.float32) - 1)

    def __call__(self, images):
        """images float32 (B, C, H, W) in [0, 1] -> float32 (B, 128), also inside autocast."""
        return self._map(images).mean((2, 3))

    def tokens(self, images):
        """images float32 (B, C, H, W) in [0, 1] -> float32 (B, H/4 W/4, 128), in raster order."""
        return self._map(images).flatten(2).mT

    def classify(self, features):
        """features float32 (B, 128) -> int64 (B,), the most likely class."""
        return self.network.h(features).argmax(1)


class DigitsClassifierFeatures(ClassifierFeatures):
    """Of the digits, by the file that `make demo` makes."""

    kind = "digits_classifier"
    path = Path(__file__).resolve().parents[2] / "assets/digits_classifier.safetensors"


class Dinov2Features:
    """DINOv2 (Oquab et al., arXiv 2304.07193) of any size, with or without registers, by timm, from
    Meta's file or timm's .safetensors. Nothing is downloaded.

    For tokens an image is resized to 14/16 of its side: a token stands for 16 x 16 of its pixels,
    as in REPA (arXiv 2410.06940). For the class token it is resized to 224 pixels, as the Frechet
    distance takes it (EDM2, arXiv 2312.02696). The precision is autocast's.
    """

    def __init__(self, path=None, device="cpu"):
        import timm  # of the extra `repa`

        tensors = _read_tensors(path, "dinov2_vitb14_pretrain.pth or another size")
        with reading(path, "DINOv2"):
            _, places, self.dim = tensors["pos_embed"].shape
            registers = "_reg4" if {"reg_token", "register_tokens"} & tensors.keys() else ""
            # The largest alone has another kind of MLP; the other sizes differ in these numbers.
            name = f"vit_{'giant' if self.dim == 1536 else 'base'}_patch14{registers}_dinov2"
            self.network = timm.create_model(
                name, pretrained=True, pretrained_cfg_overlay={"state_dict": tensors},
                embed_dim=self.dim, depth=sum(key.endswith("attn.qkv.weight") for key in tensors),
                num_heads=self.dim // 64, img_size=14 * math.isqrt(places), num_classes=0,
                dynamic_img_size=True,
            )  # fmt: skip
        self.network.eval().requires_grad_(False).to(device)
        self.sha256, self.device = hash_file(path), device
        self.name = f"dinov2-{self.sha256[:8]}"
        imagenet = torch.tensor([(0.485, 0.456, 0.406), (0.229, 0.224, 0.225)], device=device)
        self.mean, self.std = imagenet[:, :, None, None]

    @torch.no_grad()
    def _run(self, images, size):
        """images (B, 3 or 1, H, W) in [0, 1] -> float32 (B, 1 + registers + N, dim)."""
        images = images.to(self.device, torch.float32)
        images = F.interpolate(images, size, mode="bicubic", antialias=True)
        return self.network.forward_features((images - self.mean) / self.std).float()

    def __call__(self, images):
        """images float32 (B, 3, H, W) in [0, 1] -> class tokens, float32 (B, dim)."""
        return self._run(images, (224, 224))[:, 0]

    def tokens(self, images):
        """images float32 (B, 3, H, W) in [0, 1] -> float32 (B, H/16 W/16, dim), in raster order."""
        size = [14 * (side // 16) for side in images.shape[2:]]
        return self._run(images, size)[:, self.network.num_prefix_tokens :]


# name -> class(path or None, device) with `name`, `dim`, a call images (B, C, H, W) in [0, 1] ->
# (B, dim) and, if it has them, `classify`: (B, dim) -> labels; `tokens`: images -> (B, N, dim);
# `kinds` {name: width} and `extract`: images -> {name: (B, width)}, the call's among them.
FEATURES = {"inception": InceptionFeatures, "inception_tf": TensorFlowInceptionFeatures}
FEATURES |= {"digits_classifier": DigitsClassifierFeatures, "classifier": ClassifierFeatures}
FEATURES |= {"dinov2": Dinov2Features}


def make_features(name, path, device):
    """The feature network of that name in FEATURES, None of 'none'; path None: its usual place."""
    return None if name == "none" else look_up(FEATURES, name, "sample.features")(path, device)


BATCH = 100  # images at a time through the feature networks, 2 GB of Inception's activations


class Extractors:
    """The feature networks that `metrics` need: one pass over images serves all.

    settings: config.sample, with features, fid_weights_path and, for the kind `dinov2`,
    dinov2_path. dims, names: the width and network of each kind. UserError: a kind that the
    networks lack.
    """

    def __init__(self, settings, metrics, device):
        wanted = {"features": ""} | {METRICS[metric].kind: metric for metric in metrics}
        self.first = make_features(settings.features, settings.fid_weights_path, device)
        self.second = None
        self.name, self.classify = self.first.name, getattr(self.first, "classify", None)
        widths = {"features": self.first.dim, **getattr(self.first, "kinds", {})}
        if "dinov2" in wanted:
            self.second = make_features("dinov2", settings.dinov2_path, device)
            widths["dinov2"] = self.second.dim
        if missing := wanted.keys() - widths.keys():
            raise UserError(
                f"the metric {wanted[missing.pop()]} needs Inception: set "
                "--config.sample.features=inception or inception_tf, or leave it out"
            )
        self.dims = {kind: widths[kind] for kind in wanted}
        networks = {kind: self.second if kind == "dinov2" else self.first for kind in wanted}
        self.names = {kind: network.name for kind, network in networks.items()}
        self.hashes = {x.name: getattr(x, "sha256", None) for x in networks.values()}

    def _extract(self, images):
        extract = getattr(self.first, "extract", None)
        found = extract(images) if extract else {"features": self.first(images)}
        return found | ({"dinov2": self.second(images)} if self.second else {})

    def __call__(self, images):
        """images (B, C, H, W) in [0, 1] -> {kind: float32 (B, width)}."""
        parts = [self._extract(part) for part in images.split(BATCH)]
        return {kind: torch.cat([part[kind] for part in parts]) for kind in self.dims}


def round_to_8_bit(images):
    """Images in [0, 1] rounded as PNG files hold them, so that figures describe the files."""
    return (images * 255).round() / 255


def to_images(pixels, device="cpu"):
    """uint8 array (B, H, W, 3) -> float32 (B, 3, H, W) in [0, 1] on `device`."""
    return torch.from_numpy(np.array(pixels)).to(device).permute(0, 3, 1, 2) / 255


def extract_features(dataset, indices, extractors, *, batch_size=BATCH, num_workers=0):
    """For each batch of the images `indices` of a data set, in 8 bits, on the CPU: {kind: features
    (B, width)} and, with classes, `correct`, bool (B,): which are classified as their labels.
    """
    classify = extractors.classify if dataset.num_classes else None
    order = dict(batch_size=batch_size, sampler=[(0, index) for index in indices])
    rng = torch.Generator()  # a DataLoader draws; not from the training's stream
    for x, y in read_batches(dataset, num_workers=num_workers, generator=rng, **order):
        found = extractors(round_to_8_bit(x * 0.5 + 0.5))
        correct = {"correct": classify(found["features"]).cpu() == y} if classify else {}
        yield {name: rows.cpu() for name, rows in found.items()} | correct
