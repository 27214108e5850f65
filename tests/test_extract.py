"""scripts/extract_imagenet_feature.py: what it writes, in however many pieces, and what it refuses.

On generated images and a tiny autoencoder, in this process, in processes that are killed, and under
accelerate launch.
"""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import runs
import torch
from runs import assert_nothing_lost, assert_one_sentence, snapshot
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from writers import NUM_IMAGES, WNIDS, make_autoencoder, write_autoencoder, write_images

from datasets import get_dataset
from libs.data import load_autoencoder, open_latents
from libs.evaluate import Classifier, make_features
from utils import UserError

SCRIPT = "scripts/extract_imagenet_feature.py"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with the images, in imagenet/, and the autoencoder, vae/."""
    folder = tmp_path_factory.mktemp("inputs")
    write_images(folder / "imagenet")
    write_autoencoder(folder / "vae")
    return folder


def words_for(inputs, output, **changes):
    """The command line: 14 images in four shards, their last batches shorter."""
    values = {
        "path": inputs / "imagenet", "autoencoder": inputs / "vae", "output": output,
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

    def call(words, *says):
        before = snapshot(tmp_path, inputs)
        capsys.readouterr()
        status = extract(words)
        captured = capsys.readouterr()
        assert snapshot(tmp_path, inputs) == before
        return assert_one_sentence(status, captured.out + captured.err, *says)

    return call


def copied(folder, to, without=()):
    shutil.copytree(folder, to)
    for name in without:
        (to / name).unlink()
    return to


def files_in(folder):
    return {path.relative_to(folder): content for path, content in snapshot(folder).items()}


# ------------------------------------------------------------ what is written


def test_records_are_the_autoencoders_moments(whole, inputs):
    """Of the images as training on pixels crops them, and of their flips, rounded to float16."""
    latents, autoencoder = open_latents(whole), load_autoencoder(inputs / "vae")
    images = get_dataset("imagenet", path=inputs / "imagenet", resolution=32)
    x = torch.stack([images[0, i][0] for i in range(NUM_IMAGES)])
    for f, pixels in enumerate((x, x.flip(-1))):
        found = latents.read(np.arange(NUM_IMAGES) * 2 + f).astype(np.float32)
        # float16 has 11 bits; float32 sums in another order are far below.
        np.testing.assert_allclose(found, autoencoder.moments(pixels), rtol=2**-11, atol=1e-5)
    assert np.abs(latents.read([0]) - latents.read([1])).max() > 0.01
    assert latents.labels.tolist() == images.labels.tolist()
    manifest = latents.manifest
    assert manifest["class_names"] == tuple(WNIDS) and manifest["scale_factor"] == 0.18215
    assert manifest["autoencoder_sha256"] == autoencoder.sha256
    assert [shard["records"] for shard in manifest["shards"]] == [8, 8, 8, 4]
    dataset = get_dataset("imagenet256_features", path=whole, random_flip=True)
    assert (len(dataset), dataset.shape, dataset.num_classes) == (NUM_IMAGES, (8, 4, 4), 3)
    assert "centre crop to 32" in dataset.preprocessing


def test_a_folder_without_classes(inputs, extract, tmp_path, whole, capsys):
    words = words_for(inputs, tmp_path / "out", dataset="folder", labels=False, flip=False,
                      images_per_shard=100, batch_size=100, num_workers=1)  # fmt: skip
    assert extract(words) == 0
    assert "14 images, 14 records of (8, 4, 4) in 1 shards" in capsys.readouterr().out
    latents = open_latents(tmp_path / "out")
    assert latents.labels is None and not (tmp_path / "out" / "labels.bin").exists()
    ours, theirs = latents.read(range(14)), open_latents(whole).read(range(0, 28, 2))
    np.testing.assert_allclose(ours, theirs, rtol=2**-10, atol=1e-5)


@pytest.fixture(scope="module")
def featured(inputs, extract):
    """Words of a run with features of a classifier, and the folder that it wrote."""
    file = inputs / "classifier.safetensors"
    save_file(Classifier(channels=3, num_classes=3).state_dict(), file)
    more = dict(features="classifier", features_weights=file)
    assert extract(words_for(inputs, inputs / "featured", **more)) == 0
    return more, inputs / "featured"


def test_features_are_the_networks_tokens(whole, inputs, featured):
    """Of each image as it is flipped, beside latents that stay as they are."""
    more, folder = featured
    features = make_features("classifier", more["features_weights"], "cpu")
    options = dict(random_flip=True, seed=3)
    images = get_dataset("imagenet", path=inputs / "imagenet", resolution=32, **options)
    dataset = get_dataset("folder_features", path=folder, features=True, **options)
    plain = get_dataset("folder_features", path=whole, features=True, **options)
    assert dataset.feature_shape == (8 * 8, 128) and plain.feature_shape is None
    assert dataset.latents.manifest["features"] == features.name
    keys = [(epoch, i) for epoch in (0, 1) for i in range(NUM_IMAGES)]
    batches = DataLoader(dataset, batch_sampler=[keys[:9], keys[9:]])
    for x, y, tokens, key in zip(*map(torch.cat, zip(*batches, strict=True)), keys, strict=True):
        assert torch.equal(x, plain[key][0]) and y == plain[key][1]
        expected = features.tokens(0.5 * images[key][0][None] + 0.5)[0]
        # float16 has 11 bits; float32 sums of other batches are far below.
        torch.testing.assert_close(tokens.float(), expected, rtol=2**-11, atol=1e-6)
    assert tokens.dtype == torch.float16 and tokens.std() > 0.01


# ------------------------------------------------------------ interruptions


# Forks runs of the script and kills each with SIGKILL at its second or third rename, before it or
# after, until one ends by itself.
KILLED = """
import os, signal, sys
sys.path[:0] = [".", "scripts"]
import torch
torch.set_num_threads(1)
from diffusers import AutoencoderKL  # seconds, for every child
from libs.runtime import run_main
from scripts import extract_imagenet_feature as extract

def is_killed(rename, after):
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    replace, left = os.replace, [rename]
    def deadly(*paths):
        left[0] -= 1
        if left[0] or after:
            replace(*paths)
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
    os.replace = deadly
    run_main(extract.main, extract.FLAGS)
    os._exit(0)

kills = 0
while is_killed(2 + kills % 2, after=kills % 3 == 0):
    kills += 1
    assert kills < 60
print(kills)
"""


def test_kill_9_loses_and_repeats_nothing(inputs, whole, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *words_for(inputs, tmp_path / "out")],
        cwd=runs.ROOT, env=runs.environment(), capture_output=True, text=True,
        timeout=runs.TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.splitlines()[-1]) >= 4
    assert files_in(tmp_path / "out") == files_in(whole)


def test_two_processes_finish_what_one_began(inputs, whole, tmp_path):
    """Bit for bit: the bytes do not depend on who made a shard, nor the order of shards."""
    output = copied(whole, tmp_path / "out", ["labels.bin", "shard-00002.bin", "shard-00000.bin"])
    (output / ".shard-00000.bin.1.tmp").write_bytes(b"of a killed run")
    kept = (output / "shard-00001.bin").stat().st_mtime_ns
    status, text = runs.run(SCRIPT, *words_for(inputs, output), num_processes=2)
    assert status == 0 and "wrote" in text, text
    assert files_in(output) == files_in(whole)
    assert (output / "shard-00001.bin").stat().st_mtime_ns == kept


def test_what_is_complete_is_left_alone(inputs, whole, extract, capsys):
    before, times = snapshot(whole), {path: path.stat().st_mtime_ns for path in snapshot(whole)}
    assert extract(words_for(inputs, whole)) == 0
    assert "complete already" in capsys.readouterr().out
    assert_nothing_lost(before)
    assert {path: path.stat().st_mtime_ns for path in snapshot(whole)} == times


def test_features_are_resumed_and_verified(inputs, featured, extract, refused, tmp_path):
    more, folder = featured
    output = copied(folder, tmp_path / "out", ["shard-00000.bin", "features-00002.bin"])
    kept = (output / "features-00003.bin").stat().st_mtime_ns
    assert extract(words_for(inputs, output, **more)) == 0
    assert files_in(output) == files_in(folder)
    damaged = output / "features-00003.bin"
    assert damaged.stat().st_mtime_ns == kept and extract(["--verify", f"--output={output}"]) == 0
    damaged.write_bytes(b"x" + damaged.read_bytes()[1:])
    refused(["--verify", f"--output={output}"], f"{damaged.name} in {output} are damaged")
    refused(words_for(inputs, output), "begun with other settings (features, feature_shape)")


# ------------------------------------------------------------ what is refused


@pytest.mark.parametrize("unfinished", [False, True])
def test_other_settings_are_refused(inputs, whole, refused, tmp_path, unfinished):
    output = copied(whole, tmp_path / "out", ["shard-00003.bin"] if unfinished else [])
    other = write_autoencoder(tmp_path / "other", seed=1)
    fewer = tmp_path / "fewer"
    shutil.copytree(inputs / "imagenet", fewer)
    next(fewer.rglob("*.JPEG")).unlink()
    for changes, says in (
        ({"resolution": 64}, "record_shape, resolution"),
        ({"autoencoder": other}, "autoencoder_sha256"),
        ({"path": fewer}, "images_sha256, num_images"),
        ({"precision": "bf16"}, "precision"),
    ):
        words = words_for(inputs, output, **changes)
        refused(words, f"{output} holds other files, or latents begun with other settings", says)


def test_a_folder_with_something_else_is_refused(inputs, refused, tmp_path):
    (tmp_path / "mine.npy").write_bytes(b"mine")
    refused(words_for(inputs, tmp_path), "holds other files", "mine.npy", "another folder")


def test_moments_that_float16_cannot_hold(inputs, tmp_path, extract, capsys):
    network = make_autoencoder()
    network.quant_conv.bias.data += 1e6
    network.save_pretrained(tmp_path / "large")
    words = words_for(inputs, tmp_path / "out", autoencoder=tmp_path / "large")
    assert extract(words) == 1
    assert "not finite in float16: use --precision=fp32" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*shard*"))


def test_an_unreadable_image_is_named_and_the_shards_before_it_stay(
    inputs, whole, extract, tmp_path, capsys
):
    shutil.copytree(inputs / "imagenet", tmp_path / "images")
    words = words_for(inputs, tmp_path / "out", path=tmp_path / "images", num_workers=1)
    sixth = sorted((tmp_path / "images").rglob("*.JPEG"))[5]
    content = sixth.read_bytes()
    sixth.write_bytes(content[:50])
    assert extract(words) == 1
    runs.assert_one_sentence(1, capsys.readouterr().err, str(sixth))
    assert [path.name for path in (tmp_path / "out").glob("*shard*")] == ["shard-00000.bin"]
    with pytest.raises(UserError, match="out are unfinished: run scripts/extract"):
        open_latents(tmp_path / "out")
    sixth.write_bytes(content)
    assert extract(words) == 0
    for path in whole.glob("*.bin"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
