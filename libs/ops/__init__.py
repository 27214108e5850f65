"""Operators of the backbone: `selective_scan` and `causal_conv1d`, each with several backends, and
the whole block as one (mamba_block.py), which DIM_FUSED=0 turns off.

`python -m libs.ops` prints which backend each would use here, and why. The environment variable
DIM_BACKEND names one for every call that does not name its own; DIM_CACHE_DIR is where compiled
CUDA kernels are kept; DIM_CHECK=1 also checks that orders are permutations.
"""

import torch

from libs.ops import backends
from libs.ops.causal_conv1d import BACKENDS as _CONV_BACKENDS
from libs.ops.causal_conv1d import causal_conv1d
from libs.ops.cuda import fp8
from libs.ops.mamba_block import compute_dtype, is_fused, mamba_block
from libs.ops.mamba_block import describe as describe_block
from libs.ops.selective_scan import BACKENDS as _SCAN_BACKENDS
from libs.ops.selective_scan import selective_scan

__all__ = [
    "causal_conv1d",
    "compute_dtype",
    "describe_backends",
    "fp8",
    "is_fused",
    "mamba_block",
    "selective_scan",
]


def describe_backends(device="cpu"):
    """One line an operator: the backend that float32 tensors on this device would use, and why;
    and one for the blocks, fused or composed of operators.

    Raises utils.UserError if DIM_BACKEND asks for one that cannot run there.
    """
    device = torch.device(device)
    tables = {"selective_scan": _SCAN_BACKENDS, "causal_conv1d": _CONV_BACKENDS}
    lines = [backends.describe(operator, table, device) for operator, table in tables.items()]
    return [*lines, describe_block(device)]
