"""What to launch for scan and convolution of a given shape on a given GPU: pure functions, no GPU
needed.

A plan's kernels are launched in order on one stream and take the same parameter struct by value. A
struct is told by the slots of its fields, as 8-byte values; it mirrors one of csrc/ field by field,
and static_asserts there and a test hold the sizes.
"""

import math
from typing import NamedTuple

CTYPES = {"float32": "float", "float16": "__half", "bfloat16": "__nv_bfloat16"}

# Steps a tile of the scan's backward, and steps between two states that its first walk saves.
BACKWARD_TILE, STRIDE = 8, 4
# Values of kPass in csrc/selective_scan/forward.cu.
PASS_OUTPUT, PASS_END_STATE, PASS_SAVE_STATES, PASS_CARRY = 0, 1, 2, 3


def find_slots(integers, rows, pointers):
    """{field: slot}, and under None their number. rows: (B, L, X) tensors with X contiguous, of
    three slots each, address and two strides in elements. Absent ones are 0, as absent pointers."""
    slots, end = {}, 0
    for names, size in ((integers, 1), (rows, 3), (pointers, 1)):
        for name in names.split():
            slots[name], end = end, end + size
    return slots | {None: end}


# One for every kernel of the scan; a kernel reads the fields it needs. Rows are in kInput, order in
# int64, all else in float32 and contiguous. Absent can be z, order, last_state and g_last_state.
ScanParams = find_slots(
    "batch length channels states delta_softplus segments segment_length",
    "u delta z B C y g_y g_u g_delta g_z",
    "A D delta_bias order last_state g_last_state segment_state segment_delta carry_state "
    "carry_delta saved_states parts_BC parts_A parts_D parts_bias",
)
# weight (D, W), bias (D,): float32, contiguous. order may be absent.
ConvParams = find_slots(
    "batch length channels silu chunks chunk_length", "x y g_y g_x",
    "weight bias order parts_weight parts_bias",
)  # fmt: skip
# Of up to MAX_SUMS tasks, out[i] = sum over k < count of parts[k * size + i], in a fixed order; out
# is float32 or, where is_float is 0, the kernel's kOutput.
MAX_SUMS, SUM_FIELDS = 4, ("parts", "out", "count", "size", "is_float")


class Kernel(NamedTuple):
    """One instantiation: the `extern "C"` function `name` of csrc/`source`, under these -D."""

    source: str
    name: str
    defines: tuple  # of (name, value), both strings


class Launch(NamedTuple):
    kernel: Kernel
    grid: tuple  # x, y, z
    block: tuple
    shared_bytes: int = 0  # dynamic; above 48 KiB the kernel's attribute must be raised first


class Plan(NamedTuple):
    launches: tuple  # of Launch, in order
    integers: dict = {}  # further fields of the struct
    scratch: dict = {}  # field -> shape of a contiguous, uninitialised float32 tensor
    sums: dict = {}  # scratch to add over its first axis, in one launch -> (result, its dtype)

    def sum_launch(self):
        """Of their dtypes one at most is not float32."""
        dtypes = sorted({dtype for _, dtype in self.sums.values()} - {"float32"}) or ["float32"]
        kernel = make_kernel("common/sum_parts.cu", "sum_parts", kOutput=CTYPES[dtypes[0]])
        sizes = [math.prod(self.scratch[parts][1:]) for parts in self.sums]
        blocks = sum(_blocks(size, 128 if size % 4 == 0 else 32) for size in sizes)
        return Launch(kernel, (blocks, 1, 1), (256, 1, 1))

    def kernels(self):
        """Every kernel that the plan launches."""
        launches = [*self.launches, self.sum_launch()] if self.sums else self.launches
        return {launch.kernel for launch in launches}


def make_kernel(source, name, **defines):
    return Kernel(source, name, tuple(sorted((k, str(v)) for k, v in defines.items())))


def _blocks(channels, channels_a_block):
    return -(-channels // channels_a_block)


def _round_up(n, multiple):
    return -(-n // multiple) * multiple


class Variant(NamedTuple):
    """How a scan is divided: the states of a channel over `groups` of threads, the channels over
    blocks of `channels`, the steps over `segments`, each walked in tiles of `tile` steps.

    min_blocks: blocks a multiprocessor must be able to hold, which bounds the registers a thread.
    lanes: with several, this many lanes of a warp share a channel (forward_lanes.cu), in one group
    and one segment."""

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
    so that it fits into the shared memory of every GPU. An H200's has room for 4 blocks of 128
    threads or 6 of 64."""
    padded = backward_states(states)
    threads = 64 if dtype == "float32" and padded == 16 else 128
    blocks = batch * _blocks(channels, 64)
    wanted = 18 * multiprocessors // blocks if blocks < 3 * multiprocessors else 1
    segments = min(wanted, length // (4 * SEGMENT_GRAIN))
    resident = {64: 6, 128: 4}[threads] if padded == 16 else 1
    return Variant(padded // 16, 16 * threads // padded, BACKWARD_TILE, max(1, segments), resident)


def _segment_integers(length, segments):
    segment_length = _round_up(-(-length // segments), SEGMENT_GRAIN)
    return {"segments": -(-length // segment_length), "segment_length": segment_length}


def _without_outputs(variant):
    """The variant for passes other than PASS_OUTPUT, which need fewer registers."""
    if variant.groups == 1:
        return variant._replace(channels=128, tile=16, min_blocks=4)
    return variant._replace(channels=32, min_blocks=1)


def _walk(scan_pass, variant, shape, padded, dtype, segments):
    """A launch of a walk in one direction, the states padded to `padded`."""
    batch, _, channels, _ = shape
    defines = {
        "kInput": CTYPES[dtype], "kChannels": variant.channels, "kTile": variant.tile,
        "kMinBlocks": variant.min_blocks,
    }  # fmt: skip
    source, name = "selective_scan/forward.cu", "scan_forward"
    if variant.lanes > 1:
        source, name = "selective_scan/forward_lanes.cu", "scan_forward_lanes"
        defines |= {"kLanes": variant.lanes}
    else:
        defines |= {"kPass": scan_pass, "kStates": padded, "kGroups": variant.groups}
    grid = (batch * _blocks(channels, variant.channels), segments, 1)
    threads = variant.channels * variant.groups * variant.lanes
    return Launch(make_kernel(source, name, **defines), grid, (threads, 1, 1))


def _segment_scratch(prefix, batch, channels, states, segments):
    """End states of all segments but one, and their sums of step sizes."""
    return {
        f"{prefix}_state": (segments - 1, batch, states, channels),
        f"{prefix}_delta": (segments - 1, batch, channels),
    }


def scan_forward(batch, length, channels, states, dtype, multiprocessors, variant=None):
    """Plan of the forward. dtype: name of the dtype of u, delta, B, C, z. variant: to measure
    others than the one chosen here."""
    shape = (batch, length, channels, states)
    variant = variant or forward_variant(*shape, multiprocessors)
    integers = _segment_integers(length, variant.segments)
    segments, padded = integers["segments"], _round_up(states, 4 * variant.groups)
    launches, scratch = [_walk(PASS_OUTPUT, variant, shape, padded, dtype, segments)], {}
    if segments > 1:
        walk = _without_outputs(variant)
        launches.insert(0, _walk(PASS_END_STATE, walk, shape, padded, dtype, segments - 1))
        scratch = _segment_scratch("segment", batch, channels, padded, segments)
    return Plan(tuple(launches), integers, scratch)


def _backward_shared_bytes(channels, padded, dtype, output):
    """sizeof(Shared) of csrc/selective_scan/backward.cu."""
    threads = channels * padded // 16
    warps = threads // 32
    of_threads = (4 * 3 + 2) * 16 * threads
    element = 4 if dtype == "float32" else 2
    inputs = channels * (5 * 16 + STRIDE * element) + (16 * channels if output else 16 * warps)
    tiles4 = BACKWARD_TILE * padded // 2 * 16 * (1 + warps)
    raw, totals = BACKWARD_TILE * channels * 4 * element, 8 * channels
    sequences, rows = 12 * 16 * warps, 4 * BACKWARD_TILE * 4
    return of_threads + tiles4 + inputs + totals + raw + sequences + rows


def scan_backward(
    batch, length, channels, states, dtype, multiprocessors, variant=None, output=False
):
    """Plan of the backward: states saved every 4 steps, then the walk back, then sums of parts. All
    gradients are deterministic. Scratch: 16 bytes a token and channel for the states (N = 16).
    output: the walk also writes the forward's output y."""
    shape = (batch, length, channels, states)
    variant = variant or backward_variant(*shape, dtype, multiprocessors)
    padded = backward_states(states)
    integers = _segment_integers(length, variant.segments)
    segments = integers["segments"]
    shared_bytes = _backward_shared_bytes(variant.channels, padded, dtype, output)
    kernel = make_kernel(
        "selective_scan/backward.cu", "scan_backward", kInput=CTYPES[dtype], kStates=padded,
        kChannels=variant.channels, kTile=BACKWARD_TILE, kMinBlocks=variant.min_blocks,
        kSharedBytes=shared_bytes, kOutput=int(output),
    )  # fmt: skip
    blocks = _blocks(channels, variant.channels)
    threads = variant.channels * padded // 16
    walk = _without_outputs(variant)
    launches = [
        _walk(PASS_SAVE_STATES, walk, shape, padded, dtype, segments),
        Launch(kernel, (batch * blocks, segments, 1), (threads, 1, 1), shared_bytes),
    ]
    parts = batch * segments
    scratch = {
        "saved_states": (batch, -(-length // STRIDE), padded // 4, channels, 4),
        "parts_BC": (blocks, 2, batch, length, states), "parts_A": (parts, channels, states),
        "parts_D": (parts, channels), "parts_bias": (parts, channels),
    }  # fmt: skip
    if segments > 1:
        launches[:0] = [
            _walk(scan_pass, walk, shape, padded, dtype, segments - 1)
            for scan_pass in (PASS_END_STATE, PASS_CARRY)
        ]
        for prefix in ("segment", "carry"):
            scratch |= _segment_scratch(prefix, batch, channels, padded, segments)
    sums = {
        "parts_BC": ("g_BC", dtype), "parts_A": ("g_A", "float32"), "parts_D": ("g_D", "float32"),
        "parts_bias": ("g_delta_bias", "float32"),
    }  # fmt: skip
    return Plan(tuple(launches), integers, scratch, sums)


def scan_backward_with_output(*shape, **options):
    return scan_backward(*shape, output=True, **options)


def cut(length, least, columns, resident):
    """How to cut each of `columns` walks of `length` steps: {"chunks", "chunk_length"}. A block
    walks one chunk, of about `least` steps or more; the GPU holds `resident` blocks at once, so
    they come in whole waves."""

    def estimate(chunks):
        """Of the time, in steps: a wave begins with what takes as long as some 10 steps."""
        return -(-columns * chunks // resident) * (length / chunks + 10)

    chunk_length = -(-length // min(range(1, -(-length // least) + 1), key=estimate))
    return {"chunks": -(-length // chunk_length), "chunk_length": chunk_length}


_CONV_THREADS = 128


def _conv_launch(name, resident, batch, length, channels, width, dtype, multiprocessors):
    """resident: blocks that a multiprocessor holds at least, in any dtype (4 channels a thread)."""
    vector = 4 if channels % 4 == 0 else 1  # channels of a thread
    kernel = make_kernel(
        f"causal_conv1d/{name}.cu", f"conv_{name}", kInput=CTYPES[dtype], kWidth=width,
        kVector=vector, kThreads=_CONV_THREADS,
    )  # fmt: skip
    columns = batch * _blocks(channels, _CONV_THREADS * vector)
    integers = cut(length, 16, columns, resident * multiprocessors)
    launch = Launch(kernel, (columns, integers["chunks"], 1), (_CONV_THREADS, 1, 1))
    return (launch,), integers


def conv_forward(*shape):
    """Plan of the convolution's forward, of (batch, length, channels, width, dtype,
    multiprocessors)."""
    return Plan(*_conv_launch("forward", 5, *shape))


def conv_backward(batch, length, channels, width, *rest):
    """Plan of the convolution's backward; deterministic."""
    launches, integers = _conv_launch("backward", 4, batch, length, channels, width, *rest)
    parts = batch * integers["chunks"]
    scratch = {"parts_weight": (parts, channels, width), "parts_bias": (parts, channels)}
    sums = {"parts_weight": ("g_weight", "float32"), "parts_bias": ("g_bias", "float32")}
    return Plan(launches, integers, scratch, sums)
