"""The CUDA kernels against the definition in float64, on a GPU, over shapes on both sides of every
tile edge. Oracle: see ops_cases.py.
"""

import itertools

import ops_cases
import pytest
import torch
from ops_cases import check_oracle, error, on, run

from libs.model.scan_order import COLUMNS, COLUMNS_REVERSED, ROWS, ROWS_REVERSED, sequence_order
from libs.ops import causal_conv1d, selective_scan
from libs.ops.cuda import launch, launch_plan
from libs.ops.cuda.launch_plan import Variant
from libs.ops.reference import causal_conv1d_ref, selective_scan_ref

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("poisoned_memory")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check_scan(dtype, B=2, L=19, D=5, N=16, absent=(), **options):
    inputs = on("cuda", ops_cases.scan_inputs(B, L, D, N, absent), dtype)
    options = {"delta_softplus": True, "return_last_state": True} | options
    check_oracle(selective_scan, selective_scan_ref, inputs, "cuda", **options)


def check_conv(dtype, B=2, L=19, D=5, W=3, absent=(), **options):
    inputs = on("cuda", ops_cases.conv_inputs(B, L, D, W, absent), dtype)
    check_oracle(causal_conv1d, causal_conv1d_ref, inputs, "cuda", **options)


def permutation(length):
    return ops_cases.make_order("permuted", length).cuda()


# ---------------------------------------- shapes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 61, 64, 366])
def test_lengths(length, dtype):
    check_scan(dtype, L=length, D=67, order=permutation(length))
    check_conv(dtype, L=length, D=67, order=permutation(length), activation="silu")


def test_long():
    check_scan(torch.float32, 1, 1230, 20, order=permutation(1230))
    check_scan(torch.bfloat16, 1, 1230, 20, order=permutation(1230))
    check_scan(torch.bfloat16, 1, 1600, 20)  # in segments


@pytest.mark.parametrize("pattern", [ROWS, ROWS_REVERSED, COLUMNS, COLUMNS_REVERSED])
def test_scan_orders(pattern):
    order, length = sequence_order(pattern, 6, 7, 3, 5, torch.device("cuda")), 5 + 9 * 10
    for dtype in (torch.float32, torch.bfloat16):
        check_scan(dtype, L=length, order=order)
        check_conv(dtype, L=length, order=order, activation="silu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 32, 63, 64, 65, 130])
def test_channels(channels, dtype):
    check_scan(dtype, L=18, D=channels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("states", [1, 4, 5, 8, 12, 17, 24, 32, 33, 48, 64])
def test_states(states, dtype):
    check_scan(dtype, L=35, D=33, N=states)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [2, 3, 4, 8])
@pytest.mark.parametrize("channels", [3, 6, 511, 516])  # 1: the error of one cancelling sum
def test_convolution_widths(channels, width, dtype):
    check_conv(dtype, L=21, D=channels, W=width, activation="silu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("absent", [("D",), ("z",), ("delta_bias",), ("D", "z", "delta_bias")])
def test_optional_inputs(absent, dtype):
    check_scan(dtype, absent=absent, return_last_state=False)
    check_conv(dtype, absent=("bias",))


def test_without_softplus():
    inputs = on("cuda", ops_cases.scan_inputs(), torch.float32)
    inputs["delta"] = inputs["delta"].abs()
    check_oracle(selective_scan, selective_scan_ref, inputs, "cuda")


def test_large_arguments():
    """Softplus and silu far out, decays down to nothing, and growth (A > 0). Exponents up to some
    16 are rounded by 16 * 2^-24 each: the floor."""
    inputs = on("cuda", ops_cases.scan_inputs(), torch.float32)
    far = inputs | {"delta": 40 * inputs["delta"], "z": 40 * inputs["z"]}
    growing = inputs | {"A": inputs["A"].abs() / 10}
    for x in (far, growing):
        check_oracle(selective_scan, selective_scan_ref, x, "cuda", 2.0**-20, delta_softplus=True)


# ---------------------------------------- variants

FORWARD = [
    launch_plan.ONE_THREAD, launch_plan.ONE_THREAD._replace(segments=3), Variant(4, 32, 16, 2, 1),
    launch_plan.FOUR_LANES, launch_plan.EIGHT_LANES,
]  # fmt: skip
BACKWARD = [Variant(1, 64, 8, 1, 6), Variant(1, 64, 8, 3, 6), Variant(4, 32, 8, 3, 1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [48, 49, 200])
def test_variants(length, dtype, monkeypatch):
    """Also those that no small shape chooses; in segments, exponents of sums of steps are rounded
    otherwise than step by step, hence the floor."""
    inputs, order = on("cuda", ops_cases.scan_inputs(2, length, 70), dtype), permutation(length)
    options = {"delta_softplus": True, "return_last_state": True, "order": order}
    for forward, backward in itertools.zip_longest(FORWARD, BACKWARD, fillvalue=BACKWARD[0]):
        monkeypatch.setattr(launch.Gpu.of(0), "prepared", {})
        monkeypatch.setattr(launch_plan, "forward_variant", lambda *shape, v=forward: v)
        monkeypatch.setattr(launch_plan, "backward_variant", lambda *shape, v=backward: v)
        check_oracle(selective_scan, selective_scan_ref, inputs, "cuda", 2.0**-18, **options)


# ---------------------------------------- memory


def test_strided_inputs():
    """Slices of projections, as the network hands them over, and an odd start in memory."""
    inputs = on("cuda", ops_cases.scan_inputs(B=3, D=6, N=4), torch.bfloat16)
    both = torch.cat([inputs["u"], inputs["z"]], -1)
    strided = inputs | {"u": both[..., :6], "z": both[..., 6:]}
    strided["B"], strided["C"] = torch.cat([inputs["B"], inputs["C"]], -1).split(4, -1)
    scan = {"delta_softplus": True, "backend": "cuda"}
    expected, actual = (run(selective_scan, x, **scan) for x in (inputs, strided))
    assert all(torch.equal(actual[k], expected[k]) for k in expected)

    conv = on("cuda", ops_cases.conv_inputs(D=8), torch.bfloat16)
    odd = torch.cat([conv["x"][..., :1], conv["x"]], -1)[..., 1:]
    expected, actual = (causal_conv1d(**conv | {"x": x}) for x in (conv["x"], odd))
    assert torch.equal(actual, expected)


def test_offsets_beyond_31_bits():
    """The last batch entry of tensors of more than 2^31 elements."""
    B, L, D = 3, 56, 2**24 + 2**22
    x = torch.zeros(B, L, D, device="cuda", dtype=torch.bfloat16)
    x[-1, :, -70:] = torch.randn(L, 70, device="cuda").bfloat16()
    weight = torch.randn(D, 2, device="cuda")
    y = causal_conv1d(x, weight, backend="cuda")
    expected = causal_conv1d_ref(x[-1:, :, -70:], weight[-70:])
    assert error(y[-1:, :, -70:], expected.double()) < 1e-2


def test_nan_stays_where_it_belongs():
    inputs = on("cuda", ops_cases.scan_inputs(B=2, L=20, D=5), torch.float32)
    inputs["delta"][0, 7, 2] = float("nan")
    results = run(selective_scan, inputs, delta_softplus=True, backend="cuda")
    expected = torch.zeros(2, 20, 5, dtype=torch.bool, device="cuda")
    expected[0, 7:, 2] = True
    assert torch.equal(results["output 0"].isnan(), expected)
    assert not any(results[f"gradient of {k}"][1].isnan().any() for k in ("u", "delta", "B", "C"))
