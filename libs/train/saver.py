"""Saving while training goes on: the state is copied to the host beside the next forward and
backward, and a thread writes the copies.
"""

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import torch
from accelerate.utils import recursively_apply

from libs.runtime import wait_without_timeout
from libs.train import checkpoint
from libs.train.engine import Engine, ZeroEngine

log = logging.getLogger("dim")

SLAB = 1 << 28  # bytes: torch rounds pinned memory up to a power of two, for each allocation
ALIGNMENT = 256  # bytes


class HostMemory:
    """Memory on the host, pinned or not, that is given out again after `rewind`."""

    def __init__(self, pinned):
        self.pinned, self.slabs = pinned, []
        self.rewind()

    def reserve(self, size):
        """Allocate so that `size` bytes can be taken."""
        while sum(map(len, self.slabs)) < size:
            self.slabs.append(self._allocate(SLAB))

    def _allocate(self, size):
        return torch.empty(size, dtype=torch.uint8, pin_memory=self.pinned).numpy()

    def rewind(self):
        """From now on `take` gives the memory of earlier calls again."""
        self.number = self.used = 0  # the slab in use, bytes of it that are taken

    def take(self, x):
        """A tensor of the shape and dtype of x, its values undefined. Its storage holds nothing
        else, as torch.save writes whole storages.
        """
        size = -(-x.nbytes // ALIGNMENT) * ALIGNMENT
        while self.number < len(self.slabs) and self.used + size > len(self.slabs[self.number]):
            self.number, self.used = self.number + 1, 0
        if self.number == len(self.slabs):
            self.slabs.append(self._allocate(max(SLAB, size)))
        own = self.slabs[self.number][self.used : self.used + x.nbytes]
        self.used += size
        return torch.from_numpy(own).view(x.dtype).view(x.shape)


class Saver:
    """Writes <directory>/<step>.ckpt of a TrainState, one at a time; all processes call every
    method, and the main one writes. Leaving its context waits for what is being written.

    On a GPU a stream of its own copies into pinned memory, as large as the checkpoint, that stays;
    the thread allocates it beside the first steps, as 14 GB take seconds.
    FSDP2 and ZeRO-2 gather the state first, while training waits; DeepSpeed writes while it waits.
    """

    def __init__(self, state, accelerator, directory, config):
        self.state, self.accelerator = state, accelerator
        self.directory, self.config = directory, config
        self.device_type = accelerator.device.type
        on_gpu = self.device_type == "cuda"
        self.stream = torch.cuda.Stream(accelerator.device) if on_gpu else None
        self.memory, self.copied = HostMemory(pinned=on_gpu), None
        self.thread, self.writing = ThreadPoolExecutor(1), None

    def __enter__(self):
        engine, copies = self.state.engine, 3 + len(self.state.averages)  # weights, AdamW's moments
        if self.stream and self.accelerator.is_main_process and type(engine) is Engine:
            size = copies * sum(p.nbytes for p in self.state.network.parameters())
            self.writing = self.thread.submit(self.memory.reserve, size)
        return self

    def __exit__(self, *exception):
        self.thread.shutdown()

    def _copy(self, values):
        """`values`, nested, with copies of the device's tensors, complete once self.copied is; the
        optimizer's next step waits for them. What was gathered lies on the host already. So do the
        counters of torch's unfused optimizers, which each step changes: they are copied, too.
        """
        self.memory.rewind()

        def place(x):
            if x.device.type != self.device_type and x.dim():
                return x
            return self.memory.take(x).copy_(x, non_blocking=True)

        if self.stream is None:
            return recursively_apply(place, values)
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            placed = recursively_apply(place, values)
            self.copied = torch.cuda.Event(blocking=True)  # a thread that waits needs no CPU
            self.copied.record()
        self.state.engine.copied = self.copied
        return placed

    def _write(self, step, began, waited, **parts):
        if self.copied is not None:
            self.copied.synchronize()
        path = checkpoint.save(self.directory, step, **parts)
        seconds = time.monotonic() - began
        log.info("saved %s in %.1f s, of which training waited %.2f", path, seconds, waited)

    @torch.no_grad()
    def save(self):
        """Begin to write the state as it is now. UserError as `check`."""
        began, state = time.monotonic(), self.state
        self.finish()
        engine, step = state.engine, state.progress.step
        training_state = {
            "optimizer": engine.save_optimizer(self.directory / checkpoint.SAVING.format(step)),
            "scaler": state.precision.scaler.state_dict(),
            "progress": asdict(state.progress),
        }
        weights = {"nnet": engine.gather(state.network)}
        weights |= {name: engine.gather(average.model) for name, average in state.averages.items()}
        if isinstance(engine, ZeroEngine):
            self.accelerator.wait_for_everyone()  # each has written its part
        if self.accelerator.is_main_process:
            best = checkpoint.find_best(self.directory.parent / "metrics.jsonl")
            parts = self._copy(dict(weights=weights, training_state=training_state))
            keep_last, config = self.config.train.keep_last, self.config.to_dict()
            parts |= dict(config=config, keep_last=keep_last, best=best)
            waited = time.monotonic() - began
            self.writing = self.thread.submit(self._write, step, began, waited, **parts)
        if isinstance(engine, ZeroEngine):
            self.finish()

    def check(self, *, wait=False):
        """UserError where a write has ended, or ends if `wait`, on a full disk or the like; earlier
        checkpoints are as they were.
        """
        if self.writing and (wait or self.writing.done()):
            writing, self.writing = self.writing, None
            writing.result()

    def finish(self):
        """Wait, all processes, for what is being written. UserError as `check`."""
        self.check(wait=True)
        wait_without_timeout(self.accelerator)
