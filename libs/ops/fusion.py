"""A block of DiM as one operator, where it can run: on the GPU, with our kernels.

Everywhere else, and with DIM_FUSED=0 or DIM_BACKEND=reference, the block is composed of its layers
(compose_block in libs/model/block.py), which is its definition.
"""

import os

import torch

from libs.ops import backends
from libs.ops.cuda.adaln import WIDTHS


def not_fused(device, dtype, dim, states, taps):
    """None if a block of these sizes runs as one operator on tensors of this device, or why not."""
    if os.environ.get("DIM_FUSED") == "0":
        return "DIM_FUSED=0"
    if device.type != "cuda":
        return f"it takes CUDA tensors, not {device.type}"
    if backends.choose("selective_scan", None, device, dtype, states) != "cuda":
        return "the selective scan does not run on cuda"
    if dim not in WIDTHS or taps not in backends.OPERATORS["causal_conv1d"].sizes:
        return f"there are no kernels for width {dim} and {taps} taps"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "it has not been tried on GPUs before Ampere"
    return None


@backends.constant_when_compiled
def is_fused(device, dtype, dim, states, taps):
    """Whether a block of these sizes runs as one operator; torch.compile asks once."""
    return not_fused(device, dtype, dim, states, taps) is None


def describe(device):
    """One line for people: how the blocks of the shipped configs would run on this device."""
    reason = not_fused(device, torch.float32, 1536, 16, 3)
    return f"mamba_block: {f'composed of single operators ({reason})' if reason else 'fused'}"
