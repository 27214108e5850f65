"""The frozen KL autoencoder of Stable Diffusion: images <-> latents (Rombach et al. 2022, arXiv
2112.10752).

The network is diffusers' AutoencoderKL; its weights come from LDM's files or from diffusers'
folders, without running code from them.
"""

import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from libs.files import read_safetensors, read_torch, sha256_of
from utils import UserError, listed, read_json

SCALE_FACTOR = 0.18215  # Stable Diffusion's latents get about unit variance by it
NORM_GROUPS = 32
LOGVAR_RANGE = (-30.0, 20.0)
FOLDER_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
USE_ANOTHER = "use Stable Diffusion's, such as U-ViT's autoencoder_kl.pth"

# Output pixels that the network, or at higher resolution one convolution of it, computes at a time.
PIXELS_PER_PASS = 512 * 512
ENCODED_PER_PASS = 4 * PIXELS_PER_PASS  # 16 images of 256x256: 22 to 60% faster than 4 (H200)

# ------------------------------------------------------------ names

# diffusers' words -> LDM's, in this order. LDM numbers the decoder's levels from the finest.
_LDM_WORDS = {
    ".mid_block.resnets.0.": ".mid.block_1.", ".mid_block.resnets.1.": ".mid.block_2.",
    ".mid_block.attentions.0.": ".mid.attn_1.", ".group_norm.": ".norm.", ".to_q.": ".q.",
    ".to_k.": ".k.", ".to_v.": ".v.", ".to_out.0.": ".proj_out.", ".down_blocks.": ".down.",
    ".resnets.": ".block.", ".downsamplers.0.": ".downsample.", ".upsamplers.0.": ".upsample.",
    ".conv_shortcut.": ".nin_shortcut.", ".conv_norm_out.": ".norm_out.",
}  # fmt: skip
# Attention in older diffusers folders -> now.
_OLD_WORDS = {
    ".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0.",
}  # fmt: skip


def _reworded(name, words):
    for word, other in words.items():
        name = name.replace(word, other)
    return name


def _ldm_name(name, levels):
    """LDM's name of the tensor that diffusers calls `name`, in a network of `levels` levels."""
    return re.sub(
        r"\.up_blocks\.(\d+)\.",
        lambda match: f".up.{levels - 1 - int(match[1])}.",
        _reworded(name, _LDM_WORDS),
    )


def _is_attention_matrix(name):
    """Whether a tensor, by either name, is (C, C) in diffusers and (C, C, 1, 1) in LDM."""
    return ".att" in name and name.endswith(".weight") and "norm" not in name


def _as_in_diffusers(name, tensor):
    is_1x1 = _is_attention_matrix(name) and tensor.shape[2:] == (1, 1)
    return tensor.flatten(1) if is_1x1 else tensor


def to_ldm(network):
    """name -> tensor of an AutoencoderKL as LDM and U-ViT write it: what autoencoder_kl.pth holds.

    The attention's matrices become 1x1 convolutions, (C, C, 1, 1).
    """
    levels = len(network.encoder.down_blocks)
    return {
        _ldm_name(name, levels): tensor[..., None, None] if _is_attention_matrix(name) else tensor
        for name, tensor in network.state_dict().items()
    }


# ------------------------------------------------------------ the network that fits the tensors


def _count(pattern, names):
    """How many different values the pattern's group takes at the start of the names."""
    return len({match[1] for match in (re.match(pattern, name) for name in names) if match})


def _architecture(shapes, down, block, source):
    """Keywords of diffusers' AutoencoderKL for tensors of these shapes (name -> shape).

    down, block: what the encoder's levels and their blocks are called there. Raises UserError.
    """

    def size(name, axis):
        if len(shapes.get(name, ())) != 4:
            what = f"has the shape {shapes[name]}" if name in shapes else "is missing"
            raise UserError(
                f"{source} is not Stable Diffusion's autoencoder: the convolution {name} {what}, "
                f"and it holds {listed(shapes)}; {USE_ANOTHER}"
            )
        return shapes[name][axis]

    in_channels = size("encoder.conv_in.weight", 1)
    levels = max(1, _count(rf"{down}\.(\d+)\.", shapes))
    widths = [size(f"{down}.{level}.{block}.0.conv1.weight", 0) for level in range(levels)]
    if any(width < 1 or width % NORM_GROUPS for width in widths):
        raise UserError(
            f"{source} has levels of {widths} channels, expected multiples of {NORM_GROUPS}, the "
            f"groups of its norms; {USE_ANOTHER}"
        )
    return dict(
        in_channels=in_channels,
        out_channels=size("decoder.conv_out.weight", 0),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(widths),
        layers_per_block=_count(rf"{down}\.0\.{block}\.(\d+)\.", shapes),
        latent_channels=size("decoder.conv_in.weight", 1),
        norm_num_groups=NORM_GROUPS,
        use_quant_conv="quant_conv.weight" in shapes,
        use_post_quant_conv="post_quant_conv.weight" in shapes,
        mid_block_add_attention=any(re.search(r"\.mid\w*\.att", name) for name in shapes),
    )


def _check_fit(expected, found, source):
    """UserError unless two dicts name -> shape are equal; it names the first few differences."""
    problems = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "of the wrong shape": [
            f"{name} {found[name]} instead of {expected[name]}"
            for name in expected
            if name in found and found[name] != expected[name]
        ],
    }
    said = [f"{kind}: {listed(names)}" for kind, names in problems.items() if names]
    if said:
        raise UserError(
            f"the weights in {source} fit no autoencoder of Stable Diffusion's kind; "
            f"{'; '.join(said)}; {USE_ANOTHER}"
        )


def network_from_state(tensors, source="this state dict"):
    """diffusers' AutoencoderKL in float32 from tensors by LDM's or diffusers' names, all of them.

    Everything about the network is read from the shapes. It takes the tensors as its parameters,
    so nothing is allocated for float32 ones, and those on the meta device give a network there.
    Raises UserError, naming `source`, if names or shapes are those of another network.
    """
    from diffusers import AutoencoderKL  # seconds to import

    is_ldm = any(name.startswith("encoder.down.") for name in tensors)
    if not is_ldm:
        tensors = {_reworded(name, _OLD_WORDS): tensor for name, tensor in tensors.items()}
    tensors = {name: _as_in_diffusers(name, tensor) for name, tensor in tensors.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    words = ("encoder.down", "block") if is_ldm else ("encoder.down_blocks", "resnets")
    architecture = _architecture(shapes, *words, source)
    with torch.device("meta"):
        network = AutoencoderKL(**architecture)
    own = network.state_dict()
    levels = len(architecture["block_out_channels"])
    in_file = {name: _ldm_name(name, levels) if is_ldm else name for name in own}
    _check_fit({in_file[name]: tuple(own[name].shape) for name in own}, shapes, source)
    state = {name: tensors[in_file[name]].float() for name in own}
    network.load_state_dict(state, assign=True)
    return network


# ------------------------------------------------------------ files


def _read_tensors(path):
    """name -> floating-point tensor of one file, under the autoencoder's own names; UserError."""
    contents = read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)
    if isinstance(contents, dict) and isinstance(contents.get("state_dict"), dict):
        contents = contents["state_dict"]
    tensors = {str(name): x for name, x in contents.items()} if isinstance(contents, dict) else {}
    prefix = "first_stage_model."  # in a checkpoint of a whole latent diffusion model
    inner = {name[len(prefix) :]: x for name, x in tensors.items() if name.startswith(prefix)}
    training = ("loss.", "model_ema.")
    tensors = {name: x for name, x in (inner or tensors).items() if not name.startswith(training)}
    odd = [
        name
        for name, x in tensors.items()
        if not (torch.is_tensor(x) and x.is_floating_point() and x.layout is torch.strided)
    ]
    if odd or not tensors:
        what = f"what is no floating-point tensor: {listed(odd)}" if odd else "no tensors by name"
        raise UserError(f"{path} is no autoencoder, it holds {what}; {USE_ANOTHER}")
    if sum(x.numel() * x.element_size() for x in tensors.values()) > path.stat().st_size:
        raise UserError(f"{path} is damaged: its tensors claim more than it holds; fetch it again")
    return tensors


def _check_folder(path, scale_factor):
    """UserError if a diffusers folder's config.json asks for what no tensor's shape would show."""
    config = read_json(path / "config.json")
    only = {
        "_class_name": "AutoencoderKL", "norm_num_groups": NORM_GROUPS, "act_fn": "silu",
        "scaling_factor": scale_factor, "shift_factor": None, "latents_mean": None,
        "latents_std": None,
    }  # fmt: skip
    for key, expected in only.items():
        found = config.get(key) if isinstance(config, dict) else None
        if found is not None and found != expected:
            raise UserError(
                f"{path / 'config.json'} has {key} {found!r}, expected {expected!r}: use Stable "
                "Diffusion's autoencoder, and the scale_factor that its config.json has"
            )


def _weights_file(path, scale_factor):
    """The file with the weights at `path`, a file or a diffusers folder; UserError if none."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(
            f"there is no autoencoder {path}: put Stable Diffusion's there, as U-ViT's "
            "autoencoder_kl.pth or autoencoder_kl_ema.pth, as .safetensors or as a diffusers folder"
        )
    found = [path / name for name in FOLDER_WEIGHTS if (path / name).is_file()]
    if not found or not (path / "config.json").is_file():
        raise UserError(
            f"the folder {path} is no diffusers autoencoder: it needs config.json and "
            f"{' or '.join(FOLDER_WEIGHTS)}; give the folder of the autoencoder itself (vae)"
        )
    _check_folder(path, scale_factor)
    return found[0]


def load_autoencoder(path, *, scale_factor=SCALE_FACTOR):
    """The Autoencoder at `path`, on the CPU in float32 (half precision in the file is converted).

    path: U-ViT's autoencoder_kl.pth or autoencoder_kl_ema.pth, any LDM checkpoint with such an
    autoencoder (nested in 'state_dict', under 'first_stage_model.'), the same in .safetensors, or a
    diffusers folder (config.json beside the weights). What LDM's training adds, loss.* and
    model_ema.*, is ignored. Raises UserError, one sentence, if it is missing, damaged, holds
    pickled code (never executed) or another network, or disagrees with `scale_factor`.
    """
    file = _weights_file(Path(path), scale_factor)
    network = network_from_state(_read_tensors(file), file)
    return Autoencoder(network, scale_factor=scale_factor, sha256=sha256_of(file))


# ------------------------------------------------------------ decoding in bounded memory


def _convolve(conv, x, scale=1):
    """conv(x), of x enlarged `scale` times: (B, C, H, W) -> (B, C', scale*H, scale*W).

    Exact at any size. It goes by stripes of rows, so that what it needs beside x and the result
    (x enlarged, other memory layouts, workspace) is for PIXELS_PER_PASS pixels.
    """

    def enlarged(x):
        return x if scale == 1 else F.interpolate(x, scale_factor=scale, mode="nearest")

    batch_size, _, height, width = x.shape
    rows = max(1, PIXELS_PER_PASS // (batch_size * width * scale**2))
    if rows >= height:
        return conv(enlarged(x))
    halo = conv.padding[0]  # rows of x that a stripe needs beyond its own
    out = x.new_empty(batch_size, conv.out_channels, scale * height, scale * width)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        first, last = max(top - halo, 0), min(bottom + halo, height)
        # Zeros beyond the image's edges; inside, an enlarged halo is cut to what is needed (< 0).
        pad = (halo - scale * (top - first), halo - scale * (last - bottom))
        stripe = F.pad(enlarged(x[:, :, first:last]), (0, 0, *pad))
        out[:, :, scale * top : scale * bottom] = F.conv2d(
            stripe, conv.weight, conv.bias, padding=(0, halo)
        )
    return out


def _activated(norm, x):
    return F.silu(norm(x), inplace=True)


def _residual(block, x):
    """diffusers' ResnetBlock2D without a time embedding: (B, C, H, W) -> (B, C', H, W)."""
    h = _convolve(block.conv1, _activated(block.norm1, x))
    h = _activated(block.norm2, h)
    h = _convolve(block.conv2, h)
    return h.add_(x if block.conv_shortcut is None else _convolve(block.conv_shortcut, x))


def _decoded(decoder, h):
    """diffusers' Decoder: (B, C, h, w) -> (B, 3, H, W), holding no more than a block's tensors."""
    h = decoder.mid_block(decoder.conv_in(h))
    for up_block in decoder.up_blocks:
        for block in up_block.resnets:
            h = _residual(block, h)
        for upsampler in up_block.upsamplers or ():
            h = _convolve(upsampler.conv, h, scale=2)
    h = _activated(decoder.conv_norm_out, h)
    return _convolve(decoder.conv_out, h)


# ------------------------------------------------------------ the autoencoder


def sample_moments(moments, noise, scale_factor):
    """Scaled latents of moments: scale_factor * (mean + exp(logvar / 2) * noise), float32.

    moments (B, 2C, h, w): mean, then log-variance, which is clamped here to [-30, 20];
    noise (B, C, h, w) standard normal -> (B, C, h, w). Needs no network.
    """
    mean, logvar = moments.float().chunk(2, 1)
    if noise.shape != mean.shape:
        raise ValueError(f"noise {tuple(noise.shape)} does not fit moments {tuple(moments.shape)}")
    return scale_factor * (mean + (0.5 * logvar.clamp(*LOGVAR_RANGE)).exp() * noise.float())


class Autoencoder(nn.Module):
    """A frozen AutoencoderKL with a latent scale, for one device; computes without gradients.

    `.to(torch.bfloat16)` or `.to(torch.float16)` sets the type it computes in; inputs are cast to
    it and results are float32. latent_channels; downsample: pixels a latent's side; scale_factor;
    sha256: of the weights file, None for a network made otherwise.
    """

    def __init__(self, network, *, scale_factor=SCALE_FACTOR, sha256=None):
        super().__init__()
        if not (scale_factor > 0 and math.isfinite(scale_factor)):
            raise UserError(
                f"the autoencoder's scale_factor is {scale_factor}, expected a positive number, "
                f"{SCALE_FACTOR} for Stable Diffusion's"
            )
        self.network = network
        self.in_channels = network.config.in_channels
        self.latent_channels = network.config.latent_channels
        self.downsample = 2 ** (len(network.config.block_out_channels) - 1)
        self.scale_factor = scale_factor
        self.sha256 = sha256
        self.eval().requires_grad_(False)

    def _check_shape(self, what, x, channels):
        if x.ndim != 4 or x.shape[1] != channels or not x.numel():
            raise UserError(
                f"the autoencoder needs {what} (B, {channels}, H, W), not {tuple(x.shape)}"
            )

    def _passes(self, x, images):
        """`x` in chunks of the network's type, `images` in each or at least one."""
        dtype = next(self.parameters()).dtype
        return [chunk.to(dtype) for chunk in x.split(max(1, images))]

    @torch.no_grad()
    def moments(self, x):
        """x (B, 3, H, W) in [-1, 1] -> float32 (B, 2C, H/f, W/f): mean, log-variance unclamped.

        Raises UserError unless H and W are multiples of f, `downsample`.
        """
        height, width = x.shape[-2:]
        self._check_shape("images", x, self.in_channels)
        if height % self.downsample or width % self.downsample:
            raise UserError(
                f"the autoencoder cannot encode {height}x{width} pixels: crop or resize images to "
                f"multiples of {self.downsample}"
            )
        encoder, quant_conv = self.network.encoder, self.network.quant_conv or nn.Identity()
        passes = self._passes(x, ENCODED_PER_PASS // (height * width))
        return torch.cat([quant_conv(encoder(chunk)).float() for chunk in passes])

    def sample(self, moments, noise):
        """moments (B, 2C, h, w), noise (B, C, h, w) -> scaled latents z (B, C, h, w) float32."""
        return sample_moments(moments, noise, self.scale_factor)

    def encode(self, x, noise):
        """x (B, 3, H, W) in [-1, 1], noise (B, C, H/f, W/f) -> scaled z like noise, float32."""
        return self.sample(self.moments(x), noise)

    @torch.no_grad()
    def decode(self, z):
        """Scaled z (B, C, h, w) -> images float32 (B, 3, f*h, f*w), about in [-1, 1], unclamped.

        Exact at any size and batch: group statistics and attention see the whole image. Of images
        beyond 512x512, one is decoded at a time, its convolutions in stripes. Its tensors then take
        5 times its pixels in the finest width: at 1536x1536, 128 channels, float32 5.6 GiB.
        """
        self._check_shape("latents", z, self.latent_channels)
        post_quant_conv = self.network.post_quant_conv or nn.Identity()
        pixels = z.shape[-2] * z.shape[-1] * self.downsample**2
        passes = self._passes(z / self.scale_factor, PIXELS_PER_PASS // pixels)
        images = [_decoded(self.network.decoder, post_quant_conv(chunk)) for chunk in passes]
        return torch.cat([image.float() for image in images])
