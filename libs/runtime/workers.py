"""Batches out of worker processes: a failure of theirs is said, and no wait is without end."""

import atexit
import ctypes
import itertools
import multiprocessing
import os
import signal
import sys
import time
from multiprocessing.reduction import ForkingPickler

from torch.utils.data import DataLoader, default_collate, get_worker_info

from libs.runtime.launch import TIMEOUT_S
from libs.runtime.stop import SIGNALS
from utils import UserError

_POLL_S = 2  # between two looks at a request to stop
_PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


def detach_worker(worker_id: int) -> None:
    """worker_init_fn of a DataLoader. torchrun's SIGTERM and a terminal's Ctrl-C go to the whole
    process group; a worker that died of them would break the training step before the last
    checkpoint is saved. So workers leave the group, and end with their parent.
    """
    os.setpgid(0, 0)
    for number in SIGNALS:  # schedulers send them to every process of a job
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class _Parcel:
    """A batch, pickled by the worker's own thread: torch passes on what fails there, while of a
    failure in multiprocessing's thread the batch would never come.
    """

    def __init__(self, batch):
        self._pickled = bytes(ForkingPickler.dumps(batch))

    def open(self):
        return ForkingPickler.loads(self._pickled)

    def pin_memory(self):  # for the DataLoader's thread
        return [tensor.pin_memory() for tensor in self.open()]


def _collate(items):
    if get_worker_info() is None:
        return default_collate(items)
    try:
        return _Parcel(default_collate(items))
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"a process that reads data cannot pass them on ({error}): enlarge /dev/shm (docker "
            "run --shm-size=8g), give a shorter TMPDIR, raise ulimit -n, or set num_workers to 0"
        ) from error


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
        yield batch.open() if isinstance(batch, _Parcel) else batch
        began = time.monotonic()


def read_batches(
    dataset, *, num_workers, pin_memory=False, is_stopped=bool, substitute=None, **order
):
    """Iterator over batches of `dataset`, whose items are tuples, as lists of tensors.

    num_workers: processes that read, started now; order: words for the DataLoader. `substitute`
    stands for a batch that does not come while is_stopped() holds. UserError: a worker cannot pass
    on its batch, or none came for half of DIM_TIMEOUT_S, before other ranks would give up.
    """
    loader = DataLoader(
        dataset, num_workers=num_workers, pin_memory=pin_memory, collate_fn=_collate,
        worker_init_fn=detach_worker, timeout=_POLL_S if num_workers else 0, **order,
    )  # fmt: skip
    return _receive(iter(loader), is_stopped, substitute)
