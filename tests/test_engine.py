"""ZeRO-2: the same steps as DistributedDataParallel, checkpoints that either goes on from, and what
is refused. Two processes on the CPU.
"""

import importlib.util
import shutil
import types

import pytest
import runs
import torch

from configs import common
from libs import engine
from utils import UserError

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)
ROUNDING = 5e-6  # other orders of summation, over 12 steps


def train(workdir, words=("--multi_gpu",), expected=0, **changes):
    """A run of two processes, started with these words of the launcher."""
    changes = {"train__num_workers": 0, "max_grad_norm": 0.5, **changes}
    process = runs.start_words(
        ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0", *words],
        "train.py", *runs.arguments(workdir, **changes),
    )  # fmt: skip
    output, _ = process.communicate(timeout=runs.TIMEOUT_S)
    assert process.returncode == expected, output
    return output


def weights(workdir, step):
    return runs.load_file(workdir / "ckpts" / f"{step}.ckpt" / "nnet.safetensors")


def assert_same(a, b):
    assert max((a[name] - b[name]).abs().max().item() for name in a) <= ROUNDING


@needs_deepspeed
def test_zero_makes_the_steps_of_ddp_and_each_goes_on_from_the_other(tmp_path):
    """Accumulation, clipping and a schedule are on (runs.TINY). Launcher, then config ask."""
    assert "engine torch" in train(tmp_path / "ddp")
    asked = ("--use_deepspeed", "--zero_stage", "2")
    assert "engine DeepSpeed ZeRO-2" in train(tmp_path / "zero", asked, train__n_steps=8)
    assert_same(weights(tmp_path / "ddp", 8), weights(tmp_path / "zero", 8))
    # From ZeRO's checkpoint with DDP to the end; back to step 8 of DDP's run, with ZeRO to the end.
    assert "resuming from" in train(tmp_path / "zero")
    assert_same(weights(tmp_path / "ddp", 12), weights(tmp_path / "zero", 12))
    end = weights(tmp_path / "ddp", 12)
    shutil.rmtree(tmp_path / "ddp" / "ckpts" / "12.ckpt")
    output = train(tmp_path / "ddp", train__zero_stage=2)
    assert "engine DeepSpeed ZeRO-2" in output and "resuming from" in output
    assert_same(end, weights(tmp_path / "ddp", 12))


@pytest.fixture
def config():
    config = common.get_config()
    config.train.zero_stage = 0
    return config


def make(config, *, processes=2, fp16=False):
    accelerator = types.SimpleNamespace(num_processes=processes)
    scaler = torch.amp.GradScaler("cpu", enabled=fp16)
    precision = types.SimpleNamespace(scaler=scaler)
    return engine.make_engine(config, accelerator, None, None, precision)


def test_only_config_and_launcher_turn_it_on(config, monkeypatch):
    monkeypatch.delenv(engine.REQUEST, raising=False)
    assert not engine.zero_requested(config)
    config.train.zero_stage = 2
    assert engine.zero_requested(config)
    config.train.zero_stage = 0
    monkeypatch.setenv(engine.REQUEST, "true")
    assert engine.zero_requested(config)


def test_what_is_refused(config, monkeypatch):
    config.train.zero_stage = 2
    with pytest.raises(UserError, match="but there is one"):
        make(config, processes=1)
    with pytest.raises(UserError, match="not in fp16"):
        make(config, fp16=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install deepspeed"):
        make(config)
    monkeypatch.setenv(engine.REQUEST, "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    with pytest.raises(UserError, match="stage is 3, expected 2"):
        make(config)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "zero.json")
    with pytest.raises(UserError, match="configuration file has no effect"):
        make(config)
