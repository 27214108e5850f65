"""The frozen KL autoencoder of Stable Diffusion: images <-> latents (Rombach et al. 2022, arXiv
2112.10752). The network is diffusers' AutoencoderKL.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from libs.files import hash_file, read_safetensors, read_torch, reading
from utils import UserError

# The architecture of weights in a single file: a folder with diffusers' config.json.
STABLE_DIFFUSION = Path(__file__).resolve().parents[2] / "configs" / "autoencoder_kl"
FOLDER_WEIGHTS = "diffusion_pytorch_model"  # .safetensors, .fp16.safetensors, .bin, ...

# Pixels that the network decodes at a time, and encodes.
PIXELS_PER_PASS = 512 * 512
ENCODED_PER_PASS = 4 * PIXELS_PER_PASS  # 16 images of 256x256: 22 to 60% faster than 4 (H200)


def load_autoencoder(path, *, tiling=False):
    """The Autoencoder at `path`, on the CPU in float32 (half precision in the file is converted).

    path: U-ViT's autoencoder_kl.pth or autoencoder_kl_ema.pth, any LDM checkpoint with such an
    autoencoder (nested in 'state_dict', under 'first_stage_model.'), the same in .safetensors, or a
    diffusers folder (config.json beside the weights). Raises UserError for a missing file and for
    weights of another network.
    """
    path = Path(path)
    found = [*path.glob(FOLDER_WEIGHTS + "*.safetensors"), *path.glob(FOLDER_WEIGHTS + "*.bin")]
    weights = min(found, key=lambda file: (file.suffix == ".bin", len(file.name)), default=path)
    if not weights.is_file():
        raise UserError(
            f"there is no autoencoder {path}: put Stable Diffusion's there, as U-ViT's "
            "autoencoder_kl.pth or autoencoder_kl_ema.pth, as .safetensors or as a diffusers folder"
        )
    safe = weights.suffix == ".safetensors"
    with reading(weights, "KL autoencoder of Stable Diffusion's or its config.json's shape"):
        from diffusers import AutoencoderKL  # seconds to import

        if path.is_dir():
            variant = weights.stem.partition(".")[2] or None
            options = dict(local_files_only=True, use_safetensors=safe, variant=variant)
            network = AutoencoderKL.from_pretrained(path, **options)
        else:
            tensors = read_safetensors(path) if safe else read_torch(path)
            tensors = tensors.get("state_dict", tensors)
            options = dict(local_files_only=True, config=str(STABLE_DIFFUSION))
            network = AutoencoderKL.from_single_file(tensors, **options)
        network.float()
    if tiling:
        network.enable_tiling()
        network.enable_slicing()
    return Autoencoder(network, sha256=hash_file(weights))


class Scaling(NamedTuple):
    """z = (latent - shift_factor - latents_mean) * scale_factor / latents_std, as diffusers has it;
    the last two are tuples, a value a channel.
    """

    scale_factor: float = 0.18215  # Stable Diffusion's: about unit variance
    shift_factor: float | None = None
    latents_mean: tuple | None = None
    latents_std: tuple | None = None

    def _get(self, x):
        scale, shift = self.scale_factor, self.shift_factor or 0.0
        if self.latents_std:
            scale = scale / x.new_tensor(self.latents_std)[:, None, None]
        if self.latents_mean:
            shift = shift + x.new_tensor(self.latents_mean)[:, None, None]
        return scale, shift

    def scale(self, latents):
        scale, shift = self._get(latents)
        return scale * (latents - shift)

    def unscale(self, z):
        scale, shift = self._get(z)
        return z / scale + shift


def sample_moments(moments, noise, scaling):
    """Scaled latents of moments: mean + exp(logvar / 2) * noise by `scaling`, float32.

    moments (B, 2C, h, w): mean, then log-variance, which is clamped here to [-30, 20];
    noise (B, C, h, w) standard normal -> (B, C, h, w). Needs no network.
    """
    mean, logvar = moments.float().chunk(2, 1)
    return scaling.scale(mean + (0.5 * logvar.clamp(-30.0, 20.0)).exp() * noise.float())


class Autoencoder(nn.Module):
    """A frozen AutoencoderKL for one device; computes without gradients.

    `.to(torch.bfloat16)` or `.to(torch.float16)` sets the type it computes in; inputs are cast to
    it and results are float32. latent_channels; downsample: pixels a latent's side; scaling: the
    Scaling of its config.json; force_upcast: its config.json says that float16 overflows;
    sha256: of the weights file, None for a network made otherwise.
    """

    def __init__(self, network, *, sha256=None):
        super().__init__()
        self.network = network
        self.latent_channels = network.config.latent_channels
        self.downsample = 2 ** (len(network.config.block_out_channels) - 1)
        config, self.sha256 = network.config, sha256
        values = [config.scaling_factor, *(config.get(key) for key in Scaling._fields[1:])]
        self.scaling = Scaling(*(tuple(x) if isinstance(x, list) else x for x in values))
        # Without the key, as in Stable Diffusion's files, float16 does; diffusers' default is true.
        unsaid = "force_upcast" in config.get("_use_default_values", ())
        self.force_upcast = config.force_upcast and not unsaid
        self.eval().requires_grad_(False)

    def _split(self, x, images):
        """`x` in chunks of the network's type, `images` in each or at least one."""
        dtype = next(self.parameters()).dtype
        return [chunk.to(dtype) for chunk in x.split(max(1, images))]

    @torch.no_grad()
    def moments(self, x):
        """x (B, 3, H, W) in [-1, 1] -> float32 (B, 2C, H/f, W/f): mean, log-variance unclamped.

        H and W are multiples of f, `downsample`.
        """
        chunks = self._split(x, ENCODED_PER_PASS // (x.shape[-2] * x.shape[-1]))
        encoded = [self.network.encode(chunk).latent_dist.parameters for chunk in chunks]
        return torch.cat([moments.float() for moments in encoded])

    @torch.no_grad()
    def decode(self, latents):
        """Unscaled (B, C, h, w) -> images float32 (B, 3, f*h, f*w), about in [-1, 1], unclamped."""
        pixels = latents.shape[-2] * latents.shape[-1] * self.downsample**2
        chunks = self._split(latents, PIXELS_PER_PASS // pixels)
        return torch.cat([self.network.decode(chunk).sample.float() for chunk in chunks])
