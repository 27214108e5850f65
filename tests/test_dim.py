"""The backbone's options, its sizes, and official weights of another shape."""

import pytest
import runs
import torch

from configs import cifar10_S_DiM, digits_T_DiM, imagenet256_L_attention
from libs.model.block import compose_block
from libs.model.build import build_model
from libs.model.dim import MIXERS, PRESETS, DiM
from libs.model.heads import add_heads
from libs.model.layers import sinusoidal_embedding
from libs.model.published import from_official, to_official
from libs.model.scan_order import pad_index, sequence_order
from libs.model.skips import boost_stream
from utils import UserError

TINY = dict(input_size=8, in_channels=4, dim=16, depth=5, num_classes=10)


def inputs(batch=3, size=(8, 8)):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 4, *size, generator=generator)
    return x, torch.linspace(1, 999, batch), torch.arange(batch)


@pytest.mark.parametrize("training, dtype", [(True, torch.float32), (False, torch.bfloat16)])
def test_the_stream_before_the_first_skip(training, dtype):
    """Float32 in training; without gradients in the dtype of products."""
    with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16):
        assert DiM(**TINY)(*inputs(), hidden=(1,))[1][1].dtype == dtype


@pytest.mark.parametrize(
    "name, shape, parameters",
    [
        ("S", dict(input_size=32, in_channels=3, num_classes=10), 50_568_716),
        ("L", dict(input_size=32, in_channels=4, num_classes=1000), 386_063_376),
        ("H", dict(input_size=32, in_channels=4, num_classes=1000), 862_407_184),
        ("XL", dict(input_size=32, in_channels=4, num_classes=1000), 672_756_496),
    ],
)
def test_presets_have_the_published_sizes(name, shape, parameters):
    with torch.device("meta"):
        model = DiM(**PRESETS[name], **shape)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_configs_build_their_networks():
    with torch.device("meta"):
        model = build_model(cifar10_S_DiM.get_config().nnet)
        attention = build_model(imagenet256_L_attention.get_config().nnet)
    assert {key: getattr(model, key) for key in PRESETS["S"]} == PRESETS["S"]
    assert sum(parameter.numel() for parameter in attention.parameters()) == 265_089_040
    digits = build_model(digits_T_DiM.get_config().nnet)
    assert digits(torch.zeros(1, 1, 8, 8), torch.ones(1)).shape == (1, 1, 8, 8)


def test_no_label_is_the_null_label():
    model, (x, t, _) = DiM(**TINY).eval(), inputs()
    assert torch.equal(model(x, t), model(x, t, torch.full((3,), 10)))
    assert not torch.equal(model(x, t), model(x, t, torch.full((3,), 9)))


def test_any_grid_square_or_not():
    model = DiM(**TINY).eval()
    torch.nn.init.normal_(model.pos_embed)
    x, t, y = inputs(size=(12, 6))
    wide = model(x, t, y)
    assert wide.shape == x.shape
    assert not torch.allclose(wide.mT, model(x.mT.contiguous(), t, y))  # 6x12 is another grid
    with pytest.raises(UserError, match="divisible by the patch size 2"):
        model(torch.zeros(1, 4, 8, 7), t[:1])


def test_activation_checkpointing_changes_nothing_but_memory():
    """Gradients equal bit for bit, stochastic depth included: its draws are handed in."""
    x, t, y = inputs()
    draw, grads = torch.rand(3, 5), []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = DiM(**TINY, drop_path=0.5, activation_checkpointing=checkpointing).train()
        model(x, t, y, drop_path_draw=draw).square().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_stochastic_depth():
    """A branch is dropped where the draw reaches the probability of keeping it, by sample."""
    x, t, y = inputs()
    torch.manual_seed(0)
    model = DiM(**TINY, drop_path=0.4)
    scales = model.drop_path_scales(x, torch.tensor([0.1, 0.79, 0.81])[:, None].expand(3, 5))
    assert scales[0] is None  # block 0 is never dropped
    assert scales[2].tolist() == pytest.approx([1.25, 1.25, 0])  # block 2 is kept with 0.8
    never, always = torch.zeros(3, 5), torch.ones(3, 5)
    dropped = model.train()(x, t, y, drop_path_draw=always)
    assert not torch.allclose(model(x, t, y, drop_path_draw=never), dropped)
    mixed = model(x, t, y, drop_path_draw=torch.stack([never[0], always[0], never[0]]))
    torch.testing.assert_close(mixed[1], dropped[1])
    assert torch.equal(model.eval()(x, t, y, drop_path_draw=always), model(x, t, y))


def test_skip_tuning_by_time():
    """time=None means t / 1000: nothing at t = 0, the factor `low` on the last skip at 1000."""
    torch.manual_seed(0)
    model, (x, _, y) = DiM(**TINY).eval(), inputs()
    plain = model(x, torch.zeros(3), y)
    model.skip_tuning = (0.5, 1.0, None)
    assert torch.equal(model(x, torch.zeros(3), y), plain)
    t = torch.full((3,), 1000.0)
    by_time = model(x, t, y)
    model.skip_tuning = (0.5, 1.0, 1.0)
    torch.testing.assert_close(by_time, model(x, t, y))
    model.skip_tuning = None
    assert not torch.allclose(by_time, model(x, t, y))


def test_initialisation():
    """The official one: zero positions and biases, normal embeddings, a small out_proj."""
    torch.manual_seed(0)
    model = DiM(**dict(TINY, dim=64, depth=9))
    assert (model.pos_embed == 0).all() and (model.head.bias == 0).all()
    assert (model.modulation.linear.bias == 0).all() and (model.modulation.linear.weight != 0).any()
    step = torch.nn.functional.softplus(model.blocks[3].mixer.dt_proj.bias)
    assert 0.001 <= step.min() and step.max() <= 0.1
    bound = (1 / 128) ** 0.5 / 3  # kaiming uniform with a = sqrt(5) of fan-in 128, over sqrt(9)
    out_proj = model.blocks[3].mixer.out_proj.weight
    assert out_proj.abs().max() <= bound and out_proj.abs().max() > 0.95 * bound
    time_mlp = model.modulation.time_mlp[0]
    for parameter in (model.label_embed.weight, model.pad_tokens, time_mlp.weight):
        assert parameter.std().item() == pytest.approx(0.02, rel=0.2)
    assert model.blocks[0].scale_shift_table.std().item() == pytest.approx(1 / 8, rel=0.2)


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        (dict(input_size=7), "7 x 7 is not divisible by the patch size 2"),
        (dict(depth=4), "depth is 4"),
        (dict(mixer=dict(name="conv")), "mixer.name is 'conv', expected one of mamba, attention"),
    ],
)
def test_impossible_options_are_named(wrong, sentence):
    with pytest.raises(UserError, match=sentence):
        DiM(**{**TINY, **wrong})


def test_compiles_without_graph_breaks(monkeypatch):
    """The whole network, as torch.compile traces it; the operators are the reference's."""
    monkeypatch.setenv("DIM_BACKEND", "reference")
    model = DiM(input_size=4, in_channels=3, dim=16, depth=3, num_classes=4, patch_size=2)
    inputs = torch.randn(2, 3, 4, 4), torch.tensor([3.0, 700.0]), torch.tensor([1, 4])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*inputs), model(*inputs))


def test_a_first_forward_under_inference_mode_leaves_ordinary_tensors():
    """Orders and padding of a grid are made once, for training too; graphs read their addresses."""
    sequence_order.cache_clear()
    pad_index.cache_clear()
    model, (x, t, y) = DiM(**TINY), inputs()
    with torch.inference_mode():
        expected = model(x, t, y)
    found = model(x, t, y)
    found.sum().backward()
    assert torch.equal(found, expected)
    cpu = torch.device("cpu")
    assert sequence_order(1, 4, 4, 3, 5, cpu) is sequence_order(1, 4, 4, 3, 5, cpu)


def test_hidden_tokens_are_those_after_a_block():
    model, (x, t, y) = DiM(**TINY).eval(), inputs()
    outputs = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, inputs, output: outputs.append(output[0]))
    out, inner = model(x, t, y, hidden=(1, 4))
    assert torch.equal(out, model(x, t, y)) and inner.keys() == {1, 4}
    assert inner[1].shape == (3, 2 + 3 + 7 * 7, 16)
    assert all(torch.equal(tokens, outputs[k]) for k, tokens in inner.items())


@torch.no_grad()
def test_a_head_in_place_of_the_final_one():
    """The internal head after the last block, given the final one's weights and a smoother that
    does nothing, predicts the same; it changes no other output, and at first predicts 0.
    """
    torch.manual_seed(0)
    model, (x, t, y) = DiM(**TINY).eval(), inputs(size=(8, 12))
    model.last_smoother.bias.zero_()
    model.last_smoother.weight.copy_(torch.eye(3)[1].outer(torch.eye(3)[1]).expand(16, 1, 3, 3))
    expected = model(x, t, y)
    state = to_official(model)
    add_heads(model, dict(mse=1.0, internal=dict(weight=0.5, block=4)), training=True)
    assert [name for name in to_official(model) if "heads.internal." not in name] == [*state]
    out, inner = model(x, t, y, hidden=("internal", 4))
    assert torch.equal(out, expected) and inner[4].shape == (3, 2 + 3 + 7 * 9, 16)
    assert (inner["internal"] == 0).all()
    head = model.heads["internal"]
    for own, final in ((head.norm, model.norm_out), (head.modulation, model.head_modulation),
                       (head.linear, model.head)):  # fmt: skip
        own.load_state_dict(final.state_dict())
    found = model(x, t, y, hidden=("internal",))[1]
    torch.testing.assert_close(found["internal"], expected)


def test_attention_in_place_of_mamba():
    """It sees every token, its gradients reach every parameter, and padding has a number of its
    own; weights pass the official names unchanged.
    """
    torch.manual_seed(0)
    model = DiM(**TINY, mixer=dict(name="attention", heads=4), num_pad_tokens=1)
    x, t, y = inputs()
    out, inner = model(x, t, y, hidden=(0,))
    assert inner[0].shape == (3, 2 + 1 + 5 * 5, 16)
    out.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    state = to_official(model)
    assert "blocks.0.mixer.qkv.weight" in state
    assert from_official(model, state).keys() == model.state_dict().keys()


@pytest.mark.parametrize("layout", ["lateral", "rho_pad"])
def test_without_padding_the_sequence_is_time_label_and_image(layout):
    torch.manual_seed(0)
    model, (x, t, y) = DiM(**TINY, num_pad_tokens=0, pad_layout=layout), inputs()
    torch.nn.init.normal_(model.pos_embed)
    out, inner = model(x, t, y, hidden=(0,))
    image = model.patch_embed(x) + model.pos_embed[:, 2:].unflatten(1, (4, 4))
    image = model.smooth(model.first_smoother, image).flatten(1, 2)
    extra = torch.stack([sinusoidal_embedding(t, 16), model.label_embed(y)], 1)
    tokens = torch.cat([extra + model.pos_embed[:, :2], image], 1)
    expected, _ = model.blocks[0](tokens, model.modulation(t, y), None)
    torch.testing.assert_close(inner[0], expected)
    out.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_attention_without_padding_is_trained_for_two_steps(in_process, tmp_path):
    changes = dict(
        nnet__mixer__name="attention", nnet__num_pad_tokens=0, train__n_steps=2,
        train__save_interval=2, train__num_workers=0, train__fid_samples=0, train__grid_samples=0,
    )  # fmt: skip
    assert in_process("train", runs.arguments(tmp_path / "run", **changes)) == 0
    network, average, *_ = runs.weights(tmp_path / "run", 2)
    name = "blocks.0.mixer.qkv.weight"
    assert network[name].isfinite().all() and not torch.equal(network[name], average[name])


class Echo(torch.nn.Linear):
    """The smallest mixer; its fused form, if `fused`, is the composed one."""

    calls = 0

    def __init__(self, dim, fused=False):
        super().__init__(dim, dim)
        if fused:
            self.block = self.run_block

    def forward(self, x, order):
        return super().forward(x)

    def run_block(self, x, modulation, order, drop_path_scale, skip):
        Echo.calls += 1
        return compose_block(self, x, modulation, order, drop_path_scale, skip)


def test_a_mixer_of_ones_own(monkeypatch):
    """MIXERS takes any module; the fused form of a mixer is the whole block."""
    monkeypatch.setitem(MIXERS, "echo", Echo)
    found = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = DiM(**TINY, drop_path=0.5, mixer=dict(name="echo", fused=fused)).train()
        found.append(model(*inputs(), drop_path_draw=torch.full((3, 5), 0.7)))
    assert torch.equal(*found) and Echo.calls == 5


def test_freeu_computes_in_float32():
    x = 3 + torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(0))
    half = x.bfloat16()
    expected = boost_stream(half.float(), 1.4)
    found = boost_stream(half, 1.4)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected.bfloat16())
