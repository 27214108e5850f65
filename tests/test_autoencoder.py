"""The KL autoencoder: the official numbers, every format of its weights, files that are no
autoencoder, decoding in bounded memory.
"""

import json
import weakref

import pytest
import torch
import torch.nn.functional as F
from golden_cases import assert_close, cases, det_weights, params
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from libs.data import autoencoder
from libs.data.autoencoder import (
    Autoencoder,
    load_autoencoder,
    network_from_state,
    sample_moments,
    to_ldm,
)
from libs.files import sha256_of
from libs.model.dim import DiM
from utils import UserError

# torch's remark on the pickle that is refused here.
pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")

GOLDEN_TOLERANCE = 1e-5  # of the golden README: room for another summation order
SUMMATION = 3e-6  # float32 sums of about 600 products in another order, through 20 layers
GIB = 2**30
SHAPES = [case for _, case, _ in cases("state_dict_shapes") if "embed_dim" in case]


def make_network(widths=(32, 64), resnets=1, latent_channels=4, device="cpu", **options):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    with torch.device(device):
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            block_out_channels=widths,
            layers_per_block=resnets,
            latent_channels=latent_channels,
            **options,
        )


@pytest.fixture(scope="module")
def network():
    """Two levels; norms and biases drawn too, so that none could be left out unseen."""
    network = make_network()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return network


@pytest.fixture(scope="module")
def ldm(network):
    return to_ldm(network)


@pytest.fixture(scope="module")
def z():
    return autoencoder.SCALE_FACTOR * torch.randn(3, 4, 6, 5, generator=torch.manual_seed(1))


def save_folder(folder, tensors, name, **config):
    """A diffusers folder with just that in its config.json."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (save_file if name.endswith(".safetensors") else torch.save)(tensors, folder / name)
    return folder


# ---------------------------------------------------------------------------------------------
# The official numbers


@pytest.mark.skipif(not SHAPES, reason="no golden list of the autoencoder's tensors")
@pytest.mark.parametrize("case, arrays", params("autoencoder"))
def test_golden(case, arrays):
    state = det_weights().det_state(SHAPES[0]["state_dict"], case["weight_seed"])
    network = network_from_state({name: torch.from_numpy(x) for name, x in state.items()})
    model = Autoencoder(network, scale_factor=case["scale_factor"])
    seen = {}
    for name, module in (
        ("encoder_mid", network.encoder.mid_block.resnets[1]),
        ("decoder_mid_attn", network.decoder.mid_block.attentions[0]),
    ):
        module.register_forward_hook(lambda *call, name=name: seen.update({name: call[-1]}))
    x, noise, z = (torch.from_numpy(arrays[name]) for name in ("x", "noise", "z"))
    found = dict(moments=model.moments(x), z=model.encode(x, noise), image=model.decode(z), **seen)
    for name, actual in found.items():
        assert_close(actual, arrays[name], GOLDEN_TOLERANCE, name)
    sampled = sample_moments(torch.from_numpy(arrays["moments"]), noise, case["scale_factor"])
    assert_close(sampled, z, GOLDEN_TOLERANCE, "z of the stored moments")


@pytest.mark.skipif(not SHAPES, reason="no golden list of the autoencoder's tensors")
def test_the_full_size_network_has_the_official_tensors():
    """From shapes alone to a network and back, without memory for its 84 million parameters."""
    for case in SHAPES:
        listed = [(name, tuple(shape)) for name, shape in case["state_dict"]]
        network = network_from_state({n: torch.empty(s, device="meta") for n, s in listed})
        assert sum(p.numel() for p in network.parameters()) == case["n_params"]
        assert {n: tuple(x.shape) for n, x in to_ldm(network).items()} == dict(listed)
        model = Autoencoder(network)
        assert model.latent_channels == case["embed_dim"]
        assert model.downsample == case["downsampling"]
        assert model.scale_factor == case["scale_factor"]
        assert all(p.device.type == "meta" for p in model.parameters())


def test_sampling_clamps_the_log_variance():
    moments = torch.tensor([0.5, 0.5, 0.5, 0.0, -80.0, 80.0]).view(1, 6, 1, 1)
    noise = torch.tensor([2.0, 1e6, 1.0]).view(1, 3, 1, 1)
    std = torch.tensor([1.0, torch.tensor(-15.0).exp(), torch.tensor(10.0).exp()]).view(1, 3, 1, 1)
    assert_close(sample_moments(moments, noise, 0.25), 0.25 * (0.5 + std * noise), 1e-6)
    assert sample_moments(moments.half(), noise, 0.25).dtype == torch.float32
    with pytest.raises(ValueError, match="does not fit"):
        sample_moments(moments.expand(2, -1, -1, -1), noise, 0.25)


# ---------------------------------------------------------------------------------------------
# Files


def test_ldm_names_and_shapes(ldm):
    """LDM numbers the decoder's levels from the finest, diffusers from the coarsest."""
    assert {name: tuple(x.shape) for name, x in ldm.items()}.items() >= {
        "encoder.down.0.downsample.conv.weight": (32, 32, 3, 3),
        "encoder.down.1.block.0.nin_shortcut.weight": (64, 32, 1, 1),
        "encoder.mid.block_2.norm1.bias": (64,),
        "encoder.mid.attn_1.proj_out.weight": (64, 64, 1, 1),
        "encoder.norm_out.weight": (64,),
        "decoder.mid.attn_1.norm.weight": (64,),
        "decoder.up.1.upsample.conv.weight": (64, 64, 3, 3),
        "decoder.up.0.block.0.nin_shortcut.weight": (32, 64, 1, 1),
        "decoder.up.0.block.1.conv2.bias": (32,),
        "post_quant_conv.weight": (4, 4, 1, 1),
    }.items()


@pytest.mark.parametrize(
    "options",
    [
        dict(widths=(32, 64, 32), resnets=2, latent_channels=3),
        dict(widths=(64,), in_channels=1, out_channels=1),
        dict(mid_block_add_attention=False),
        dict(use_quant_conv=False, use_post_quant_conv=False),
    ],
    ids=["three levels", "one level, grey", "no attention", "no quantisation"],
)
def test_round_trip_is_bitwise(options):
    network = make_network(**options)
    ldm = to_ldm(network)
    back = network_from_state(ldm)
    for name, tensor in network.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    assert list(to_ldm(back)) == list(ldm)
    assert all(torch.equal(tensor, ldm[name]) for name, tensor in to_ldm(back).items())


OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def old_name(name):
    for new, old in OLD_NAMES.items():
        name = name.replace(f".{new}.", f".{old}.")
    return name


def test_every_format_gives_the_same_network(tmp_path, network, ldm, z):
    own = network.state_dict()
    old = {old_name(name): tensor for name, tensor in own.items()}
    assert sum(name not in own for name in old) == 16  # 4 matrices and 4 biases in each half
    loss = {"loss.logvar": torch.zeros(()), "model_ema.num_updates": torch.tensor(3)}
    whole = {f"first_stage_model.{name}": x for name, x in (ldm | loss).items()}
    whole["model.diffusion_model.time_embed.0.weight"] = torch.zeros(3, 3)
    torch.save(ldm, tmp_path / "autoencoder_kl.pth")
    torch.save({"state_dict": ldm | loss, "epoch": 3}, tmp_path / "training.ckpt")
    torch.save({"state_dict": whole}, tmp_path / "stable_diffusion.ckpt")
    doubles = {name: torch.nn.Parameter(x.double()) for name, x in ldm.items()}
    torch.save(doubles, tmp_path / "doubles.pth")
    save_file(ldm, tmp_path / "autoencoder_kl.safetensors")
    safe, pickled = autoencoder.FOLDER_WEIGHTS
    config = dict(_class_name="AutoencoderKL", scaling_factor=0.18215, norm_num_groups=32)
    folder = save_folder(tmp_path / "folder", own, safe, **config)
    save_folder(tmp_path / "old", old, pickled)

    expected = Autoencoder(network).decode(z)
    for path in sorted(tmp_path.iterdir()):
        model = load_autoencoder(path)
        assert torch.equal(model.decode(z), expected), path.name
        assert model.sha256 == sha256_of(next(path.glob("diff*")) if path.is_dir() else path)
        assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {(torch.float32, False)}
        assert not any(module.training for module in model.modules())
    assert (model.latent_channels, model.downsample) == (4, 2)
    assert load_autoencoder(str(folder)).scale_factor == 0.18215


def test_half_precision_files_are_converted(tmp_path, ldm):
    torch.save({name: tensor.half() for name, tensor in ldm.items()}, tmp_path / "half.pth")
    loaded = to_ldm(load_autoencoder(tmp_path / "half.pth").network)
    assert all(torch.equal(loaded[name], x.half().float()) for name, x in ldm.items())


class Payload:
    """What a pickle could run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def without(ldm, *names):
    return {name: x for name, x in ldm.items() if name not in names}


DAMAGES = {
    "missing": (
        lambda ldm: without(ldm, "decoder.up.1.block.0.conv1.bias", "quant_conv.bias"),
        "missing: decoder.up.1.block.0.conv1.bias, quant_conv.bias;",
    ),
    "no decoder": (
        lambda ldm: {name: x for name, x in ldm.items() if name.startswith("encoder")},
        "the convolution decoder.conv_out.weight is missing",
    ),
    "extra": (
        lambda ldm: ldm | {f"encoder.down.0.attn.{i}.q.bias": torch.zeros(9) for i in range(5)},
        "unexpected: encoder.down.0.attn.0.q.bias, encoder.down.0.attn.1.q.bias, "
        "encoder.down.0.attn.2.q.bias and 2 more;",
    ),
    "one block less": (
        lambda ldm: {name: x for name, x in ldm.items() if not name.startswith("decoder.up.1.b")},
        "missing: decoder.up.1.block.0.norm1.weight, ",
    ),
    "widths": (
        lambda ldm: ldm | {"decoder.norm_out.weight": torch.ones(64)},
        "of the wrong shape: decoder.norm_out.weight (64,) instead of (32,);",
    ),
    "groups": (
        lambda ldm: ldm | {"encoder.down.0.block.0.conv1.weight": torch.zeros(40, 32, 3, 3)},
        "[40, 64] channels, expected multiples of 32",
    ),
    "dimensions": (
        lambda ldm: ldm | {"encoder.conv_in.weight": torch.zeros(32)},
        "the convolution encoder.conv_in.weight has the shape (32,)",
    ),
    "shared": (  # one tensor by many names, each of which would become a copy
        lambda ldm: ldm | dict.fromkeys(map(str, range(3000)), ldm["decoder.conv_in.weight"]),
        "its tensors claim more than it holds",
    ),
    "absurd": (  # within what the file holds, but not the network that it asks for
        lambda ldm: ldm | {"encoder.down.0.block.0.conv1.weight": torch.zeros(2**16, 1, 1, 1)},
        "of the wrong shape: encoder.conv_in.weight (32, 3, 3, 3) instead of (65536, 3, 3, 3), ",
    ),
    "numbers": (
        lambda ldm: ldm | {"quant_conv.bias": 3.0},
        "it holds what is no floating-point tensor: quant_conv.bias",
    ),
    "integers": (
        lambda ldm: ldm | {"quant_conv.bias": torch.zeros(8, dtype=torch.int64)},
        "it holds what is no floating-point tensor: quant_conv.bias",
    ),
    "list": (lambda ldm: list(ldm.values()), "it holds no tensors by name"),
    "empty": (lambda ldm: {}, "it holds no tensors by name"),
}  # fmt: skip


def assert_refused(path, *says, **options):
    """One UserError sentence that names the file and holds the words."""
    with pytest.raises(UserError) as caught:
        load_autoencoder(path, **options)
    said = str(caught.value)
    assert "\n" not in said and str(path) in said, said
    for words in says:
        assert words in said, said
    return said


@pytest.mark.parametrize("damage", DAMAGES)
def test_another_content_is_refused(tmp_path, ldm, damage):
    change, says = DAMAGES[damage]
    torch.save(change(ldm), tmp_path / "file.pth")
    assert_refused(tmp_path / "file.pth", says)


def test_another_network_is_refused(tmp_path):
    model = DiM(input_size=4, patch_size=1, in_channels=3, dim=16, depth=3, num_classes=0)
    save_file(model.state_dict(), tmp_path / "nnet_ema.safetensors")
    assert_refused(
        tmp_path / "nnet_ema.safetensors",
        "is not Stable Diffusion's autoencoder",
        "encoder.conv_in.weight is missing, and it holds ",
        "more; use Stable Diffusion's, such as U-ViT's autoencoder_kl.pth",
    )


@pytest.mark.parametrize("name", ["file.pth", "file.safetensors"])
def test_a_truncated_file_is_refused(tmp_path, ldm, name):
    (save_file if name.endswith(".safetensors") else torch.save)(ldm, tmp_path / name)
    content = (tmp_path / name).read_bytes()
    for kept in (len(content) // 2, 0):
        (tmp_path / name).write_bytes(content[:kept])
        assert_refused(tmp_path / name, "damaged")


def test_a_missing_path_says_what_to_put_there(tmp_path):
    for name in ("autoencoder_kl.pth", "folder/vae"):
        assert_refused(tmp_path / name, "there is no autoencoder", "autoencoder_kl_ema.pth")
    assert_refused(tmp_path, "config.json", *autoencoder.FOLDER_WEIGHTS)


def test_a_folder_of_another_autoencoder_is_refused(tmp_path, network):
    state, (safe, _) = network.state_dict(), autoencoder.FOLDER_WEIGHTS
    for number, (key, value) in enumerate(
        dict(
            scaling_factor=0.13025, norm_num_groups=16, shift_factor=0.1, act_fn="relu",
            _class_name="AutoencoderTiny", latents_mean=[0, 0, 0, 0],
        ).items()
    ):  # fmt: skip
        folder = save_folder(tmp_path / str(number), state, safe, **{key: value})
        assert_refused(folder, f"has {key} ", "expected ")
    model = load_autoencoder(tmp_path / "0", scale_factor=0.13025)
    assert model.scale_factor == 0.13025
    (tmp_path / "0" / "config.json").write_text("{", encoding="utf-8")
    assert_refused(tmp_path / "0", "is not valid JSON")


@pytest.mark.parametrize("scale_factor", [0.0, -0.18215, float("nan"), float("inf")])
def test_a_scale_that_is_none_is_refused(network, scale_factor):
    with pytest.raises(UserError, match="expected a positive number, 0.18215 for"):
        Autoencoder(network, scale_factor=scale_factor)


# ---------------------------------------------------------------------------------------------
# Encoding and decoding


def test_encode_samples_the_moments(network):
    model, x = Autoencoder(network, scale_factor=0.5), torch.rand(2, 3, 8, 12) * 2 - 1
    moments, noise = model.moments(x.requires_grad_()), torch.randn(2, 4, 4, 6)
    assert moments.shape == (2, 8, 4, 6) and moments.dtype == torch.float32
    assert not moments.requires_grad
    with torch.no_grad():
        dist = network.encode(x).latent_dist
    assert_close(moments[:, :4], dist.mean, SUMMATION)
    expected = 0.5 * (dist.mean + dist.std * noise)
    assert_close(model.encode(x, noise), expected, SUMMATION)
    assert torch.equal(model.sample(moments, noise), sample_moments(moments, noise, 0.5))


def test_decode_is_that_of_diffusers(network, z):
    with torch.no_grad():
        expected = network.decode(z / 0.5).sample
    image = Autoencoder(network, scale_factor=0.5).decode(z.clone().requires_grad_())
    assert_close(image, expected, SUMMATION)
    assert image.dtype == torch.float32 and not image.requires_grad


@pytest.mark.parametrize(
    "pixels", [2 * 12 * 10, 12 * 10, 50, 10, 1], ids=lambda pixels: f"{pixels} pixels"
)
def test_any_pass_gives_the_same(monkeypatch, network, z, pixels):
    """Two images a pass, one, then stripes of 5, 1 and (at least) 1 of 12 rows of pixels."""
    model, x = Autoencoder(network), torch.rand(3, 3, 12, 10) * 2 - 1
    image, moments = model.decode(z), model.moments(x)
    calls = []
    hook = network.decoder.conv_in.register_forward_hook(lambda *call: calls.append(call))
    monkeypatch.setattr(autoencoder, "PIXELS_PER_PASS", pixels)
    try:
        assert_close(model.decode(z), image, SUMMATION, "image")
        assert_close(model.moments(x), moments, SUMMATION, "moments")
    finally:
        hook.remove()
    assert len(calls) == (2 if pixels == 240 else 3)


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3])
def test_stripes_are_exact(monkeypatch, kernel, scale):
    """In float64 against the whole, for every number of rows; a halo too few is an error of 1."""
    conv = torch.nn.Conv2d(3, 5, kernel, padding=kernel // 2).double()
    x = torch.randn(2, 3, 9, 4, dtype=torch.float64)
    for rows in range(1, 10):
        monkeypatch.setattr(autoencoder, "PIXELS_PER_PASS", 2 * 4 * scale**2 * rows)
        with torch.no_grad():
            expected = conv(F.interpolate(x, scale_factor=scale, mode="nearest"))
            assert_close(autoencoder._convolve(conv, x, scale), expected, 1e-14, f"{rows} rows")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_networks(network, z, dtype):
    """Inputs are cast, results float32, near float32's: 20 layers of rounding of 2^-9 at most."""
    half = Autoencoder(network_from_state(to_ldm(network))).to(dtype)
    x = torch.rand(1, 3, 8, 8) * 2 - 1
    for name, value in (("moments", x), ("decode", z)):
        actual, expected = getattr(half, name)(value), getattr(Autoencoder(network), name)(value)
        assert actual.dtype == torch.float32
        assert not torch.equal(actual, expected)  # it did compute in `dtype`
        assert_close(actual, expected, 0.05, name)


def test_inputs_that_do_not_fit(network):
    model = Autoencoder(make_network(widths=(32, 32, 32), device="meta"))
    for height, width in ((10, 8), (8, 9)):
        with pytest.raises(UserError, match=f"cannot encode {height}x{width} .* multiples of 4"):
            model.moments(torch.zeros(1, 3, height, width))
    for shape in ((1, 4, 8, 8), (3, 8, 8), (0, 3, 8, 8), (1, 3, 0, 8)):
        with pytest.raises(UserError, match=r"needs images \(B, 3, H, W\), not"):
            model.moments(torch.zeros(shape))
    for shape in ((1, 8, 8, 8), (4, 8, 8), (0, 4, 8, 8)):
        with pytest.raises(UserError, match=r"needs latents \(B, 4, H, W\), not"):
            model.decode(torch.zeros(shape))


# ---------------------------------------------------------------------------------------------
# Memory


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors made inside and still alive, and their peak, also on "meta", where they
    take none; and the pixels of the largest convolution.
    """

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.known, self.convolved = 0, 0, weakref.WeakSet(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            self.convolved = max(self.convolved, out[:, 0].numel())
        before = {x.untyped_storage() for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)}
        for tensor in tree_leaves(out):
            if torch.is_tensor(tensor) and tensor.untyped_storage() not in self.known | before:
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage):
        self.known.add(storage)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.free, storage.nbytes())

    def free(self, nbytes):
        self.live -= nbytes


def test_live_bytes_counts():
    with LiveBytes() as memory:
        x = torch.empty(1000, device="meta")
        y = (x + 1).view(10, 100) * 2
        y.add_(1)
        del y
        x = x.half()
    assert (memory.peak, memory.live) == (12000, 2000)


@pytest.mark.parametrize("side, dtype, gib", [(1536, torch.float32, 6.5), (2048, torch.half, 6.0)])
def test_live_tensors_of_a_large_decode(monkeypatch, side, dtype, gib):
    """Stable Diffusion's sizes: 5 * 128 channels of the image, a stripe of 512x512 and 3 channels.

    What a convolution's kernel needs besides, which is not seen here, is for a stripe as well. The
    attention is left to the fused kernels, which hold no matrix of scores; on "meta" torch would
    take the one that does.
    """
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, *_, **__: torch.empty_like(q))
    network = make_network(widths=(128, 256, 512, 512), resnets=2, device="meta")
    model = Autoencoder(network).to(dtype)
    with LiveBytes() as memory:
        image = model.decode(torch.empty(2, 4, side // 8, side // 8, device="meta"))
    assert image.shape == (2, 3, side, side)
    finest = 128 * side**2 * dtype.itemsize
    assert 5 * finest < memory.peak < gib * GIB
    assert memory.convolved <= autoencoder.PIXELS_PER_PASS
