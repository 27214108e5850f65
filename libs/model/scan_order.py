"""Scan orders and padding of the token grid: pure index arithmetic, no weights.

The sequence is [time, label, split tokens, padded grid], the grid being (H + pad) x (W + pad) in
raster order with the image in its upper left corner. A scan order visits the front tokens first and
then the padded grid along one of four directions, which the official code numbers so (DiM, arXiv
2405.14224, section 3.2):

    0 row-major    -2 row-major reversed    1 column-major    -1 column-major reversed
"""

import functools

import torch

from utils import UserError

ROWS, ROWS_REVERSED, COLUMNS, COLUMNS_REVERSED = 0, -2, 1, -1


def block_patterns(depth, num_directions=3):
    """The direction of every block: a tuple of `depth` pattern numbers, the same from either end.

    The first block goes row-major; blocks 1..(depth-1)/2 repeat the first `num_directions` of (-2,
    1, -1), then 0; the second half mirrors the first. UserError: an even depth.
    """
    if depth % 2 == 0:
        raise UserError(f"nnet.depth is {depth}, but long skips pair blocks: choose an odd number")
    cycle = (ROWS_REVERSED, COLUMNS, COLUMNS_REVERSED)[:num_directions] + (ROWS,)
    half = [cycle[k % len(cycle)] for k in range((depth - 1) // 2)]
    forward = [ROWS, *half]
    return tuple(forward + forward[-2::-1])


def grid_order(pattern, height, width, device="cpu"):
    """Raster indices (height * width,) of a grid in the order that `pattern` visits them."""
    grid = torch.arange(height * width, device=device).view(height, width)
    if pattern in (COLUMNS, COLUMNS_REVERSED):
        grid = grid.T
    order = grid.reshape(-1)
    return order.flip(0) if pattern in (ROWS_REVERSED, COLUMNS_REVERSED) else order


# The tensors below are made once for each grid and live on, as CUDA graphs read their addresses.
# They are ordinary tensors even where a first forward under inference_mode makes them.


@functools.cache
@torch.inference_mode(False)
def sequence_order(pattern, height, width, pad, front, device):
    """Order (L,) of the whole sequence, `front` tokens and the padded grid; None if raster."""
    if pattern == ROWS:
        return None
    along_grid = grid_order(pattern, height + pad, width + pad, device)
    return torch.cat([torch.arange(front, device=device), front + along_grid])


def lateral(rows, columns, height, width, pad):
    """Column width+k and row height+k hold pad k, rows winning in the corner."""
    return torch.where(rows < height, columns - width, rows - height)


def rho_pad(rows, columns, height, width, pad):
    """The pads are dealt out 0, .., pad-1, 0, .. over all padded positions in raster order."""
    outside = (rows >= height) | (columns >= width)
    return (outside.view(-1).cumsum(0) - 1).view_as(outside) % max(pad, 1)


PAD_LAYOUTS = {"lateral": lateral, "rho_pad": rho_pad}


@functools.cache
@torch.inference_mode(False)
def pad_index(layout, height, width, pad, device):
    """Which pad token stands where: (height+pad, width+pad), -1 on the image."""
    rows = torch.arange(height + pad, device=device)[:, None]
    columns = torch.arange(width + pad, device=device)
    index = PAD_LAYOUTS[layout](rows, columns, height, width, pad)
    return torch.where((rows < height) & (columns < width), -1, index)
