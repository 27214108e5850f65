"""Micro-batches from workers that die."""

import multiprocessing
import types

import pytest
import torch

from datasets import get_dataset
from libs.train import loader

CONFIG = types.SimpleNamespace(
    seed=0, gradient_accumulation_steps=2, train=types.SimpleNamespace(batch_size=8, num_workers=2)
)
ACCELERATOR = types.SimpleNamespace(
    num_processes=1, process_index=0, device=torch.device("cpu"), is_main_process=True
)


def first(n):
    found = loader.micro_batches(CONFIG, get_dataset("digits"), ACCELERATOR, 3)
    return [next(found) for _ in range(n)]


def test_a_worker_that_dies_while_the_others_are_started(monkeypatch):
    """It is known as dead, and no batch is lost."""
    expected, killed = first(3), []

    def iterator(loader):
        found = iter(loader)
        if not killed:
            killed.append(found._workers[0])
            killed[0].kill()
            killed[0].join()
            multiprocessing.active_children()  # forgets the dead
        return found

    monkeypatch.setattr(loader, "iter", iterator, raising=False)
    for (x, y), (x_expected, y_expected) in zip(first(3), expected, strict=True):
        assert torch.equal(x, x_expected) and torch.equal(y, y_expected)
    assert killed


def test_an_error_of_a_batch_is_no_death(monkeypatch):
    dataset = get_dataset("digits")
    monkeypatch.setattr(type(dataset), "_read", lambda self, epoch, index: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(loader.micro_batches(CONFIG, dataset, ACCELERATOR, 0))
