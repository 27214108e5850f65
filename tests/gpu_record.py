"""`make test-gpu`: runs the tests marked cuda on this machine's GPUs, six at a time, and writes
benchmarks/results/gpu_tests.json. COMMIT names the commit where there is no git.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "benchmarks" / "results" / "gpu_tests.json"


def find_commit():
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return os.environ.get("COMMIT") or subprocess.check_output(command, text=True).strip()


def run_tests(report):
    """Exit status of the self-check, then of the tests, which find its kernels in the cache."""
    files = [str(f) for f in sorted(ROOT.glob("tests/test_*.py")) if "mark.cuda" in f.read_text()]
    options = ["-q", "-m", "cuda and not slow", "-n", "6", f"--junitxml={report}", "--durations=8"]
    modules = (["libs.ops", "--check"], ["pytest", *options, *files])
    return max(subprocess.run([sys.executable, "-m", *m], cwd=ROOT).returncode for m in modules)


def main():
    if not torch.cuda.is_available():
        sys.exit("PyTorch finds no GPU here")
    commit, start = find_commit(), time.monotonic()
    with tempfile.NamedTemporaryFile(suffix=".xml") as report:
        status = run_tests(report.name)
        (suite,) = xml.etree.ElementTree.parse(report.name).getroot()
    failed, skipped = int(suite.get("failures")) + int(suite.get("errors")), suite.get("skipped")
    record = {
        "commit": commit, "gpu": torch.cuda.get_device_name(), "gpus": torch.cuda.device_count(),
        "torch": torch.__version__, "passed": int(suite.get("tests")) - failed - int(skipped),
        "failed": failed, "skipped": int(skipped), "seconds": round(time.monotonic() - start, 1),
    }  # fmt: skip
    RECORD.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))
    sys.exit(status)


if __name__ == "__main__":
    main()
