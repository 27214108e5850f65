"""The operators: the definition against numerical derivatives, the CPU backend against the
definition in float64.
"""

import subprocess
import sys

import golden_cases
import pytest
import torch
from ops_cases import (
    adaln_inputs,
    check_oracle,
    conv_inputs,
    make_order,
    on,
    run,
    scan,
    scan_inputs,
    scan_ref,
)

from libs.ops import (
    backends,
    causal_conv1d,
    describe_backends,
    gated_residual,
    modulated_norm,
    selective_scan,
)
from libs.ops.cpu import kernels
from libs.ops.reference import causal_conv1d_ref, selective_scan_ref
from utils import UserError

pytestmark = pytest.mark.usefixtures("poisoned_memory")
TILE, BLOCK = kernels.TILE, kernels.BLOCK


def check_scan(inputs, **options):
    options = {"delta_softplus": True, "return_last_state": True} | options
    check_oracle(selective_scan, selective_scan_ref, inputs, "cpu", **options)


def check_conv(inputs, **options):
    check_oracle(causal_conv1d, causal_conv1d_ref, inputs, "cpu", **options)


# ---------------------------------------- the definition


@pytest.mark.parametrize(
    "absent, options",
    [((), {"delta_softplus": True, "return_last_state": True}), (("D", "z", "delta_bias"), {})],
)
@pytest.mark.parametrize("order", ["none", "permuted"])
def test_scan_reference_gradcheck(absent, options, order):
    inputs = {k: x.double().requires_grad_() for k, x in scan_inputs(2, 4, 2, 3, absent).items()}
    order = make_order(order, 4)
    assert torch.autograd.gradcheck(
        lambda *x: selective_scan_ref(**dict(zip(inputs, x, strict=True)), order=order, **options),
        tuple(inputs.values()),
    )


@pytest.mark.parametrize("activation", [None, "silu"])
def test_conv_reference_gradcheck(activation):
    inputs = tuple(x.double().requires_grad_() for x in conv_inputs(2, 5, 2, 3).values())
    order = make_order("permuted", 5)
    assert torch.autograd.gradcheck(lambda *x: causal_conv1d_ref(*x, activation, order), inputs)


def test_order_is_a_walk_over_rows():
    """A scan along an order is a plain scan of the permuted rows, put back."""
    order = make_order("permuted", 19).long()
    inputs = scan_inputs()
    walked = {k: x[:, order] if x.dim() == 3 else x for k, x in inputs.items()}
    golden_cases.assert_close(scan_ref(**inputs, order=order)[:, order], scan_ref(**walked), 1e-6)


def test_norm_and_gate_gradcheck():
    """The formulas, and their derivatives."""
    norm = {k: x.double().requires_grad_() for k, x in adaln_inputs(False).items()}
    gate = {k: x.double().requires_grad_() for k, x in adaln_inputs(True).items()}
    scale = torch.tensor([1.25, 0.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(modulated_norm, tuple(norm.values()))
    assert torch.autograd.gradcheck(lambda *x: gated_residual(*x, scale), tuple(gate.values()))
    shift, scale_, gate_ = (norm["modulation"] + norm["table"])[:, :, None].unbind(1)
    xhat = norm["x"] * torch.rsqrt(norm["x"].square().mean(-1, keepdim=True) + 1e-5)
    expected = xhat * norm["weight"] * (1 + scale_) + shift
    golden_cases.assert_close(modulated_norm(**norm).detach(), expected.detach(), 1e-12)
    low = {k: x.detach().bfloat16() for k, x in gate.items()}
    assert gated_residual(**low).dtype == torch.float32
    assert gated_residual(**low, out_dtype=torch.bfloat16).dtype == torch.bfloat16


# ---------------------------------------- CPU against it


@pytest.mark.parametrize("length", [1, 2, TILE - 1, TILE, TILE + 1, 61, 2 * TILE])
def test_lengths_and_orders(length):
    for order in ("none", "permuted"):
        order = make_order(order, length)
        check_scan(scan_inputs(L=length), order=order)
        check_conv(conv_inputs(L=length), order=order, activation="silu")


@pytest.mark.parametrize("channels", [1, BLOCK, BLOCK + 1, 128])
@pytest.mark.parametrize("states", [1, 16, 33])
def test_channels_and_states(channels, states):
    check_scan(scan_inputs(L=18, D=channels, N=states))


@pytest.mark.parametrize("width", [1, 3, 30])
def test_convolution_widths(width):
    for channels in (1, BLOCK + 1):
        check_conv(conv_inputs(D=channels, W=width))


@pytest.mark.parametrize("length", [366, 1230])
def test_long(length):
    check_scan(scan_inputs(1, length, 20, 16), order=make_order("permuted", length))


@pytest.mark.parametrize("absent", [("D",), ("z",), ("delta_bias",), ("D", "z", "delta_bias")])
def test_optional_inputs(absent):
    for softplus in (False, True):
        inputs = scan_inputs(absent=absent)
        if not softplus:
            inputs["delta"] = inputs["delta"].abs()
        check_scan(inputs, delta_softplus=softplus, return_last_state=False)
    check_conv(conv_inputs(absent=("bias",)))


def test_large_arguments():
    """Softplus and silu far out, decays down to nothing, and growth (A > 0)."""
    inputs = scan_inputs()
    inputs["delta"] = 40 * inputs["delta"]
    inputs["z"] = 40 * inputs["z"]
    check_scan(inputs)
    check_scan(scan_inputs(absent=("delta_bias",)) | {"A": scan_inputs()["A"].abs() / 10})


def test_strided_inputs():
    """Slices and transposes, as the network hands them over."""
    inputs = scan_inputs(B=3, D=6, N=4)
    both = torch.cat([inputs["u"], inputs["z"]], -1)
    strided = inputs | {
        "u": both[..., :6],
        "z": both[..., 6:],
        "A": inputs["A"].t().contiguous().t(),
        "delta": inputs["delta"].mT.contiguous().mT,
        "D": inputs["D"].repeat(2).view(2, 6).t()[:, 0],
    }
    strided["B"], strided["C"] = torch.cat([inputs["B"], inputs["C"]], -1).split(4, -1)
    assert not any(strided[k].is_contiguous() for k in "uzABC")
    expected = run(scan, inputs, backend="cpu")
    actual = run(scan, strided, backend="cpu")
    assert all(torch.equal(actual[k], expected[k]) for k in expected)
    x = conv_inputs()
    assert torch.equal(causal_conv1d(**x), causal_conv1d(**x | {"x": x["x"].mT.contiguous().mT}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """As float32 arithmetic on the rounded inputs, each result rounded once; A and D stay float32,
    as in a network.
    """
    low = on("cpu", scan_inputs(), dtype)
    actual = run(scan, low, backend="cpu", return_last_state=True)
    assert actual["output 0"].dtype == dtype and actual["output 1"].dtype == torch.float32
    expected = run(scan_ref, low, return_last_state=True)
    for name in expected:
        assert actual[name].dtype == expected[name].dtype
        # one rounding of `dtype` may go the other way
        tol = torch.finfo(expected[name].dtype).eps if expected[name].dtype == dtype else 1e-6
        golden_cases.assert_close(actual[name], expected[name], tol, name)


def test_autocast_leaves_precision_alone():
    inputs = scan_inputs()
    expected = run(scan, inputs, backend="cpu", return_last_state=True)
    reference = run(scan, inputs, backend="reference", return_last_state=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for plain, name in ((expected, "cpu"), (reference, "reference")):
            actual = run(scan, inputs, backend=name, return_last_state=True)
            assert all(torch.equal(actual[k], plain[k]) for k in plain)


def test_gradient_of_the_last_state_alone():
    inputs = {k: x.requires_grad_() for k, x in scan_inputs(absent=("z", "D")).items()}
    wanted = [inputs[k] for k in ("u", "delta", "A", "B")]
    gradients = [
        torch.autograd.grad(scan(**inputs, return_last_state=True, backend=name)[1].sum(), wanted)
        for name in ("cpu", "reference")
    ]
    for actual, expected in zip(*gradients, strict=True):
        golden_cases.assert_close(actual, expected, 1e-6)


def test_double_backward_is_refused():
    inputs = {k: x.requires_grad_() for k, x in scan_inputs().items()}
    y = scan(**inputs, backend="cpu")
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(y.sum(), inputs["u"], create_graph=True)


def test_nan_stays_where_it_belongs():
    inputs = scan_inputs(B=2, L=20, D=5)
    inputs["delta"][0, 7, 2] = float("nan")
    results = run(scan, inputs, backend="cpu")
    expected = torch.zeros(2, 20, 5, dtype=torch.bool)
    expected[0, 7:, 2] = True
    assert torch.equal(results["output 0"].isnan(), expected)
    # the other image, whose kernel may have run on the same scratch memory, is clean
    assert not any(results[f"gradient of {k}"][1].isnan().any() for k in ("u", "delta", "B", "C"))


# ---------------------------------------- threads


def all_results():
    scans = [run(scan, scan_inputs(B, 40, 150, 8), backend="cpu") for B in (1, 3)]
    convs = [
        run(causal_conv1d, conv_inputs(B, 40, 150, 3), backend="cpu", activation="silu")
        for B in (1, 3)
    ]
    return [x for results in scans + convs for x in results.values()]


def test_results_do_not_depend_on_threads():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = all_results()
        for n in (2, 2, 3, 5):
            torch.set_num_threads(n)
            assert all(torch.equal(a, b) for a, b in zip(all_results(), expected, strict=True)), (
                f"{n} threads"
            )
    finally:
        torch.set_num_threads(threads)


# ---------------------------------------- validation


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"delta": torch.zeros(2, 19, 4)}, ValueError, r"delta must have shape .*\(2, 19, 4\)"),
        ({"u": torch.zeros(2, 0, 5)}, ValueError, "u .*no axis empty"),
        ({"order": torch.arange(18)}, ValueError, "order must have shape"),
        ({"order": torch.zeros(19)}, TypeError, "order must be one of .*int64.*got torch.float32"),
        ({"A": torch.zeros(5, 16, dtype=torch.complex64)}, TypeError, "A must be one of"),
        ({"z": torch.zeros(2, 19, 5, device="meta")}, ValueError, "z must be on cpu, got meta"),
    ],
)
def test_validation(change, error, message):
    with pytest.raises(error, match="selective_scan: " + message):
        scan(**scan_inputs() | change)


def test_validation_of_the_convolution():
    with pytest.raises(ValueError, match="causal_conv1d: weight must have shape"):
        causal_conv1d(**conv_inputs() | {"weight": torch.zeros(4, 3)})
    with pytest.raises(ValueError, match="activation must be None or 'silu', got 'relu'"):
        causal_conv1d(**conv_inputs(), activation="relu")


# ---------------------------------------- backends


@pytest.fixture(autouse=True)
def no_override(monkeypatch):
    monkeypatch.delenv("DIM_BACKEND", raising=False)


def test_automatic_choice():
    *operators, block = describe_backends()
    names = "selective_scan", "causal_conv1d"
    assert operators == [f"{name}: cpu, chosen automatically" for name in names]
    assert block.startswith("mamba_block: composed of single operators (")
    inputs = {k: x.double() for k, x in scan_inputs().items()}
    assert torch.equal(scan(**inputs), scan_ref(**inputs))


def test_environment_names_the_backend(monkeypatch):
    monkeypatch.setenv("DIM_BACKEND", "reference")
    assert torch.equal(scan(**scan_inputs()), scan_ref(**scan_inputs()))
    assert "reference" in describe_backends()[1] and "DIM_BACKEND" in describe_backends()[1]


def test_without_numba(monkeypatch):
    monkeypatch.setattr(backends, "_numba_error", lambda: "numba cannot be imported")
    assert "selective_scan: reference" in describe_backends()[0]
    assert torch.equal(scan(**scan_inputs()), scan_ref(**scan_inputs()))
    with pytest.raises(UserError, match="backend 'cpu' .* cannot run: numba cannot be imported"):
        scan(**scan_inputs(), backend="cpu")


def test_a_requested_backend_that_cannot_run_is_an_error(monkeypatch):
    with pytest.raises(UserError, match="use backend='reference' for float64"):
        causal_conv1d(**{k: x.double() for k, x in conv_inputs().items()}, backend="cpu")
    with pytest.raises(UserError, match="backend 'gpu' .* choose one of cuda, cpu, reference"):
        scan(**scan_inputs(), backend="gpu")
    monkeypatch.setenv("DIM_BACKEND", "cuda")
    with pytest.raises(UserError, match="asked for by DIM_BACKEND.* takes CUDA tensors, not cpu"):
        causal_conv1d(**conv_inputs())


def test_command_line_and_lazy_numba():
    """A fresh process: importing the operators does not import numba, and `python -m libs.ops` says
    what would run.
    """
    code = (
        "import sys, runpy, libs.ops; assert 'numba' not in sys.modules; sys.argv = ['libs.ops'];"
        "runpy.run_module('libs.ops', run_name='__main__')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=golden_cases.ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "selective_scan: cpu, chosen automatically" in result.stdout
