"""Sampling and the training step on a GPU: graphs give the eager numbers and follow the weights,
and the host waits for nothing.
"""

import contextlib
import functools
import gc
import itertools
import types

import pytest
import torch
from torch import nn

from configs.common import d
from libs.data.codec import PixelCodec
from libs.diffusion import ImageNoise, make_guided, reuse_inner, sample
from libs.model.dim import DiM
from libs.model.heads import add_heads
from libs.model.routing import Routing
from libs.runtime.cuda_graphs import LARGE, CudaCapture, GraphedTraining, SamplingNetwork
from libs.runtime.launch import Precision
from libs.train.ema import EMA
from libs.train.engine import Engine
from libs.train.loader import Prefetcher
from libs.train.losses import Objective, make_draws
from libs.train.resume import Progress, TrainState
from libs.train.step import finish_step, take_step
from sde import VPSDE, make_process

pytestmark = pytest.mark.cuda
GPU = torch.device("cuda", 0)
CLASSES = 10
HEADS = {"internal": d(weight=0.5, block=1), "repa": d(weight=0.5, block=3)}
LOSSES = [{"mse": 1.0}, {"mse": 1.0, **HEADS}]


def make_dim():
    torch.manual_seed(0)
    model = DiM(input_size=16, in_channels=3, dim=128, depth=5, num_classes=CLASSES)
    add_heads(model, HEADS, training=True, repa={"feature_dim": 8})
    model.routing = Routing(model, first=2)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape)
    return model.to(GPU).eval()


def make_inputs(batch=2, side=16, labels=True, seed=0):
    generator = torch.Generator().manual_seed(seed + batch)
    x = torch.randn(batch, 3, side, side, generator=generator).to(GPU)
    t = (999 * torch.rand(batch, generator=generator)).to(GPU)
    return x, t, torch.randint(CLASSES, (batch,), generator=generator).to(GPU) if labels else None


def autocast(dtype):
    return torch.autocast("cuda", dtype) if dtype else contextlib.nullcontext()


@contextlib.contextmanager
def no_synchronisation():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_capture_frees_no_graph_of_before(request):
    """One that only the garbage collector finds, whose end would invalidate the capture."""
    request.addfinalizer(functools.partial(gc.set_threshold, *gc.get_threshold()))
    gc.set_threshold(10**6)
    capture, x, calls = CudaCapture(GPU), torch.zeros(4, device=GPU), []
    stray = [capture.forward(lambda: (x + 1,))]
    stray.append(stray)
    del stray

    def call():
        gc.set_threshold(1 if calls else 10**6)  # the first call is the warm-up
        calls.append([[] for _ in range(1000)])
        return (x + 2,)

    replay, (out,) = capture.forward(call)
    replay()
    assert out.tolist() == [2.0] * 4


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("frozen", [True, False])  # autocast caches casts of weights that train
@torch.no_grad()
def test_graphs_are_the_eager_average_bit_for_bit(dtype, frozen):
    """While the average moves."""
    model = make_dim()
    ema = EMA(model, 0.5)
    ema.model.requires_grad_(not frozen)
    fast = SamplingNetwork(ema.model, dtype, graphs=True)
    shapes = [(2, 16, True), (2, 16, False), (3, 16, True), (2, 24, True)]
    calls = list(itertools.product(shapes, [(), ("internal",), (3, "internal")]))
    for repeat in range(4):
        for parameter in model.parameters():
            parameter.data += 0.01 * torch.randn_like(parameter)
        ema.update(model)
        for shape, hidden in calls:
            inputs = make_inputs(*shape, seed=repeat)
            with autocast(dtype):
                expected, expected_inner = ema.model(*inputs, hidden=(3, "internal"))
            with fast.ready() as network, autocast(dtype):
                found = network(*inputs, **({"hidden": hidden} if hidden else {}))
            found, inner = found if hidden else (found, {})
            assert found.dtype == expected.dtype and torch.equal(found, expected)
            assert all(torch.equal(inner[key], expected_inner[key]) for key in hidden)
            filler = torch.full((1 << 22,), float("nan"), device=GPU)  # over memory that was freed
            del filler
    assert len(fast._graphs) == len(calls)


@torch.no_grad()
def test_large_and_small_calls_by_turns():
    """Graphs with and without cuBLAS's workspace share a pool; both equal the eager call but for
    the rounding of bfloat16 products in another order of sums.
    """
    model, dtype = make_dim(), torch.bfloat16
    fast = SamplingNetwork(model, dtype, graphs=True)
    for batch in (LARGE // (3 * 16 * 16) + 1, 2) * 3:
        inputs = make_inputs(batch)
        with autocast(dtype), fast.ready() as network:
            expected, found = model(*inputs).float(), network(*inputs).float()
        assert (found - expected).norm() < 0.02 * expected.norm()
    assert len(fast._graphs) == 2


@torch.no_grad()
def test_memory_is_given_back():
    model, inputs = make_dim(), make_inputs(batch=64)
    with autocast(torch.bfloat16):
        model(*inputs)
    fast = SamplingNetwork(model, torch.bfloat16, graphs=True)

    def evaluation():
        for _ in range(4):
            with fast.ready() as network, autocast(torch.bfloat16):
                network(*inputs)
        held = torch.cuda.memory_allocated()
        assert len(fast._graphs) == 1
        fast.release()
        return held

    evaluation()  # leaves the library's own workspaces behind
    torch.cuda.empty_cache()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    assert evaluation() > allocated
    assert torch.cuda.memory_allocated() == allocated
    assert torch.cuda.memory_reserved() <= reserved


VP = [
    ("dpm_solver", "discrete"), ("dpm_solver_pp_2m", "discrete"), ("euler", "discrete"),
    ("dpm_solver_upsample_g", "discrete"), ("DPMSolverMultistepScheduler", "discrete"),
    ("dpm_solver", "vpsde"), ("euler_maruyama_sde", "vpsde"), ("DDIMScheduler", "vpsde"),
]  # fmt: skip
FLOW = [("heun", "flow"), ("euler_maruyama_flow", "flow"), ("dpm_solver_pp_2m", "flow")]


@pytest.mark.parametrize("algorithm, process, pred", [
    *((*case, pred) for case in VP + FLOW for pred in ("noise_pred", "x0_pred")),
    *((*case, "velocity_pred") for case in [*FLOW, ("adams_bashforth", "flow")]),
    ("euler", "flow_from_discrete", "noise_pred"),
])  # fmt: skip
def test_no_step_of_a_sampler_makes_the_host_wait(algorithm, process, pred):
    """And graphs give the eager network's images, under both guidances and one, and with reuse."""
    model, process, (_, _, y) = make_dim(), make_process(process), make_inputs()
    settings = d(cfg=True, scale=0.7, guidance_interval=(0.2, 1))
    settings.update(internal_scale=0.5, internal_interval=(0.4, 1))
    guidance = dict(
        pred=pred, null_label=CLASSES, settings=settings,
        upsample={"m": 2} if algorithm == "dpm_solver_upsample_g" else None,
    )  # fmt: skip

    def draw(network):
        network = reuse_inner(network, 2, 4) if pred == "x0_pred" else network
        noise = ImageNoise(0, range(2), (3, 16, 16))
        z, output = noise.draw().to(GPU), make_guided(network, process, y, **guidance)
        options = dict(pred=pred, algorithm=algorithm, steps=6, noise=noise)
        return lambda: sample(output, process, z, **options)

    with autocast(torch.bfloat16):
        expected = draw(model)()
        with SamplingNetwork(model, torch.bfloat16, graphs=True).ready() as network:
            draw(network)()
            again = draw(network)
            with no_synchronisation():
                found = again()
    assert torch.equal(found, expected)


def pinned_batches():
    generator = torch.Generator().manual_seed(0)
    while True:
        x = torch.randn(4, 3, 16, 16, generator=generator)
        features = torch.randn(4, 16, 8, generator=generator)
        y = torch.randint(CLASSES, (4,), generator=generator)
        yield [part.pin_memory() for part in (x, y, features)]


def draw_randomly(k, size, routing=(6, 4, 4)):
    """Of batch k; the first of them are routed."""
    options = dict(shape=(3, 16, 16), depth=5, encoding=False, device=GPU, routing=routing)
    return make_draws(1, k, size=size, **options)


def make_objective(p_uncond, weights):
    process, pred = VPSDE(), "noise_pred"
    if "internal" in weights:
        process, pred = make_process("flow", times="logit_normal"), "velocity_pred"
    return Objective(
        process, PixelCodec(), pred=pred, weights=weights, p_uncond=p_uncond, null_label=CLASSES
    )


@pytest.mark.parametrize("graphed", [False, True])
@pytest.mark.parametrize("name", ["no", "bf16", "fp16"])
def test_a_training_step_waits_once_and_only_for_its_verdict(name, graphed):
    """All of a step but reading the verdict, in which an event is waited for."""
    accelerator = types.SimpleNamespace(
        device=GPU, num_processes=1, process_index=0, reduce=lambda tensor, how: tensor
    )
    model, precision = make_dim().train(), Precision(name, GPU)
    model.drop_path = 0.2
    ema = EMA(model, 0.99)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    called = GraphedTraining(model) if graphed else model
    engine = Engine("one process", called, model, optimizer, precision.scaler, 1.0)
    state, outcomes = TrainState(model, {"nnet_ema": ema}, engine, precision, Progress()), []
    batches = Prefetcher(pinned_batches(), GPU)
    objective = make_objective(0.1, LOSSES[1])
    for k in itertools.count():
        with no_synchronisation() if k > 1 else contextlib.nullcontext():
            draws = draw_randomly(k, 8, routing=(10**9, 4, 4))
            stats = take_step(
                accelerator, state, objective, batches, draws, accumulation=2, lr=1e-4,
                stop=types.SimpleNamespace(requested=False),
            )
            finite = max(stats.loss, stats.grad_norm) < float("inf")
            if not finite:  # an overflow is rare, and may ask for the new loss scale
                torch.cuda.set_sync_debug_mode("default")
            outcomes.append(finish_step(state, stats))
        if outcomes.count("ok") == 4:
            break
        assert k < 30, outcomes
    assert set(outcomes) <= ({"ok", "overflow"} if name == "fp16" else {"ok"})
    if graphed:
        assert len(engine.model._graphs) == 1


def trained(dtype, graphed, uncond, weights):
    """(losses, weights) of some AdamW steps with stochastic depth and clipping."""
    model, objective = make_dim().train(), make_objective(None if uncond else 0.1, weights)
    model.drop_path = 0.2
    called = GraphedTraining(model) if graphed else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    losses = []
    for step in range(5):
        optimizer.zero_grad(set_to_none=True)
        for k in range(2):
            x, _, y = make_inputs(4, seed=step)
            with autocast(dtype):
                features = x[:, :, ::4, ::4].flatten(2).mT.repeat(1, 1, 3)[..., :8]  # (4, 16, 8)
                draws = draw_randomly(2 * step + k, 4)
                loss = objective(called, x, y, draws, features).mean()
            loss.backward()
            losses.append(loss.detach())
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    if graphed:
        assert len(called._graphs) == 2
    return torch.stack(losses), {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("uncond", [False, True])
@pytest.mark.parametrize("weights", LOSSES)
def test_training_by_graphs_makes_the_eager_steps(dtype, uncond, weights):
    """Up to what atomic sums of embeddings and products of another workspace leave; with heads,
    whose losses read features.
    """
    found, trained_weights = trained(dtype, True, uncond, weights)
    expected, expected_weights = trained(dtype, False, uncond, weights)
    assert ((found - expected).abs() <= 1e-4 * expected.abs()).all(), (found, expected)
    apart = max((trained_weights[n] - w).abs().max().item() for n, w in expected_weights.items())
    parts = ["head"] + ["heads.internal.linear", "heads.repa.layers.0"] * ("repa" in weights)
    before = dict(make_dim().named_parameters())
    moved = (trained_weights[f"{part}.weight"] - before[f"{part}.weight"] for part in parts)
    assert apart <= 0.05 * min(difference.abs().max().item() for difference in moved)
