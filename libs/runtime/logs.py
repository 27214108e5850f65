"""What a run says about itself (environment, log, metrics) and how it is asked to stop.

Layer 0: imports nothing of ours. torch, TensorBoard and wandb are imported where they are used.
"""

import contextlib
import ctypes
import importlib.metadata
import json
import logging
import math
import os
import platform
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

_CHECKOUT = Path(__file__).resolve().parents[2]
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


class _LogFile(logging.FileHandler):
    """Of a disk that is full, it says so once, on the console, instead of a traceback a line."""

    _told = False

    def handleError(self, record):
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._told:
            self._told = True
            print(f"warning: cannot write {self.baseFilename}: {error.strerror}", file=sys.stderr)


def one_line(text: str) -> str:
    """`text` on one line: names out of files may hold line ends and a terminal's control sequences.
    """
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


class _Formatter(logging.Formatter):
    def formatMessage(self, record):
        return one_line(super().formatMessage(record))


def get_logger(directory, rank: int) -> logging.Logger:
    """Logger to the console and, appending, to directory/output.log; warnings go there,
    too.

    Rank 0 logs everything from INFO up, other ranks only warnings, marked with their rank.
    """
    logger = logging.getLogger("dim")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    file_handler = _LogFile(Path(directory) / "output.log", encoding="utf-8")
    mark = f"rank {rank} " if rank else ""
    formatter = _Formatter(f"%(asctime)s {mark}%(levelname)s %(message)s")
    for handler in file_handler, _ConsoleHandler():
        handler.setFormatter(formatter)
        logger.addHandler(handler)
    logger.setLevel(logging.WARNING if rank else logging.INFO)
    logger.propagate = False
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").handlers = logger.handlers
    return logger


# ---------------------------------------------------------------------------------------------
# Metrics

def _json_value(value):
    """Numbers as JSON has them; NaN and infinities, which it lacks, as strings float() reads."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float) and not math.isfinite(value):
        return {math.inf: "Infinity", -math.inf: "-Infinity"}.get(value, "NaN")
    return value


_QUEUED_STEPS = 10_000
_CLOSE_S = 30


class _Tracker:
    """TensorBoard or wandb, on a thread of its own: whatever happens there, such as a network that
    is gone, training neither stops nor waits. A failure is logged once.

    make: called on the thread, returns (function of step and numbers, function that finishes).
    """

    def __init__(self, name, make):
        self._name, self._queue = name, queue.Queue(_QUEUED_STEPS)
        self._thread = threading.Thread(target=self._work, args=(make,), daemon=True)
        self._thread.start()

    def _work(self, make):
        try:
            write, finish = make()
            while (entry := self._queue.get()) is not None:
                write(*entry)
            finish()
        except BaseException as error:  # noqa: BLE001 - whatever it raises, the run goes on
            self._switched_off(f"failed and is switched off: {error}")

    def _switched_off(self, why):
        self._name, name = None, self._name
        if name:
            logging.getLogger("dim").warning("%s %s", name, why)

    def write(self, step, numbers):
        if not self._name:
            return
        try:
            self._queue.put_nowait((step, numbers))
        except queue.Full:
            self._switched_off(f"is {_QUEUED_STEPS} entries behind and is switched off")

    def close(self):
        """Wait for it, but not longer than _CLOSE_S."""
        if not self._name:
            return
        deadline = time.monotonic() + _CLOSE_S
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=_CLOSE_S)
            self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._switched_off(f"did not finish within {_CLOSE_S} s: it may lack the last numbers")
            self._give_up()

    def _give_up(self):
        """Nothing more to do: the thread ends with the process."""


class _Wandb(_Tracker):

    def _give_up(self):
        """wandb waits at exit, for as long as it takes, for a process of its own: end that."""
        import psutil
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                if child.name().startswith("wandb"):
                    child.kill()


class MetricsLog:
    """directory/metrics.jsonl, an object a line: {"step": 10, "loss": 0.5, ...}.

    Each line reaches the operating system before `write` returns, so kill -9 loses none; one that
    a kill cut short is dropped by `truncate_after`, which every start of a run calls. NaN and
    infinities are the strings "NaN", "Infinity", "-Infinity". The same numbers go to TensorBoard
    and wandb (offline unless WANDB_MODE says otherwise) if asked for; a failure of theirs does not
    stop or delay the run. Made on rank 0 only. A full disk is an OSError that names the file.
    """

    def __init__(self, directory, tensorboard: bool = False, wandb: bool = False):
        self._directory = Path(directory)
        self._path = self._directory / "metrics.jsonl"
        self._wanted = [(_Tracker, "TensorBoard", self._make_board)] if tensorboard else []
        self._wanted += [(_Wandb, "wandb", self._make_wandb)] if wandb else []
        self._file, self._trackers = None, []

    def truncate_after(self, step: int, batch: float = math.inf) -> None:
        """Drop the lines of later steps than `step` and of later batches than `batch`, those that a
        resumed run writes again.
        """
        self.close()
        if self._path.exists():
            temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
            with self._path.open(encoding="utf-8", errors="replace") as lines, \
                    temporary.open("w", encoding="utf-8") as kept:
                kept.writelines(line.rstrip("\n") + "\n" for line in lines
                                if _is_before(line, step, batch))
            os.replace(temporary, self._path)
        self._first_step = step + 1
        self._trackers = [tracker(name, make) for tracker, name, make in self._wanted]

    def _make_board(self):
        from torch.utils.tensorboard import SummaryWriter
        with mock.patch("socket.gethostname", return_value="host"):  # goes into the file's name
            board = SummaryWriter(str(self._directory / "tensorboard"),
                                  purge_step=self._first_step)

        def write(step, numbers):
            for name, value in numbers.items():
                board.add_scalar(name, value, step)
        return write, board.close

    def _make_wandb(self):
        import wandb
        started = wandb.init(project="DiM", dir=str(self._directory),
                             settings=dict(WANDB_SETTINGS),
                             mode=os.environ.get("WANDB_MODE", "offline"))
        return lambda step, numbers: started.log(numbers, step=step), started.finish

    def write(self, step: int, metrics: dict) -> None:
        """Log numbers (Python, numpy or 0-dim tensors) and strings under `step`."""
        values = {name: _json_value(value) for name, value in metrics.items()}
        line = json.dumps({"step": step, **values}, allow_nan=False) + "\n"
        try:
            if self._file is None:
                self._file = self._path.open("ab", buffering=0)
            line = line.encode()
            while line:  # a disk that fills up takes a part
                line = line[self._file.write(line):]
        except OSError as error:
            error.filename = error.filename or str(self._path)
            raise
        numbers = {name: float(value) for name, value in metrics.items()
                   if not isinstance(value, str)}
        for tracker in self._trackers:
            tracker.write(step, numbers)

    def close(self) -> None:
        if self._file:
            self._file.close()
        for tracker in self._trackers:
            tracker.close()
        self._file, self._trackers = None, []


def has_logged(directory, step: int, name: str) -> bool:
    """Whether metrics.jsonl in `directory` has a value of this name at this step."""
    path = Path(directory) / "metrics.jsonl"
    if not path.is_file():
        return False
    with path.open(encoding="utf-8", errors="replace") as lines:
        return any(f'"{name}"' in line and _is_before(line, step, math.inf)
                   and json.loads(line)["step"] == step for line in lines)


def _is_before(line: str, step: int, batch: float) -> bool:
    """Whether a line of metrics.jsonl is of this step and batch or earlier ones, and whole."""
    try:
        values = json.loads(line)
        return values["step"] <= step and values.get("batch", 0) <= batch
    except (ValueError, TypeError, KeyError, AttributeError):
        return False


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

_PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>
_STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT}


@contextlib.contextmanager
def starting_workers():
    """Make the iterator of a DataLoader with worker_init_fn=`detach_worker` in this context."""
    if sys.platform == "win32":
        yield
        return
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)  # workers inherit it
    of_children = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, of_children)
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def detach_worker(worker_id: int) -> None:
    """worker_init_fn of a DataLoader whose iterator is made in `starting_workers`."""
    if sys.platform == "win32":
        return
    if sys.platform == "linux":
        # A worker ends with its parent, however that ends. torch's own watch takes 5 s, and waits
        # for ever on a lock that the parent was killed with.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setpgid(0, 0)
    while signal.sigpending() & _STOP_SIGNALS:
        signal.sigwait(_STOP_SIGNALS)  # meant for the group that this worker was in
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
