"""The order in which training reads a data set, and the keyed random streams of augmentation."""

import functools
import itertools

import numpy as np
from torch.utils.data import Sampler

from utils import UserError

# Purposes of the keyed random streams: two purposes never share a draw.
PURPOSES = {"permutation": 1, "flip": 2}


def keyed_words(count, seed, purpose, *, epoch, index=0):
    """`count` random integers of 64 bits, a function of (seed, purpose, epoch, index): words of the
    counter-based generator Philox. An index has four words to itself. purpose: a key of PURPOSES.
    """
    key, counter = seed + (PURPOSES[purpose] << 64), index + (epoch << 64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)


@functools.lru_cache(maxsize=1)  # the epochs of a stream only rise
def permutation(length, *, seed, epoch):
    """The order of one epoch, int64 (length,), the same on every machine and numpy version."""
    # numpy keeps raw Philox words stable over its versions, not Generator.permutation (NEP 19).
    return np.argsort(keyed_words(length, seed, "permutation", epoch=epoch), kind="stable")


class GlobalBatchSampler(Sampler):
    """Batch sampler of one rank over an endless stream that is the same for any number of ranks.

    Stream position p has epoch p // length and index permutation(seed, epoch)[p % length]; global
    batch k is positions [k * batch_size, (k + 1) * batch_size). From batch `start_batch` on, each
    gives `accumulation` lists of (epoch, index): micro-batch m of rank r is the b positions from
    (m * num_processes + r) * b of the batch, b = batch_size / (num_processes * accumulation).
    Starting anywhere costs one permutation. Raises UserError if batch_size does not divide.
    """

    def __init__(
        self, length, batch_size, *, num_processes, rank, accumulation, seed, start_batch=0
    ):
        if batch_size % (parts := num_processes * accumulation):
            raise UserError(
                f"train.batch_size {batch_size} is not divisible by {num_processes} processes x "
                f"{accumulation} accumulation steps = {parts}"
            )
        self.length, self.batch_size, self.start_batch = length, batch_size, start_batch
        self.num_processes, self.rank = num_processes, rank
        self.accumulation, self.seed = accumulation, seed

    def _keys(self, start, stop):
        """(epoch, index) of the stream positions [start, stop), which may cross epochs."""
        places = (divmod(position, self.length) for position in range(start, stop))
        order = functools.partial(permutation, self.length, seed=self.seed)
        return [(epoch, int(order(epoch=epoch)[offset])) for epoch, offset in places]

    def __iter__(self):
        mini_batch_size = self.batch_size // (self.num_processes * self.accumulation)
        for batch in itertools.count(self.start_batch):
            for micro_batch in range(self.accumulation):
                part = micro_batch * self.num_processes + self.rank
                start = batch * self.batch_size + part * mini_batch_size
                yield self._keys(start, start + mini_batch_size)
