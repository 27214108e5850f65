"""The frozen KL autoencoder of Stable Diffusion: images <-> latents (Rombach et al. 2022, arXiv
2112.10752). The network is diffusers' AutoencoderKL.
"""

from pathlib import Path

import torch
from torch import nn

from libs.files import read_safetensors, read_torch, sha256_of
from utils import UserError

SCALE_FACTOR = 0.18215  # Stable Diffusion's latents get about unit variance by it
LOGVAR_RANGE = (-30.0, 20.0)
# The architecture of weights in a single file: a folder with diffusers' config.json.
STABLE_DIFFUSION = Path(__file__).resolve().parents[2] / "configs" / "autoencoder_kl"
FOLDER_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")

# Pixels that the network decodes at a time, and encodes.
PIXELS_PER_PASS = 512 * 512
ENCODED_PER_PASS = 4 * PIXELS_PER_PASS  # 16 images of 256x256: 22 to 60% faster than 4 (H200)


def _read_file(path, architecture):
    """AutoencoderKL of a single file with LDM's names, at the top or in 'state_dict'."""
    from diffusers import AutoencoderKL  # seconds to import

    tensors = read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)
    tensors = tensors.get("state_dict", tensors)
    return AutoencoderKL.from_single_file(tensors, config=str(architecture), local_files_only=True)


def _read_folder(path, scale_factor):
    from diffusers import AutoencoderKL

    safe = (path / FOLDER_WEIGHTS[0]).is_file()
    network = AutoencoderKL.from_pretrained(path, local_files_only=True, use_safetensors=safe)
    settings = network.config
    if settings.scaling_factor != scale_factor or settings.shift_factor:
        raise ValueError(
            f"its config.json has scaling_factor {settings.scaling_factor} and shift_factor "
            f"{settings.shift_factor}, but autoencoder.scale_factor is {scale_factor}, without a "
            "shift"
        )
    return network


def load_autoencoder(
    path, *, scale_factor=SCALE_FACTOR, tiling=False, architecture=STABLE_DIFFUSION
):
    """The Autoencoder at `path`, on the CPU in float32 (half precision in the file is converted).

    path: U-ViT's autoencoder_kl.pth or autoencoder_kl_ema.pth, any LDM checkpoint with such an
    autoencoder (nested in 'state_dict', under 'first_stage_model.'), the same in .safetensors, or a
    diffusers folder (config.json beside the weights). architecture: a folder with the config.json
    of a single file. Raises UserError for a missing file and for weights of another network.
    """
    path = Path(path)
    weights = next((path / name for name in FOLDER_WEIGHTS if (path / name).is_file()), path)
    if not weights.is_file():
        raise UserError(
            f"there is no autoencoder {path}: put Stable Diffusion's there, as U-ViT's "
            "autoencoder_kl.pth or autoencoder_kl_ema.pth, as .safetensors or as a diffusers folder"
        )
    try:
        is_file = weights == path
        network = _read_file(path, architecture) if is_file else _read_folder(path, scale_factor)
        network.float()
    except UserError:
        raise
    except Exception as error:  # diffusers raises many kinds for weights that do not fit
        raise UserError(f"{path} is not Stable Diffusion's autoencoder: {error}") from error
    if tiling:
        network.enable_tiling()
        network.enable_slicing()
    return Autoencoder(network, scale_factor=scale_factor, sha256=sha256_of(weights))


def sample_moments(moments, noise, scale_factor):
    """Scaled latents of moments: scale_factor * (mean + exp(logvar / 2) * noise), float32.

    moments (B, 2C, h, w): mean, then log-variance, which is clamped here to [-30, 20];
    noise (B, C, h, w) standard normal -> (B, C, h, w). Needs no network.
    """
    mean, logvar = moments.float().chunk(2, 1)
    return scale_factor * (mean + (0.5 * logvar.clamp(*LOGVAR_RANGE)).exp() * noise.float())


class Autoencoder(nn.Module):
    """A frozen AutoencoderKL with a latent scale, for one device; computes without gradients.

    `.to(torch.bfloat16)` or `.to(torch.float16)` sets the type it computes in; inputs are cast to
    it and results are float32. latent_channels; downsample: pixels a latent's side; scale_factor;
    sha256: of the weights file, None for a network made otherwise.
    """

    def __init__(self, network, *, scale_factor=SCALE_FACTOR, sha256=None):
        super().__init__()
        self.network = network
        self.latent_channels = network.config.latent_channels
        self.downsample = 2 ** (len(network.config.block_out_channels) - 1)
        self.scale_factor, self.sha256 = scale_factor, sha256
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

    def encode(self, x, noise):
        """x (B, 3, H, W) in [-1, 1], noise (B, C, H/f, W/f) -> scaled z like noise, float32."""
        return sample_moments(self.moments(x), noise, self.scale_factor)

    @torch.no_grad()
    def decode(self, z):
        """Scaled z (B, C, h, w) -> images float32 (B, 3, f*h, f*w), about in [-1, 1], unclamped."""
        pixels = z.shape[-2] * z.shape[-1] * self.downsample**2
        chunks = self._split(z / self.scale_factor, PIXELS_PER_PASS // pixels)
        return torch.cat([self.network.decode(chunk).sample.float() for chunk in chunks])
