"""Validation of an operator's arguments, once, before any work."""

import torch

_REAL = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGER = (torch.int64, torch.int32)


def check(operator, order, **tensors):
    """tensors: name=(tensor or None, its axes: 'BLD' for three of them); the first one fixes the
    device, and an axis's size is the same everywhere. order: (L,) integers or None.

    Raises TypeError for a wrong dtype, ValueError for a wrong shape or device.
    """
    sizes, device = {}, next(iter(tensors.values()))[0].device
    for name, (x, axes) in (*tensors.items(), ("order", (order, "L"))):
        if x is None:
            continue
        if x.dtype not in (dtypes := _INTEGER if name == "order" else _REAL):
            raise TypeError(f"{operator}: {name} must be one of {dtypes}, got {x.dtype}")
        fits = x.dim() == len(axes)
        for axis, size in zip(axes, x.shape, strict=False):
            fits = fits and size > 0 and sizes.setdefault(axis, size) == size
        if not fits:
            raise ValueError(
                f"{operator}: {name} must have shape {tuple(axes)} with {sizes}, no axis empty, "
                f"got {tuple(x.shape)}"
            )
        if x.device != device:
            raise ValueError(f"{operator}: {name} must be on {device}, got {x.device}")
