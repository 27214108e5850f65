"""The CUDA operators without a GPU: what surrounds the kernels (schemas, fakes, autograd, dispatch,
torch.compile), with the emulator in the kernels' place.
"""

import ctypes
import types

import emulator
import golden_cases
import ops_cases
import pytest
import torch
from ops_cases import around, error, make_block

from libs.model.block import compose_block
from libs.model.mamba import Mamba
from libs.ops import backends, describe_backends, gated_residual, modulated_norm, selective_scan
from libs.ops.cuda import adaln as cuda_adaln
from libs.ops.cuda import causal_conv1d as cuda_conv
from libs.ops.cuda import launch, launch_plan, mamba_block, self_check
from libs.ops.cuda import selective_scan as cuda_scan
from libs.ops.fusion import not_fused
from libs.ops.reference import (
    causal_conv1d_ref,
    gated_residual_ref,
    modulated_norm_ref,
    selective_scan_ref,
)
from utils import UserError

cuda_driver = pytest.importorskip("cuda.bindings.driver")


@pytest.fixture(scope="module")
def library():
    library = emulator.register()
    yield
    library._destroy()


@pytest.fixture
def gpu(library, poisoned_memory, monkeypatch):
    """The emulator's."""
    return emulator.install(monkeypatch)


@pytest.fixture
def dispatched(gpu, monkeypatch):
    """CPU tensors take the way of CUDA tensors."""
    monkeypatch.delenv("DIM_BACKEND", raising=False)
    monkeypatch.setattr(backends, "why_not", lambda operator, name, *rest: None)


def same(actual, expected, tolerance=1e-12):
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert actual[name].dtype == x.dtype, name
        golden_cases.assert_close(actual[name], x, tolerance, name)


SCAN_VARIANTS = [
    ((), {"delta_softplus": True, "return_last_state": True}, "permuted"),
    (("D",), {"delta_softplus": True}, "reversed"),
    (("D", "z", "delta_bias"), {"delta_softplus": True, "return_last_state": True}, "none"),
]


@pytest.mark.parametrize("absent, options, order", SCAN_VARIANTS)
def test_scan_gradients(gpu, absent, options, order):
    inputs, order = ops_cases.scan_inputs(absent=absent), ops_cases.make_order(order, 19)
    same(
        ops_cases.run(cuda_scan.selective_scan_cuda, inputs, order=order, **options),
        ops_cases.run(selective_scan_ref, inputs, order=order, **options),
    )


@pytest.mark.parametrize("absent, activation", [((), "silu"), (("bias",), None)])
def test_convolution_gradients(gpu, absent, activation):
    inputs, order = ops_cases.conv_inputs(absent=absent), ops_cases.make_order("permuted", 19)
    options = {"activation": activation, "order": order}
    same(
        ops_cases.run(cuda_conv.causal_conv1d_cuda, inputs, **options),
        ops_cases.run(causal_conv1d_ref, inputs, **options),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_gate_gradients(gpu, dtype):
    tolerance = 1e-5 if dtype == torch.float32 else 2.0**-6
    for norm, gate in (
        (cuda_adaln.modulated_norm_cuda, modulated_norm_ref),
        (cuda_adaln.gated_residual_cuda, gated_residual_ref),
    ):
        inputs = ops_cases.on("cpu", ops_cases.adaln_inputs(gate is gated_residual_ref), dtype)
        scale = {"drop_path_scale": torch.tensor([1.25, 0.0])} if "branch" in inputs else {}
        for out_dtype in (None, dtype):
            options = {"out_dtype": out_dtype, **scale}
            same(
                ops_cases.run(norm, inputs, **options), ops_cases.run(gate, inputs, **options),
                tolerance,
            )  # fmt: skip


def test_rows_are_copied_only_where_they_must():
    both = torch.randn(2, 19, 10)
    assert launch.as_rows(both[..., 5:]).data_ptr() == both[..., 5:].data_ptr()
    assert launch.as_rows(torch.randn(2, 5, 19).mT).is_contiguous()
    assert launch.as_vectors(torch.randn(33)[1:]).data_ptr() % 16 == 0
    for first, end, copied in ((4, 8, False), (5, 8, False), (5, 9, True)):  # 4 aligned, 3, 4
        given = torch.randn(2, 19, 16)[..., first:end]
        assert (cuda_conv._rows(given).data_ptr() != given.data_ptr()) == copied


# ---------------------------------------- the block


def block_results(forward, block, x, modulation):
    x, modulation = (v.clone().requires_grad_() for v in (x, modulation))
    block.zero_grad()
    out, kept = forward(x, modulation)
    (out.square().sum() + kept.float().square().sum()).backward()
    named = {name: p.grad.clone() for name, p in block.named_parameters()}
    return {"out": out.detach(), "x": x.grad, "modulation": modulation.grad, **named}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block(gpu, dtype, monkeypatch):
    """Against its definition: the same operators in float32, a rounding or two apart in bfloat16.
    """
    monkeypatch.setattr(mamba_block, "_SUMS_IN_FLOAT32", False)  # which the CPU has not
    block, x, modulation = make_block(16), torch.randn(2, 9, 16), torch.randn(2, 3, 16) / 2
    order, scale = torch.randperm(9), torch.tensor([1.25, 0.5])

    def fused(x, modulation):
        return mamba_block.mamba_block_cuda(
            x, modulation, scale, block.mixer.name_parameters(around(block, modulation)), order,
            dtype, False, torch.float32,
        )  # fmt: skip

    actual = block_results(fused, block, x, modulation)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        expected = block_results(
            lambda x, modulation: (
                compose_block(block.mixer, x, around(block, modulation), order, scale, None), x
            ),
            block, x, modulation,
        )  # fmt: skip
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        allowed = 1e-5 if dtype == torch.float32 else 0.05
        assert error(actual[name], value.double()) < allowed, name


# ---------------------------------------- as torch wants operators


@pytest.mark.parametrize("absent, options, order", SCAN_VARIANTS)
def test_scan_opcheck(gpu, absent, options, order):
    x = ops_cases.scan_inputs(L=7)
    order = launch.as_order(ops_cases.make_order(order, 7))
    z = None if "z" in absent else x["z"]
    tensors = [x[k] for k in ("u", "delta", "A", "B", "C", "D")] + [z, x["delta_bias"]]
    last = options.get("return_last_state", False)
    g_state = torch.randn(2, 5, 16) if last else torch.empty(0)
    rest = (order, options["delta_softplus"])
    g_y = torch.randn(2, 7, 5)
    torch.library.opcheck(torch.ops.dim.selective_scan_bwd, (g_y, g_state, *tensors, *rest, last))
    tensors = [None if t is None else t.requires_grad_() for t in tensors]
    torch.library.opcheck(torch.ops.dim.selective_scan, (*tensors, *rest, last))


def test_other_opchecks(gpu):
    x = ops_cases.conv_inputs(L=7)
    rest = (launch.as_order(ops_cases.make_order("permuted", 7)), True)
    g = torch.randn(2, 7, 5)
    torch.library.opcheck(torch.ops.dim.causal_conv1d_bwd, (g, *x.values(), *rest))
    tensors = [t.requires_grad_() for t in x.values()]
    torch.library.opcheck(torch.ops.dim.causal_conv1d, (*tensors, *rest))
    norm = [t.requires_grad_() for t in ops_cases.adaln_inputs(False).values()]
    torch.library.opcheck(torch.ops.dim.modulated_norm, (*norm, torch.bfloat16))
    gate = [t.requires_grad_() for t in ops_cases.adaln_inputs(True).values()]
    torch.library.opcheck(torch.ops.dim.gated_residual, (*gate, torch.ones(2), torch.float32))


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_mixer_has_no_graph_breaks(dispatched, dynamic):
    """A mixer, norm and gate around it, under torch.compile(fullgraph=True), forward and backward,
    at two lengths."""
    torch.manual_seed(0)
    mixer, parameters = Mamba(8, d_state=4), ops_cases.adaln_inputs(False)
    modulation, table, weight = (
        torch.nn.Parameter(parameters[k]) for k in ("modulation", "table", "weight")
    )

    def block(x, order):
        branch = mixer(modulated_norm(x, weight, modulation, table), order)
        return gated_residual(x, branch, modulation, table)

    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for length in (11, 12):
        x, order = torch.randn(2, length, 8), torch.randperm(length)
        results = []
        for model in (block, compiled):
            mixer.zero_grad()
            y = model(x, order)
            y.square().sum().backward()
            results.append({"y": y.detach()} | {k: p.grad for k, p in mixer.named_parameters()})
        same(*results, tolerance=1e-6)


def test_double_backward_is_refused(dispatched):
    x = {k: t.requires_grad_() for k, t in ops_cases.scan_inputs().items()}
    with pytest.raises(RuntimeError, match="second derivative; use backend='reference'"):
        torch.autograd.grad(selective_scan(**x).sum(), x["u"], create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_self_check_tells_right_from_wrong(gpu, monkeypatch, dtype):
    gpu.arch = 80  # without fp8, whose kernels are not emulated
    found = list(self_check.worst_errors(gpu, dtype))
    assert len(found) >= 13 and all(error <= allowed for _, error, allowed in found)
    run = emulator.run

    def spoil(plan, device, rows, scalars, outputs=None):
        run(plan, device, rows, scalars, outputs)
        for result in outputs.values() if outputs else (rows.get("y"), rows.get("out")):
            if result is not None:
                result[-1] += 0.1 * result.abs().max()

    monkeypatch.setattr(launch, "run", spoil)
    wrong = [w for w, error, allowed in self_check.worst_errors(gpu, dtype) if error > allowed]
    for what in ("scan V", "scan's gradients", "convolution", "gate", "gradients of norm"):
        assert any(line.startswith(what) for line in wrong), what


# ---------------------------------------- launching


class Driver:
    """Collects what would be launched: (arguments but the parameters, their 8-byte values)."""

    def __init__(self):
        self.launches = []

    def cuLaunchKernel(self, *arguments):
        *config, pointer, extra = arguments
        address = ctypes.c_void_p.from_address(pointer).value
        count = 20 if "sum_parts" in config[0] else launch_plan.ScanParams[None]
        values = list((ctypes.c_int64 * count).from_address(address))
        self.launches.append((tuple(config), values))
        return (0,)


@pytest.fixture
def driver(monkeypatch):
    """A driver that launches nothing, for tensors that are on the CPU."""
    driver = Driver()
    monkeypatch.setattr(launch, "driver", lambda: driver)
    monkeypatch.setattr(launch, "_make_context_current", lambda index: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    stream = types.SimpleNamespace(cuda_stream=77)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: stream)
    gpu = types.SimpleNamespace(function=lambda kernel, shared: f"{kernel.name} {shared}")
    monkeypatch.setattr(launch.Gpu, "of", staticmethod(lambda index: gpu))
    return driver


def test_what_is_launched(driver):
    """Parameters arrive in their fields, scratch does not overlap, sums read the parts' memory."""
    kernel = launch_plan.Kernel("source.cu", "walk", ())
    plan = launch_plan.Plan(
        launches=(launch_plan.Launch(kernel, (3, 2, 1), (64, 1, 1), 50000),),
        integers={"segments": 2, "segment_length": 10},
        scratch={"saved_states": (3, 5), "parts_A": (7, 5, 16), "parts_BC": (3, 5, 2)},
        sums={"parts_A": ("g_A", "float32"), "parts_BC": ("g_BC", "bfloat16")},
    )
    slots = launch_plan.ScanParams
    prepared = launch.prepare(plan, slots, 0)
    u, g_A, g_BC = torch.randn(2, 19, 10)[..., 5:], torch.empty(5, 16), torch.empty(5, 2)
    launch.run(
        prepared, u.device, {"u": u, "z": None},
        {"batch": 2, "D": g_A, "order": None, "delta_softplus": True}, {"g_A": g_A, "g_BC": g_BC},
    )  # fmt: skip
    (config, params), (sum_config, sums) = driver.launches
    assert config == ("walk 50000", 3, 2, 1, 64, 1, 1, 50000, 77)
    assert sum_config == ("sum_parts 0", 2, 1, 1, 256, 1, 1, 0, 77)
    found = {name: params[slots[name]] for name in slots if name}
    assert params[slots["u"] :][:3] == [u.data_ptr(), 190, 10]
    assert (found["batch"], found["segments"], found["segment_length"]) == (2, 2, 10)
    assert found["delta_softplus"] == 1 and found["D"] == g_A.data_ptr()
    assert found["z"] == found["order"] == found["A"] == 0
    # 3 * 5 floats, and the next tensor at the next multiple of 256 bytes
    assert found["parts_A"] - found["saved_states"] == 256 and found["saved_states"] % 64 == 0
    assert sums[:5] == [found["parts_A"], g_A.data_ptr(), 7, 80, 1]
    assert sums[5:10] == [found["parts_BC"], g_BC.data_ptr(), 3, 10, 0] and sums[13] == 0


def test_the_forward_is_divided_by_what_fills_the_gpu():
    """The plan's choice, at the shapes of the README's models on a GPU of 132 multiprocessors."""
    def lanes_and_segments(batch, length, channels=3072):
        variant = launch_plan.forward_variant(batch, length, channels, 16, 132)
        return variant.lanes, variant.segments > 1

    assert lanes_and_segments(96, 366) == lanes_and_segments(16, 1230) == (1, False)
    assert lanes_and_segments(8, 366) == lanes_and_segments(4, 4494) == (4, False)
    assert lanes_and_segments(2, 366) == lanes_and_segments(2, 9806) == (8, False)
    assert lanes_and_segments(1, 1230, 256) == (8, False)
    assert lanes_and_segments(1, 9806, 256) == (1, True)
    assert launch_plan.forward_variant(2, 366, 3072, 17, 132).groups == 4


# ---------------------------------------- dispatch


def test_without_a_gpu_the_reason_is_told(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    line = describe_backends("cuda")[0]
    assert line.startswith("selective_scan: reference") and "no CUDA device" in line
    with pytest.raises(UserError, match="takes CUDA tensors, not cpu"):
        ops_cases.scan(**ops_cases.scan_inputs(), backend="cuda")
    monkeypatch.setenv("DIM_FUSED", "0")
    assert not_fused(torch.device("cuda"), torch.float32, 64, 16, 3) == "DIM_FUSED=0"
