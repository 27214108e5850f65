"""The order in which training reads a data set, and the keyed random streams of augmentation."""

import functools
import itertools

import numpy as np

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


def deal_keys(length, batch_size, *, num_processes, rank, accumulation, seed, start_batch=0):
    """The micro-batches of one rank, lists of (epoch, index), without end, out of a stream that is
    the same for any number of ranks.

    Stream position p has epoch p // length and index permutation(seed, epoch)[p % length]. Global
    batch k is positions [k * batch_size, (k + 1) * batch_size); the first is `start_batch`.
    Micro-batch m of rank r is the b positions from (m * num_processes + r) * b of a global batch,
    b = batch_size / (num_processes * accumulation): a rank's micro-batches start num_processes * b
    apart. Starting anywhere costs one permutation. UserError if batch_size does not divide.
    """
    if batch_size % (parts := num_processes * accumulation):
        raise UserError(
            f"train.batch_size {batch_size} is not divisible by {num_processes} processes x "
            f"{accumulation} accumulation steps = {parts}"
        )
    mini_batch_size = batch_size // parts

    def find_key(position):
        epoch, place = divmod(position, length)
        return epoch, int(permutation(length, seed=seed, epoch=epoch)[place])

    first = start_batch * batch_size + rank * mini_batch_size
    starts = itertools.count(first, num_processes * mini_batch_size)
    return ([find_key(start + i) for i in range(mini_batch_size)] for start in starts)
