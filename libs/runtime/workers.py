"""Batches out of worker processes: a failure of theirs is said, and no wait is without end."""

import atexit
import ctypes
import itertools
import multiprocessing
import os
import signal
import sys
import time
from multiprocessing.connection import Listener

from torch.utils.data import DataLoader, default_collate, get_worker_info

from libs.runtime.launch import TIMEOUT_S
from libs.runtime.stop import SIGNALS
from utils import UserError

_POLL_S = 2  # between two looks at a request to stop
_PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


def _start_worker(worker_id):
    """torchrun's SIGTERM and a terminal's Ctrl-C go to the whole process group; a worker that died
    of them would break the training step before the last checkpoint is saved. So workers leave the
    group, and end with their parent. What would keep a worker from sending is said here, as nobody
    hears of a failure in the thread that sends.
    """
    os.setpgid(0, 0)
    for number in SIGNALS:  # schedulers send them to every process of a job
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        Listener(family="AF_UNIX").close()  # that thread's, for tensors
    except OSError as error:
        raise UserError(
            f"a process that reads data cannot send them ({error}): give a shorter TMPDIR that can "
            "be written, such as /tmp or /dev/shm, or set num_workers to 0"
        ) from error


def _collate(items):
    """A batch, a worker's in shared memory, so that the thread that sends need not move it."""
    batch = default_collate(items)
    return [x.share_memory_() for x in batch] if get_worker_info() else batch


def _kill_workers():
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises
    for worker in multiprocessing.active_children():
        worker.kill()


atexit.register(_kill_workers)  # Python itself would send SIGTERM, which they ignore, and wait


def _receive(loader, is_stopped, substitute):
    began = time.monotonic()
    while True:
        try:
            batch = next(loader)
        except StopIteration:
            return
        except RuntimeError as error:  # of a time-out: the same call may be made again
            if not str(error).startswith("DataLoader timed out"):
                raise
            limit = TIMEOUT_S / 2
            if not is_stopped() and time.monotonic() - began < limit:
                continue
            _kill_workers()  # the loader would wait for each at its end
            if not is_stopped():
                raise UserError(
                    f"no batch came from the processes that read data for {limit:g} s (half of "
                    "DIM_TIMEOUT_S): see their errors above, and whether the disk answers"
                ) from error
            yield from itertools.repeat(substitute)
        yield batch
        began = time.monotonic()


def read_batches(
    dataset, *, num_workers, pin_memory=False, is_stopped=lambda: False, substitute=None, **order
):
    """Iterator over batches of `dataset`, whose items are tuples, as lists of tensors.

    num_workers: processes that read, started now; order: words for the DataLoader. `substitute`
    stands for a batch that does not come while is_stopped() holds. UserError: workers cannot
    send their batches, or none came for half of DIM_TIMEOUT_S, before other ranks would give up.
    """
    loader = DataLoader(
        dataset, num_workers=num_workers, pin_memory=pin_memory, collate_fn=_collate,
        worker_init_fn=_start_worker, timeout=_POLL_S if num_workers else 0, **order,
    )  # fmt: skip
    return _receive(iter(loader), is_stopped, substitute)
