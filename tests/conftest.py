"""Fixtures of several test modules."""

import importlib
import sys

import pytest
import runs
import torch
import writers

from libs.runtime import flags


def pytest_collection_modifyitems(items):
    """Tests marked cuda are skipped where there is no GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="no GPU here"))


@pytest.fixture
def poisoned_memory():
    """torch.empty returns NaN, in scratch too, so that an element nobody writes is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def exact_float32(monkeypatch):
    """No TF32 in what surrounds the operators, and no backend named by the environment."""
    for name in ("DIM_BACKEND", "DIM_FUSED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.fixture(scope="module")
def one_thread():
    """As in runs.environment, so that runs in this process sum in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.chdir(runs.ROOT)
        yield patch
    torch.set_num_threads(threads)


@pytest.fixture
def fresh_accelerate(monkeypatch):
    """Each run of a test is its process's first; the log reaches pytest's caplog."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    runs.fresh_state()


@pytest.fixture(scope="module")
def in_process(one_thread):
    """in_process(script, words): the script's exit status, run in this process on one thread."""

    def call(script, words):
        module = importlib.import_module(script)
        one_thread.setattr(sys, "argv", [f"{script}.py", *map(str, words)])
        try:
            flags.run_main(module.main, module.FLAGS)
        except SystemExit as ended:
            return ended.code
        finally:
            runs.fresh_state()
        return 0

    return call


@pytest.fixture
def cifar10(monkeypatch):
    """cifar10(parent, count): small CIFAR-10 files in `parent`, which torchvision then takes."""

    def write(parent, count=3):
        from torchvision.datasets import CIFAR10

        folder = writers.write_cifar10(parent, count)
        for name, value in writers.cifar10_lists(parent).items():
            monkeypatch.setattr(CIFAR10, name, value)
        return folder

    return write
