"""Runs the plans of launch_plan.py: loads the kernels onto the GPU and launches them on torch's
current stream.

A kernel is compiled (compiler.py) and loaded at its first use on a device; after that a launch is
one call of the driver, without synchronisation, so that CUDA graphs can capture it.
"""

import ctypes
import functools
import importlib
import math
import threading
from collections import namedtuple

import torch

from libs.ops.cuda import compiler, launch_plan
from utils import UserError

_ALIGNMENT = 256  # of scratch tensors inside their one allocation; what torch.empty guarantees
_STATIC_SHARED_LIMIT = 48 * 1024  # above it a kernel must be told


class Gpu:
    """One device: its properties, the kernels loaded on it, and the dtypes whose kernels are known
    to compute right numbers."""

    def __init__(self, index):
        properties = torch.cuda.get_device_properties(index)
        self.index = index
        self.device = torch.device("cuda", index)
        self.name = properties.name
        self.arch = 10 * properties.major + properties.minor
        self.multiprocessors = properties.multi_processor_count
        self.prepared = {}  # arguments of `prepared` -> Prepared
        self.checked = set()  # dtypes
        self._loaded = {}  # kernel -> (its code, the driver's handle)
        self._lock = threading.RLock()

    @staticmethod
    @functools.cache
    def of(index):
        return Gpu(torch.cuda.current_device() if index is None else index)

    def __str__(self):
        return f"{self.name}, sm_{self.arch}, NVRTC {compiler.nvrtc_version()}"

    def function(self, kernel, shared_bytes=0):
        """The driver's handle of a kernel, compiled and loaded if this is its first use."""
        with self._lock:
            if kernel not in self._loaded:
                self._loaded[kernel] = self._load(kernel, shared_bytes)
            return self._loaded[kernel][1]

    def _load(self, kernel, shared_bytes):
        import cuda.core

        refuse_capture()
        cuda_driver = driver()
        with torch.cuda.device(self.index):
            _make_context_current(self.index)
            cubin = compiler.load_or_compile(kernel, self.arch)
            code = cuda.core.ObjectCode.from_cubin(cubin, name=kernel.source)
            handle = int(code.get_kernel(kernel.name).handle)
            if shared_bytes > _STATIC_SHARED_LIMIT:
                (error,) = cuda_driver.cuKernelSetAttribute(
                    cuda_driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                    shared_bytes, cuda_driver.CUkernel(handle), cuda_driver.CUdevice(self.index),
                )  # fmt: skip
                _raise(error, f"{shared_bytes} bytes of shared memory for {kernel.name}")
        return code, cuda_driver.CUfunction(handle)  # the driver takes the one for the other


@functools.cache
def unavailable(index):
    """None, or why no kernel of ours can run on this CUDA device."""
    if not torch.cuda.is_available():
        return "no CUDA device is found"
    gpu = Gpu.of(index)
    if gpu.arch < 75:
        return f"{gpu.name} is sm_{gpu.arch}; the kernels are for sm_75 (Turing) and newer"
    return compiler.missing()


def refuse_capture():
    """UserError where a CUDA graph is being captured, which loading a kernel would spoil."""
    if torch.cuda.is_current_stream_capturing():
        raise UserError(
            "CUDA kernels were not used before this graph capture; run the model once on inputs of "
            "the same shapes and dtypes, then capture"
        )


_thread = threading.local()


def _make_context_current(index):
    """A thread that autograd made may come here before torch has given it a context. index: of
    torch's current device."""
    if not getattr(_thread, "has_context", False):
        import cuda.core

        cuda.core.Device(index).set_current()
        _thread.has_context = True


def _raise(error, what):
    if int(error):
        raise RuntimeError(f"{what}: the CUDA driver says {error.name}")


# A plan on a device, with what does not change from call to call worked out. launches: of
# (function, grid x, y, z, block x, y, z, shared bytes, name); sum_launch: None or the same; sums:
# of (offset of the parts, count, size, is it float32, name of the result); values: the struct's,
# with the plan's integers; scratch: of (slot, offset); array: ctypes' type of the struct.
Prepared = namedtuple(
    "Prepared", "launches sums sum_launch values scratch scratch_bytes slots array index"
)


def prepared(index, plan_of, slots, shape, dtype, check=True):
    """A plan for a device, ready to `run`; compiled and loaded at the first call, and the kernels
    of the dtype checked at the first one of all.

    plan_of: of launch_plan.py or its kin; slots: of its parameter struct; shape: its arguments up
    to the dtype. check: False for a kernel that follows others of the network's dtype, whose check
    covers it."""
    gpu = Gpu.of(index)
    key = (plan_of, shape, dtype)
    if key not in gpu.prepared:
        if check and dtype not in gpu.checked:
            importlib.import_module("libs.ops.cuda.self_check").require_checked(gpu, dtype)
        plan = plan_of(*shape, spell_dtype(dtype), gpu.multiprocessors)
        gpu.prepared[key] = prepare(plan, slots, index)
    return gpu.prepared[key]


def prepare(plan, slots, index):
    """Compile and load what a plan launches; the result serves any number of `run`s."""
    gpu = Gpu.of(index)

    def load(launch):
        function = gpu.function(launch.kernel, launch.shared_bytes)
        return function, *launch.grid, *launch.block, launch.shared_bytes, launch.kernel.name

    launches = [load(launch) for launch in plan.launches]
    sum_launch = load(plan.sum_launch()) if plan.sums else None
    values, scratch, sums, end = [0] * slots[None], [], [], 0
    for name, value in plan.integers.items():
        values[slots[name]] = value
    for name, (count, *shape) in plan.scratch.items():
        size = math.prod(shape)
        scratch.append((slots[name], end))
        if name in plan.sums:
            result, dtype = plan.sums[name]
            sums.append((end, count, size, dtype == "float32", result))
        end += -(-4 * count * size // _ALIGNMENT) * _ALIGNMENT
    array = ctypes.c_int64 * len(values)
    return Prepared(launches, sums, sum_launch, values, scratch, end, slots, array, index)


def run(prepared, device, rows, scalars, outputs=None):
    """Launch a prepared plan on torch's current stream of the device.

    rows: field -> tensor (B, L, X), X contiguous, or None. scalars: field -> integer, or tensor
    whose address is meant, or None. outputs: name -> tensor, for the plan's sums."""
    values, slots = list(prepared.values), prepared.slots
    for name, x in rows.items():
        if x is not None:
            slot = slots[name]
            values[slot : slot + 3] = x.data_ptr(), x.stride(0), x.stride(1)
    for name, x in scalars.items():
        if x is not None:
            values[slots[name]] = x.data_ptr() if isinstance(x, torch.Tensor) else x
    if prepared.index == torch.cuda.current_device():
        return _run(prepared, device, values, outputs)
    with torch.cuda.device(prepared.index):
        return _run(prepared, device, values, outputs)


def _run(prepared, device, values, outputs):
    _make_context_current(prepared.index)
    stream = torch.cuda.current_stream(prepared.index).cuda_stream
    # Freed on return, as torch's own operators do: later work on this stream comes after ours.
    scratch = torch.empty(prepared.scratch_bytes, dtype=torch.uint8, device=device)
    base = scratch.data_ptr()
    for slot, offset in prepared.scratch:
        values[slot] = base + offset
    params = prepared.array(*values)
    for launch in prepared.launches:
        _launch(launch, stream, params)
    if prepared.sums:
        tasks = []
        for offset, count, size, is_float, name in prepared.sums:
            tasks += base + offset, outputs[name].data_ptr(), count, size, is_float
        _launch(prepared.sum_launch, stream, _SUM_ARRAY(*tasks))


_SUM_ARRAY = ctypes.c_int64 * (launch_plan.MAX_SUMS * len(launch_plan.SUM_FIELDS))


def _launch(launch, stream, params):
    """One kernel with one struct by value; the driver copies it before it returns."""
    *config, name = launch
    pointer = ctypes.c_void_p(ctypes.addressof(params))
    (error,) = driver().cuLaunchKernel(*config, stream, ctypes.addressof(pointer), 0)
    _raise(error, f"launching {name}")


@functools.cache
def driver():
    from cuda.bindings import driver

    return driver


def as_rows(x):
    """x (B, L, X) with X contiguous: itself, or a copy; None for None."""
    if x is None:
        return None
    # A kernel holds row strides in bytes in 31 bits; those of a (B, L, X) view can be longer.
    fits = x.stride(-1) == 1 and x.stride(1) * x.element_size() < 2**31
    return x if fits else x.contiguous()


def as_vectors(x):
    """x, or a copy, contiguous and at an address that is a multiple of 16 bytes."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def as_parameter(x):
    if x is None or (x.dtype == torch.float32 and x.is_contiguous()):
        return x
    return x.to(torch.float32).contiguous()


def as_order(order):
    return None if order is None else order.to(torch.int64).contiguous()


def one_dtype(*tensors):
    """The tensors in the dtype they share, in float32 if they share none; None stays None."""
    dtypes = {x.dtype for x in tensors if x is not None}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return [x if x is None or x.dtype == dtype else x.to(dtype) for x in tensors]


def spell_dtype(dtype):
    return str(dtype).removeprefix("torch.")


_library = torch.library.Library("dim", "FRAGMENT")


def like(*tensors):
    return tuple(x.new_empty(x.shape) for x in tensors)


def _define(name, inputs, results, run, fake):
    _library.define(f"{name}({inputs}) -> ({', '.join(['Tensor'] * results)})")
    _library.impl(name, run, "CUDA")
    torch.library.register_fake(f"dim::{name}", fake, lib=_library)


def operator(
    name, schema, results, run, fake, backward, fake_backward, collect=None, saved=0, keep=None
):
    """Registers dim::<name> and its derivative dim::<name>_bwd, for torch.compile and autograd.

    schema: of the inputs, tensors first. run(*inputs) and backward(*g, *saved, *inputs) return so
    many tensors as `results` says, fake and fake_backward the same without numbers. collect(g,
    found): gradients of the first inputs, from those of the results and `backward`'s. saved: how
    many of the last results only the backward wants. keep(results, inputs): what the backward gets
    instead of (*saved, *inputs)."""
    count, (forwards, backwards) = schema.count("Tensor"), results

    def save(ctx, inputs, output):
        extra = output[forwards - saved :] if saved else ()
        ctx.mark_non_differentiable(*extra)
        ctx.set_materialize_grads(not saved)
        kept = keep(output, inputs) if keep else (*extra, *inputs)
        ctx.save_for_backward(*kept[: saved + count])
        ctx.rest = inputs[count:]

    def gradients(ctx, *g):
        if torch.is_grad_enabled():  # else the result would silently carry no gradient
            raise RuntimeError(
                f"{name}: backend 'cuda' has no second derivative; use backend='reference'"
            )
        tensors = ctx.saved_tensors  # once: activation checkpointing allows no second look
        g = g[: forwards - saved]
        found = getattr(torch.ops.dim, f"{name}_bwd")(*g, *tensors, *ctx.rest)
        found = collect(g, found) if collect else found
        wanted = [None if x is None else v for x, v in zip(tensors[saved:], found, strict=False)]
        return *wanted, *[None] * (count + len(ctx.rest) - len(wanted))

    _define(name, schema, forwards, run, fake)
    # Gradients, all but the first of which may be missing, and saved results.
    before = ", ".join(f"Tensor{'?' * (i > 0)} g_{i}" for i in range(forwards))
    _define(f"{name}_bwd", f"{before}, {schema}", backwards, backward, fake_backward)
    torch.library.register_autograd(f"dim::{name}", gradients, setup_context=save, lib=_library)
