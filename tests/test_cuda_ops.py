"""The CUDA backend as a citizen of PyTorch, on a GPU: opcheck, torch.compile, CUDA graphs,
autocast, streams, devices, determinism, and the golden cases. Numbers over shapes:
test_cuda_kernels.py.
"""

import os
import shutil
import threading
import time

import golden_cases
import ops_cases
import pytest
import torch
from ops_cases import on, run

from libs.model.mamba import Mamba
from libs.ops import causal_conv1d, describe_backends, reference, selective_scan
from libs.ops.cuda import launch, self_check
from utils import UserError

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("exact_float32")]
reference_scan = reference.selective_scan_ref


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


def close(actual, expected, tol):
    for name in expected:
        assert actual[name].dtype == expected[name].dtype, name
        golden_cases.assert_close(actual[name], expected[name], tol, name)


def order_of(length, device="cuda"):
    return ops_cases.make_order("permuted", length).to(device)


# ---------------------------------------- PyTorch


def test_chosen_automatically():
    *operators, block = describe_backends("cuda")
    assert all(": cuda (" in line for line in operators) and block == "mamba_block: fused"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opchecks(dtype):
    x = on("cuda", ops_cases.scan_inputs(L=17, D=33), dtype)
    order = launch.as_order(order_of(17))
    arguments = [x.get(k) for k in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")]
    g_y, g_state = torch.randn_like(x["u"]), torch.randn(2, 33, 16, device="cuda")
    ops_cases.scan(**x, order=order, backend="cuda")  # registers the operators
    dim = torch.ops.dim
    torch.library.opcheck(dim.selective_scan_bwd, (g_y, g_state, *arguments, order, True, True))
    arguments = [t.requires_grad_() for t in arguments]
    torch.library.opcheck(dim.selective_scan, (*arguments, order, True, True))
    arguments[6] = None
    torch.library.opcheck(dim.selective_scan, (*arguments, None, True, False))

    x = on("cuda", ops_cases.conv_inputs(L=17, D=33), dtype)
    causal_conv1d(**x, backend="cuda")
    arguments, g_y = list(x.values()), torch.randn_like(x["x"])
    torch.library.opcheck(dim.causal_conv1d_bwd, (g_y, *arguments, order, True))
    arguments = [t.requires_grad_() for t in arguments]
    torch.library.opcheck(dim.causal_conv1d, (*arguments, order, True))


def mixer_and_input(length=50, batch=2):
    torch.manual_seed(0)
    return Mamba(64).cuda(), torch.randn(batch, length, 64, device="cuda"), order_of(length)


def step(model, mixer, x, order):
    mixer.zero_grad()
    y = model(x, order)
    y.float().square().sum().backward()
    return {"y": y.detach()} | {k: p.grad.clone() for k, p in mixer.named_parameters()}


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_mixer_has_no_graph_breaks(autocast):
    mixer, x, order = mixer_and_input()
    torch.compiler.reset()
    # Inductor's launchers want a C compiler.
    backend = "inductor" if shutil.which("gcc") or shutil.which("cc") else "aot_eager"
    compiled = torch.compile(mixer, fullgraph=True, backend=backend)
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
        expected, actual = (step(model, mixer, x, order) for model in (mixer, compiled))
    close(actual, expected, 3e-2 if autocast else 1e-4)  # inductor fuses and rounds otherwise


def test_cuda_graph():
    """Captured once and replayed on other numbers, forward and backward."""
    mixer, x, order = mixer_and_input()
    static = x.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(mixer, mixer, static, order)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    mixer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        y = mixer(static, order)
        y.square().sum().backward()
    static.copy_(x.flip(0) * 0.5)
    graph.replay()
    captured = {"y": y.detach().clone()}
    captured |= {k: p.grad.clone() for k, p in mixer.named_parameters()}
    # Equal but for cuBLAS, which may choose otherwise in a capture.
    close(captured, step(mixer, mixer, x.flip(0) * 0.5, order), 1e-5)


def test_first_use_in_a_capture_is_told():
    """Of a kernel that nobody has loaded: 27 states, float16."""
    x = on("cuda", ops_cases.scan_inputs(B=1, L=5, D=8, N=27), torch.float16)
    selective_scan(**x, backend="cuda")
    launch.Gpu.of.cache_clear()  # whatever ran before this test
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(UserError, match="before this graph capture"), torch.cuda.graph(graph):
        selective_scan(**x, backend="cuda")
    torch.cuda.synchronize()
    selective_scan(**x, backend="cuda")


def test_another_stream():
    """The kernels wait for what is before them on their stream, and nothing else."""
    x = on("cuda", ops_cases.scan_inputs(B=4, L=200, D=128))
    expected = run(ops_cases.scan, x, backend="cuda")
    stream = torch.cuda.Stream()
    big = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        late = {k: torch.full_like(t, float("nan")) for k, t in x.items()}
        for _ in range(20):
            big = big @ big * 1e-3  # the stream is busy while the inputs wait
        late = {k: late[k].copy_(t) for k, t in x.items()}
        actual = run(ops_cases.scan, late, backend="cuda")
        conv = causal_conv1d(late["u"], torch.ones(128, 3, device="cuda"), backend="cuda")
    stream.synchronize()
    assert_equal(actual, expected)
    assert torch.equal(
        conv, causal_conv1d(x["u"], torch.ones(128, 3, device="cuda"), backend="cuda")
    )


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_the_second_gpu():
    """With the first one current."""
    assert torch.cuda.current_device() == 0
    first = ops_cases.scan_inputs(D=70)
    options = {"backend": "cuda", "delta_softplus": True, "return_last_state": True}
    expected = run(selective_scan, on("cuda:0", first), order=order_of(19), **options)
    actual = run(selective_scan, on("cuda:1", first), order=order_of(19, "cuda:1"), **options)
    assert all(x.device.index == 1 for x in actual.values())
    assert_equal({k: x.to("cuda:0") for k, x in actual.items()}, expected)
    assert torch.cuda.current_device() == 0


def test_a_thread_of_its_own():
    """A thread that never used CUDA before has no context."""
    x = on("cuda", ops_cases.scan_inputs())
    expected, results = selective_scan(**x, backend="cuda", delta_softplus=True), []
    thread = threading.Thread(
        target=lambda: results.append(selective_scan(**x, backend="cuda", delta_softplus=True))
    )
    thread.start()
    thread.join()
    assert torch.equal(results[0], expected)


def test_two_runs_are_bit_equal():
    """Of shapes that take several blocks and segments."""
    for B, L, D in ((2, 700, 96), (16, 61, 256)):
        inputs, order = on("cuda", ops_cases.scan_inputs(B=B, L=L, D=D)), order_of(L)
        conv = on("cuda", ops_cases.conv_inputs(B=B, L=L, D=D))
        scans = [run(ops_cases.scan, inputs, backend="cuda", order=order) for _ in range(3)]
        convs = [run(causal_conv1d, conv, backend="cuda", order=order) for _ in range(3)]
        for results in (scans, convs):
            assert_equal(results[1], results[0])
            assert_equal(results[2], results[0])


def test_kernels_that_compute_wrong_numbers_are_refused(monkeypatch, tmp_path):
    """Every call, until they compute right ones; what passed is noted."""
    monkeypatch.setenv("DIM_CACHE_DIR", str(tmp_path))
    x = on("cuda", ops_cases.scan_inputs())
    with monkeypatch.context() as patch:
        launch.Gpu.of.cache_clear()
        patch.setattr(
            reference, "selective_scan_ref",
            lambda *inputs: tuple(1.1 * y for y in reference_scan(*inputs)),
        )  # fmt: skip
        for _ in range(2):
            with pytest.raises(UserError, match="compute wrong numbers .* is off by 0.09"):
                ops_cases.scan(**x, backend="cuda")
    assert not (tmp_path / "checked").exists()
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        actual = ops_cases.scan(**x, backend="cuda")
    golden_cases.assert_close(actual, ops_cases.scan(**x, backend="reference"), 1e-5)
    assert len(list((tmp_path / "checked").iterdir())) == 1
    launch.Gpu.of.cache_clear()
    monkeypatch.setattr(self_check, "worst_errors", None)  # not called
    ops_cases.scan(**x, backend="cuda")


def test_a_model_s_kernels_compile_in_ten_seconds(monkeypatch, tmp_path):
    """From an empty cache, the self-check included; on a machine of few cores the bound is its
    cores' affair."""
    monkeypatch.setenv("DIM_CACHE_DIR", str(tmp_path))
    launch.Gpu.of.cache_clear()
    x, start = on("cuda", ops_cases.scan_inputs(), torch.bfloat16), time.monotonic()
    ops_cases.scan(**x, backend="cuda")
    seconds = time.monotonic() - start
    print(f"compiled and checked in {seconds:.1f} s")
    assert seconds < 10 or os.cpu_count() < 8


# ---------------------------------------- what is refused


def test_what_cuda_cannot_is_told_or_left_to_the_reference():
    x = on("cuda", {k: t.double() for k, t in ops_cases.scan_inputs().items()})
    with pytest.raises(UserError, match="backend='reference' for float64"):
        ops_cases.scan(**x, backend="cuda")
    assert torch.equal(ops_cases.scan(**x), ops_cases.scan(**x, backend="reference"))
    x = on("cuda", ops_cases.scan_inputs(N=65))
    with pytest.raises(UserError, match="not for 65 states"):
        ops_cases.scan(**x, backend="cuda")
    assert torch.equal(ops_cases.scan(**x), ops_cases.scan(**x, backend="reference"))
    x = on("cuda", ops_cases.conv_inputs(W=9))
    with pytest.raises(UserError, match="not for 9 taps"):
        causal_conv1d(**x, backend="cuda")
    x = on("cuda", ops_cases.scan_inputs())
    with pytest.raises(ValueError, match="order must be on cuda:0, got cpu"):
        ops_cases.scan(**x, order=torch.arange(19))
