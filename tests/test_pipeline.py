"""Ways in from diffusers and the hub: the pictures are sample.py's, and no file has code."""

import json
import shutil

import numpy as np
import pytest
import runs
import torch
import writers
from fixed_weights import fill, with_fixed_weights
from PIL import Image
from safetensors.torch import save_file

from configs import common
from libs.model import DiM, add_heads, build_model, to_official
from libs.runtime import load_config
from pipeline import DiMPipeline, image_generators
from utils import save_grid

INTERNAL = ["--config.sample.internal_scale=0.7", "--config.sample.internal_interval=(0.2,1.0)"]


def write_weights(path, config_name):
    """Random weights of a config's network: an official .pth, or our file with heads."""
    config = load_config(str(runs.ROOT / "configs" / f"{config_name}.py"))
    model = build_model(config.nnet, seed=0)
    add_heads(model, config.loss, training=True)
    with_fixed_weights(model)
    if path.suffix == ".pth":
        torch.save(to_official(model), path)
    else:
        save_file(model.state_dict(), path)
    return [f"--config=configs/{config_name}.py", f"--nnet_path={path}"]


def write_latent(tmp_path):
    folder = runs.ROOT / "tests" / "data" / "release_0_1" / "latent.ckpt"
    checkpoint = shutil.copytree(folder, tmp_path / "run" / "ckpts" / "8.ckpt")
    names = {"classes": {f"name {number}": number for number in range(7)}}
    (tmp_path / "run" / "environment.json").write_text(json.dumps(names))
    kl = writers.write_autoencoder(tmp_path / "kl")
    scaling = [f"--config.autoencoder.{key}" for key in ("scale_factor=0.3", "shift_factor=0.1")]
    return [f"--nnet_path={checkpoint}", f"--config.autoencoder.pretrained_path={kl}", *scaling]


SOURCES = {
    "official": lambda path: write_weights(path / "nnet_ema.pth", "digits_T_DiM"),
    "heads": lambda path: [*write_weights(path / "x.safetensors", "digits_T_flow"), *INTERNAL],
    "latent": write_latent,
}


def export(kind, in_process, tmp_path):
    """(words of sample.py, the exported folder)."""
    words, folder = [*SOURCES[kind](tmp_path), "--steps=3", "--scale=0.5"], tmp_path / "folder"
    assert in_process("scripts.export_diffusers", [*words, f"--out={folder}"]) == 0
    return words, folder


@pytest.mark.parametrize("kind", SOURCES)
def test_pictures_are_those_of_sample_py(in_process, tmp_path, kind):
    (words, folder), out = export(kind, in_process, tmp_path), tmp_path / "grid.png"
    assert in_process("sample", [*words, "--classes=3,6", "--n=1", "--seed=5", f"--out={out}"]) == 0
    DiMPipeline.from_pretrained(folder).save_pretrained(tmp_path / "again")
    shutil.rmtree(folder)
    pipe = DiMPipeline.from_pretrained(tmp_path / "again")
    images = pipe(class_labels=[3, 6], generator=image_generators(5, 2), output_type="pt").images
    save_grid(tmp_path / "pipe.png", images, 1)
    assert (tmp_path / "pipe.png").read_bytes() == out.read_bytes()
    files = [path for path in (tmp_path / "again").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    texts = " ".join(path.read_text() for path in files if path.suffix == ".json")
    assert str(tmp_path) not in texts.replace(str(folder), "")
    if kind == "latent":
        assert pipe.get_label_ids(["name 6"]) == [6]


def test_the_interface_of_ditpipeline(in_process, tmp_path):
    _, folder = export("official", in_process, tmp_path)
    pipe = DiMPipeline.from_pretrained(folder, torch_dtype=torch.float16)
    seen = []
    given = dict(generator=image_generators(0, 2), num_inference_steps=4, output_type="np")
    images = pipe([1, 2], callback_on_step_end=lambda *x: seen.append(x[1:3]), **given).images
    assert images.shape == (2, 8, 8, 1) and [i for i, _ in seen] == [0, 1, 2, 3]
    assert seen[0][1] == pytest.approx(999) and seen[1][1] < 999

    def draw(seed, **options):
        return pipe([1, 2], generator=torch.Generator().manual_seed(seed), **options)

    (pictures,) = draw(1, return_dict=False)
    assert all(isinstance(picture, Image.Image) and picture.mode == "L" for picture in pictures)
    again, other, unguided = (
        np.stack(draw(seed, guidance_scale=w).images) for seed, w in ((1, 1.5), (2, 1.5), (1, 1))
    )
    assert (np.stack(pictures) == again).all()  # exported with scale 0.5
    assert (again != other).any() and (again != unguided).any()
    assert pipe.transformer.dtype == torch.float32  # float16 was asked for


@pytest.mark.parametrize("mixer", [dict(name="mamba"), dict(name="attention", heads=4)])
def test_dim_from_pretrained(tmp_path, mixer):
    nnet = common.dim_nnet(dim=16, depth=5, input_size=8, in_channels=1, num_classes=10)
    nnet.mixer, nnet.skip_tuning = common.d(**mixer), (0.8, 1.0, 1.1)
    model = with_fixed_weights(build_model(nnet)).eval()
    model.save_pretrained(tmp_path)
    loaded = DiM.from_pretrained(tmp_path)
    inputs = fill("x", (2, 1, 8, 8)), torch.tensor([10.0, 900.0]), torch.tensor([3, 10])
    assert torch.equal(loaded(*inputs), model(*inputs))
    add_heads(model, common.d(internal=common.d(weight=1, block=1)), training=True)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="heads.internal"):
        DiM.from_pretrained(tmp_path)
    assert torch.equal(DiM.from_pretrained(tmp_path, strict=False)(*inputs), model(*inputs))
