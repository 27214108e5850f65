"""What to launch to quantise rows to e4m3 (csrc/fp8); pure functions, no GPU needed."""

import ctypes

from libs.ops.launch_plan import CTYPE_OF_DTYPE, Kernel, Launch, Plan, Rows

_THREADS = 256
GRAIN, MAX_COLUMNS = 16, 8 * _THREADS * 4  # of torch's products; of the kernel


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
    vectors = next(k for k in (1, 2, 4) if columns <= 8 * _THREADS * k)
    defines = (("kInput", CTYPE_OF_DTYPE[dtype]), ("kVectors", str(vectors)))
    kernel = Kernel("fp8/quantize_rows.cu", "quantize_rows", defines)
    return Plan((Launch(kernel, (rows, 1, 1), (_THREADS, 1, 1), 0),), (), {})


KERNELS = sorted(
    kernel
    for dtype in ("bfloat16", "float16")
    for columns in (2048, 4096, 8192)
    for kernel in quantize_rows(1, columns, dtype, 132).kernels()
)
