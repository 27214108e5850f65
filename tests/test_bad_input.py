"""The mistakes that people make are one sentence and exit status 1 or 2, before hours are spent;
nothing that was on disk is lost.
"""

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from runs import assert_nothing_lost, assert_one_sentence, snapshot
from safetensors.torch import save_file
from writers import write_folder

from libs.evaluate import Classifier

DIGITS = "--config=configs/digits_T_DiM.py"
QUICK = dict(nnet__depth=3, train__num_workers=0, train__n_steps=4, train__grid_samples=0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, in_process):
    """A run directory with the checkpoints 2 and 4."""
    workdir = tmp_path_factory.mktemp("trained")
    changes = dict(**QUICK, train__save_interval=2)
    assert in_process("train", runs.arguments(workdir, **changes)) == 0
    return workdir


@pytest.fixture
def refused(in_process, capsys, tmp_path, trained):
    """refused(script, words, *key words, expected=1): the script's one sentence, everything that
    was in tmp_path and in the trained run being as it was.
    """

    def call(script, words, *says, expected=1):
        before = snapshot(tmp_path, trained)
        capsys.readouterr()
        status = in_process(script, words)
        captured = capsys.readouterr()
        assert_nothing_lost(before)
        return assert_one_sentence(status, captured.out + captured.err, *says, expected=expected)

    return call


# ------------------------------------------------------------ the command line


@pytest.mark.parametrize(
    "words, says",
    [
        (["--config=configs/digit_T_DiM.py"], "did you mean configs/digits_T_DiM.py?"),
        (["--config=configs/zzz.py"], "cifar10_S_DiM.py, "),
        ([], "--config is required"),
        ([DIGITS, "--config.train.batchsize=8"], 'Did you mean "batch_size"'),
        ([DIGITS, "--config.trian.batch_size=8"], 'Did you mean "train"'),
        ([DIGITS, "--config.train=8"], "--config.train=8"),
        ([DIGITS, "--config.optimizer.momentum=0.9"], "no key 'momentum'"),
        ([DIGITS, "--config.loss.mse.weight=2"], "config.loss.mse is one value"),
        ([DIGITS, "--config.train.batch_size=many"], "--config.train.batch_size=many"),
        ([DIGITS, "--wrokdir=x"], "Did you mean: workdir"),
        ([DIGITS, "train.batch_size=8"], "unexpected argument 'train.batch_size=8'"),
        ([DIGITS, "--config.train.mode=conditional"], "expected one of ('uncond', 'cond')"),
        ([DIGITS, "--config.train.save_interval=0"], "train.save_interval is 0, expected 1 to inf"),
        ([DIGITS, "--config.train.ema_rate=nan"], "train.ema_rate is nan, expected 0 to 1"),
        ([DIGITS, "--config.sample.guidance_interval=(0,2)"], "is (0, 2), expected 0 to 1"),
    ],
)
def test_wrong_words(refused, words, says):
    refused("train", words, says, expected=2)


# key, value, what the sentence says: all before the first step, those of sampling too.
@pytest.mark.parametrize(
    "key, value, says",
    [
        ("process.name", "ddpm", "vpsde"),
        ("process.shft", 2.0, "'shft'"),
        ("loss.directoin", 0.5, "direction"),
        ("loss.direction.kind", 1, "loss.direction: got an unexpected keyword argument 'kind'"),
        ("loss.internal.blok", 1, "argument 'blok'; OutputHead takes (model, *, block=8)"),
        ("nnet.mixer.heads", 4, "config.nnet.mixer: got an unexpected keyword argument 'heads'"),
        ("pred", "x_pred", "noise_pred"),
        ("optimizer.name", "sgd", "adamw"),
        ("dataset.name", "mnist", "digits"),
        ("dataset.resolution", 16, "ug_m say 16"),
        ("dataset.cfg", False, "--config.dataset.cfg=True"),
        ("nnet.name", "unet", "uvit"),
        ("nnet.num_classes", 9, "--config.nnet.num_classes=10"),
        ("nnet.in_channels", 3, "(3, 8, 8), but the data are (1, 8, 8)"),
        ("nnet.patch_size", 3, "3"),
        ("sample.algorithm", "dpm_solvr", "dpm_solver"),
        ("train.batch_size", 7, "7"),
    ],
)
def test_values_that_cannot_be(refused, tmp_path, key, value, says):
    words = runs.arguments(tmp_path, **{**QUICK, key.replace(".", "__"): value})
    refused("train", words, says)
    assert not list(tmp_path.glob("ckpts/*")) and not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("word, says, expected", [
    ("--classes=3,10", "class 10", 1), ("--out=README.md/x.png", "README.md", 1),
    ("--algorithm=DDIMSchedular", "DDIMScheduler", 1), ("--steps=0", "is 0, expected 1", 2),
])  # fmt: skip
def test_flags_of_sample(refused, trained, tmp_path, word, says, expected):
    words = [f"--nnet_path={trained / 'ckpts' / '4.ckpt'}", f"--out={tmp_path / 'grid.png'}", word]
    refused("sample", words, says, expected=expected)
    assert not (tmp_path / "grid.png").exists()


# ------------------------------------------------------------ weights


def read_by(script, path, tmp_path):
    """Command line of `script` that reads the weights at `path`."""
    if script == "sample":
        words = runs.arguments("", **QUICK)[1:]
        return [*words, f"--nnet_path={path}", f"--out={tmp_path / 'grid.png'}", "--n=1"]
    torch.manual_seed(0)
    save_file(
        Classifier(channels=1, num_classes=10).state_dict(), tmp_path / "classifier.safetensors"
    )
    changes = dict(sample__fid_weights_path=tmp_path / "classifier.safetensors")
    words = runs.arguments(tmp_path / "run", **QUICK, **changes, sample__n_samples=4)
    return [*words, f"--nnet_path={path}"]


class Payload:
    """Pickles as a call that makes the file `marker`."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("script", ["sample", "eval"])
def test_weights_that_cannot_be(refused, trained, tmp_path, script):
    """Missing, cut short, of another network, with code."""
    refused(script, read_by(script, tmp_path / "5.ckpt", tmp_path), "5.ckpt")
    own, marker = tmp_path / "nnet_ema.safetensors", tmp_path / "executed"
    whole = (trained / "ckpts" / "4.ckpt" / "nnet_ema.safetensors").read_bytes()
    own.write_bytes(whole[: len(whole) // 2])
    refused(script, read_by(script, own, tmp_path), str(own), "damaged")
    own.write_bytes(whole)
    words = [*read_by(script, own, tmp_path), "--config.nnet.dim=32"]
    refused(script, words, str(own), "do not fit")
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists(), "the payload works"
    marker.unlink()
    torch.save({"w": Payload(marker)}, tmp_path / "nnet_ema.pth")
    refused(script, read_by(script, tmp_path / "nnet_ema.pth", tmp_path), "nnet_ema.pth")
    assert not marker.exists()


def test_weights_without_a_config(refused, trained, tmp_path):
    own = tmp_path / "nnet_ema.safetensors"
    shutil.copy(trained / "ckpts" / "4.ckpt" / own.name, own)
    says = "config.json", "--config=<config file>"
    refused("sample", [f"--nnet_path={own}"], *says, expected=2)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    refused("sample", [f"--nnet_path={own}"], *says, expected=2)
    refused("sample", ["--nnet_path=ckpts/4.ckpt"], "ckpts/4.ckpt does not exist", expected=2)


def test_a_run_of_another_network_is_not_resumed(refused, trained, tmp_path):
    workdir = Path(shutil.copytree(trained, tmp_path / "run"))
    refused("train", runs.arguments(workdir, **{**QUICK, "nnet__dim": 32}), "do not fit")


# ------------------------------------------------------------ data, statistics


def make_images(folder, count, broken):
    """`count` PNG files of 8x8 pixels, the first `broken` of them cut short."""
    write_folder(folder, count)
    for path in sorted(folder.rglob("*.png"))[:broken]:
        os.truncate(path, 40)
    return folder


def folder_run(workdir, path, **changes):
    """Words of a run on an image folder."""
    changes = {
        **QUICK, "dataset__name": "folder", "dataset__path": path, "dataset__cfg": False,
        "dataset__resolution": 8, "train__mode": "uncond", "nnet__in_channels": 3,
        "sample__cfg": False, **changes,
    }  # fmt: skip
    return runs.arguments(workdir, **changes)


def test_data_set_directories(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "nowhere", tmp_path / "empty"):
        refused("train", folder_run(tmp_path / "run", path), str(path))
    assert not (tmp_path / "run").exists()


def test_unreadable_images(refused, in_process, tmp_path):
    """A few are named and the run goes on; many end it, out of a worker too."""
    images = make_images(tmp_path / "a", count=16, broken=1)
    assert in_process("train", folder_run(tmp_path / "run", images)) == 0
    assert str(images / "ant" / "00.png") in (tmp_path / "run" / "output.log").read_text()
    assert [line["step"] for line in runs.steps_logged(tmp_path / "run")] == [1, 2, 3, 4]
    images = make_images(tmp_path / "b", count=24, broken=23)
    changes = dict(train__num_workers=2, train__n_steps=50)
    refused("train", folder_run(tmp_path / "bad", images, **changes), "cannot be read", str(images))


def test_statistics_that_are_not_there(refused, trained, tmp_path):
    words = read_by("eval", trained / "ckpts" / "4.ckpt", tmp_path)
    path = tmp_path / "stats.npz"
    refused("eval", [*words, f"--config.dataset.fid_stats={path}"], str(path))
    np.savez(path, mu=np.zeros(2048), sigma=np.eye(2048))
    refused("eval", [*words, f"--config.dataset.fid_stats={path}"], str(path))
    refused("eval", [*words, f"--output_path={tmp_path}"], str(tmp_path))


# ------------------------------------------------------------ processes


def test_scripts_as_processes(trained, tmp_path):
    """No run directory is made for a wrong command line; each of two ranks says what is wrong."""
    words = runs.arguments(tmp_path / "run")
    processes = [
        runs.start("train.py", *words, "--config.train.n_stepz=3"),
        runs.start("train.py", *words, "--config.train.batch_size=6", num_processes=2),
    ]
    wrong, divided = [runs.finish(process) for process in processes]
    assert_one_sentence(*wrong, "n_steps", expected=2)
    assert divided[0] == 1 and "error: " in divided[1] and "train.batch_size" in divided[1]
    assert not list(tmp_path.rglob("ckpts"))
