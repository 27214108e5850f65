"""Micro-batches from the data set to the device, one ahead of the network."""

import torch
from torch.utils.data import DataLoader

from datasets import GlobalBatchSampler
from libs.runtime import detach_worker, starting_workers


def micro_batches(
    dataset, accelerator, *, batch_size, accumulation, num_workers, seed, start_batch
):  # fmt: skip
    """Endless iterator over this rank's micro-batches (x, y) from global batch `start_batch` on.

    Our sampler shards and resumes, so the loader is not given to accelerate.
    """
    sampler = GlobalBatchSampler(
        len(dataset), batch_size, num_processes=accelerator.num_processes,
        rank=accelerator.process_index, accumulation=accumulation, seed=seed,
        start_batch=start_batch,
    )  # fmt: skip
    loader = DataLoader(
        dataset, batch_sampler=sampler, num_workers=num_workers, worker_init_fn=detach_worker,
        pin_memory=accelerator.device.type == "cuda",
    )  # fmt: skip
    # The workers start now, before there are threads that a fork could catch half-way.
    with starting_workers():
        return iter(loader)


class Prefetcher:
    """Iterator over the micro-batches of `batches`, tuples of tensors, on `device`.

    On a GPU `prefetch` starts the copy of the next one from pinned memory on a stream of its own,
    while the network computes with the present one. Elsewhere there is nothing to hide:
    micro-batches pass as they are.
    """

    def __init__(self, batches, device):
        self.batches, self.device, self._ahead = iter(batches), device, None
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __iter__(self):
        return self

    def prefetch(self):
        """Take the next micro-batch from the loader and send it to the device; call this once the
        work on the present one is queued.
        """
        if self.stream is not None and self._ahead is None:
            batch = next(self.batches)
            with torch.cuda.stream(self.stream):
                self._ahead = tuple(x.to(self.device, non_blocking=True) for x in batch)

    def __next__(self):
        if self.stream is None:
            return next(self.batches)
        self.prefetch()
        batch, self._ahead = self._ahead, None
        stream = torch.cuda.current_stream(self.device)
        stream.wait_stream(self.stream)
        for tensor in batch:
            tensor.record_stream(stream)  # allocated on the copying stream, used on this one
        return batch
