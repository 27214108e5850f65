"""Numba kernels of the CPU backend, forward and backward, float32.

A task is one image and one block of BLOCK channels. Tasks share nothing they write, and sums over
tasks are done afterwards (autograd.total), so results depend neither on the number of threads nor
on which thread did what. Channels are innermost everywhere: one vector instruction advances the
same state of 16 neighbouring channels, for any number of states, and no step needs a horizontal sum
in the forward pass.

All kernels are in this one file because numba's disk cache is keyed by the file a kernel is in, not
by the files it calls. They hold the GIL at no time (`threads.run_tasks` runs them).
"""

from collections import namedtuple

import numba
import numpy as np
from numpy import float32 as f32
from numpy import int32 as i32

# Channels a task. Backward at B 64, L 126, D 128, N 16 on one core: 32 channels 22 ms, 64 14.4 ms,
# 128 13.8 ms, but with 128 a single image of 128 channels would be a single task.
BLOCK = 64
# Steps between stored states; the backward pass replays a tile from its stored state. Same shape:
# 8 steps 15.9 ms, 16 14.4, 32 13.2, 64 12.0. At 32 a tile's scratch is 270 KB (N 16), inside L2.
TILE = 32

# No 'nnan' and 'ninf' anywhere: a NaN must come out as a NaN, so that training can see it.
_FAST = {"reassoc", "contract", "arcp", "nsz"}
_OPTIONS = {"nogil": True, "error_model": "numpy"}
# Inlining shows LLVM that the scratch rows are parts of one allocation, so that it can do without
# most run-time overlap checks: backward 20.0 -> 12.6 ms single-threaded at the shape above.
_inline = numba.njit(fastmath=_FAST, forceinline=True, **_OPTIONS)
# Range reductions must not be reassociated: x - k a - k b is not x - k (a + b).
_exact = numba.njit(fastmath={"contract"}, forceinline=True, **_OPTIONS)


def _kernel(function):
    try:
        return numba.njit(fastmath=_FAST, cache=True, **_OPTIONS)(function)
    except RuntimeError:  # neither checkout nor user cache is writable: compile once a process
        return numba.njit(fastmath=_FAST, **_OPTIONS)(function)


# Contiguous float32 arrays with A (N, D) transposed and order int64, else as in selective_scan_ref;
# absent D and delta_bias are zeros, absent z has no elements.
ScanInputs = namedtuple("ScanInputs", "u delta A B C D z delta_bias order delta_softplus")
# What the backward pass writes. Gradients summed over images or channels come in parts: those of A
# (B, N, D), D and delta_bias (B, D) one an image, of B and C (blocks, B, L, N) one a channel block.
ScanGrads = namedtuple("ScanGrads", "u delta A B C D z delta_bias")


def count_blocks(channels):
    """Number of channel blocks, and so of tasks an image."""
    return -(-channels // BLOCK)


def count_tiles(length):
    """Number of checkpoints along a sequence."""
    return -(-length // TILE)


@_exact
def _exp(x):
    """e^x by x = k ln 2 + r and a polynomial in r, relative error below 1e-7 for -87 <= x <= 88.

    Written out because a call into the C library would not be vectorised. The result stays at e^-87
    = 1.6e-38 further down and is infinite from 88.4 up. Coefficients: our minimax fit of (e^r - 1 -
    r) / r^2 on |r| <= ln(2) / 2, 3e-9.
    """
    x = f32(-87.0) if x < f32(-87.0) else x  # a comparison with NaN is false, so NaN passes
    x = f32(89.0) if x > f32(89.0) else x
    k = np.floor(x * f32(1.44269504) + f32(0.5))
    # ln 2 in two parts; the first has 10 bits, so that k times it is exact
    r = x - k * f32(0.693359375)
    r = r - k * f32(-2.12194440e-4)
    p = f32(1.38146e-3)
    p = p * r + f32(8.36871e-3)
    p = p * r + f32(4.166839e-2)
    p = p * r + f32(1.6666521e-1)
    p = p * r + f32(4.9999993e-1)
    p = p * r + f32(1.0)
    p = p * r + f32(1.0)
    power = i32((i32(k) + i32(127)) << i32(23))  # the bits of 2^k
    return p * power.view(np.float32)


@_exact
def _softplus(x):
    """log(1 + e^x) = max(x, 0) + log1p(e^-|x|), and log1p(e) = 2 artanh(e / (2 + e)).

    Beyond 20 this is x to float32 rounding, as is torch's threshold. Coefficients: our minimax fit
    of (artanh(s) / s - 1) / s^2 in s^2 on 0 <= s <= 1/3, 5e-9.
    """
    e = _exp(-abs(x))
    s = e / (f32(2.0) + e)
    w = s * s
    p = f32(0.14006423)
    p = p * w + f32(0.14000814)
    p = p * w + f32(0.20010769)
    p = p * w + f32(0.33333208)
    # 2 s (1 + w p) with 2 s = e - e s: rounds like its large part e
    return max(x, f32(0.0)) + (e + s * (f32(2.0) * w * p - e))


@_exact
def _sigmoid(x):
    """1 / (1 + e^-x) without overflow; also the slope of softplus."""
    e = _exp(-abs(x))
    r = f32(1.0) / (f32(1.0) + e)
    return r if x >= f32(0.0) else e * r


@_exact
def _silu_slope(x, s):
    """Derivative of x s, s = sigmoid(x)."""
    return s * (f32(1.0) + x * (f32(1.0) - s))


@_inline
def _copy(target, source):
    """The first source.size elements of target; the rest of a scratch row stays zero for a narrow
    last block.
    """
    for d in range(source.size):
        target[d] = source[d]


@_inline
def _locate(task, channels):
    """(image, number of the block, its first channel, the channel after its last) of a task."""
    blocks = (channels + BLOCK - 1) // BLOCK
    block = task % blocks
    return task // blocks, block, block * BLOCK, min((block + 1) * BLOCK, channels)


@_inline
def _delta_row(delta, raw, bias, softplus):
    for d in range(BLOCK):
        delta[d] = _softplus(raw[d] + bias[d]) if softplus else raw[d] + bias[d]


@_inline
def _slope_row(slope, raw, bias, softplus):
    """d delta' / d delta."""
    for d in range(BLOCK):
        slope[d] = _sigmoid(raw[d] + bias[d]) if softplus else f32(1.0)


@_inline
def _input_row(delta_u, y, delta, u, D):
    for d in range(BLOCK):
        delta_u[d] = delta[d] * u[d]
        y[d] = D[d] * u[d]


@_inline
def _gate_row(y, z):
    for d in range(BLOCK):
        y[d] = y[d] * z[d] * _sigmoid(z[d])


@_inline
def _gate_row_bwd(g, z, y):
    """g: gradient of y silu(z), becomes that of y; z: becomes the gradient of z."""
    for d in range(BLOCK):
        g_gated = g[d]
        gate = z[d]
        s = _sigmoid(gate)
        g_z = g_gated * y[d] * _silu_slope(gate, s)
        g[d] = g_gated * gate * s
        z[d] = g_z


@_inline
def _step(h, y, delta, delta_u, A, B, C):
    for n in range(A.shape[0]):
        B_n = B[n]
        C_n = C[n]
        for d in range(BLOCK):
            h_new = _exp(delta[d] * A[n, d]) * h[n, d] + delta_u[d] * B_n
            h[n, d] = h_new
            y[d] += h_new * C_n


@_kernel
def scan_fwd(first_task, last_task, x, y, checkpoints, last_state):
    """Tasks first_task .. last_task - 1. x: ScanInputs; y (B, L, D); checkpoints (B, tiles, N, D),
    the state before each tile, or (0, 0, 0, 0) to store none; last_state (B, D, N)."""
    length, channels = x.u.shape[1:]
    states = x.A.shape[0]
    for task in range(first_task, last_task):
        b, _, d0, d1 = _locate(task, channels)
        h = np.zeros((states, BLOCK), f32)
        A = np.zeros((states, BLOCK), f32)
        rows = np.zeros((8, BLOCK), f32)
        raw, delta, u, delta_u, y_row = rows[0], rows[1], rows[2], rows[3], rows[4]
        z, bias, D = rows[5], rows[6], rows[7]
        A[:, : d1 - d0] = x.A[:, d0:d1]
        _copy(bias, x.delta_bias[d0:d1])
        _copy(D, x.D[d0:d1])
        for step in range(length):
            row = x.order[step]
            if step % TILE == 0 and checkpoints.size > 0:
                checkpoints[b, step // TILE, :, d0:d1] = h[:, : d1 - d0]
            _copy(raw, x.delta[b, row, d0:d1])
            _copy(u, x.u[b, row, d0:d1])
            _delta_row(delta, raw, bias, x.delta_softplus)
            _input_row(delta_u, y_row, delta, u, D)
            _step(h, y_row, delta, delta_u, A, x.B[b, row], x.C[b, row])
            if x.z.size > 0:
                _copy(z, x.z[b, row, d0:d1])
                _gate_row(y_row, z)
            _copy(y[b, row, d0:d1], y_row[: d1 - d0])
        last_state[b, d0:d1] = h[:, : d1 - d0].T


@_inline
def _replay_step(h_before, h, decay, y, delta, delta_u, A, B, C):
    """`_step` that saves the states and decays for the walk back, which then needs no exponential.
    """
    for n in range(A.shape[0]):
        B_n = B[n]
        C_n = C[n]
        for d in range(BLOCK):
            a = _exp(delta[d] * A[n, d])
            h_new = a * h_before[n, d] + delta_u[d] * B_n
            decay[n, d] = a
            h[n, d] = h_new
            y[d] += h_new * C_n


@_inline
def _step_bwd(
    g_h, g_A, g_delta_u, g_decay, g_B, g_C, h_before, h, decay, delta, delta_u, g, A, B, C
):
    """One step back. g: gradient of y before the gate; g_h: that of the state, carried from step to
    step; g_delta_u and g_decay: rows, gradients of delta' u and of delta' through the decay."""
    for d in range(BLOCK):
        g_delta_u[d] = f32(0.0)
        g_decay[d] = f32(0.0)
    for n in range(A.shape[0]):
        B_n = B[n]
        C_n = C[n]
        sum_B = f32(0.0)
        sum_C = f32(0.0)
        for d in range(BLOCK):
            g_state = g_h[n, d] + g[d] * C_n
            sum_B += g_state * delta_u[d]
            sum_C += g[d] * h[n, d]
            g_delta_u[d] += g_state * B_n
            g_before = g_state * decay[n, d]
            g_exponent = g_before * h_before[n, d]
            g_A[n, d] += g_exponent * delta[d]
            g_decay[d] += g_exponent * A[n, d]
            g_h[n, d] = g_before
        g_B[n] = sum_B
        g_C[n] = sum_C


@_inline
def _input_row_bwd(g_D, g_bias, g_delta_u, g_decay, delta, u, slope, g, D):
    """g_delta_u becomes the gradient of u, g_decay that of delta."""
    for d in range(BLOCK):
        g_delta = (u[d] * g_delta_u[d] + g_decay[d]) * slope[d]
        g_D[d] += g[d] * u[d]
        g_bias[d] += g_delta
        g_delta_u[d] = delta[d] * g_delta_u[d] + g[d] * D[d]
        g_decay[d] = g_delta


@_inline
def _fold(total, part):
    """Sums a tile at a time: step by step over 1230 steps they were 6 times as far off as the
    reference's.
    """
    for d in range(BLOCK):
        total[d] += part[d]
        part[d] = f32(0.0)


@_inline
def _replay_tile(h, decay, tile_rows, rows, A, x, g_y, g_z, b, start, steps, d0, d1):
    """Fills h, decay and tile_rows of a tile, and the gradient of z."""
    raw, y, z, bias, D = rows[4], rows[5], rows[6], rows[7], rows[8]
    for t in range(steps):
        row = x.order[start + t]
        at = tile_rows[t]
        u, delta, delta_u, slope, g = at[0], at[1], at[2], at[3], at[4]
        _copy(u, x.u[b, row, d0:d1])
        _copy(g, g_y[b, row, d0:d1])
        _copy(raw, x.delta[b, row, d0:d1])
        _delta_row(delta, raw, bias, x.delta_softplus)
        _slope_row(slope, raw, bias, x.delta_softplus)
        _input_row(delta_u, y, delta, u, D)
        _replay_step(h[t], h[t + 1], decay[t], y, delta, delta_u, A, x.B[b, row], x.C[b, row])
        if x.z.size > 0:
            _copy(z, x.z[b, row, d0:d1])
            _gate_row_bwd(g, z, y)
            _copy(g_z[b, row, d0:d1], z[: d1 - d0])


@_kernel
def scan_bwd(first_task, last_task, x, checkpoints, g_y, g_last_state, grads):
    """Tasks first_task .. last_task - 1. x: ScanInputs; checkpoints of `scan_fwd`; g_y (B, L, D);
    g_last_state (B, D, N), or (0, 0, 0) for zero; grads: ScanGrads."""
    length, channels = x.u.shape[1:]
    states = x.A.shape[0]
    tiles = (length + TILE - 1) // TILE
    h = np.zeros((TILE + 1, states, BLOCK), f32)  # h[t]: state before step t of the tile
    decay = np.zeros((TILE, states, BLOCK), f32)
    for task in range(first_task, last_task):
        b, block, d0, d1 = _locate(task, channels)
        width = d1 - d0
        A = np.zeros((states, BLOCK), f32)
        g_h = np.zeros((states, BLOCK), f32)
        g_A = np.zeros((states, BLOCK), f32)
        g_A_tile = np.zeros((states, BLOCK), f32)
        h[0] = f32(0.0)  # the channels that a narrow block lacks
        tile_rows = np.zeros((TILE, 5, BLOCK), f32)  # u, delta', delta' u, slope, gradient of y
        rows = np.zeros((11, BLOCK), f32)
        g_delta_u, g_decay, g_D, g_bias = rows[0], rows[1], rows[2], rows[3]
        bias, D, g_D_tile, g_bias_tile = rows[7], rows[8], rows[9], rows[10]
        A[:, :width] = x.A[:, d0:d1]
        if g_last_state.size > 0:
            g_h[:, :width] = g_last_state[b, d0:d1].T
        _copy(bias, x.delta_bias[d0:d1])
        _copy(D, x.D[d0:d1])
        for tile in range(tiles - 1, -1, -1):
            start = tile * TILE
            steps = min(TILE, length - start)
            h[0, :, :width] = checkpoints[b, tile, :, d0:d1]
            _replay_tile(h, decay, tile_rows, rows, A, x, g_y, grads.z, b, start, steps, d0, d1)
            for t in range(steps - 1, -1, -1):
                row = x.order[start + t]
                at = tile_rows[t]
                u, delta, delta_u, slope, g = at[0], at[1], at[2], at[3], at[4]
                _step_bwd(
                    g_h, g_A_tile, g_delta_u, g_decay,
                    grads.B[block, b, row], grads.C[block, b, row],
                    h[t], h[t + 1], decay[t], delta, delta_u, g, A, x.B[b, row], x.C[b, row],
                )
                _input_row_bwd(g_D_tile, g_bias_tile, g_delta_u, g_decay, delta, u, slope, g, D)
                _copy(grads.u[b, row, d0:d1], g_delta_u[:width])
                _copy(grads.delta[b, row, d0:d1], g_decay[:width])
            for n in range(states):
                _fold(g_A[n], g_A_tile[n])
            _fold(g_D, g_D_tile)
            _fold(g_bias, g_bias_tile)
        grads.A[b, :, d0:d1] = g_A[:, :width]
        _copy(grads.D[b, d0:d1], g_D[:width])
        _copy(grads.delta_bias[b, d0:d1], g_bias[:width])


@_inline
def _add_product(target, a, b):
    for d in range(target.size):
        target[d] += a[d] * b[d]


@_inline
def _taps(y, x, order, step, weight, bias):
    """Convolution at one step, before the activation. x (L, D), weight (W, D) and bias (D,): one
    block's channels.
    """
    width = weight.shape[0]
    _copy(y, bias)
    for w in range(max(0, width - 1 - step), width):
        _add_product(y, weight[w], x[order[step - width + 1 + w]])


@_inline
def _silu_row(y):
    for d in range(y.size):
        y[d] = y[d] * _sigmoid(y[d])


@_inline
def _silu_row_bwd(g, y):
    for d in range(g.size):
        g[d] = g[d] * _silu_slope(y[d], _sigmoid(y[d]))


@_kernel
def conv_fwd(first_task, last_task, x, weight, bias, order, silu, y):
    """Tasks first_task .. last_task - 1. x, y (B, L, D); weight (W, D): transposed; bias (D,);
    order (L,) int64.
    """
    length, channels = x.shape[1:]
    for task in range(first_task, last_task):
        b, _, d0, d1 = _locate(task, channels)
        for step in range(length):
            y_row = y[b, order[step], d0:d1]
            _taps(y_row, x[b, :, d0:d1], order, step, weight[:, d0:d1], bias[d0:d1])
            if silu:
                _silu_row(y_row)


@_kernel
def conv_bwd(first_task, last_task, x, weight, bias, order, silu, g_y, g_x, g_weight, g_bias):
    """Tasks first_task .. last_task - 1. As `conv_fwd`; g_weight (B, W, D) and g_bias (B, D): a
    part an image.
    """
    length, channels = x.shape[1:]
    width = weight.shape[0]
    for task in range(first_task, last_task):
        b, _, d0, d1 = _locate(task, channels)
        g_x[b, :, d0:d1] = f32(0.0)
        g_weight[b, :, d0:d1] = f32(0.0)
        g_bias[b, d0:d1] = f32(0.0)
        y = np.zeros(d1 - d0, f32)
        g = np.zeros(d1 - d0, f32)
        for step in range(length):
            _copy(g, g_y[b, order[step], d0:d1])
            if silu:
                _taps(y, x[b, :, d0:d1], order, step, weight[:, d0:d1], bias[d0:d1])
                _silu_row_bwd(g, y)
            for w in range(max(0, width - 1 - step), width):
                source = order[step - width + 1 + w]
                _add_product(g_x[b, source, d0:d1], g, weight[w, d0:d1])
                _add_product(g_weight[b, w, d0:d1], g, x[b, source, d0:d1])
            g_bias[b, d0:d1] += g
