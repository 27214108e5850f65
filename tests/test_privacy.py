"""What leaves the machine with wandb and TensorBoard, and what results that are published say of
it: numbers, no home directory, no keys, no command line.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from libs.runtime import logs

ROOT = Path(__file__).resolve().parent.parent
WANDB_KEY = "0123456789abcdef0123456789abcdef01234567"
HUB_TOKEN = "hf_abcdefghijklmnopqrstuvwxyz012345"

LOGS = """
import socket, sys
socket.gethostname = lambda: "adas-machine"
from libs.run import MetricsLog
log = MetricsLog(sys.argv[1], tensorboard=True, wandb=True)
log.truncate_after(0)
print("printed", *sys.argv)
log.write(1, {"loss": 0.5})
log.write(2, {"loss": 0.25, "outcome": "ok"})
log.close()
"""


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """(home, files that wandb would upload, TensorBoard's files) of a run in a home directory."""
    home = tmp_path_factory.mktemp("homes") / "ada-lovelace"
    directory = home / "project" / "run"
    directory.mkdir(parents=True)
    script = home / "project" / "secret_script.py"
    script.write_text(LOGS)
    environment = {
        **os.environ, "HOME": str(home), "WANDB_MODE": "offline", "WANDB_API_KEY": WANDB_KEY,
        "HF_TOKEN": HUB_TOKEN, "USER": "ada-lovelace", "PYTHONPATH": os.pathsep.join(
            [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }  # fmt: skip
    words = [sys.executable, script, directory, f"--token={HUB_TOKEN}", "--config.seed=1"]
    done = subprocess.run(
        list(map(str, words)), cwd=script.parent, env=environment, capture_output=True, text=True,
        timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (wandb_run,) = (directory / "wandb").glob("offline-run-*")
    uploaded = [*wandb_run.glob("*.wandb"), *filter(Path.is_file, wandb_run.rglob("files/**/*"))]
    return home, uploaded, list((directory / "tensorboard").glob("events*"))


@pytest.mark.parametrize("kind", ["wandb", "tensorboard"])
def test_loggers_get_numbers_alone(logged, kind):
    home, uploaded, events = logged
    files = {"wandb": uploaded, "tensorboard": events}[kind]
    content = b"".join(path.name.encode() + path.read_bytes() for path in files)
    assert b"loss" in content, "the numbers are there"
    secrets = [str(home), "ada-lovelace", "secret_script", WANDB_KEY, HUB_TOKEN, "--token",
               "--config.seed", "printed", "adas-machine", sys.executable]  # fmt: skip
    found = [secret for secret in secrets if secret.encode() in content and len(secret) > 3]
    assert found == []


def test_what_wandb_gets_is_all_that_it_uploads(logged):
    """No requirements.txt, metadata or output.log beside the record of numbers."""
    _, uploaded, _ = logged
    assert [path.suffix for path in uploaded] == [".wandb"]


@pytest.mark.parametrize(
    "word, expected",
    [
        ("--config.dataset.path=/srv/ada/data", "--config.dataset.path=~/data"),
        ("/srv/ada", "~"),
        ("/srv/adam/data", "/srv/adam/data"),
        ("/srv/ada-2", "/srv/ada-2"),
        (f"--token={HUB_TOKEN}", "--token=***"),
        (f"x{HUB_TOKEN}", f"x{HUB_TOKEN}"),
        (f"key {HUB_TOKEN}", "key ***"),
        ("--api_key=abc", "--api_key=***"),
        (f"WANDB_API_KEY={WANDB_KEY}", "WANDB_API_KEY=***"),
        (f"--note={WANDB_KEY}", "--note=***"),
        ("https://ada:pass@example.org/x", "https://***@example.org/x"),
        ("--config.optimizer.lr=0.001", "--config.optimizer.lr=0.001"),
        ("--output_path=results/hf_model.json", "--output_path=results/hf_model.json"),
    ],
)
def test_home_and_keys_are_scrubbed(monkeypatch, word, expected):
    monkeypatch.setenv("HOME", "/srv/ada")
    assert logs.scrubbed(word) == expected


def test_the_recorded_command_line_is_scrubbed(monkeypatch):
    monkeypatch.setenv("HOME", "/srv/ada")
    monkeypatch.setattr(sys, "argv", ["/srv/ada/train.py", f"--x={HUB_TOKEN}", "--seed=1"])
    assert logs.environment()["argv"] == ["~/train.py", "--x=***", "--seed=1"]
