"""Long skips between the first and the second half of DiM: their projection, and what skip tuning
and FreeU make of them.
"""

import torch
import torch.nn.functional as F
from torch import nn

from libs.model.layers import EXTRA_TOKENS, compute_dtype
from libs.ops import fp8_merge, require_fp8


class SkipProjection(nn.Module):
    """Merges a long skip into the stream: Linear(2 dim, dim) of their concatenation, computed
    without concatenating.

    Up to dim 512 the official network has one Linear, above it two with a bias each; the parameters
    keep that difference.
    """

    WIDEST_SINGLE = 512

    def __init__(self, dim):
        super().__init__()
        self.dim, self.single, self.fp8 = dim, dim <= self.WIDEST_SINGLE, False
        if self.single:
            self.linear = nn.Linear(2 * dim, dim)
        else:
            self.stream, self.skip = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.register_parameter("bias", None)  # while sampling, what make_constants gives

    def use_fp8(self, device):
        """From now on the products are in fp8 under autocast; UserError if the device cannot."""
        require_fp8(device, (self.dim, 2 * self.dim))
        self.fp8 = True

    def make_constants(self, dtype):
        """The bias of both products (dim,), in their dtype; see SamplingNetwork."""
        bias = self.linear.bias if self.single else self.stream.bias + self.skip.bias
        return {"bias": bias.to(dtype)}

    def forward(self, x, skip):
        """x, skip (B, L, dim) -> (B, L, dim)."""
        if self.single:
            x_weight, skip_weight = self.linear.weight.chunk(2, dim=1)
        else:
            x_weight, skip_weight = self.stream.weight, self.skip.weight
        dtype = compute_dtype(x_weight)
        bias = self.make_constants(dtype)["bias"] if self.bias is None else self.bias
        x, skip = x.to(dtype), skip.to(dtype)
        if self.fp8 and dtype != torch.float32:
            return fp8_merge(x, skip, x_weight, skip_weight, bias)
        merged = F.linear(x.flatten(0, 1), x_weight, bias)
        # In place, as else the sum begins with a copy of `merged`.
        return merged.addmm_(skip.flatten(0, 1), skip_weight.to(dtype).T).view(x.shape)


def filter_skip(skip, scale):
    """FreeU's filter of a skip (eq. 3-4) over the token axis, (B, L, dim) -> the same, in float32.

    Scales frequencies -1 and 0. The paper's mask is symmetric; the official DiM code's is not and
    drops the imaginary part that this leaves, and so do we.
    """
    mask = torch.ones(skip.shape[1], device=skip.device)
    mask[0] = mask[-1] = scale
    filtered = torch.fft.ifft(torch.fft.fft(skip.float(), dim=1) * mask[:, None], dim=1).real
    return filtered.to(skip.dtype)


def boost_stream(x, scale):
    """FreeU's backbone factor (eq. 1-2): (B, L, dim) grows with the mean feature map; all channels
    here, not half.
    """
    mean = x.float().mean(dim=-1, keepdim=True)
    low, high = mean.amin(dim=1, keepdim=True), mean.amax(dim=1, keepdim=True)
    return (x * (1 + (scale - 1) * (mean - low) / (high - low))).to(x.dtype)


def apply_freeu(x, skip, skip_scale, stream_scale, order):
    """FreeU (arXiv 2309.11497) on all tokens but time and label, the skip in the order that the
    previous block scanned.
    """
    order = slice(None) if order is None else order
    visited, filtered = skip[:, order], torch.empty_like(skip)
    tail = filter_skip(visited[:, EXTRA_TOKENS:], skip_scale)
    filtered[:, order] = torch.cat([visited[:, :EXTRA_TOKENS], tail], dim=1)
    boosted = boost_stream(x[:, EXTRA_TOKENS:], stream_scale)
    return torch.cat([x[:, :EXTRA_TOKENS], boosted], dim=1), filtered


def tune_skip(x, skip, consumer, count, t, skip_tuning, freeu, order):
    """(x, skip) for a block that takes a long skip, changed by two options.

    Args:
        consumer: this block's place among those that take a skip, from 0. count: how many do.
        t: (B,) network time.
        skip_tuning: None, (low, high) or (low, high, time): the skips are scaled by `high` at the
            first consumer, falling linearly to high - (high - low) * time at the last (arXiv
            2402.15170). The official code means time = t / 1000 but has 0.001, the default; time
            None gives what it means.
        freeu: None, or (s1, s2, b1, b2): skip and stream factors of the first two consumers (arXiv
            2309.11497).
        order: (L,) or None, of the previous block.
    """
    if skip_tuning:
        low, high, time = (*skip_tuning, 0.001)[:3]
        time = time if time is not None else (t / 1000).view(-1, 1, 1)
        skip = skip * (high - (high - low) * time * consumer / (count - 1))
    if freeu and consumer < 2:
        x, skip = apply_freeu(x, skip, *freeu[consumer::2], order)
    return x, skip
