"""What version 0.1.0 wrote still loads: a checkpoint resumes to the same numbers, and checkpoints,
config.json and config files draw the same pictures. data/release_0_1 was written by that version.
"""

import json
import shutil

import numpy as np
import pytest
import runs
from fixed_weights import with_fixed_weights
from PIL import Image
from writers import make_autoencoder

from utils import read_json

RELEASE = runs.ROOT / "tests" / "data" / "release_0_1"
# Other processors and other versions of torch sum in another order.
TOLERANCE, LEVELS = 1e-5, 1


def assert_same_picture(path, expected):
    found, expected = (np.asarray(Image.open(p)).astype(int) for p in (path, expected))
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= LEVELS


def test_a_run_goes_on_with_the_same_numbers(in_process, tmp_path):
    shutil.copytree(RELEASE / "8.ckpt", tmp_path / "ckpts" / "8.ckpt")
    assert in_process("train", runs.arguments(tmp_path)) == 0
    expected = json.loads((RELEASE / "numbers.json").read_text())
    found = runs.numbers(tmp_path)
    assert [row[0] for row in found] == [row[0] for row in expected] == [9, 10, 11, 12]
    for own, row in zip(found, expected, strict=True):
        assert own == pytest.approx(row, rel=TOLERANCE)


@pytest.mark.parametrize(
    "words",
    [
        [f"--nnet_path={RELEASE / '8.ckpt'}"],
        [
            f"--nnet_path={RELEASE / '8.ckpt' / 'nnet_ema.safetensors'}",
            f"--config={RELEASE / 'digits_T_DiM.py'}",
            "--config.nnet.dim=16", "--config.nnet.depth=5", "--config.sample.sample_steps=2",
        ],
    ],
    ids=["config.json", "config file"],
)  # fmt: skip
def test_pixels_are_the_same(in_process, tmp_path, words):
    out = tmp_path / "pixels.png"
    assert in_process("sample", [*words, "--n=2", "--seed=3", f"--out={out}"]) == 0
    assert_same_picture(out, RELEASE / "pixels.png")


def test_latent_pictures_are_the_same(in_process, tmp_path):
    with_fixed_weights(make_autoencoder()).save_pretrained(tmp_path / "autoencoder")
    checkpoint = shutil.copytree(RELEASE / "latent.ckpt", tmp_path / "latent.ckpt")
    config = read_json(checkpoint / "config.json")
    config["autoencoder"]["pretrained_path"] = str(tmp_path / "autoencoder")
    (checkpoint / "config.json").write_text(json.dumps(config))
    words = ["--classes=2,6", "--n=2", "--seed=3", "--algorithm=dpm_solver", "--steps=4"]
    out = tmp_path / "latent.png"
    assert in_process("sample", [f"--nnet_path={checkpoint}", *words, f"--out={out}"]) == 0
    assert_same_picture(out, RELEASE / "latent.png")
