"""What to launch to quantise rows to e4m3 (csrc/fp8); pure functions, no GPU needed."""

import ctypes

from libs.ops.launch_plan import CTYPE_OF_DTYPE, Kernel, Launch, Plan, Rows

_THREADS = 256
_VECTORS = (2, 4, 6, 8, 12, 16, 24)  # of 8 elements that a lane of the kernel holds
GRAIN, MAX_COLUMNS = 16, 256 * _VECTORS[-1]  # of torch's products; of the kernel


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
    vectors = next(k for k in _VECTORS if columns <= 256 * k)
    defines = (("kInput", CTYPE_OF_DTYPE[dtype]), ("kVectors", str(vectors)))
    kernel = Kernel("fp8/quantize_rows.cu", "quantize_rows", defines)
    return Plan((Launch(kernel, (-(-rows // 8), 1, 1), (_THREADS, 1, 1), 0),), (), {})


def quantize_transposed(rows, columns, dtype, multiprocessors):
    """Takes the scales that quantize_rows found."""
    kernel = Kernel(
        "fp8/quantize_transposed.cu", "quantize_transposed", (("kInput", CTYPE_OF_DTYPE[dtype]),)
    )
    grid = (-(-columns // 64), -(-rows // 64), 1)
    return Plan((Launch(kernel, grid, (_THREADS, 1, 1), 0),), (), {})


KERNELS = sorted(
    kernel
    for dtype in ("bfloat16", "float16")
    for plan in (
        *(quantize_rows(1, 256 * vectors, dtype, 132) for vectors in _VECTORS),
        quantize_transposed(64, 64, dtype, 132),
    )
    for kernel in plan.kernels()
)
