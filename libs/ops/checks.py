"""Validation of an operator's arguments, once, before any work."""

import os

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Arguments:
    """Checks tensors against sizes gathered on the way: the first tensor with an axis fixes that
    axis's size.

    Raises TypeError for what is not a tensor or has a wrong dtype, ValueError for a wrong shape or
    device; every message names operator and tensor, what was expected and what came.
    """

    def __init__(self, operator, device):
        self.operator = operator
        self.device = device
        self.sizes = {}

    def tensor(self, name, x, axes, dtypes=DTYPES):
        """x must have these axes ('BLD': three of them), at least 1 long, one of the dtypes, and be
        on the device.
        """
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{self.operator}: {name} must be a tensor, got {type(x).__name__}")
        if x.dtype not in dtypes:
            allowed = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise TypeError(f"{self.operator}: {name} must be one of {allowed}, got {x.dtype}")
        self._shape(name, x, axes)
        if x.device != self.device:
            raise ValueError(
                f"{self.operator}: {name} must be on {self.device} like the first input, "
                f"got {x.device}"
            )

    def optional(self, name, x, axes, dtypes=DTYPES):
        if x is not None:
            self.tensor(name, x, axes, dtypes)

    def order(self, order):
        """An integer (L,) tensor or None. That it is a permutation is looked at only with
        DIM_CHECK=1 (it costs a sort, and on a GPU a synchronisation); another order reads and
        writes memory it should not."""
        self.optional("order", order, "L", (torch.int64, torch.int32))
        if order is None or os.environ.get("DIM_CHECK") != "1":
            return
        expected = torch.arange(order.numel(), device=order.device)
        if not torch.equal(order.sort().values.long(), expected):
            last = order.numel() - 1
            raise ValueError(f"{self.operator}: order must be a permutation of 0 .. {last}")

    def _shape(self, name, x, axes):
        if x.dim() == len(axes) and self._fits(axes, x.size()):
            self.sizes.update(zip(axes, x.shape, strict=True))
            return
        sizes = ", ".join(str(self.sizes.get(axis, "any")) for axis in axes)
        raise ValueError(
            f"{self.operator}: {name} must have shape ({', '.join(axes)}) = ({sizes}), "
            f"no axis empty, got {tuple(x.shape)}"
        )

    def _fits(self, axes, shape):
        for axis, size in zip(axes, shape, strict=True):
            if size == 0 or self.sizes.get(axis, size) != size:
                return False
        return True
