"""The same pictures for any batch size and number of processes, by eval.py and sample.py."""

import json

import numpy as np
import pytest
import runs
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from libs.evaluate import Classifier
from libs.model.build import build_model
from libs.model.published import to_official
from utils import read_json

TRAINED = runs.ROOT / "tests" / "data" / "release_0_1" / "8.ckpt"


def evaluate(folder, *, num_processes, mini_batch_size, devices=""):
    folder.mkdir()
    torch.manual_seed(0)
    save_file(
        Classifier(channels=1, num_classes=10).state_dict(), folder / "classifier.safetensors"
    )
    changes = dict(
        sample__mini_batch_size=mini_batch_size, sample__n_samples=30, sample__sample_steps=8,
        sample__path=folder / "png", sample__fid_weights_path=folder / "classifier.safetensors",
        sample__algorithm="euler_maruyama_sde",
    )  # fmt: skip
    status, output = runs.run(
        "eval.py",
        *runs.arguments(folder, **changes),
        f"--nnet_path={TRAINED}",
        num_processes=num_processes,
        CUDA_VISIBLE_DEVICES=devices,
        NCCL_NVLS_ENABLE="0",
    )
    assert status == 0, output
    images = [np.asarray(Image.open(folder / "png" / f"{index}.png")) for index in range(30)]
    return np.stack(images).astype(int), json.loads((folder / "evaluation.json").read_text())


@pytest.mark.parametrize("devices", ["", pytest.param("0,1", marks=pytest.mark.cuda)])
def test_pictures_do_not_depend_on_batch_or_processes(devices, tmp_path):
    """Within one grey level for 99.9% of the values, and the same figures as far as those. On the
    CPU and on two GPUs.
    """
    if devices and torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, found {torch.cuda.device_count()}")
    one, result_one = evaluate(
        tmp_path / "one", num_processes=0, mini_batch_size=7, devices=devices[:1]
    )
    two, result_two = evaluate(
        tmp_path / "two", num_processes=2, mini_batch_size=4, devices=devices
    )
    assert one.shape == (30, 8, 8) and one.std() > 10
    assert (np.abs(one - two) <= 1).mean() >= 0.999
    assert result_two["n"] == 30 and result_one["ranks"] == [0] and result_two["ranks"] == [0, 1]
    assert result_two["frechet_distance"] == pytest.approx(result_one["frechet_distance"], rel=1e-2)
    assert result_one["config"]["nnet"]["dim"] == 16 and result_one["environment"]["commit"]
    assert result_one["guidance_scale_standard"] == 1.4 and result_one["network_calls"] == 2 * 8


def test_sample_draws_a_grid_from_nothing_but_the_checkpoint(in_process, tmp_path):
    def draw(name, *words, weights=TRAINED):
        words = [f"--nnet_path={weights}", "--n=4", f"--out={tmp_path / name}", *words]
        assert in_process("sample", words) == 0
        return (tmp_path / name).read_bytes()

    first = draw("grid.png", "--classes=3,7", "--seed=0")
    picture = np.asarray(Image.open(tmp_path / "grid.png"))
    assert picture.shape[1] > 600 and picture.shape[1] > 1.8 * picture.shape[0]  # 4 x 2, enlarged
    assert draw("again.png", "--classes=3,7", "--seed=0") == first
    assert draw("seed.png", "--classes=3,7", "--seed=1") != first
    assert draw("steps.png", "--classes=3,7", "--algorithm=DDIMScheduler", "--steps=3") != first

    model = build_model(read_json(TRAINED / "config.json")["nnet"])
    model.load_state_dict(load_file(TRAINED / "nnet_ema.safetensors"))
    torch.save(to_official(model), tmp_path / "nnet_ema.pth")
    words = ["--classes=3,7", *runs.arguments("")[1:]]
    assert draw("official.png", *words, weights=tmp_path / "nnet_ema.pth") == first
