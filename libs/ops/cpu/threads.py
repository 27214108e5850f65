"""Runs kernels that release the GIL on as many threads as torch uses.

Our own threads rather than numba's: numba's portable threading layer aborts the process when two
Python threads call it at once, and its OpenMP layer spins beside torch's. The calling thread takes
part: a short burst handed over whole to sleeping threads was often run by both on one core (4.4
instead of 2.2 ms).
"""

import functools
import itertools
import os
from concurrent.futures import ThreadPoolExecutor

import torch

# Small shares let a thread that got its core late do less; a share costs about 15 us of Python.
_SHARES_PER_THREAD = 6


@functools.cache
def _pool(process_id):
    """One pool a process: after a fork the parent's threads are gone."""
    return ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="libs.ops")


def run_tasks(kernel, count, *args):
    """Calls kernel(first, last, *args) until tasks 0 .. count - 1 are done, on at most
    torch.get_num_threads() threads.

    Which thread runs which task is left to chance, so tasks must not write to the same memory.
    """
    threads = min(torch.get_num_threads(), count)
    shares = min(count, threads * _SHARES_PER_THREAD) if threads > 1 else 1
    turn = itertools.count()

    def work():
        while (i := next(turn)) < shares:
            kernel(count * i // shares, count * (i + 1) // shares, *args)

    helpers = [_pool(os.getpid()).submit(work) for _ in range(threads - 1)]
    work()
    for helper in helpers:
        helper.cancel() or helper.result()  # one that has not begun is not waited for
