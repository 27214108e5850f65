"""Engines: DDP, ZeRO-2 and FSDP2, chosen by the files of configs/accelerate, make the steps of one
process; a checkpoint of any goes on with any other; what is refused.

The runs have two processes: on the CPU through gloo, and where there are two GPUs through NCCL
(`python -m pytest -q -m cuda tests/test_engine.py`).
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
from safetensors.torch import load_file

from libs.runtime import launch
from libs.train import engine
from utils import UserError

NO_DEEPSPEED = importlib.util.find_spec("deepspeed") is None
NO_TRANSFORMERS = importlib.util.find_spec("transformers") is None
CPU, CUDA = "cpu", pytest.param("cuda", marks=pytest.mark.cuda)
ENGINES = {"ddp": "DDP", "zero2": "DeepSpeed ZeRO-2", "fsdp2": "FSDP2"}
# After 20 steps at a learning rate of 0.001: other orders of summation. Found on the CPU and on
# two H200s: 2.4e-7.
ROUNDING = {"cpu": 2e-6, "cuda": 2e-6}
STEPS, HALF = 20, 10


@pytest.fixture(scope="module", params=[CPU, CUDA])
def device(request):
    if request.param == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, found {torch.cuda.device_count()}")
    return request.param


def words_of(name):
    """What `accelerate launch` is told for an engine on two processes."""
    file = f"configs/accelerate/{name}.yaml"
    return ["--config_file", file, "--num_processes", "2", "--mixed_precision", "no",
            "--main_process_port", "0"]  # fmt: skip


def train(workdir, name, device, expected=0, **changes):
    """A run to step STEPS with an engine, None for one process; its output. Clipping, label
    dropout, stochastic depth and a schedule are on (runs.TINY).
    """
    if name == "zero2" and (NO_DEEPSPEED or (device == "cuda" and NO_TRANSFORMERS)):
        pytest.skip("DeepSpeed or transformers is not installed: nothing was shown of ZeRO-2")
    changes = {
        "train__num_workers": 0, "max_grad_norm": 0.5, "train__n_steps": STEPS,
        "train__save_interval": HALF, **changes,
    }  # fmt: skip
    extra = {"NCCL_NVLS_ENABLE": "0"}
    if device == "cuda":
        extra["CUDA_VISIBLE_DEVICES"] = "0,1" if name else "0"
    words = runs.arguments(workdir, **changes)
    start = runs.start_words(words_of(name), "train.py", *words, **extra) if name else runs.start(
        "train.py", *words, **extra
    )  # fmt: skip
    status, output = runs.finish(start)
    assert status == expected, output
    return output


def checkpoint(workdir, step):
    """Every tensor of a checkpoint, name -> tensor: network, average, Adam's moments."""
    folder = workdir / "ckpts" / f"{step}.ckpt"
    tensors = {
        f"{part}.{name}": tensor
        for part in ("nnet", "nnet_ema")
        for name, tensor in load_file(folder / f"{part}.safetensors").items()
    }
    state = torch.load(folder / "training.pt", weights_only=True)["optimizer"]["state"]
    for number, entry in state.items():
        tensors |= {f"{key}.{number}": value for key, value in entry.items()}
    return tensors


def assert_same(device, found, expected):
    assert found.keys() == expected.keys()
    assert {name: t.shape for name, t in found.items()} == {
        name: t.shape for name, t in expected.items()
    }
    apart = {name: (found[name] - expected[name]).abs().max().item() for name in found}
    worst = max(apart, key=apart.get)
    print(f"{device}: largest difference {apart[worst]:g}, of {worst}")
    assert apart[worst] <= ROUNDING[device], worst


@pytest.fixture(scope="module")
def one(device, tmp_path_factory):
    """The run of one process without accumulation."""
    workdir = tmp_path_factory.mktemp("one")
    output = train(workdir, None, device, gradient_accumulation_steps=1)
    assert "engine one process" in output
    return workdir


@pytest.fixture(scope="module")
def made(device, tmp_path_factory):
    """A function: the run of an engine on two processes, made once."""
    found = {}

    def run(name):
        if name not in found:
            workdir = tmp_path_factory.mktemp(name)
            output = train(workdir, name, device)
            assert f"engine {ENGINES[name]}" in output
            found[name] = workdir
        return found[name]

    return run


def test_accumulation_makes_the_steps_of_the_whole_batch(device, one, tmp_path):
    train(tmp_path, None, device)
    assert_same(device, checkpoint(tmp_path, STEPS), checkpoint(one, STEPS))


# DeepSpeed builds an extension of its own at first use, which takes minutes on two cores.
ALL_ENGINES = [pytest.param(e, marks=pytest.mark.slow) if e == "zero2" else e for e in ENGINES]


@pytest.mark.parametrize("name", ALL_ENGINES)
def test_an_engine_makes_the_steps_of_one_process_at_twice_the_batch(device, one, made, name):
    """And the same grid of samples, within a level of 255."""
    assert_same(device, checkpoint(made(name), STEPS), checkpoint(one, STEPS))
    grids = (Image.open(folder / "samples" / f"{STEPS}.png") for folder in (made(name), one))
    found, expected = (np.asarray(grid, float) for grid in grids)
    assert np.abs(found - expected).max() <= 1 and expected.std() > 5


def test_ddp_by_cuda_graphs_makes_the_steps_of_one_process(device, one, tmp_path):
    """Gradients of a replayed backward meet over the processes as others do."""
    if device == "cpu":
        pytest.skip("CUDA graphs need a GPU")
    output = train(tmp_path, "ddp", device, train__cuda_graphs=True)
    assert "engine DDP, by CUDA graphs" in output and "without CUDA graphs" not in output
    assert_same(device, checkpoint(tmp_path, STEPS), checkpoint(one, STEPS))


def test_a_checkpoint_of_half_the_steps_is_not_the_same(device, one):
    """The comparison can fail."""
    with pytest.raises(AssertionError):
        assert_same(device, checkpoint(one, HALF), checkpoint(one, STEPS))


SLOW = [
    pytest.param(*engines, marks=pytest.mark.slow)
    for engines in (("fsdp2", None), ("ddp", "zero2"), ("zero2", "fsdp2"))
]


@pytest.mark.parametrize(
    "first, second", [(None, "fsdp2"), *SLOW]
)
def test_a_checkpoint_goes_on_with_another_engine_and_number_of_processes(
    device, one, made, first, second, tmp_path
):
    began = made(first) if first else one
    shutil.copytree(began, tmp_path / "run", ignore=shutil.ignore_patterns(f"{STEPS}.ckpt"))
    output = train(tmp_path / "run", second, device)
    assert "resuming from" in output
    assert_same(device, checkpoint(tmp_path / "run", STEPS), checkpoint(one, STEPS))


# ---------------------------------------------------------------------------------------------
# FSDP2 from inside

PARTS = """
import json, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
from libs import flags
from libs.launch import Precision, make_accelerator
import torch
from torch.distributed.tensor import DTensor
from configs import common, digits_T_DiM
from libs.ema import EMA
from libs.engine import make_engine
from libs.models import build_model
from libs.sharding import whole_weights
from libs.training import make_optimizer

U_VIT = common.uvit_nnet(input_size=8, in_channels=1, dim=30, depth=2, heads=3, num_classes=3)


def examine(nnet, accelerator):
    config = digits_T_DiM.get_config()
    config.nnet = nnet
    network, device = build_model(nnet, seed=1).to(accelerator.device), accelerator.device
    copy = build_model(nnet, seed=1).to(device)
    whole = dict(copy.named_parameters())
    ema, plain = EMA(network, 0.5), EMA(copy, 0.5)
    with torch.no_grad():
        for parameter in [*ema.model.parameters(), *plain.model.parameters()]:
            parameter *= 0.9
    optimizer = make_optimizer(config, network)
    engine = make_engine(config, accelerator, network, ema, optimizer, Precision("no", device))
    parts = [*network.parameters(), *ema.model.parameters(), *optimizer.param_groups[0]["params"]]
    ema.update(engine.network)
    plain.update(copy)
    average = engine.whole(ema.state_dict())
    x, t = torch.randn(2, 1, 8, 8, device=device), torch.tensor([3.0, 700.0], device=device)
    with whole_weights(ema.model):
        images = (ema.model(x, t) - plain.model(x, t)).abs().max().item()
    said = dict(
        engine=engine.name, dtensors=all(isinstance(p, DTensor) for p in parts),
        share=sum(p.to_local().numel() for p in parts) / sum(p.numel() for p in parts),
        average=max((average[k].to(v) - v).abs().max().item() if accelerator.is_main_process else
                    float(average[k] is not None) for k, v in plain.state_dict().items()),
        images=images, after=all(isinstance(p, DTensor) for p in ema.model.parameters()),
    )
    return said


def main(args):
    accelerator = make_accelerator()
    for nnet in digits_T_DiM.get_config().nnet, U_VIT:
        said = json.dumps(["said", accelerator.process_index, examine(nnet, accelerator)])
        print("\\n" + said + "\\n", end="", flush=True)
    accelerator.wait_for_everyone()
    accelerator.end_training()

flags.run_main(main, {{}})
"""


def test_fsdp2_keeps_parts_and_gives_them_back_whole(device, tmp_path):
    """DiM and U-ViT: every parameter, its average and what the optimizer steps are DTensors; a
    process holds about half of them; average and samples are those of a whole network.
    """
    script = tmp_path / "parts.py"
    script.write_text(PARTS.format(root=str(runs.ROOT)))
    extra = {"CUDA_VISIBLE_DEVICES": "0,1"} if device == "cuda" else {}
    status, output = runs.finish(
        runs.start_words(words_of("fsdp2"), str(script), NCCL_NVLS_ENABLE="0", **extra)
    )
    assert status == 0, output
    said = [json.loads(line) for line in output.splitlines() if line.startswith('["said"')]
    assert sorted(rank for _, rank, _ in said) == [0, 0, 1, 1], output
    for _, _, found in said:
        assert found["engine"] == "FSDP2" and found["dtensors"] and found["after"]
        assert 0.4 < found["share"] < 0.6
        assert found["average"] == 0 and found["images"] <= 1e-5


# ---------------------------------------------------------------------------------------------
# What chooses an engine, and what is refused


@pytest.fixture
def no_request(monkeypatch):
    for name in [*launch.REQUESTS, *(key for group in launch._NEEDED.values() for key in group)]:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_only_the_launcher_chooses(no_request):
    assert launch.requested_engine() is None
    no_request.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert launch.requested_engine() == "zero2"
    no_request.setenv("ACCELERATE_USE_DEEPSPEED", "false")
    no_request.setenv("ACCELERATE_USE_FSDP", "true")
    no_request.setenv("FSDP_VERSION", "2")
    assert launch.requested_engine() == "fsdp2"


@pytest.mark.parametrize("environment, says", [
    ({"ACCELERATE_USE_FSDP": "true"}, "FSDP_VERSION=1, but fsdp_version 2"),
    ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"},
     "nothing is offloaded: use configs/accelerate/fsdp2.yaml"),
    ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
     "ZERO_STAGE=3, but stage 2"),
    ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "zero.json"},
     "a file of DeepSpeed's is not read"),
    ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_USE_FSDP": "true"}, "both asked for"),
])  # fmt: skip
def test_settings_that_would_have_no_effect_are_refused(no_request, environment, says):
    for name, value in environment.items():
        no_request.setenv(name, value)
    with pytest.raises(UserError, match=says):
        launch.requested_engine()


def make(*, processes=2, fp16=False, graphed=False):
    accelerator = types.SimpleNamespace(num_processes=processes)
    scaler = torch.amp.GradScaler("cpu", enabled=fp16)
    precision = types.SimpleNamespace(scaler=scaler)
    config = types.SimpleNamespace(
        max_grad_norm=None, gradient_accumulation_steps=1,
        train=types.SimpleNamespace(cuda_graphs=graphed),
    )  # fmt: skip
    return engine.make_engine(config, accelerator, None, None, None, precision)


@pytest.mark.parametrize("name", launch.REQUESTS)
def test_an_engine_needs_processes(no_request, name):
    no_request.setenv(name, "true")
    no_request.setenv("FSDP_VERSION", "2")
    with pytest.raises(UserError, match="but there is one"):
        make(processes=1)


@pytest.mark.parametrize("name", launch.REQUESTS)
def test_training_by_cuda_graphs_is_refused_where_weights_are_in_parts(no_request, name):
    no_request.setenv(name, "true")
    no_request.setenv("FSDP_VERSION", "2")
    with pytest.raises(UserError, match="--config.train.cuda_graphs=False"):
        make(graphed=True)


def test_zero_is_refused_in_fp16_and_without_deepspeed(no_request):
    no_request.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match="not in fp16"):
        make(fp16=True)
    no_request.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install deepspeed"):
        launch.make_accelerator()
    no_request.setattr(importlib.util, "find_spec", lambda name: name == "deepspeed" or None)
    no_request.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="transformers is not installed: pip install transformers,"):
        launch.make_accelerator()


@pytest.mark.parametrize("requested, kind", [
    ("fsdp2", "MULTI_GPU"), ("fsdp2", "NO"), ("fsdp2", "DEEPSPEED"), (None, "FSDP"),
    (None, "DEEPSPEED"), ("zero2", "MULTI_GPU"), ("zero2", "FSDP"),
])  # fmt: skip
def test_what_accelerate_does_not_run_is_refused(requested, kind):
    report = types.SimpleNamespace(distributed_type=f"DistributedType.{kind}")
    with pytest.raises(UserError, match=f"but accelerate runs {kind}"):
        launch.require_reported(requested, report)
    for fine in (("fsdp2", "FSDP"), ("zero2", "DEEPSPEED"), (None, "MULTI_GPU"), (None, "NO")):
        launch.require_reported(fine[0], types.SimpleNamespace(distributed_type=fine[1]))


def test_an_engine_that_is_not_what_runs_is_refused(no_request):
    """Two processes, and accelerate wraps nothing; a ZeRO stage that DeepSpeed did not take."""
    accelerator = types.SimpleNamespace(num_processes=2, prepare_model=lambda network: network)
    precision = types.SimpleNamespace(scaler=None)
    config = types.SimpleNamespace(
        max_grad_norm=None, train=types.SimpleNamespace(cuda_graphs=False)
    )
    network = torch.nn.Linear(1, 1)
    with pytest.raises(UserError, match="DDP is asked for, but is not what runs"):
        engine.make_engine(config, accelerator, network, None, None, precision)
    assert not engine.sharding.is_sharded(network)
    zero = object.__new__(engine.ZeroEngine)
    for stage in (0, 2):
        zero.model = types.SimpleNamespace(zero_optimization_stage=lambda stage=stage: stage)
        assert zero.is_active() == (stage == 2)


def test_zero_drops_the_step_of_an_infinite_loss_with_finite_gradients():
    """DeepSpeed looks for NaN and infinity in the gradients only."""
    zero, weight = object.__new__(engine.ZeroEngine), torch.ones((), requires_grad=True)
    zero.micro_batches, zero.seen = 1, 0
    zero.model = types.SimpleNamespace(backward=lambda loss, scale_wrt_gas: loss.backward())
    for shift, finite in (1.0, True), (torch.inf, False), (torch.nan, False):
        weight.grad = None
        zero.backward(2 * weight + shift)
        assert weight.grad == 2 if finite else weight.grad.isnan()


@pytest.mark.slow
def test_the_launcher_s_request_for_one_process_is_refused(tmp_path):
    words = words_of("fsdp2")
    words[words.index("2")] = "1"
    status, output = runs.finish(
        runs.start_words(words, "train.py", *runs.arguments(tmp_path, train__num_workers=0))
    )
    errors = [line for line in output.splitlines() if line.startswith("error:")]
    assert status != 0 and len(errors) == 1 and "but there is one" in errors[0], output
