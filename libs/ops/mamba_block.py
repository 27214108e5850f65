"""A block of DiM as one operator, where it can run: on the GPU, with our kernels.

Everywhere else, and with DIM_FUSED=0, DIM_BACKEND=reference or another backend's name, the block is
composed of its layers (libs/model/dim.py), which is its definition.
"""

import os

import torch

from libs.ops import backends
from libs.ops.cuda import adaln_plan
from libs.ops.selective_scan import BACKENDS as _SCAN_BACKENDS
from utils import UserError


def compute_dtype(weight):
    """Dtype of matrix products with this weight: autocast's, or the weight's own."""
    kind = weight.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return weight.dtype


def not_fused(device, dtype, dim, states, taps):
    """None if a block of these sizes runs as one operator on tensors of this device, or why not."""
    asked = os.environ.get("DIM_FUSED", "1")
    if asked not in ("0", "1"):
        raise UserError(f"DIM_FUSED is {asked!r}, expected 0 or 1: unset it, or set one of these")
    if asked == "0":
        return "DIM_FUSED=0"
    if device.type != "cuda":
        return f"it takes CUDA tensors, not {device.type}"
    scan = backends.choose("selective_scan", _SCAN_BACKENDS, None, device, dtype, states)[0]
    if scan != "cuda":
        return f"the selective scan runs on {scan}"
    if dim % adaln_plan.DIM_GRAIN or dim > adaln_plan.MAX_DIM:
        return f"width {dim} is no multiple of {adaln_plan.DIM_GRAIN} up to {adaln_plan.MAX_DIM}"
    if not 2 <= taps <= 8:
        return f"the convolution has {taps} taps"
    if torch.cuda.get_device_capability(device) < divmod(adaln_plan.OLDEST_ARCH, 10):
        return "its backward needs more shared memory than GPUs before Ampere have"
    return None


@backends.constant_when_compiled
def is_fused(device, dtype, dim, states, taps):
    """Whether a block of these sizes runs as one operator; torch.compile asks once."""
    return not_fused(device, dtype, dim, states, taps) is None


def describe(device):
    """One line for people: how the blocks of the shipped configs would run on this device."""
    device = torch.device(device)
    reason = not_fused(device, torch.float32, 1536, 16, 3)
    return f"mamba_block: {f'composed of single operators ({reason})' if reason else 'fused'}"


def mamba_block(x, modulation, keep, parameters, order, dtype, in_fp8, out_dtype):
    """x + keep (1 + gate) mixer(RMSNorm(x) (1 + scale) + shift) in one operator; see
    libs/ops/cuda/mamba_block.py, whose PARAMETERS `parameters` (name -> tensor) lists.

    x (B, L, dim); modulation (B, 3, dim): shift, scale, gate, to which the parameter `table` is
    added; keep (B,) or None; order (L,) or None. dtype: of the products, those of in_proj and
    out_proj in fp8 if in_fp8; out_dtype: of the result, dtype or float32. Differentiable in every
    tensor.
    """
    # Imported late, with all that it needs, and by a statement: torch.compile follows no importlib.
    from libs.ops.cuda.mamba_block import mamba_block_cuda

    return mamba_block_cuda(x, modulation, keep, parameters, order, dtype, in_fp8, out_dtype)
