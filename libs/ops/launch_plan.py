"""What to launch for an operator of a given shape on a given GPU: pure functions, no GPU needed.

A plan lists kernels in launch order, all of one stream and all taking the same parameter struct by
value, the scratch tensors and integers that the struct wants, and the sums over partial results
that follow. The structs here mirror csrc/selective_scan/params.cuh, csrc/causal_conv1d/params.cuh
and csrc/common/sum_parts.cu field by field; static_asserts there and a test hold the sizes.
"""

import ctypes
import math
from typing import NamedTuple

CTYPE_OF_DTYPE = {"float32": "float", "float16": "__half", "bfloat16": "__nv_bfloat16"}
MAX_STATES = 64
MAX_CONV_WIDTH = 8

# Steps between two states that the scan's backward keeps, and steps a tile of its reverse walk.
BACKWARD_TILE = 8
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


class SumParams(ctypes.Structure):
    """out[i] = sum over k < count of parts[k * size + i], in the order of k."""

    _fields_ = [
        ("parts", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("size", ctypes.c_int64),
    ]


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
    """A sum over the first axis of the scratch tensor `parts`, by a launch with SumParams."""

    launch: Launch
    parts: str
    out: str  # what it is: 'g_BC' (2, B, L, N), 'g_A', 'g_D', 'g_delta_bias', 'g_weight', 'g_bias'
    shape: tuple
    dtype: str


class Plan(NamedTuple):
    launches: tuple  # of Launch, in order
    scratch: tuple  # of Scratch, uninitialised
    integers: dict  # further fields of the struct
    sums: tuple = ()  # of Sum, after the launches


def _kernel(source, name, dtype, **defines):
    defines = {"kInput": CTYPE_OF_DTYPE[dtype]} | {k: str(v) for k, v in defines.items()}
    return Kernel(source, name, tuple(sorted(defines.items())))


def _blocks(channels, channels_a_block):
    return -(-channels // channels_a_block)


def _round_up(n, multiple):
    return -(-n // multiple) * multiple


def _sum(parts, out, shape, dtype="float32"):
    kernel = Kernel("common/sum_parts.cu", "sum_parts", (("kOutput", CTYPE_OF_DTYPE[dtype]),))
    threads = 256
    launch = Launch(kernel, (_blocks(math.prod(shape), threads), 1, 1), (threads, 1, 1), 0)
    return Sum(launch, parts, out, shape, dtype)


# ---------------------------------------- selective scan


class Variant(NamedTuple):
    """How a scan is divided: the states of a channel over `groups` of threads, the channels over
    blocks of `channels`, the steps over `segments`, each walked in tiles of `tile` steps.

    min_blocks: blocks a multiprocessor must be able to hold, which bounds the registers a thread.
    """

    groups: int
    channels: int
    tile: int
    segments: int
    min_blocks: int


# Segments begin at a multiple of this, which all tiles divide.
SEGMENT_GRAIN = 16


def padded_states(states, groups):
    """States rounded up so that each of the groups has a multiple of 4."""
    return _round_up(states, 4 * groups)


def _groups_needed(states):
    """A thread holds at most 16 states in registers."""
    return 1 if states <= 16 else 2 if states <= 32 else 4


def forward_variant(batch, length, channels, states, multiprocessors):
    """One thread a channel. Where that leaves the GPU empty, steps are cut into segments (their
    exponentials are then done twice); where those would be short, the states of a channel are
    split over 4 threads instead. H200, B 2, D 3072, N 16, bfloat16, in ms: L 4494 0.41 with states
    split, 0.39 in 9 segments, 0.37 in 20, 0.40 in 48; L 9806 0.88, 0.81, 0.75, 0.80; L 366 0.035
    with states split, 0.039 in 8 segments."""
    if states > 16:
        return Variant(4, 32, 16, 1, 1)
    blocks = batch * _blocks(channels, 64)
    if blocks >= 6 * multiprocessors:
        return Variant(1, 64, 8, 1, 8)
    if length < 1024:
        return Variant(4, 32, 16, 1, 1)
    segments = max(1, min(29 * multiprocessors // (2 * blocks) + 1, length // 128))
    return Variant(1, 64, 8, segments, 8)


def backward_variant(batch, length, channels, states, multiprocessors):
    """Where blocks fill less than half the GPU, steps are cut into segments, which costs a second
    walk both ways. States are split only where a thread cannot hold them. H200, B 2, D 3072, N 16,
    bfloat16, L 9806: 2.95 ms in 8 segments, 2.85 in 24, 2.81 in 32; L 4494 1.41, 1.38, 1.40."""
    groups = _groups_needed(states)
    channels_a_block = 64 if groups == 1 else 32
    blocks = batch * _blocks(channels, channels_a_block)
    wanted = 18 * multiprocessors // blocks if blocks < 3 * multiprocessors else 1
    segments = _segments(length, wanted)
    return Variant(groups, channels_a_block, BACKWARD_TILE, segments, 6 if groups == 1 else 1)


def _segments(length, wanted):
    """At most `wanted` segments, none shorter than 4 grains."""
    return max(1, min(wanted, length // (4 * SEGMENT_GRAIN)))


def _segment_integers(length, segments):
    segment_length = _round_up(-(-length // segments), SEGMENT_GRAIN)
    return {"segments": -(-length // segment_length), "segment_length": segment_length}


def _without_outputs(variant):
    """The variant for passes other than PASS_OUTPUT, which need fewer registers. (32 channels a
    block are 4% to 9% faster, but spill a register.)"""
    return variant._replace(min_blocks=10 if variant.groups == 1 else 1)


def _walk(scan_pass, variant, shape, dtype, segments):
    """A launch of csrc/selective_scan/forward.cu."""
    batch, _, channels, states = shape
    kernel = _kernel(
        "selective_scan/forward.cu", "scan_forward", dtype, kPass=scan_pass,
        kStates=padded_states(states, variant.groups), kGroups=variant.groups,
        kChannels=variant.channels, kTile=variant.tile, kMinBlocks=variant.min_blocks,
    )  # fmt: skip
    grid = (batch * _blocks(channels, variant.channels), segments, 1)
    return Launch(kernel, grid, (variant.channels * variant.groups, 1, 1), 0)


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
    launches = [_walk(PASS_OUTPUT, variant, shape, dtype, segments)]
    scratch = ()
    if segments > 1:
        walk = _without_outputs(variant)
        launches.insert(0, _walk(PASS_END_STATE, walk, shape, dtype, segments - 1))
        padded = padded_states(states, variant.groups)
        scratch = _segment_scratch("segment", batch, channels, padded, segments)
    return Plan(tuple(launches), scratch, integers)


def _backward_shared_bytes(variant, states, dtype):
    """sizeof(Shared) of csrc/selective_scan/backward.cu."""
    groups, channels, tile = variant.groups, variant.channels, variant.tile
    threads, a_thread = groups * channels, states // groups
    history = (tile - 1) * a_thread * threads * 4
    inputs = tile * threads * 4 * (4 if dtype == "float32" else 2)
    staged = 2 * tile * states * 4
    sums = threads // 32 * tile * 2 * a_thread * 4
    rows = 4 * tile * 4
    parts = 3 * groups * tile * channels * 4 if groups > 1 else 4
    return _round_up(history + inputs + staged + sums + rows + parts, 16)


def scan_backward(batch, length, channels, states, dtype, multiprocessors, variant=None):
    """Plan of the backward: states kept every tile, then the walk back, then sums of parts. All
    gradients are deterministic. Scratch: 8 bytes a token and channel for the states (N = 16)."""
    shape = (batch, length, channels, states)
    variant = variant or backward_variant(*shape, multiprocessors)
    groups, tile = variant.groups, variant.tile
    integers = _segment_integers(length, variant.segments)
    segments = integers["segments"]
    padded = padded_states(states, groups)
    shared_bytes = _backward_shared_bytes(variant, padded, dtype)
    kernel = _kernel(
        "selective_scan/backward.cu", "scan_backward", dtype, kStates=padded, kGroups=groups,
        kChannels=variant.channels, kTile=tile, kMinBlocks=variant.min_blocks,
        kSharedBytes=shared_bytes,
    )  # fmt: skip
    blocks = _blocks(channels, variant.channels)
    main = Launch(
        kernel, (batch * blocks, segments, 1), (groups * variant.channels, 1, 1), shared_bytes
    )
    walk = _without_outputs(variant)
    launches = [_walk(PASS_CHECKPOINTS, walk, shape, dtype, segments), main]
    parts = batch * segments
    scratch = (
        Scratch("checkpoints", (batch, -(-length // tile), padded // 4, channels, 4), "float32"),
        Scratch("parts_BC", (blocks, 2, batch, length, states), "float32"),
        Scratch("parts_A", (parts, channels, states), "float32"),
        Scratch("parts_D", (parts * groups, channels), "float32"),
        Scratch("parts_bias", (parts * groups, channels), "float32"),
    )
    if segments > 1:
        launches[:0] = [
            _walk(scan_pass, walk, shape, dtype, segments - 1)
            for scan_pass in (PASS_END_STATE, PASS_CARRY)
        ]
        scratch += _segment_scratch("segment", batch, channels, padded, segments)
        scratch += _segment_scratch("carry", batch, channels, padded, segments)
    sums = (
        _sum("parts_BC", "g_BC", (2, batch, length, states), dtype),
        _sum("parts_A", "g_A", (channels, states)),
        _sum("parts_D", "g_D", (channels,)),
        _sum("parts_bias", "g_delta_bias", (channels,)),
    )
    return Plan(tuple(launches), scratch, integers, sums)


# ---------------------------------------- causal convolution

_CONV_THREADS, _CONV_VECTOR = 128, 4


def _conv_launch(name, batch, length, channels, width, dtype, multiprocessors):
    kernel = _kernel(
        f"causal_conv1d/{name}.cu", f"conv_{name}", dtype, kWidth=width, kVector=_CONV_VECTOR,
        kThreads=_CONV_THREADS,
    )  # fmt: skip
    columns = batch * _blocks(channels, _CONV_THREADS * _CONV_VECTOR)
    # Enough chunks for 8 blocks a multiprocessor, none shorter than 16 steps: each rereads
    # width - 1 rows.
    wanted = max(1, min(-(-8 * multiprocessors // columns), length // 16))
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
        _sum("parts_weight", "g_weight", (channels, width)),
        _sum("parts_bias", "g_bias", (channels,)),
    )
    return Plan((launch,), scratch, integers, sums)


# ---------------------------------------- what the shipped configs use


def _kernels_of_configs():
    """Every kernel of the shipped configs: N = 16, width 3, training and sampling, any batch."""
    kernels = set()
    for dtype in CTYPE_OF_DTYPE:
        for batch, length, channels in ((1, 78, 256), (2, 1230, 3072), (96, 366, 3072)):
            scan, conv = (batch, length, channels, 16), (batch, length, channels, 3)
            for plan in (
                scan_forward(*scan, dtype, 132), scan_backward(*scan, dtype, 132),
                conv_forward(*conv, dtype, 132), conv_backward(*conv, dtype, 132),
            ):  # fmt: skip
                launches = [*plan.launches, *(s.launch for s in plan.sums)]
                kernels |= {launch.kernel for launch in launches}
    return sorted(kernels)


INSTANTIATIONS_OF_CONFIGS = _kernels_of_configs()
