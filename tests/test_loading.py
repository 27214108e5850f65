"""What surrounds a step's computation: copies to the device one ahead, a step that the device may
refuse, and its outcome on the host.
"""

import copy
import itertools
import types

import pytest
import torch

from libs.train.engine import Engine
from libs.train.loader import Prefetcher
from libs.train.step import StepStats


def make_batches(pinned=False):
    for k in itertools.count():
        batch = torch.full((4, 3), float(k)), torch.full((4,), k)
        yield tuple(tensor.pin_memory() for tensor in batch) if pinned else batch


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_batches_are_taken_one_ahead_and_keep_their_order(device):
    """Pinned memory that the loader uses again is not written before the copy."""
    source = make_batches(pinned=device == "cuda")
    batches, sums = Prefetcher(source, torch.device(device)), []
    for k in range(200):
        x, y = next(batches)
        if device == "cuda":
            torch.cuda._sleep(100_000)
        sums.append(x.sum() + y.sum())
        if k % 3:
            batches.prefetch()
            batches.prefetch()
    assert x.device.type == device and torch.stack(sums).tolist() == [16.0 * k for k in range(200)]
    assert next(source)[1][0] == 201, "one ahead"


def make_engine():
    torch.manual_seed(0)
    network = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return Engine("one process", network, network, optimizer, scaler, 1.0)


def step(engine, scale, bad):
    engine.optimizer.zero_grad()
    engine.backward((engine.model(torch.ones(4, 3)) ** 2).mean() * scale)
    engine.step(torch.tensor(bad))


def state_of(engine):
    moments = [v for entry in engine.optimizer.state.values() for v in entry.values()]
    return [tensor.clone() for tensor in (*engine.network.parameters(), *moments)]


def test_a_refused_step_changes_no_bit_and_a_made_one_is_adamws():
    engine = make_engine()
    step(engine, 1.0, 0.0)
    before = state_of(engine)
    step(engine, float("nan"), 1.0)
    assert len(before) == 8
    assert all(map(torch.equal, before, state_of(engine)))
    plain = copy.deepcopy((engine.network, engine.optimizer.state_dict()))
    step(engine, 1.0, 0.0)
    network, optimizer = plain[0], torch.optim.AdamW(plain[0].parameters(), lr=0.1, fused=True)
    optimizer.load_state_dict(plain[1])
    (network(torch.ones(4, 3)) ** 2).mean().backward()
    optimizer.step()
    assert all(map(torch.equal, network.parameters(), engine.network.parameters()))


@pytest.mark.parametrize("loss, norm, found_inf", [
    (1.5, 2.5, 0), (float("nan"), 2.5, 1), (1.5, float("inf"), 1), (float("-inf"), float("nan"), 1)
])  # fmt: skip
@pytest.mark.parametrize("fp16", [False, True])
def test_step_stats(loss, norm, found_inf, fp16):
    """Two processes with the same loss, one of them asked to stop."""
    accelerator = types.SimpleNamespace(
        num_processes=2, reduce=lambda tensor, how: tensor + torch.stack([tensor[0], 1 - tensor[1]])
    )
    scaler = torch.amp.GradScaler("cpu", enabled=fp16, init_scale=512.0)
    precision = types.SimpleNamespace(scaler=scaler)
    stats = StepStats(accelerator, precision, torch.tensor(loss), torch.tensor(norm), False)
    assert stats.found_inf.item() == found_inf and stats.found_inf.dtype == torch.float32
    stats.fetch()
    expected = [loss, norm, True, 512.0 if fp16 else 1.0]
    found = [stats.loss, stats.grad_norm, stats.stop, stats.loss_scale]
    assert found == pytest.approx(expected, nan_ok=True)
