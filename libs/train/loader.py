"""Micro-batches from the data set to the device, one ahead of the network."""

from torch.utils.data import DataLoader

from libs.data import GlobalBatchSampler
from libs.runtime import detach_worker


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


def make_batches(dataset, accelerator, settings, accumulation, seed, start_batch):
    """Endless Prefetcher of this rank's micro-batches (x, y) from global batch `start_batch` on;
    settings: config.train. Our sampler shards and resumes: the loader is not given to accelerate.
    """
    sampler = GlobalBatchSampler(
        len(dataset), settings.batch_size, num_processes=accelerator.num_processes,
        rank=accelerator.process_index, accumulation=accumulation, seed=seed,
        start_batch=start_batch,
    )  # fmt: skip
    loader = DataLoader(
        dataset, batch_sampler=sampler, num_workers=settings.num_workers,
        worker_init_fn=detach_worker, pin_memory=accelerator.device.type == "cuda",
    )  # fmt: skip
    # The workers start now, before there are threads that a fork could catch half-way.
    return Prefetcher(loader, accelerator.device)
