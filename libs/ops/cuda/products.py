"""Products of many tokens in half precision on Hopper, by a kernel that cuBLASLt offers and cuBLAS
does not choose.

Two groups of warps take one of its small tiles each in turn; of the larger tiles that cuBLAS
chooses they share one. The bits are the same, and the GPU needs less power for them, which binds:
a call of DiM-H at batch 64, 256 px, takes 92.3 instead of 93.8 ms (H200, cuBLAS 13.1).
"""

import ctypes
import functools

import torch

LEAST = 16384, 1024, 1024  # tokens, columns and depth from which it is used
_TILE = 29  # CUBLASLT_MATMUL_TILE_128x160
_KINDS = {torch.float16: 2, torch.bfloat16: 14}  # CUDA_R_16F, CUDA_R_16BF
_OFFERS = 64  # asked for; cuBLASLt has made 8
_ALIGNMENT = 256  # bytes, as cuBLASLt takes for granted


class _Offer(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algorithm", ctypes.c_uint64 * 8), ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int), ("waves", ctypes.c_float), ("reserved", ctypes.c_int * 4),
    )  # fmt: skip


@functools.cache
def _library():
    """The one that torch has loaded, or None."""
    try:
        return ctypes.CDLL(f"libcublasLt.so.{torch.version.cuda.split('.')[0]}")
    except OSError:
        return None


def _call(name, *arguments):
    if status := getattr(_library(), f"cublasLt{name}")(*arguments):
        raise RuntimeError(f"cublasLt{name} ends with status {status}")


def _create(name, *arguments):
    made = ctypes.c_void_p()
    _call(f"{name}Create", ctypes.byref(made), *arguments)
    return made


@functools.cache
def _choose(device, tokens, columns, depth, dtype):
    """(handle, product, layouts of weight, x and result, algorithm) for a product on the current
    device; or None where the kernel is not on offer."""
    if torch.cuda.get_device_capability(device) != (9, 0) or _library() is None:
        return None
    handle, product = _create(""), _create("MatmulDesc", 68, 0)  # CUBLAS_COMPUTE_32F, CUDA_R_32F
    value, count = ctypes.c_int(1), ctypes.c_int()
    integer = ctypes.byref(value), ctypes.c_size_t(ctypes.sizeof(value))
    _call("MatmulDescSetAttribute", product, 3, *integer)  # CUBLASLT_MATMUL_DESC_TRANSA
    layouts = [  # of rows, columns and a column's stride
        _create("MatrixLayout", _KINDS[dtype], *map(ctypes.c_uint64, (rows, others, rows)))
        for rows, others in ((depth, columns), (depth, tokens), (columns, tokens))
    ]
    offers, preference = (_Offer * _OFFERS)(), _create("MatmulPreference")
    asked = preference, _OFFERS, offers, ctypes.byref(count)
    _call("MatmulAlgoGetHeuristic", handle, product, *layouts, layouts[2], *asked)
    for offer in offers[: count.value]:  # 1: CUBLASLT_ALGO_CONFIG_TILE_ID
        _call("MatmulAlgoConfigGetAttribute", offer.algorithm, 1, *integer, None)
        if value.value == _TILE:
            return handle, product, *layouts, offer.algorithm
    return None


def in_small_tiles(x, weight):
    """x (B, L, K) times the transpose of weight (N, K), in their dtype; or None, where this is not
    for them."""
    sizes = x.shape[0] * x.shape[1], *weight.shape
    large = all(size >= least for size, least in zip(sizes, LEAST, strict=True))
    aligned = all(v.is_contiguous() and v.data_ptr() % _ALIGNMENT == 0 for v in (x, weight))
    if not (x.dtype in _KINDS and large and aligned):
        return None
    with torch.cuda.device_of(x):
        if (chosen := _choose(x.device, *sizes, x.dtype)) is None:
            return None
        handle, product, of_weight, of_x, of_out, algorithm = chosen
        out = x.new_empty(*x.shape[:2], len(weight))
        one, zero = ctypes.byref(ctypes.c_float(1)), ctypes.byref(ctypes.c_float(0))
        data = [ctypes.c_void_p(v.data_ptr()) for v in (weight, x, out)]
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        _call(
            "Matmul", handle, product, one, data[0], of_weight, data[1], of_x, zero, data[2],
            of_out, data[2], of_out, algorithm, None, ctypes.c_size_t(0), stream,
        )  # fmt: skip
    return out
