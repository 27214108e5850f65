"""Weights and inputs that depend on their name alone."""

import zlib

import numpy as np
import torch


def fill(name, shape, scale=1.0):
    """Numbers that depend on the name alone, from numpy's stable raw Philox words."""
    words = np.random.Philox(key=zlib.crc32(name.encode())).random_raw(int(np.prod(shape)))
    uniform = (words >> np.uint64(40)).astype(np.float64) / 2**24
    return torch.from_numpy(((2 * uniform - 1) * scale).astype(np.float32).reshape(shape))


@torch.no_grad()
def with_fixed_weights(model):
    for name, parameter in model.named_parameters():
        fan_in = max(parameter[0].numel(), 1) if parameter.dim() > 1 else 1
        offset = {"A_log": 1.0, "D": 1.0, "weight": float(parameter.dim() == 1)}
        base = offset.get(name.rsplit(".", 1)[-1], 0.0)
        parameter.copy_(base + fill(name, tuple(parameter.shape), 0.5 if base else fan_in**-0.5))
    return model
