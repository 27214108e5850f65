"""Token routing: in training, blocks in the middle of a DiM see one token of each 2x2 group."""

import torch
import torch.nn.functional as F
from torch import nn

from libs.model.layers import EXTRA_TOKENS
from libs.model.skips import SkipProjection
from utils import UserError


def route_index(route, grid, pad):
    """The places (B, L') of tokens in the sequence of `grid` (h, w), which make a sequence of the
    grid (h/s, w/s): of each s x s group the token whose number in raster order is in `route`, (B,
    h/s, w/s) int64; all front tokens; the pads of each group's first row or column, and the corner.
    """
    width, front, side = grid[1] + pad, EXTRA_TOKENS + pad, grid[0] // route.shape[1]
    pads = torch.arange(pad, device=route.device)
    rows, columns = (
        torch.cat([torch.arange(0, n, side, device=route.device), n + pads]) for n in grid
    )
    offsets = F.pad(route // side * width + route % side, (0, pad, 0, pad))  # (B, h/s+p, w/s+p)
    kept = torch.arange(front, device=route.device).expand(len(route), -1)
    return torch.cat([kept, (front + rows[:, None] * width + columns + offsets).flatten(1)], dim=1)


class Routing(nn.Module):
    """Blocks first .. depth - first are routed: their long skips pair among themselves.

    Behind these blocks a mask token stands for each missing one, and a linear layer merges the
    sequence with that from before them (SPRINT, arXiv 2510.21986). A step with all tokens takes
    the same way, so that every parameter has a gradient, as DDP demands.
    UserError: a `first` without a block to pair with.
    """

    def __init__(self, model, *, first):
        super().__init__()
        if not 1 <= first <= model.num_skips:
            raise UserError(f"nnet.routing.first is {first}, expected 1 to {model.num_skips}")
        self.blocks = range(first, model.depth - first + 1)
        self.mask = nn.Parameter(0.02 * torch.randn(model.dim))
        self.merge = SkipProjection(model.dim)

    def restore(self, x, dense, index):
        """(B, L, dim) of routed tokens x (B, L', dim), at index (B, L') of the `dense` ones."""
        places = index[..., None].expand_as(x)
        return self.merge(self.mask.to(x.dtype).expand(dense.shape).scatter(1, places, x), dense)
