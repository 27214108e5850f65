"""The whole road in seconds: train, resume, sample and evaluate a tiny network, by the scripts."""

import json

import pytest
import runs
from PIL import Image


def test_train_resume_sample_evaluate(in_process, tmp_path, capsys):
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

    pictures, file = tmp_path / "pictures", weights / "nnet_ema_rate_0.9.safetensors"
    changes = dict(n_samples=4, mini_batch_size=2, features="none", path=pictures)
    words = [f"--config.sample.{key}={value}" for key, value in changes.items()]
    assert in_process("eval", [f"--nnet_path={weights}", *words]) == 0
    assert len(list(pictures.glob("*.png"))) == 4
    result = tmp_path / "run" / "evaluation_12.json"
    before = result.read_bytes()
    assert "evaluation_12" in (tmp_path / "run" / "report.html").read_text()
    assert in_process("eval", [f"--nnet_path={file}", *words]) == 1
    assert result.read_bytes() == before and "another --output_path" in capsys.readouterr().err


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
