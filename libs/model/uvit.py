"""U-ViT, the transformer baseline (Bao et al., arXiv 2209.12152): all inputs are tokens, long skips
join shallow and deep blocks.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

from libs.model import layers
from libs.model.attention import Attention


class Block(nn.Module):
    """A pre-norm transformer block that may first merge a long skip by Linear(2 dim, dim)."""

    def __init__(self, dim, heads, mlp_ratio, qkv_bias, has_skip):
        super().__init__()
        self.skip = nn.Linear(2 * dim, dim) if has_skip else None
        self.norm1, self.attn = nn.LayerNorm(dim), Attention(dim, heads=heads, qkv_bias=qkv_bias)
        self.norm2, hidden = nn.LayerNorm(dim), int(dim * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x, skip=None):
        """x, skip (B, L, dim) -> (B, L, dim)."""
        if self.skip is not None:
            x = self.skip(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class UViT(nn.Module):
    """The network of U-ViT, with DiM's interface.

    depth: blocks, half of them before and half after the middle block. num_classes: 0 for no
    labels; otherwise label `num_classes` is the null class. final_conv: a 3x3 convolution on the
    output image. The other keywords are DiM's.
    """

    def __init__(
        self, *, input_size, in_channels, dim, depth, heads, num_classes, patch_size=2, mlp_ratio=4,
        qkv_bias=False, mlp_time_embed=False, final_conv=True, activation_checkpointing=False,
    ):  # fmt: skip
        super().__init__()
        self.input_size, self.native_grid = layers.fit_patches(input_size, patch_size)
        self.patch_size, self.in_channels = patch_size, in_channels
        self.dim, self.num_classes = dim, num_classes
        self.activation_checkpointing = activation_checkpointing
        self.extra_tokens = 2 if num_classes else 1
        rows = self.extra_tokens + math.prod(self.native_grid)
        self.pos_embed = nn.Parameter(torch.zeros(1, rows, dim))
        self.patch_embed = layers.PatchEmbedding(in_channels, dim, patch_size, stride=patch_size)
        self.time_embed = layers.make_time_mlp(dim, 4 * dim, dim) if mlp_time_embed else None
        self.label_embed = nn.Embedding(num_classes + 1, dim) if num_classes else None
        block = functools.partial(Block, dim, heads, mlp_ratio, qkv_bias)
        self.in_blocks = nn.ModuleList(block(has_skip=False) for _ in range(depth // 2))
        self.mid_block = block(has_skip=False)
        self.out_blocks = nn.ModuleList(block(has_skip=True) for _ in range(depth // 2))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, patch_size**2 * in_channels)
        self.final_conv = nn.Conv2d(in_channels, in_channels, 3, padding=1) if final_conv else None
        self.heads = nn.ModuleDict()  # further ones, see libs.model.heads
        self.reset_parameters()

    @property
    def blocks(self):
        """All blocks, in the order of the forward pass."""
        return [*self.in_blocks, self.mid_block, *self.out_blocks]

    @torch.no_grad()
    def reset_parameters(self):
        """Linear weights and positions truncated normal 0.02, Linear biases zero."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x, t, y=None, hidden=()):
        """x (B, C, H, W), t (B,) network time, y (B,) int64 or None (null) -> (B, C, H, W), or with
        names of heads in `hidden` (the same, {name: what the head makes of its block's tokens}).
        """
        _, grid = layers.fit_patches(x.shape[2:], self.patch_size)
        tokens = self.embed(x, t, y, grid)                              # (B, extra + h*w, dim)
        extra, skips, inner = self.extra_tokens, [], {}
        condition = F.silu(tokens[:, :extra].sum(1))                    # (B, dim)
        for k, block in enumerate(self.blocks):
            skip = () if block.skip is None else (skips.pop(),)
            tokens = layers.run_block(block, self.activation_checkpointing, tokens, *skip)
            if k < len(self.in_blocks):
                skips.append(tokens)
            for name in (name for name in hidden if self.heads[name].block == k):
                image = tokens[:, extra:].unflatten(1, grid)            # (B, h, w, dim)
                inner[name] = self.heads[name](image, condition)
        patches = self.head(self.norm(tokens))[:, extra:]               # (B, h*w, p*p*C)
        image = layers.unpatchify(patches, grid, self.patch_size)       # (B, C, H, W)
        image = image if self.final_conv is None else self.final_conv(image)
        return (image, inner) if hidden else image

    def embed(self, x, t, y, grid):
        """[label, time, image] tokens with positions: (B, extra + h*w, dim)."""
        image = self.patch_embed(x).flatten(1, 2)
        time = layers.sinusoidal_embedding(t, self.dim).to(image.dtype)
        tokens = [time if self.time_embed is None else self.time_embed(time)]
        if self.label_embed is not None:
            y = torch.full((x.shape[0],), self.num_classes, device=x.device) if y is None else y
            tokens.insert(0, self.label_embed(y))
        tokens = torch.cat([torch.stack(tokens, dim=1).to(image.dtype), image], dim=1)
        return tokens + layers.interpolate_positions(
            self.pos_embed, self.native_grid, grid, self.extra_tokens
        )
