"""Micro-batches from the data set to the device, one ahead of the network."""

import torch

from libs.data import deal_keys
from libs.runtime import read_batches


class Prefetcher:
    """Iterator over the micro-batches of `batches`, tuples of tensors, on `device`."""

    def __init__(self, batches, device):
        self.batches, self.device, self._ahead = iter(batches), device, None

    def prefetch(self):
        """Take the next micro-batch from the loader; call this once the work on the present one is
        queued, so that the device need not wait for the host.
        """
        if self._ahead is None:
            batch = next(self.batches)
            self._ahead = tuple(x.to(self.device, non_blocking=True) for x in batch)

    def __next__(self):
        self.prefetch()
        batch, self._ahead = self._ahead, None
        return batch


def make_batches(dataset, accelerator, settings, accumulation, seed, start_batch, is_stopped):
    """Endless Prefetcher of this rank's micro-batches of items from global batch `start_batch` on;
    settings: config.train. Our sampler shards and resumes: the loader is not given to accelerate.
    A batch that does not come while is_stopped() holds is NaN, so that the step is made by none.
    """
    processes, device = accelerator.num_processes, accelerator.device
    keys = deal_keys(
        len(dataset), settings.batch_size, num_processes=processes,
        rank=accelerator.process_index, accumulation=accumulation, seed=seed,
        start_batch=start_batch,
    )  # fmt: skip
    rows = settings.batch_size // (processes * accumulation)
    nothing = torch.full((rows, *dataset.shape), torch.nan), torch.zeros(rows, dtype=torch.int64)
    if dataset.feature_shape:
        nothing += (torch.zeros(rows, *dataset.feature_shape),)
    # The workers start now, before there are threads that a fork could catch half-way.
    batches = read_batches(
        dataset, batch_sampler=keys, num_workers=settings.num_workers,
        pin_memory=device.type == "cuda", is_stopped=is_stopped, substitute=nothing,
    )  # fmt: skip
    return Prefetcher(batches, device)
