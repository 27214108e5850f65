"""Codecs, and what a latent run refuses before it begins."""

import types

import pytest
import torch
from runs import assert_one_sentence
from writers import place_of_everything, write_autoencoder

from configs import imagenet256_H_DiM
from libs.data.autoencoder import load_autoencoder
from libs.data.codec import LatentCodec, PixelCodec, latent_codec
from utils import UserError

SCALE = 0.18215


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return place_of_everything(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    return load_autoencoder(write_autoencoder(tmp_path_factory.mktemp("ae") / "ae.pth"))


def test_pixels_are_what_they_are():
    codec, x = PixelCodec(), torch.rand(2, 3, 4, 4) * 2 - 1
    assert codec.latent_shape((3, 4, 4)) == codec.image_shape((3, 4, 4)) == (3, 4, 4)
    assert torch.equal(codec.decode(codec.encode(x)), (x * 0.5 + 0.5).clamp(0, 1))
    assert not codec.needs_noise and codec.describe() == {}


def test_images_and_their_moments_give_the_same_latents(autoencoder):
    codec = LatentCodec(autoencoder, scale_factor=SCALE)
    x, noise = torch.rand(2, 3, 16, 24) * 2 - 1, torch.randn(2, 4, 2, 3)
    z = codec.encode(x, noise)
    assert codec.latent_shape((3, 16, 24)) == codec.latent_shape((8, 2, 3)) == z.shape[1:]
    assert codec.image_shape(z.shape[1:]) == (3, 16, 24)
    moments = autoencoder.moments(x)
    assert torch.equal(codec.encode(moments, noise), z)
    # Cached latents need no autoencoder to be read.
    assert torch.equal(LatentCodec(scale_factor=SCALE).encode(moments, noise), z)
    mean, logvar = moments.chunk(2, 1)
    torch.testing.assert_close(z, SCALE * (mean + (logvar / 2).exp() * noise))


def test_decoding_gives_images_from_0_to_1(autoencoder):
    codec, z = LatentCodec(autoencoder, scale_factor=SCALE), 5 * torch.randn(1, 4, 2, 3)
    image = codec.decode(z)
    assert image.shape == (1, 3, 16, 24) and 0 <= image.min() and image.max() <= 1
    assert torch.equal(image, (autoencoder.decode(z) * 0.5 + 0.5).clamp(0, 1))
    described = codec.describe()
    assert described == {"autoencoder_sha256": autoencoder.sha256, "scale_factor": SCALE}


def config_of(path):
    config = imagenet256_H_DiM.get_config()
    config.autoencoder.pretrained_path = path
    return config


def latents(**made_with):
    return types.SimpleNamespace(latent=True, **made_with)


def test_what_does_not_fit_is_refused(autoencoder, tmp_path):
    path = str(write_autoencoder(tmp_path / "other.pth", seed=1))
    with pytest.raises(UserError, match="latents were made with the autoencoder of SHA-256"):
        latent_codec(config_of(path), latents(autoencoder_sha256=autoencoder.sha256))
    with pytest.raises(UserError, match="scale factor of 0.5, but autoencoder.scale_factor is"):
        latent_codec(config_of(path), latents(scale_factor=0.5))
    with pytest.raises(UserError, match="this needs the autoencoder: set --config.autoencoder"):
        latent_codec(config_of(""), latents())
    codec = latent_codec(config_of(""), latents(), decoding=False)
    with pytest.raises(UserError, match="this needs the autoencoder"):
        codec.decode(torch.zeros(1, 4, 2, 2))
    with pytest.raises(UserError, match="cannot encode 20x16 pixels.*multiple of 8"):
        codec.latent_shape((3, 20, 16))


GOOD = {
    "dataset.resolution": 64, "nnet.dim": 32, "nnet.depth": 5, "nnet.input_size": 8,
    "z_shape": "(4,8,8)",
    "nnet.num_classes": 4, "train.batch_size": 8, "train.n_steps": 1, "train.num_workers": 0,
    "train.grid_samples": 0, "train.fid_samples": 0,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*the whole ImageNet has")
@pytest.mark.parametrize("changes, says", [
    ({"dataset.path": "{place}"}, ["train", "ImageNet"]),
    ({"autoencoder.pretrained_path": "{place}/none.pth"}, ["none.pth"]),
    ({"nnet.input_size": 16}, ["z_shape is (4, 8, 8)", "made for (4, 16, 16)"]),
    ({"nnet.input_size": 16, "z_shape": "(4,16,16)"}, ["128 pixels", "dataset.resolution"]),
    ({"nnet.num_classes": 3}, ["4 classes", "nnet.num_classes is 3"]),
    ({"dataset.resolution": 60}, ["64 pixels", "say 60"]),
    ({"nnet.pretrained_path": "{place}/none.pth"}, ["nnet.pretrained_path", "from scratch"]),
    ({"ug_m": 3}, ["64 pixels", "ug_m say 192"]),
    ({"dataset.name": "imagenet256_features"}, ["ImageNet"]),
])  # fmt: skip
def test_one_sentence_before_a_step_is_made(
    place, tmp_path, capsys, in_process, changes, says  # noqa: F811
):  # fmt: skip
    values = GOOD | {
        "dataset.path": "{place}/ImageNet",
        "autoencoder.pretrained_path": "{place}/autoencoder_kl.pth",
    } | changes  # fmt: skip
    words = [
        f"--config.{key}={value.format(place=place) if isinstance(value, str) else value}"
        for key, value in values.items()
    ]
    words += ["--config=configs/imagenet256_H_DiM.py", f"--workdir={tmp_path}/run"]
    status = in_process("train_ldm_discrete", words)
    assert_one_sentence(status, capsys.readouterr().err, *says)
    assert not list(tmp_path.glob("run/ckpts/*"))
