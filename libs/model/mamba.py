"""The Mamba mixer (Gu & Dao, arXiv 2312.00752, figure 3) along any scan order; tokens stay in
raster order throughout.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from libs.model.block import compose_block
from libs.model.layers import compute_dtype
from libs.ops import causal_conv1d, is_fused, mamba_block, require_fp8, selective_scan


class Mamba(nn.Module):
    """in_proj -> causal convolution + SiLU -> selective scan, gated by SiLU(z) -> out_proj.

    d_state: states per channel (N). d_conv: width of the causal convolution. expand: the scan has
    expand * dim channels.
    """

    def __init__(self, dim, *, d_state=16, d_conv=3, expand=2):
        super().__init__()
        self.channels = expand * dim
        self.d_state, self.fp8 = d_state, False
        self.dt_rank = math.ceil(dim / 16)
        self.in_proj = nn.Linear(dim, 2 * self.channels, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(self.channels, d_conv))
        self.conv_bias = nn.Parameter(torch.empty(self.channels))
        self.x_proj = nn.Linear(self.channels, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.channels)
        self.A_log = nn.Parameter(torch.empty(self.channels, d_state))
        self.register_parameter("A", None)  # while sampling, what make_constants gives
        self.D = nn.Parameter(torch.empty(self.channels))
        self.out_proj = nn.Linear(self.channels, dim, bias=False)
        self.reset_parameters()

    def init_weights(self, depth):
        """The initialisation in a network of `depth` blocks: out_proj over sqrt(depth)."""
        self.reset_parameters()
        nn.init.kaiming_uniform_(self.out_proj.weight, a=math.sqrt(5))
        self.out_proj.weight /= math.sqrt(depth)

    def use_fp8(self, device):
        """From now on the products of in_proj and out_proj are in fp8 in a fused block under
        autocast; UserError if the device cannot.
        """
        require_fp8(device, (self.in_proj.in_features, self.in_proj.out_features))
        self.fp8 = True

    @torch.no_grad()
    def reset_parameters(self):
        """Mamba's: A = -(1..N), D = 1, step sizes log-uniform in [0.001, 0.1] (section 3.6)."""
        bound = 1 / math.sqrt(self.conv_weight.shape[1])
        self.conv_weight.uniform_(-bound, bound)
        self.conv_bias.uniform_(-bound, bound)
        self.dt_proj.weight.uniform_(-(self.dt_rank**-0.5), self.dt_rank**-0.5)
        dt = torch.empty_like(self.dt_proj.bias).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        states = torch.arange(1, self.d_state + 1, dtype=torch.float32)
        self.A_log.copy_(states.log().expand_as(self.A_log))
        self.D.fill_(1.0)

    def make_constants(self, dtype):
        """A of the scan, in float32 at least; see SamplingNetwork."""
        at_least = torch.promote_types(self.A_log.dtype, torch.float32)
        return {"A": -torch.exp(self.A_log.to(at_least))}

    def get_A(self):
        """A of the scan (channels, d_state): made here, or held while sampling."""
        return self.make_constants(None)["A"] if self.A is None else self.A

    def forward(self, x, order=None):
        """x (B, L, dim), order (L,) int64 (the row visited at each step) or None -> (B, L, dim)."""
        u, z = self.in_proj(x).chunk(2, dim=-1)  # (B, L, channels) each
        u = causal_conv1d(u, self.conv_weight, self.conv_bias, activation="silu", order=order)
        dt, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        delta = F.linear(dt, self.dt_proj.weight)  # (B, L, channels), bias in the scan
        y = selective_scan(
            u, delta, self.get_A(), B, C, D=self.D, z=z, delta_bias=self.dt_proj.bias,
            delta_softplus=True, order=order,
        )  # fmt: skip
        return self.out_proj(y)

    def block(self, x, modulation, order, drop_path_scale, skip):
        """The whole libs.model.block.Block around this mixer: one operator where it can run, which
        returns the pair.
        """
        dtype = compute_dtype(self.in_proj.weight)
        taps = self.conv_weight.shape[1]
        if not is_fused(x.device, dtype, x.shape[-1], self.d_state, taps):
            return compose_block(self, x, modulation, order, drop_path_scale, skip)
        x = x if skip is None else skip(x)
        return mamba_block(
            x, modulation.shared, drop_path_scale, self.name_parameters(modulation), order, dtype,
            self.fp8 and dtype != torch.float32,
            dtype if modulation.half_output else torch.float32,
        )  # fmt: skip

    def name_parameters(self, modulation):
        """The parameters of a block by the names of libs.ops.mamba_block."""
        return {
            "table": modulation.table, "weight": modulation.norm_weight,
            "in_proj": self.in_proj.weight, "conv_weight": self.conv_weight,
            "conv_bias": self.conv_bias, "x_proj": self.x_proj.weight,
            "dt_proj": self.dt_proj.weight, "dt_bias": self.dt_proj.bias,
            "A": self.get_A(), "D": self.D, "out_proj": self.out_proj.weight,
        }  # fmt: skip
