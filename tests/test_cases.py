"""Inputs that once failed, by kind, and what is right."""

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
import zipfile

import numpy as np
import psutil
import pytest
import runs
import torch
import writers
from PIL import Image, features
from torch.utils.data import DataLoader

import configs.common
import utils
from datasets import get_dataset
from libs import evaluate
from libs.data import load_autoencoder, make_latent_codec, open_latents
from libs.files import read_safetensors, read_torch
from libs.model import DiM, load_into, split_weight, to_official
from libs.parts import make_parts
from libs.runtime import MetricsLog, StopRequest, flags, launch, read_batches
from libs.train import checkpoint
from utils import UserError, flatten, read_json, write_json

# ---------------------------------------- files, folders and autoencoders


def open_folder(path, **options):
    return get_dataset("folder", path=path, **{"resolution": 8, "labels": False, **options})


FORMATS = {
    "a.png": "PNG", "i.JPG": "JPEG", "b.pgm": "PPM", "h.pnm": "PPM", "g.pbm": "PPM",
    "c.jfif": "JPEG", "e.jpe": "JPEG", "d.gif": "GIF", "j.mpo": "MPO", "k.tga": "TGA",
    "l.qoi": "QOI", "m.jp2": "JPEG2000", "n.apng": "PNG", "o.ico": "ICO", "p.dds": "DDS",
    "q.pcx": "PCX", "r.sgi": "SGI", "s.webp": "WEBP",
} | ({"f.avif": "AVIF"} if features.check("avif") else {})  # fmt: skip


def test_everything_that_pillow_opens_is_an_image(tmp_path):
    for name, kind in FORMATS.items():
        mode = {"b.pgm": "L", "g.pbm": "1"}.get(name, "RGB")
        writers.noise_image(0, (40, 30)).convert(mode).save(tmp_path / name, format=kind)
    for name in ("notes.txt", "b.txt", "x.heic", "run.eps", "._a.png", "README"):
        (tmp_path / name).write_bytes(b"%!PS-Adobe-3.0")
    for name in ("@eaDir", ".Trash-1000"):
        (tmp_path / name).mkdir()
    folder = open_folder(tmp_path)
    assert folder.files == sorted(FORMATS)
    assert all(folder[0, i][0].shape == (3, 8, 8) for i in range(len(folder)))
    left_out = "2 .txt, 1 @eaDir, 1 .Trash-1000, 1 .heic, 1 .eps, 1 hidden, 1 README"
    assert sorted(folder.left_out.split(", ")) == sorted(left_out.split(", "))
    assert not any(folder.unreadable)
    for name in set(FORMATS) - {"k.tga"}:
        (tmp_path / name).unlink()
    assert open_folder(tmp_path, resolution=None)[0, 0][0].shape == (3, 30, 30)


SYSTEM = (
    "@eaDir", "lost+found", ".Trash", "#recycle", "System Volume Information", "__MACOSX",
    "$RECYCLE.BIN", "@Recycle", "#snapshot", ".ipynb_checkpoints",
)  # fmt: skip


@pytest.mark.parametrize("zipped", [False, True])
def test_folders_of_systems_are_no_classes(tmp_path, zipped):
    path = tmp_path / "data"
    writers.write_folder(path)
    for name in SYSTEM:
        for folder in (path / name, path / "ant" / name):
            folder.mkdir()
            writers.noise_image(0).save(folder / "x.png")
    path = zip_folder(path) if zipped else path
    folder = open_folder(path, labels=True)
    assert folder.class_names == ["ant", "bee"] and len(folder) == 6
    assert all(name in folder.left_out for name in SYSTEM)


def zip_folder(path):
    archive = path.with_suffix(".zip")
    with zipfile.ZipFile(archive, "w") as file:
        for found in sorted(path.rglob("*")):
            file.write(found, found.relative_to(path))
    return archive


@pytest.mark.parametrize("zipped", [False, True])
def test_labels_of_dataset_json(tmp_path, zipped):
    """As EDM's and StyleGAN's dataset tools write it."""
    path, pixels, labels = tmp_path / "data", [], [2, 0, 1, 1, 0]
    for i in range(5):
        file = path / "00000" / f"img{i:08}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        writers.noise_image(i).save(file)
        pixels.append(np.asarray(Image.open(file)).transpose(2, 0, 1))
    entries = [[f"00000/img{i:08}.png", label] for i, label in enumerate(labels)]
    (path / "dataset.json").write_text(json.dumps({"labels": entries}))
    path = zip_folder(path) if zipped else path
    folder = open_folder(path, labels=True)
    assert folder.labels.tolist() == labels and folder.class_names == ["0", "1", "2"]
    assert folder.left_out == ""
    for workers in (0, 2):
        batches = [[(0, 0), (0, 3)], [(0, 4)], [(0, 1), (0, 2)]]
        loader = DataLoader(folder, batch_sampler=batches, num_workers=workers)
        x, y = map(torch.cat, zip(*loader, strict=True))
        expected = np.stack([pixels[i] for i in (0, 3, 4, 1, 2)])
        np.testing.assert_array_equal(((x + 1) * 127.5).round(), expected)
        assert y.tolist() == [2, 1, 0, 0, 1]
    assert len(open_folder(path)) == 5


def test_labels_of_dataset_json_that_are_vectors(tmp_path):
    """One-hot ones are classes; others, as StyleGAN's of attributes, are none."""
    writers.write_folder(tmp_path)
    files, numbers = open_folder(tmp_path).files, [0, 2, 1, 2, 0, 1]
    for vectors in np.eye(3)[numbers], np.eye(3)[numbers] / 2, np.ones((6, 3)):
        labels = [*zip(files, vectors.tolist(), strict=True)]
        (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
        if vectors.sum() == 6:
            assert open_folder(tmp_path, labels=True).labels.tolist() == numbers
            continue
        with pytest.raises(UserError, match="neither numbers nor one-hot vectors"):
            open_folder(tmp_path, labels=True)


def test_labels_of_dataset_json_that_are_missing(tmp_path):
    writers.write_folder(tmp_path)
    (tmp_path / "dataset.json").write_text('{"labels": null}')
    with pytest.raises(UserError, match="nor in a dataset.json.*"):
        open_folder(tmp_path, labels=True)
    (tmp_path / "dataset.json").write_text('{"title": "of another program"}')
    assert open_folder(tmp_path, labels=True).num_classes == 2


@pytest.mark.parametrize("bad", [10, 12])
def test_the_limit_of_bad_files_is_the_same_for_any_number_of_workers(tmp_path, bad):
    writers.write_folder(tmp_path, count=60)
    for i in range(bad):
        (tmp_path / "ant" / f"{2 * i:02}.png").write_bytes(b"broken")

    def read(workers):
        folder = open_folder(tmp_path)
        batches = [[(0, i)] for i in range(60)]
        with pytest.warns(UserWarning) if not workers else contextlib.nullcontext():
            return len(list(DataLoader(folder, batch_sampler=batches, num_workers=workers)))

    for workers in (0, 2):
        if bad == 10:
            assert read(workers) == 60
        else:
            with pytest.raises(UserError, match="more than 10 of 60 images .* cannot be read"):
                read(workers)


def test_the_limit_of_bad_files_is_a_share(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.MAX_UNREADABLE", (1, 0.1))
    writers.write_folder(tmp_path, count=30)
    for i in range(4):
        (tmp_path / "ant" / f"{i:02}.png").write_bytes(b"broken")
    folder = open_folder(tmp_path)
    with pytest.warns(UserWarning), pytest.raises(UserError, match="more than 3 of 30 images"):
        folder[0, 0]


def test_two_links_to_one_folder_are_named(tmp_path):
    writers.write_folder(tmp_path)
    (tmp_path / "wasp").symlink_to(tmp_path / "bee")
    with pytest.raises(UserError, match="another class is a link to the same folder: bee"):
        open_folder(tmp_path, labels=True)


def test_folders_of_the_same_names_are_told_apart_by_sizes(tmp_path):
    for name in ("one", "same", "other"):
        writers.write_folder(tmp_path / name)
    writers.noise_image(9, (9, 9)).save(tmp_path / "other" / "bee" / "05.png")
    folders = [open_folder(tmp_path / name, labels=True) for name in ("one", "same", "other")]
    one, same, other = (folder.list_sha256(*folder.sizes) for folder in folders)
    assert one == same != other


def test_a_training_says_what_is_left_out_and_that_its_images_changed(tmp_path, in_process):
    images, run = tmp_path / "images", tmp_path / "run"
    writers.write_folder(images)
    (images / "notes.txt").touch()
    changes = {"dataset__name": "folder", "dataset__path": images, "nnet__in_channels": 3}
    changes |= {"train__mode": "uncond", "train__grid_samples": 0, "train__fid_samples": 0}
    for steps in (1, 2):
        words = runs.arguments(run, **changes, train__n_steps=steps, train__num_workers=0)
        assert in_process("train", words) == 0
        log = (run / "output.log").read_text()
        assert "left out: 1 .txt" in log
        assert ("changed since this run began: environment: images_sha256" in log) == (steps == 2)
        writers.noise_image(9, (9, 9)).save(images / "bee" / "05.png")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
WEB = b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>\n"


@pytest.mark.parametrize("content, says", [(LFS, "is a Git LFS pointer"), (WEB, "is a web page")])
@pytest.mark.parametrize("name", ["x.pth", "x.safetensors", "vae/"])
def test_what_stands_for_a_file_is_named(tmp_path, content, says, name):
    path = tmp_path / name
    if name == "vae/":
        path = writers.write_autoencoder(tmp_path / "vae") / "diffusion_pytorch_model.safetensors"
    path.write_bytes(content)
    readers = [lambda: load_autoencoder(tmp_path / name)]
    if name != "vae/":
        readers.append(lambda: (read_torch if name == "x.pth" else read_safetensors)(path))
    for read in readers:
        with pytest.raises(UserError, match=f"{path} {says}"):
            read()


STATED = {
    "scaling_factor": 0.3611, "shift_factor": 0.1159, "force_upcast": True,
    "latents_mean": [0.1] * 16, "latents_std": [float(1 + i) for i in range(16)],
}  # fmt: skip


def write_other_autoencoder(path, variant=None, **stated):
    """A diffusers folder of 16 channels and stride 4 whose config.json says `stated`."""
    network = writers.make_autoencoder(widths=(32, 32, 32), layers_per_block=1, latent_channels=16)
    network.save_pretrained(path, variant=variant)
    config = json.loads((path / "config.json").read_text())
    config.pop("force_upcast")
    (path / "config.json").write_text(json.dumps(config | stated))
    return path


def section(**values):
    settings = configs.common.get_config().autoencoder
    settings.update(values)
    return settings


def test_scale_shift_mean_and_std_are_the_autoencoders_own(tmp_path):
    path = str(write_other_autoencoder(tmp_path / "vae", **STATED))
    codec, x = make_latent_codec(section(pretrained_path=path)), torch.rand(2, 3, 16, 16) * 2 - 1
    assert codec.latent_shape((3, 16, 16)) == (16, 4, 4) and codec.image_shape((16, 4, 4))[1] == 16
    moments, noise = codec.autoencoder.moments(x), torch.randn(2, 16, 4, 4)
    mean, logvar = moments.chunk(2, 1)
    raw = mean + (logvar / 2).exp() * noise
    std = torch.arange(1.0, 17)[:, None, None]
    z = (raw - 0.1159 - 0.1) * 0.3611 / std
    torch.testing.assert_close(codec.encode(x, noise), z)
    torch.testing.assert_close(codec.encode(moments, noise), z)
    image = codec.autoencoder.network.decode(raw).sample * 0.5 + 0.5
    torch.testing.assert_close(codec.decode(z), image.clamp(0, 1), rtol=0, atol=1e-5)
    assert codec.describe().keys() == {"autoencoder_sha256", *STATED} - {
        "force_upcast", "scaling_factor"} | {"scale_factor"}  # fmt: skip
    given = section(pretrained_path=path, scale_factor=0.5, shift_factor=0.0)
    assert make_latent_codec(given).scaling[:2] == (0.5, 0.0)


@pytest.mark.parametrize("says, upcast", [({}, False), ({"force_upcast": True}, True),
                                          ({"force_upcast": False}, False)])  # fmt: skip
def test_force_upcast_and_half_precision_files(tmp_path, says, upcast):
    path = write_other_autoencoder(tmp_path / "vae", variant="fp16", **says)
    assert [file.name for file in path.glob("*.safetensors")] == [
        "diffusion_pytorch_model.fp16.safetensors"
    ]
    autoencoder = load_autoencoder(path)
    assert autoencoder.force_upcast is upcast
    assert {parameter.dtype for parameter in autoencoder.parameters()} == {torch.float32}


@pytest.mark.parametrize("precision, recorded", [("fp32", "fp32"), ("bf16", "bf16"),
                                                 ("fp16", "fp32")])  # fmt: skip
def test_latents_of_another_autoencoder(tmp_path, in_process, capsys, precision, recorded):
    """The moments are unscaled, say so, and bring the scale for a training without pictures."""
    path = write_other_autoencoder(tmp_path / "vae", **STATED)
    writers.write_folder(tmp_path / "images")
    (tmp_path / "images" / "notes.txt").touch()
    words = {"dataset": "folder", "path": tmp_path / "images", "autoencoder": path}
    words |= {"output": tmp_path / "out", "resolution": 16, "num_workers": 0}
    words = [f"--{key}={value}" for key, value in {**words, "precision": precision}.items()]
    assert in_process("scripts.extract_imagenet_feature", words) == 0
    assert f"left out: 1 .txt; encoding in {recorded}" in capsys.readouterr().out
    manifest = open_latents(tmp_path / "out").manifest
    assert manifest["scaled"] is False and manifest["precision"] == recorded
    assert (manifest["scale_factor"], manifest["shift_factor"]) == (0.3611, 0.1159)
    config = configs.common.get_config()
    config.nnet = configs.common.dim_nnet(
        input_size=4, in_channels=16, dim=16, depth=3, num_classes=2
    )
    config.z_shape = (16, 4, 4)
    config.dataset.update(name="folder_features", path=str(tmp_path / "out"), resolution=16)
    config.train.update(mode="cond", grid_samples=0, fid_samples=0)
    without = make_parts(config.copy_and_resolve_references(), data="training")
    config.autoencoder.pretrained_path = str(path)
    with_it = make_parts(config, data="training")
    assert without.codec.scaling == with_it.codec.scaling == with_it.codec.autoencoder.scaling
    assert config.autoencoder.scale_factor == 0.3611  # what the run directory records
    moments = with_it.dataset[0, 0][0][None]
    expected = with_it.codec.autoencoder.moments(
        open_folder(tmp_path / "images", resolution=16)[0, 0][0][None]
    )
    # bf16 has 8 bits, through some 15 layers.
    torch.testing.assert_close(moments, expected, rtol=0, atol=0.1 if precision == "bf16" else 2e-3)


def test_a_section_of_before_means_what_it_meant(tmp_path):
    path = str(write_other_autoencoder(tmp_path / "vae", scaling_factor=0.13025))
    before = section(pretrained_path=path, scale_factor=0.18215)
    assert make_latent_codec(before).scaling == (0.18215, None, None, None)


@pytest.mark.cuda
@pytest.mark.parametrize("stated", [True, False])
def test_an_autoencoder_beyond_float16(tmp_path, stated):
    """Its activations reach 1e6, as some of SDXL's decoder exceed 65,504: with force_upcast it
    decodes to pictures.
    """
    network = writers.make_autoencoder(widths=(32, 32), layers_per_block=1)
    network.decoder.conv_in.weight.data *= 1e7
    network.save_pretrained(tmp_path / "vae")
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    config = json.dumps(config | {"force_upcast": stated})
    (tmp_path / "vae" / "config.json").write_text(config)
    codec = make_latent_codec(section(pretrained_path=str(tmp_path / "vae")))
    z, x = torch.randn(2, 4, 8, 8), torch.rand(2, 3, 16, 16) * 2 - 1
    noise, expected = torch.randn(2, 4, 8, 8), codec.decode(z)
    latents = codec.encode(x, noise)
    codec.to("cuda")
    for dtype in (torch.float16, torch.bfloat16):  # that of a sampler around it
        with torch.autocast("cuda", dtype):
            image, found = codec.decode(z.cuda()).cpu(), codec.encode(x.cuda(), noise.cuda()).cpu()
        assert image.isfinite().all() == stated
    if stated:
        assert expected.std() > 0.05
        torch.testing.assert_close(image, expected, rtol=0, atol=0.01)  # TF32 has 11 bits
        torch.testing.assert_close(found, latents, rtol=0.01, atol=0.01)


# ---------------------------------------- command lines, configs, launchers, signals, output

RELEASE = runs.ROOT / "tests" / "data" / "release_0_1"
CONFIG = """from configs import common, digits_T_DiM


def get_config():
    config = digits_T_DiM.get_config()
    {}
    return config
"""


def parse(*words):
    return flags.parse_flags(["eval.py", *map(str, words)], flags.EVALUATION)


@pytest.fixture
def write_config(tmp_path):
    """write_config(line): the path of a config file with this line in get_config."""

    def write(line):
        path = tmp_path / "mine.py"
        path.write_text(CONFIG.format(line))
        return path

    return write


@pytest.mark.parametrize("line, says", [
    ("config.train.batchsize = 4", 'Did you mean "batch_size"'),
    ("config.optimizer.weigth_decay = 0.1", 'Did you mean "weight_decay"'),
    ("config.trian.n_steps = 3", 'Did you mean "train"'), ("config.steps = 3", '"steps"'),
    ("config.nnet.dims = 16", 'Did you mean "dim"'),
    ("config.nnet = common.dim_nnet(depht=3)", 'Did you mean "depth"'),
    ("config.sample.update(scal=2.0)", 'Did you mean "scale"'),
])  # fmt: skip
def test_a_misspelt_key_in_a_config_file(write_config, line, says):
    path = write_config(line)
    with pytest.raises(flags.FlagError) as error:
        parse(f"--config={path}", "--nnet_path=x")
    assert str(error.value).startswith(f"{path}, line 6: ") and says in str(error.value)
    assert len(str(error.value)) < len(str(path)) + 120


@pytest.mark.parametrize("line", [
    "config.loss.mine = 0.1", "config.process.shift = 3.0", "config.nnet.mixer.heads = 3",
    'config.nnet = common.dim_nnet(mixer=common.d(name="attention", heads=3))',
    'config.optimizer = common.d(name="sgd", lr=0.1, momentum=0.9)',
])  # fmt: skip
def test_sections_that_take_more_keys(write_config, line):
    assert parse(f"--config={write_config(line)}", "--nnet_path=x").config.is_locked


@pytest.mark.parametrize("config", ["configs/digits_T_flow.py", RELEASE / "8.ckpt/config.json"])
def test_the_command_line_adds_keys_too(config):
    """A literal or else text; a section within one is made, or has the keys that it had."""
    added = {"loss.direction": 0.5, "loss.internal.weight": 0.25, "loss.repa.path": "a/b",
             "nnet.mixer.heads": 4, "process.shift": 2e-1}  # fmt: skip
    before = flatten(parse(f"--config={config}", "--nnet_path=x").config)
    words = [f"--config.{key}={value}" for key, value in added.items()]
    args = parse(f"--config={config}", "--nnet_path=x", *words)
    assert args.overrides == added and flatten(args.config) == before | added
    assert split_weight(args.config.loss.repa) == (1.0, {"path": "a/b"})
    directory = utils.run_directory("a.py", args.overrides, None).name
    assert "loss.direction=0.5-loss.internal.weight=0.25-loss.repa.path=" in directory


def test_config_files_from_elsewhere(write_config, tmp_path, monkeypatch):
    """An older file still loads, a module beside a file is found, a message names what exists."""
    old = parse(f"--config={RELEASE / 'digits_T_DiM.py'}", "--nnet_path=x").config
    new = parse("--config=configs/digits_T_DiM.py", "--nnet_path=x").config
    assert flatten(old).items() <= flatten(new).items()
    (tmp_path / "sizes_beside.py").write_text("DEPTH = 7\n")
    path = write_config("import sizes_beside; config.nnet.depth = sizes_beside.DEPTH")
    assert parse(f"--config={path}", "--nnet_path=x").config.nnet.depth == 7
    monkeypatch.chdir(tmp_path)
    with pytest.raises(flags.FlagError, match="did you mean (.*)[?]") as error:
        parse("--config=configs/digits_T_DiM.py", "--nnet_path=x")
    said = str(error.value).rpartition("mean ")[2].rstrip("?")
    assert (tmp_path / said).is_file()


def test_the_last_of_two_tuples_counts():
    twice = ["--config.optimizer.betas=(0.9,0.99)", "--config.optimizer.betas=(0.8,0.95)"]
    args = parse("--config=configs/digits_T_DiM.py", "--nnet_path=x", *twice)
    assert args.config.optimizer.betas == args.overrides["optimizer.betas"] == (0.8, 0.95)


def test_the_config_beside_weights_takes_changes(tmp_path):
    weights = shutil.copytree(RELEASE / "latent.ckpt", tmp_path / "8.ckpt")
    words = ["--config.autoencoder.pretrained_path=/other/machine", "--config.sample.scale=2"]
    expected = flatten(read_json(weights / "config.json"))
    expected |= {"autoencoder.pretrained_path": "/other/machine", "sample.scale": 2.0}
    for path in weights, weights / "nnet_ema.safetensors":
        for config in [], [f"--config={weights / 'config.json'}"]:
            args = parse(f"--nnet_path={path}", *config, *words)
            found = flatten(args.config)
            assert {key: found[key] for key in expected} == expected and args.config.is_locked
    with pytest.raises(flags.FlagError, match="expected 1 to inf"):
        parse(f"--nnet_path={weights}", "--config.sample.sample_steps=0")
    names = {utils.run_directory(str(tmp_path / n / "config.json"), {}, None) for n in "ab"}
    assert len(names) == 2


def test_fp8_where_it_cannot_be(in_process, capsys, tmp_path):
    weights = shutil.copytree(RELEASE / "8.ckpt", tmp_path / "8.ckpt")
    config = read_json(weights / "config.json")
    config["sample"] |= {"fp8": True, "sample_steps": 2}
    config["train"]["mixed_precision"] = "bf16"
    write_json(weights / "config.json", config)
    words = [f"--nnet_path={weights}", "--classes=1", "--n=1", f"--out={tmp_path / 'x.png'}"]
    assert in_process("sample", words) == 1
    runs.assert_one_sentence(1, capsys.readouterr().err, "GPU", "--config.sample.fp8=False")
    assert in_process("sample", [*words, "--config.sample.fp8=False"]) == 0


@pytest.fixture
def launched(monkeypatch):
    """launched(**environment): (variables that accelerate sees, its number format)."""
    seen = {}

    def construct(**keywords):
        seen.clear()
        seen.update(os.environ)
        return types.SimpleNamespace(num_processes=1)

    def call(**environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        launch.make_accelerator()
        assert environment.items() <= os.environ.items()
        return {name for name in environment if name in seen}

    monkeypatch.setattr(launch, "Accelerator", construct)
    return call


def test_what_a_launcher_asks_for_in_vain(launched, caplog):
    """Of accelerate launch --dynamo_backend inductor, --zero_stage 3, or a default_config.yaml."""
    used = dict(ACCELERATE_MIXED_PRECISION="bf16", FSDP_OFFLOAD_PARAMS="false")
    unused = dict(ACCELERATE_DYNAMO_BACKEND="INDUCTOR", ACCELERATE_DEEPSPEED_ZERO_STAGE="3",
                  ACCELERATE_USE_MEGATRON_LM="true", ACCELERATE_GRADIENT_ACCUMULATION_STEPS="4")
    assert launched(**used, ACCELERATE_DYNAMO_BACKEND="NO") == {*used, "ACCELERATE_DYNAMO_BACKEND"}
    assert not caplog.records
    assert launched(**used, **unused) == set(used)
    (record,) = caplog.records
    assert all(f"{name}={value}" in record.getMessage() for name, value in unused.items())


def test_one_process_of_a_launcher_is_as_plain_python(launched):
    torchrun = dict(RANK="0", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    assert launched(**torchrun, WORLD_SIZE="1") == {"MASTER_ADDR", "MASTER_PORT"}
    assert launched(**torchrun, WORLD_SIZE="2") == {*torchrun, "WORLD_SIZE"}


def test_every_signal_of_a_scheduler_asks_to_stop():
    for name in "TERM", "INT", "USR1", "USR2", "XCPU":
        with StopRequest() as stop:
            os.kill(os.getpid(), getattr(signal, f"SIG{name}"))
            assert stop.requested, name


@pytest.mark.parametrize("number", [
    signal.SIGUSR1, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])  # fmt: skip
def test_a_signal_to_every_process_of_a_run(tmp_path, number):
    """As SLURM sends it, data loader workers included; the bar writes a line every half minute."""
    process = runs.start("train.py", *runs.arguments(tmp_path, train__n_steps=10**6))
    runs.wait_for_step(process, tmp_path, 10)
    every = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    assert len(every) == 3  # two workers
    for one in every:
        one.send_signal(number)
    began = time.monotonic()
    status, output = runs.finish(process)
    assert status == 143 and time.monotonic() - began < 10, output
    (last,) = [line for line in output.splitlines() if "stopped at step" in line]
    step = last.partition("step ")[2].partition(";")[0]
    assert (tmp_path / "ckpts" / f"{step}.ckpt" / "manifest.json").is_file()
    assert output.count("step/s") < 4


WRITER = """import sys, time
from pathlib import Path
from libs.runtime import get_logger, run_main

def main(args):
    log = get_logger(".", 0)
    print("first", flush=True)
    while Path("reading").exists():
        time.sleep(0.01)
    for name in "\\xe9", "\\u65e5", "\\udcff":
        for _ in range(9000):
            print(name)
        log.info("%s", name)
    Path("done").touch()

run_main(main, {})
"""


@pytest.mark.parametrize("leaves", [False, True])
def test_output_that_nobody_can_take(tmp_path, leaves):
    """An encoding without the characters of a name; a reader that leaves, such as head."""
    (tmp_path / "reading").touch()
    variables = {"PYTHONPATH": str(runs.ROOT), "PYTHONIOENCODING": "ascii"}
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER], cwd=tmp_path, env=runs.environment(**variables),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "first\n"
    if leaves:
        process.stdout.close()
    (tmp_path / "reading").unlink()
    said = "" if leaves else process.stdout.read()
    assert process.wait(60) == 0, said
    assert (tmp_path / "done").exists() and "rror" not in said
    assert leaves or {"\\xe9", "\\u65e5", "\\udcff"} <= set(said.splitlines())
    assert "\xe9" in (tmp_path / "output.log").read_text(encoding="utf-8")


def test_output_that_is_closed(tmp_path):
    words = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", sys.executable, "-c", WRITER]
    environment = runs.environment(PYTHONPATH=str(runs.ROOT))
    assert subprocess.run(words, cwd=tmp_path, env=environment, timeout=60).returncode == 0
    assert (tmp_path / "done").exists()


def test_fid_is_tried_again(in_process, monkeypatch, tmp_path, capsys):
    """It cannot be had at the start, which is said then, and can be at step 2."""
    found = iter([UserError("no network"), object(), object()])

    def make_extractors(*arguments):
        if isinstance(extractors := next(found), UserError):
            raise extractors
        return extractors

    monkeypatch.setattr(evaluate, "Extractors", make_extractors)
    monkeypatch.setattr(evaluate, "load_real", lambda *arguments, **keywords: object())
    monkeypatch.setattr(evaluate, "collect_features", lambda *a, **k: object())
    monkeypatch.setattr(evaluate, "compute_metrics", lambda *a: {"frechet_distance": 1.5})
    changes = dict(train__n_steps=4, train__save_interval=2, train__grid_samples=0)
    words = runs.arguments(tmp_path, **changes, train__fid_samples=4, train__num_workers=0)
    assert in_process("train", words) == 0
    log = (tmp_path / "output.log").read_text()
    assert log.index("no FID until this is mended: no network") < log.index("saved")
    lines = [line for line in runs.steps_logged(tmp_path) if "frechet_distance" in line]
    assert [line["step"] for line in lines] == [2, 4]


def test_metrics_of_a_run_whose_checkpoints_are_gone_stay(tmp_path):
    for start in 0, 1:
        log = MetricsLog(tmp_path)
        log.truncate_after(0)
        log.write(1, {"loss": start})
        log.close()
    (old,) = tmp_path.glob("metrics.*-*.jsonl")
    assert json.loads(old.read_text()) == {"step": 1, "loss": 0}
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 1}


# ---------------------------------------- weights, classes, loaders, training and evaluation


class Reading:
    """Of items whose reading is a call of `act`."""

    def __init__(self, act):
        self.act = act

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return (self.act(),)


@pytest.fixture
def long_tmpdir(monkeypatch, tmp_path):
    """A TMPDIR whose sockets have names that are too long; data loader workers inherit it."""
    folder = tmp_path / ("d" * 60) / ("e" * 60)
    folder.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))


@pytest.mark.parametrize("script", ["train", "extract_imagenet_feature", "compute_fid_stats"])
def test_workers_that_cannot_pass_on_their_batches_end_the_run(
    script, in_process, long_tmpdir, capsys, tmp_path, monkeypatch
):
    images, out = tmp_path / "images", tmp_path / "out"
    data = [f"--path={images}", "--dataset=folder", "--num_workers=1", "--resolution=32"]
    writers.write_folder(images)
    writers.write_autoencoder(tmp_path / "vae")
    words = {
        "train": runs.arguments(out, train__num_workers=1),
        "extract_imagenet_feature": [
            *data, f"--output={out}", f"--autoencoder={tmp_path / 'vae'}",
        ],
        "compute_fid_stats": [*data, f"--out={out}.npz"],
    }[script]  # fmt: skip
    features = types.SimpleNamespace(dim=1, name="none")
    monkeypatch.setattr("libs.evaluate.features.make_features", lambda *names: features)
    status = in_process(script if script == "train" else f"scripts.{script}", words)
    said = "".join(capsys.readouterr())
    runs.assert_one_sentence(status, said, "AF_UNIX path too long", "TMPDIR", "/dev/shm")


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting asks for root")
def test_a_small_dev_shm_ends_the_run(tmp_path):
    words = ["sh", "-c", 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"', "sh"]
    words = ["unshare", "-m", *words, *runs.launcher(0), "train.py", *runs.arguments(tmp_path)]
    runs.assert_one_sentence(*runs.finish(runs._start(words, {})), "shared memory", "--shm-size")


def test_a_wait_for_workers_ends_by_time_or_request(monkeypatch):
    monkeypatch.setattr("libs.runtime.workers._POLL_S", 0.1)
    monkeypatch.setattr("libs.runtime.workers.TIMEOUT_S", 1)
    with pytest.raises(UserError, match="no batch came .* for 0.5 s"):
        next(read_batches(Reading(lambda: time.sleep(60)), num_workers=1))
    sleeping = read_batches(Reading(lambda: time.sleep(60)), num_workers=1, is_stopped=lambda: True)
    assert [next(sleeping) for _ in range(3)] == [None] * 3


def test_a_killed_worker_is_one_sentence():
    with pytest.raises(RuntimeError) as raised:
        batches = read_batches(Reading(lambda: os.kill(os.getpid(), signal.SIGKILL)), num_workers=1)
        next(batches)
    assert "memory ran out, or /dev/shm is small" in flags._explain_shortage(raised.value)


STALLING = '''
import os, sys, time
sys.path.insert(0, {root!r})
import datasets, train
from libs.runtime import flags

read, count = datasets.Digits._read, 0

def stall(self, epoch, index):
    global count
    count += 1
    if count > {reads} and os.environ.get("RANK", "0") == {rank!r}:
        time.sleep(600)
    return read(self, epoch, index)

datasets.Digits._read = stall
flags.run_main(train.main, train.FLAGS)
'''


@pytest.mark.parametrize("launch", [
    [], *(pytest.param(words, marks=pytest.mark.slow) for words in (
        ["--multi_gpu"], ["--config_file", "configs/accelerate/fsdp2.yaml"]))])  # fmt: skip
def test_a_sigterm_while_waiting_saves_and_the_next_start_goes_on(tmp_path, in_process, launch):
    """After five steps, the workers of the last rank, two, read no more."""

    def words(run):
        changes = dict(train__n_steps=7, train__save_interval=100, train__grid_samples=0)
        return runs.arguments(tmp_path / run, **changes)

    script = tmp_path / "stalling.py"
    reads, rank = (10, "1") if launch else (20, "0")
    script.write_text(STALLING.format(root=str(runs.ROOT), reads=reads, rank=rank))
    two = ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"]
    start = functools.partial(runs.start_words, [*launch, *two]) if launch else runs.start
    stalled = start(str(script), *words("run"))
    runs.wait_for_step(stalled, tmp_path / "run", 4)
    time.sleep(1)
    began = time.time()
    stalled.terminate()
    status, output = runs.finish(stalled)
    saved = tmp_path / "run" / "ckpts" / "5.ckpt" / "manifest.json"
    ended = saved.stat().st_mtime if launch else time.time()  # launchers take their time
    assert ended - began < 10 and "stopped at step 5" in output, output
    assert launch or status == 143
    assert [path.name for path in (tmp_path / "run" / "ckpts").iterdir()] == ["5.ckpt"]
    assert [in_process("train", words(run)) for run in ("run", "whole")] == [0, 0]
    whole, found = (runs.numbers(tmp_path / run) for run in ("whole", "run"))
    # On two processes rounding is another.
    assert np.allclose(found, whole, rtol=1e-5, atol=0) if launch else found == whole


WRAPPED = {
    "module": lambda state: {f"module.{name}": x for name, x in state.items()},
    "_orig_mod": lambda state: {f"_orig_mod.{name}": x for name, x in state.items()},
    "inside": lambda state: {n.replace("cks.", "cks._orig_mod."): x for n, x in state.items()},
    "lightning": lambda state: {"state_dict": {f"net.{n}": x for n, x in state.items()}, "step": 3},
    "averaged": lambda state: {"n_averaged": torch.tensor(5)}
    | {f"module.{name}": x for name, x in state.items()},
    "ema": lambda state: {
        "model": {name: x + 1 for name, x in state.items()}, "ema": {"shadow": state, "decay": 0.9},
        "opt": {"state": {0: {"exp_avg": torch.ones(3)}}}, "step": torch.tensor(7),
    },
    "model": lambda state: {"model": state, "optimizer": {"state": {}, "param_groups": []}},
    "attribute": None,
}  # fmt: skip


def make_small(num_classes=3, seed=0):
    torch.manual_seed(seed)
    return DiM(input_size=8, in_channels=1, dim=8, depth=3, num_classes=num_classes)


@pytest.mark.parametrize("kind", WRAPPED)
@pytest.mark.parametrize("official", [False, True])
def test_weights_of_others_are_read_and_said(tmp_path, kind, official):
    state = to_official(make_small()) if official else make_small().state_dict()
    if kind == "attribute":
        content = {name: torch.nn.Parameter(x) for name, x in state.items()}
        for parameter in content.values():
            parameter._no_weight_decay = True
    else:
        content = WRAPPED[kind](state)
    torch.save(content, tmp_path / "x.pth")
    for new in (False, True):
        model = make_small(seed=1)
        said = load_into(model, tmp_path / "x.pth", new=new)
        own = make_small().state_dict()
        assert all(torch.equal(x, own[name]) for name, x in model.state_dict().items())
        assert len(said) == {"attribute": 0, "ema": 2, "lightning": 2}.get(kind, 1), said
        assert kind != "ema" or "ema is read" in said[0]


def test_fine_tuning_for_other_classes_starts_label_tables_anew(tmp_path):
    torch.save(make_small().state_dict(), tmp_path / "x.pth")
    model, fresh, source = make_small(12, seed=1), make_small(12, seed=1), make_small()
    said = " ".join(load_into(model, tmp_path / "x.pth", new=True))
    assert said.count("3 -> 12 classes") == 2 and "kept" in said
    for name, x in model.state_dict().items():
        before = fresh if "label_embed" in name else source
        assert torch.equal(x, before.state_dict()[name]), name
    with pytest.raises(UserError, match="of the wrong shape: .*label_embed"):
        load_into(model, tmp_path / "x.pth")


def test_other_classes_at_resume_are_refused_and_splits_are_warned_of(tmp_path, in_process, capsys):
    images, out = tmp_path / "images", tmp_path / "run"
    writers.write_folder(images)
    changes = dict(
        dataset__name="folder", dataset__path=images, nnet__in_channels=3, train__num_workers=0,
        train__grid_samples=0, train__fid_samples=0, train__n_steps=1,
    )  # fmt: skip
    assert in_process("train", runs.arguments(out, **changes)) == 0
    log = (out / "output.log").read_text()
    assert "2 classes: ant, bee" in log and "changed since" not in log
    (images / "ant").rename(images / "cat")
    before = runs.snapshot(out)
    capsys.readouterr()
    status = in_process("train", runs.arguments(out, **changes | {"train__n_steps": 2}))
    said = "".join(capsys.readouterr())
    runs.assert_one_sentence(status, said, "new: cat; gone: ant", "--workdir")
    runs.assert_nothing_lost(before)
    with pytest.warns(UserWarning, match="test, train alike"):
        for name in "train", "test":
            writers.write_folder(tmp_path / "splits" / name, 2)
        open_folder(tmp_path / "splits")


def test_the_checkpoint_with_the_best_fid_stays(tmp_path):
    lines = [(1, 9.0), (2, 3.0), (3, "NaN"), (4, 5.0)]
    metrics = [{"step": step, "frechet_distance": fid} for step, fid in lines] + [{"step": 5}]
    metrics += [{"step": 6, "real_halves.frechet_distance": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    best = checkpoint.find_best(tmp_path / "metrics.jsonl")
    assert best == 2 and checkpoint.find_best(tmp_path / "absent.jsonl") is None
    for step in range(1, 7):
        parts = dict(weights={}, training_state={}, config={}, keep_last=2, best=best)
        checkpoint.save(tmp_path / "ckpts", step, **parts)
    found = sorted(path.name for path in (tmp_path / "ckpts").iterdir())
    assert found == ["2.ckpt", "5.ckpt", "6.ckpt"]
