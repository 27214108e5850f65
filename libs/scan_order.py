"""Scan orders and padding of the token grid: pure index arithmetic, no weights.

The sequence is [time, label, d_conv split tokens, padded grid], the grid being (H + pad) x (W +
pad) in raster order with the image in its upper left corner. A scan order visits the front tokens
first and then the padded grid along one of four directions, which the
official code numbers so (DiM, arXiv 2405.14224, section 3.2):

    0 row-major    -2 row-major reversed    1 column-major    -1 column-major reversed
"""

from functools import lru_cache, wraps

import torch

ROWS, ROWS_REVERSED, COLUMNS, COLUMNS_REVERSED = 0, -2, 1, -1
PAD_LAYOUTS = ("lateral", "rho_pad")


def block_patterns(depth, num_directions=3):
    """The direction of every block: a tuple of `depth` pattern numbers, the same read from either
    end.

    The first block goes row-major; blocks 1..(depth-1)/2 repeat the first `num_directions` of (-2,
    1, -1), then 0; the second half mirrors the first.

    Raises:
        ValueError: `depth` is even, or `num_directions` is not 1, 2 or 3.
    """
    if depth % 2 == 0 or depth < 1:
        raise ValueError(
            f"depth is {depth}; the long skips pair blocks around a centre, so it must be odd"
        )
    if num_directions not in (1, 2, 3):
        raise ValueError(
            f"the number of directions besides row-major is {num_directions}, expected 1, 2 or 3"
        )
    cycle = (ROWS_REVERSED, COLUMNS, COLUMNS_REVERSED)[:num_directions] + (ROWS,)
    half = [cycle[k % len(cycle)] for k in range((depth - 1) // 2)]
    forward = [ROWS, *half]
    return tuple(forward + forward[-2::-1])


def grid_order(pattern, height, width):
    """Raster indices of a height x width grid in the order `pattern` visits them: int64 (height *
    width,).
    """
    grid = torch.arange(height * width, device="cpu").view(height, width)
    if pattern in (COLUMNS, COLUMNS_REVERSED):
        grid = grid.T
    order = grid.reshape(-1)
    return order.flip(0) if pattern in (ROWS_REVERSED, COLUMNS_REVERSED) else order


def kept(maxsize):
    """Decorator: results are kept for the next call, and torch.compile takes them as constants."""

    def decorate(function):
        cached = lru_cache(maxsize)(function)

        @torch.compiler.assume_constant_result
        @wraps(function)
        def call(*args):
            return cached(*args)

        return call

    return decorate


@kept(256)
def sequence_order(pattern, height, width, pad, front, device):
    """Order of the whole sequence, `front` tokens and the padded grid: int64 (front +
    (height+pad)*(width+pad),), or None if raster.

    Checked here, once, to be a permutation, so that the operators need not look (which would cost a
    host sync on a GPU).
    """
    if pattern == ROWS:
        return None
    order = torch.cat(
        [torch.arange(front, device="cpu"), front + grid_order(pattern, height + pad, width + pad)]
    )
    if not torch.equal(order.sort().values, torch.arange(order.numel(), device="cpu")):
        raise AssertionError(
            f"scan order {pattern} of a {height}x{width} grid is not a permutation"
        )
    return order.to(device)


@kept(64)
def pad_index(layout, height, width, pad, device):
    """Which pad token stands where: int64 (height+pad, width+pad), -1 on the image.

    'lateral': column width+k and row height+k hold pad k, rows winning in the corner. 'rho_pad':
    the pads are dealt out 0, 1, .., pad-1, 0, 1, .. over all padded positions in raster order.
    """
    if layout not in PAD_LAYOUTS:
        raise ValueError(
            f"pad layout {layout!r} is unknown, expected one of {', '.join(PAD_LAYOUTS)}"
        )
    index = torch.full((height + pad, width + pad), -1, device="cpu")
    dealt = torch.arange((height + pad) * (width + pad), device="cpu") % pad
    if layout == "lateral":
        index[:, width:] = dealt[:pad]
        index[height:, :] = dealt[:pad, None]
    else:
        outside = torch.ones_like(index, dtype=torch.bool)
        outside[:height, :width] = False
        index[outside] = dealt[: int(outside.sum())]
    return index.to(device)
