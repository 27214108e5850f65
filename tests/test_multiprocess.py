"""Several processes, started outside the checkout, with Hugging Face's `datasets` installed beside
our datasets.py, which accelerate may import in runs of several processes.
"""

import importlib.util
import subprocess
import sys

import pytest
import runs


def run_in(folder, command):
    """(exit status, output) of a command whose working directory is not the checkout."""
    done = subprocess.run(
        command, cwd=folder, env=runs.environment(), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=runs.TIMEOUT_S,
    )  # fmt: skip
    return done.returncode, done.stdout


@pytest.mark.slow  # test_engine.py trains on two processes from the checkout
def test_training_on_two_processes_from_anywhere(tmp_path):
    elsewhere = "import datasets; print(datasets.__version__, datasets.__file__)"
    status, output = run_in(tmp_path, [sys.executable, "-c", elsewhere])
    assert status == 0 and "site-packages" in output, "else this test would prove nothing"
    assert importlib.util.find_spec("datasets").origin == str(runs.ROOT / "datasets.py")
    words = runs.arguments(tmp_path / "run", train__n_steps=2, nnet__depth=3, train__num_workers=1)
    words = [word.replace("configs/", f"{runs.ROOT}/configs/") for word in words]
    status, output = run_in(tmp_path, [*runs.launcher(2), str(runs.ROOT / "train.py"), *words])
    assert status == 0 and "Grad strides" not in output, output
    log = (tmp_path / "run" / "output.log").read_text()
    assert "2 process(es), ranks [0, 1]," in log and "finished 2 steps" in log
    assert [line["step"] for line in runs.steps_logged(tmp_path / "run")] == [1, 2]
