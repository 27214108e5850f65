"""Features of images: the networks that extract them, by name, and the features of real images."""

import hashlib
import math
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

from libs.evaluate.metrics import load_statistics, make_feature_set
from libs.files import hash_file, load_strict, read_arrays, read_safetensors, read_torch, reading
from libs.runtime import read_batches
from utils import UserError, look_up

# As in the published file's name, pt_inception-2015-12-05-6726825d.pth.
INCEPTION_SHA256_PREFIX = "6726825d"


def _find_inception_weights():
    """The file in torch hub's cache (under TORCH_HOME), downloaded from pytorch-fid if absent."""
    from pytorch_fid.inception import FID_WEIGHTS_URL

    path = Path(torch.hub.get_dir(), "checkpoints", FID_WEIGHTS_URL.rsplit("/", 1)[-1])
    try:
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(FID_WEIGHTS_URL, str(path), INCEPTION_SHA256_PREFIX)
        return path
    except Exception as error:  # of the network, the disk or the hash
        raise UserError(
            f"the FID network's weights could not be downloaded ({error}): put {path.name} into "
            f"{path.parent}, or give sample.fid_weights_path (--weights of compute_fid_stats.py)"
        ) from error


class InceptionFeatures:
    """pool3 features (2048) of the FID Inception, as pytorch-fid computes them; UserError for
    weights other than the published ones. path None: torch hub's cache, else a download.
    """

    dim = 2048

    def __init__(self, path=None, device="cpu"):
        from pytorch_fid import inception

        path = path or _find_inception_weights()
        digest = hash_file(path)
        if not digest.startswith(INCEPTION_SHA256_PREFIX):
            expected = f"with {digest[:8]}, expected {INCEPTION_SHA256_PREFIX}"
            raise UserError(f"{path} has not pytorch-fid's weights: its sha256 starts {expected}")
        self.name, self.device = f"inception_v3_fid-{digest[:8]}", device
        weights = read_torch(path)
        # pytorch-fid downloads in its constructor: it is handed the checked weights instead.
        with mock.patch.object(inception, "load_state_dict_from_url", lambda *_, **__: weights):
            self.network = inception.InceptionV3().eval().to(device)

    @torch.inference_mode()
    def __call__(self, images):
        """images float32 (B, 3, H, W) in [0, 1], any size -> float32 (B, 2048)."""
        return self.network(images.to(self.device, torch.float32))[0].flatten(1)


def _read_tensors(path, usual):
    """name -> tensor of a .safetensors, an .npz or a torch file; UserError where there is none."""
    if not (path and Path(path).is_file()):
        raise UserError(f"there is no {path}: give the feature network's file, {usual}")
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
        path = path or self.path
        tensors = _read_tensors(path, "of scripts/train_classifier.py")
        with reading(path, "file of scripts/train_classifier.py"):
            channels, num_classes = tensors["f.0.0.weight"].shape[1], len(tensors["h.bias"])
        self.network = Classifier(channels=channels, num_classes=num_classes)
        load_strict(self.network, tensors, path)
        # Of the tensors: safetensors writes its metadata in random order, so files differ.
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

    def classify(self, images):
        """images float32 (B, C, H, W) in [0, 1] -> int64 (B,), the most likely class."""
        return self.network.h(self(images)).argmax(1)


class DigitsClassifierFeatures(ClassifierFeatures):
    """Of the digits, by the file that `make demo` makes."""

    kind = "digits_classifier"
    path = Path(__file__).resolve().parents[2] / "assets/digits_classifier.safetensors"


class Dinov2Features:
    """DINOv2 (Oquab et al., arXiv 2304.07193) of any size, with or without registers, by timm, from
    Meta's file or timm's .safetensors. Nothing is downloaded.

    An image is resized to 14/16 of its side: a token stands for 16 x 16 of its pixels, as in REPA
    (arXiv 2410.06940). Inside autocast the network computes in its precision.
    """

    def __init__(self, path=None, device="cpu"):
        import timm  # of the extra `repa`

        tensors = _read_tensors(path, "dinov2_vitb14_pretrain.pth or another size")
        with reading(path, "DINOv2"):
            self.dim, places = tensors["cls_token"].shape[-1], tensors["pos_embed"].shape[1]
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
        self.name, self.device = f"dinov2-{hash_file(path)[:8]}", device
        imagenet = torch.tensor([(0.485, 0.456, 0.406), (0.229, 0.224, 0.225)], device=device)
        self.mean, self.std = imagenet[:, :, None, None]

    @torch.no_grad()
    def _run(self, images):
        """images (B, 3 or 1, H, W) in [0, 1] -> float32 (B, 1 + registers + N, dim)."""
        size = [14 * (side // 16) for side in images.shape[2:]]
        images = images.to(self.device, torch.float32)
        images = F.interpolate(images, size, mode="bicubic", antialias=True)
        return self.network.forward_features((images - self.mean) / self.std).float()

    def __call__(self, images):
        """images float32 (B, 3, H, W) in [0, 1] -> class tokens, float32 (B, dim)."""
        return self._run(images)[:, 0]

    def tokens(self, images):
        """images float32 (B, 3, H, W) in [0, 1] -> float32 (B, H/16 W/16, dim), in raster order."""
        return self._run(images)[:, self.network.num_prefix_tokens :]


# name -> class(path or None, device) with `name`, `dim`, a call images (B, C, H, W) in [0, 1] ->
# (B, dim) and, if it has them, `classify`: images -> labels (B,); `tokens`: images -> (B, N, dim).
FEATURES = {"inception": InceptionFeatures, "digits_classifier": DigitsClassifierFeatures}
FEATURES |= {"classifier": ClassifierFeatures, "dinov2": Dinov2Features}


def make_features(name, path, device):
    """The feature network of that name in FEATURES, None of 'none'; path None: its usual place."""
    return None if name == "none" else look_up(FEATURES, name, "sample.features")(path, device)


MEASURE_UP_TO = 10_000  # images of a data set without a statistics file
BATCH = 50  # images at a time through the feature network, 1 GB of Inception's activations


def round_to_8_bit(images):
    """Images in [0, 1] rounded as PNG files hold them, so that figures describe the files."""
    return (images * 255).round() / 255


def extract_features(dataset, indices, features, *, batch_size=BATCH, num_workers=0):
    """For each batch of the images `indices` of a data set: features (B, dim), images (B, C, H, W)
    as 8-bit files hold them, and labels (B,), all on the CPU.
    """
    order = dict(batch_size=batch_size, sampler=[(0, index) for index in indices])
    rng = torch.Generator()  # a DataLoader draws; not from the training's stream
    for x, y in read_batches(dataset, num_workers=num_workers, generator=rng, **order):
        images = round_to_8_bit(x * 0.5 + 0.5)
        yield features(images).cpu(), images, y


def load_real(settings, features, dataset, *, side, device):
    """The FeatureSet of the real images: of the statistics file dataset.fid_stats if it is given,
    else of `dataset`, not augmented or None, measured here. settings: config.dataset; side: of the
    generated images in pixels. UserError: neither a file nor a data set of few images; they do not
    fit the generated ones.
    """
    if settings.fid_stats:
        return load_statistics(
            settings.fid_stats, extractor=features.name, resolution=side, dim=features.dim
        )
    if dataset is None or getattr(dataset, "latent", False) or len(dataset) > MEASURE_UP_TO:
        raise UserError(
            "dataset.fid_stats names no statistics file: make one with "
            "scripts/compute_fid_stats.py, and pass --config.dataset.fid_stats=FILE"
        )
    if dataset.shape[-1] != side:
        raise UserError(
            f"the images of the data set {settings.name} are {dataset.shape[-1]} pixels wide, but "
            f"the generated images {side}: give dataset.resolution or dataset.fid_stats that fit"
        )
    classify = getattr(features, "classify", None) if dataset.num_classes else None
    rows, agreeing = [], 0
    for found, images, labels in extract_features(dataset, range(len(dataset)), features):
        rows.append(found)
        if classify:
            agreeing += (classify(images).cpu() == labels).sum().item()
    identity = {"dataset": settings.name, "list_sha256": dataset.list_sha256(*dataset.sizes)}
    source = {"file": None, "count": len(dataset), "known": True, "images": identity}
    agreement = agreeing / len(dataset) if classify else None
    return make_feature_set(torch.cat(rows).numpy(), device, agreement=agreement, source=source)
