"""Which implementation of an operator runs: the fastest able one, the one asked for, or an error.
"""

import functools
import importlib
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

    can_run: Callable  # (torch.device, torch.dtype) -> None, or why not and what mends it
    run: Callable  # the operator without its `backend` argument
    describe: Callable  # () -> what it runs on, for people


def choose(operator, table, requested, device, dtype):
    """Name of the backend for tensors of this device and dtype, and where the choice came from.

    requested: a name, or None for the environment variable DIM_BACKEND and, without it, the first
    in the table that can run. Raises utils.UserError if a requested backend is unknown or cannot
    run: never a silent fallback.
    """
    source = "asked for by the caller" if requested else "asked for by DIM_BACKEND"
    requested = requested or os.environ.get("DIM_BACKEND")
    if not requested:
        able = (name for name, backend in table.items() if backend.can_run(device, dtype) is None)
        return next(able), "chosen automatically"
    if requested not in table:
        raise UserError(
            f"{operator}: there is no backend {requested!r} ({source}); "
            f"choose one of {', '.join(table)}"
        )
    reason = table[requested].can_run(device, dtype)
    if reason:
        raise UserError(f"{operator}: backend {requested!r} ({source}) cannot run: {reason}")
    return requested, source


def describe(operator, table, device, dtype=torch.float32):
    """One line: the backend that would run here, why, and why those before it would not."""
    name, source = choose(operator, table, None, device, dtype)
    line = f"{operator}: {name} ({table[name].describe()}), {source}"
    if source == "chosen automatically":
        for other in list(table)[: list(table).index(name)]:
            line += f"; {other}: {table[other].can_run(device, dtype)}"
    return line


@functools.cache
def _numba_error():
    """Why numba does not import, or None. Imported rather than looked up: a numba that does not fit
    the installed numpy is there, and fails."""
    try:
        importlib.import_module("numba")
    except Exception as error:  # for a numpy it does not know, numba raises more than ImportError
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def _cpu_can_run(device, dtype):
    if device.type != "cpu":
        return f"it takes CPU tensors, not {device.type}; move them or use another backend"
    if dtype == torch.float64:
        return "it computes in float32; use backend='reference' for float64"
    if _numba_error():
        return f"numba cannot be imported ({_numba_error()}); run: pip install -U numba"
    return None


def _describe_cpu():
    import numba

    return f"numba {numba.__version__}, {torch.get_num_threads()} threads"


def cpu_backend(module, function):
    """The numba backend; its module, and with it numba, is imported at the first call."""

    def run(*args, **kwargs):
        return getattr(importlib.import_module(module), function)(*args, **kwargs)

    return Backend(_cpu_can_run, run, _describe_cpu)


def reference_backend(run):
    return Backend(lambda device, dtype: None, run, lambda: f"PyTorch {torch.__version__}")
