"""The micro-batches of a training run, from data loader workers that may die under it."""

import itertools
import logging
import signal

from torch.utils.data import DataLoader

from datasets import GlobalBatchSampler
from libs.runtime import detach_worker, starting_workers
from utils import UserError

log = logging.getLogger("dim")

MAX_DEATHS = 3  # of workers, without a batch between them


def _start(config, dataset, accelerator, start_batch, skipped):
    """(iterator over this rank's micro-batches from a global batch on, its worker processes);
    skipped: how many of the first batch's micro-batches were had already.

    Our sampler shards and resumes, so the loader is not given to accelerate.
    """
    sampler = GlobalBatchSampler(
        len(dataset),
        config.train.batch_size,
        num_processes=accelerator.num_processes,
        rank=accelerator.process_index,
        accumulation=config.gradient_accumulation_steps,
        seed=config.seed,
        start_batch=start_batch,
    )
    workers = config.train.num_workers
    loader = DataLoader(
        dataset,
        batch_sampler=itertools.islice(sampler, skipped, None),
        num_workers=workers,
        pin_memory=accelerator.device.type == "cuda",
        persistent_workers=workers > 0,
        worker_init_fn=detach_worker,
    )
    with starting_workers():
        batches = iter(loader)
    # Not multiprocessing's list, which leaves out those that are dead already.
    return batches, getattr(batches, "_workers", [])


def _cause(process):
    """How a worker ended, 'SIGKILL' or 'status 1', and what it points to."""
    if process.exitcode > 0:
        return f"status {process.exitcode}"
    name = signal.Signals(-process.exitcode).name
    hints = {
        "SIGKILL": ": memory ran out, perhaps; lower train.num_workers",
        "SIGBUS": ": make room in /dev/shm, or repair a file of the data set that was cut short",
    }
    return name + hints.get(name, "")


def _report(process, deaths, batch):
    died = f"data loader worker {process.pid} died ({_cause(process)})"
    if deaths == MAX_DEATHS:
        raise UserError(
            f"{died}, the {deaths}rd death at batch {batch}; the same command goes on from the "
            "last checkpoint"
        )
    log.warning("%s; the workers are started again at batch %d", died, batch)


def micro_batches(config, dataset, accelerator, start_batch):
    """Endless iterator over this rank's micro-batches (x, y) from global batch `start_batch` on.

    Where a worker dies, all are started again from the micro-batch that was due, so that nothing of
    the run changes but its time.

    Raises:
        UserError: workers died MAX_DEATHS times without a micro-batch between them.
    """
    accumulation = config.gradient_accumulation_steps

    def start(done):
        batch, skipped = divmod(done, accumulation)
        return _start(config, dataset, accelerator, start_batch + batch, skipped)

    def endless(batches, workers):
        done = deaths = 0
        while True:
            try:
                for micro_batch in batches:
                    yield micro_batch
                    done, deaths = done + 1, 0
            except Exception:
                # Where one is dead, its parts of a batch are gone: an error of almost any kind. Its
                # end closes what it has open, and only then can be asked for.
                for process in workers:
                    process.join(0.1)
                dead = [process for process in workers if process.exitcode]
                if not dead:
                    raise
            deaths += 1
            _report(dead[0], deaths, start_batch + done // accumulation)
            batches, workers = start(done)

    # The first workers are started now, before there are threads that a fork could catch half-way.
    return endless(*start(0))
