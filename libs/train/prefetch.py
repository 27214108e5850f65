"""Micro-batches on their way from the data loader to the device, one ahead of the network."""

import torch


class Prefetcher:
    """Iterator over the micro-batches of `batches`, tuples of tensors, on `device`.

    On a GPU `prefetch` starts the copy of the next one from pinned memory on a stream of its own,
    while the present one is computed with. Elsewhere there is nothing to hide: it does nothing, and
    micro-batches pass as they are.
    """

    def __init__(self, batches, device):
        self.batches, self.device, self._ahead = iter(batches), device, None
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __iter__(self):
        return self

    def prefetch(self):
        """Take the next micro-batch from the loader and send it off; call it once the work on the
        present one is under way.
        """
        if self.stream is not None and self._ahead is None:
            self._ahead = self._sent(next(self.batches))

    def _sent(self, batch):
        with torch.cuda.stream(self.stream):
            return tuple(tensor.to(self.device, non_blocking=True) for tensor in batch)

    def __next__(self):
        if self.stream is None:
            return next(self.batches)
        self.prefetch()
        batch, self._ahead = self._ahead, None
        stream = torch.cuda.current_stream(self.device)
        stream.wait_stream(self.stream)
        for tensor in batch:
            tensor.record_stream(stream)  # its memory is the other stream's, and in use on this one
        return batch
