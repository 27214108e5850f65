"""Every command of the README's list, as it stands there but for two processes on the CPU, paths,
and a network and images shrunken by --config: from images to latents, weights, pictures and back.
"""

import json
import re
import shlex
import subprocess
import sys

import pytest
import runs
import torch
from PIL import Image
from writers import cifar10_environment, place_of_everything

from configs import imagenet256_H_DiM, imagenet512_H_DiM_ft
from libs.files import read_safetensors
from libs.model.build import build_model
from libs.model.published import to_official

CLASSES, PIXELS = 4, 64  # of "256 px" images; 8x8 latents
README = (runs.ROOT / "README.md").read_text(encoding="utf-8")
NETWORK = {"nnet.dim": 32, "nnet.depth": 5, "nnet.num_classes": CLASSES}
TRAINING = {
    "train.batch_size": 8, "train.n_steps": 4, "train.save_interval": 2, "train.eval_interval": 4,
    "train.grid_samples": 4, "train.num_workers": 1, "train.log_interval": 1,
    "train.fid_samples": 0, "lr_scheduler.warmup_steps": 1, "sample.sample_steps": 3,
}  # fmt: skip
EVALUATION = {"sample.n_samples": 6, "sample.mini_batch_size": 2, "sample.sample_steps": 3,
              "sample.features": "none"}  # fmt: skip


def readme_commands():
    """The shell commands of the README's code blocks, each a list of words."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.split("#")[0].strip()]


def command(script, *parts):
    """The one command of the README that runs `script` and has `parts` among its words."""
    found = [
        words for words in readme_commands()
        if any(word.endswith(script) for word in words)
        and all(any(word.endswith(part) for word in words) for part in parts)
    ]  # fmt: skip
    assert len(found) == 1, f"{script} {parts}: {found}"
    return found[0]


def adapted(words, options):
    """The words for two processes of this Python, with some --options replaced or added."""
    words = [word if word != "8" else "2" for word in words]
    names = {f"--{name}" for name in options}
    words = [word for word in words if word.split("=")[0] not in names]
    words += [f"--{name}={value}" for name, value in options.items()]
    if words[0] == "accelerate":
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
        return launch + words[2:]
    return [sys.executable, *words[1:]]


def run(words, options, **environment):
    result = subprocess.run(
        adapted(words, options), cwd=runs.ROOT, env=runs.environment(**environment),
        capture_output=True, text=True, timeout=runs.TIMEOUT_S,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def config_options(*groups, **more):
    """--config. options of groups of keys; more: keys with '__' for '.'."""
    values = {key: value for group in groups for key, value in group.items()}
    values |= {key.replace("__", "."): value for key, value in more.items()}
    return {f"config.{key}": value for key, value in values.items()}


def sizes(side):
    """Keys of images `side` times as large as the smallest."""
    return {"dataset.resolution": side * PIXELS, "nnet.input_size": 8 * side,
            "z_shape": f"(4,{8 * side},{8 * side})"}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return place_of_everything(tmp_path_factory.mktemp("place"))


def autoencoder(place):
    return {"autoencoder.pretrained_path": place / "autoencoder"}


def official_weights(place, name, config, checkpoint):
    """An official nnet_ema.pth of our averaged weights."""
    config.nnet.update({key.split(".")[1]: value for key, value in NETWORK.items()})
    model = build_model(config.nnet)
    model.load_state_dict(read_safetensors(checkpoint / "nnet_ema.safetensors"))
    path = place / f"{name}.pth"
    torch.save(to_official(model), path)
    return path


@pytest.fixture(scope="module")
def trained_256(place):
    """The 256 px run of DiM-H; its weights as an official file."""
    words = command("train_ldm_discrete.py", "imagenet256_H_DiM.py")
    data = {"dataset.path": place / "ImageNet", **sizes(1)}
    options = {"workdir": place / "H"} | config_options(autoencoder(place), NETWORK, TRAINING, data)
    log = run(words, options)
    assert "ranks [0, 1]" in log
    assert (place / "H" / "samples" / "4.png").is_file()
    lines = (place / "H" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    config = imagenet256_H_DiM.get_config()
    config.nnet.input_size = 8
    return official_weights(place, "256", config, place / "H" / "ckpts" / "4.ckpt")


@pytest.fixture(scope="module")
def trained_512(place, trained_256):
    """Latents of the larger images, and the fine-tuned network."""
    words = command("extract_imagenet_feature.py")
    log = run(words, {
        "path": place / "ImageNet", "autoencoder": place / "autoencoder",
        "resolution": 2 * PIXELS, "output": place / "latents", "num_workers": 1,
        "images_per_shard": 16,
    })  # fmt: skip
    assert "40 images in 4 classes" in log
    words = command("train_ldm_discrete.py", "imagenet512_H_DiM_ft.py")
    data = {"dataset.path": place / "latents", "nnet.pretrained_path": trained_256, **sizes(2)}
    options = config_options(autoencoder(place), NETWORK, TRAINING, data)
    options["workdir"] = place / "ft"
    log = run(words, options)
    assert f"starting from {trained_256}" in log and "4x4 grid interpolated to 8x8" in log
    config = imagenet512_H_DiM_ft.get_config()
    config.nnet.input_size = 16
    return official_weights(place, "512", config, place / "ft" / "ckpts" / "4.ckpt")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name, side", [
    pytest.param("imagenet256_H_DiM", 1, marks=pytest.mark.slow),
    pytest.param("imagenet512_H_DiM_ft", 2, marks=pytest.mark.slow),
    ("imagenet512_H_DiM_upsample_test", 4),
    pytest.param("imagenet512_H_DiM_upsample_3x_test", 6, marks=pytest.mark.slow),
])  # fmt: skip
def test_evaluation(place, trained_256, trained_512, name, side):
    """Pictures, not figures: FID of a random network's 6 images means nothing (and its network is
    no file of ours); test_evaluation_run.py has the figures."""
    words = command("eval_ldm_discrete.py", f"{name}.py")
    pictures = place / name
    options = config_options(
        autoencoder(place), NETWORK, EVALUATION, sizes(side), sample__path=pictures,
    )  # fmt: skip
    if side > 2:
        options["config.dataset.resolution"] = 2 * PIXELS  # what was trained at
    weights = trained_256 if side == 1 else trained_512
    log = run(words, options | {"nnet_path": weights, "workdir": place / f"eval {name}"})
    files = sorted(pictures.glob("*.png"))
    assert len(files) == EVALUATION["sample.n_samples"]
    for file in files:
        assert Image.open(file).size == (PIXELS * side, PIXELS * side)
    assert "interpolated" in log if side > 2 else "interpolated" not in log
    result = json.loads((place / f"eval {name}" / "evaluation.json").read_text())
    assert result["ranks"] == [0, 1] and result["frechet_distance"] is None
    assert (result["upsampling_guidance"] or {}).get("m") == {4: 2, 6: 3}.get(side)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_training_of_the_latent_l(place):
    words = command("train_ldm_discrete.py", "imagenet256_L_DiM.py")
    data = {"dataset.path": place / "ImageNet", **sizes(1)}
    log = run(words, {"workdir": place / "L"} | config_options(
        autoencoder(place), NETWORK, TRAINING, data, train__grid_samples=0,
    ))  # fmt: skip
    assert "ranks [0, 1]" in log and (place / "L" / "ckpts" / "4.ckpt").is_dir()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_cifar10(place):
    words = command("train.py", "cifar10_S_DiM.py")
    log = run(words, {"workdir": place / "S"} | config_options(
        NETWORK, TRAINING, dataset__path=place, nnet__num_classes=10, train__grid_samples=0,
    ), **cifar10_environment(place))  # fmt: skip
    assert "ranks [0, 1]" in log and "precision fp16" in log
    words = command("eval.py", "cifar10_S_DiM.py")
    run(words, {
        "workdir": place / "eval S", "nnet_path": place / "S" / "ckpts" / "4.ckpt",
    } | config_options(
        NETWORK, EVALUATION, dataset__path=place, nnet__num_classes=10,
        sample__path=place / "cifar10",
    ), **cifar10_environment(place))  # fmt: skip
    assert len(list((place / "cifar10").glob("*.png"))) == EVALUATION["sample.n_samples"]


@pytest.mark.timeout(900)
def test_pictures_of_official_weights(place, trained_256):
    words = command("sample.py", "imagenet256_H_DiM.py")
    picture = place / "grid.png"
    options = config_options(autoencoder(place), NETWORK, sizes(1))
    run(words, options | {"nnet_path": trained_256, "classes": "0,3", "steps": 2, "out": picture})
    width, height = Image.open(picture).size
    assert width >= 4 * PIXELS and height >= 2 * PIXELS
