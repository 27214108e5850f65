"""Several processes, with Hugging Face's `datasets` installed beside our datasets.py, which
accelerate may import in multi-process runs; and launches that are not what they seem.
"""

import importlib.metadata
import json
import subprocess
import sys

import numpy as np
import pytest
import runs

PORT = "--main_process_port"


@pytest.fixture(scope="module", autouse=True)
def hugging_face_datasets():
    """Without it these tests would prove nothing."""
    try:
        importlib.metadata.version("datasets")
    except importlib.metadata.PackageNotFoundError:
        pytest.fail("Hugging Face's datasets is not installed: pip install -e '.[test]' does it")


def run_in(folder, command):
    """(exit status, output) of a command whose working directory is not the checkout."""
    done = subprocess.run(
        command, cwd=folder, env=runs.environment(), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=runs.TIMEOUT_S,
    )  # fmt: skip
    return done.returncode, done.stdout


def script(folder, body):
    """A script of a user's, elsewhere, that has the checkout on its path."""
    path = folder / "script.py"
    path.write_text(f"import sys\nsys.path.insert(0, {str(runs.ROOT)!r})\n{body}")
    return str(path)


RANKS = """
import importlib.metadata, json, torch
from libs import flags
from libs.launch import make_accelerator

def main(args):
    accelerator = make_accelerator()
    import datasets
    total = accelerator.reduce(torch.tensor(1.0 + accelerator.process_index), "sum").item()
    print(json.dumps(["rank", accelerator.process_index, accelerator.num_processes, total,
                      accelerator.device.type, datasets.__file__]) + "\\n", end="", flush=True)
    accelerator.end_training()

flags.run_main(main, {})
"""


def test_two_ranks_that_know_each_other(tmp_path):
    status, output = run_in(tmp_path, [*runs.launcher(2), script(tmp_path, RANKS)])
    assert status == 0, output
    found = [json.loads(line) for line in output.splitlines() if line.startswith('["rank"')]
    ours = str(runs.ROOT / "datasets.py")
    assert sorted(found) == [["rank", rank, 2, 3.0, "cpu", ours] for rank in (0, 1)], output


def test_training_on_two_processes_from_anywhere(tmp_path):
    words = runs.arguments(tmp_path / "run", train__n_steps=2, nnet__depth=3, train__num_workers=1)
    words = [word.replace("configs/", f"{runs.ROOT}/configs/") for word in words]
    status, output = run_in(tmp_path, [*runs.launcher(2), str(runs.ROOT / "train.py"), *words])
    assert status == 0 and "Grad strides" not in output, output
    log = (tmp_path / "run" / "output.log").read_text()
    assert "2 process(es), ranks [0, 1]," in log and "finished 2 steps" in log
    assert [line["step"] for line in runs.steps_logged(tmp_path / "run")] == [1, 2]


# The processes that do what the launcher's own words do: a state made before ours, without the
# choice of the CPU, is a run of its own in each process.
LATE = """
from accelerate import PartialState
PartialState()
""" + RANKS


def test_ranks_that_would_train_alone_stop(tmp_path):
    status, output = run_in(tmp_path, [*runs.launcher(2), script(tmp_path, LATE)])
    errors = [line for line in output.splitlines() if line.startswith("error")]
    assert status != 0 and '["rank"' not in output, output
    assert errors[0].startswith("error: the launcher started 2 processes, but accelerate sees 1")
    assert "check the launch command" in errors[0]
    own = output.split("error:", 1)[0]
    assert "Traceback" not in own, "before the launcher's own report"


def test_several_processes_without_multi_gpu_stop(tmp_path):
    command = [word for word in runs.launcher(2) if word not in ("--multi_gpu", PORT, "0")]
    assert len(command) == len(runs.launcher(2)) - 3
    status, output = run_in(runs.ROOT, [*command, "train.py", *runs.arguments(tmp_path)])
    errors = [line for line in output.splitlines() if line.startswith("error:")]
    assert status != 0 and len(errors) == 1, output
    assert "asked for several processes but started one: add --multi_gpu" in errors[0]
    assert not (tmp_path / "metrics.jsonl").exists() and not (tmp_path / "ckpts").exists()


@pytest.mark.slow
def test_scripts_run_from_another_directory(tmp_path):
    """Where `import datasets` would find Hugging Face's, had the checkout not been put first."""
    weights, out = tmp_path / "classifier.safetensors", tmp_path / "stats" / "digits.npz"
    status, output = run_in(
        tmp_path,
        [sys.executable, runs.ROOT / "scripts" / "train_digits_classifier.py", f"--out={weights}"],
    )
    assert status == 0 and "held-out accuracy 0.9" in output, output
    status, output = run_in(
        tmp_path,
        [sys.executable, runs.ROOT / "scripts" / "compute_fid_stats.py", "--dataset=digits",
         "--resolution=8", "--features=digits_classifier", f"--weights={weights}",
         f"--out={out}", "--num_workers=0"],
    )  # fmt: skip
    assert status == 0, output
    with np.load(out) as statistics:
        assert statistics["count"] == 1797 and statistics["mu"].shape == (48,)
        assert str(statistics["extractor"]).startswith("digits_classifier-")
    elsewhere = "import datasets, sys; print(datasets.__version__, datasets.__file__)"
    version = importlib.metadata.version("datasets")
    status, output = run_in(tmp_path, [sys.executable, "-c", elsewhere])
    assert status == 0 and output.startswith(version) and "site-packages" in output, output
