"""scripts/extract_imagenet_feature.py: what it writes, in however many pieces, and what it refuses.

On generated images and a tiny autoencoder, in this process, in processes that are killed, and under
accelerate launch.
"""

import importlib
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import runs
import torch
from runs import assert_nothing_lost, assert_one_sentence, snapshot
from writers import NUM_IMAGES, WNIDS, write_autoencoder, write_images

from datasets import get_dataset
from libs.data.autoencoder import load_autoencoder
from libs.data.latents import Features
from libs.runtime import watch
from utils import UserError

pytestmark = pytest.mark.filterwarnings("ignore:.*the whole ImageNet has")

SCRIPT = "scripts/extract_imagenet_feature.py"
@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with the images, in imagenet/, and the autoencoder, ae.pth."""
    folder = tmp_path_factory.mktemp("inputs")
    write_images(folder / "imagenet")
    write_autoencoder(folder / "ae.pth")
    return folder


def words_for(inputs, output, **changes):
    """The command line: 14 images in four shards, their last batches shorter."""
    values = {
        "path": inputs / "imagenet", "autoencoder": inputs / "ae.pth", "output": output,
        "resolution": 32, "images_per_shard": 4, "batch_size": 3, "num_workers": 0, "flip": True,
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in {**values, **changes}.items()]


@pytest.fixture(scope="module")
def extract(in_process):
    """extract(words): the script's exit status, run in this process on one thread."""
    return lambda words: in_process("scripts.extract_imagenet_feature", words)


@pytest.fixture(scope="module")
def whole(inputs, extract):
    """The latents as an undisturbed run writes them."""
    assert extract(words_for(inputs, inputs / "whole")) == 0
    return inputs / "whole"


@pytest.fixture
def refused(extract, capsys, inputs, tmp_path):
    """refused(words, *key words): the script's one sentence, everything being as it was."""

    def call(words, *says, expected=1):
        before = snapshot(tmp_path, inputs)
        capsys.readouterr()
        status = extract(words)
        captured = capsys.readouterr()
        assert snapshot(tmp_path, inputs) == before
        return assert_one_sentence(status, captured.out + captured.err, *says, expected=expected)

    return call


def copied(folder, to, without=()):
    shutil.copytree(folder, to)
    for name in without:
        (to / name).unlink()
    return to


# ------------------------------------------------------------ what is written


def test_a_process_without_a_shard_waits_for_the_others(monkeypatch):
    """One that never said so would count as frozen, and end them."""
    script, beats = importlib.import_module("scripts.extract_imagenet_feature"), []
    monkeypatch.setattr("libs.runtime.watch.beat", beats.append)
    packing = SimpleNamespace(begin=lambda: False, missing=lambda: [4, 7])
    monkeypatch.setattr(script, "broadcast_object_list", lambda found: None)
    for rank, expected in (0, [4]), (1, [7]), (2, []):
        accelerator = SimpleNamespace(
            is_main_process=rank == 0, process_index=rank, num_processes=3
        )
        if rank:
            monkeypatch.setattr(
                script, "broadcast_object_list", lambda found: found.__setitem__(0, [4, 7])
            )
        assert script.deal(accelerator, packing) == expected
    assert beats == [watch.WAITING] * 3


def test_more_shards_than_can_be_opened_are_refused(refused, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr("scripts.extract_imagenet_feature.MAX_SHARDS", 3)
    refused(words_for(inputs, tmp_path / "latents"), "makes 4 shards, more than", "take 5 or more")


def test_records_are_the_autoencoders_moments(whole, inputs):
    """Of the images as training on pixels crops them, and of their flips, rounded to float16."""
    features, autoencoder = Features(whole), load_autoencoder(inputs / "ae.pth")
    features.verify()
    images = get_dataset("imagenet", path=inputs / "imagenet", resolution=32)
    x = torch.stack([images[0, i][0] for i in range(NUM_IMAGES)])
    for f, pixels in enumerate((x, x.flip(-1))):
        found = features.read(np.arange(NUM_IMAGES) * 2 + f).astype(np.float32)
        # float16 has 11 bits; float32 sums in another order are far below.
        np.testing.assert_allclose(found, autoencoder.moments(pixels), rtol=2**-11, atol=1e-5)
    assert np.abs(features.read([0]) - features.read([1])).max() > 0.01
    assert features.labels.tolist() == images.labels.tolist()
    manifest = features.manifest
    assert manifest["class_names"] == tuple(WNIDS) and manifest["scale_factor"] == 0.18215
    assert manifest["autoencoder_sha256"] == autoencoder.sha256
    assert [shard["records"] for shard in manifest["shards"]] == [8, 8, 8, 4]


def test_they_are_read_as_a_data_set(whole):
    dataset = get_dataset("imagenet256_features", path=whole, resolution=32, random_flip=True)
    assert (len(dataset), dataset.shape, dataset.num_classes) == (NUM_IMAGES, (8, 4, 4), 3)
    assert "centre crop to 32" in dataset.preprocessing


def test_a_folder_without_classes(inputs, extract, tmp_path, whole, capsys):
    words = words_for(inputs, tmp_path / "out", dataset="folder", labels=False, flip=False,
                      images_per_shard=100, batch_size=100, num_workers=1)  # fmt: skip
    assert extract(words) == 0
    captured = capsys.readouterr()
    assert "14 images, 14 records of (8, 4, 4) in 1 shards" in captured.out
    assert "img/s" in captured.out and "waiting for images" in captured.out
    assert "14/14" in captured.err
    features = Features(tmp_path / "out")
    assert features.labels is None and not (tmp_path / "out" / "labels.bin").exists()
    ours, theirs = features.read(range(14)), Features(whole).read(range(0, 28, 2))
    np.testing.assert_allclose(ours, theirs, rtol=2**-10, atol=1e-5)


# ------------------------------------------------------------ interruptions

# Forks runs of the script and kills each with SIGKILL: at its n-th step of changing the disk,
# before or after it, or after some time.
KILLED = """
import json, os, random, signal, sys, time
sys.path.insert(0, ".")
import torch
torch.set_num_threads(1)
from diffusers import AutoencoderKL  # seconds, for every child
from libs import flags
from scripts import extract_imagenet_feature as extract

def arm(n):
    count, replace, fsync = [0], os.replace, os.fsync
    def step(function):
        def wrapped(*args):
            for call in (lambda: None, lambda: function(*args)):
                call()
                count[0] += 1
                if count[0] == n:
                    os.kill(os.getpid(), signal.SIGKILL)
        return wrapped
    os.replace, os.fsync = step(replace), step(fsync)

def attempt(words, n=0, seconds=0):
    child = os.fork()
    if child == 0:
        sys.argv = ["extract", *words]
        if n:
            arm(n)
        flags.run_main(extract.main, extract.FLAGS)
        os._exit(0)
    if seconds:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]

draws, *folders = json.loads(sys.argv[1])
random.seed(draws)
for words in folders:
    kills = 0
    while attempt(words, *random.choice([
        (random.randint(1, 6), 0), (0, random.random() * (0.25 + kills / 20))  # as if busy
    ])):
        kills += 1
        assert kills < 60
    attempt(words)
    print(kills, flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="fork")
def test_kill_9_loses_and_repeats_nothing(inputs, whole, tmp_path):
    folders = [tmp_path / str(i) for i in range(3)]
    chains = json.dumps([1, *(words_for(inputs, folder) for folder in folders)])
    done = subprocess.run(
        [sys.executable, "-c", KILLED, chains], cwd=runs.ROOT, env=runs.environment(),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=runs.TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    kills = [int(line) for line in done.stdout.splitlines() if line.isdigit()]
    assert len(kills) == 3 and sum(kills) >= 6, done.stdout
    expected = {path.relative_to(whole): data for path, data in snapshot(whole).items()}
    for folder in folders:
        found = {path.relative_to(folder): data for path, data in snapshot(folder).items()}
        assert found == expected


def test_two_processes_finish_what_one_began(inputs, whole, tmp_path):
    """Bit for bit: the bytes do not depend on who made a shard, nor the order of shards."""
    output = copied(whole, tmp_path / "out", ["manifest.json", "labels.bin", "shard-00002.bin"])
    for leftover in (".shard-00000.bin.1.tmp", ".progress/.00000.json.1.tmp"):
        (output / leftover).write_bytes(b"of a killed run")
    for number in (0, 1):
        (output / ".progress" / f"0000{number}.json").unlink()
    status, text = runs.run(SCRIPT, *words_for(inputs, output), num_processes=2)
    assert status == 0, text
    assert "wrote" in text and "2/14" in text, text
    found = {path.relative_to(output): data for path, data in snapshot(output).items()}
    assert found == {path.relative_to(whole): data for path, data in snapshot(whole).items()}


def test_what_is_complete_is_left_alone(inputs, whole, extract, capsys):
    before, times = snapshot(whole), {path: path.stat().st_mtime_ns for path in snapshot(whole)}
    assert extract(words_for(inputs, whole)) == 0
    assert "complete already" in capsys.readouterr().out
    assert_nothing_lost(before)
    assert {path: path.stat().st_mtime_ns for path in snapshot(whole)} == times


def test_damage_is_found_and_repaired(inputs, whole, extract, refused, tmp_path, capsys):
    output = copied(whole, tmp_path / "out")
    assert extract(["--verify", f"--output={output}"]) == 0
    assert "verified" in capsys.readouterr().out
    shard = output / "shard-00001.bin"
    shard.write_bytes(b"x" + shard.read_bytes()[1:])
    says = [f"{shard} is damaged", "SHA-256", f"delete it and run {SCRIPT} again"]
    refused(["--verify", f"--output={output}"], *says)
    shard.unlink()
    assert extract(words_for(inputs, output)) == 0
    assert snapshot(output).keys() == {output / path.relative_to(whole) for path in snapshot(whole)}
    assert shard.read_bytes() == (whole / "shard-00001.bin").read_bytes()


# ------------------------------------------------------------ what is refused


@pytest.mark.parametrize("unfinished", [False, True])
def test_other_settings_are_refused(inputs, whole, refused, tmp_path, unfinished):
    output = copied(whole, tmp_path / "out", ["manifest.json"] if unfinished else [])
    other = write_autoencoder(tmp_path / "other.pth", seed=1)
    fewer = tmp_path / "fewer"
    shutil.copytree(inputs / "imagenet", fewer)
    next(fewer.rglob("*.JPEG")).unlink()
    for changes, says in (
        ({"resolution": 64}, ["resolution: 32 -> 64", "record_shape: (8, 4, 4) -> (8, 8, 8)"]),
        ({"flip": False}, ["flips: True -> False"]),
        ({"autoencoder": other}, ["autoencoder_sha256"]),
        ({"path": fewer}, ["other image files or classes (14 then, 13 now)"]),
        ({"labels": False}, ["other image files or classes (14 then, 14 now)"]),
        ({"images_per_shard": 5}, ["images_per_shard: 4 -> 5"]),
        ({"precision": "bf16"}, ["precision: 'fp32' -> 'bf16'"]),
    ):
        words = words_for(inputs, output, **changes)
        refused(words, f"{output} holds latents begun with other settings", "former", *says)


def test_a_folder_with_something_else_is_refused(inputs, refused, tmp_path):
    (tmp_path / "0.npy").write_bytes(b"mine")
    refused(words_for(inputs, tmp_path), "holds 0.npy, but no latents of ours", "another folder")
    (tmp_path / "file").write_bytes(b"mine")
    refused(words_for(inputs, tmp_path / "file" / "out"), "cannot make the directory")
    assert not (tmp_path / ".lock").exists()


def test_two_runs_in_one_folder(inputs, refused, tmp_path):
    hold = (
        "import sys, utils; lock = utils.RunLock(sys.argv[1]); print('held', flush=True); input()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", hold, tmp_path / "out"], cwd=runs.ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert other.stdout.readline() == "held\n"
    says = f"{tmp_path / 'out'} is in use by process {other.pid}"
    refused(words_for(inputs, tmp_path / "out"), says, "another --output")
    other.communicate("\n")


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"path": ""}, ["--path is required"]),
        ({"path": "nowhere"}, ["there is no nowhere/train", "train/<wnid>/*.JPEG"]),
        ({"path": "nowhere", "dataset": "folder"}, ["nowhere does not exist"]),
        ({"autoencoder": "no.pth"}, ["there is no autoencoder no.pth"]),
        ({"dataset": "cifar10"}, ["--dataset is 'cifar10'", "folder, imagenet"]),
        ({"precision": "fp8"}, ["--precision is 'fp8'", "fp32, bf16, fp16"]),
        ({"resolution": 36}, ["--resolution is 36", "multiple of 8"]),
        ({"resolution": 0}, ["--resolution is 0", "1 or more"]),
        ({"batch_size": 0}, ["--batch_size is 0"]),
        ({"images_per_shard": 0}, ["--images_per_shard is 0"]),
        ({"num_workers": -1}, ["--num_workers is -1"]),
    ],
)
def test_wrong_flags(inputs, refused, tmp_path, changes, says):
    refused(words_for(inputs, tmp_path / "out", **changes), *says)
    assert not (tmp_path / "out").exists()


def test_moments_that_float16_cannot_hold(inputs, refused, tmp_path, extract):
    tensors = torch.load(inputs / "ae.pth", weights_only=True)
    tensors["quant_conv.bias"] += 1e6
    torch.save(tensors, tmp_path / "large.pth")
    words = words_for(inputs, tmp_path / "out", autoencoder=tmp_path / "large.pth")
    assert extract(words) == 1
    assert not list((tmp_path / "out").glob("*shard*"))
    refused(words, "not finite in float16", "--precision=fp32")


# ------------------------------------------------------------ unreadable images


@pytest.fixture
def broken(inputs, tmp_path):
    """Images of which the second of the first shard, and all of the last two, cannot be read."""
    shutil.copytree(inputs / "imagenet", tmp_path / "images")
    files = sorted((tmp_path / "images").rglob("*.JPEG"))
    for i in (1, 12, 13):
        files[i].write_bytes(files[i].read_bytes()[:50] if i == 1 else b"")
    return files


def test_unreadable_images_are_named_and_the_rest_is_kept(
    inputs, whole, broken, extract, capsys, tmp_path
):
    words = words_for(inputs, tmp_path / "out", path=tmp_path / "images", num_workers=1)
    for _ in range(2):  # again: it is not forgotten
        capsys.readouterr()
        status = extract(words)
        captured = capsys.readouterr()
        says = ["3 images cannot be read", *(str(broken[i]) for i in (1, 12, 13)), "no image",
                "--skip_unreadable", "same names"]  # fmt: skip
        assert_one_sentence(status, captured.out + captured.err, *says)
        shards = sorted(path.name for path in (tmp_path / "out").glob("shard-*"))
        assert shards == ["shard-00001.bin", "shard-00002.bin"]
    with pytest.raises(UserError, match="unfinished"):
        Features(tmp_path / "out")
    for i, path in enumerate(sorted((inputs / "imagenet").rglob("*.JPEG"))):
        shutil.copy(path, broken[i])
    assert extract(words) == 0
    for path in whole.glob("*.bin"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_the_next_image_stands_in_if_asked(inputs, whole, broken, extract, capsys, tmp_path):
    words = words_for(inputs, tmp_path / "out", path=tmp_path / "images", skip_unreadable=True)
    assert extract(words) == 0
    assert "3 images could not be read, the next stands in: 1, 12, 13" in capsys.readouterr().err
    features, original = Features(tmp_path / "out"), Features(whole)
    assert features.manifest["stand_ins"] == {"1": 2, "12": 0, "13": 0}
    assert features.labels[[1, 12, 13]].tolist() == original.labels[[2, 0, 0]].tolist()
    source = np.arange(NUM_IMAGES)
    source[[1, 12, 13]] = 2, 0, 0
    expected = original.read(np.repeat(source, 2) * 2 + np.tile([0, 1], NUM_IMAGES))
    np.testing.assert_allclose(features.read(range(28)), expected, rtol=2**-10, atol=1e-5)
    with pytest.warns(UserWarning, match="unreadable image"):  # as training on the images has it
        images = get_dataset("imagenet", path=tmp_path / "images", resolution=32)
        assert [images[0, i][1] for i in range(NUM_IMAGES)] == features.labels.tolist()
