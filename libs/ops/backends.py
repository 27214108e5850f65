"""Which implementation of an operator runs: the fastest able one, the one asked for, or an error.
"""

import functools
import importlib
import os
import pkgutil
from typing import NamedTuple

import torch

from libs.ops.cuda import compiler, launch
from utils import UserError


class Operator(NamedTuple):
    # name -> the operator without its `backend` argument, or, if it is to be imported late, as
    # numba is, where it is; in order of preference
    backends: dict
    sizes: range  # states, taps or channels that the CUDA kernels take
    counted: str  # which of these


OPERATORS = {}  # name -> Operator


def constant_when_compiled(function):
    """torch.compiler.assume_constant_result, without the two seconds that it takes to import
    torch._dynamo: torch.compile calls the function once, while it traces.
    """
    function._dynamo_marked_constant = True
    return function


def run(operator, requested, x, size, *args):
    """The operator on its arguments, by the backend for tensors like x. size: of its states, taps
    or channels."""
    name = choose(operator, requested, x.device, x.dtype, int(size))
    function = OPERATORS[operator].backends[name]
    function = pkgutil.resolve_name(function) if isinstance(function, str) else function
    return function(*args)


@constant_when_compiled
def choose(operator, requested, device, dtype, size=None):
    """Name of the backend for tensors of this device and dtype.

    requested: a name, or None for the environment variable DIM_BACKEND and, without it, the first
    that can run. Raises utils.UserError if a requested backend is unknown or cannot run: never a
    silent fallback. An automatic choice of plain PyTorch is warned of, once.
    """
    names, asked = OPERATORS[operator].backends, requested or os.environ.get("DIM_BACKEND")
    if not asked:
        name, reason = _first_able(operator, device, dtype, size)
        if reason and dtype != torch.float64:
            said = f"{operator} runs as plain PyTorch, slowly, on {device.type}: {reason}"
            compiler.say_once(said)
        return name
    source = "asked for by the caller" if requested else "asked for by DIM_BACKEND"
    if asked not in names:
        reason = f"there is none of this name; choose one of {', '.join(names)}"
    else:
        reason = why_not(operator, asked, device, dtype, size)
    if reason:
        raise UserError(f"{operator}: backend {asked!r} ({source}) cannot run: {reason}")
    return asked


def describe(operator, device):
    """One line: the backend that would run here for float32, and why not another."""
    name = choose(operator, None, device, torch.float32)
    source = f"DIM_BACKEND={asked}" if (asked := os.environ.get("DIM_BACKEND")) else "automatically"
    reason = _first_able(operator, device, torch.float32, None)[1] or f"chosen {source}"
    version = f" ({launch.Gpu.of(device.index)})" if name == "cuda" else ""
    return f"{operator}: {name}{version}, {reason}"


def why_not(operator, name, device, dtype, size):
    """None, or why this backend cannot run for such tensors."""
    if name == "reference":
        return None
    if device.type != name:
        return f"it takes {name.upper()} tensors, not {device.type}"
    if dtype == torch.float64:
        return "it computes in float32; use backend='reference' for float64"
    if name == "cpu":
        return _numba_error()
    _, sizes, counted = OPERATORS[operator]
    if size is not None and size not in sizes:
        return f"it is not for {size} {counted}; use backend='reference'"
    return launch.unavailable(device.index)


def _first_able(operator, device, dtype, size):
    """The first backend that can run; and if it is the reference, why the one for this device
    cannot."""
    names = OPERATORS[operator].backends
    reasons = {name: why_not(operator, name, device, dtype, size) for name in names}
    name = next(name for name, reason in reasons.items() if reason is None)
    return name, reasons.get(device.type) if name == "reference" else None


@functools.cache
def _numba_error():
    """Why numba does not import, or None; for a numpy that it does not know, numba raises more than
    ImportError."""
    try:
        importlib.import_module("numba")
    except Exception as error:
        return f"numba cannot be imported ({error}); run: pip install -U numba".replace("\n", " ")
    return None
