"""Sampling and measuring: the same pictures for any batch size and number of processes, and figures
that mean what they say.
"""

import json

import numpy as np
import pytest
import runs
import torch
from PIL import Image
from safetensors.torch import load_file

from libs.diffusion import ImageNoise


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained")
    runs.train(workdir, train__n_steps=4)
    return workdir / "ckpts" / "4.ckpt"


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """The digits classifier at its usual place, trained if a demo has not done it yet."""
    path = runs.ROOT / "assets" / "digits_classifier.safetensors"
    if not path.is_file():
        status, output = runs.run("scripts/train_digits_classifier.py")
        assert status == 0, output
    return path


def evaluate(
    trained, folder, *, num_processes, mini_batch_size, algorithm="euler_maruyama_sde", devices=""
):
    changes = dict(
        sample__mini_batch_size=mini_batch_size, sample__n_samples=30, sample__sample_steps=8,
        sample__algorithm=algorithm, sample__path=folder / "png",
    )  # fmt: skip
    words = runs.arguments(folder, **changes)
    status, output = runs.run(
        "eval.py",
        *words,
        f"--nnet_path={trained}",
        f"--output_path={folder / 'result.json'}",
        num_processes=num_processes,
        CUDA_VISIBLE_DEVICES=devices,
        NCCL_NVLS_ENABLE="0",
    )
    assert status == 0, output
    images = np.stack(
        [np.asarray(Image.open(folder / "png" / f"{index}.png")) for index in range(30)]
    )
    return images.astype(int), json.loads((folder / "result.json").read_text()), output


@pytest.mark.parametrize("devices", ["", pytest.param("0,1", marks=pytest.mark.cuda)])
def test_pictures_do_not_depend_on_batch_or_processes(devices, trained, classifier, tmp_path):
    """Within one grey level for 99.9% of the values; so are the figures, but for other batches. On
    the CPU and on two GPUs.
    """
    if devices and torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, found {torch.cuda.device_count()}")
    one, result_one, output = evaluate(
        trained, tmp_path / "one", num_processes=0, mini_batch_size=7, devices=devices[:1]
    )
    two, result_two, _ = evaluate(
        trained, tmp_path / "two", num_processes=2, mini_batch_size=4, devices=devices
    )
    print(
        f"largest difference {np.abs(one - two).max()} levels, Frechet distances "
        f"{result_one['frechet_distance']:.8g} and {result_two['frechet_distance']:.8g}"
    )
    assert one.shape == (30, 8, 8) and one.std() > 10
    assert (np.abs(one - two) <= 1).mean() >= 0.999
    assert result_two["n"] == 30 and result_one["ranks"] == [0] and result_two["ranks"] == [0, 1]
    assert result_two["frechet_distance"] == pytest.approx(result_one["frechet_distance"], rel=1e-2)
    for words in ("Frechet distance", "class agreement", "guidance_scale_standard = 1.4"):
        assert words in output
    assert result_one["config"]["nnet"]["dim"] == 16 and result_one["environment"]["commit"]
    assert result_one["guidance_scale"] == 0.4


def test_noise_is_the_same_bit_for_bit():
    """Initial and per-step noise of an image, alone or in any company."""
    whole = ImageNoise(5, range(6), (1, 4, 4))
    first, second = whole.initial(), whole.draw()
    for index in range(6):
        alone = ImageNoise(5, [index], (1, 4, 4))
        assert torch.equal(alone.initial()[0], first[index]) and torch.equal(
            alone.draw()[0], second[index]
        )
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], second[0])


def test_sample_draws_a_grid_from_nothing_but_the_checkpoint(trained, tmp_path):
    out = tmp_path / "grid.png"
    words = [f"--nnet_path={trained}", "--classes=3,7", "--seed=0", "--n=4", f"--out={out}"]
    status, output = runs.run("sample.py", *words)
    assert status == 0, output
    picture = np.asarray(Image.open(out))
    assert (
        picture.shape[1] > 600 and picture.shape[1] > 1.8 * picture.shape[0]
    )  # 4 columns, 2 rows, enlarged
    again = tmp_path / "again.png"
    assert runs.run("sample.py", *words[:-1], f"--out={again}")[0] == 0
    assert out.read_bytes() == again.read_bytes()
    other = tmp_path / "other.png"
    flags = ["--seed=1", "--n=4", f"--out={other}", "--algorithm=DDIMScheduler", "--steps=3"]
    status, output = runs.run("sample.py", *words[:2], *flags)
    assert status == 0, output
    assert out.read_bytes() != other.read_bytes()


def test_sample_takes_official_weights(trained, tmp_path):
    """The same picture from our checkpoint and from its translation to an official .pth."""
    from libs.model.build import build_model
    from libs.model.published import to_official
    from utils import read_json

    model = build_model(read_json(trained / "config.json")["nnet"])
    model.load_state_dict(load_file(trained / "nnet_ema.safetensors"))
    torch.save(to_official(model), tmp_path / "nnet_ema.pth")
    ours, official = tmp_path / "ours.png", tmp_path / "official.png"
    words = runs.arguments("")[1:]
    assert runs.run("sample.py", f"--nnet_path={trained}", "--classes=1", f"--out={ours}")[0] == 0
    status, output = runs.run(
        "sample.py",
        f"--nnet_path={tmp_path / 'nnet_ema.pth'}",
        *words,
        "--classes=1",
        f"--out={official}",
    )
    assert status == 0, output
    assert ours.read_bytes() == official.read_bytes()
