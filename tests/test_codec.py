"""Codecs, and what does not fit them."""

import types

import pytest
import torch
from writers import write_autoencoder

from configs import common
from libs.data.autoencoder import Scaling, load_autoencoder
from libs.data.codec import LatentCodec, PixelCodec, make_latent_codec
from utils import UserError

SCALE = Scaling()


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    return load_autoencoder(write_autoencoder(tmp_path_factory.mktemp("ae") / "vae"))


def test_pixels_are_what_they_are():
    codec, x = PixelCodec(), torch.rand(2, 3, 4, 4) * 2 - 1
    assert codec.latent_shape((3, 4, 4)) == codec.image_shape((3, 4, 4)) == (3, 4, 4)
    assert torch.equal(codec.decode(codec.encode(x)), (x * 0.5 + 0.5).clamp(0, 1))
    assert not codec.needs_noise and codec.describe() == {}


def test_images_and_their_moments_give_the_same_latents(autoencoder):
    codec = LatentCodec(autoencoder, scaling=SCALE)
    x, noise = torch.rand(2, 3, 16, 24) * 2 - 1, torch.randn(2, 4, 2, 3)
    z = codec.encode(x, noise)
    assert codec.latent_shape((3, 16, 24)) == codec.latent_shape((8, 2, 3)) == z.shape[1:]
    assert codec.image_shape(z.shape[1:]) == (3, 16, 24)
    moments = autoencoder.moments(x)
    assert torch.equal(codec.encode(moments, noise), z)
    # Cached latents need no autoencoder to be read.
    assert torch.equal(LatentCodec(None, scaling=SCALE).encode(moments, noise), z)
    mean, logvar = moments.chunk(2, 1)
    torch.testing.assert_close(z, 0.18215 * (mean + (logvar / 2).exp() * noise))


def test_decoding_gives_images_from_0_to_1(autoencoder):
    codec, z = LatentCodec(autoencoder, scaling=SCALE), 5 * torch.randn(1, 4, 2, 3)
    image = codec.decode(z)
    assert image.shape == (1, 3, 16, 24) and 0 <= image.min() and image.max() <= 1
    assert torch.equal(image, (autoencoder.decode(z / 0.18215) * 0.5 + 0.5).clamp(0, 1))
    described = codec.describe()
    assert described == {"autoencoder_sha256": autoencoder.sha256, "scale_factor": 0.18215}


def settings(path):
    section = common.get_config().autoencoder
    section.pretrained_path = path
    return section


def latents(**made_with):
    format = dict(latent=True, scaling=SCALE, latent_channels=4, downsample=8)
    return types.SimpleNamespace(**format, **made_with)


def test_latents_of_another_autoencoder_are_refused(autoencoder, tmp_path):
    path = str(write_autoencoder(tmp_path / "other", seed=1))
    with pytest.raises(UserError, match="latents were made with autoencoder"):
        make_latent_codec(settings(path), latents(autoencoder_sha256=autoencoder.sha256))


def test_without_an_autoencoder_latents_are_read_but_not_decoded():
    codec = make_latent_codec(settings(""), latents(autoencoder_sha256="a"), decoding=False)
    assert codec.autoencoder is None
    images = types.SimpleNamespace(latent=False)
    for dataset, decoding in ((latents(), True), (images, False), (None, True)):
        with pytest.raises(UserError, match="this needs the autoencoder: set --config.autoenc"):
            make_latent_codec(settings(""), dataset, decoding=decoding)
