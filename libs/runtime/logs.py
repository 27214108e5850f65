"""What a run says about itself: environment, log, metrics."""

import functools
import importlib.metadata
import json
import logging
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
from tqdm import tqdm

from utils import replacing

_CHECKOUT = Path(__file__).resolve().parents[2]
_PACKAGES = ("torchvision", "numpy", "accelerate", "safetensors", "numba", "diffusers")

# wandb's settings for the numbers and nothing else: left to itself it sends the command line,
# paths, the host's name, packages, the state of git and whatever is printed.
WANDB_SETTINGS = dict(
    console="off", disable_git=True, save_code=False, disable_code=True,
    disable_job_creation=True, x_disable_meta=True, x_disable_machine_info=True,
    x_disable_stats=True, x_save_requirements=False, program="", program_relpath="", host="",
)  # fmt: skip

log = logging.getLogger("dim")


def _read_commit() -> str:
    """Of the checkout, with '-dirty' if a tracked file differs; 'unknown' outside git."""
    if shutil.which("git") is None:
        return "unknown"
    words = "git describe --always --exclude=* --abbrev=40 --dirty".split()
    found = subprocess.run(words, cwd=_CHECKOUT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def _name_cpu() -> str:
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", info.read_text()) if info.is_file() else []
    return models[0] if models else platform.processor() or platform.machine()


def environment() -> dict:
    """What results are published with: no path, command line or host."""
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "commit": _read_commit(), "packages": {"torch": torch.__version__, **versions},
        "python": platform.python_version(), "platform": platform.platform(),
        "devices": devices or [_name_cpu()], "torch_threads": torch.get_num_threads(),
    }  # fmt: skip


if not (sys.stderr and sys.stderr.isatty()):  # in a file, a bar is a line every half minute
    _LINE = "{l_bar}{n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]\n"
    _RARE = dict(mininterval=30, miniters=1, bar_format=_LINE)
    tqdm.__init__ = functools.partialmethod(tqdm.__init__, **_RARE)


class Output:
    """A standard stream that escapes what its encoding lacks, and whose reader may leave."""

    def __init__(self, stream):
        self._stream = stream or open(os.devnull, "w")  # None where it is closed, as by >&-
        self._stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text):
        self._try(self._stream.write, text)

    def flush(self):
        self._try(self._stream.flush)

    def _try(self, function, *arguments):
        try:
            function(*arguments)
        except BrokenPipeError:  # as of `| head`: what is buffered and what comes go nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


class _ConsoleHandler(logging.Handler):
    """Writes above a progress bar on a terminal instead of through it."""

    def emit(self, record):
        write = tqdm.write if sys.stderr.isatty() else print
        write(self.format(record), file=sys.stderr)


def get_logger(directory, rank: int) -> logging.Logger:
    """Logger to the console and, appending, to directory/output.log, of Python's warnings, too.
    Rank 0 logs from INFO up, other ranks warnings alone, marked.
    """
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    mark = f"rank {rank} " if rank else ""
    formatter = logging.Formatter(f"%(asctime)s {mark}%(levelname)s %(message)s")
    path = Path(directory) / "output.log"
    file = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    for handler in file, _ConsoleHandler():
        handler.setFormatter(formatter)
        log.addHandler(handler)
    log.setLevel(logging.WARNING if rank else logging.INFO)
    log.propagate = False
    warnings.showwarning = lambda message, *place, **where: log.warning("%s", message)
    return log


def _to_json(value):
    """A number; NaN and infinities, which JSON lacks, as 'NaN', 'Infinity', '-Infinity'."""
    value = value.item() if hasattr(value, "item") else value
    return json.dumps(value) if isinstance(value, float) and not math.isfinite(value) else value


def _is_before(line: str, step: int, batch: float) -> bool:
    """Whether a line of metrics.jsonl is of this step and batch or earlier ones, and whole."""
    try:
        values = json.loads(line)
        return values["step"] <= step and values.get("batch", 0) <= batch
    except (ValueError, TypeError, KeyError):
        return False


def _start_board(directory, first_step):
    from torch.utils.tensorboard import SummaryWriter

    board = SummaryWriter(str(directory / "tensorboard"), purge_step=first_step)
    return (
        lambda step, numbers: [board.add_scalar(name, v, step) for name, v in numbers.items()],
        board.close,
    )


def _start_wandb(directory, first_step):
    import wandb

    mode = os.environ.get("WANDB_MODE", "offline")
    run = wandb.init(project="DiM", dir=str(directory), settings=dict(WANDB_SETTINGS), mode=mode)
    # It drops steps before its last one, such as those of figures that were computed meanwhile.
    last = functools.partial(getattr, run, "step", 0)
    return lambda step, numbers: run.log(numbers, step=max(step, last())), run.finish


class MetricsLog:
    """directory/metrics.jsonl, an object a line: {"step": 10, "loss": 0.5, ...}; on rank 0 only.

    A line reaches the operating system before `write` returns. TensorBoard and wandb (offline
    unless WANDB_MODE says otherwise) get the same numbers if asked for.
    """

    def __init__(self, directory, tensorboard: bool = False, wandb: bool = False):
        self._path, self._file = Path(directory) / "metrics.jsonl", None
        self._starts = [_start_board] * tensorboard + [_start_wandb] * wandb
        self._trackers = []  # (function of step and numbers, function that finishes)

    def _track(self, calls):
        """Make calls [(function, *arguments)]; the first failure switches the trackers off."""
        try:
            return [function(*arguments) for function, *arguments in calls]
        except Exception as error:  # of any kind: the run goes on
            log.warning("TensorBoard or wandb failed and is switched off: %s", error)
            self._trackers = []
            return []

    def truncate_after(self, step: int, batch: float = math.inf) -> None:
        """At each start: drop lines of later steps or batches, and one that a kill cut short."""
        self.close()
        if self._path.exists() and not step:  # of a run whose checkpoints are gone
            end = time.strftime("%Y%m%d-%H%M%S", time.localtime(self._path.stat().st_mtime))
            self._path.rename(self._path.with_name(f"metrics.until-{end}.jsonl"))
        if self._path.exists():
            lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines()
            before = [line + "\n" for line in lines if _is_before(line, step, batch)]
            with replacing(self._path) as temporary:
                temporary.write_text("".join(before), encoding="utf-8")
        calls = [(start, self._path.parent, step + 1) for start in self._starts]
        self._trackers = self._track(calls)

    def write(self, step: int, metrics: dict) -> None:
        """Log numbers (Python, numpy or 0-dim tensors) and strings under `step`."""
        values = {name: _to_json(value) for name, value in metrics.items()}
        if self._file is None:
            self._file = self._path.open("a", buffering=1, encoding="utf-8")
        self._file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        numbers = {name: float(v) for name, v in metrics.items() if not isinstance(v, str)}
        self._track([(write, step, numbers) for write, _ in self._trackers])

    def close(self) -> None:
        if self._file:
            self._file.close()
        self._track([(finish,) for _, finish in self._trackers])
        self._file, self._trackers = None, []
