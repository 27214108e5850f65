"""The KL autoencoder: the official numbers, every format of its weights, files that are none."""

import pytest
import torch
import writers
from golden_cases import assert_close, cases, det_weights, params
from safetensors.torch import load_file, save_file

from libs.data import autoencoder
from libs.data.autoencoder import Autoencoder, Scaling, load_autoencoder, sample_moments
from libs.files import hash_file
from utils import UserError

GOLDEN_TOLERANCE = 1e-5  # the official numbers: room for another summation order
SUMMATION = 3e-6  # float32 sums of about 600 products in another order, through 20 layers
SHAPES = [case for _, case, _ in cases("state_dict_shapes") if "embed_dim" in case]

# diffusers' words -> LDM's, in this order.
LDM_WORDS = {
    ".mid_block.resnets.0.": ".mid.block_1.", ".mid_block.resnets.1.": ".mid.block_2.",
    ".mid_block.attentions.0.": ".mid.attn_1.", ".group_norm.": ".norm.", ".to_q.": ".q.",
    ".to_k.": ".k.", ".to_v.": ".v.", ".to_out.0.": ".proj_out.", ".down_blocks.": ".down.",
    ".up_blocks.0.": ".up.1.", ".up_blocks.1.": ".up.0.", ".resnets.": ".block.",
    ".downsamplers.0.": ".downsample.", ".upsamplers.0.": ".upsample.",
    ".conv_shortcut.": ".nin_shortcut.", ".conv_norm_out.": ".norm_out.",
}  # fmt: skip


def to_ldm(network):
    """name -> tensor of a network of two levels as LDM writes it: attention has 1x1 convolutions,
    the decoder's levels are numbered from the finest.
    """
    tensors = {}
    for name, tensor in network.state_dict().items():
        is_matrix = ".attentions." in name and name.endswith(".weight") and "norm" not in name
        for word, other in LDM_WORDS.items():
            name = name.replace(word, other)
        tensors[name] = tensor[..., None, None] if is_matrix else tensor
    return tensors


@pytest.fixture(scope="module")
def network():
    return writers.make_autoencoder(widths=(32, 64), layers_per_block=1)


@pytest.fixture
def architecture(network, tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("architecture")
    network.save_config(folder)
    monkeypatch.setattr(autoencoder, "STABLE_DIFFUSION", folder)


@pytest.fixture(scope="module")
def z():
    return torch.randn(3, 4, 6, 5, generator=torch.manual_seed(1))


@pytest.mark.skipif(not SHAPES, reason="no golden list of the autoencoder's tensors")
@pytest.mark.parametrize("case, arrays", params("autoencoder"))
def test_golden(tmp_path, case, arrays):
    """From a file of the official names, as U-ViT's is, at its full size."""
    state = det_weights().det_state(SHAPES[0]["state_dict"], case["weight_seed"])
    assert sum(x.size for x in state.values()) == SHAPES[0]["n_params"]
    torch.save({name: torch.from_numpy(x) for name, x in state.items()}, tmp_path / "kl.pth")
    model = load_autoencoder(tmp_path / "kl.pth")
    assert model.scaling == Scaling(case["scale_factor"]) and not model.force_upcast
    assert model.latent_channels == SHAPES[0]["embed_dim"]
    assert model.downsample == SHAPES[0]["downsampling"]
    seen, network = {}, model.network
    for name, module in (
        ("encoder_mid", network.encoder.mid_block.resnets[1]),
        ("decoder_mid_attn", network.decoder.mid_block.attentions[0]),
    ):
        module.register_forward_hook(lambda *call, name=name: seen.update({name: call[-1]}))
    x, noise, z = (torch.from_numpy(arrays[name]) for name in ("x", "noise", "z"))
    found = {"moments": model.moments(x), "image": model.decode(model.scaling.unscale(z)), **seen}
    found["z"] = sample_moments(found["moments"], noise, model.scaling)
    for name, actual in found.items():
        assert_close(actual, arrays[name], GOLDEN_TOLERANCE, name)
    sampled = sample_moments(torch.from_numpy(arrays["moments"]), noise, model.scaling)
    assert_close(sampled, z, GOLDEN_TOLERANCE, "z of the stored moments")


def test_sampling_clamps_the_log_variance():
    moments = torch.tensor([0.5, 0.5, 0.5, 0.0, -80.0, 80.0]).view(1, 6, 1, 1)
    noise = torch.tensor([2.0, 1e6, 1.0]).view(1, 3, 1, 1)
    std = torch.tensor([1.0, torch.tensor(-15.0).exp(), torch.tensor(10.0).exp()]).view(1, 3, 1, 1)
    scaling = Scaling(0.25)
    assert_close(sample_moments(moments, noise, scaling), 0.25 * (0.5 + std * noise), 1e-6)
    assert sample_moments(moments.half(), noise, scaling).dtype == torch.float32


def old_name(name):
    """In folders of older diffusers."""
    words = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, old in words.items():
        name = name.replace(f".{new}.", f".{old}.")
    return name


def test_every_format_gives_the_same_network(tmp_path, network, architecture, z):
    ldm, loss = to_ldm(network), {"loss.logvar": torch.zeros(())}
    whole = {f"first_stage_model.{name}": x for name, x in (ldm | loss).items()}
    whole["model.diffusion_model.time_embed.0.weight"] = torch.zeros(3, 3)
    torch.save(ldm, tmp_path / "autoencoder_kl.pth")
    torch.save({"state_dict": ldm | loss, "epoch": 3}, tmp_path / "training.ckpt")
    torch.save({"state_dict": whole}, tmp_path / "stable_diffusion.ckpt")
    torch.save({name: x.double() for name, x in ldm.items()}, tmp_path / "doubles.pth")
    save_file(ldm, tmp_path / "autoencoder_kl.safetensors")
    network.save_pretrained(tmp_path / "folder")
    network.save_config(tmp_path / "old")
    safe, pickled = (f"{autoencoder.FOLDER_WEIGHTS}.{end}" for end in ("safetensors", "bin"))
    tensors = load_file(tmp_path / "folder" / safe)
    torch.save({old_name(name): x for name, x in tensors.items()}, tmp_path / "old" / pickled)

    expected = Autoencoder(network).decode(z)
    paths = sorted(tmp_path.iterdir())
    assert len(paths) == 7
    for path in paths:
        model = load_autoencoder(path)
        assert torch.equal(model.decode(z), expected), path.name
        assert model.sha256 == hash_file(next(path.glob("diff*")) if path.is_dir() else path)
        assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {(torch.float32, False)}
        assert not any(module.training for module in model.modules())
    assert (model.latent_channels, model.downsample) == (4, 2)


@pytest.mark.parametrize("change", [
    lambda ldm: {name: x for name, x in ldm.items() if name != "quant_conv.bias"},
    lambda ldm: ldm | {"decoder.norm_out.weight": torch.ones(64)},
    lambda ldm: {"pos_embed": torch.zeros(1, 18, 16)},
    lambda ldm: list(ldm.values()),
], ids=["one tensor less", "another shape", "another network", "a list"])  # fmt: skip
def test_weights_of_another_network_are_refused(tmp_path, network, architecture, change):
    torch.save(change(to_ldm(network)), tmp_path / "x.pth")
    with pytest.raises(UserError, match="x.pth is damaged or no KL autoencoder of Stable"):
        load_autoencoder(tmp_path / "x.pth")


def test_missing_files_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("none.pth", "empty"):
        with pytest.raises(UserError, match=f"there is no autoencoder .*{name}: put Stable"):
            load_autoencoder(tmp_path / name)


@pytest.mark.parametrize("images", [1, 2, 3])
def test_any_pass_gives_the_same(monkeypatch, network, z, images):
    model, x = Autoencoder(network), torch.rand(3, 3, 12, 10) * 2 - 1
    image, moments = model.decode(z), model.moments(x)
    calls = []
    hook = network.decoder.conv_in.register_forward_hook(lambda *call: calls.append(call))
    for name in ("PIXELS_PER_PASS", "ENCODED_PER_PASS"):
        monkeypatch.setattr(autoencoder, name, images * 12 * 10)
    assert_close(model.decode(z), image, SUMMATION, "image")
    assert_close(model.moments(x), moments, SUMMATION, "moments")
    hook.remove()
    assert len(calls) == {1: 3, 2: 2, 3: 1}[images]


def test_tiles_are_near_the_whole(tmp_path, network):
    """Seams differ by group statistics alone; most of the picture stays."""
    network.save_pretrained(tmp_path / "vae")
    whole = load_autoencoder(tmp_path / "vae")
    tiled = load_autoencoder(tmp_path / "vae", tiling=True)
    z = torch.randn(2, 4, 24, 24)
    calls = []
    tiled.network.decoder.conv_in.register_forward_hook(lambda *call: calls.append(call[1]))
    image = tiled.decode(z)
    assert image.shape == whole.decode(z).shape and len(calls) > 2
    assert max(x.shape[-1] for (x,) in calls) < 24 and {len(x) for (x,) in calls} == {1}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_networks(tmp_path, network, z, dtype):
    """Inputs are cast, results float32, near float32's: 20 layers of rounding of 2^-9 at most."""
    network.save_pretrained(tmp_path / "vae")
    half = load_autoencoder(tmp_path / "vae").to(dtype)
    x = torch.rand(1, 3, 8, 8) * 2 - 1
    for name, value in (("moments", x), ("decode", z)):
        actual, expected = getattr(half, name)(value), getattr(Autoencoder(network), name)(value)
        assert actual.dtype == torch.float32
        assert not torch.equal(actual, expected)  # it did compute in `dtype`
        assert_close(actual, expected, 0.05, name)
