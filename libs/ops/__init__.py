"""Operators of the backbone, each with several backends: numba on the CPU, our kernels on CUDA,
plain PyTorch (reference.py, the definition) anywhere.

selective_scan, causal_conv1d    Mamba's recurrence and the short filter before it
modulated_norm, gated_residual   what stands around any mixer
mamba_block, is_fused            a whole block as one operator, and where that can run
fp8_merge, turn_on_fp8, require_fp8    matrix products in fp8
describe_backends                what would run, for the log; also `python -m libs.ops`
"""

import torch

from libs.ops import backends
from libs.ops.cuda.fp8 import fp8_merge, require_fp8, turn_on_fp8
from libs.ops.cuda.mamba_block import mamba_block_cuda as mamba_block
from libs.ops.fusion import describe, is_fused
from libs.ops.operators import causal_conv1d, gated_residual, modulated_norm, selective_scan


def describe_backends(device="cpu"):
    """One line an operator: the backend that float32 tensors on this device would use, and why;
    and one for the blocks, fused or composed of operators.

    Raises utils.UserError if DIM_BACKEND asks for one that cannot run there.
    """
    device = torch.device(device)
    operators = ("selective_scan", "causal_conv1d")
    return [*(backends.describe(name, device) for name in operators), describe(device)]
