"""The whole road in seconds: train, resume, sample and evaluate a tiny network, by the scripts."""

import json

import pytest
import runs
from PIL import Image


def test_train_resume_sample_evaluate(in_process, tmp_path):
    """A run that stops and goes on has the losses of one that never stopped; its weights give
    pictures and an evaluation.
    """
    tiny = dict(train__num_workers=0, train__grid_samples=0)
    assert in_process("train", runs.arguments(tmp_path / "whole", **tiny)) == 0
    assert in_process("train", runs.arguments(tmp_path / "run", **tiny, train__n_steps=4)) == 0
    assert in_process("train", runs.arguments(tmp_path / "run", **tiny)) == 0
    assert runs.numbers(tmp_path / "run") == runs.numbers(tmp_path / "whole")

    weights, picture = tmp_path / "run" / "ckpts" / "12.ckpt", tmp_path / "grid.png"
    words = [f"--nnet_path={weights}", "--classes=3,7", "--n=2", "--steps=2", f"--out={picture}"]
    assert in_process("sample", words) == 0
    assert Image.open(picture).size[0] >= 600

    changes = dict(sample__n_samples=4, sample__mini_batch_size=2, sample__features="none")
    words = runs.arguments(tmp_path / "run", **changes, sample__path=tmp_path / "pictures")
    assert in_process("eval", [*words, f"--nnet_path={weights}"]) == 0
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 4
    assert (tmp_path / "run" / "evaluation.json").is_file()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name, steps", [("digits_T_flow", 1000), ("digits_T_DiM", 2800)])
def test_the_whole_training_on_the_digits(in_process, tmp_path, name, steps):
    """`make demo`; on other machines sums differ in their last bits."""
    classifier = tmp_path / "classifier.safetensors"
    made = ["--dataset=digits", "--epochs=10", f"--out={classifier}"]
    assert runs.run("scripts/train_classifier.py", *made)[0] == 0
    words = [f"--config=configs/{name}.py", f"--workdir={tmp_path}"]
    assert in_process("train", words) == 0
    weights = f"--nnet_path={tmp_path}/ckpts/{steps}.ckpt"
    words += [weights, f"--config.sample.fid_weights_path={classifier}"]
    assert in_process("eval", words) == 0
    result = json.loads((tmp_path / "evaluation.json").read_text())
    assert result["class_agreement"] >= 0.98 and result["real_halves"]["ratio"] <= 1.4
