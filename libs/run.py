"""What a run says about itself (environment, log, metrics) and how it is asked to stop.

Layer 0: imports nothing of ours. torch, TensorBoard and wandb are imported where they are used.
"""

import contextlib
import importlib.metadata
import json
import logging
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parent.parent
_PACKAGES = ("torchvision", "numpy", "accelerate", "ml_collections", "safetensors",
             "numba", "diffusers", "timm", "cuda-core", "mamba-ssm", "causal-conv1d")


# ---------------------------------------------------------------------------------------------
# Environment

def _commit() -> str:
    """Commit of the checkout, with '-dirty' if a tracked file differs; 'unknown' outside git."""
    def git(*arguments):
        return subprocess.run(["git", "-C", str(_CHECKOUT), *arguments], capture_output=True,
                              text=True, check=True).stdout.strip()
    try:
        # An unpacked archive inside somebody else's repository is not at that one's commit.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != _CHECKOUT:
            return "unknown"
        dirty = "-dirty" if git("status", "--porcelain", "--untracked-files=no") else ""
        return git("rev-parse", "HEAD") + dirty
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _package_versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


# Keys of Hugging Face, GitHub, OpenAI, Slack, Amazon, GitLab, wandb (40 hexadecimal digits), and
# whatever follows a word such as token or is the password in an address.
_SECRETS = re.compile(
    r"\b(?:hf_|gh[a-z]_|github_pat_|sk-|xox[a-z]-|AKIA|glpat-)[\w-]{8,}|\b[0-9a-fA-F]{40}\b"
    r"|(?<=://)[^/\s@]+(?=@)|(?i:(?<=token=)|(?<=secret=)|(?<=password=)|(?<=key=))\S+")


def scrubbed(text: str) -> str:
    """`text` with ~ for the home directory and *** for what looks like a key or a password."""
    home = os.path.expanduser("~").rstrip("/")
    text = re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text) if home else text
    return _SECRETS.sub("***", text)


# wandb's settings for the numbers and nothing else: left to itself it sends the command line,
# paths, the host's name, packages, the state of git and whatever is printed.
WANDB_SETTINGS = dict(
    console="off", disable_git=True, save_code=False, disable_code=True,
    disable_job_creation=True, x_disable_meta=True, x_disable_machine_info=True,
    x_disable_stats=True, x_save_requirements=False, program="", program_relpath="", host="",
)  # fmt: skip


def environment() -> dict:
    """Commit, package versions, Python, platform, devices, torch's threads, the command line; no
    home directory and no secrets, since results are published.
    """
    import torch
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    packages = {**_package_versions(), "torch": torch.__version__}  # with its CUDA version
    return {"commit": _commit(), "packages": packages,
            "python": platform.python_version(), "platform": platform.platform(),
            "devices": devices or [_cpu_model()], "torch_threads": torch.get_num_threads(),
            "argv": [scrubbed(word) for word in sys.argv]}


# ---------------------------------------------------------------------------------------------
# Log

class _ConsoleHandler(logging.Handler):
    """Writes above a tqdm progress bar instead of through it."""

    def emit(self, record):
        from tqdm import tqdm
        tqdm.write(self.format(record), file=sys.stderr)


def get_logger(directory, rank: int) -> logging.Logger:
    """Logger to the console and, appending, to directory/output.log.

    Rank 0 logs everything from INFO up, other ranks only warnings, marked with their rank.
    """
    logger = logging.getLogger("dim")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    file_handler = logging.FileHandler(Path(directory) / "output.log", encoding="utf-8")
    mark = f"rank {rank} " if rank else ""
    formatter = logging.Formatter(f"%(asctime)s {mark}%(levelname)s %(message)s")
    for handler in file_handler, _ConsoleHandler():
        handler.setFormatter(formatter)
        logger.addHandler(handler)
    logger.setLevel(logging.WARNING if rank else logging.INFO)
    logger.propagate = False
    return logger


# ---------------------------------------------------------------------------------------------
# Metrics

def _json_value(value):
    """Numbers as JSON has them; NaN and infinities, which it lacks, as strings float() reads."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float) and not math.isfinite(value):
        return {math.inf: "Infinity", -math.inf: "-Infinity"}.get(value, "NaN")
    return value


class MetricsLog:
    """directory/metrics.jsonl, an object a line: {"step": 10, "loss": 0.5, ...}.

    Each line reaches the operating system before `write` returns, so kill -9 loses none; one that
    a kill cut short is dropped by `truncate_after`, which every start of a run calls. NaN and
    infinities are the strings "NaN", "Infinity", "-Infinity". The same numbers go to TensorBoard
    and wandb (offline unless WANDB_MODE says otherwise) if asked for; a failure of wandb is logged
    once and does not stop the run. Made on rank 0 only.
    """

    def __init__(self, directory, tensorboard: bool = False, wandb: bool = False):
        self._directory = Path(directory)
        self._path = self._directory / "metrics.jsonl"
        self._wants = {"tensorboard": tensorboard, "wandb": wandb}
        self._file = self._board = self._wandb_run = None

    def truncate_after(self, step: int) -> None:
        """Drop the lines of later steps than `step`, those that a resumed run writes again."""
        self.close()
        if self._path.exists():
            temporary = self._path.with_suffix(".tmp")
            with self._path.open(encoding="utf-8", errors="replace") as lines, \
                    temporary.open("w", encoding="utf-8") as kept:
                kept.writelines(line.rstrip("\n") + "\n" for line in lines
                                if _step_of(line) <= step)
            os.replace(temporary, self._path)
        self._start_others(first_step=step + 1)

    def _start_others(self, first_step):
        if self._wants["tensorboard"]:
            from torch.utils.tensorboard import SummaryWriter
            self._board = SummaryWriter(str(self._directory / "tensorboard"),
                                        purge_step=first_step)
        if self._wants["wandb"]:
            self._guard_wandb(self._start_wandb)

    def _start_wandb(self):
        import wandb
        self._wandb_run = wandb.init(project="DiM", dir=str(self._directory),
                                     settings=dict(WANDB_SETTINGS),
                                     mode=os.environ.get("WANDB_MODE", "offline"))

    def _guard_wandb(self, call, *arguments, **keywords):
        try:
            call(*arguments, **keywords)
        except Exception as error:  # noqa: BLE001 - whatever wandb raises, the run goes on
            self._wandb_run, self._wants["wandb"] = None, False
            logging.getLogger("dim").warning("wandb failed and is switched off: %s", error)

    def write(self, step: int, metrics: dict) -> None:
        """Log numbers (Python, numpy or 0-dim tensors) and strings under `step`."""
        values = {name: _json_value(value) for name, value in metrics.items()}
        if self._file is None:
            self._file = self._path.open("a", encoding="utf-8")
        self._file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        self._file.flush()
        numbers = {name: float(value) for name, value in metrics.items()
                   if not isinstance(value, str)}
        for name, value in numbers.items() if self._board else ():
            self._board.add_scalar(name, value, step)
        if self._wandb_run:
            self._guard_wandb(self._wandb_run.log, numbers, step=step)

    def close(self) -> None:
        if self._file:
            self._file.close()
        if self._board:
            self._board.close()
        if self._wandb_run:
            self._guard_wandb(self._wandb_run.finish)
        self._file = self._board = self._wandb_run = None


def _step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; infinity for a line cut short."""
    try:
        return json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return math.inf


# ---------------------------------------------------------------------------------------------
# Stopping

# Recorded at import, the first thing a script does: see StopRequest.
_PARENT = os.getppid()
_SAME_KEY_PRESS_S = 1.0


class StopRequest:
    """Context in which SIGTERM and SIGINT set `requested` instead of ending the process.

    A second SIGINT raises KeyboardInterrupt; one within a second of the first does not, since
    terminal and launcher both pass on the same Ctrl-C. `accelerate launch` with one process dies
    of a SIGTERM without telling its child, so under a launcher the loss of the parent process
    counts as a request too. Main thread only.
    """

    def __init__(self):
        self._signalled = False
        self._first_interrupt = None
        self._launched = bool({"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"}
                              & set(os.environ))

    @property
    def requested(self) -> bool:
        return self._signalled or (self._launched and os.getppid() != _PARENT)

    def _handle(self, number, frame):
        now = time.monotonic()
        if number == signal.SIGINT and self._first_interrupt is not None \
                and now - self._first_interrupt > _SAME_KEY_PRESS_S:
            raise KeyboardInterrupt
        if number == signal.SIGINT and self._first_interrupt is None:
            self._first_interrupt = now
        self._signalled = True

    def __enter__(self):
        self._previous = {number: signal.signal(number, self._handle)
                          for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception):
        for number, handler in self._previous.items():
            signal.signal(number, handler)


# Data loader workers. torchrun's SIGTERM and a terminal's Ctrl-C go to the whole process group; a
# worker that died of it would raise RuntimeError anywhere in the training step, before the last
# checkpoint is saved. So workers leave the group, and until they have, the signals are blocked.
# They do not ignore SIGTERM: Python ends with it, and waits for, the workers alive at its exit.

_STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT}


@contextlib.contextmanager
def starting_workers():
    """Make the iterator of a DataLoader with worker_init_fn=`detach_worker` in this context."""
    if sys.platform == "win32":
        yield
        return
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)  # workers inherit it
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def detach_worker(worker_id: int) -> None:
    """worker_init_fn of a DataLoader whose iterator is made in `starting_workers`."""
    if sys.platform == "win32":
        return
    os.setpgid(0, 0)
    while signal.sigpending() & _STOP_SIGNALS:
        signal.sigwait(_STOP_SIGNALS)  # meant for the group that this worker was in
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
