"""Saving while training goes on: what is written is the state at the save."""

import threading
import types

import pytest
import torch

from libs.files import read_safetensors, read_torch
from libs.runtime import Precision
from libs.train import checkpoint, saver
from libs.train.ema import EMA
from libs.train.engine import Engine
from libs.train.resume import Progress, TrainState


def make_state(device, fused):
    network, precision = torch.nn.Linear(64, 64, device=device), Precision("no", device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, fused=fused)
    engine = Engine("one process", network, network, optimizer, precision.scaler, 1.0)
    return TrainState(network, {"nnet_ema": EMA(network, 0.9)}, engine, precision, Progress())


def take_step(state):
    weight = state.network.weight
    state.network(torch.ones_like(weight)).square().sum().backward()
    state.engine.step(torch.zeros_like(weight[0, 0]))
    state.progress.step += 1
    state.averages["nnet_ema"].update(state.network)


def read_state(state):
    moment = state.engine.optimizer.state[state.network.weight]["exp_avg"]
    average = state.averages["nnet_ema"].model
    return [x.tolist() for x in (state.network.weight, average.weight, moment)]


def make_saver(state, device, directory):
    accelerator = types.SimpleNamespace(device=device, num_processes=1, is_main_process=True)
    config = types.SimpleNamespace(train=types.SimpleNamespace(keep_last=None), to_dict=dict)
    return saver.Saver(state, accelerator, directory, config)


@pytest.fixture
def go_on(monkeypatch):
    """The event that a write waits for."""
    event, save = threading.Event(), checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *a, **k: event.wait() and save(*a, **k))
    return event


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_steps_during_a_save_do_not_change_it(kind, fused, go_on, tmp_path, monkeypatch):
    """On a GPU also while the copies are late. A file holds its tensors' own memory alone."""
    monkeypatch.setattr(saver, "SLAB", 20_000)  # for one of four tensors of 16,384
    device = torch.device(kind)
    state = make_state(device, fused)
    take_step(state)
    with make_saver(state, device, tmp_path / "ckpts") as saving:
        for step in 1, 4:
            go_on.clear()
            expected, path = read_state(state), tmp_path / "ckpts" / f"{step}.ckpt"
            if kind == "cuda":
                with torch.cuda.stream(saving.stream):
                    torch.cuda._sleep(200_000_000)  # clocks: 0.1 s
            saving.save()
            for _ in range(3):
                take_step(state)
            assert not path.exists() and read_state(state) != expected
            go_on.set()
            saving.finish()
            saved = read_torch(path / "training.pt")
            moments = saved["optimizer"]["state"]["weight"]
            found = [read_safetensors(path / f"{n}.safetensors") for n in ("nnet", "nnet_ema")]
            found = [*(tensors["weight"] for tensors in found), moments["exp_avg"]]
            assert [x.tolist() for x in found] == expected
            assert saved["progress"]["step"] == moments["step"] == step
            assert (path / "training.pt").stat().st_size < 3 * 16_384
        assert [len(slab) for slab in saving.memory.slabs] == [20_000] * 4


def test_of_tensors_on_the_host_a_save_copies_the_counters_alone(go_on, tmp_path):
    """Of a run on a GPU, for which `meta` stands here: torch's unfused AdamW counts on the host."""
    state = make_state(torch.device("cpu"), fused=False)
    take_step(state)
    with make_saver(state, torch.device("meta"), tmp_path / "ckpts") as saving:
        saving.save()
        take_step(state)
        go_on.set()
    moments = read_torch(tmp_path / "ckpts" / "1.ckpt" / "training.pt")["optimizer"]["state"]
    assert [moments[name]["step"] for name in ("weight", "bias")] == [1, 1]
    assert saving.memory.used == 2 * saver.ALIGNMENT
