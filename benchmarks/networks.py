"""The networks of bench_model.py by name and resolution, two transformers among them, and the
matrix products in them.
"""

import functools

import harness  # noqa: F401 - finds the project
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from configs import cifar10_S_DiM, imagenet256_H_DiM, imagenet256_uvit_huge, imagenet512_H_DiM_ft
from libs.model import PRESETS, DiM, build_model

FRONT_TOKENS = 2  # of every DiM: time and label
PIXEL_SPACE = 32  # up to this resolution the network sees pixels (CIFAR-10), above it latents


class DiT(nn.Module):
    """diffusers' DiT-XL/2 (Peebles and Xie, arXiv 2212.09748) with DiM's interface: of its 8 output
    channels the 4 of the noise.
    """

    def __init__(self, side, num_classes=1000, layers=28, heads=16, width=72):
        from diffusers import DiTTransformer2DModel

        super().__init__()
        self.num_classes = num_classes
        self.network = DiTTransformer2DModel(
            sample_size=side, patch_size=2, in_channels=4, out_channels=8, num_layers=layers,
            num_attention_heads=heads, attention_head_dim=width, num_embeds_ada_norm=num_classes,
        )  # fmt: skip

    def forward(self, x, t, y):
        return self.network(x, t, y, return_dict=False)[0][:, :4]


def build_dim(size, pixels):
    """DiM-S, -L or -H as the shipped configs have it, or -XL likewise, at this resolution."""
    latents = imagenet256_H_DiM if pixels < 512 else imagenet512_H_DiM_ft
    nnet = (cifar10_S_DiM if pixels <= PIXEL_SPACE else latents).get_config().nnet
    nnet.update(PRESETS[size], input_size=get_input_shape(pixels)[1])
    return build_model(nnet)


def build_uvit(pixels):
    """U-ViT-H without its activation checkpointing, which costs time."""
    nnet = imagenet256_uvit_huge.get_config().nnet
    nnet.update(input_size=pixels // 8, activation_checkpointing=False)
    return build_model(nnet)


NETWORKS = {f"DiM-{size}": functools.partial(build_dim, size) for size in PRESETS}
NETWORKS |= {"U-ViT-H": build_uvit, "DiT-XL/2": lambda pixels: DiT(pixels // 8)}


def get_input_shape(pixels):
    """(C, H, W) of what the network sees."""
    return (3, pixels, pixels) if pixels <= PIXEL_SPACE else (4, pixels // 8, pixels // 8)


def make_inputs(network, pixels, batch, device):
    """x (B, C, H, W) standard normal, t (B,) network times, y (B,) labels."""
    x = torch.randn(batch, *get_input_shape(pixels), device=device)
    t = torch.rand(batch, device=device) * 999
    return x, t, torch.randint(network.num_classes, (batch,), device=device)


def count_flops(network, pixels):
    """FLOPs, 2 a multiply-add, of all matrix products (attention and patch embedding included) in a
    forward pass of one image; each product's backward is two of its size. network: on the meta
    device, where nothing is computed.
    """
    if not isinstance(network, DiM):
        inputs, math = make_inputs(network, pixels, 1, "meta"), sdpa_kernel(SDPBackend.MATH)
        with torch.no_grad(), math, FlopCounterMode(display=False) as counter:
            network.eval()(*inputs)
        return counter.get_total_flops()
    blocks, everything = (
        sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
        for module in (network.blocks, network)
    )
    # The blocks' matrices see every token, embedding and head every patch, the others one vector.
    side = get_input_shape(pixels)[1] // network.patch_size
    patch = network.patch_size**2 * network.in_channels * network.dim
    conditioning = everything - blocks - patch  # the patch embedding is no nn.Linear
    tokens = FRONT_TOKENS + network.pad + (side + network.pad) ** 2
    return 2 * (tokens * blocks + side**2 * 2 * patch + conditioning)
