"""The CUDA operators without a GPU: what surrounds the kernels (schemas, fakes, autograd, dispatch,
torch.compile), with the reference in the kernels' place on the CPU.
"""

import concurrent.futures
import ctypes
import logging
import sys
import types

import golden_cases
import ops_cases
import pytest
import torch

from libs.model.mamba import Mamba
from libs.ops import backends, causal_conv1d, describe_backends, peers, selective_scan
from libs.ops.backends import Backend
from libs.ops.cuda import causal_conv1d as cuda_conv
from libs.ops.cuda import launch, launch_plan, self_check
from libs.ops.cuda import selective_scan as cuda_scan
from libs.ops.mamba_block import not_fused
from libs.ops.reference import causal_conv1d_ref, selective_scan_ref
from utils import UserError

cuda_driver = pytest.importorskip("cuda.bindings.driver")


def in_a_thread(function):
    """Below the dispatcher torch records no gradients in the thread it was called in."""

    def call(*args):
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            return pool.submit(function, *args).result()

    return call


def _gradients(outputs, inputs, g):
    """Gradients of the inputs; empty ones for absent inputs."""
    outputs = [y for y, x in zip(outputs, g, strict=True) if x is not None]
    g = [x for x in g if x is not None]
    present = [x for x in inputs if x is not None]
    found = iter(torch.autograd.grad(outputs, present, g, allow_unused=True))
    results = (None if x is None else next(found) for x in inputs)
    return [
        torch.empty(0) if x is None else torch.zeros_like(x) if r is None else r.contiguous()
        for x, r in zip(inputs, results, strict=True)
    ]


def scan_fwd(*args):
    *tensors, order, softplus, return_last_state = args
    assert len({x.dtype for x in (*tensors[:2], *tensors[3:5])}) == 1, "sequences of one dtype"
    assert all(x is None or x.dtype == torch.float32 for x in (tensors[2], tensors[5], tensors[7]))
    y, last = selective_scan_ref(*tensors, softplus, order, True)
    return y.contiguous(), last.contiguous() if return_last_state else torch.empty(0)


@in_a_thread
def scan_bwd(g_y, g_last_state, *args):
    *tensors, order, softplus = args
    inputs = [None if x is None else x.detach().requires_grad_() for x in tensors]
    outputs = selective_scan_ref(*inputs, softplus, order, True)
    g = _gradients(outputs, inputs, (g_y, g_last_state))
    return *g[:3], torch.stack(g[3:5]), *g[5:]


def conv_fwd(x, weight, bias, order, silu):
    return causal_conv1d_ref(x, weight, bias, "silu" if silu else None, order).contiguous()


@in_a_thread
def conv_bwd(g_y, *args):
    *tensors, order, silu = args
    inputs = [None if x is None else x.detach().requires_grad_() for x in tensors]
    y = causal_conv1d_ref(*inputs, "silu" if silu else None, order)
    return tuple(_gradients((y,), inputs, (g_y,)))


@pytest.fixture(scope="module", autouse=True)
def reference_as_kernels():
    library = torch.library.Library("dim", "IMPL")
    library.impl("selective_scan_fwd", scan_fwd, "CPU")
    library.impl("selective_scan_bwd", scan_bwd, "CPU")
    library.impl("causal_conv1d_fwd", conv_fwd, "CPU")
    library.impl("causal_conv1d_bwd", conv_bwd, "CPU")
    yield
    library._destroy()


@pytest.fixture
def dispatched(monkeypatch):
    """CPU tensors take the way of CUDA tensors."""
    monkeypatch.delenv("DIM_BACKEND", raising=False)
    for operator, run in (
        ("selective_scan", cuda_scan.selective_scan_cuda),
        ("causal_conv1d", cuda_conv.causal_conv1d_cuda),
    ):
        table = sys.modules[f"libs.ops.{operator}"].BACKENDS
        monkeypatch.setitem(
            table, "cuda", Backend(None, lambda device, dtype, size: None, run, str)
        )


def same(actual, expected, tolerance=0.0):
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert actual[name].dtype == x.dtype, name
        golden_cases.assert_close(actual[name], x, tolerance or 1e-12, name)


SCAN_VARIANTS = [
    ((), {"delta_softplus": True, "return_last_state": True}, "permuted"),
    (("D",), {"delta_softplus": True}, "reversed"),
    (("z", "delta_bias"), {"delta_softplus": True}, "none"),
    (("D", "z", "delta_bias"), {"delta_softplus": True, "return_last_state": True}, "none"),
]


@pytest.mark.parametrize("absent, options, order", SCAN_VARIANTS)
def test_scan_gradients(absent, options, order):
    inputs, order = ops_cases.scan_inputs(absent=absent), ops_cases.make_order(order, 19)
    same(
        ops_cases.run(cuda_scan.selective_scan_cuda, inputs, order=order, **options),
        ops_cases.run(selective_scan_ref, inputs, order=order, **options),
    )


@pytest.mark.parametrize("absent, activation", [((), "silu"), (("bias",), None)])
def test_convolution_gradients(absent, activation):
    inputs, order = ops_cases.conv_inputs(absent=absent), ops_cases.make_order("permuted", 19)
    options = {"activation": activation, "order": order}
    same(
        ops_cases.run(cuda_conv.causal_conv1d_cuda, inputs, **options),
        ops_cases.run(causal_conv1d_ref, inputs, **options),
    )


def test_mixed_dtypes():
    """As the mixer makes them under autocast, and a mixture that only float32 holds."""
    inputs = ops_cases.scan_inputs()
    for low in (("u", "delta", "B", "C", "z"), ("u", "C"), ("D", "A")):
        mixed = {k: x.bfloat16() if k in low else x for k, x in inputs.items()}
        same(
            ops_cases.run(cuda_scan.selective_scan_cuda, mixed, delta_softplus=True),
            ops_cases.run(selective_scan_ref, mixed, delta_softplus=True),
            2**-7,  # one rounding to bfloat16 more
        )
    x = ops_cases.conv_inputs()
    for low in (("x",), ("weight", "bias")):
        mixed = {k: t.bfloat16() if k in low else t for k, t in x.items()}
        same(
            ops_cases.run(cuda_conv.causal_conv1d_cuda, mixed),
            ops_cases.run(causal_conv1d_ref, mixed),
            2**-7,
        )


def test_a_last_axis_with_strides_is_copied_once(monkeypatch):
    """What the backward saves is the copy, and other strides are passed on."""
    copies, contiguous = [], torch.Tensor.contiguous
    monkeypatch.setattr(
        torch.Tensor, "contiguous", lambda x, **kw: copies.append(x.shape) or contiguous(x, **kw)
    )
    both = torch.randn(2, 19, 10, requires_grad=True)
    assert launch.as_rows(both[..., 5:]).data_ptr() == both[..., 5:].data_ptr() and not copies
    x = torch.randn(2, 5, 19).mT
    assert launch.as_rows(x).is_contiguous() and copies == [(2, 19, 5)]
    assert launch.as_rows(x[:, :, :1]) is not None
    assert launch.as_rows(torch.empty(1).as_strided((2, 1, 1), (0, 2**31, 1))) is not None


@pytest.mark.parametrize("absent, options, order", SCAN_VARIANTS)
def test_scan_opcheck(absent, options, order):
    x = ops_cases.scan_inputs(L=7, absent=absent)
    order = launch.as_order(ops_cases.make_order(order, 7))
    softplus = options.get("delta_softplus", False)
    arguments = [x.get(k) for k in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")]
    arguments += [order, softplus]
    last = options.get("return_last_state", False)
    g_y, g_state = torch.randn(2, 7, 5), torch.randn(2, 5, 16) if last else None
    torch.library.opcheck(torch.ops.dim.selective_scan_bwd, (g_y, g_state, *arguments))
    arguments = [
        t.requires_grad_() if t is not None and t is not order and t is not softplus else t
        for t in arguments
    ]
    torch.library.opcheck(torch.ops.dim.selective_scan_fwd, (*arguments, last))


@pytest.mark.parametrize("absent, activation", [((), "silu"), (("bias",), None)])
def test_convolution_opcheck(absent, activation):
    x = ops_cases.conv_inputs(L=7, absent=absent)
    order = launch.as_order(ops_cases.make_order("permuted", 7))
    tensors = [x["x"], x["weight"], x.get("bias")]
    rest = (order, activation == "silu")
    torch.library.opcheck(
        torch.ops.dim.causal_conv1d_bwd, (torch.randn(2, 7, 5), *tensors, *rest)
    )
    tensors = [None if t is None else t.requires_grad_() for t in tensors]
    torch.library.opcheck(torch.ops.dim.causal_conv1d_fwd, (*tensors, *rest))


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_mixer_has_no_graph_breaks(dispatched, dynamic):
    """A mixer under torch.compile(fullgraph=True), forward and backward, at two lengths."""
    torch.manual_seed(0)
    mixer = Mamba(8, d_state=4)
    torch.compiler.reset()
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for length in (11, 12):
        x, order = torch.randn(2, length, 8), torch.randperm(length)
        results = []
        for model in (mixer, compiled):
            model.zero_grad()
            y = model(x, order)
            y.square().sum().backward()
            results.append({"y": y.detach()} | {k: p.grad for k, p in mixer.named_parameters()})
        same(*results, tolerance=1e-6)


def test_autocast_leaves_precision_alone(dispatched):
    torch.manual_seed(0)
    inputs = ops_cases.scan_inputs()
    expected = ops_cases.run(selective_scan_ref, inputs, delta_softplus=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same(ops_cases.run(selective_scan, inputs, delta_softplus=True), expected)


def test_double_backward_is_refused(dispatched):
    x = {k: t.requires_grad_() for k, t in ops_cases.scan_inputs().items()}
    with pytest.raises(RuntimeError, match="second derivative; use backend='reference'"):
        torch.autograd.grad(selective_scan(**x).sum(), x["u"], create_graph=True)
    x = {k: t.requires_grad_() for k, t in ops_cases.conv_inputs().items()}
    with pytest.raises(RuntimeError, match="second derivative; use backend='reference'"):
        torch.autograd.grad(causal_conv1d(**x).sum(), x["x"], create_graph=True)


def test_gradient_of_the_last_state_alone(dispatched):
    x = {k: t.requires_grad_() for k, t in ops_cases.scan_inputs(absent=("z", "D")).items()}
    wanted = [x[k] for k in ("u", "delta", "A", "B")]
    gradients = [
        torch.autograd.grad(
            ops_cases.scan(**x, return_last_state=True, backend=name)[1].sum(), wanted
        )
        for name in ("cuda", "reference")
    ]
    for actual, expected in zip(*gradients, strict=True):
        golden_cases.assert_close(actual, expected, 1e-6)


# ---------------------------------------- launching


class Driver:
    """Keeps what would be launched: (arguments but the parameters, bytes of the parameters)."""

    def __init__(self, error=0):
        self.launches, self.error, self.size = [], error, 0

    def cuLaunchKernel(self, *arguments):
        *config, pointer, extra = arguments
        address = ctypes.c_void_p.from_address(pointer).value
        self.launches.append((tuple(config), ctypes.string_at(address, self.size)))
        return (self.error,)


@pytest.fixture
def driver(monkeypatch):
    """A driver that launches nothing, for tensors that are on the CPU."""
    driver = Driver()
    monkeypatch.setattr(launch, "_driver", lambda: driver)
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
        scratch=(
            launch_plan.Scratch("checkpoints", (3, 5), "float32"),
            launch_plan.Scratch("parts_A", (7, 5, 16), "float32"),
        ),
        integers={"segments": 2, "segment_length": 10},
        sums=(
            launch_plan.Sum("parts_A", "g_A", (5, 16)),
            launch_plan.Sum("parts_A", "g_B", (5, 2), "bfloat16"),
        ),
    )
    prepared = launch.prepare(plan, launch_plan.ScanParams, 0)
    u, g_A, g_B = torch.randn(2, 19, 10)[..., 5:], torch.empty(5, 16), torch.empty(0)
    driver.size = ctypes.sizeof(launch_plan.SumParams)
    launch.run(
        prepared, u.device, {"u": u, "z": None}, {"batch": 2, "D": g_A, "order": None},
        {"g_A": g_A, "g_B": g_B},
    )  # fmt: skip
    (config, _), (sum_config, sum_bytes) = driver.launches
    assert config == ("walk 50000", 3, 2, 1, 64, 1, 1, 50000, 77)
    assert sum_config == ("sum_parts 0", 2, 1, 1, 256, 1, 1, 0, 77)
    sums = launch_plan.SumParams.from_buffer_copy(sum_bytes)
    assert (sums.out_0, sums.count_0, sums.size_0, sums.is_float_0) == (g_A.data_ptr(), 7, 80, 1)
    assert sums.parts_0 == sums.parts_1
    assert (sums.size_1, sums.is_float_1) == (0, 0), "a result that is not wanted is not added"
    assert sums.size_2 == 0

    driver.launches.clear()
    driver.size = ctypes.sizeof(launch_plan.ScanParams)
    plan = plan._replace(sums=())
    launch.run(
        launch.prepare(plan, launch_plan.ScanParams, 0), u.device, {"u": u, "z": None},
        {"batch": 2, "D": g_A, "order": None, "delta_softplus": True},
    )  # fmt: skip
    params = launch_plan.ScanParams.from_buffer_copy(driver.launches[0][1])
    assert (params.u.data, params.u.batch_stride, params.u.row_stride) == (u.data_ptr(), 190, 10)
    assert (params.batch, params.segments, params.segment_length) == (2, 2, 10)
    assert params.delta_softplus == 1 and params.D == g_A.data_ptr()
    assert params.z.data is None and params.order is None and params.A is None
    # 3 * 5 floats, and the next tensor at the next multiple of 256 bytes
    assert params.parts_A - params.checkpoints == 256 and params.checkpoints % 64 == 0


def test_a_failed_launch_is_told(driver):
    plan = launch_plan.Plan(
        (launch_plan.Launch(launch_plan.Kernel("a.cu", "walk", ()), (1, 1, 1), (1, 1, 1), 0),),
        (), {},
    )  # fmt: skip
    prepared = launch.prepare(plan, launch_plan.ConvParams, 0)
    driver.error = cuda_driver.CUresult.CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES
    with pytest.raises(RuntimeError, match="launching walk: .*LAUNCH_OUT_OF_RESOURCES"):
        launch.run(prepared, torch.device("cpu"), {}, {})


# ---------------------------------------- self-check

def test_dim_fused_is_0_or_1(monkeypatch):
    sizes = torch.device("cpu"), torch.float32, 64, 16, 3
    for value, says in ("1", "it takes CUDA tensors"), ("0", "DIM_FUSED=0"):
        monkeypatch.setenv("DIM_FUSED", value)
        assert says in not_fused(*sizes)
    monkeypatch.setenv("DIM_FUSED", "off")
    with pytest.raises(UserError, match="DIM_FUSED is 'off', expected 0 or 1"):
        not_fused(*sizes)


SHAPES = [
    (batch, length, channels)
    for batch in (1, 2, 8, 96)
    for length in (1, 20, 366, 9806)
    for channels in (5, 256, 3072)
]


@pytest.mark.parametrize("name", ["forward", "backward"])
@pytest.mark.parametrize("states", [1, 16, 17, 33, 64])
def test_the_self_check_runs_every_kernel_of_a_plan(monkeypatch, name, states):
    monkeypatch.setattr(launch, "prepare", lambda plan, struct, index: plan)
    gpu = types.SimpleNamespace(index=0, multiprocessors=132)
    choose = getattr(launch_plan, f"{name}_variant")
    dtype = ("bfloat16",) if name == "backward" else ()
    for shape in SHAPES:
        plan_of = getattr(launch_plan, f"scan_{name}")
        plan = plan_of(*shape, states, "bfloat16", 132)
        _, _, checked = cuda_scan._small_problem(
            gpu, plan_of, plan, choose(*shape, states, *dtype, 132), states,
            torch.bfloat16,
        )
        assert plan.kernels() <= checked, shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_self_check_tells_right_from_wrong(monkeypatch, dtype):
    """With the reference for the kernels, right and then a little wrong."""
    monkeypatch.setattr(launch, "prepare", lambda plan, struct, index: None)
    gpu = types.SimpleNamespace(
        index=0, multiprocessors=132, device="cpu", name="a GPU", arch=90
    )
    wrong = []  # by how much

    def spoilt(function):
        def run(prepared, *args, **places):
            results = function(*args)
            results = list(results) if isinstance(results, tuple) else [results]
            results[-1] = results[-1] + sum(wrong) * results[-1].abs().max()
            return results[0] if len(results) == 1 else tuple(results)

        return run

    for module, forward, backward in (
        (cuda_scan, scan_fwd, scan_bwd), (cuda_conv, conv_fwd, conv_bwd)
    ):  # fmt: skip
        monkeypatch.setattr(module, "run_forward", spoilt(forward))
        monkeypatch.setattr(module, "run_backward", spoilt(backward))
        plans = ("scan_forward", "scan_backward", 16), ("conv_forward", "conv_backward", 3)
        forward, backward, size = plans[module is cuda_conv]
        shape = (2, 366, 64, size)
        for name, check in ((forward, module._check_forward), (backward, module._check_backward)):
            plan = getattr(launch_plan, name)(*shape, launch.name_of(dtype), 132)
            wrong.clear()
            assert plan.kernels() <= check(gpu, plan, shape, dtype)
            for error in (0.05, float("nan")):
                wrong.append(error)
                with pytest.raises(UserError, match="sm_90.* compute wrong numbers: .* is off by"):
                    check(gpu, plan, shape, dtype)


def test_undisturbed_lets_errors_through():
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert not self_check.undisturbed(torch.is_inference_mode_enabled)
        assert not self_check.undisturbed(torch.is_autocast_enabled, "cpu")
    with pytest.raises(UserError, match="so it goes"):
        self_check.undisturbed(lambda: (_ for _ in ()).throw(UserError("so it goes")))


# ---------------------------------------- dispatch


def test_without_a_gpu_the_reason_is_told():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    line = describe_backends("cuda")[0]
    assert line.startswith("selective_scan: reference") and "finds no CUDA device" in line
    for name in ("cuda", "mamba_ssm"):
        with pytest.raises(UserError, match="takes CUDA tensors, not cpu"):
            ops_cases.scan(**ops_cases.scan_inputs(), backend=name)


def test_a_slow_choice_is_warned_of_once(monkeypatch, caplog):
    module = sys.modules["libs.ops.selective_scan"]
    backend = Backend("cpu", lambda device, dtype, size: "it is broken; run: mend it", None, str)
    monkeypatch.setattr(module, "BACKENDS", {"cpu": backend} | module.BACKENDS | {"cpu": backend})
    backends._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, "dim"):
        for _ in range(2):
            ops_cases.scan(**ops_cases.scan_inputs())
        ops_cases.scan(**{k: x.double() for k, x in ops_cases.scan_inputs().items()})
    (record,) = caplog.records
    assert "plain PyTorch, slowly" in record.message and "mend it" in record.message


def test_compiling_is_said_in_one_line(monkeypatch, caplog, capsys):
    gpu = types.SimpleNamespace(name="a GPU", arch=90)
    monkeypatch.setattr(launch, "_log", logging.Logger("a run's"))
    for handler in ((), (logging.NullHandler(),)):
        for each in handler:
            launch._log.addHandler(each)
            each.handle = lambda record: print("logged:", record.getMessage(), file=sys.stderr)
        launch._say_once.cache_clear()
        for _ in range(3):
            launch.Gpu._announce(gpu)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("logged: " * len(handler) + "compiling CUDA kernels for a GPU")


def test_peers_get_their_layout(monkeypatch):
    """mamba_ssm and causal_conv1d as they are called, with the reference in their place."""

    def selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state):
        assert all(x.is_contiguous() for x in (u, delta, A, B, C, D, z, delta_bias))
        u, delta, B, C, z = (x.mT for x in (u, delta, B, C, z))
        y = selective_scan_ref(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, None, return_last_state
        )
        return (y[0].mT, y[1]) if return_last_state else y.mT

    def causal_conv1d_fn(x, weight, bias=None, activation=None):
        return causal_conv1d_ref(x.mT, weight, bias, activation).mT

    for name, functions in (
        ("mamba_ssm", {}),
        ("mamba_ssm.ops", {}),
        ("mamba_ssm.ops.selective_scan_interface", {"selective_scan_fn": selective_scan_fn}),
        ("causal_conv1d", {"causal_conv1d_fn": causal_conv1d_fn}),
    ):
        module = types.ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)
    order = ops_cases.make_order("permuted", 19)
    options = {"order": order, "delta_softplus": True, "return_last_state": True}
    inputs = ops_cases.scan_inputs()
    same(
        ops_cases.run(peers.selective_scan_peer, inputs, **options),
        ops_cases.run(selective_scan_ref, inputs, **options),
        1e-6,
    )
    inputs, options = ops_cases.conv_inputs(), {"order": order, "activation": "silu"}
    same(
        ops_cases.run(peers.causal_conv1d_peer, inputs, **options),
        ops_cases.run(causal_conv1d_ref, inputs, **options),
        1e-6,
    )


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
