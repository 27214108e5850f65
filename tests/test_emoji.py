"""The road of pretrained/: emoji out of a font and folders, training, the check for copies."""

import json

import numpy as np
import pytest
import torch
import writers
from PIL import Image

from scripts import make_emoji_dataset

UNICODE = """
# group: Smileys & Emotion
1F600      ; fully-qualified     # grinning face
263A FE0F  ; fully-qualified     # smiling face
263A       ; unqualified         # smiling face
# group: People & Body
"""
TONES = ["", *(f" 1F3F{x}" for x in "BCDEF")]
COOKS = [f"{who}{tone} 200D 1F373" for who in ("1F468", "1F469", "1F9D1") for tone in TONES]
RUNNERS = ["1F3C3", "1F3C3 200D 2640 FE0F", "1F3C3 1F3FD 200D 2642 FE0F 200D 27A1 FE0F"]


@pytest.fixture
def emoji_test(tmp_path):
    people = [f"{points} ; fully-qualified # person" for points in (*COOKS, *RUNNERS)]
    path = tmp_path / "emoji-test.txt"
    path.write_text(UNICODE + "\n".join(people), encoding="utf-8")
    return path


def test_groups_and_families(emoji_test):
    """A family has one name and at most four pictures, other ones in each set."""
    groups = make_emoji_dataset.read_groups(emoji_test)
    assert len(groups) == 2 + len(COOKS) + len(RUNNERS)
    assert groups["☺\ufe0f"] == "smileys" and groups["👨\u200d🍳"] == "people"
    chosen = make_emoji_dataset.choose_variants(groups, "noto")
    assert sorted(chosen.values()) == ["☺", *["🏃"] * 3, "😀", *["🧑🍳"] * 4]
    assert chosen.keys() != make_emoji_dataset.choose_variants(groups, "twemoji").keys()


def test_pictures_on_white(emoji_test, tmp_path, monkeypatch, in_process):
    """Transparent pixels are white, and pictures that are no squares are padded."""
    folder = tmp_path / "art"
    folder.mkdir()
    for name, size in {"1f600": (32, 16), "263A": (16, 16), "other": (16, 16)}.items():
        picture = np.zeros((*size[::-1], 4), np.uint8)
        picture[:, : size[0] // 2] = 255, 0, 0, 255  # red, the right half transparent
        Image.fromarray(picture).save(folder / f"{name}.png")
    monkeypatch.setattr(make_emoji_dataset, "HELD_OUT", 0.0)
    words = [f"--out={tmp_path}/out", f"--font={folder}", f"--emoji_test={emoji_test}"]
    assert in_process("scripts.make_emoji_dataset", [*words, f"--sets=art={folder}"]) == 0
    found = sorted((tmp_path / "out" / "train").glob("smileys-*/*.png"))
    assert [path.name for path in found] == ["1f600.png", "263a-fe0f.png"] * 2  # in art and noto
    wide = np.asarray(Image.open(found[0]))
    assert wide.shape == (64, 64, 3) and (wide[:15] == 255).all() and (wide[-15:] == 255).all()
    assert (wide[20:44, :28] == (255, 0, 0)).all() and (wide[20:44, 36:] == 255).all()


def test_copies_are_found(tmp_path, in_process, monkeypatch):
    """After two steps of training on random pictures."""
    for i in range(36):
        path = tmp_path / ("held_out" if i < 12 else "train") / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        writers.noise_image(i, (16, 16)).save(path)
    words = ["--dataset=folder", f"--path={tmp_path}/train", "--resolution=16", "--batch_size=8"]
    words += ["--epochs=1", f"--out={tmp_path}/classifier.safetensors"]
    assert in_process("scripts.train_classifier", words) == 0
    tiny = {"nnet.dim": 16, "nnet.depth": 5, "nnet.input_size": 16, "nnet.num_classes": 2}
    tiny |= {"train.n_steps": 2, "train.batch_size": 4, "train.grid_samples": 0}
    tiny |= {"train.num_workers": 0, "train.mixed_precision": "no", "sample.sample_steps": 2}
    tiny |= {"dataset.path": tmp_path / "train", "dataset.resolution": 16}
    tiny |= dict.fromkeys(("sample.fid_weights_path", "loss.repa.path"), words[-1][6:])
    words = ["--config=configs/emoji64_flow.py", f"--workdir={tmp_path}/run"]
    words += [f"--config.{key}={value}" for key, value in tiny.items()]
    assert in_process("train", words) == 0
    words = [f"--nnet_path={tmp_path}/run/ckpts/2.ckpt", f"--held_out={tmp_path}/held_out"]
    words += [f"--output_path={tmp_path}/a.json", f"--out={tmp_path}/a.png"]
    assert in_process("scripts.check_memory", words) == 0
    figures = json.loads((tmp_path / "a.json").read_text())
    assert figures["n"] == 12 and figures["sampling"]["network_calls"] == 2
    assert all(0.1 < figures[space]["ratio"] < 10 for space in ("pixels", "features"))
    # training pictures in place of drawn ones: the distance to the nearest is 0.
    paths = sorted((tmp_path / "train").rglob("*.png"))[:12]
    train = torch.from_numpy(np.stack([Image.open(path) for path in paths])).movedim(3, 1) / 255
    sampler = "libs.evaluate.generate.ImageSampler.__call__"
    monkeypatch.setattr(sampler, lambda self, indices, *given: train[indices])
    assert in_process("scripts.check_memory", words) == 0
    figures = json.loads((tmp_path / "a.json").read_text())
    # cdist takes norms through products: an eighth of float32's digits of 768 numbers are left.
    assert all(figures[space]["ratio"] < 1e-2 for space in ("pixels", "features"))
    assert figures["pixels"]["kid_to_train"] < figures["pixels"]["kid"]
