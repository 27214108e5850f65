"""Which implementation of an operator runs: the fastest able one, the one asked for, or an error.
"""

import functools
import importlib
import logging
import os
from collections.abc import Callable
from typing import NamedTuple

import torch

from utils import UserError


class Backend(NamedTuple):
    """One implementation of an operator.

    An operator's table, name -> Backend, is in order of preference. 'reference' always can run, so
    a backend after it runs only when asked for.
    """

    device_type: str | None  # the tensors it takes: 'cpu', 'cuda' or, None, any
    # (torch.device, torch.dtype, states or taps or None) -> None, or why not and what mends it
    can_run: Callable
    run: Callable  # the operator without its `backend` argument
    describe: Callable  # torch.device -> what it runs on, for people


def constant_when_compiled(function):
    """torch.compiler.assume_constant_result, without the two seconds that it takes to import
    torch._dynamo: torch.compile calls the function once, while it traces.
    """
    function._dynamo_marked_constant = True
    return function


def choose(operator, table, requested, device, dtype, size=None):
    """Name of the backend for tensors of this device and dtype, and where the choice came from.

    requested: a name, or None for the environment variable DIM_BACKEND and, without it, the first
    in the table that can run. size: the operator's states or taps, which not every backend takes in
    any number. Raises utils.UserError if a requested backend is unknown or cannot run: never a
    silent fallback. An automatic choice of the reference is warned of, once.
    """
    source = "asked for by the caller" if requested else "asked for by DIM_BACKEND"
    requested = requested or os.environ.get("DIM_BACKEND")
    if not requested:
        name, reasons = _first_able(table, device, dtype, size)
        if name == "reference" and reasons and dtype != torch.float64:
            _warn_once(f"{operator} runs as plain PyTorch, slowly, on {device.type}: {reasons}")
        return name, "chosen automatically"
    if requested not in table:
        raise UserError(
            f"{operator}: there is no backend {requested!r} ({source}); "
            f"choose one of {', '.join(table)}"
        )
    reason = _reason(table[requested], device, dtype, size)
    if reason:
        raise UserError(f"{operator}: backend {requested!r} ({source}) cannot run: {reason}")
    return requested, source


def describe(operator, table, device, dtype=torch.float32):
    """One line: the backend that would run here, why, and why those before it would not."""
    name, source = choose(operator, table, None, device, dtype)
    line = f"{operator}: {name} ({table[name].describe(device)}), {source}"
    reasons = _first_able(table, device, dtype, None)[1]
    return f"{line}; {reasons}" if reasons and source == "chosen automatically" else line


def _reason(backend, device, dtype, size):
    """Why the backend cannot run, or None."""
    kind = backend.device_type
    if kind not in (None, device.type):
        return f"it takes {kind.upper()} tensors, not {device.type}; move them or use another"
    return backend.can_run(device, dtype, size)


def _first_able(table, device, dtype, size):
    """The first backend that can run, and why those before it, made for this device, cannot."""
    reasons = []
    for name, backend in table.items():
        reason = _reason(backend, device, dtype, size)
        if reason is None:
            return name, "; ".join(reasons)
        if backend.device_type == device.type:
            reasons.append(f"{name}: {reason}")
    raise AssertionError("the reference always can run")


@functools.cache
def _warn_once(message):
    logging.getLogger("dim").warning(message)


# ---------------------------------------- the backends


@functools.cache
def _numba_error():
    """Why numba does not import, or None. Imported rather than looked up: a numba that does not fit
    the installed numpy is there, and fails."""
    try:
        importlib.import_module("numba")
    except Exception as error:  # for a numpy it does not know, numba raises more than ImportError
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def _unfit(dtype, size=None, sizes=None):
    """Why kernels that compute in float32, for (smallest, largest, what is counted), do not fit."""
    if dtype == torch.float64:
        return "it computes in float32; use backend='reference' for float64"
    if size is not None and not sizes[0] <= size <= sizes[1]:
        return (
            f"it takes {sizes[0]} to {sizes[1]} {sizes[2]}, not {size}; use backend='reference'"
        )
    return None


def _cpu_can_run(device, dtype, size):
    if _numba_error() and dtype != torch.float64:
        return f"numba cannot be imported ({_numba_error()}); run: pip install -U numba"
    return _unfit(dtype)


def _describe_cpu(device):
    import numba

    return f"numba {numba.__version__}, {torch.get_num_threads()} threads"


def _late(module, function):
    """The function of a module that is imported at the first call, with all that it needs."""

    def run(*args, **kwargs):
        return getattr(importlib.import_module(module), function)(*args, **kwargs)

    return run


def cpu_backend(module, function):
    """The numba backend."""
    return Backend("cpu", _cpu_can_run, _late(module, function), _describe_cpu)


def _describe_cuda(device):
    return importlib.import_module("libs.ops.cuda.launch").describe(device)


def cuda_backend(run, sizes):
    """Our kernels, compiled at first use. sizes: (smallest, largest, what is counted)."""

    def can_run(device, dtype, size):
        unavailable = importlib.import_module("libs.ops.cuda.launch").unavailable
        return _unfit(dtype, size, sizes) or unavailable(device)

    return Backend("cuda", can_run, run, _describe_cuda)


def reference_backend(run):
    return Backend(
        None, lambda device, dtype, size: None, run, lambda device: f"PyTorch {torch.__version__}"
    )


def peer_backend(package, function, sizes):
    """Another project's kernels where they are installed, for comparison; `sizes` as above."""

    def can_run(device, dtype, size):
        try:
            importlib.import_module(package)
        except Exception as error:  # one built for another torch raises more than ImportError
            return (
                f"{package} cannot be imported ({type(error).__name__}); it has to be compiled: "
                f"pip install {package.replace('_', '-')} --no-build-isolation"
            )
        return _unfit(dtype, size, sizes)

    def version(device):
        return f"{package} {getattr(importlib.import_module(package), '__version__', '?')}"

    return Backend("cuda", can_run, _late("libs.ops.peers", function), version)
