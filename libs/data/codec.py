"""Codecs: between the items of a data set, or images in [-1, 1], and what the network sees."""

import torch

from libs.data.autoencoder import load_autoencoder, sample_moments
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
        """What a result depends on, for recipes."""
        return {}


class LatentCodec:
    """The network sees scaled latents of a KL autoencoder (Rombach et al., arXiv 2112.10752).

    autoencoder: libs.data.autoencoder.Autoencoder, or None, which only encodes moments. On a GPU it
    computes in float16, as the official scripts do (golden item 30).
    """

    needs_noise = True

    def __init__(self, autoencoder=None, *, scale_factor):
        self.autoencoder, self.scale_factor = autoencoder, scale_factor
        # Without one, those of Stable Diffusion's
        self.downsample = autoencoder.downsample if autoencoder else 8
        self.latent_channels = autoencoder.latent_channels if autoencoder else 4

    def to(self, device):
        if self.autoencoder:
            self.autoencoder.to(device)
        return self

    def latent_shape(self, item_shape):
        """(3, H, W) of an image, or (2C, h, w) of moments -> (C, h, w) of z."""
        channels, height, width = item_shape
        if channels != IMAGE_CHANNELS and channels % 2 == 0:
            return channels // 2, height, width
        if channels != IMAGE_CHANNELS:
            raise UserError(
                f"the autoencoder encodes images of {IMAGE_CHANNELS} channels, not {channels}: "
                "choose another data set, or a config for pixels"
            )
        f = self.downsample
        if height % f or width % f:
            raise UserError(
                f"the autoencoder cannot encode {height}x{width} pixels: choose a resolution that "
                f"is a multiple of {f}"
            )
        return self.latent_channels, height // f, width // f

    def image_shape(self, z_shape):
        """(C, h, w) of z -> (3, H, W) of the image that it decodes to."""
        return IMAGE_CHANNELS, z_shape[1] * self.downsample, z_shape[2] * self.downsample

    def require_autoencoder(self):
        """The autoencoder; UserError without one."""
        if self.autoencoder is None:
            raise UserError(
                "this needs the autoencoder: set --config.autoencoder.pretrained_path to U-ViT's "
                "autoencoder_kl_ema.pth or to a diffusers folder (or, to train on latents without "
                "pictures, train.grid_samples and train.fid_samples to 0)"
            )
        return self.autoencoder

    def encode(self, x, noise):
        """Images (B, 3, H, W) in [-1, 1] or moments (B, 2C, h, w), noise (B, C, h, w) standard
        normal -> scaled z (B, C, h, w) float32."""
        if x.shape[1] != IMAGE_CHANNELS:
            return sample_moments(x, noise, self.scale_factor)
        with _float16_on_a_gpu(x.device):
            return self.require_autoencoder().encode(x, noise)

    def decode(self, z):
        """Scaled z (B, C, h, w) -> images (B, 3, H, W) float32 in [0, 1]."""
        with _float16_on_a_gpu(z.device):
            return (self.require_autoencoder().decode(z) * 0.5 + 0.5).clamp(0, 1)

    def describe(self):
        """What a result depends on, for recipes."""
        sha256 = self.autoencoder.sha256 if self.autoencoder else None
        return {"autoencoder_sha256": sha256, "scale_factor": self.scale_factor}


def _float16_on_a_gpu(device):
    """Whatever precision the network runs in around it."""
    return torch.autocast(device.type, torch.float16, enabled=device.type == "cuda")


def latent_codec(config, dataset=None, *, decoding=True):
    """The LatentCodec of a config, its autoencoder loaded where a path is given.

    dataset: what is to be encoded, if anything; decoding: whether pictures are wanted.

    Raises:
        UserError: no such file, no path though one is needed, or latents of `dataset` made with
            another autoencoder or scale.
    """
    path, scale_factor = config.autoencoder.pretrained_path, config.autoencoder.scale_factor
    autoencoder = load_autoencoder(path, scale_factor=scale_factor) if path else None
    codec = LatentCodec(autoencoder, scale_factor=scale_factor)
    if decoding or not getattr(dataset, "latent", False):
        codec.require_autoencoder()
    made_with = getattr(dataset, "autoencoder_sha256", None)
    if made_with and autoencoder and made_with != autoencoder.sha256:
        raise UserError(
            f"the latents were made with the autoencoder of SHA-256 {made_with[:12]}.., but {path} "
            f"has {autoencoder.sha256[:12]}..: name the one they were made with"
        )
    made_scale = getattr(dataset, "scale_factor", None)
    if made_scale and made_scale != scale_factor:
        raise UserError(
            f"the latents are for a scale factor of {made_scale}, but autoencoder.scale_factor is "
            f"{scale_factor}: use the same"
        )
    return codec
