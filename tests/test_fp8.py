"""Matrix products in fp8 (libs/ops/cuda/fp8.py): the definition on the CPU, the rest on a GPU."""

import emulator
import pytest
import torch
from ops_cases import error

from libs.model.dim import DiM
from libs.ops.cuda import fp8
from utils import UserError

cuda = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
        reason="no GPU of compute capability 9.0 here",
    ),
]
on_gpu = [pytest.param("cuda", marks=cuda)]
UNIT = 2.0**-4  # half of e4m3's relative spacing


def assert_one_unit(actual, expected):
    """Equal but for a few ties that round to the other side; 2^-9 is e4m3's smallest step."""
    different = (actual.float() - expected.float()).abs()
    assert torch.all(different <= 2 * UNIT * expected.float().abs() + 2.0**-9)
    assert (different > 0).float().mean() < 1e-2


def test_definition():
    """Rows come back within half a unit of e4m3, or of its smallest step; zeros and NaN stay."""
    x = torch.randn(5, 48) * torch.tensor([1e-6, 1e-2, 1.0, 1e4, 0.0])[:, None]
    x8, scale = fp8.quantize_rows_ref(x)
    again = x8.float() * scale
    assert torch.all((again - x).abs() <= UNIT * x.abs() + 2.0**-10 * scale)
    assert torch.equal(again[4], torch.zeros(48)) and torch.all(scale > 0)
    assert 0 < scale[4] < 1e-9 * scale[0] and (1 / scale).isfinite().all()
    x[2, 3] = float("nan")
    x8, scale = fp8.quantize_rows_ref(x)
    assert (x8.float() * scale).isnan().any(1).tolist() == [False, False, True, False, False]


def test_refused_where_it_cannot_run():
    model = DiM(input_size=4, in_channels=3, dim=16, depth=3, num_classes=4)
    with pytest.raises(UserError, match="fp8 are asked for, but it needs a GPU, not cpu"):
        model.use_fp8("cpu")
    assert not any(block.mixer.fp8 for block in model.blocks)
    with pytest.raises(UserError, match="train.fp8 replaces .*: add --config.train.mixed_pre"):
        fp8.turn_on_fp8(model, None, "train.fp8")
    with pytest.raises(UserError, match="sample.fp8 is for DiM, not for Linear"):
        fp8.turn_on_fp8(torch.nn.Linear(2, 2), torch.bfloat16, "sample.fp8")


@pytest.mark.parametrize("device", on_gpu)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [16, 528, 1536, 3072, 4000, 6144, 8192])
def test_kernel_equals_the_definition(device, dtype, columns):
    wide = torch.randn(37, columns + 16, device=device).to(dtype)
    wide[3], wide[4] = 0, 1e-38  # the latter: bf16's; its inverse scale is not finite
    x = wide[:, :columns]  # rows contiguous, with a stride
    x8, scale = fp8.quantize_rows(x)
    expected8, expected = fp8.quantize_rows_ref(x)
    assert torch.allclose(scale, expected, rtol=2e-7, atol=0)
    assert_one_unit(x8, expected8)
    for a, b in zip(fp8.quantize_rows(*x.split(columns // 16 * 8, 1)), (x8, scale), strict=True):
        assert torch.equal(a, b)
    x[5, 7] = float("nan")
    assert fp8.quantize_rows(x)[1].isnan().flatten().nonzero().tolist() == [[5]]


@pytest.mark.parametrize("device", on_gpu)
@pytest.mark.parametrize("shape", [(16, 16), (80, 48), (37, 528), (1536, 3072)])
def test_transposed(device, shape):
    x = torch.randn(shape, device=device).bfloat16()
    _, scale = fp8.quantize_rows(x)
    actual, scale = fp8.quantize_transposed(x, scale.amax()), scale.amax()
    assert_one_unit(actual[:, : len(x)], (x.float() / scale).to(fp8.E4M3).t())
    assert actual.shape[1] % 16 == 0 and not actual[:, len(x) :].float().any()


def scaled_mm(a, b, scale_a, scale_b, bias=None, out_dtype=None, use_fast_accum=False):
    """torch's, on the CPU."""
    out = (a.float() @ b.float()) * scale_a * scale_b
    return (out if bias is None else out + bias.float()).to(out_dtype)


@pytest.fixture
def emulated(request, monkeypatch):
    """The device; on the CPU with the emulator in the kernels' place."""
    if request.param == "cuda":
        yield "cuda"
        return
    emulator.install(monkeypatch)
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    library = emulator.register()
    yield "cpu"
    library._destroy()


@pytest.mark.parametrize("emulated", ["cpu", *on_gpu], indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merge_and_its_gradients(emulated, dtype):
    """Against float64: fp8's rounding, averaged over K terms, and no more."""
    x, skip = torch.randn(2, 3, 37, 256, device=emulated).to(dtype)
    weights = torch.randn(2, 128, 256, device=emulated)
    inputs = x, 4 * skip, *weights, torch.randn(128, device=emulated)
    inputs = [v.clone().requires_grad_() for v in inputs]
    g = torch.randn(3, 37, 128, device=emulated).to(dtype) / 1024
    g[:, 20:] = 0  # as of tokens that the head crops
    out = fp8.fp8_merge(*inputs)
    gradients = torch.autograd.grad(out, inputs, g)
    exact = [v.detach().double().requires_grad_() for v in inputs]
    x, skip, x_weight, skip_weight, bias = exact
    expected = x @ x_weight.T + skip @ skip_weight.T + bias
    expected_gradients = torch.autograd.grad(expected, exact, g.double())

    def relative(a, b):
        return ((a.double() - b).norm() / b.norm()).item()

    assert out.dtype == dtype
    assert relative(out.detach(), expected.detach()) < 0.05
    for a, b, bound in zip(gradients, expected_gradients, [0.05] * 4 + [0.01], strict=True):
        assert relative(a, b) < bound
    assert relative(out.detach(), expected.detach()) > 0.01, "not in fp8"


@pytest.mark.parametrize("device", on_gpu)
def test_model(device):
    """A network in fp8 stays near the same one in bfloat16, forward and in its gradients."""
    torch.manual_seed(0)
    model = DiM(input_size=16, in_channels=3, dim=1024, depth=5, num_classes=4).to(device)
    x, t = torch.randn(2, 3, 16, 16, device=device), torch.tensor([3.0, 700.0], device=device)

    def run():
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            out = model(x, t).float()
        out.square().mean().backward()
        return out.detach(), model.blocks[2].mixer.in_proj.weight.grad.clone()

    expected = run()
    model.use_fp8(device)
    for a, b in zip(run(), expected, strict=True):
        assert 1e-4 < (a - b).norm() / b.norm() < 0.1
    with torch.autocast("cuda", torch.bfloat16), torch.no_grad():
        compiled = torch.compile(model.eval(), fullgraph=True)(x, t)
        assert error(compiled.float(), model(x, t).double()) < 2.0**-4
