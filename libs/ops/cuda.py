"""Runs the plans of launch_plan.py: loads the kernels onto the GPU and launches them on torch's
current stream.

A kernel is compiled (cuda_compile.py) and loaded at its first use on a device; after that a launch
is one call of the driver, without synchronisation, so that CUDA graphs can capture it.
"""

import ctypes
import functools
import logging
import math
import sys
import threading
from typing import NamedTuple

import torch

from libs.ops import cuda_compile, launch_plan
from libs.ops.cuda_compile import Program
from utils import UserError

_log = logging.getLogger("dim")
_ALIGNMENT = 256  # of scratch tensors inside their one allocation; what torch.empty guarantees
_STATIC_SHARED_LIMIT = 48 * 1024  # above it a kernel must be told


# ---------------------------------------- can it run


def unavailable(device):
    """None, or why no kernel of ours can run on this CUDA device, and what mends it."""
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device here"
    return _unavailable(_index(device))


@functools.cache
def _unavailable(index):
    if torch.version.hip:
        return "PyTorch is built for ROCm; our kernels are for CUDA"
    reason = cuda_compile.missing(torch.version.cuda)
    if reason:
        return reason
    gpu = Gpu.of(index)
    if gpu.arch < 75:
        return f"{gpu.name} is sm_{gpu.arch}; the kernels are for sm_75 (Turing) and newer"
    return cuda_compile.unsupported(gpu.arch)


def describe(device):
    gpu = Gpu.of(_index(device))
    return f"{gpu.name}, sm_{gpu.arch}, NVRTC {cuda_compile.nvrtc_version()}"


def _index(device):
    return torch.cuda.current_device() if device.index is None else device.index


# ---------------------------------------- kernels on a device


class Gpu:
    """One device: its properties, the kernels loaded on it, and which of them were checked."""

    def __init__(self, index):
        properties = torch.cuda.get_device_properties(index)
        self.index = index
        self.name = properties.name
        self.arch = 10 * properties.major + properties.minor
        self.multiprocessors = properties.multi_processor_count
        self.checked = set()
        self._loaded = {}
        self._lock = threading.RLock()

    @staticmethod
    @functools.cache
    def of(index):
        return Gpu(index)

    def function(self, kernel, shared_bytes=0):
        """The driver's handle of a kernel, compiled and loaded if this is its first use."""
        with self._lock:
            if (kernel, shared_bytes) not in self._loaded:
                self._loaded[kernel, shared_bytes] = self._load(kernel, shared_bytes)
            return self._loaded[kernel, shared_bytes]

    def _load(self, kernel, shared_bytes):
        from cuda.bindings import driver

        if torch.cuda.is_current_stream_capturing():
            raise UserError(
                f"the CUDA kernel {kernel.name} was not used before this graph capture; run the "
                "model once on inputs of the same shapes and dtypes, then capture"
            )
        with torch.cuda.device(self.index):
            _make_context_current(self.index)
            loaded = self._code(Program(kernel.source, kernel.defines)).get_kernel(kernel.name)
            handle = int(loaded.handle)
            if shared_bytes > _STATIC_SHARED_LIMIT:
                attribute = driver.CUfunction_attribute
                (error,) = driver.cuKernelSetAttribute(
                    attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                    shared_bytes, driver.CUkernel(handle), driver.CUdevice(self.index),
                )  # fmt: skip
                _raise(error, f"{kernel.name} needs {shared_bytes} bytes of shared memory")
        return driver.CUfunction(handle)  # the driver takes the one for the other

    def _code(self, program):
        """The loaded ObjectCode; kept for ever, as the handles of its kernels point into it."""
        import cuda.core

        if program not in self._loaded:
            compiled = cuda_compile.load_or_compile(program, self.arch, self._announce)
            self._loaded[program] = cuda.core.ObjectCode.from_cubin(
                compiled.cubin, name=program.source
            )
        return self._loaded[program]

    def _announce(self):
        _say_once(
            f"compiling CUDA kernels for {self.name} (sm_{self.arch}), once; they are kept in "
            f"{cuda_compile.cache_directory()}"
        )


_thread = threading.local()


def _make_context_current(index):
    """A thread that autograd made may come here before torch has given it a context."""
    from cuda.bindings import driver

    if getattr(_thread, "has_context", False):
        return
    error, context = driver.cuCtxGetCurrent()
    _raise(error, "cuCtxGetCurrent")
    if int(context) == 0:
        error, context = driver.cuDevicePrimaryCtxRetain(driver.CUdevice(index))
        _raise(error, "cuDevicePrimaryCtxRetain")
        _raise(driver.cuCtxSetCurrent(context)[0], "cuCtxSetCurrent")
    _thread.has_context = True


@functools.cache
def _say_once(line):
    if _log.hasHandlers() and _log.isEnabledFor(logging.INFO):
        _log.info(line)
    else:  # outside a run nobody listens to the log
        print(line, file=sys.stderr, flush=True)


def _raise(error, what):
    if int(error):
        raise RuntimeError(f"{what}: the CUDA driver says {error.name}")


# ---------------------------------------- launching plans


@functools.cache
def _slots(struct):
    """{field: index} of a parameter struct seen as 8-byte integers; Rows take three."""
    slots, position = {}, 0
    for name, kind in struct._fields_:
        slots[name] = position
        position += ctypes.sizeof(kind) // 8
    assert 8 * position == ctypes.sizeof(struct), "only 8-byte fields"
    return slots, ctypes.c_int64 * position


class Prepared(NamedTuple):
    """A plan on a device, with everything that does not change from call to call worked out."""

    launches: tuple  # of (function, grid x, y, z, block x, y, z, shared bytes, name)
    sums: tuple  # of (a launch as above, offset of the parts, count, size, shape, dtype)
    values: tuple  # the struct's 8-byte values, with the plan's integers
    scratch: tuple  # of (slot, offset)
    scratch_bytes: int
    slots: dict
    array: type
    index: int


def prepare(plan, struct, index):
    """Compile and load what a plan launches; the result serves any number of `run`s."""
    gpu = Gpu.of(index)
    slots, array = _slots(struct)
    values = [0] * array._length_
    for name, value in plan.integers.items():
        values[slots[name]] = value
    offsets, offset = {}, 0
    for scratch in plan.scratch:
        offsets[scratch.name] = offset
        size = math.prod(scratch.shape) * getattr(torch, scratch.dtype).itemsize
        offset += -(-size // _ALIGNMENT) * _ALIGNMENT

    def loaded(launch):
        function = gpu.function(launch.kernel, launch.shared_bytes)
        return function, *launch.grid, *launch.block, launch.shared_bytes, launch.kernel.name

    count = {scratch.name: scratch.shape[0] for scratch in plan.scratch}
    sums = tuple(
        (loaded(s.launch), offsets[s.parts], count[s.parts], math.prod(s.shape), s.shape,
         getattr(torch, s.dtype))
        for s in plan.sums
    )  # fmt: skip
    return Prepared(
        tuple(loaded(launch) for launch in plan.launches), sums, tuple(values),
        tuple((slots[name], offset) for name, offset in offsets.items()), offset,
        slots, array, index,
    )  # fmt: skip


def run(prepared, device, rows, scalars):
    """Launch a prepared plan on torch's current stream of the device; returns the plan's sums.

    rows: field -> tensor (B, L, X), X contiguous, or None. scalars: field -> integer, address, or
    tensor whose address is meant, or None.
    """
    values, slots = list(prepared.values), prepared.slots
    for name, x in rows.items():
        if x is not None:
            slot = slots[name]
            values[slot : slot + 3] = x.data_ptr(), x.stride(0), x.stride(1)
    for name, x in scalars.items():
        if x is not None:
            values[slots[name]] = x.data_ptr() if isinstance(x, torch.Tensor) else x
    if prepared.index == torch.cuda.current_device():
        return _run(prepared, device, values)
    with torch.cuda.device(prepared.index):
        return _run(prepared, device, values)


def _run(prepared, device, values):
    _make_context_current(prepared.index)
    stream = torch.cuda.current_stream(prepared.index).cuda_stream
    base = 0
    if prepared.scratch_bytes:
        scratch = torch.empty(prepared.scratch_bytes, dtype=torch.uint8, device=device)
        base = scratch.data_ptr()
        for slot, offset in prepared.scratch:
            values[slot] = base + offset
    params = prepared.array(*values)
    for launch in prepared.launches:
        _launch(launch, stream, params)
    results = []
    for launch, offset, count, size, shape, dtype in prepared.sums:
        out = torch.empty(shape, dtype=dtype, device=device)
        _launch(launch, stream, _SUM_ARRAY(base + offset, out.data_ptr(), count, size))
        results.append(out)
    return results


_SUM_ARRAY = _slots(launch_plan.SumParams)[1]


def _launch(launch, stream, params):
    """One kernel with one struct by value; the driver copies it before it returns."""
    from cuda.bindings import driver

    *config, name = launch
    pointer = ctypes.c_void_p(ctypes.addressof(params))
    (error,) = driver.cuLaunchKernel(*config, stream, ctypes.addressof(pointer), 0)
    _raise(error, f"launching {name}")
