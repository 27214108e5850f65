"""DiM, the Mamba backbone for image diffusion (arXiv 2405.14224, section 3).

Tokens stay in raster order for the whole network; a scan direction is an index order given to the
mixer. The numbers equal those of the official network, its oddities included.
"""

import math

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import nn

from libs.model import layers
from libs.model.attention import Attention
from libs.model.block import Block
from libs.model.layers import EXTRA_TOKENS
from libs.model.mamba import Mamba
from libs.model.routing import route_index
from libs.model.scan_order import block_patterns, pad_index, sequence_order
from libs.model.skips import tune_skip
from utils import bind, look_up

# Width and depth of the paper's models. Parameters: S 50,568,716 at 32x32x3 with 10 classes; L
# 386,063,376 and H 862,407,184 at 32x32x4 with 1,000 classes. XL is ours, to compare backbones:
# 672,756,496 there, DiT-XL/2's 675 million less 0.3%, and no padding.
PRESETS = {
    "S": dict(dim=512, depth=25), "L": dict(dim=1024, depth=49), "H": dict(dim=1536, depth=49),
    "XL": dict(dim=1280, depth=55, num_pad_tokens=0),
}  # fmt: skip

# MIXERS[name](dim, **keywords) is a mixer as libs.model.block.Block has it. A mixer may have also
# `init_weights(depth)`, its initialisation in a network, `use_fp8(device)`, and
# `make_constants(dtype)`, see libs.runtime.SamplingNetwork.
MIXERS = {"mamba": Mamba, "attention": Attention}


class DiM(nn.Module, PyTorchModelHubMixin):
    """Predicts noise, data or velocity from a noisy image or latent, its time and its class.
    `from_pretrained` reads folders of `save_pretrained` alone, of networks without heads or routing
    (strict=False leaves those out).

    configs.common.dim_nnet explains the keywords. The position table is made for input_size, a side
    or (height, width); other sizes interpolate it. Label `num_classes` is the null class of
    classifier-free guidance. mixer: of MIXERS, as dict(name="attention", heads=16).
    num_pad_tokens: padding columns, padding rows and split tokens. pad_layout: of
    scan_order.PAD_LAYOUTS. skip_tuning, freeu: see libs.model.skips.tune_skip.

    UserError: an unknown mixer, an even depth, an input size that the patch size does not divide.
    """

    def __init__(
        self, *, input_size, in_channels, dim, depth, num_classes, patch_size=2, mixer=None,
        mamba=None, num_pad_tokens=None, pad_layout="lateral", scan_directions=3,
        mlp_time_embed=False, drop_path=0.0, activation_checkpointing=False, skip_tuning=None,
        freeu=None,
    ):  # fmt: skip
        super().__init__()
        self.input_size, self.native_grid = layers.fit_patches(input_size, patch_size)
        self.patch_size, self.in_channels, self.num_classes = patch_size, in_channels, num_classes
        self.dim, self.depth, self.num_skips = dim, depth, (depth - 1) // 2
        self.pad_layout, self.patterns = pad_layout, block_patterns(depth, scan_directions)
        self.reuse_from = depth // 3  # the first inner block, for calls with `reused`
        self.drop_path, self.activation_checkpointing = drop_path, activation_checkpointing
        self.skip_tuning, self.freeu = skip_tuning, freeu
        mamba, keywords = {"d_conv": 3, **(mamba or {})}, dict(mixer or {"name": "mamba"})
        self.pad = mamba["d_conv"] if num_pad_tokens is None else num_pad_tokens
        kind = look_up(MIXERS, keywords.pop("name"), "nnet.mixer.name")
        keywords = {**mamba, **keywords} if kind is Mamba else keywords
        make_mixer = bind(kind, "nnet.mixer", dim, **keywords)

        rows = EXTRA_TOKENS + math.prod(self.native_grid)
        self.pos_embed = nn.Parameter(torch.zeros(1, rows, dim))
        self.patch_embed = layers.PatchEmbedding(in_channels, dim, patch_size, stride=patch_size)
        self.time_embed = layers.make_time_mlp(dim, 4 * dim, dim) if mlp_time_embed else None
        self.label_embed = nn.Embedding(num_classes + 1, dim)
        self.modulation = layers.SharedModulation(dim, num_classes)
        self.split_tokens = nn.Parameter(torch.empty(self.pad, dim))
        self.pad_tokens = nn.Parameter(torch.empty(self.pad, dim))
        self.first_smoother = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.blocks = nn.ModuleList(
            Block(dim, make_mixer, has_skip=k > self.num_skips, half_output=k >= self.num_skips)
            for k in range(depth)
        )
        self.last_smoother = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm_out = nn.RMSNorm(dim)
        self.head_modulation = nn.Linear(dim, 2 * dim)
        self.head = nn.Linear(dim, patch_size**2 * in_channels)
        self.heads = nn.ModuleDict()  # further ones, see libs.model.heads
        self.routing = None  # or a Routing, see libs.model.routing
        self.reset_parameters()

    @classmethod
    def _from_pretrained(cls, *, strict=True, **options):
        return super()._from_pretrained(strict=strict, **options)

    def use_fp8(self, device):
        """From now on the large products of mixers and skips are in fp8 under autocast; UserError
        if the device cannot.
        """
        for module in self.modules():
            if module is not self and hasattr(module, "use_fp8"):
                module.use_fp8(torch.device(device))

    @torch.no_grad()
    def reset_parameters(self):
        """The official one: zero biases, embeddings normal 0.02; mixers have their own."""
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for block in self.blocks:
            if hasattr(block.mixer, "init_weights"):
                block.mixer.init_weights(self.depth)
        for linear in (self.modulation.time_mlp[0], self.modulation.time_mlp[2]):
            nn.init.normal_(linear.weight, std=0.02)
        for tokens in (self.split_tokens, self.pad_tokens):
            nn.init.normal_(tokens, std=0.02)

    def forward(self, x, t, y=None, *, hidden=(), drop_path_draw=None, route=None, reused=None):
        """The prediction (B, C, H, W), in autocast's dtype; float32 outside autocast.

        Args:
            x: (B, C, H, W) float32, H and W divisible by the patch size, square or not.
            t: (B,) network time, 0..1000, may be fractional.
            y: (B,) int64 labels in 0..num_classes; None for num_classes, the null class.
            hidden: numbers of blocks, counted from 0, and names of heads; with them the result is
                (prediction, {number: tokens after that block (B, L, dim), in raster order, with
                padding; name: what the head makes of the image tokens after its block}).
            drop_path_draw: (B, depth) uniform in [0, 1), of stochastic depth; None draws here.
            route: (B, h/2, w/2) int64, 0 to 3, of the h x w patches: the one token of each 2x2
                group that routed blocks see; None for all.
            reused: (B, L, dim), taken for the tokens after block depth - reuse_from, as `hidden`
                gave them in another call; of the inner blocks, reuse_from to that one, run only
                those up to the last that `hidden` asks for.
        """
        _, (h, w) = layers.fit_patches(x.shape[2:], self.patch_size)
        y = torch.full((x.shape[0],), self.num_classes, device=x.device) if y is None else y
        time = layers.sinusoidal_embedding(t, self.dim).to(self.pos_embed.dtype)  # (B, dim)
        time = time if self.time_embed is None else self.time_embed(time)         # (B, dim)
        label = self.label_embed(y)                                               # (B, dim)
        modulation = self.modulation(t, y)                                        # (B, 3, dim)
        tokens = self.embed(x, time, label, (h, w))                               # (B, L, dim)
        scales = self.drop_path_scales(tokens, drop_path_draw)
        blocks = {k: self.heads[k].block if isinstance(k, str) else k for k in hidden}
        arguments = tokens, t, modulation, (h, w), scales, blocks.values(), route, reused
        tokens, by_block = self.run_blocks(*arguments)
        image = self.smooth(self.last_smoother, self.crop(tokens, (h, w)))        # (B, h, w, dim)
        condition = F.silu(time + label)                                          # (B, dim)
        own = self.norm_out, self.head_modulation, self.head, self.patch_size
        out = layers.predict_image(image, condition, *own)                        # (B, C, H, W)
        inner = {k: by_block[block] for k, block in blocks.items()}
        for name in (name for name in self.heads if name in inner):
            inner[name] = self.heads[name](self.crop(inner[name], (h, w)), condition)
        return (out, inner) if hidden else out

    def embed(self, x, time, label, grid):
        """[time, label, split tokens, padded grid]: (B, 2 + pad + (h+pad)*(w+pad), dim)."""
        h, w = grid
        positions = layers.interpolate_positions(self.pos_embed, self.native_grid, grid)
        extra = torch.stack([time, label], dim=1) + positions[:, :EXTRA_TOKENS]   # (B, 2, dim)
        image = self.patch_embed(x)                                               # (B, h, w, dim)
        image = image + positions[:, EXTRA_TOKENS:].unflatten(1, grid).to(image.dtype)
        image = self.smooth(self.first_smoother, image)
        index = pad_index(self.pad_layout, h, w, self.pad, x.device)
        right, bottom = self.pad_tokens[index[:h, w:]], self.pad_tokens[index[h:]]
        return layers.pad_sequence(image, extra, self.split_tokens, right, bottom)

    def crop(self, tokens, grid):
        """The image tokens (B, h, w, dim) of a sequence."""
        h, w = grid
        image = tokens[:, EXTRA_TOKENS + self.pad :].unflatten(1, (h + self.pad, w + self.pad))
        return image[:, :h, :w]

    def smooth(self, smoother, image):
        """A depthwise 3x3 convolution over image tokens (B, h, w, dim)."""
        return smoother(image.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def drop_path_scales(self, x, draw):
        """Stochastic depth (Huang et al. 2016): for each block None, or the factors (B,) of its
        branch: 1 / probability where the draw is below the probability, else 0.
        """
        if not (self.training and self.drop_path):
            return [None] * self.depth
        draw = torch.rand(x.shape[0], self.depth, device=x.device) if draw is None else draw
        scales = [None]
        for k in range(1, self.depth):
            probability = 1 - self.drop_path * k / (self.depth - 1)
            scales.append((draw[:, k] < probability).float() / probability)
        return scales

    def run_blocks(self, x, t, modulation, grid, drop_path_scales, hidden, route, reused):
        """(tokens after all blocks, {number: tokens after that block} of the numbers `hidden`).
        Blocks 1..K save their output, the last K take the outputs back, the latest first.
        """
        front, routing = EXTRA_TOKENS + self.pad, self.routing
        routed = routing.blocks if routing else range(0)
        if routed:
            route = x.new_zeros(len(x), *grid, dtype=torch.int64) if route is None else route
            index = route_index(route, grid, self.pad)
        grids = (route.shape[1:] if k in routed else grid for k in range(self.depth))
        walks = zip(self.patterns, grids, strict=True)
        orders = [sequence_order(p, *sides, self.pad, front, x.device) for p, sides in walks]
        saved, inner, dense = [], {}, None  # saved: for long skips
        last = self.depth - self.reuse_from
        first = max([self.reuse_from, *(k + 1 for k in hidden if k <= last)])
        left_out = range(first, last + 1) if reused is not None else ()
        for k, block in enumerate(self.blocks):
            if k in left_out:
                x, dense = reused, None
                del saved[self.reuse_from - 1 :]  # the others are of inner pairs
                continue
            if k in routed[:1]:
                dense, x = x, x.take_along_dim(index[..., None], 1)
            skip, consumer = None, k - self.num_skips - 1
            if consumer >= 0:
                tuning = t, self.skip_tuning, self.freeu, orders[k - 1]
                x, skip = tune_skip(x, saved.pop(), consumer, self.num_skips, *tuning)
            arguments = (x, modulation, orders[k], drop_path_scales[k], skip)
            given, (x, kept) = x, layers.run_block(block, self.activation_checkpointing, *arguments)
            if saved and saved[-1] is given:
                saved[-1] = kept  # half the memory, where it is rounded
            if 1 <= k <= self.num_skips:
                saved.append(x)
            if k in routed[-1:]:
                x, dense = routing.restore(x, dense, index), None
            if k in hidden:
                inner[k] = x if dense is None else routing.restore(x, dense, index)
        return x, inner
