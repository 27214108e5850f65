"""The block as one operator (libs/ops/cuda/mamba_block.py) on a GPU, against its definition,
compose_block, in float64. Oracle: see ops_cases.py; "plain" is the composed block on the
reference operators in the same dtype.
"""

import copy

import ops_cases
import pytest
import torch
from ops_cases import around, error, make_block

from libs.model.block import compose_block
from libs.model.dim import DiM
from libs.ops import gated_residual, is_fused, modulated_norm
from libs.ops.reference import gated_residual_ref, modulated_norm_ref

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("poisoned_memory", "exact_float32")]
# Four units in the last place of float32, as a block chains several operators; a quarter of one in
# the products' dtype, where an entry may round to the other side.
FLOOR = {torch.float32: 2.0**-21, torch.bfloat16: 2.0**-10, torch.float16: 2.0**-13}
DTYPES = list(FLOOR)


def make_inputs(B, L, dim, keep=False):
    generator = torch.Generator().manual_seed(1)
    x, g = (torch.randn(B, L, dim, generator=generator).cuda() for _ in range(2))
    modulation = torch.randn(B, 3, dim, generator=generator).cuda() / 2
    order = ops_cases.make_order("permuted", L).cuda()
    return x, modulation, order, torch.tensor([1.25, 0.0] * B)[:B].cuda() if keep else None, g


def results_of(forward, block, dtype, x, modulation, order, keep, g, out=None):
    """Output and the gradients of x, which a skip takes too, modulation and every parameter."""
    x, modulation = (v.detach().requires_grad_() for v in (x, modulation))
    block.zero_grad()
    with torch.autocast("cuda", dtype=dtype, enabled=dtype != x.dtype):
        y, kept = forward(block, x, modulation, order, keep)
    torch.autograd.backward((y, kept), (g.to(y.dtype), g.to(kept.dtype)))
    named = {f"gradient of {name}": p.grad.clone() for name, p in block.named_parameters()}
    return {
        "out": y.detach(), "gradient of x": x.grad, "gradient of modulation": modulation.grad,
        **named,
    }  # fmt: skip


def fused(block, x, modulation, order, keep):
    assert is_fused(x.device, x.dtype, x.shape[-1], 16, 3)
    return block(x, modulation, order, keep)


def composed(block, x, modulation, order, keep):
    return compose_block(block.mixer, x, around(block, modulation), order, keep, None), x


def check(monkeypatch, dtype, B=2, L=61, dim=64, keep=False, rounds=False, x_dtype=None):
    block, (x, *rest, g) = make_block(dim, rounds).cuda(), make_inputs(B, L, dim, keep)
    x, g = x.to(x_dtype or torch.float32), g.bfloat16().float()
    actual = results_of(fused, block, dtype, x, *rest, g)
    monkeypatch.setenv("DIM_BACKEND", "reference")
    plain = results_of(composed, block, dtype, x, *rest, g)
    modulation, order, keep = rest
    exact = results_of(
        composed, copy.deepcopy(block).double(), torch.float64, x.double(), modulation.double(),
        order, None if keep is None else keep.double(), g.double(),
    )  # fmt: skip
    for name in exact:
        found, allowed = error(actual[name], exact[name]), error(plain[name], exact[name])
        floor = FLOOR[dtype] * (4 if actual["out"].dtype == dtype != torch.float32 else 1)
        assert found <= 2 * allowed + floor, f"{name}: {found:.3g}, reference {allowed:.3g}"
    monkeypatch.delenv("DIM_BACKEND")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 61])
def test_lengths(length, dtype, monkeypatch):
    check(monkeypatch, dtype, L=length)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [8, 248, 256, 264, 528, 2048])
def test_widths(dim, dtype, monkeypatch):
    check(monkeypatch, dtype, L=19, dim=dim)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_of_the_stream(dtype, monkeypatch):
    check(monkeypatch, dtype, rounds=True)
    check(monkeypatch, dtype, rounds=True, x_dtype=dtype)
    check(monkeypatch, dtype, x_dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_stochastic_depth(dtype, monkeypatch):
    check(monkeypatch, dtype, B=3, keep=True)


def test_many_tokens(monkeypatch):
    check(monkeypatch, torch.bfloat16, B=4, L=366, dim=1536)


def test_gradients_are_bit_equal():
    block, (*inputs, g) = make_block(64).cuda(), make_inputs(2, 61, 64)
    first, second = (results_of(fused, block, torch.bfloat16, *inputs, g) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_a_backward_inside_autocast_computes_as_the_forward_did():
    """A float32 island in bf16 autocast."""
    block, (x, modulation, order, _, g) = make_block(64).cuda(), make_inputs(2, 61, 64)
    found = []
    for autocast in (False, True):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            with torch.autocast("cuda", enabled=False):
                out, _ = fused(block, leaf, modulation, order, None)
            found.append(torch.autograd.grad(out, [leaf, *block.parameters()], g))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_opcheck():
    block = make_block(16).cuda()
    x, modulation, order, keep, _ = make_inputs(2, 9, 16, keep=True)
    from libs.ops.cuda import mamba_block

    assert is_fused(x.device, x.dtype, 16, 16, 3)
    named = block.mixer.name_parameters(around(block, modulation))
    parameters = [named[name].detach() for name in mamba_block.Parameters._fields]
    arguments = [x, modulation, keep, *parameters]
    arguments = [v.requires_grad_() if v is not keep else v for v in arguments]
    options = (order.long(), torch.float32, False, torch.float32, torch.float32)
    torch.library.opcheck(torch.ops.dim.mamba_block, (*arguments, *options))


# ---------------------------------------- norm and gate, operators of their own


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("L, dim", [(1, 8), (17, 264), (61, 1536), (3, 2048)])
@pytest.mark.parametrize("gate", [False, True])
def test_norm_and_gate(gate, L, dim, dtype):
    """Against float64; "plain" is the definition in the same dtypes."""
    inputs = ops_cases.on("cuda", ops_cases.adaln_inputs(gate, L=L, dim=dim), dtype)
    operator = gated_residual if gate else modulated_norm
    definition = gated_residual_ref if gate else modulated_norm_ref
    options = {"drop_path_scale": torch.tensor([1.25, 0.5]).cuda()} if gate else {}
    exact = ops_cases.run(definition, inputs, torch.float64, **options)
    for out_dtype in {torch.float32, dtype}:
        plain = ops_cases.run(definition, inputs, out_dtype=out_dtype, **options)
        actual = ops_cases.run(operator, inputs, out_dtype=out_dtype, **options)
        assert actual["output 0"].dtype == out_dtype
        for name in exact:
            assert actual[name].dtype == plain[name].dtype, name
            found, allowed = error(actual[name], exact[name]), error(plain[name], exact[name])
            assert found <= 2 * allowed + 2.0**-21, f"{name}: {found:.3g}, plain {allowed:.3g}"


# ---------------------------------------- the model


def make_model():
    torch.manual_seed(0)
    return DiM(input_size=8, in_channels=3, dim=64, depth=5, num_classes=4).cuda()


def model_inputs():
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0]), torch.tensor([1, 4])
    return x.cuda(), t.cuda(), y.cuda()


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_compiles_without_graph_breaks(mode):
    model, inputs = getattr(make_model(), mode)(), model_inputs()
    with torch.autocast("cuda", torch.bfloat16):
        expected = model(*inputs)
        actual = torch.compile(model, fullgraph=True)(*inputs)
    assert error(actual.detach(), expected.detach().double()) < 2.0**-6


def test_a_changed_batch_or_resolution_compiles_once():
    """And not in every step: one graph for the first shape, one for any batch, one for any size of
    image too. (Where a batch is as large as a side of the grid, dynamo may add one.)
    """
    torch.manual_seed(0)
    model = DiM(input_size=16, in_channels=3, dim=64, depth=5, num_classes=4).cuda().train()
    counts = torch._dynamo.utils.counters["stats"]
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

    def graphs_after(shapes):
        for batch, side in shapes:
            x = torch.randn(batch, 3, side, side).cuda()
            t, y = torch.rand(batch).cuda(), torch.zeros(batch, dtype=torch.int64).cuda()
            compiled(x, t, y).float().square().sum().backward()
        return counts["unique_graphs"]

    before, seen = counts["unique_graphs"], [(5, 16), (7, 16), (5, 24), (7, 24)]
    first = graphs_after(seen)
    print(f"{first - before} graphs for {len(seen)} shapes")
    assert 0 < first - before <= 3
    assert graphs_after([*reversed(seen), *seen, (9, 16), (10, 16), (11, 24), (10, 32)]) == first


def test_checkpointing_changes_nothing():
    model, inputs = make_model().train(), model_inputs()

    def gradients():
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            model(*inputs).float().square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    kept = gradients()
    model.activation_checkpointing = True
    assert all(map(torch.equal, kept, gradients()))


def test_model_equals_the_composed_one(monkeypatch):
    """Within the rounding of float32, forward; the gradient of the input image likewise."""
    model, (x, t, y) = make_model(), model_inputs()

    def run():
        image = x.clone().requires_grad_()
        out = model(image, t, y)
        return out.detach(), torch.autograd.grad(out.square().sum(), image)[0]

    actual = run()
    monkeypatch.setenv("DIM_FUSED", "0")
    for a, b in zip(actual, run(), strict=True):
        assert error(a, b.double()) < 2e-5
