"""What to launch to quantise rows to e4m3 (csrc/fp8); pure functions, no GPU needed."""

import ctypes

from libs.ops.cuda.launch_plan import CTYPES, Kernel, Launch, Plan, Rows

_THREADS = 256
# (vectors of 8 elements that a lane of the kernel holds, warps that share a row)
_SHAPES = ((2, 1), (4, 1), (6, 1), (4, 2), (6, 2), (4, 4), (6, 4), (4, 8))
COLUMNS = tuple(256 * vectors * warps for vectors, warps in _SHAPES)  # up to which each goes
OLDEST_ARCH = 90  # that torch's product of rows with scales runs on
WIDTHS = range(16, COLUMNS[-1] + 1, 16)  # multiples as torch's products want; up to the kernel's


class QuantizeParams(ctypes.Structure):
    """Parameters of csrc/fp8/quantize_rows.cu: x is (1, rows, columns)."""

    _fields_ = [
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("x", Rows),
        ("out", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
    ]


def quantize_rows(rows, columns, dtype, multiprocessors):
    vectors, warps = next(s for s in _SHAPES if columns <= 256 * s[0] * s[1])
    defines = {"kInput": CTYPES[dtype], "kVectors": str(vectors), "kWarps": str(warps)}
    kernel = Kernel("fp8/quantize_rows.cu", "quantize_rows", tuple(sorted(defines.items())))
    blocks = -(-rows * warps // (_THREADS // 32))
    return Plan((Launch(kernel, (blocks, 1, 1), (_THREADS, 1, 1), 0),), (), {})


def quantize_transposed(rows, columns, dtype, multiprocessors):
    """Takes the scales that quantize_rows found."""
    kernel = Kernel(
        "fp8/quantize_transposed.cu", "quantize_transposed", (("kInput", CTYPES[dtype]),)
    )
    grid = (-(-columns // 64), -(-rows // 64), 1)
    return Plan((Launch(kernel, grid, (_THREADS, 1, 1), 0),), (), {})
