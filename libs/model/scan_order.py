"""Scan orders and padding of the token grid: pure index arithmetic, no weights.

The sequence is [time, label, d_conv split tokens, padded grid], the grid being (H + pad) x (W +
pad) in raster order with the image in its upper left corner. A scan order visits the front tokens
first and then the padded grid along one of four directions, which the
official code numbers so (DiM, arXiv 2405.14224, section 3.2):

    0 row-major    -2 row-major reversed    1 column-major    -1 column-major reversed
"""

import functools

import torch

ROWS, ROWS_REVERSED, COLUMNS, COLUMNS_REVERSED = 0, -2, 1, -1
PAD_LAYOUTS = ("lateral", "rho_pad")


def kept(function):
    """Decorator: a call's tensor, or None, is made once and never dropped: CUDA graphs read it.

    It is an ordinary one, also where the first call is under inference_mode; a tracer's tensors
    (torch.compile, torch.export, FakeTensorMode) are not kept.
    """
    results = {}

    @functools.wraps(function)
    def call(*arguments):
        if torch.compiler.is_compiling():
            return function(*arguments)
        if arguments not in results:
            with torch.inference_mode(False):
                made = function(*arguments)
            if type(made) not in (torch.Tensor, type(None)):
                return made
            results[arguments] = made
        return results[arguments]

    return call


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


def grid_order(pattern, height, width, device="cpu"):
    """Raster indices of a height x width grid in the order `pattern` visits them: int64 (height *
    width,).
    """
    grid = torch.arange(height * width, device=device).view(height, width)
    if pattern in (COLUMNS, COLUMNS_REVERSED):
        grid = grid.T
    order = grid.reshape(-1)
    return order.flip(0) if pattern in (ROWS_REVERSED, COLUMNS_REVERSED) else order


@kept
def sequence_order(pattern, height, width, pad, front, device):
    """Order of the whole sequence, `front` tokens and the padded grid: int64 (front +
    (height+pad)*(width+pad),), or None if raster.

    Checked here, once, to be a permutation, so that the operators need not look (which would cost a
    host sync on a GPU; torch.compile, which traces this, could not follow it).
    """
    if pattern == ROWS:
        return None
    along_grid = grid_order(pattern, height + pad, width + pad, device)
    order = torch.cat([torch.arange(front, device=device), front + along_grid])
    if not torch.compiler.is_compiling() and not torch.equal(
        order.sort().values, torch.arange(order.numel(), device=device)
    ):
        raise AssertionError(
            f"scan order {pattern} of a {height}x{width} grid is not a permutation"
        )
    return order


@kept
def pad_index(layout, height, width, pad, device):
    """Which pad token stands where: int64 (height+pad, width+pad), -1 on the image.

    'lateral': column width+k and row height+k hold pad k, rows winning in the corner. 'rho_pad':
    the pads are dealt out 0, 1, .., pad-1, 0, 1, .. over all padded positions in raster order.
    """
    if layout not in PAD_LAYOUTS:
        raise ValueError(
            f"pad layout {layout!r} is unknown, expected one of {', '.join(PAD_LAYOUTS)}"
        )
    rows = torch.arange(height + pad, device=device)[:, None]
    columns = torch.arange(width + pad, device=device)
    image = (rows < height) & (columns < width)
    if layout == "lateral":
        index = torch.where(rows < height, columns - width, rows - height)
    else:
        index = ((~image).view(-1).cumsum(0) - 1).view_as(image) % pad
    return torch.where(image, -1, index)
