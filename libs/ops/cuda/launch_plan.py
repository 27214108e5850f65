"""What to launch for an operator of a given shape on a given GPU: pure functions, no GPU needed.

A plan lists kernels in launch order, all of one stream and all taking the same parameter struct by
value, the scratch tensors and integers that the struct wants, and the sums over partial results
that follow. The structs here mirror csrc/selective_scan/params.cuh, csrc/causal_conv1d/params.cuh
and csrc/common/sum_parts.cu field by field; static_asserts there and a test hold the sizes.
"""

import ctypes
import math
from typing import NamedTuple

CTYPES = {"float32": "float", "float16": "__half", "bfloat16": "__nv_bfloat16"}

# Steps a tile of the scan's backward, and steps between two states that its first walk saves.
BACKWARD_TILE, STRIDE = 8, 4
# Values of kPass in csrc/selective_scan/forward.cu.
PASS_OUTPUT, PASS_END_STATE, PASS_CHECKPOINTS, PASS_CARRY = 0, 1, 2, 3


# ---------------------------------------- parameter structs


class Rows(ctypes.Structure):
    """A (B, L, X) tensor with X contiguous; strides in elements. data = 0: absent."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("batch_stride", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
    ]


class ScanParams(ctypes.Structure):
    """One struct for every kernel of the scan; a kernel reads the fields it needs.

    Pointers may be 0 for what is absent: z, D, delta_bias, order (int64), last_state, g_y (then
    only the last state has a gradient), g_last_state; g_z must be given exactly if z is. A, D,
    delta_bias, last_state and g_last_state are float32 and contiguous; Rows are in kInput.
    """

    _fields_ = [
        *((name, ctypes.c_int64) for name in (
            "batch", "length", "channels", "states", "delta_softplus",
            "segments", "segment_length",  # plan.integers
        )),
        *((name, Rows) for name in (
            "u", "delta", "z", "B", "C", "y", "g_y", "g_u", "g_delta", "g_z"
        )),
        *((name, ctypes.c_void_p) for name in (
            "A", "D", "delta_bias", "order", "last_state", "g_last_state",
            # plan.scratch
            "segment_state", "segment_delta", "carry_state", "carry_delta", "checkpoints",
            "parts_BC", "parts_A", "parts_D", "parts_bias",
        )),
    ]  # fmt: skip


class ConvParams(ctypes.Structure):
    """Causal convolution. weight (D, W), bias (D,): float32, contiguous. bias, order 0: absent."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in (
            "batch", "length", "channels", "silu",
            "chunks", "chunk_length",  # plan.integers
        )),
        *((name, Rows) for name in ("x", "y", "g_y", "g_x")),
        *((name, ctypes.c_void_p) for name in (
            "weight", "bias", "order", "parts_weight", "parts_bias"
        )),
    ]  # fmt: skip


MAX_SUMS = 4


class SumParams(ctypes.Structure):
    """For each task, out[i] = sum over k < count of parts[k * size + i], in a fixed order; out is
    float32 or, where is_float is 0, the kernel's kOutput."""

    _fields_ = [
        (f"{name}_{task}", kind)
        for task in range(MAX_SUMS)
        for name, kind in (
            ("parts", ctypes.c_void_p), ("out", ctypes.c_void_p),
            ("count", ctypes.c_int64), ("size", ctypes.c_int64), ("is_float", ctypes.c_int64),
        )
    ]  # fmt: skip


# ---------------------------------------- plans


class Kernel(NamedTuple):
    """One instantiation: the `extern "C"` function `name` of csrc/`source`, under these -D."""

    source: str
    name: str
    defines: tuple  # of (name, value), both strings


class Launch(NamedTuple):
    kernel: Kernel
    grid: tuple  # x, y, z
    block: tuple
    shared_bytes: int  # dynamic; above 48 KiB the kernel's attribute must be raised first


class Scratch(NamedTuple):
    """A contiguous tensor the plan needs; its address goes into the struct's field `name`."""

    name: str
    shape: tuple
    dtype: str


class Sum(NamedTuple):
    """A sum over the first axis of the scratch tensor `parts`."""

    parts: str
    out: str  # what it is: 'g_BC' (2, B, L, N), 'g_A', 'g_D', 'g_delta_bias', 'g_weight', 'g_bias'
    shape: tuple
    dtype: str = "float32"


class Plan(NamedTuple):
    launches: tuple  # of Launch, in order
    scratch: tuple  # of Scratch, uninitialised
    integers: dict  # further fields of the struct
    sums: tuple = ()  # of Sum, in one launch after the others

    def kernels(self):
        """Every kernel that the plan launches."""
        launches = [*self.launches, sum_launch(self.sums)] if self.sums else self.launches
        return {launch.kernel for launch in launches}


def _kernel(source, name, dtype, **defines):
    defines = {"kInput": CTYPES[dtype]} | {k: str(v) for k, v in defines.items()}
    return Kernel(source, name, tuple(sorted(defines.items())))


def _blocks(channels, channels_a_block):
    return -(-channels // channels_a_block)


def _round_up(n, multiple):
    return -(-n // multiple) * multiple


def sum_launch(sums):
    """The launch, with SumParams, that adds the parts of up to MAX_SUMS sums; of their dtypes one
    at most is not float32."""
    dtypes = sorted({s.dtype for s in sums} - {"float32"}) or ["float32"]
    kernel = Kernel("common/sum_parts.cu", "sum_parts", (("kOutput", CTYPES[dtypes[0]]),))
    sizes = [math.prod(s.shape) for s in sums]
    blocks = sum(_blocks(size, 128 if size % 4 == 0 else 32) for size in sizes)
    return Launch(kernel, (blocks, 1, 1), (256, 1, 1), 0)


# ---------------------------------------- selective scan


class Variant(NamedTuple):
    """How a scan is divided: the states of a channel over `groups` of threads, the channels over
    blocks of `channels`, the steps over `segments`, each walked in tiles of `tile` steps.

    min_blocks: blocks a multiprocessor must be able to hold, which bounds the registers a thread.
    lanes: with several, this many lanes of a warp share a channel (forward_lanes.cu), in one group
    and one segment.
    """

    groups: int
    channels: int
    tile: int
    segments: int
    min_blocks: int
    lanes: int = 1


# The variants of up to 16 states; in segments, ONE_THREAD.
ONE_THREAD = Variant(1, 64, 8, 1, 8)
FOUR_LANES = Variant(1, 32, 16, 1, 3, lanes=4)
EIGHT_LANES = Variant(1, 16, 16, 1, 4, lanes=8)

# Segments begin at a multiple of this, which all tiles divide.
SEGMENT_GRAIN = 16


def forward_variant(batch, length, channels, states, multiprocessors):
    """One thread a channel where that fills the GPU; else the states of a channel on 4 or 8 lanes
    of a warp; for the few channels and many steps that leave even those idle, steps cut into
    segments (their exponentials are then done twice). H200, D 3072, N 16, bfloat16, in ms, one
    thread / 4 lanes / 8 lanes / segments: B 16 L 1230 0.436 / 0.451 / 0.510 / -, B 4 L 1230 0.260 /
    0.122 / 0.138 / 0.202, B 2 L 9806 1.99 / 0.640 / 0.551 / 0.759, B 1 L 9806 1.98 / 0.454 / 0.408
    / 0.403. More than 16 states: split over 4 threads."""
    if states > 16:
        return Variant(4, 32, 16, 1, 1)
    blocks = batch * _blocks(channels, 64)
    if 2 * blocks >= 11 * multiprocessors:
        return ONE_THREAD
    if batch * _blocks(channels, 32) >= 2 * multiprocessors:
        return FOUR_LANES
    if 3 * batch * _blocks(channels, 16) >= 4 * multiprocessors or length < 1536:
        return EIGHT_LANES
    segments = max(1, min(29 * multiprocessors // (2 * blocks) + 1, length // 128))
    return ONE_THREAD._replace(segments=segments)


def backward_states(states):
    """States as the backward's kernels pad them."""
    return next(padded for padded in (16, 32, 64) if states <= padded)


def backward_variant(batch, length, channels, states, dtype, multiprocessors):
    """Where blocks fill less than half the GPU, steps are cut into segments, which costs a second
    walk both ways. groups: of the walks that come before. A block has 128 threads: with 64 the
    kernel takes 2.46 instead of 2.26 ms (H200, B 96, L 366, D 3072, N 16, bfloat16); in float32 64,
    so that it fits into the shared memory of every GPU."""
    padded = backward_states(states)
    threads = 64 if dtype == "float32" and padded == 16 else 128
    blocks = batch * _blocks(channels, 64)
    wanted = 18 * multiprocessors // blocks if blocks < 3 * multiprocessors else 1
    resident = 384 // threads if padded == 16 else 1
    return Variant(
        padded // 16, 16 * threads // padded, BACKWARD_TILE, _segments(length, wanted), resident
    )


def _segments(length, wanted):
    """At most `wanted` segments, none shorter than 4 grains."""
    return max(1, min(wanted, length // (4 * SEGMENT_GRAIN)))


def _segment_integers(length, segments):
    segment_length = _round_up(-(-length // segments), SEGMENT_GRAIN)
    return {"segments": -(-length // segment_length), "segment_length": segment_length}


def _without_outputs(variant):
    """The variant for passes other than PASS_OUTPUT, which need fewer registers."""
    if variant.groups == 1:
        return variant._replace(channels=128, tile=16, min_blocks=4)
    return variant._replace(channels=32, min_blocks=1)


def _walk(scan_pass, variant, shape, padded, dtype, segments):
    """A launch of csrc/selective_scan/forward.cu with the states padded to `padded`."""
    batch, _, channels, _ = shape
    kernel = _kernel(
        "selective_scan/forward.cu", "scan_forward", dtype, kPass=scan_pass,
        kStates=padded, kGroups=variant.groups,
        kChannels=variant.channels, kTile=variant.tile, kMinBlocks=variant.min_blocks,
    )  # fmt: skip
    grid = (batch * _blocks(channels, variant.channels), segments, 1)
    return Launch(kernel, grid, (variant.channels * variant.groups, 1, 1), 0)


def _walk_by_lanes(variant, shape, dtype):
    """A launch of csrc/selective_scan/forward_lanes.cu."""
    batch, _, channels, _ = shape
    kernel = _kernel(
        "selective_scan/forward_lanes.cu", "scan_forward_lanes", dtype, kLanes=variant.lanes,
        kChannels=variant.channels, kTile=variant.tile, kMinBlocks=variant.min_blocks,
    )  # fmt: skip
    grid = (batch * _blocks(channels, variant.channels), 1, 1)
    return Launch(kernel, grid, (variant.channels * variant.lanes, 1, 1), 0)


def _segment_scratch(prefix, batch, channels, states, segments):
    """End states of all segments but one, and their sums of step sizes."""
    return (
        Scratch(f"{prefix}_state", (segments - 1, batch, states, channels), "float32"),
        Scratch(f"{prefix}_delta", (segments - 1, batch, channels), "float32"),
    )


def scan_forward(batch, length, channels, states, dtype, multiprocessors, variant=None):
    """Plan of the forward. dtype: name of the dtype of u, delta, B, C, z. variant: to measure
    others than the one chosen here."""
    shape = (batch, length, channels, states)
    variant = variant or forward_variant(*shape, multiprocessors)
    integers = _segment_integers(length, variant.segments)
    segments = integers["segments"]
    if variant.lanes > 1:
        return Plan((_walk_by_lanes(variant, shape, dtype),), (), integers)
    padded = _round_up(states, 4 * variant.groups)
    launches = [_walk(PASS_OUTPUT, variant, shape, padded, dtype, segments)]
    scratch = ()
    if segments > 1:
        walk = _without_outputs(variant)
        launches.insert(0, _walk(PASS_END_STATE, walk, shape, padded, dtype, segments - 1))
        scratch = _segment_scratch("segment", batch, channels, padded, segments)
    return Plan(tuple(launches), scratch, integers)


def _backward_shared_bytes(channels, padded, dtype, output):
    """sizeof(Shared) of csrc/selective_scan/backward.cu."""
    threads = channels * padded // 16
    warps = threads // 32
    own = 4 * 4 * threads * 16
    of_warp = max(16 * channels // warps, STRIDE * 2 * padded * 4)
    element = 4 if dtype == "float32" else 2
    channel_vectors = channels * (4 * 16 + STRIDE * element) + (16 * channels if output else 16)
    quad = 2 * STRIDE * padded * 4 + channel_vectors + warps * of_warp
    raw = BACKWARD_TILE * channels * 4 * element
    return own + BACKWARD_TILE // STRIDE * quad + raw + 4 * BACKWARD_TILE * 4


def scan_backward(
    batch, length, channels, states, dtype, multiprocessors, variant=None, output=False
):
    """Plan of the backward: states kept every 4 steps, then the walk back, then sums of parts. All
    gradients are deterministic. Scratch: 16 bytes a token and channel for the states (N = 16).
    output: the walk also writes the forward's output y."""
    shape = (batch, length, channels, states)
    variant = variant or backward_variant(*shape, dtype, multiprocessors)
    padded = backward_states(states)
    integers = _segment_integers(length, variant.segments)
    segments = integers["segments"]
    shared_bytes = _backward_shared_bytes(variant.channels, padded, dtype, output)
    kernel = _kernel(
        "selective_scan/backward.cu", "scan_backward", dtype, kStates=padded,
        kChannels=variant.channels, kTile=BACKWARD_TILE, kMinBlocks=variant.min_blocks,
        kSharedBytes=shared_bytes, kOutput=int(output),
    )  # fmt: skip
    blocks = _blocks(channels, variant.channels)
    threads = variant.channels * padded // 16
    main = Launch(kernel, (batch * blocks, segments, 1), (threads, 1, 1), shared_bytes)
    walk = _without_outputs(variant)
    launches = [_walk(PASS_CHECKPOINTS, walk, shape, padded, dtype, segments), main]
    parts, kept = batch * segments, -(-length // STRIDE)
    scratch = (
        Scratch("checkpoints", (batch, kept, padded // 4, channels, 4), "float32"),
        Scratch("parts_BC", (blocks, 2, batch, length, states), "float32"),
        Scratch("parts_A", (parts, channels, states), "float32"),
        Scratch("parts_D", (parts, channels), "float32"),
        Scratch("parts_bias", (parts, channels), "float32"),
    )
    if segments > 1:
        launches[:0] = [
            _walk(scan_pass, walk, shape, padded, dtype, segments - 1)
            for scan_pass in (PASS_END_STATE, PASS_CARRY)
        ]
        scratch += _segment_scratch("segment", batch, channels, padded, segments)
        scratch += _segment_scratch("carry", batch, channels, padded, segments)
    sums = (
        Sum("parts_BC", "g_BC", (2, batch, length, states), dtype),
        Sum("parts_A", "g_A", (channels, states)),
        Sum("parts_D", "g_D", (channels,)),
        Sum("parts_bias", "g_delta_bias", (channels,)),
    )
    return Plan(tuple(launches), scratch, integers, sums)


def scan_backward_with_output(*shape, **options):
    return scan_backward(*shape, output=True, **options)


# ---------------------------------------- causal convolution

_CONV_THREADS, _CONV_VECTOR = 128, 4


def _conv_launch(name, batch, length, channels, width, dtype, multiprocessors):
    kernel = _kernel(
        f"causal_conv1d/{name}.cu", f"conv_{name}", dtype, kWidth=width, kVector=_CONV_VECTOR,
        kThreads=_CONV_THREADS,
    )  # fmt: skip
    columns = batch * _blocks(channels, _CONV_THREADS * _CONV_VECTOR)
    # Enough chunks for 8 blocks a multiprocessor, none shorter than 16 steps, as each rereads
    # width - 1 rows; for 16 if they stay longer than 80 (H200, B 96 L 366 D 3072, bfloat16: 0.131
    # instead of 0.151 ms forward, 0.267 instead of 0.291 backward).
    wanted = max(
        1,
        min(-(-8 * multiprocessors // columns), length // 16),
        min(-(-16 * multiprocessors // columns), length // 80),
    )
    chunk_length = -(-length // wanted)
    chunks = -(-length // chunk_length)
    launch = Launch(kernel, (columns, chunks, 1), (_CONV_THREADS, 1, 1), 0)
    return launch, {"chunks": chunks, "chunk_length": chunk_length}


def conv_forward(batch, length, channels, width, dtype, multiprocessors):
    """Plan of the convolution's forward."""
    launch, integers = _conv_launch(
        "forward", batch, length, channels, width, dtype, multiprocessors
    )
    return Plan((launch,), (), integers)


def conv_backward(batch, length, channels, width, dtype, multiprocessors):
    """Plan of the convolution's backward; deterministic."""
    launch, integers = _conv_launch(
        "backward", batch, length, channels, width, dtype, multiprocessors
    )
    parts = batch * integers["chunks"]
    scratch = (
        Scratch("parts_weight", (parts, channels, width), "float32"),
        Scratch("parts_bias", (parts, channels), "float32"),
    )
    sums = (
        Sum("parts_weight", "g_weight", (channels, width)),
        Sum("parts_bias", "g_bias", (channels,)),
    )
    return Plan((launch,), scratch, integers, sums)
