"""Multi-head self-attention: the mixer of U-ViT, and one that DiM can have in Mamba's place."""

import math

import torch.nn.functional as F
from einops import rearrange
from torch import nn


class Attention(nn.Module):
    """Softmax attention of all tokens to all tokens (Vaswani et al. 2017) in `heads` heads; by
    default a head has 64 channels.
    """

    def __init__(self, dim, *, heads=None, qkv_bias=False):
        super().__init__()
        self.heads = heads or max(dim // 64, 1)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def init_weights(self, depth):
        """As Mamba's in a network of `depth` blocks: what goes into the stream over sqrt(depth)."""
        self.proj.weight /= math.sqrt(depth)

    def forward(self, x, order=None):
        """x (B, L, dim) -> the same. Attention does not see the order of its tokens, so `order`
        changes nothing.
        """
        q, k, v = rearrange(self.qkv(x), "b l (three h d) -> three b h l d", three=3, h=self.heads)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h l d -> b l (h d)"))
