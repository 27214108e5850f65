"""The Mamba mixer (Gu & Dao, arXiv 2312.00752, figure 3) along any scan order; tokens stay in
raster order throughout.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from libs.ops import causal_conv1d, selective_scan


class Mamba(nn.Module):
    """in_proj -> causal convolution + SiLU -> selective scan, gated by SiLU(z) -> out_proj.

    Args:
        dim: width of the input and output.
        d_state: states per channel (N).
        d_conv: width of the causal convolution.
        expand: channels per input feature; the scan has expand * dim channels.
    """

    def __init__(self, dim, *, d_state=16, d_conv=3, expand=2):
        super().__init__()
        self.channels = expand * dim
        self.d_state = d_state
        self.dt_rank = math.ceil(dim / 16)
        self.in_proj = nn.Linear(dim, 2 * self.channels, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(self.channels, d_conv))
        self.conv_bias = nn.Parameter(torch.empty(self.channels))
        self.x_proj = nn.Linear(self.channels, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.channels)
        self.A_log = nn.Parameter(torch.empty(self.channels, d_state))
        self.D = nn.Parameter(torch.empty(self.channels))
        self.out_proj = nn.Linear(self.channels, dim, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        """Mamba's initialisation: A = -(1..N), D = 1, and step sizes log-uniform in [0.001, 0.1]
        (arXiv 2312.00752, section 3.6).
        """
        bound = 1 / math.sqrt(self.conv_weight.shape[1])
        self.conv_weight.uniform_(-bound, bound)
        self.conv_bias.uniform_(-bound, bound)
        self.dt_proj.weight.uniform_(-(self.dt_rank**-0.5), self.dt_rank**-0.5)
        dt = torch.empty_like(self.dt_proj.bias).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        self.A_log.copy_(
            torch.arange(1, self.d_state + 1, dtype=torch.float32).log().expand_as(self.A_log)
        )
        self.D.fill_(1.0)

    def forward(self, x, order=None):
        """x (B, L, dim), order (L,) int64 (the row visited at each step) or None -> (B, L, dim)."""
        u, z = self.in_proj(x).chunk(2, dim=-1)  # (B, L, channels) each
        u = causal_conv1d(u, self.conv_weight, self.conv_bias, activation="silu", order=order)
        dt, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        delta = F.linear(dt, self.dt_proj.weight)  # (B, L, channels), bias in the scan
        A = -torch.exp(self.A_log)
        y = selective_scan(
            u, delta, A, B, C, D=self.D, z=z, delta_bias=self.dt_proj.bias, delta_softplus=True,
            order=order,
        )  # fmt: skip
        return self.out_proj(y)
