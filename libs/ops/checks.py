"""Validation of an operator's arguments, once, before any work."""

import os

import torch

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check(operator, order, **tensors):
    """tensors: name=(tensor or None, its axes: 'BLD' for three of them); the first one fixes the
    device, and an axis's size is the same everywhere. order: (L,) integers or None.

    Raises TypeError for a wrong dtype, ValueError for a wrong shape or device.
    """
    sizes, device = {}, next(iter(tensors.values()))[0].device
    for name, (x, axes) in tensors.items():
        if x is not None:
            _check_tensor(f"{operator}: {name}", x, axes, sizes, device, _DTYPES)
    if order is not None:
        _check_tensor(
            f"{operator}: order", order, "L", sizes, device, (torch.int64, torch.int32)
        )
        if os.environ.get("DIM_CHECK") == "1":
            _check_permutation(operator, order)


def _check_tensor(name, x, axes, sizes, device, dtypes):
    if x.dtype not in dtypes:
        raise TypeError(f"{name} must be one of {dtypes}, got {x.dtype}")
    fits = x.dim() == len(axes)
    for axis, size in zip(axes, x.shape, strict=False):
        fits = fits and size > 0 and sizes.setdefault(axis, size) == size
    if not fits:
        raise ValueError(
            f"{name} must have shape {tuple(axes)} with {sizes}, no axis empty, "
            f"got {tuple(x.shape)}"
        )
    if x.device != device:
        raise ValueError(f"{name} must be on {device} like the first input, got {x.device}")


def _check_permutation(operator, order):
    """It costs a sort, and on a GPU a synchronisation; another order reads and writes memory it
    should not."""
    expected = torch.arange(order.numel(), device=order.device)
    if not torch.equal(order.sort().values.long(), expected):
        raise ValueError(f"{operator}: order must be a permutation of 0 .. {order.numel() - 1}")
