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
MIN_CONV_WIDTH, MAX_CONV_WIDTH = 2, 8

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
    """Causal convolution. weight (D, W) and bias (D,) float32, contiguous; bias, order 0: absent."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in (
            "batch", "length", "channels", "silu",
            "chunks", "chunk_length",  # plan.integers
        )),
        *((name, Rows) for name in ("x", "y", "g_y", "g_x")),
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "order", "parts_weight")),
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
    out: str  # what it is: 'g_BC' (2, B, L, N), 'g_A' (D, N), 'g_D', 'g_delta_bias' (D,), 'g_weight'
    shape: tuple
    dtype: str


class Plan(NamedTuple):
    launches: tuple  # of Launch, in order
    scratch: tuple  # of Scratch, uninitialised
    integers: dict  # further fields of the struct
    sums: tuple = ()  # of Sum, after the launches
