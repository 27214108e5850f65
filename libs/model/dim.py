"""DiM, the Mamba backbone for image diffusion (arXiv 2405.14224, section 3).

Tokens stay in raster order for the whole network; a scan direction is an index order given to the
mixer. The numbers equal those of the official network, its oddities included.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from libs.model import layers, scan_order
from libs.model.mamba import Mamba
from libs.ops import compute_dtype, is_fused, mamba_block
from utils import UserError

# Width and depth of the paper's models. Parameters: S 50,568,716 at 32x32x3 with 10
# classes; L 386,063,376 and H 862,407,184 at 32x32x4 with 1,000 classes.
PRESETS = {
    "S": dict(dim=512, depth=25),
    "L": dict(dim=1024, depth=49),
    "H": dict(dim=1536, depth=49),
}

EXTRA_TOKENS = 2  # time, label


class Block(nn.Module):
    """x + (1 + gate) * Mamba(RMSNorm(x) * (1 + scale) + shift), of x merged with a long skip if it
    has one. There is no MLP.

    rounds: the output goes into matrix products next, so the fused block gives it their dtype; else
    float32, the residual stream's. in_fp8: see DiM.use_fp8.
    """

    def __init__(self, dim, *, mamba, has_skip, rounds):
        super().__init__()
        self.rounds, self.in_fp8 = rounds, False
        self.skip = layers.SkipProjection(dim) if has_skip else None
        self.norm = layers.RMSNorm(dim)
        self.scale_shift_table = nn.Parameter(torch.randn(3, dim) / dim**0.5)
        self.mixer = Mamba(dim, **mamba)

    def forward(self, x, modulation, order, skip=None, keep=None):
        """x, skip (B, L, dim), modulation (B, 3, dim), order (L,) or None -> (B, L, dim).

        keep: None, or for stochastic depth what the branch is multiplied by, (B,).
        """
        if self.skip is not None:
            x = self.skip(x, skip, self.in_fp8)
        dtype = compute_dtype(self.mixer.in_proj.weight)
        sizes = (x.shape[-1], self.mixer.d_state, self.mixer.conv_weight.shape[1])
        if not is_fused(x.device, dtype, *sizes):
            return self.composed(x, modulation, order, keep)
        out_dtype = dtype if self.rounds else torch.float32
        return mamba_block(
            x, modulation, keep, self.by_name(), order, dtype,
            self.in_fp8 and dtype != torch.float32, out_dtype,
        )  # fmt: skip

    def composed(self, x, modulation, order, keep):
        """The same, layer by layer."""
        modulation = (self.scale_shift_table + modulation)[:, :, None]
        shift, scale, gate = modulation.unbind(1)                               # (B, 1, dim) each
        branch = self.mixer(self.norm(x) * (1 + scale) + shift, order)          # (B, L, dim)
        branch = (1 + gate) * branch
        return x + (branch if keep is None else branch * keep.to(branch.dtype).view(-1, 1, 1))

    def by_name(self):
        """The parameters by the names of libs.ops.mamba_block."""
        mixer = self.mixer
        return {
            "table": self.scale_shift_table, "weight": self.norm.weight,
            "in_proj": mixer.in_proj.weight, "conv_weight": mixer.conv_weight,
            "conv_bias": mixer.conv_bias, "x_proj": mixer.x_proj.weight,
            "dt_proj": mixer.dt_proj.weight, "dt_bias": mixer.dt_proj.bias,
            "A_log": mixer.A_log, "D": mixer.D, "out_proj": mixer.out_proj.weight,
        }  # fmt: skip


class DiM(nn.Module):
    """Predicts noise (or x0) from a noisy image or latent, its time and its class.

    Args:
        input_size: side of the square input (or its (height, width)) for which the position table
            is made; other sizes interpolate it.
        in_channels: channels of the input and of the prediction.
        dim, depth: width and (odd) number of blocks; see PRESETS.
        num_classes: classes; label `num_classes` is the null class of classifier-free guidance.
        patch_size: side of a patch.
        mamba: keywords of the mixer: d_state, d_conv, expand. d_conv is also the number of padding
            columns, rows and split tokens.
        pad_layout: 'lateral' (256 px) or 'rho_pad' (512 px and above), see
        libs/model/scan_order.py.
        scan_directions: directions besides row-major, 1 to 3.
        mlp_time_embed: an MLP on the time embedding of the time token and of the head.
        drop_path: stochastic depth of the last block; grows linearly from 0.
        activation_checkpointing: recompute each block in the backward pass; memory for about a
            third more time.
        skip_tuning: None, (low, high) or (low, high, time): the skips are scaled by `high` at the
            first consumer, falling linearly to high - (high - low) * time at the last (arXiv
            2402.15170). The official code means time = t / 1000 but has 0.001, the default; time
            None gives what it means.
        freeu: None, or (s1, s2, b1, b2): skip and backbone factors of the first two consumers
            (arXiv 2309.11497).

    Raises:
        UserError: an impossible value, named.
    """

    def __init__(
        self, *, input_size, in_channels, dim, depth, num_classes, patch_size=2, mamba=None,
        pad_layout="lateral", scan_directions=3, mlp_time_embed=False, drop_path=0.0,
        activation_checkpointing=False, skip_tuning=None, freeu=None,
    ):  # fmt: skip
        super().__init__()
        sides = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
        check_sizes(sides, patch_size, dim, depth)
        check_options(depth, scan_directions, pad_layout, drop_path, skip_tuning, freeu)
        mamba = {"d_state": 16, "d_conv": 3, "expand": 2, **(mamba or {})}
        self.input_size, self.patch_size, self.in_channels = sides, patch_size, in_channels
        self.dim, self.depth = dim, depth
        self.num_classes, self.pad, self.pad_layout = num_classes, mamba["d_conv"], pad_layout
        self.patterns = scan_order.block_patterns(depth, scan_directions)
        self.drop_path, self.activation_checkpointing = drop_path, activation_checkpointing
        self.skip_tuning = (*skip_tuning, 0.001)[:3] if skip_tuning else None
        self.freeu = tuple(freeu) if freeu else None
        self.num_skips = (depth - 1) // 2

        self.native_grid = tuple(side // patch_size for side in self.input_size)
        self.pos_embed = nn.Parameter(
            torch.zeros(1, EXTRA_TOKENS + math.prod(self.native_grid), dim)
        )
        self.patch_embed = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)
        self.time_embed = layers.TimeMLP(dim, 4 * dim, dim) if mlp_time_embed else None
        self.label_embed = nn.Embedding(num_classes + 1, dim)
        self.modulation = layers.SharedModulation(dim, num_classes)
        self.split_tokens = nn.Parameter(torch.empty(self.pad, dim))
        self.pad_tokens = nn.Parameter(torch.empty(self.pad, dim))
        self.first_smoother = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.blocks = nn.ModuleList(
            Block(dim, mamba=mamba, has_skip=k > self.num_skips, rounds=k >= self.num_skips)
            for k in range(depth)
        )
        self.last_smoother = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm_out = layers.RMSNorm(dim)
        self.head_modulation = nn.Linear(dim, 2 * dim)
        self.head = nn.Linear(dim, patch_size**2 * in_channels)
        self.reset_parameters()

    def use_fp8(self, device):
        """From now on the products of in_proj, out_proj and the skips are in fp8
        (libs/ops/cuda/fp8.py)
        where the blocks are fused and autocast is on; UserError if this device cannot.
        """
        from libs.ops import fp8

        fp8.require(torch.device(device), (self.dim, 2 * self.blocks[0].mixer.channels))
        for block in self.blocks:
            block.in_fp8 = True

    @torch.no_grad()
    def reset_parameters(self):
        """The official one: zero biases, embeddings normal 0.02, out_proj over sqrt(depth)."""
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for block in self.blocks:
            block.mixer.reset_parameters()  # its step-size bias is no zero bias
            nn.init.kaiming_uniform_(block.mixer.out_proj.weight, a=math.sqrt(5))
            block.mixer.out_proj.weight /= math.sqrt(self.depth)
        for linear in (self.modulation.time_mlp[0], self.modulation.time_mlp[2]):
            nn.init.normal_(linear.weight, std=0.02)
        for tokens in (self.split_tokens, self.pad_tokens):
            nn.init.normal_(tokens, std=0.02)

    def forward(self, x, t, y=None, *, drop_path_draw=None):
        """One evaluation of the network.

        Args:
            x: (B, C, H, W) float32, H and W divisible by the patch size, square or not.
            t: (B,) network time, 0..1000, may be fractional.
            y: (B,) int64 labels in 0..num_classes, the last being the null class; None means the
                null class.
            drop_path_draw: (B, depth) uniform in [0, 1), the draws of stochastic depth in training;
                None draws here.

        Returns:
            (B, C, H, W) prediction, in autocast's dtype; float32 outside autocast.

        Raises:
            UserError: the shape of x does not fit.
        """
        grid = layers.grid_of(x, self.in_channels, self.patch_size)
        y = torch.full((x.shape[0],), self.num_classes, device=x.device) if y is None else y
        time = layers.sinusoidal_embedding(t, self.dim).to(self.pos_embed.dtype)  # (B, dim)
        time = time if self.time_embed is None else self.time_embed(time)         # (B, dim)
        label = self.label_embed(y)                                               # (B, dim)
        modulation = self.modulation(t, y)                                        # (B, 3, dim)
        tokens = self.embed(x, time, label, grid)                                 # (B, L, dim)
        tokens = self.run_blocks(tokens, t, modulation, grid, drop_path_draw)     # (B, L, dim)
        image = self.on_grid(tokens, grid)[:, : grid[0], : grid[1]]               # (B, h, w, dim)
        image = self.smooth(self.last_smoother, image).flatten(1, 2)              # (B, h*w, dim)
        head_modulation = self.head_modulation(F.silu(time + label))[:, None]
        shift, scale = head_modulation.chunk(2, dim=-1)                           # (B, 1, dim)
        patches = self.head(self.norm_out(image) * (1 + scale) + shift)           # (B, h*w, p*p*C)
        return layers.unpatchify(patches, grid, self.patch_size)                  # (B, C, H, W)

    def embed(self, x, time, label, grid):
        """[time, label, split tokens, padded grid]: (B, 2 + pad + (h+pad)*(w+pad), dim)."""
        h, w = grid
        positions = layers.interpolate_positions(
            self.pos_embed, self.native_grid, grid, EXTRA_TOKENS
        )
        extra = torch.stack([time, label], dim=1) + positions[:, :EXTRA_TOKENS]   # (B, 2, dim)
        image = self.patch_embed(x).permute(0, 2, 3, 1)                           # (B, h, w, dim)
        image = image + positions[:, EXTRA_TOKENS:].unflatten(1, grid)
        image = self.smooth(self.first_smoother, image)
        index = scan_order.pad_index(self.pad_layout, h, w, self.pad, x.device)
        right, bottom = self.pad_tokens[index[:h, w:]], self.pad_tokens[index[h:]]
        parts = (part.to(image.dtype) for part in (extra, self.split_tokens, right, bottom))
        return layers.PaddedSequence.apply(image, *parts)

    def smooth(self, smoother, image):
        """A depthwise 3x3 convolution over image tokens (B, h, w, dim)."""
        return smoother(image.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def on_grid(self, tokens, grid):
        """The padded grid (B, h+pad, w+pad, dim) of the sequence (B, L, dim), a view."""
        padded = tuple(side + self.pad for side in grid)
        return tokens[:, EXTRA_TOKENS + self.pad :].unflatten(1, padded)

    def run_blocks(self, x, t, modulation, grid, drop_path_draw):
        """All blocks; 1..K save their output, the last K take it back, the latest first."""
        front = EXTRA_TOKENS + self.pad
        orders = [
            scan_order.sequence_order(pattern, *grid, self.pad, front, x.device)
            for pattern in self.patterns
        ]
        keeps = self.kept_branches(x, drop_path_draw)
        skips = []
        for k, block in enumerate(self.blocks):
            skip = None
            if block.skip is not None:
                x, skip = self.tune(x, skips.pop(), k - self.num_skips - 1, t, orders[k - 1])
            arguments = (x, modulation, orders[k], skip, keeps[k])
            if self.activation_checkpointing and self.training:
                x = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(*arguments)
            if 1 <= k <= self.num_skips:
                skips.append(x)
        return x

    def kept_branches(self, x, draw):
        """Per block None, or with stochastic depth what the branch is multiplied by, (B,)."""
        if not (self.training and self.drop_path):
            return [None] * self.depth
        draw = torch.rand(x.shape[0], self.depth, device=x.device) if draw is None else draw
        last = max(self.depth - 1, 1)
        return [
            layers.drop_path(draw[:, k], 1 - self.drop_path * k / last) if k else None
            for k in range(self.depth)
        ]

    def tune(self, x, skip, consumer, t, order):
        """(x, skip) of the consumer-th long skip after skip tuning and FreeU, if there are any."""
        if self.skip_tuning is not None:
            low, high, time = self.skip_tuning
            time = time if time is not None else (t / 1000).view(-1, 1, 1)
            skip = skip * (high - (high - low) * time * consumer / (self.num_skips - 1))
        if self.freeu is not None and consumer < 2:
            x, skip = apply_freeu(x, skip, self.freeu[consumer], self.freeu[2 + consumer], order)
        return x, skip


def apply_freeu(x, skip, skip_scale, backbone_scale, order):
    """FreeU on all tokens but time and label, along the order that the previous block scanned."""
    along = slice(None) if order is None else order
    visited = skip[:, along]
    filtered = layers.freeu_skip(visited[:, EXTRA_TOKENS:], skip_scale)
    skip = torch.empty_like(skip)
    skip[:, along] = torch.cat([visited[:, :EXTRA_TOKENS], filtered], dim=1)
    boosted = layers.freeu_backbone(x[:, EXTRA_TOKENS:], backbone_scale)
    return torch.cat([x[:, :EXTRA_TOKENS], boosted], dim=1), skip


def check_sizes(sides, patch_size, dim, depth):
    """One sentence for each impossible size of a DiM."""
    if any(side <= 0 or side % patch_size for side in sides):
        raise UserError(
            f"nnet.input_size {sides} is not divisible by nnet.patch_size {patch_size}; choose a "
            "multiple of it"
        )
    if depth < 1 or depth % 2 == 0:
        raise UserError(
            f"nnet.depth is {depth}; the long skips pair blocks around a centre, so choose an odd "
            "number"
        )
    if dim < 2 or dim % 2:
        raise UserError(
            f"nnet.dim is {dim}; the time embedding is half cosines, half sines, so choose an even "
            "number"
        )


def check_options(depth, scan_directions, pad_layout, drop_path, skip_tuning, freeu):
    """One sentence for each impossible option of a DiM."""
    if scan_directions not in (1, 2, 3):
        raise UserError(
            f"nnet.scan_directions is {scan_directions}, expected 1, 2 or 3 directions besides "
            "row-major"
        )
    if pad_layout not in scan_order.PAD_LAYOUTS:
        known = ", ".join(scan_order.PAD_LAYOUTS)
        raise UserError(f"nnet.pad_layout is {pad_layout!r}, expected one of {known}")
    if not 0 <= drop_path < 1:
        raise UserError(f"nnet.drop_path is {drop_path}, expected a probability in [0, 1)")
    if skip_tuning and len(skip_tuning) not in (2, 3):
        raise UserError(
            f"nnet.skip_tuning is {tuple(skip_tuning)}, expected (low, high) or (low, high, time)"
        )
    if skip_tuning and depth < 5:
        raise UserError(
            "nnet.skip_tuning runs between two long skips or more, so nnet.depth must be at least "
            f"5, not {depth}"
        )
    if freeu and len(freeu) != 4:
        raise UserError(f"nnet.freeu is {tuple(freeu)}, expected four factors (s1, s2, b1, b2)")
