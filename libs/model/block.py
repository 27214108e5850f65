"""A block of DiM: norm, modulation and gate around any mixer of tokens."""

import functools
from typing import NamedTuple

import torch
from torch import nn

from libs.model.layers import compute_dtype
from libs.model.skips import SkipProjection
from libs.ops import gated_residual, modulated_norm


class Modulation(NamedTuple):
    """What surrounds the mixer of a block."""

    shared: torch.Tensor  # (B, 3, dim): shift, scale and gate from time and label
    table: torch.Tensor  # (3, dim): added to the shared ones, learned for this block
    norm_weight: torch.Tensor  # (dim,)
    half_output: bool  # the output has the dtype of matrix products, else float32 at least


def compose_block(mixer, x, modulation, order, drop_path_scale, skip):
    """The block around `mixer`, operator by operator: its definition, and the way of a mixer
    without a fused form. The arguments are those of a mixer's `block`, see Block.
    """
    shared, table, norm_weight, half_output = modulation
    dtype = compute_dtype(norm_weight)
    x = x if skip is None else skip(x)
    branch = mixer(modulated_norm(x, norm_weight, shared, table, dtype), order)
    out_dtype = dtype if half_output else None
    return gated_residual(x, branch, shared, table, drop_path_scale, out_dtype)


class Block(nn.Module):
    """x + (1 + gate) * mixer(RMSNorm(x) * (1 + scale) + shift), of x merged with a long skip where
    the block has one. There is no MLP. Without gradients, as while sampling, every output has the
    dtype of matrix products.

    make_mixer: makes the mixer, a module with `forward(x, order)`, x and the result (B, L, dim). A
    mixer with a fused form has `block(x, modulation, order, drop_path_scale, skip) -> (B, L, dim)`,
    the whole block at once, with a Modulation and in `skip` None or a function that merges the long
    skip into x. It may return a pair, as forward does.
    """

    def __init__(self, dim, make_mixer, *, has_skip, half_output):
        super().__init__()
        self.half_output = half_output
        self.skip = SkipProjection(dim) if has_skip else None
        self.norm = nn.RMSNorm(dim)  # its weight; modulated_norm computes
        self.scale_shift_table = nn.Parameter(torch.randn(3, dim) / dim**0.5)
        self.mixer = make_mixer()

    def forward(self, x, modulation, order, drop_path_scale=None, skip=None):
        """x, skip (B, L, dim), modulation (B, 3, dim), order (L,) or None -> out, kept (B, L, dim).

        kept: x for a later long skip, as it is or rounded to the dtype of matrix products.
        drop_path_scale: what the branch is multiplied by in stochastic depth, (B,), or None.
        """
        run = getattr(self.mixer, "block", functools.partial(compose_block, self.mixer))
        merge = None if skip is None else functools.partial(self.skip, skip=skip)
        half_output = self.half_output or not torch.is_grad_enabled()
        own = self.scale_shift_table, self.norm.weight, half_output
        out = run(x, Modulation(modulation, *own), order, drop_path_scale, merge)
        return out if isinstance(out, tuple) else (out, x)
