"""benchmarks/check_commands.py, on the CPU."""

import importlib.util
import json
import subprocess
import sys

import pytest
import runs

SCRIPT = runs.ROOT / "benchmarks" / "check_commands.py"


@pytest.fixture(scope="module")
def check():
    spec = importlib.util.spec_from_file_location("check_commands", SCRIPT)
    module, path = importlib.util.module_from_spec(spec), list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


def test_every_command_is_in_the_readme(check):
    for words, batch, images in check.TRAININGS.values():
        found = check.adapted(check.readme_command(*words), 2, {"train.n_steps": 3}, workdir="w")
        assert found[found.index("--num_processes") + 1] == "2" and "--multi_gpu" in found
        assert found[-2:] == ["--config.train.n_steps=3", "--workdir=w"]
        assert batch == 8 * images
    words = check.readme_command(*check.EVALUATION)
    alone = check.adapted(words, 1, {}, nnet_path="weights")
    assert "--multi_gpu" not in alone and "--nnet_path=weights" in alone
    assert sum(word.startswith("--nnet_path") for word in alone) == 1


@pytest.mark.parametrize("batch, processes, limit, expected", [
    (768, 8, 96, 96), (768, 2, 96, 96), (240, 2, 30, 30), (240, 4, 16, 15), (8, 2, 4, 4),
])  # fmt: skip
def test_micro_batches_divide_the_batch(check, batch, processes, limit, expected):
    assert check.micro_batch(batch, processes, limit) == expected


def test_distance(check):
    def lines(*losses):
        return [{"step": i + 1, "loss": loss} for i, loss in enumerate(losses)]

    one = lines(1.0, 2.0, "Infinity")
    assert check.distance(one, one, "loss") == 0
    assert check.distance(lines(1.0, 2.1, "Infinity"), one, "loss") == pytest.approx(0.05)
    assert check.distance(lines(1.0, 2.0, 3.0), one, "loss") == float("inf")
    assert check.distance(lines(1.0, 2.0), one, "loss") == float("inf")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_training_and_evaluation_of_tiny_networks(tmp_path):
    out = tmp_path / "rows.json"
    done = subprocess.run(
        [sys.executable, SCRIPT, "--tiny", "--processes=2", "--steps=3", "--commands=S,H,eval",
         f"--out={out}"],
        env=runs.environment(), capture_output=True, text=True, timeout=2 * runs.TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text())
    assert [row["command"] for row in rows] == ["S", "H", "eval"]
    assert all(row["good"] for row in rows) and rows[0]["steps"] == 3
