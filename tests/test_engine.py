"""Engines: DDP, FSDP2 and ZeRO-2, chosen by the files of configs/accelerate, make the steps of one
process, and go on with its checkpoints as it goes on with theirs.

The runs have two processes: on the CPU through gloo, and where there are two GPUs through NCCL.
"""

import importlib.util
import json
import shutil
import types

import numpy as np
import pytest
import runs
import torch
from PIL import Image

from libs.train.engine import ZeroEngine, make_engine
from utils import UserError

NAMES = {"ddp": "DDP", "fsdp2": "FSDP2", "zero2": "DeepSpeed ZeRO-2"}
# DeepSpeed builds an extension of its own at first use, which takes minutes on two cores.
ENGINES = ["ddp", "fsdp2"]
# After 6 steps at a learning rate of 0.001: other orders of summation. The largest difference found
# on the CPU and on two H200s in 20 steps is 2.4e-7.
ROUNDING = 2e-6


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    if request.param == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, found {torch.cuda.device_count()}")
    return request.param


def get_words(name):
    """What `accelerate launch` is told for an engine on two processes."""
    file = f"configs/accelerate/{name}.yaml"
    return ["--config_file", file, "--num_processes", "2", "--mixed_precision", "no",
            "--main_process_port", "0"]  # fmt: skip


def train(workdir, name, device, steps, expected=0, **changes):
    """A run to step `steps` with an engine, None for one process; its output. Clipping, label
    dropout, accumulation, stochastic depth and warm-up are on; every second step is saved.
    """
    changes = {
        "train__num_workers": 0, "max_grad_norm": 0.5, "train__n_steps": steps,
        "train__save_interval": 2, "train__eval_interval": 2, "train__grid_samples": 4, **changes,
    }  # fmt: skip
    extra = {"NCCL_NVLS_ENABLE": "0"}
    if device == "cuda":
        extra["CUDA_VISIBLE_DEVICES"] = "0,1" if name else "0"
    words = runs.arguments(workdir, **changes)
    if name:
        process = runs.start_words(get_words(name), "train.py", *words, **extra)
    else:
        process = runs.start("train.py", *words, **extra)
    status, output = runs.finish(process)
    assert status == expected, output
    return output


def read_tensors(workdir, step):
    """Every tensor of a checkpoint: network, averages, and the optimizer's state where it is whole.
    """
    folder = workdir / "ckpts" / f"{step}.ckpt"
    tensors = {
        f"{part}.{name}": tensor
        for part, weights in enumerate(runs.weights(workdir, step))
        for name, tensor in weights.items()
    }
    state = torch.load(folder / "training.pt", weights_only=True)["optimizer"]
    for name, entry in state["state"].items() if state else ():
        tensors |= {f"{name}.{key}": value for key, value in entry.items()}
    return tensors


def assert_same(workdir, expected, step):
    """The same checkpoint up to rounding, and the same grid within a level of 255."""
    found, tensors = read_tensors(workdir, step), read_tensors(expected, step)
    apart = {name: (found[name] - tensors[name]).abs().max().item() for name in found}
    worst = max(apart, key=apart.get)
    print(f"step {step}: largest difference {apart[worst]:g}, of {worst}")
    assert apart[worst] <= ROUNDING, worst
    assert found.keys() == tensors.keys() or (workdir / "ckpts" / f"{step}.ckpt/zero2").is_dir()
    grids = (Image.open(folder / "samples" / f"{step}.png") for folder in (workdir, expected))
    found, expected = (np.asarray(grid, float) for grid in grids)
    assert np.abs(found - expected).max() <= 1 and expected.std() > 5


def copy_until(workdir, target, step):
    """The run directory as it was after the save of `step`."""
    for path in (workdir / "ckpts").iterdir():
        if int(path.stem) <= step:
            shutil.copytree(path, target / "ckpts" / path.name)
    return target


@pytest.fixture(scope="module")
def one(device, tmp_path_factory):
    """The run of one process without accumulation, to step 6."""
    workdir = tmp_path_factory.mktemp("one")
    output = train(workdir, None, device, 6, gradient_accumulation_steps=1)
    assert "engine one process" in output
    moved = [(a - b).abs().max() for a, b in zip(
        read_tensors(workdir, 2).values(), read_tensors(workdir, 4).values(), strict=True
    )]  # fmt: skip
    assert max(moved) > 100 * ROUNDING, "the comparisons could not fail"
    return workdir


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_goes_on_with_one_process_and_the_other_way_round(device, one, tmp_path, name):
    """From step 2 to 4 by the engine, and of FSDP2, which gathers what it saves, to 6 by one
    process: always the steps of one.
    """
    workdir = copy_until(one, tmp_path / "run", 2)
    output = train(workdir, name, device, 4)
    assert f"engine {NAMES[name]}" in output and "resuming from" in output
    assert "2 process(es), ranks [0, 1]" in output and "Grad strides" not in output
    assert_same(workdir, one, 4)
    if name == "fsdp2":
        train(workdir, None, device, 6)
        assert_same(workdir, one, 6)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="no DeepSpeed here")
def test_zero2_goes_on_with_itself_and_with_no_other(device, one, tmp_path):
    """Its optimizer's state is DeepSpeed's; weights and average are whole in its checkpoints."""
    if device == "cuda" and importlib.util.find_spec("transformers") is None:
        pytest.skip("accelerate's part of DeepSpeed needs transformers")
    for steps in (4, 6):
        assert f"engine {NAMES['zero2']}" in train(tmp_path / "run", "zero2", device, steps)
        assert_same(tmp_path / "run", one, steps)
    output = train(tmp_path / "run", None, device, 8, expected=1)
    runs.assert_one_sentence(1, output, "6.ckpt was saved with ZeRO-2")
    output = train(copy_until(one, tmp_path / "other", 2), "zero2", device, 4, expected=1)
    assert "2.ckpt was saved without ZeRO-2" in output


@pytest.mark.slow
def test_muon_by_fsdp2_makes_the_steps_of_one_process(device, tmp_path):
    """Up to Muon's bfloat16, whose sums have another order: 0.095 of two steps' way was found."""
    one, muon = tmp_path / "one", {"optimizer__name": "muon"}
    train(one, None, device, 6, gradient_accumulation_steps=1, **muon)
    workdir = copy_until(one, tmp_path / "run", 2)
    for engine, step in ("fsdp2", 4), (None, 6):
        train(workdir, engine, device, step, **muon)
        pairs = (workdir, step), (one, step), (one, step - 2)
        found, expected, before = (runs.weights(*pair)[0] for pair in pairs)
        for name, x in expected.items():
            assert (found[name] - x).norm() <= 0.2 * (x - before[name]).norm(), name


def test_ddp_by_cuda_graphs_makes_the_steps_of_one_process(device, one, tmp_path):
    """Gradients of a replayed backward meet over the processes as others do."""
    if device == "cpu":
        pytest.skip("CUDA graphs need a GPU")
    output = train(tmp_path, "ddp", device, 4, train__cuda_graphs=True)
    assert "engine DDP, by CUDA graphs" in output
    assert_same(tmp_path, one, 4)


PARTS = """
import json, sys
sys.path[:0] = [{root!r}]
import torch
from torch.distributed.tensor import DTensor
from configs import common, digits_T_DiM
from libs.model import build_model
from libs.runtime import Precision, make_accelerator
from libs.train.ema import EMA
from libs.train.engine import make_engine, whole_weights

U_VIT = common.uvit_nnet(input_size=8, in_channels=1, dim=30, depth=2, heads=3, num_classes=3)
accelerator, config = make_accelerator(), digits_T_DiM.get_config()
device = accelerator.device
for nnet in config.nnet, U_VIT:
    network, copy = (build_model(nnet, seed=1).to(device) for _ in "ab")
    ema = EMA(network, 0.5)
    engine = make_engine(accelerator, network, {{"nnet_ema": ema}}, config.optimizer,
                         Precision("no", device), max_norm=None, accumulation=1, graphed=False)
    parts = [*network.parameters(), *ema.model.parameters(),
             *engine.optimizer.param_groups[0]["params"]]
    x, t = torch.randn(2, 1, 8, 8, device=device), torch.tensor([3.0, 700.0], device=device)
    with whole_weights(ema.model), torch.no_grad():
        apart = (ema.model(x, t) - copy(x, t)).abs().max().item()
    share = sum(p.to_local().numel() for p in parts) / sum(p.numel() for p in parts)
    dtensors = all(isinstance(p, DTensor) for p in (*parts, *ema.model.parameters()))
    print(json.dumps(["said", engine.name, dtensors, share, apart]) + "\\n", end="", flush=True)
accelerator.end_training()
"""


@pytest.mark.slow
def test_fsdp2_keeps_parts_and_samples_from_whole_weights(device, tmp_path):
    """DiM and U-ViT: a process holds about half of every parameter, average and what the optimizer
    steps; samples are those of a whole network.
    """
    script = tmp_path / "parts.py"
    script.write_text(PARTS.format(root=str(runs.ROOT)))
    extra = {"CUDA_VISIBLE_DEVICES": "0,1"} if device == "cuda" else {}
    process = runs.start_words(get_words("fsdp2"), str(script), NCCL_NVLS_ENABLE="0", **extra)
    status, output = runs.finish(process)
    assert status == 0, output
    said = [json.loads(line) for line in output.splitlines() if line.startswith('["said"')]
    assert len(said) == 4, output
    for _, name, dtensors, share, apart in said:
        assert name == "FSDP2" and dtensors and 0.4 < share < 0.6 and apart <= 1e-5


def test_zero_drops_the_step_of_an_infinite_loss_with_finite_gradients():
    """DeepSpeed looks for NaN and infinity in the gradients only."""
    weight = torch.ones((), requires_grad=True)
    model = types.SimpleNamespace(backward=lambda loss, scale_wrt_gas: loss.backward())
    zero = ZeroEngine("", model, None, None, None, 1.0)
    for shift, finite in (1.0, True), (torch.inf, False), (torch.nan, False):
        weight.grad = None
        zero.backward(2 * weight + shift)
        assert weight.grad == 2 if finite else weight.grad.isnan()


@pytest.mark.parametrize(
    "name, fp16, words", [("adamw", True, "not in fp16"), ("muon", False, "muon needs matrices")]
)
def test_zero_is_refused_in_fp16_and_with_muon(monkeypatch, name, fp16, words):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    precision = types.SimpleNamespace(scaler=torch.amp.GradScaler("cpu", enabled=fp16))
    settings = types.SimpleNamespace(
        name=name, lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0
    )
    accelerator = types.SimpleNamespace(num_processes=2, device=torch.device("cpu"))
    network = torch.nn.Linear(1, 1)
    network.blocks = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    with pytest.raises(UserError, match=words):
        make_engine(accelerator, network, None, settings, precision,
                    max_norm=None, accumulation=1, graphed=False)  # fmt: skip
