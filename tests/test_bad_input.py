"""Whatever is wrong with a command line, a config, a checkpoint, a data set or the disk is one
sentence and exit status 1 or 2; no pickled code runs, and nothing that was on disk is lost.

The scripts run in this process, as their users start them; some also in processes of their own.
"""

import importlib
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from PIL import Image
from runs import assert_nothing_lost, assert_one_sentence, snapshot
from safetensors.torch import save_file

from libs.evaluate.metrics import DigitsClassifier
from libs.model.build import build_model
from libs.model.published import to_official
from libs.runtime import flags
from libs.train import checkpoint
from utils import UserError, flatten, read_json

# torch's remark on the pickles that are refused here.
pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")

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
        return assert_one_sentence(
            status, captured.out + captured.err, *says, expected=expected
        )

    return call


# ---------------------------------------------------------------------------------------------
# Configs, keys, values


@pytest.mark.parametrize(
    "words, says",
    [
        (["--config=configs/digit_T_DiM.py"],
         ["configs/digit_T_DiM.py does not exist", "did you mean configs/digits_T_DiM.py?"]),
        (["--config=configs/zzz.py"], ["zzz.py does not exist", "cifar10_S_DiM.py, "]),
        ([], ["--config is required"]),
        ([DIGITS, "--config.train.batchsize=8"],
         ["no key --config.train.batchsize", "did you mean --config.train.batch_size?"]),
        ([DIGITS, "--config.trian.batch_size=8"],
         ["no key --config.trian.batch_size", "did you mean --config.train.batch_size?"]),
        ([DIGITS, "--config.train=8"], ["--config.train is a section", "--config.train."]),
        ([DIGITS, "--config.train.batch_size=many"],
         ["--config.train.batch_size must be an integer, got 'many'"]),
        ([DIGITS, "--wrokdir=x"], ["unknown flag --wrokdir", "did you mean --workdir?"]),
        ([DIGITS, "train.batch_size=8"], ["unexpected argument", "--name=value"]),
    ],
)  # fmt: skip
def test_wrong_words(refused, words, says):
    refused("train", words, *says, expected=2)


# key, value, exit status, what the sentence says. Exit status 2: known before anything is read.
VALUES = [
    ("pred", "x_pred", 2, ["'x_pred'", "'noise_pred' or 'x0_pred'"]),
    ("train.mode", "conditional", 2, ["'conditional'", "'uncond' or 'cond'"]),
    ("lr_scheduler.name", "linear", 2, ["'linear'", "'customized'"]),
    ("optimizer.name", "sgd", 1, ["'sgd'", "'adamw'"]),
    ("optimizer.betas", "(0.9,)", 2, ["(0.9,)", "2 entries"]),
    ("optimizer.betas", "(0.9,1.5)", 2, ["(0.9, 1.5)", "0 to 0.999999"]),
    ("optimizer.lr", "nan", 2, ["nan", "0 or more"]),
    ("optimizer.lr", "inf", 2, ["inf", "0 or more"]),
    ("optimizer.lr", 1e4, 2, ["10000.0", "at most 1000"]),
    ("optimizer.eps", 0, 2, ["0.0", "1e-20 or more"]),
    ("max_grad_norm", 1e300, 2, ["1e+300", f"0 or more, at most {2**63 - 1}"]),
    ("train.batch_size", 10**8, 2, ["at most 10000000"]),
    ("train.num_workers", 5000, 2, ["at most 1024"]),
    ("sample.n_samples", 10**10, 2, ["at most 1000000000"]),
    ("sample.scale", "nan", 2, ["nan", "-10000.0 or more, at most 10000.0"]),
    ("sample.scale", "-inf", 2, ["-inf", "-10000.0 or more"]),
    ("seed", 2**70, 2, [str(2**70)]),
    ("train.mixed_precision", "fp8", 1, ["'fp8'", "no, fp16, bf16"]),
    ("train.ema_rate", 1.5, 2, ["1.5", "0 to 1"]),
    ("train.log_interval", 0, 2, ["0", "1 or more"]),
    ("train.save_interval", 0, 2, ["0", "1 or more"]),
    ("train.eval_interval", 0, 2, ["0", "1 or more"]),
    ("gradient_accumulation_steps", 0, 2, ["0", "1 or more"]),
    ("dataset.name", "mnist", 1, ["'mnist'", "digits, cifar10, folder"]),
    ("dataset.resolution", 16, 1, ["8x8", "16"]),
    ("dataset.random_flip", True, 1, ["flipped digit"]),
    ("nnet.name", "unet", 1, ["'unet'", "dim, uvit"]),
    ("nnet.pad_layout", "none", 1, ["'none'", "lateral, rho_pad"]),
    ("nnet.dim", 15, 1, ["15", "even"]),
    ("nnet.depth", 4, 1, ["4", "odd"]),
    ("nnet.scan_directions", 4, 1, ["4", "1, 2 or 3"]),
    ("nnet.drop_path", 1.0, 1, ["1.0", "[0, 1)"]),
    ("nnet.num_classes", 9, 1, ["10 classes", "--config.nnet.num_classes=10"]),
    ("nnet.in_channels", 3, 1, ["inputs of shape (3, 8, 8)", "the data are (1, 8, 8)"]),
    ("nnet.skip_tuning", "(0.8,)", 1, ["(0.8,)", "(low, high)"]),
    ("nnet.skip_tuning", "(low,high)", 2, ["'(low,high)'", "numbers"]),
    ("nnet.freeu", "(1.0,2.0)", 1, ["(1.0, 2.0)", "four"]),
    ("z_shape", "(8,8)", 2, ["(8, 8)", "3 entries"]),
    # Of sampling, and yet said before the first step of training.
    ("sample.algorithm", "dpm_solvr", 1, ["'dpm_solvr'", "dpm_solver, "]),
    ("sample.labels", "equal", 1, ["'equal'", "'random' or 'balanced'"]),
    ("sample.vis_label", 10, 1, ["10", "classes 0 to 9"]),
    ("sample.sample_steps", 0, 2, ["0", "1 or more"]),
    ("sample.mini_batch_size", 0, 2, ["0", "1 or more"]),
    ("sample.guidance_interval", "(0.5,)", 2, ["(0.5,)", "2 entries"]),
]  # fmt: skip


@pytest.mark.parametrize(
    "key, value, expected, says", VALUES, ids=[f"{key}={value}" for key, value, *_ in VALUES]
)
def test_impossible_values(refused, tmp_path, key, value, expected, says):
    words = runs.arguments(tmp_path, **{**QUICK, key.replace(".", "__"): value})
    sentence = refused("train", words, *says, expected=expected)
    # Some sentences speak of the thing instead of the key; all of them name one or the other.
    names = [key, key.split(".")[-1], "scale", "precision", "interval", "sampling algorithm",
             "data set", "input of shape"]  # fmt: skip
    assert any(name in sentence for name in names)
    assert not list(tmp_path.glob("ckpts/*")) and not (tmp_path / "metrics.jsonl").exists()


# Text that may be anything: paths. Everything else that is text has its impossible value above.
FREE_TEXT = {"nnet.pretrained_path", "autoencoder.pretrained_path", "dataset.path",
             "dataset.fid_stats", "sample.path", "sample.adm_npz",
             "sample.fid_weights_path"}  # fmt: skip
IN_EVALUATION = {"sample.features"}
MAY_BE_NEGATIVE = {"seed", "sample.scale", "lr_scheduler.warmup_steps"}
NEEDS_DATA = {"train.batch_size"}


@pytest.mark.parametrize("name", ["digits_T_DiM", "cifar10_uvit_small"])
def test_every_key_refuses_what_it_cannot_be(name):
    """Numbers: text, and -1; truth values and tuples: text; text: an unknown word."""
    path = f"{runs.ROOT}/configs/{name}.py"
    config = flags.load_config(path)
    kinds = flags._kinds({}, config)
    known_text = {key for key, *_ in VALUES} | FREE_TEXT | IN_EVALUATION
    spec = {"config": (flags.config_file, flags.REQUIRED, "")}
    for key in flatten(config):
        kind, wrong = kinds[f"config.{key}"], []
        if kind is str:
            assert key in known_text, f"{key} has no test with an unknown word"
        else:
            wrong.append("@")
        if kind in (int, float) and key not in MAY_BE_NEGATIVE | NEEDS_DATA:
            wrong.append("-1")
        for value in wrong:
            # Of the network's own checks, too, which come after those of the command line.
            with pytest.raises(UserError, match=key.replace(".", r"\.")):
                parsed = flags.parse_flags(
                    ["x.py", f"--config={path}", f"--config.{key}={value}"], spec
                )
                build_model(parsed.config.nnet)


def test_a_placeholder_of_a_tuple_can_be_set():
    words = ["x.py", f"--config={runs.ROOT}/configs/digits_T_DiM.py",
             "--config.nnet.skip_tuning=(0.8,1)", "--config.z_shape=(4,8,8)"]  # fmt: skip
    config = flags.parse_flags(words, {"config": (flags.config_file, flags.REQUIRED, "")}).config
    assert config.nnet.skip_tuning == (0.8, 1) and config.z_shape == (4, 8, 8)


def test_sizes_and_the_patch(refused, tmp_path):
    for key, value, says in (
        ("nnet__input_size", 9, ["nnet.input_size (9, 9)", "nnet.patch_size 2", "multiple"]),
        ("nnet__patch_size", 3, ["nnet.input_size (8, 8)", "nnet.patch_size 3", "multiple"]),
    ):
        refused("train", runs.arguments(tmp_path / key, **{**QUICK, key: value}), *says)
        assert not (tmp_path / key).exists()
    images = make_images(tmp_path / "images", 8)
    words = runs.arguments(tmp_path / "run", **folder_of(images, resolution=9))
    refused("train", words, "inputs of shape (3, 8, 8)", "the data are (3, 9, 9)")


def test_a_batch_that_does_not_divide(refused, tmp_path):
    words = runs.arguments(tmp_path, **{**QUICK, "train__batch_size": 7})
    refused("train", words, "train.batch_size 7", "1 processes x 2 accumulation", "6 and 8")


def test_a_batch_that_does_not_divide_by_the_processes(tmp_path):
    """Both ranks find it, one says it; the launcher adds its own report of a failed rank."""
    words = runs.arguments(tmp_path, **QUICK, train__batch_size=6)
    status, output = runs.run("train.py", *words, num_processes=2)
    before_the_launcher = output.split("Traceback", 1)[0]
    assert_one_sentence(
        status, before_the_launcher, "train.batch_size 6", "2 processes x 2 accumulation", "4 and 8"
    )
    assert "ChildFailedError" in output and output.count("not divisible") == 1
    assert not list(tmp_path.glob("ckpts/*"))


# ---------------------------------------------------------------------------------------------
# Classes


@pytest.mark.parametrize(
    "words, expected, says",
    [
        (["--classes=3,10"], 1, ["class 10 does not exist", "classes 0 to 9"]),
        (["--classes=-1"], 1, ["class -1 does not exist", "classes 0 to 9"]),
        (["--classes=three"], 2, ["--classes must be integers separated by commas", "'three'"]),
        (["--n=0"], 1, ["--n is 0, it must be 1 or more"]),
        (["--n=2000000"], 1, ["--n is 2000000, it must be 1 to 1000000"]),
        (["--steps=0"], 1, ["--steps is 0, it must be 1 or more"]),
        (["--scale=nan"], 1, ["--scale is nan, it must be -10000.0 to 10000.0"]),
        (["--algorithm=DDIMScheduler", "--steps=1001"], 1, ["1001 steps: take 1000 or fewer"]),
        (["--algorithm=DDIMSchedular"], 1, ["'DDIMSchedular'", "did you mean 'DDIMScheduler'?"]),
        (["--out=no/such/folder/grid.png"], 1, ["cannot write no/such/folder/grid.png"]),
        (["--out=grid.jpg"], 1, ["cannot write grid.jpg", "suffix .png"]),
    ],
)
def test_sample_flags(refused, trained, tmp_path, words, expected, says):
    where = [f"--nnet_path={trained / 'ckpts' / '4.ckpt'}", f"--out={tmp_path / 'grid.png'}"]
    refused("sample", [*where, *words], *says, expected=expected)
    assert not (tmp_path / "grid.png").exists()


def test_guidance_by_a_label_that_is_never_trained(refused, tmp_path):
    words = [*runs.arguments(tmp_path / "run", **QUICK), "--config.dataset.cfg=False"]
    refused("train", words, "guidance is asked for", "says the config", "--config.dataset.cfg=True")
    assert not (tmp_path / "run").exists()


def test_classes_of_a_model_without_classes(refused, trained):
    words = [f"--nnet_path={trained / 'ckpts' / '4.ckpt'}", *runs.arguments("", **QUICK)[1:]]
    words += ["--config.train.mode=uncond", "--classes=3"]
    refused("sample", words, "trained without classes", "leave --classes out")
    words[-1] = "--scale=2"
    refused("sample", words, "trained without classes", "leave --scale out")


# ---------------------------------------------------------------------------------------------
# Checkpoints


class Payload:
    """Pickles as a call that makes the file `marker`."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path):
    """The file that running the payload makes, tried here, so that the tests can fail."""
    path = tmp_path / "executed"
    pickle.loads(pickle.dumps(Payload(path)))
    assert path.exists()
    path.unlink()
    return path


def official_weights(trained):
    model = build_model(read_json(trained / "config.json")["nnet"])
    return to_official(model)


def read_by(script, path, tmp_path):
    """Command line of `script` that reads the weights at `path`."""
    if script == "sample":
        words = runs.arguments("", **QUICK)[1:]
        return [*words, f"--nnet_path={path}", f"--out={tmp_path / 'grid.png'}", "--n=1"]
    words = runs.arguments(tmp_path / "run", **QUICK, sample__fid_weights_path=classifier(tmp_path))
    return [*words, f"--nnet_path={path}", "--config.sample.n_samples=4"]


def classifier(folder):
    """The file of an untrained digits classifier, which does for a command that must not begin."""
    path = folder / "classifier.safetensors"
    torch.manual_seed(0)
    save_file(DigitsClassifier().state_dict(), path)
    return path


SCRIPTS = pytest.mark.parametrize("script", ["sample", "eval"])


@SCRIPTS
def test_missing_checkpoints(refused, trained, tmp_path, script):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "5.ckpt", tmp_path / "nnet_ema.pth", tmp_path / "empty"):
        words = read_by(script, path, tmp_path)
        refused(script, words, str(path), "does not exist", "<step>.ckpt directory")


def test_sample_without_a_config(refused, trained, tmp_path):
    """No --config: config.json of the checkpoint says what the network is."""
    refused("sample", [f"--nnet_path={tmp_path / '5.ckpt'}"], "5.ckpt does not exist")
    torch.save(official_weights(trained), tmp_path / "nnet_ema.pth")
    words = [f"--nnet_path={tmp_path / 'nnet_ema.pth'}"]
    refused("sample", words, "there is no", "config.json", "give --config=<config file>")
    for content, says in (
        ("{", "is not valid JSON"),
        ("[1]", "is not the config of a run"),
        ('{"nnet": {}}', "is not the config of a run"),
    ):
        (tmp_path / "config.json").write_text(content)
        refused("sample", words, str(tmp_path / "config.json"), says)


@SCRIPTS
def test_damaged_checkpoints(refused, trained, tmp_path, script):
    ours, official = tmp_path / "nnet_ema.safetensors", tmp_path / "nnet_ema.pth"
    ours.write_bytes((trained / "ckpts" / "4.ckpt" / "nnet_ema.safetensors").read_bytes())
    torch.save(official_weights(trained), official)
    for path in (ours, official):
        whole = path.read_bytes()
        for content in (whole[: len(whole) // 2], whole[:10], b"", b"<html>Not found</html>"):
            path.write_bytes(content)
            words = read_by(script, path, tmp_path)
            refused(script, words, str(path), "damaged or no", "damaged")


@SCRIPTS
def test_checkpoints_of_another_network(refused, trained, tmp_path, script):
    weights = official_weights(trained)
    pth = tmp_path / "nnet_ema.pth"
    fewer = {name: tensor for name, tensor in weights.items() if name != "proj_out_2.bias"}
    for changed, says in (
        ({**weights, "additional_embed": torch.zeros(1, 30, 16)}, "(1, 30, 16) instead of (1, 18"),
        (fewer, "missing: head.bias"),
        ({"state_dict": weights}, "unexpected: state_dict"),
    ):
        torch.save(changed, pth)
        words = read_by(script, pth, tmp_path)
        refused(script, words, str(pth), "do not fit this network", says)
    ours = trained / "ckpts" / "4.ckpt"
    words = [*read_by(script, ours, tmp_path), "--config.nnet.dim=32"]
    refused(script, words, str(ours), "instead of", "configuration that they were trained with")


def write_payload(path, payload, kind):
    if kind == "pickle":
        path.write_bytes(pickle.dumps(payload))
    else:
        torch.save(payload, path, _use_new_zipfile_serialization=kind == "zip")


def copy_run(trained, folder):
    return Path(shutil.copytree(trained, folder))


def test_a_run_of_another_network_is_not_resumed(refused, trained, tmp_path):
    workdir = copy_run(trained, tmp_path / "run")
    words = runs.arguments(workdir, **{**QUICK, "nnet__dim": 32})
    refused("train", words, str(workdir / "ckpts" / "4.ckpt"), "(1, 18, 16) instead of (1, 18, 32)")


# ---------------------------------------------------------------------------------------------
# Data


def make_images(folder, size, count=16, broken=0):
    """`count` PNG files of size x size, the first `broken` of them cut short."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for index in range(count):
        path = folder / f"{index:02d}.png"
        Image.fromarray(random.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(path)
        if index < broken:
            os.truncate(path, 40)
    return folder


def folder_of(path, resolution=8, **changes):
    """Config changes of a run on an image folder."""
    return {
        **QUICK, "dataset__name": "folder", "dataset__path": path, "dataset__cfg": False,
        "dataset__resolution": resolution, "train__mode": "uncond", "nnet__in_channels": 3,
        "sample__cfg": False, **changes,
    }  # fmt: skip


def test_data_set_directories(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    for name, path, says in (
        ("folder", tmp_path / "nowhere", ["nowhere does not exist", "dataset.path"]),
        ("folder", tmp_path / "empty", ["no images (.png", "empty"]),
        ("folder", "", ["needs dataset.path"]),
        ("cifar10", "", ["needs dataset.path"]),
        ("digits", tmp_path, ["leave dataset.path empty"]),
    ):
        changes = folder_of(path, dataset__name=name, dataset__resolution=32)
        refused("train", runs.arguments(tmp_path / "run", **changes), *says)
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore:unreadable image")
@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_unreadable_images(refused, tmp_path, workers):
    images = make_images(tmp_path / "images", 8, count=24, broken=23)
    changes = folder_of(images, train__num_workers=workers, train__n_steps=50)
    sentence = refused(
        "train", runs.arguments(tmp_path / "run", **changes),
        "more than 10 of 24 images cannot be read", "repair or remove them",
    )  # fmt: skip
    assert sentence.count(str(images)) == 11, "the images are named"


def test_an_unreadable_image_is_named_and_the_run_goes_on(in_process, tmp_path):
    images = make_images(tmp_path / "images", 8, broken=1)
    words = runs.arguments(tmp_path / "run", **folder_of(images))
    assert in_process("train", words) == 0
    log = (tmp_path / "run" / "output.log").read_text()
    assert f"WARNING unreadable image, the next stands in for it: {images / '00.png'}" in log
    assert [line["step"] for line in runs.steps_logged(tmp_path / "run")] == [1, 2, 3, 4]


# ---------------------------------------------------------------------------------------------
# Statistics


def test_statistics_that_do_not_belong(refused, trained, tmp_path, marker):
    path = tmp_path / "stats.npz"
    moments = dict(mu=np.zeros(48), sigma=np.eye(48))
    words = read_by("eval", trained / "ckpts" / "4.ckpt", tmp_path)
    words += [f"--config.dataset.fid_stats={path}", f"--output_path={tmp_path / 'result.json'}"]
    refused("eval", words, str(path), "do not exist", "scripts/compute_fid_stats.py")
    made = dict(resolution=8, count=10, preprocessing="none")
    inception = dict(**moments, **made, extractor="inception_v3_fid-6726825d")
    for arrays, says in (
        (inception, ["extractor inception_v3_fid-6726825d", "expected digits_classifier-"]),
        ({**moments, "resolution": 32}, ["resolution 32", "expected 8"]),
        (dict(mu=np.zeros(2048), sigma=np.eye(2048)), ["(2048,)", "expected (48,)"]),
        (dict(mu=np.zeros(48)), ["no 'sigma'"]),
        (dict(mu=np.array([Payload(marker)]), sigma=np.eye(1)), ["plain arrays"]),
    ):
        np.savez(path, **arrays)
        refused("eval", words, str(path), *says)
    path.write_bytes(b"not numpy")
    assert "unsafely" not in refused("eval", words, str(path), ".npz file of plain arrays")
    assert not marker.exists() and not (tmp_path / "result.json").exists()


def test_evaluation_that_cannot_be(refused, trained, tmp_path):
    words = read_by("eval", trained / "ckpts" / "4.ckpt", tmp_path)
    for word, expected, says in (
        ("--config.sample.features=vgg", 1, ["'vgg'", "inception, digits_classifier, none"]),
        ("--config.sample.fid_weights_path=no.safetensors", 1, ["no.safetensors", "run scripts/"]),
        ("--config.sample.n_samples=1", 2, ["sample.n_samples is 1", "2 or more"]),
        (f"--output_path={tmp_path}", 1, [f"{tmp_path} is a directory", "--output_path"]),
        (f"--output_path={trained / 'config.json' / 'x.json'}", 1, ["cannot make the directory"]),
    ):
        refused("eval", [*words, word], *says, expected=expected)


@pytest.mark.parametrize(
    "word, says",
    [
        ("--device=gpu", ["--device is 'gpu'", "expected cpu, cuda or cuda:"]),
        ("--device=", ["--device is ''", "expected cpu, cuda or cuda:"]),
        ("--device=meta", ["--device is 'meta'", "expected cpu, cuda or cuda:"]),
        ("--device=cuda:99", ["--device is cuda:99, but torch finds "]),
        ("--batch_size=100000000", ["--batch_size is", "it must be 1 to 10000000"]),
        ("--num_workers=5000", ["--num_workers is 5000, it must be 0 to 1024"]),
        ("--out=.", [". is a directory: --out is the file to write"]),
    ],
)
def test_statistics_that_cannot_be(refused, tmp_path, word, says):
    words = ["--dataset=digits", "--resolution=8", f"--out={tmp_path / 'stats.npz'}"]
    refused("scripts.compute_fid_stats", [*words, word], *says)
    assert not (tmp_path / "stats.npz").exists()


def test_latents_of_images_that_are_too_large(refused, tmp_path):
    words = [f"--path={tmp_path}", f"--output={tmp_path / 'out'}", "--resolution=65536"]
    says = "--resolution is 65536, it must be 1 to 16384"
    refused("scripts.extract_imagenet_feature", words, says)


@pytest.mark.parametrize(
    "word, says",
    [
        ("--seed=-1", "--seed is -1, it must be 0 or more"),
        (f"--seed={2**40}", f"--seed is {2**40}, it must be 0 to {2**32 - 1}"),
        ("--out=/tmp", "/tmp is a directory: --out is the file to write"),
        ("--out=README.md/x", "cannot make the directory README.md"),
    ],
)
def test_a_classifier_that_cannot_be(refused, monkeypatch, word, says):
    script = importlib.import_module("scripts.train_digits_classifier")
    monkeypatch.setattr(script, "load_split", lambda seed: pytest.fail("the training began"))
    refused("scripts.train_digits_classifier", [word], says)


# ---------------------------------------------------------------------------------------------
# The disk


def test_a_run_directory_that_cannot_be(refused, tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        refused("train", runs.arguments(path, **QUICK), f"cannot make the directory {path}")


def train_with_a_file_limit(workdir, kib, **changes):
    """train.py in a process whose files cannot grow over `kib` KiB, as on a disk that is full."""
    command = [sys.executable, "-c", LIMITED, str(kib), *runs.arguments(workdir, **changes)]
    done = subprocess.run(
        command, cwd=runs.ROOT, env=runs.environment(), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=runs.TIMEOUT_S,
    )  # fmt: skip
    return done.returncode, done.stdout


LIMITED = """
import os, resource, sys
limit = int(sys.argv.pop(1)) * 1024
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
os.execv(sys.executable, [sys.executable, "train.py", *sys.argv[1:]])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits")
def test_the_disk_is_full_while_saving(in_process, trained, tmp_path):
    """One sentence, the earlier checkpoint as it was, and the same command goes on afterwards."""
    workdir = copy_run(trained, tmp_path / "run")
    saved = snapshot(workdir / "ckpts")
    changes = {**QUICK, "train__n_steps": 6}
    status, output = train_with_a_file_limit(workdir, 64, **changes)
    assert_one_sentence(
        status, output, f"could not save checkpoint {workdir / 'ckpts' / '6.ckpt'}",
        "File too large", f"the last good checkpoint is {workdir / 'ckpts' / '4.ckpt'}",
    )  # fmt: skip
    assert snapshot(workdir / "ckpts") == saved
    assert sorted(path.name for path in (workdir / "ckpts").iterdir()) == ["2.ckpt", "4.ckpt"]
    assert in_process("train", runs.arguments(workdir, **changes)) == 0
    assert [line["step"] for line in runs.steps_logged(workdir)] == [1, 2, 3, 4, 5, 6]
    assert checkpoint.verify(workdir / "ckpts" / "6.ckpt") == 6


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits")
def test_the_disk_is_full_from_the_beginning(in_process, trained, tmp_path):
    """Not even the run's own small files can be written."""
    workdir = copy_run(trained, tmp_path / "run")
    (workdir / "output.log").unlink()  # a log that cannot grow is logging's own complaint
    before = snapshot(workdir)
    status, output = train_with_a_file_limit(workdir, 1, **{**QUICK, "train__n_steps": 6})
    assert_one_sentence(status, output, "cannot write ", ": File too large; make room")
    assert_nothing_lost(before)


# ---------------------------------------------------------------------------------------------
# The scripts as processes


def test_every_script_is_one_sentence_as_a_process(trained, tmp_path, marker):
    """Nothing outside `main` spoils it; no run directory is made for a wrong command line."""
    workdir, missing, evil = tmp_path / "run", tmp_path / "5.ckpt", tmp_path / "nnet_ema.pth"
    torch.save({**official_weights(trained), "extra": Payload(marker)}, evil)
    processes = [
        runs.start("train.py", *runs.arguments(workdir), "--config.train.n_stepz=3"),
        runs.start("eval.py", *read_by("eval", missing, tmp_path)),
        runs.start("sample.py", *read_by("sample", evil, tmp_path)),
    ]
    results = [runs.finish(process) for process in processes]
    assert_one_sentence(*results[0], "did you mean --config.train.n_steps?", expected=2)
    assert_one_sentence(*results[1], f"checkpoint {missing} does not exist")
    assert_one_sentence(*results[2], str(evil), "no code from files is run")
    assert not workdir.exists() and not marker.exists() and not list(tmp_path.glob("*.png"))
