"""What leaves the machine with wandb and TensorBoard, and what results that are published say of
it: numbers, no home directory, no keys, no command line. The name of TensorBoard's file holds the
host.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from libs.runtime import environment

ROOT = Path(__file__).resolve().parent.parent
WANDB_KEY = "0123456789abcdef0123456789abcdef01234567"
HUB_TOKEN = "hf_abcdefghijklmnopqrstuvwxyz012345"

LOGS = """
import socket, sys
socket.gethostname = lambda: "adas-machine"
from libs.runtime import MetricsLog
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
    content = b"".join(path.read_bytes() for path in files)
    assert b"loss" in content, "the numbers are there"
    secrets = [str(home), "ada-lovelace", "secret_script", WANDB_KEY, HUB_TOKEN, "--token",
               "--config.seed", "printed", "adas-machine", sys.executable]  # fmt: skip
    found = [secret for secret in secrets if secret.encode() in content and len(secret) > 3]
    assert found == []


def test_what_wandb_gets_is_all_that_it_uploads(logged):
    """No requirements.txt, metadata or output.log beside the record of numbers."""
    _, uploaded, _ = logged
    assert [path.suffix for path in uploaded] == [".wandb"]
    assert "adas-machine" not in uploaded[0].name


def test_what_a_run_records_of_its_machine(monkeypatch):
    """No command line, home directory or host: results are published. (A commit has no z.)"""
    monkeypatch.setattr(sys, "argv", ["/srv/zoe/train.py", f"--x={HUB_TOKEN}", "--seed=1"])
    found = json.dumps(environment())
    assert not [word for word in ("zoe", HUB_TOKEN, "seed", socket.gethostname()) if word in found]
