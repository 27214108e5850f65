"""Codecs: between the items of a data set, or images in [-1, 1], and what the network sees."""

import torch

from libs.data.autoencoder import Scaling, load_autoencoder, sample_moments
from utils import UserError

IMAGE_CHANNELS = 3


class PixelCodec:
    """The network sees the pixels themselves."""

    needs_noise = False  # whether encode draws

    def to(self, device):
        return self

    def latent_shape(self, item_shape):
        """(C, H, W) of a data set's item or of an image -> (C, H, W) of z."""
        return tuple(item_shape)

    def image_shape(self, z_shape):
        """(C, H, W) of z -> (C, H, W) of the image that it decodes to."""
        return tuple(z_shape)

    def encode(self, x, noise=None):
        """x (B, C, H, W) in [-1, 1] -> z of the same shape."""
        return x

    def decode(self, z):
        """z (B, C, H, W) -> images (B, C, H, W) float32 in [0, 1]."""
        return (z.float() * 0.5 + 0.5).clamp(0, 1)

    def describe(self):
        """The settings that a result depends on, for its record."""
        return {}


class LatentCodec:
    """The network sees scaled latents of a KL autoencoder (Rombach et al., arXiv 2112.10752).

    autoencoder: libs.data.autoencoder.Autoencoder, or None, which only encodes moments. On a GPU it
    computes in float16, as the official scripts do, or in float32 if its config.json says so.
    """

    needs_noise = True

    def __init__(self, autoencoder, *, scaling, latent_channels=4, downsample=8):
        self.autoencoder, self.scaling = autoencoder, scaling
        self.latent_channels, self.downsample = latent_channels, downsample

    def to(self, device):
        if self.autoencoder:
            self.autoencoder.to(device)
        return self

    def latent_shape(self, item_shape):
        """(3, H, W) of an image, or (2C, h, w) of moments -> (C, h, w) of z."""
        channels, height, width = item_shape
        if channels != IMAGE_CHANNELS:
            return channels // 2, height, width
        return self.latent_channels, height // self.downsample, width // self.downsample

    def image_shape(self, z_shape):
        """(C, h, w) of z -> (3, H, W) of the image that it decodes to."""
        return IMAGE_CHANNELS, z_shape[1] * self.downsample, z_shape[2] * self.downsample

    def encode(self, x, noise):
        """Images (B, 3, H, W) in [-1, 1] or moments (B, 2C, h, w), noise (B, C, h, w) standard
        normal -> scaled z (B, C, h, w) float32.
        """
        if x.shape[1] == IMAGE_CHANNELS:
            with self._autocast(x.device):
                x = self.autoencoder.moments(x)
        return sample_moments(x, noise, self.scaling)

    def decode(self, z):
        """Scaled z (B, C, h, w) -> images (B, 3, H, W) float32 in [0, 1]."""
        with self._autocast(z.device):
            return (self.autoencoder.decode(self.scaling.unscale(z)) * 0.5 + 0.5).clamp(0, 1)

    def _autocast(self, device):
        on = device.type == "cuda" and not self.autoencoder.force_upcast
        return torch.autocast(device.type, torch.float16, enabled=on)

    def describe(self):
        sha256 = self.autoencoder.sha256 if self.autoencoder else None
        scaling = {k: v for k, v in self.scaling._asdict().items() if v is not None}
        return {"autoencoder_sha256": sha256, **scaling}


def make_latent_codec(settings, dataset=None, *, decoding=True):
    """The LatentCodec of a config's section `autoencoder`, its autoencoder loaded if it has a path.
    The scaling is the section's, else the autoencoder's, else that of the latents' autoencoder.

    dataset: what is to be encoded, if anything; decoding: whether pictures are wanted. UserError:
    no such file, no path though an autoencoder is needed, or latents of another autoencoder.
    """
    path, autoencoder = settings.pretrained_path, None
    if not path and (decoding or dataset is None or not dataset.latent):
        raise UserError(
            "this needs the autoencoder: set --config.autoencoder.pretrained_path to U-ViT's "
            "autoencoder_kl_ema.pth or to a diffusers folder (or, to train on latents without "
            "pictures, train.grid_samples and train.fid_samples to 0)"
        )
    if path:
        autoencoder = load_autoencoder(path, tiling=settings.tiling)
        used, made_with = autoencoder.sha256, getattr(dataset, "autoencoder_sha256", None)
        if made_with not in (None, used):
            raise UserError(f"the latents were made with autoencoder {made_with}, not with {used}")
    made = autoencoder or dataset
    given = {key: settings[key] for key in Scaling._fields if settings[key] is not None}
    shape = dict(latent_channels=made.latent_channels, downsample=made.downsample)
    return LatentCodec(autoencoder, scaling=made.scaling._replace(**given), **shape)
