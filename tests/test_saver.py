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

CONFIG = types.SimpleNamespace(
    train=types.SimpleNamespace(keep_last=None), to_dict=lambda: {"seed": 1}
)


def test_memory_is_given_out_again_and_each_tensor_has_a_storage(monkeypatch):
    monkeypatch.setattr(saver, "SLAB", 1024)
    tensors = [torch.randn(7, 9), torch.tensor(3.0), torch.zeros(0, 4), torch.randn(300).double()]
    tensors += [torch.arange(5) > 2, torch.randn(30).bfloat16()]
    memory, addresses = saver.HostMemory(pinned=False), []
    for _ in range(2):
        memory.rewind()
        copies = [memory.take(x).copy_(x) for x in tensors]
        addresses.append([copy.data_ptr() for copy in copies])
        for copy, x in zip(copies, tensors, strict=True):
            assert copy.dtype == x.dtype and torch.equal(copy, x)
            assert copy.untyped_storage().nbytes() == x.nbytes
    assert addresses[0] == addresses[1]
    assert [len(slab) for slab in memory.slabs] == [1024, 2560, 1024]


def make_state(device):
    torch.manual_seed(0)
    network, precision = torch.nn.Linear(64, 64).to(device), Precision("no", device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, fused=True)
    engine = Engine("one process", network, network, optimizer, precision.scaler, 1.0)
    return TrainState(network, {"nnet_ema": EMA(network, 0.9)}, engine, precision, Progress())


def take_step(state):
    state.network(torch.ones(8, 64, device=state.network.weight.device)).square().sum().backward()
    state.engine.step(torch.zeros((), device=state.network.weight.device))
    state.progress.step += 1
    state.averages["nnet_ema"].update(state.network)


@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_steps_during_a_save_do_not_change_it(kind, tmp_path, monkeypatch):
    """On a GPU also while the copies are late."""
    device, go_on, save = torch.device(kind), threading.Event(), checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *a, **k: go_on.wait() and save(*a, **k))
    accelerator = types.SimpleNamespace(device=device, num_processes=1, is_main_process=True)
    state = make_state(device)
    take_step(state)
    with saver.Saver(state, accelerator, tmp_path / "ckpts", CONFIG) as saving:
        for step in 1, 4:
            go_on.clear()
            average = state.averages["nnet_ema"].model.weight.tolist()
            weight, moment = state.network.weight.tolist(), get_moment(state).tolist()
            if kind == "cuda":
                with torch.cuda.stream(saving.stream):
                    torch.cuda._sleep(200_000_000)  # clocks: 0.1 s
            saving.save()
            for _ in range(3):
                take_step(state)
            assert not (tmp_path / "ckpts" / f"{step}.ckpt").exists()
            go_on.set()
            saving.finish()
            path = tmp_path / "ckpts" / f"{step}.ckpt"
            saved = read_torch(path / "training.pt")
            assert saved["progress"]["step"] == step and state.progress.step == step + 3
            assert saved["optimizer"]["state"]["weight"]["exp_avg"].tolist() == moment
            assert saved["optimizer"]["state"]["weight"]["step"] == step
            for name, expected in (("nnet", weight), ("nnet_ema", average)):
                found = read_safetensors(path / f"{name}.safetensors")["weight"]
                assert found.tolist() == expected
    assert get_moment(state).tolist() != moment


def get_moment(state):
    return state.engine.optimizer.state[state.network.weight]["exp_avg"]
